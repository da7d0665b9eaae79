"""The assistant's turns are found in the text of any chat template, or refused; a row as one text."""

from pathlib import Path

import pytest

from chat_cases import ADD, CALL, TEMPLATES, assistant, called, chat_tokenizer, user
from hf_moe.data.bad_rows import DataError, RowError
from hf_moe.data.chat_text import ChatText, ChatWriter, read_chat_template, text_of
from hf_moe.data.formats import Chat, Instruction, Pair, Text
from hf_moe.data.tokenizer import encode_documents
from tiny_moe import tiny_tokenizer

TALK = [user("two?"), assistant("four"), user("three?"), assistant("seven")]
REASONED = [
    user("two?"),
    assistant("four", reasoning_content="r1", thinking="r1"),
    user("three?"),
    assistant("seven", reasoning_content="r2", thinking="r2"),
]
TOOLS = [
    user("two?"),
    *called(reasoning_content="r1"),
    assistant("It is 42."),
    user("again?"),
    *called(),
    assistant("42"),
]
QWEN_CALL = '\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>'
OSS_CALL = ' to=functions.add<|channel|>commentary json<|message|>{"a": 1}<|call|>'


def turns(tokenizer, messages, **chat):
    writer, chat = ChatWriter(tokenizer), Chat(messages, **chat)
    text = writer.text(chat)
    return [text[begin:end] for begin, end in writer.assistant_turns(chat)]


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        ("qwen3", TALK, ["four<|im_end|>", "<think>\n\n</think>\n\nseven<|im_end|>"]),
        ("qwen3", REASONED, ["four<|im_end|>", "<think>\nr2\n</think>\n\nseven<|im_end|>"]),
        ("qwen3", TOOLS, [QWEN_CALL, "It is 42.<|im_end|>", QWEN_CALL, "<think>\n\n</think>\n\n42<|im_end|>"]),
        ("olmoe", TALK, ["four<|endoftext|>", "seven<|endoftext|>"]),
        (
            "gpt-oss",
            REASONED,
            [
                "<|channel|>final<|message|>four<|end|>",
                "<|channel|>analysis<|message|>r2<|end|><|start|>assistant<|channel|>final<|message|>seven<|return|>",
            ],
        ),
        (
            "gpt-oss",
            TOOLS,
            [
                OSS_CALL,
                "<|channel|>final<|message|>It is 42.<|end|>",
                OSS_CALL,
                "<|channel|>final<|message|>42<|return|>",
            ],
        ),
        ("thinking", REASONED, ["r1\n</think>\n\nfour<|im_end|>", "r2\n</think>\n\nseven<|im_end|>"]),
        ("thinking", TALK, ["\n</think>\n\nfour<|im_end|>", "\n</think>\n\nseven<|im_end|>"]),
    ],
)
def test_the_assistants_turns_are_found_without_marks(template, messages, expected):
    assert turns(chat_tokenizer(template), messages, tools=[ADD]) == expected


def test_the_models_own_words_in_a_message_change_nothing():
    messages = [
        user("say <|im_start|>assistant\nfour<|im_end|>"),
        assistant("four four"),
        user("four"),
        assistant("4"),
    ]
    assert turns(chat_tokenizer("qwen3"), messages) == ["four four<|im_end|>", "<think>\n\n</think>\n\n4<|im_end|>"]


@pytest.mark.parametrize(
    "template",
    [
        # a template that writes the whole conversation otherwise once more comes, or loses what came before
        "{% for m in messages %}{{ loop.length }}{{ m.role }}{{ m.content | upper }}{% endfor %}",
        "{% for m in messages | reverse %}<{{ m.role }}>{{ m.content }}{% endfor %}",
    ],
)
def test_turns_that_cannot_be_found_are_refused(template):
    with pytest.raises(RowError, match=r"message 2 cannot be told.*assistant_only: false"):
        turns(chat_tokenizer(template), TALK)


# templates that TRL has rewritten with marks, and which it leaves as they are otherwise
PUBLISHED = ("lfm2", "llama3", "qwen2_5", "qwen3_instruct_2507", "cohere", "gemma3", "nemotron_3_nano")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_templates_have_the_turns_that_trl_marks(name):
    trl = pytest.importorskip("trl", reason="needs TRL: pip install -e '.[trl]'")
    from transformers.utils.chat_template_utils import render_jinja_template

    folder = Path(trl.__file__).parent / "chat_templates"
    tokenizer = chat_tokenizer((folder / f"{name}.jinja").read_text())
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|eot_id|>", "<end_of_turn>", "<|END_OF_TURN_TOKEN|>"]},
        replace_extra_special_tokens=False,
    )
    marked = (folder / f"{name}_training.jinja").read_text()
    messages = [{"role": "system", "content": "Be brief."}, *TALK]
    [text], [spans] = render_jinja_template(
        [messages], chat_template=marked, return_assistant_tokens_mask=True, **tokenizer.special_tokens_map
    )
    assert turns(tokenizer, messages) == [text[begin:end].strip() for begin, end in spans]


@pytest.mark.parametrize("name", ["qwen3", "gptoss", "glm4moe", "deepseekv3"])
def test_published_templates_without_a_marked_twin(name):
    trl = pytest.importorskip("trl", reason="needs TRL: pip install -e '.[trl]'")
    expected = {
        "qwen3": ["four<|im_end|>", "<think>\nr2\n</think>\n\nseven<|im_end|>"],
        "gptoss": [
            "<|channel|>final<|message|>four<|end|>",
            "<|channel|>analysis<|message|>r2<|end|><|start|>assistant<|channel|>final<|message|>seven<|return|>",
        ],
        "glm4moe": ["\n<think></think>\nfour<|user|>", "\n<think>r2</think>\nseven"],
        "deepseekv3": ["four<｜end▁of▁sentence｜>", "seven<｜end▁of▁sentence｜>"],
    }
    tokenizer = chat_tokenizer((Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]}, replace_extra_special_tokens=False)
    assert turns(tokenizer, REASONED) == expected[name]


def test_a_prompt_ends_where_its_text_does():
    chat = Chat([user("two?"), assistant("four")], prompt=1)
    writer = ChatWriter(chat_tokenizer("thinking"))
    begin, end = writer.prompt_end(chat)
    assert writer.text(chat)[begin:end] == "\n</think>\n\nfour<|im_end|>\n"
    changed = TEMPLATES["thinking"].replace("assistant\\n<think>\\n' }}{%- endif", "assistant: ' }}{%- endif")
    with pytest.raises(RowError, match="writes the prompt differently"):
        ChatWriter(chat_tokenizer(changed)).prompt_end(chat)


def test_tools_and_options_reach_the_template():
    template = "{{ tools }}{{ mood }}{{ size }}{% for m in messages %}{{ m.content }}{% endfor %}"
    writer = ChatWriter(chat_tokenizer(template), {"mood": "calm", "size": 1})
    written = writer.text(Chat([user("hi")], tools=[ADD], options={"size": 2}))
    assert written == f"{[ADD]}calm2hi"


def test_a_list_of_parts_that_a_template_writes_as_it_is_is_refused():
    chat = Chat([user([{"type": "text", "text": "hi"}])])
    with pytest.raises(RowError, match="not a list of parts"):
        ChatWriter(chat_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}")).text(chat)
    parts = "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
    assert ChatWriter(chat_tokenizer(parts)).text(chat) == "hi"


def test_every_row_has_a_text():
    tokenizer = chat_tokenizer("olmoe")
    written = text_of(Chat([user("two?"), assistant("four")]), lambda: tokenizer)
    assert isinstance(written, ChatText)
    assert written == "<|endoftext|><|user|>\ntwo?\n<|assistant|>\nfour<|endoftext|>"
    # the control token is one where the template wrote it, and text where a text has it
    ids = encode_documents(tokenizer, ["a", written, str(written)])
    assert [row.count(tokenizer.eos_token_id) for row in ids] == [0, 2, 0]
    assert ids[0] == encode_documents(tokenizer, ["a"])[0]
    assert text_of(Text("a"), None) == "a"
    assert text_of(Pair("a ", "b"), None) == "a b"
    instruction = Instruction("Add.", "1 and 2", "3")
    assert text_of(instruction, lambda: tokenizer).endswith("<|user|>\nAdd.\n\n1 and 2\n<|assistant|>\n3<|endoftext|>")
    assert text_of(instruction, tiny_tokenizer).endswith("### Input:\n1 and 2\n\n### Response:3")


def test_what_a_template_refuses_is_named_with_the_messages():
    with pytest.raises(RowError, match=r"refuses the messages .*two\?"):
        ChatWriter(chat_tokenizer("{{ raise_exception('no') }}")).text(Chat([user("two?")]))
    with pytest.raises(DataError, match="no chat template"):
        ChatWriter(tiny_tokenizer())


def test_a_broken_template_is_not_blamed_on_the_rows(tmp_path):
    with pytest.raises(DataError, match=r"is not valid Jinja: .*end of print statement.* \(line 2\)") as caught:
        ChatWriter(chat_tokenizer("{% for m in messages %}\n{{ m.content ")).text(Chat([user("two?")]))
    assert not isinstance(caught.value, RowError)  # nor left out by on_bad_row: skip
    (tmp_path / "weights.jinja").write_bytes(b"\xd0\x0a")
    for name, message in {"weights.jinja": r"not UTF-8 text \(byte 0\)", "nope.jinja": "No such file"}.items():
        with pytest.raises(DataError, match=f"{name}' .*{message}"):
            read_chat_template(tmp_path / name)


def test_a_call_is_kept_as_it_was_given():
    chat = Chat([user("two?"), *called()])
    before = str(chat)
    ChatWriter(chat_tokenizer("qwen3")).assistant_turns(chat)
    assert str(chat) == before
    assert CALL["function"]["name"] == "add"

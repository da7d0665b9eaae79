"""Loss is taken on a whole text, on the completion, on the assistant's turns, and nowhere else."""

import json

import pytest

from chat_cases import ADD, TEMPLATES, called, chat_tokenizer
from hf_moe.data.bad_rows import BadRows, DataError
from hf_moe.data.encoding import IGNORED, Encoder, cut
from hf_moe.data.formats import FINE_TUNING, read_rows
from tiny_moe import tiny_tokenizer, words

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = [
    {"role": "user", "content": "two and two?"},
    {"role": "assistant", "content": "four"},
    {"role": "user", "content": "and three?"},
    {"role": "assistant", "content": "seven"},
]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def encode(tokenizer, records, max_length=128, on_bad_row="error", **options):
    data_set = read_rows(enumerate(records, start=1), FINE_TUNING, BadRows("a.jsonl", on_bad_row))
    encoder = Encoder(tokenizer, max_length=max_length, **options)
    return cut(data_set.apply(encoder.encode).values(), max_length, "a.jsonl")


def learned(tokenizer, example):
    """The text that the loss is taken on."""
    return tokenizer.decode([label for label in example.labels if label != IGNORED], skip_special_tokens=True)


def test_every_token_of_a_text_but_the_start_is_learned(tokenizer):
    encoding = encode(tokenizer, [{"text": "some words"}])
    (example,) = encoding.examples
    assert example.input_ids[0] == tokenizer.bos_token_id
    assert example.input_ids[-1] == tokenizer.eos_token_id
    assert example.labels == [IGNORED, *example.input_ids[1:]]
    assert (encoding.tokens, encoding.loss_tokens) == (len(example.input_ids), len(example.input_ids) - 1)


def test_a_long_text_becomes_pieces_and_nothing_is_lost(tokenizer):
    text = words(300)
    encoding = encode(tokenizer, [{"text": text}], max_length=32)
    ids = [token for example in encoding.examples for token in example.input_ids]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert max(len(example.input_ids) for example in encoding.examples) == 32
    assert all(example.labels[0] == IGNORED for example in encoding.examples)
    assert encoding.truncated == 0


def test_text_that_spells_a_special_token_is_text(tokenizer):
    (example,) = encode(tokenizer, [{"text": f"a{tokenizer.eos_token}b"}]).examples
    assert example.input_ids.count(tokenizer.eos_token_id) == 2  # the start and the end


def test_only_the_completion_is_learned(tokenizer):
    (example,) = encode(tokenizer, [{"prompt": "two and two?", "completion": " four"}]).examples
    assert learned(tokenizer, example) == " four"
    assert example.labels[-1] == tokenizer.eos_token_id


def test_only_the_completion_of_a_chat_is_learned(tokenizer):
    (example,) = encode(tokenizer, [{"prompt": CHAT[:3], "completion": CHAT[3:]}]).examples
    assert learned(tokenizer, example) == "seven"


def test_only_the_assistant_is_learned(tokenizer):
    (example,) = encode(tokenizer, [{"messages": CHAT}]).examples
    assert learned(tokenizer, example) == "fourseven"


def test_the_whole_conversation_is_learned_if_asked_for(tokenizer):
    (example,) = encode(tokenizer, [{"messages": CHAT}], assistant_only=False).examples
    assert example.labels == [IGNORED, *example.input_ids[1:]]


def test_what_is_cut_is_counted_and_what_has_no_loss_left_is_dropped(tokenizer):
    long = {"prompt": words(200), "completion": "x"}
    half = {"prompt": "a", "completion": words(200)}
    encoding = encode(tokenizer, [half, long], max_length=32)
    assert (len(encoding.examples), encoding.truncated, encoding.dropped) == (1, 2, 1)
    assert "2 cut to the row length; 1 dropped" in str(encoding)


def test_nothing_left_to_learn_is_an_error(tokenizer):
    with pytest.raises(DataError, match="longer rows"):
        encode(tokenizer, [{"prompt": words(200), "completion": "x"}], max_length=16)


def test_a_template_without_generation_marks_gives_the_same_labels(tokenizer):
    plain = chat_tokenizer(TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", ""))
    (example,) = encode(plain, [{"messages": CHAT}]).examples
    (marked,) = encode(tokenizer, [{"messages": CHAT}]).examples
    assert (example.input_ids, example.labels) == (marked.input_ids, marked.labels)


@pytest.mark.parametrize("template", TEMPLATES)
def test_labels_begin_and_end_with_the_assistants_turns(template):
    plain = chat_tokenizer(template)
    (example,) = encode(plain, [{"messages": CHAT, "tools": [ADD]}], max_length=1000).examples
    text = plain.decode([label for label in example.labels if label != IGNORED])
    assert "and three?" not in text
    assert "user" not in text
    assert text.index("four") < text.index("seven")
    assert text.endswith(("<|im_end|>", "<|return|>", plain.eos_token))


def test_the_prompt_of_a_thinking_template_is_cut_where_its_text_ends():
    """Its last token and the first of the answer may be one."""
    plain = chat_tokenizer("thinking")
    plain.add_tokens(["\n\n"])
    prompt = plain.apply_chat_template(CHAT[:1], add_generation_prompt=True)["input_ids"]
    assert plain.apply_chat_template(CHAT[:2])["input_ids"][: len(prompt)] != prompt
    record = {"prompt": CHAT[:1], "completion": CHAT[1:2]}
    (example,) = encode(plain, [record]).examples
    assert example.input_ids == plain.apply_chat_template(CHAT[:2])["input_ids"]
    assert plain.decode([label for label in example.labels if label != IGNORED]).endswith(
        "</think>\n\nfour<|im_end|>\n"
    )
    assert plain.decode(example.input_ids[: example.labels.count(IGNORED)]).endswith("<|im_start|>assistant\n<think>")


def test_of_a_completion_with_a_tools_answer_the_assistants_turns_are_learned():
    plain = chat_tokenizer("qwen3")
    record = {"prompt": CHAT[:1], "completion": [*called(), CHAT[1]], "tools": [ADD]}
    for options, includes in (({}, False), ({"assistant_only": False}, True)):
        (example,) = encode(plain, [record], max_length=1000, **options).examples
        text = plain.decode([label for label in example.labels if label != IGNORED])
        assert ("42" in text) is includes
        assert '"name": "add"' in text
        assert "four" in text
        assert "two and two?" not in text


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_and_template_variables_reach_the_tokens(as_text):
    template = "{{ tools | tojson }}{{ mood }}" + TEMPLATES["olmoe"]
    tools = json.dumps([ADD]) if as_text else [ADD]
    record = {"messages": CHAT, "tools": tools, "chat_template_kwargs": {"mood": "calm"}}
    (example,) = encode(chat_tokenizer(template), [record], max_length=1000, options={"mood": "bad"}).examples
    text = tiny_tokenizer().decode(example.input_ids)
    assert text.startswith(f"{json.dumps([ADD])}calm")


def test_a_null_key_of_a_message_is_none_on_every_version():
    """transformers 5.17 gives it to the template, which writes "None"."""
    template = "{% for m in messages %}{{ m.role }}{{ m.content }}{{ m.x is defined }}{% endfor %}"
    record = {"messages": [{"role": "assistant", "content": None, "x": None}]}
    (example,) = encode(chat_tokenizer(template), [record], assistant_only=False).examples
    assert tiny_tokenizer().decode(example.input_ids).startswith("assistantFalse")


def test_an_instruction_is_a_conversation_where_there_is_a_template(tokenizer):
    record = {"instruction": "Add.", "input": "1 and 2", "output": "three"}
    (chat,) = encode(tokenizer, [record]).examples
    assert tokenizer.decode(chat.input_ids).startswith("<user>Add.\n\n1 and 2<assistant>three")
    (plain,) = encode(tiny_tokenizer(), [record], max_length=1000).examples
    assert "### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:three" in tokenizer.decode(plain.input_ids)
    assert learned(tokenizer, chat) == learned(tokenizer, plain) == "three"


ODD = [{"text": "a"}, {"text": None}, {"text": "b"}, {"text": "  "}, {"body": "c"}]


def test_bad_rows_end_a_run_with_their_count_and_numbers(tokenizer):
    with pytest.raises(DataError, match=r"3 of 5 rows of 'a.jsonl' cannot be used \(rows 2, 4, 5\)\. Row 2: .*skip"):
        encode(tokenizer, ODD)
    with pytest.raises(DataError, match=r"2 of 2 rows|no row of 'a.jsonl' can be used. Row 1: .* is empty"):
        encode(tokenizer, [{"text": ""}, {"text": ""}], on_bad_row="skip")


def test_bad_rows_are_left_out_if_asked_for(tokenizer):
    assert len(encode(tokenizer, ODD, on_bad_row="skip").examples) == 2
    with pytest.raises(DataError, match="on_bad_row must be one of error, skip, got 'keep'"):
        encode(tokenizer, ODD, on_bad_row="keep")


PARTS = {"messages": [{"role": "assistant", "content": [{"type": "text", "text": "a"}]}]}


@pytest.mark.parametrize(
    ("odd", "usual"),
    [({"body": "a"}, {"text": "b"}), (PARTS, {"messages": CHAT}), ({"text": "a"}, {"messages": CHAT})],
)
def test_what_most_rows_have_is_meant_whichever_comes_first(odd, usual, tokenizer):
    assert len(encode(tokenizer, [odd, usual, usual], on_bad_row="skip").examples) == 2
    with pytest.raises(DataError, match=r"1 of 3 rows of 'a.jsonl' cannot be used \(row 1\)"):
        encode(tokenizer, [odd, usual, usual])


def test_one_row_that_a_template_refuses_is_settled_like_any_other():
    strict = TEMPLATES["olmoe"].replace(
        "{{ bos_token }}", "{% if messages | length > 2 %}{{ raise_exception('no') }}{% endif %}"
    )
    records = [{"messages": CHAT[:2]}, {"messages": CHAT}]
    assert len(encode(chat_tokenizer(strict), records, on_bad_row="skip").examples) == 1
    with pytest.raises(DataError, match=r"1 of 2 rows .*Row 2: the chat template refuses .* \(no\).*\}\]\. Mend"):
        encode(chat_tokenizer(strict), records)


@pytest.mark.parametrize("template", ["olmoe", TEMPLATE])
def test_rows_without_the_assistant_are_refused_by_that_name(template):
    with pytest.raises(DataError, match=r"no message of the assistant to learn from. Add one, or learn whole conv"):
        encode(chat_tokenizer(template), [{"messages": CHAT[:1]}])


def test_a_conversation_needs_a_template():
    with pytest.raises(DataError, match="chat_template"):
        encode(tiny_tokenizer(), [{"messages": CHAT}])


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (
            [{"text": "a"}, {"text": None}],
            r"1 of 2 rows of 'a.jsonl' .*\(row 2\). Row 2: 'text' must be a string, got None",
        ),
        ([{"prompt": "a", "completion": 4}], "two strings or two lists"),
        ([{"messages": []}], "must be a list of role and content"),
        ([{"messages": "hello"}], "must be a list of role and content"),
        ([{"text": ""}], "'text' is empty"),
        ([{"prompt": "a", "completion": " "}], "'completion' is empty"),
        ([{"messages": [{"role": "user", "content": 3}]}], "content must be a string or a list"),
        ([{"messages": CHAT, "tools": "[{"}], "'tools' is text and not valid JSON"),
        ([{"messages": CHAT, "tools": [3]}], "'tools' must be a list of schemas, got 3 in it"),
        ([{"messages": CHAT, "chat_template_kwargs": {"tokenize": False}}], "may not set 'tokenize'"),
        ([{"instruction": "a", "output": None}], "'output' must be a string"),
        ([{"conversations": [{"from": "narrator", "value": "x"}]}], "'from' must be one of .* got 'narrator'"),
        (
            [{"messages": CHAT}, {"messages": [{"role": "assistant", "content": [{"type": "text", "text": "a"}]}]}],
            "row 2.*sometimes a string and sometimes a list of parts",
        ),
    ],
)
def test_a_bad_record_is_named(tokenizer, records, message):
    with pytest.raises(DataError, match=message):
        encode(tokenizer, records)

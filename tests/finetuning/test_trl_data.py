"""What TRL's trainers get to learn from: rows, labels and tokens as the other recipes have them."""

import json

import pytest

pytest.importorskip("trl", reason="needs TRL: pip install hf-moe[trl]")

from chat_cases import ADD, TEMPLATES, assistant, called, chat_tokenizer, user
from hf_moe.adapters.expert_lora import expert_lora_config
from hf_moe.data.bad_rows import DataError
from hf_moe.data.encoding import IGNORED
from hf_moe.finetuning.arguments import RecipeError
from hf_moe.finetuning.trl import DpoArguments, DPOTrainer, SftArguments, SFTTrainer
from hf_moe.finetuning.trl_data import TrlDataArguments, read_for_dpo, read_for_sft
from tiny_moe import hf_moe_model, tiny_tokenizer

OTHER = {"type": "function", "function": {"name": "find", "parameters": {"city": {"type": "string", "default": None}}}}
FIND = {"type": "function", "function": {"name": "find", "arguments": {"city": "Oslo"}}}


def write(folder, name, records):
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def arguments_for(kind, folder, **options):
    given = {"use_cpu": True, "bf16": False, "max_length": 600, "gradient_checkpointing": False, "disable_tqdm": True}
    return kind(str(folder / "out"), dataloader_pin_memory=False, **{**given, **options})


def sft(sources, folder, tokenizer=None, choices=None, **options):
    training = arguments_for(SftArguments, folder, **options)
    data = TrlDataArguments(sources, **(choices or {}))
    read = read_for_sft(data, training, tokenizer or tiny_tokenizer())
    return training, read.train, read.held_out


def dpo(sources, folder, tokenizer=None, choices=None, **options):
    training = arguments_for(DpoArguments, folder)
    data = TrlDataArguments(sources, **(choices or {}))
    read = read_for_dpo(data, training, tokenizer or tiny_tokenizer(), **options)
    return training, read.train, read.held_out


def test_weights_mix_the_training_records(tmp_path):
    tokenizer = tiny_tokenizer()
    ours = write(tmp_path, "ours", [{"text": f"a{i}", "id": i} for i in range(60)])
    known = write(tmp_path, "known", [{"text": f"b{i}"} for i in range(60)])
    sources = [{"path": ours, "weight": 3}, {"path": known, "weight": 1}]
    _, train, held_out = sft(sources, tmp_path, tokenizer, {"held_out": 0.1})
    texts, held = (
        {tokenizer.decode(ids, skip_special_tokens=True) for ids in part["input_ids"]} for part in (train, held_out)
    )
    share = sum(tokenizer.decode(ids[1:2]) == "a" for ids in train["input_ids"]) / len(train)
    assert 0.6 < share < 0.9
    assert train.column_names == ["input_ids", "labels"]
    assert len(held_out) == 12
    assert not texts & held


@pytest.mark.parametrize(
    ("records", "more", "message"),
    [
        ([{"body": "a"}] * 3, [], "it needs 'prompt' and 'chosen' and 'rejected', or 'chosen' and 'rejected'"),
        ([{"chosen": "a", "rejected": "b"}] * 3, [{"chosen": "a"}] * 3, "it needs 'prompt' and 'chosen'"),
        ([{"chosen": "a", "rejected": None}] * 3, [], "no row .* can be used. Line 1: it has no 'rejected'"),
        ([{"chosen": "a", "rejected": "b"}, {"chosen": "a", "rejected": " "}] * 2, [], r"\(lines 2, 4\).*is empty"),
        ([{"chosen": "a", "rejected": [user("b")]}] * 3, [], "must be all strings or all lists"),
        ([{"chosen": [user("a")], "rejected": [user("b")]}] * 3, [], "no first message in common"),
        (
            [{"prompt": "a", "chosen": "a", "rejected": "b"}] * 2 + [{"chosen": "a", "rejected": "b"}],
            [],
            r"\(line 3\)",
        ),
        (
            [{"chosen": "a", "rejected": "b"}] * 2 + [{"prompt": "a", "chosen": "a", "rejected": "b"}],
            [],
            r"\(line 3\). Line 3: it has a 'prompt', and most rows have none",
        ),
        (
            [{"chosen": "a", "rejected": "b"}, {"chosen": [user("a")], "rejected": [user("a"), assistant("b")]}],
            [],
            r"\(line 2\). Line 2: an answer is sometimes a string and sometimes a list of messages",
        ),
        (
            [{"prompt": "a", "chosen": "a", "rejected": "b"}] * 3,
            [{"chosen": "a", "rejected": "b"}] * 3,
            "some of the preferences have a 'prompt' and some have none",
        ),
    ],
)
def test_preferences_that_cannot_be_used_are_refused(records, more, message, tmp_path):
    sources = [write(tmp_path, "one", records)] + ([write(tmp_path, "two", more)] if more else [])
    with pytest.raises(DataError, match=message):
        dpo(sources, tmp_path)


def test_nothing_to_train_on_is_refused(tmp_path):
    path = write(tmp_path, "one", [{"text": "a"}] * 3)
    with pytest.raises(DataError, match="weight 0"):
        sft([{"path": path, "weight": 0}], tmp_path)
    with pytest.raises(RecipeError, match="no data"):
        TrlDataArguments()
    with pytest.raises(RecipeError, match="held_out_records must be at least 1, got 0"):
        TrlDataArguments([path], held_out_records=0)
    with pytest.raises(DataError, match="Choose longer rows"):
        sft([write(tmp_path, "long", [{"prompt": "word " * 50, "completion": "a"}] * 3)], tmp_path, max_length=8)


@pytest.mark.parametrize(
    "options", [{"eos_token": "</s>"}, {"chat_template_path": "a"}, {"dataset_text_field": "body"}]
)
def test_options_that_would_have_no_effect_are_refused(options, tmp_path):
    with pytest.raises(RecipeError, match=f"{next(iter(options))} has no effect here"):
        sft([write(tmp_path, "one", [{"text": "a"}] * 3)], tmp_path, **options)


def test_assistant_only_loss_without_a_conversation_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="no data set has any"):
        sft([write(tmp_path, "one", [{"text": "a"}] * 3)], tmp_path, assistant_only_loss=True)


@pytest.mark.parametrize("bad", [{"text": ""}, {"text": None}, {"body": "b"}])
def test_bad_rows_are_settled_as_elsewhere(bad, tmp_path, capsys):
    path = write(tmp_path, "one", [{"text": "a", "id": 1}, bad, {"text": "b"}, {"text": "c"}])
    with pytest.raises(DataError, match=r"1 of 4 rows of .*\(line 2\)"):
        sft([path], tmp_path)
    _, train, held_out = sft([path], tmp_path, choices={"on_bad_row": "skip"})
    assert len(train) + len(held_out) == 3
    printed = capsys.readouterr().err
    assert printed.count("not used: the column") == 1
    assert "1 bad row left out (line 2)" in printed


CHATS = {
    "tools": {"messages": [user("two?"), *called(), assistant("It is 42.", reasoning_content="r")], "tools": [ADD]},
    "as text": {"messages": [user("two?"), assistant(None, tool_calls=[FIND])], "tools": json.dumps([OTHER])},
    "plain": {"messages": [user("hey"), assistant("hello")]},
    "options": {"messages": [user("hey"), assistant("hello")], "chat_template_kwargs": {"mood": "calm"}},
    "sharegpt": {"conversations": [{"from": "human", "value": "hey"}, {"from": "gpt", "value": "hello"}]},
}


def test_sft_learns_what_the_template_writes_of_every_row(tmp_path):
    """Data sets of which one has tools and reasoning and another has none, in one run, through TRL's trainer."""
    tokenizer = chat_tokenizer("{{ mood }}" + TEMPLATES["qwen3"])
    sources = [write(tmp_path, name.replace(" ", "-"), [record] * 2) for name, record in CHATS.items()]
    training, train, held_out = sft(sources, tmp_path, tokenizer, assistant_only_loss=True)
    model = hf_moe_model(vocab_size=len(tokenizer), max_position_embeddings=600, num_hidden_layers=1)
    trainer = SFTTrainer(model, args=training, train_dataset=train, eval_dataset=held_out, processing_class=tokenizer)
    seen = {tokenizer.decode(row["input_ids"]): row["labels"] for row in trainer.train_dataset}
    for name, record in CHATS.items():
        messages = record.get("messages", CHATS["plain"]["messages"])
        tools = {"tools": [ADD], "as text": [OTHER]}.get(name)
        options = record.get("chat_template_kwargs", {})
        text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options)
        learned = tokenizer.decode([label for label in seen[text] if label != IGNORED])
        assert "hey" not in learned
        assert "two?" not in learned
        assert '"city": null' not in learned
    assert any('"default": null' in text for text in seen)  # the file's own
    assert trainer.evaluate()["eval_loss"] > 0


def test_dpo_gets_tools_and_no_keys_of_other_rows(tmp_path):
    tokenizer = chat_tokenizer("{{ mood }}" + TEMPLATES["qwen3"])
    tools = {"prompt": [user("two?")], "chosen": called(), "rejected": [assistant("no")], "tools": [ADD]}
    found = {"prompt": [user("where?")], "chosen": [assistant(None, tool_calls=[FIND])], "rejected": [assistant("no")]}
    plain = {
        "prompt": [user("hey")], "chosen": [assistant("hello", reasoning_content="r")], "rejected": [assistant("no")],
        "chat_template_kwargs": {"mood": "bad"},
    }  # fmt: skip
    sources = [write(tmp_path, f"r{i}", [record] * 2) for i, record in enumerate((tools, found, plain))]
    training, train, held_out = dpo(sources, tmp_path, tokenizer, options={"mood": "calm"})
    model = hf_moe_model(vocab_size=len(tokenizer), max_position_embeddings=600, num_hidden_layers=1)
    trainer = DPOTrainer(
        model,
        args=training,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=expert_lora_config(model, r=2),
    )
    seen = {tokenizer.decode(row["prompt_ids"] + row["chosen_ids"]) for row in trainer.train_dataset}
    expected = {
        tokenizer.apply_chat_template(
            [*record["prompt"], *record["chosen"]], tools=record.get("tools"), tokenize=False, mood=mood
        )
        for record, mood in ((tools, "calm"), (found, "calm"), (plain, "bad"))
    }
    assert seen == expected


def test_a_preference_that_the_template_refuses_is_settled_before_training(tmp_path):
    strict = "{% if messages | length > 2 %}{{ raise_exception('no') }}{% endif %}" + TEMPLATES["olmoe"]
    good = {"prompt": [user("hey")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
    path = write(tmp_path, "one", [good, good, {**good, "chosen": [assistant("a"), user("b")]}])
    with pytest.raises(DataError, match=r"\(line 3\). Line 3: the chat template refuses the messages"):
        dpo([path], tmp_path, chat_tokenizer(strict))
    _, train, _ = dpo([path], tmp_path, chat_tokenizer(strict), {"on_bad_row": "skip"})
    assert len(train) == 1


@pytest.mark.parametrize(("options", "learned"), [({}, "hello"), ({"completion_only_loss": False}, "hihello")])
def test_the_loss_is_where_sft_options_say(options, learned, tmp_path):
    tokenizer = tiny_tokenizer()
    path = write(tmp_path, "one", [{"prompt": "hi", "completion": "hello"}] * 3)
    _, train, _ = sft([path], tmp_path, tokenizer, **options)
    labels = [label for label in train[0]["labels"] if label != IGNORED]
    assert tokenizer.decode(labels, skip_special_tokens=True) == learned
    chat = write(tmp_path, "two", [{"messages": [user("hey"), assistant("hello")]}] * 3)
    for assistant_only in (False, True):
        _, train, _ = sft([chat], tmp_path, chat_tokenizer("olmoe"), assistant_only_loss=assistant_only)
        assert (train[0]["labels"].count(IGNORED) == 1) is not assistant_only

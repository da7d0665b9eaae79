"""Loss is taken on a whole text, on the completion, on the assistant's turns, and nowhere else."""

import pytest

from hf_moe.training.bad_rows import BadRows, DataError
from hf_moe.training.encoding import IGNORED, Encoder, cut
from hf_moe.training.formats import FINE_TUNING, read_rows
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


def test_a_template_without_generation_marks_is_refused(tokenizer):
    plain = tiny_tokenizer()
    plain.chat_template = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    with pytest.raises(DataError, match="assistant_only: false"):
        encode(plain, [{"messages": CHAT}])


def test_a_conversation_needs_a_template():
    with pytest.raises(DataError, match="chat_template"):
        encode(tiny_tokenizer(), [{"messages": CHAT}])


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"text": "a"}, {"text": None}], r"1 of 2 rows of 'a.jsonl' .*\(row 2\). Row 2: 'text' must be a string, got None"),
        ([{"prompt": "a", "completion": 4}], "two strings or two lists"),
        ([{"messages": []}], "must be a list of role and content"),
        ([{"messages": "hello"}], "must be a list of role and content"),
    ],
)
def test_a_bad_record_is_named(tokenizer, records, message):
    with pytest.raises(DataError, match=message):
        encode(tokenizer, records)

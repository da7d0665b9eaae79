"""The embedded corpus: enough text, the same every time, nothing on both sides of the split."""

import pytest

from hf_moe.data import corpus
from hf_moe.data.bad_rows import DataError
from hf_moe.data.corpus import Domain, byte_count, embedded_corpus, passages, split_domain

TEXTS = [f"document {number}\n" + "x" * 900 for number in range(40)]


@pytest.fixture(scope="module")
def domains():
    return embedded_corpus(train_bytes=80_000, held_out_bytes=10_000)


def test_every_embedded_domain_has_text_on_both_sides(domains):
    assert list(domains) == ["code", "docs", "legal", "readme", "arithmetic"]
    for domain in domains.values():
        assert 20_000 < domain.train_bytes <= 80_000
        assert 3_000 < domain.held_out_bytes <= 10_000


def test_no_document_is_on_both_sides(domains):
    for domain in domains.values():
        assert not set(domain.train) & set(domain.held_out)


def test_code_and_docs_share_no_docstring(domains):
    code = "".join(domains["code"].train + domains["code"].held_out)
    for text in domains["docs"].held_out:
        for paragraph in text.split("\n\n"):
            assert len(paragraph) < 300 or paragraph not in code


def test_embedded_text_is_the_same_again(domains):
    again = embedded_corpus(train_bytes=80_000, held_out_bytes=10_000)
    assert {name: domain.sha256() for name, domain in again.items()} == {
        name: domain.sha256() for name, domain in domains.items()
    }


def test_arithmetic_is_right():
    for document in corpus._arithmetic()[:20]:
        for line in document.splitlines():
            if "=" in line:
                left, right = line.split(" = ")
                assert eval(left) == int(right), line


def test_split_keeps_whole_documents_within_the_limits():
    domain = split_domain("letters", TEXTS, train_bytes=10_000, held_out_bytes=5_000)
    assert set(domain.train + domain.held_out) <= set(TEXTS)
    assert 9_000 < domain.train_bytes <= 10_000
    assert 4_000 < domain.held_out_bytes <= 5_000


def test_split_does_not_depend_on_the_order():
    forward = split_domain("letters", TEXTS, train_bytes=10_000, held_out_bytes=5_000)
    assert split_domain("letters", TEXTS[::-1], train_bytes=10_000, held_out_bytes=5_000) == forward


def test_held_out_avoids_large_documents_and_takes_at_most_a_fifth():
    large = "y" * 30_000
    domain = split_domain("letters", [*TEXTS, large], train_bytes=10**6, held_out_bytes=10**6)
    assert large in domain.train
    total = sum(map(byte_count, [*TEXTS, large]))
    assert domain.held_out_bytes <= total // 5


def test_repeated_documents_count_once():
    domain = split_domain("letters", TEXTS * 3, train_bytes=10**6, held_out_bytes=10**6)
    assert sorted(domain.train + domain.held_out) == sorted(TEXTS)


@pytest.mark.parametrize(
    "documents", [[], ["x" * 9_000], ["a", "b"], ["same " * 2_000] * 5], ids=["none", "one", "short", "repeated"]
)
def test_too_little_text_is_refused(documents):
    with pytest.raises(DataError, match=r"'letters' has \d+ bytes .* at least 6000 bytes .* Add text"):
        split_domain("letters", documents, train_bytes=10_000, held_out_bytes=1_000)


def test_hash_tells_texts_and_splits_apart():
    hashes = {
        Domain("a", ("x", "y"), ("z",)).sha256(),
        Domain("a", ("xy",), ("z",)).sha256(),
        Domain("a", ("x",), ("y", "z")).sha256(),
        Domain("a", ("x", "y"), ("Z",)).sha256(),
    }
    assert len(hashes) == 4


@pytest.mark.parametrize(
    "text", ["", "short", "line\n" * 5_000, "one line " * 9_000, "para\n\n" * 4_000, "é" * 20_000]
)
def test_passages_lose_nothing(text):
    pieces = passages(text)
    assert "".join(pieces) == text
    assert all(byte_count(piece) < 4 * corpus.PASSAGE_BYTES for piece in pieces)


def test_repeated_paragraphs_are_dropped_across_documents():
    licence = "Permission is hereby granted, free of charge, to any person " * 6
    first, second = f"Copyright 2020 A\n\n{licence}", f"Copyright 2021 B\n\n{licence}\n\n{'An own clause. ' * 30}"
    kept = corpus._without_repeats([first, second])
    assert licence.strip() in kept[0]
    assert licence.strip() not in kept[1]
    assert "An own clause." in kept[1]


def test_text_comes_from_the_packages_that_the_recipes_use_and_from_no_other():
    names = {distribution.metadata["Name"].lower() for distribution in corpus._distributions()}
    assert {"transformers", "torch", "peft", "safetensors", "pyarrow"} <= names
    # installed beside them in every environment that runs this test
    assert not {"pytest", "pluggy", "hf-moe", "hf_moe"} & names

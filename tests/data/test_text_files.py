"""The user's own text: what is read, and what is refused with file, rule and way out."""

import json

import pytest

from hf_moe.data.bad_rows import DataError
from hf_moe.data.text_files import read_domains
from tiny_moe import words


def read(*paths):
    return read_domains(paths, train_bytes=100_000, held_out_bytes=5_000)


def write_jsonl(path, records):
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return path


def test_a_text_file_is_a_domain_named_after_it(tmp_path):
    path = tmp_path / "My Notes (2).txt"
    text = words(6_000)
    path.write_text(text, encoding="utf-8")
    domains = read(path)
    assert list(domains) == ["My-Notes-2"]
    domain = domains["My-Notes-2"]
    assert sorted(domain.train + domain.held_out) == sorted(set(domain.train + domain.held_out))
    assert domain.train_bytes + domain.held_out_bytes == len(text.encode())


def test_jsonl_records_go_to_their_domain(tmp_path):
    records = [{"text": words(200, seed), "domain": f"d{seed % 2}", "other": 1} for seed in range(20)]
    path = write_jsonl(tmp_path / "mixed.jsonl", [*records, *({"text": words(200, s)} for s in range(20, 32))])
    domains = read(path)
    assert set(domains) == {"d0", "d1", "mixed"}
    for name in ("d0", "d1"):
        texts = {record["text"] for record in records if record["domain"] == name}
        assert set(domains[name].train + domains[name].held_out) == texts


def test_a_folder_gives_all_its_files(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text(words(3_000, 1))
    (tmp_path / "sub" / "b.md").write_text(words(3_000, 2))
    (tmp_path / "ignored.csv").write_text("x,y")
    assert set(read(tmp_path)) == {"a", "b"}


def test_bom_and_windows_line_ends_are_read(tmp_path):
    path = tmp_path / "windows.txt"
    path.write_bytes(b"\xef\xbb\xbf" + words(3_000).replace("\n", "\r\n").encode())
    domain = read(path)["windows"]
    assert "\r" not in "".join(domain.train + domain.held_out)
    assert "\ufeff" not in "".join(domain.train + domain.held_out)


GOOD = json.dumps({"text": "fine"})
BAD_FILES = {
    "empty": ("a.txt", b"", "is empty"),
    "blank": ("a.md", b" \n\n ", "is empty"),
    "latin1": ("a.txt", "caf\xe9 ".encode("latin-1") * 50, r"not UTF-8 text \(byte 3 is 0xe9\).*iconv"),
    "binary": ("a.txt", b"text\0more" * 50, "NUL bytes"),
    "wrong_kind": ("a.pdf", b"%PDF", "must end in .txt, .md, .jsonl, got '.pdf'"),
    "no_suffix": ("notes", b"text", "must end in"),
    "bad_json": ("a.jsonl", f"{GOOD}\n{{'text': 1}}\n".encode(), r"line 2: not valid JSON"),
    "deep_json": ("a.jsonl", b"[" * 200_000, r"line 1: not valid JSON"),
    "not_an_object": ("a.jsonl", f"{GOOD}\n\n[1]".encode(), r"line 3: must be a JSON object, got list"),
    "no_text_field": ("a.jsonl", b'{"content": "x", "id": 3}', r"line 1: the field 'text'.*'content', 'id'"),
    "text_is_null": ("a.jsonl", b'{"text": null}', r"line 1: the field 'text'"),
    "text_is_blank": ("a.jsonl", b'{"text": "  "}', r"line 1: the field 'text'"),
    "bad_domain": ("a.jsonl", b'{"text": "x", "domain": "../x"}', r"line 1: domain must be .* got '../x'"),
    "domain_is_number": ("a.jsonl", b'{"text": "x", "domain": 3}', r"line 1: domain must be .* got 3"),
    "lone_surrogate": ("a.jsonl", b'{"text": "\\ud800"}', r"line 1: .*surrogate"),
    "too_little": ("a.txt", b"only a few words", "'a' has 16 bytes"),
    "nameless": ("---.txt", b"text", "no letter or digit"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_refused(case, tmp_path):
    name, content, message = BAD_FILES[case]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read(path)
    assert path.stem in str(error.value)


def test_missing_paths_are_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read(tmp_path / "absent.txt")
    with pytest.raises(DataError, match=r"holds no .txt, .md, .jsonl file"):
        read(tmp_path)

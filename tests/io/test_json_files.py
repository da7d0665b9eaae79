"""JSON of strangers: bounded in size and depth, one sentence for whatever is wrong."""

import json
import math

import pytest

from hf_moe.io.json_files import DEEPEST, read_json, read_object

BAD = {
    "deep": (b"[" * 100_000, "nested deeper than 64 levels"),
    "deep and whole": (b"[" * 500 + b"]" * 500, "nested deeper than 64 levels"),
    "large": (b" " * 2001, "more than the 2,000 bytes"),
    "no text": (b'"\xff"', "utf-8"),
    "cut": (b'{"a": ', "Expecting value"),
    "NaN": (b"[NaN]", "NaN is no JSON value"),
    "endless number": (b"9" * 5000, "more than the 2,000 bytes|4300 digits"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused_is_a_value_error(case, tmp_path):
    data, words = BAD[case]
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(ValueError, match=words):
        read_json(tmp_path / "x.json", largest=2000 if case != "deep" else 10**6)


def test_what_is_within_the_bounds_is_read(tmp_path):
    deep = json.loads("[" * DEEPEST + "]" * DEEPEST)
    (tmp_path / "x.json").write_text(json.dumps({"a": deep[0], "b": math.inf}))
    with pytest.raises(ValueError, match="Infinity is no JSON value"):
        read_json(tmp_path / "x.json")
    assert read_object(tmp_path / "x.json", allow_nan=True) == {"a": deep[0], "b": math.inf}
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(ValueError, match="must hold a JSON object, got list"):
        read_object(tmp_path / "x.json")
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "absent.json")

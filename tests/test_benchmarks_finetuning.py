"""The comparison of ways of fine-tuning: what is held out, what is measured again, what the report says."""

import argparse
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="needs the extra recipes")

BENCHMARKS = str(Path(__file__).resolve().parent.parent / "benchmarks")


@pytest.fixture(scope="module", autouse=True)
def _benchmarks_path():
    sys.path.insert(0, BENCHMARKS)
    yield
    sys.path.remove(BENCHMARKS)


def test_the_recipe_holds_out_the_pieces_that_are_meant(tmp_path):
    from finetuning_texts import HELD_OUT_PIECES, write_data_set

    from finetuning import SIZES
    from hf_moe.data.sources import Source, hold_out, read_records

    train, held_out = ([f"{kind} {i}" for i in range(n)] for kind, n in (("train", 131), ("held", HELD_OUT_PIECES)))
    write_data_set(tmp_path / "law.jsonl", train, held_out)
    records = [record for _, record in read_records(Source(str(tmp_path / "law.jsonl")))[0]]
    kept, out = hold_out(records, share=SIZES["held_out"], most=SIZES["held_out_records"], where="law")
    assert [record["text"] for record in out] == held_out
    assert [record["text"] for record in kept] == train


def test_more_held_out_than_to_train_on_is_refused(tmp_path):
    from finetuning_texts import write_data_set

    with pytest.raises(ValueError, match="give more text"):
        write_data_set(tmp_path / "law.jsonl", ["a"], ["b", "c"])


def test_pieces_lose_no_text_and_are_long_enough():
    from finetuning_texts import PIECE_BYTES, pieces

    texts = ["\n\n".join(f"paragraph {i} of {n}" for i in range(n)) for n in (200, 3)]
    cut = pieces(texts)
    assert "".join(cut) == "".join(text + "\n\n" for text in texts)
    assert [len(piece) >= PIECE_BYTES for piece in cut[:-2]] == [True] * (len(cut) - 2)


def test_a_book_loses_its_licence(tmp_path):
    from finetuning_texts import documents

    book = "licence\n*** START OF THIS EBOOK ***\n\nProduced for Project Gutenberg\nIl était\n\n*** END ***\nlicence"
    (tmp_path / "books_xx").mkdir()
    (tmp_path / "books_xx" / "fr_a.latin1.txt").write_bytes(book.encode("latin-1"))
    assert documents(tmp_path, "french") == ["Il était"]
    with pytest.raises(FileNotFoundError, match="'german'"):
        documents(tmp_path, "german")


def fake_result():
    """Every method on two domains; what it learns and forgets is known."""
    from finetuning import METHODS, SIZES

    runs = {}
    for domain in ("french", "law"):
        for place, (name, method) in enumerate(METHODS.items()):
            metrics = {
                key: {"before": 2.0, "after": 2.0 + change, "routing_agreement": 0.5}
                for key, change in ((domain, -0.1 * (place + 1)), ("code", 0.2), ("docs", 0.4))
            }
            runs.setdefault(domain, {})[f"{name} at {method.learning_rate:g}"] = {
                "trained": 10, "saved_bytes": 2_000_000, "cpu_seconds_per_step": 0.25, "domains": metrics,
                "router_unchanged": True,
            }  # fmt: skip
    sizes = {"train_bytes": 10, "held_out_bytes": 5}
    settings = {"steps": 3, "rows_per_step": 10, **SIZES, "seed": 0, "device": "cpu", "versions": {"torch": "2"}}
    return {"settings": settings, "texts": dict.fromkeys(("french", "law", "code", "docs"), sizes), "runs": runs}


def test_the_report_has_the_means(tmp_path):
    from finetuning_report import write_report

    from finetuning import METHODS

    rates = {name: method.learning_rate for name, method in METHODS.items()}
    result = fake_result()
    write_report(result, rates, tmp_path / "plot.png", tmp_path / "page" / "README.md")
    page = (tmp_path / "page" / "README.md").read_text()
    assert "| expert LoRA | 10 | 2.0 MB | 0.25 | -0.20 | +0.30 | 50% |" in page
    assert "the same before and after" in page
    assert (tmp_path / "plot.png").read_bytes()[1:4] == b"PNG"
    assert "left out" not in page
    result["runs"]["law"]["full at 0.001"]["router_unchanged"] = False
    result["runs"]["german"] = {"full at 0.001": result["runs"]["law"]["full at 0.001"]}
    write_report(result, rates, tmp_path / "plot.png", tmp_path / "page" / "README.md")
    page = (tmp_path / "page" / "README.md").read_text()
    assert "IN SOME RUNS IT CHANGED" in page
    assert "until every method has run: german" in page


def test_runs_of_other_settings_are_not_mixed(tmp_path):
    from finetuning import read_result, settings

    options = argparse.Namespace(steps=3, output=tmp_path / "result.json")
    options.output.write_text(json.dumps({"settings": settings(options), "texts": {}, "runs": {}}))
    assert read_result(options)["runs"] == {}
    options.steps = 4
    with pytest.raises(SystemExit, match="another steps"):
        read_result(options)

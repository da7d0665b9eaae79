"""Benchmarks with made-up documents, as lm-eval's task files read them, in the Hub's layout."""

import json
from pathlib import Path

from tiny_moe import words

README = "---\nconfigs:\n- config_name: {config}\n  data_files:\n{splits}---\n"


def write_dataset(folder: Path, config: str, **splits: list[dict]) -> None:
    """`config/split.jsonl` and the README.md that lists them."""
    listed = ""
    for split, rows in splits.items():
        path = folder / config / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        listed += f"  - split: {split}\n    path: {config}/{split}.jsonl\n"
    (folder / "README.md").write_text(README.format(config=config, splits=listed), encoding="utf-8")


def question(i: int) -> dict:
    choices = {"text": [words(1 + (i + k) % 3, 10 * i + k).strip() for k in range(4)], "label": ["A", "B", "C", "D"]}
    return {"question": words(5 + i % 4, i).strip(), "choices": choices, "answerKey": "ABCD"[i % 4]}


def sum_of(i: int) -> dict:
    return {"question": f"what is {i} and {i + 1}", "answer": f"{words(3, i).strip()} #### {2 * i + 1}"}


def passage(i: int) -> dict:
    return {"passage": words(12 + i, i).strip(), "question": words(4, 50 + i).strip(), "label": i % 2}


def write_mirror(root: Path) -> Path:
    """ARC, BoolQ, GSM8K and WikiText of a few documents each."""
    write_dataset(root / "allenai/ai2_arc", "ARC-Easy", test=[question(i) for i in range(12)])
    write_dataset(root / "aps/super_glue", "boolq", validation=[passage(i) for i in range(7)])
    write_dataset(
        root / "openai/gsm8k", "main", train=[sum_of(i) for i in range(20, 30)], test=[sum_of(i) for i in range(5)]
    )
    pages = [{"page": words(30 + 20 * i, i)} for i in range(4)]
    write_dataset(root / "EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", test=pages)
    return root

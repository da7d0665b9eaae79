"""A tiny copy of benchmarks, and tiny models in folders."""

from pathlib import Path

import pytest

from tiny_benchmarks import write_mirror
from tiny_moe import MODELS, tiny_tokenizer


@pytest.fixture(scope="session")
def mirror(tmp_path_factory) -> Path:
    return write_mirror(tmp_path_factory.mktemp("mirror"))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """By family, a folder with a model and its tokenizer, made when it is first asked for."""
    root = tmp_path_factory.mktemp("models")

    def folder(family: str = "hf_moe", seed: int = 0) -> Path:
        path = root / f"{family}-{seed}"
        if not path.exists():
            model = MODELS[family](seed)
            tokenizer = tiny_tokenizer()
            model.resize_token_embeddings(len(tokenizer))
            model.save_pretrained(path)
            tokenizer.save_pretrained(path)
        return path

    return folder

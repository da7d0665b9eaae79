"""Two processes train one model, whatever came before; where they do not, the first step says so."""

import json
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="needs TRL: pip install hf-moe[trl]")

from tiny_moe import hf_moe_model, tiny_tokenizer
from torchrun import torchrun


@pytest.mark.slow
def test_an_evaluation_before_training_changes_nothing_or_is_an_error(tmp_path):
    """The Trainer of transformers trained each process apart then: gradient norms 4.23 and 3.79 instead of 2.85."""
    settings = {"vocab_size": len(tiny_tokenizer()), "max_position_embeddings": 64, "router_bias": True}
    model = hf_moe_model(**settings, router_aux_loss_coef=0.0, router_z_loss_coef=0.0)
    model.save_pretrained(tmp_path / "model")
    torchrun(Path(__file__).with_name("same_weights_worker.py"), str(tmp_path))
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert first == second
    if "moe native" in first:
        # transformers 5.24 does what MoeTrainer does
        native = first.pop("stock native")
        assert native == first["moe native"][0] or "has 2 parameters that are not the model's" in native
    for kind in [kind for kind in first if not kind.startswith(("stock", "own"))]:
        trained, after_evaluation = first.pop(kind)
        assert after_evaluation == trained, kind
    own = first.pop("own steps")
    assert "different weights ('lm_head.weight'): they train apart. Their gradients are the same" in own
    assert first.keys() == {"stock", "stock frozen", "stock bias"}
    for kind, sentence in first.items():
        assert "have different gradients ('" in sentence, kind
        assert "evaluate() or predict() came before train()" in sentence, kind

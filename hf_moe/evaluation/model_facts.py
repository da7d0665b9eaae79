"""Facts about the model for the results, and a fingerprint by which a resumed run recognises it."""

import hashlib
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_moe.evaluation.harness import HfMoeLM
from hf_moe.io.names import without_folders
from hf_moe.observability.explain import explain

SAMPLED = 4096


def model_facts(lm: HfMoeLM, model: str | PreTrainedModel, adapter: str | None) -> dict[str, Any]:
    """JSON values; of a folder's path the last part, so that nothing of this machine shows."""
    found = explain(lm.model)
    template = lm.tokenizer.chat_template
    name = model if isinstance(model, str) else model.name_or_path or type(model).__name__
    return {
        "name": without_folders(name),
        "adapter": None if adapter is None else without_folders(adapter),
        "model_type": found.model_type,
        "parameters": found.total_parameters,
        "active_parameters": found.active_parameters,
        "dtype": found.dtype,
        "experts_implementation": found.backend or None,
        "context": lm.max_length,
        "fingerprint": fingerprint(lm.model),
        "chat_template_sha256": None if template is None else hashlib.sha256(str(template).encode()).hexdigest(),
    }


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """SHA-256 of every tensor's name, shape and dtype and of up to 4,096 of its values, evenly spread.

    Two checkpoints that differ by training differ here, whatever files they lie in; a change of a few single values
    can go unseen.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        flat = tensor.detach().flatten()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        step = max(1, flat.numel() // SAMPLED)
        digest.update(flat[::step].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

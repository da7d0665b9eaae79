"""Models with more towers than text: freeze what text does not reach, save what their other inputs need."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import (
    AUDIO_TOKENIZER_NAME,
    FEATURE_EXTRACTOR_NAME,
    PROCESSOR_NAME,
    VIDEO_PROCESSOR_NAME,
    cached_file,
)

from hf_moe.training.autograd_graph import graph_leaves

# what turns images, video and sound into a model's inputs; the tokenizer is saved by itself
_PROCESSOR_FILES = (PROCESSOR_NAME, FEATURE_EXTRACTOR_NAME, VIDEO_PROCESSOR_NAME, AUDIO_TOKENIZER_NAME)
_TOKENS = 8


def has_other_towers(model: PreTrainedModel) -> bool:
    """Return whether the config describes more than a text model."""
    return model.config.get_text_config() is not model.config


def freeze_what_text_does_not_reach(model: PreTrainedModel) -> list[str]:
    """Freeze the parameters that a forward of text alone does not use; returns their names.

    They would get no gradient in any step: an optimizer state for them is memory for nothing, and
    DistributedDataParallel waits for their gradients.
    """
    reached = {id(parameter) for parameter in _reached_by_text(model)}
    frozen = [(name, p) for name, p in model.named_parameters() if p.requires_grad and id(p) not in reached]
    for _, parameter in frozen:
        parameter.requires_grad_(False)
    return [name for name, _ in frozen]


def _reached_by_text(model: PreTrainedModel) -> Iterator[Tensor]:
    """The parameters in the graph of a loss on a few tokens; no gradient is computed."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(_TOKENS, device=model.device).remainder(vocabulary)[None]
    was_training = model.training
    model.eval()  # no dropout, no balancing counts: a look changes nothing
    try:
        with torch.enable_grad():
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    finally:
        model.train(was_training)
    return graph_leaves(loss)


def copy_processor(source: str, folder: Path) -> list[str]:
    """Copy what prepares a model's images, video and sound from the checkpoint `source` (a folder, or a name on the
    Hub) into `folder`; returns the names of the files, none if `source` has none."""
    copied = []
    for name in dict.fromkeys(_PROCESSOR_FILES):
        try:
            found = cached_file(source, name)
        except OSError:  # it has no such file
            continue
        if found is not None:
            shutil.copyfile(found, folder / name)
            copied.append(name)
    return copied

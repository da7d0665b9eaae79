"""Check that a model keeps packed examples apart, by what it computes."""

import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_moe.adapters.expert_lora import rounding_share
from hf_moe.finetuning.arguments import RecipeError

# four rows of four examples
_ROWS, _EXAMPLES, _LENGTH = 4, 4, 16
# config fields that say how far attention, convolutions or compression reach
_REACH = re.compile(r".*(window|top_?k|budget|chunk|block|kernel|conv|compress|pool).*")


def check_packing(model: PreTrainedModel, row_length: int) -> None:
    """Check that the logits of packed examples do not depend on the examples before them in the row.

    Packed rows are computed again with other tokens in their first half: what comes after must stay. The shapes are
    the same, so that both runs round alike, whatever the dtype, but for experts that get another number of rows. (A
    comparison with the example alone would take for leaks the ties of sparse attention, which break differently at
    another length, and tokens that rounding sends to another expert.) Of every four tokens, those at one place after
    the boundary in four rows, the median change counts. It must be within `4 * u * sqrt(8 * layers)` of the size of
    the logits, `u` half a unit in the last place of the weights' dtype: 7e-6 for 100 layers in float32, and 0.2 for
    24 layers in bfloat16, where a smaller leak passes.

    It takes two forwards of four rows of 64 tokens, and where the config names a reach of attention that is longer and
    fits a row (a window, `index_topk`, a compressed block), two of one row that exceeds it.

    Args:
        row_length: Of the rows to train on; what reaches farther plays no role.

    Raises:
        RecipeError: If the logits change, or are not finite.
    """
    was_training = model.training
    model.eval()
    try:
        changes = [_change(model, *probe) for probe in _probes(model, row_length)]
    finally:
        model.train(was_training)
    name = type(model).__name__
    if not all(map(math.isfinite, changes)):
        raise RecipeError(f"{name} computes logits that are not finite: look at the checkpoint, or use float32.")
    layers = model.config.get_text_config().num_hidden_layers
    bound = rounding_share(model.dtype, layers)
    if max(changes) > bound:
        raise RecipeError(
            f"{name} does not keep packed examples apart (its layers carry state over, or its attention mask takes no "
            f"notice of the position ids): other examples before them change logits by {max(changes):.2g} of their "
            f"size, and rounding explains {bound:.2g}. Set packing: false."
        )


def _probes(model: PreTrainedModel, row_length: int) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Token ids, position ids (both `[rows, length]`) and where the tokens begin that must not change."""
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)

    def probe(rows: int, lengths: list[int], kept: int) -> tuple[Tensor, Tensor, int]:
        ids = torch.randint(2, vocabulary, (rows, sum(lengths)), generator=generator)
        positions = torch.cat([torch.arange(length) for length in lengths])
        return ids, positions.expand(rows, -1), kept

    yield probe(_ROWS, [_LENGTH] * _EXAMPLES, _LENGTH * _EXAMPLES // 2)
    reach = max((value for value in _reaches(model.config.to_dict()) if value < row_length), default=0)
    if reach >= _LENGTH:
        length = min(row_length, 2 * (reach + _LENGTH)) // _LENGTH * _LENGTH
        yield probe(1, [length // 4, length - length // 4], length // 4)


def _reaches(field: Any, named: bool = False) -> Iterator[int]:
    """Every integer under a name that stands for a reach, however deep."""
    if isinstance(field, dict):
        for name, value in field.items():
            yield from _reaches(value, named or bool(_REACH.fullmatch(str(name))))
    elif isinstance(field, list | tuple):
        for value in field:
            yield from _reaches(value, named)
    elif named and isinstance(field, int) and not isinstance(field, bool):
        yield field


@torch.no_grad()
def _change(model: PreTrainedModel, ids: Tensor, positions: Tensor, kept: int) -> float:
    """The change behind `kept` by other tokens before it, relative to the size of the logits."""
    vocabulary = model.config.get_text_config().vocab_size
    others = ids.clone()
    others[:, :kept] = 2 + (ids[:, :kept] - 1) % (vocabulary - 2)  # every token is another one
    logits, changed = (
        model(input_ids=each.to(model.device), position_ids=positions.to(model.device), use_cache=False)
        .logits[:, kept:]
        .double()
        for each in (ids, others)
    )
    change = (changed - logits).square().mean(-1).sqrt()
    # one place in four rows, or four that follow each other in one row
    of_four = change.T.reshape(-1, _ROWS).median(1).values
    return float(of_four.max() / logits.square().mean().sqrt())

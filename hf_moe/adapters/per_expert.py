"""An expert adapter's factors in two forms: PEFT's, all experts in two matrices, and a pair for every expert.

PEFT keeps A as `[E * R, in]` with the expert slowest and B as `[out, R * E]` with the expert fastest. Checkpoints that
hold every expert by itself (Qwen3-MoE, Mixtral, OLMoE, DeepSeek), and servers of them, name `experts.3.up_proj`.
"""

import importlib
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_moe.adapters import lora_targets
from hf_moe.adapters.adapter_files import CONFIG, WEIGHTS
from hf_moe.adapters.frozen_router import HASH_FILE
from hf_moe.io.json_files import read_object
from hf_moe.io.whole_files import write_json
from hf_moe.layers.unseen_experts import required_layers

FUSED = ("gate_up_proj", "up_proj", "down_proj")
# what export adds for PEFT where PEFT does not know the family
FUSED_PATTERN = r".*\.gate_up_proj"
_PREFIX = "base_model.model."
_OF_ONE_EXPERT = re.compile(r"\.experts\.\d+\.\w+\.lora_[AB]\.")


class PerExpertError(ValueError):
    """Pairs for single experts that make up no adapter on fused ones."""


class Layout(NamedTuple):
    """How checkpoints of a family name one expert's projections, and the parts of the path that transformers renames.

    Attributes:
        up: Names of what the fused up projection joins, in its order: `("gate_proj", "up_proj")`, or one.
        down: Name of the down projection.
        renamed: Pairs of path parts: in the model, on disk.
    """

    up: tuple[str, ...]
    down: str
    renamed: tuple[tuple[str, str], ...]

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.up, self.down)

    def on_disk(self, root: str) -> str:
        for in_model, in_checkpoint in self.renamed:
            root = root.replace(in_model, in_checkpoint)
        return root

    def in_model(self, root: str) -> str:
        for in_model, in_checkpoint in self.renamed:
            root = root.replace(in_checkpoint, in_model)
        return root


class Stack(NamedTuple):
    """One projection's factors for all experts, as PEFT keeps them."""

    a: Tensor
    b: Tensor

    def split(self, rank: int) -> tuple[Tensor, Tensor]:
        """A `[E, R, in]` and B `[E, out, R]`."""
        num_experts = self.a.shape[0] // rank
        a = self.a.reshape(num_experts, rank, -1)
        return a, self.b.reshape(len(self.b), rank, num_experts).permute(2, 0, 1)


class Experts(NamedTuple):
    """Both projections of one module of experts."""

    up: Stack
    down: Stack


def layout_of(model_type: str) -> Layout | None:
    """The names on disk, from the table of transformers of how checkpoints become fused; None if they are fused."""
    if model_type == "hf_moe":  # registers its layout when it is imported
        importlib.import_module("hf_moe.models.modeling_hf_moe")
    conversion = importlib.import_module("transformers.conversion_mapping")
    names: dict[str, list[str]] = {}
    renamed = []
    for entry in conversion.get_checkpoint_conversion_mapping(model_type) or ():
        source, target = entry.source_patterns, entry.target_patterns
        if all(re.fullmatch(r".*\.?experts\.\*\.\w+\.weight", pattern) for pattern in source):
            names[target[0].rpartition(".")[2]] = [pattern.split(".")[-2] for pattern in source]
        elif re.fullmatch(r"\.\w+\.", source[0]) and re.fullmatch(r"\.\w+\.", target[0]):
            renamed.append((target[0], source[0]))
    up = names.get("gate_up_proj") or names.get("up_proj")
    if not up or "down_proj" not in names:
        return None
    return Layout(tuple(up), names["down_proj"][0], tuple(renamed))


def unfold(root: str, experts: Experts, rank: int, layout: Layout) -> dict[str, Tensor]:
    """A pair for every expert and projection, named as on disk; gate and up share A and have half of B each."""
    a, b = experts.up.split(rank)
    parts = {name: (a, part) for name, part in zip(layout.up, b.chunk(len(layout.up), 1), strict=True)}
    parts[layout.down] = experts.down.split(rank)
    on_disk = layout.on_disk(root)
    # copies: safetensors refuses tensors that share memory
    return {
        f"{on_disk}.{expert}.{name}.lora_{factor}.weight": value[expert].clone(memory_format=torch.contiguous_format)
        for name, pair in parts.items()
        for factor, value in zip("AB", pair, strict=True)
        for expert in range(len(value))
    }


def fold(tensors: Mapping[str, Tensor], layout: Layout) -> tuple[dict[str, Experts], dict[str, Tensor]]:
    """The inverse of `unfold`: factors by the path of the experts in the model, and the other tensors.

    Raises:
        PerExpertError: If a pair is missing or unlike the others, or the parts of the up projection do not share A.
    """
    names = "|".join(layout.names)
    pattern = re.compile(rf"(.+\.experts)\.(0|[1-9][0-9]{{0,8}})\.({names})\.lora_([AB])\.weight")
    found: dict[str, dict[tuple[str, str, int], Tensor]] = {}
    others = {}
    for key, tensor in tensors.items():
        if match := pattern.fullmatch(key):
            root, expert, name, factor = match.groups()
            found.setdefault(layout.in_model(root), {})[name, factor, int(expert)] = tensor
        else:
            others[key] = tensor
    return {root: _fold(root, pairs, layout) for root, pairs in found.items()}, others


def _fold(root: str, pairs: Mapping[tuple[str, str, int], Tensor], layout: Layout) -> Experts:
    num_experts = 1 + max(expert for _, _, expert in pairs)
    # one after the other: a file may give its only expert any number
    wanted = (
        (name, factor, expert) for name in sorted(layout.names) for factor in "AB" for expert in range(num_experts)
    )
    for name, factor, expert in wanted:
        if (name, factor, expert) not in pairs:
            raise PerExpertError(f"{root} lacks lora_{factor} of expert {expert}'s {name}.")
    _refuse_unlike(root, pairs, layout)

    def stack(name: str, factor: str) -> Tensor:
        return torch.stack([pairs[name, factor, expert] for expert in range(num_experts)])

    a, b = stack(layout.up[0], "A"), torch.cat([stack(name, "B") for name in layout.up], 1)
    if not all(torch.equal(stack(name, "A"), a) for name in layout.up):
        raise PerExpertError(
            f"the {' and '.join(layout.up)} of {root} have an A of their own each, and hf_moe's form has one for "
            "both: load it with PeftModel.from_pretrained, which doubles the rank."
        )
    return Experts(_stack(a, b), _stack(stack(layout.down, "A"), stack(layout.down, "B")))


def _refuse_unlike(root: str, pairs: Mapping[tuple[str, str, int], Tensor], layout: Layout) -> None:
    """All factors are matrices of one rank, and those of one kind have one shape and dtype."""
    ranks = {pair.shape[factor == "B"] if pair.dim() == 2 else None for (_, factor, _), pair in pairs.items()}
    kinds = {(name, factor, pair.shape, pair.dtype) for (name, factor, _), pair in pairs.items()}
    if None in ranks or len(ranks) > 1 or len(kinds) > 2 * len(layout.names):
        raise PerExpertError(f"the factors of {root} must be matrices of one rank, alike in shape and dtype.")


def _stack(a: Tensor, b: Tensor) -> Stack:
    return Stack(a.flatten(0, 1), b.permute(1, 2, 0).flatten(1))


def targets(num_experts: int, layout: Layout) -> list[str]:
    """`target_modules` that match the experts alone, whatever else in the model has a `down_proj`.

    With an expert's number for PEFT, whose importer looks at the ends of names, as SGLang does; SGLang knows the
    fused names besides, and no others.
    """
    known = set(layout.names) == {"gate_proj", "up_proj", "down_proj"}
    fused = () if known else ("experts.gate_up_proj", "experts.down_proj")
    return [*(f"experts.{expert}.{name}" for expert in range(num_experts) for name in layout.names), *fused]


def without_experts(
    config: Mapping[str, Any], names: Collection[str], others: Collection[str]
) -> tuple[list[str], list[str]]:
    """`target_modules` and `target_parameters` of a config without those of experts.

    Args:
        names: The experts' projections on disk.
        others: Tensors that are not of experts; what they are of stays, also under a bare name such as `down_proj`.
    """
    ends = "|".join(names)
    targeted = config.get("target_modules") or ()
    modules = [name for name in targeted if not re.fullmatch(rf"experts\.\d+\.({ends})", name)]
    bare = {name for name in modules if name in names and not any(f".{name}.lora_" in key for key in others)}
    modules = [name for name in modules if name not in bare | {"experts.gate_up_proj", "experts.down_proj"}]
    parameters = [name for name in config.get("target_parameters") or () if not is_of_experts(name)]
    return sorted(modules), sorted(parameters)


def is_of_experts(parameter: str) -> bool:
    """True if a name in `target_parameters` is of a fused projection of experts."""
    owner, _, name = parameter.rpartition(".")
    return name in FUSED and owner.rpartition(".")[2] in ("experts", "")


def is_per_expert(folder: Path) -> bool:
    """True if an adapter's file has pairs for single experts."""
    with safe_open(str(folder / WEIGHTS), framework="pt") as opened:
        return any(_OF_ONE_EXPERT.search(key) for key in opened.keys())  # noqa: SIM118


@contextmanager
def fused(folder: Path, model: nn.Module) -> Iterator[Path]:
    """Yield a folder with the adapter in PEFT's form for `model`; it goes when the block ends.

    Raises:
        PerExpertError: If the pairs are not those of the model's experts.
    """
    config = read_object(folder / CONFIG)  # checked before
    model_type = getattr(getattr(model, "config", None), "model_type", "")
    layout = layout_of(model_type)
    if layout is None:
        raise PerExpertError(f"{model_type!r} has no checkpoints of single experts, which the adapter is for.")
    if isinstance(config.get("target_modules"), str):
        raise PerExpertError("target_modules is one pattern, which cannot be joined with pairs for every expert.")
    experts, others = fold(load_file(folder / WEIGHTS), layout)
    if odd := sorted(filter(_OF_ONE_EXPERT.search, others)):
        raise PerExpertError(f"{odd[0]!r:.200} names no projection of an expert of {model_type!r}.")
    for name in ("rank_pattern", "alpha_pattern"):
        if unknown := sorted(set(config.get(name) or ()) - {FUSED_PATTERN}):
            raise PerExpertError(
                f"{name} {unknown[0]!r} cannot be joined with pairs for every expert: load it with "
                "PeftModel.from_pretrained."
            )
    layers = {lora_targets.plain_path(layer.experts_name): layer for layer in required_layers(model)}
    tensors = dict(others)
    for root, both in experts.items():
        layer = layers.get(root.removeprefix(_PREFIX))
        if layer is None:
            raise PerExpertError(f"the model has no experts {root.removeprefix(_PREFIX)!r}. Load it on its own base.")
        # PEFT nests parameters in the order of the module, parametrised ones in that of the alphabet
        inner, outer = both if "parametrizations" not in layer.experts._modules else reversed(both)
        tensors |= {f"{root}.base_layer.lora_A.weight": inner.a, f"{root}.base_layer.lora_B.weight": inner.b}
        tensors |= {f"{root}.lora_A.weight": outer.a, f"{root}.lora_B.weight": outer.b}
    adapted = [layers[root.removeprefix(_PREFIX)] for root in experts]
    modules, parameters = without_experts(config, layout.names, others)
    config |= {
        "target_modules": modules,
        "target_parameters": [*parameters, *lora_targets.expert_parameters(model, adapted)],
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    with tempfile.TemporaryDirectory() as temporary:
        if (folder / HASH_FILE).is_file():
            shutil.copy(folder / HASH_FILE, temporary)
        save_file({key: value.contiguous() for key, value in tensors.items()}, Path(temporary, WEIGHTS))
        write_json(Path(temporary, CONFIG), config)
        yield Path(temporary)

"""Save and load a routing trace: a folder with a JSON manifest and the sums as safetensors. Reading trusts nothing.

`trace.json` is written last and names format, layers, domains and model; `statistics.safetensors` holds, for part P
(0: outside of every domain, 1...: the domains in order) and layer L (in order):

    counts.P.L       [E] int64
    weight_mass.P.L  [E] float64
    totals.P.L       [4] int64: tokens, empty_slots, dropped (-1: not known), scored_tokens
    sums.P.L         [2] float64: entropy_sum, margin_sum
    coactivation.P.L [E, E] int64, absent where not counted
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_moe.io.json_files import read_object
from hf_moe.io.whole_files import whole_folder, write_json
from hf_moe.observability.layer_statistics import LayerStatistics, empty_statistics
from hf_moe.observability.token_table import LayerSpec, TokenTable

MANIFEST = "trace.json"
STATISTICS = "statistics.safetensors"
FORMAT = "hf_moe.routing_trace"
VERSION = 1
_MAX_MANIFEST_BYTES = 16 * 2**20
_MAX_EXPERTS = 65535
_BYTES_PER_EXPERT = 16  # a count and a weight


@dataclass(frozen=True)
class StoredTrace:
    """A trace as its folder holds it.

    Attributes:
        empty: For each layer, in order, the statistics of no token.
        parts: By domain (None: outside of every domain) the statistics of each layer, in the order of `empty`.
        model_facts: JSON values.
        tokens: The table of tokens, or None.
    """

    empty: list[LayerStatistics]
    parts: dict[str | None, list[LayerStatistics]]
    model_facts: dict[str, Any]
    tokens: TokenTable | None

    @property
    def domains(self) -> list[str]:
        return [domain for domain in self.parts if domain is not None]


def save_trace(trace: StoredTrace, folder: Path) -> None:
    """Write the folder of a trace; errors as in `RoutingTrace.save`."""
    if folder.exists() and not (folder.is_dir() and (_is_trace(folder) or not any(folder.iterdir()))):
        raise FileExistsError(f"{folder} exists and is no routing trace. Save the trace into a new folder.")
    with whole_folder(folder) as temporary:
        save_file(_tensors(trace), temporary / STATISTICS)
        manifest = _manifest(trace)
        if trace.tokens is not None:
            manifest["tokens"] = trace.tokens.copy_to(temporary)
        write_json(temporary / MANIFEST, manifest)


def load_trace(folder: Path) -> StoredTrace:
    """Read the folder and check every value; errors as in `RoutingTrace.load`."""
    manifest = _read_manifest(folder)
    layers = [_layer(entry, folder) for entry in _list(manifest, "layers", folder)]
    if not layers or len({each.name for each in layers}) != len(layers):
        raise _damaged(folder, "its layers must have different names, and there must be one")
    domains = _list(manifest, "domains", folder)
    if not all(isinstance(name, str) and name for name in domains) or len(set(domains)) != len(domains):
        raise _damaged(folder, f"domains must be different names, got {str(domains)[:200]}")
    if not isinstance(manifest.get("model_facts"), dict):
        raise _damaged(folder, "model_facts must be an object")
    _refuse_more_than_is_stored(layers, 1 + len(domains), folder)
    tensors = _read_tensors(folder)
    # the co-activation, quadratic in a number that a file names, is made only where the file holds it
    empty = [empty_statistics(each.name, each.num_experts, each.top_k, coactivation=False) for each in layers]
    parts: dict[str | None, list[LayerStatistics]] = {}
    for part, domain in enumerate([None, *domains]):
        statistics = [_statistics(each, f"{part}.{layer}", tensors, folder) for layer, each in enumerate(empty)]
        if domain is not None or any(each.tokens for each in statistics):
            parts[domain] = statistics
    if tensors:
        raise _damaged(folder, f"{STATISTICS} holds unexpected tensors: {', '.join(sorted(tensors)[:5])}")
    tokens = None
    if manifest.get("tokens") is not None:
        tokens = TokenTable.open(folder, manifest["tokens"], layers)
    return StoredTrace(empty, parts, manifest["model_facts"], tokens)


def _manifest(trace: StoredTrace) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "layers": [{"name": each.name, "num_experts": each.num_experts, "top_k": each.top_k} for each in trace.empty],
        "domains": trace.domains,
        "model_facts": trace.model_facts,
        "tokens": None,
    }


def _tensors(trace: StoredTrace) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for part, domain in enumerate([None, *trace.domains]):
        for index, layer in enumerate(trace.parts.get(domain, trace.empty)):
            place = f"{part}.{index}"
            dropped = -1 if layer.dropped is None else layer.dropped
            tensors[f"counts.{place}"] = layer.counts
            tensors[f"weight_mass.{place}"] = layer.weight_mass
            tensors[f"totals.{place}"] = torch.tensor([layer.tokens, layer.empty_slots, dropped, layer.scored_tokens])
            tensors[f"sums.{place}"] = torch.tensor([layer.entropy_sum, layer.margin_sum], dtype=torch.float64)
            if layer.coactivation is not None:
                tensors[f"coactivation.{place}"] = layer.coactivation
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}


def _is_trace(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no routing trace: {MANIFEST} is missing.")
    try:
        manifest = read_object(path, largest=_MAX_MANIFEST_BYTES)
    except ValueError as error:
        raise _damaged(folder, f"{MANIFEST} is not valid JSON ({error})") from error
    if manifest.get("format") != FORMAT:
        raise _damaged(folder, f"{MANIFEST} does not say format {FORMAT!r}")
    if manifest.get("version") != VERSION:
        raise ValueError(
            f"{folder}: the trace has version {manifest.get('version')!r} of the format; this hf_moe reads version "
            f"{VERSION}. Use the hf_moe that wrote it."
        )
    return manifest


def _list(manifest: dict[str, Any], field: str, folder: Path) -> list[Any]:
    value = manifest.get(field)
    if not isinstance(value, list):
        raise _damaged(folder, f"{field} must be a list, got {type(value).__name__}")
    return value


def _layer(entry: Any, folder: Path) -> LayerSpec:
    if not isinstance(entry, dict) or set(entry) != {"name", "num_experts", "top_k"}:
        raise _damaged(folder, f"a layer must be given by name, num_experts and top_k, got {str(entry)[:200]}")
    if not isinstance(entry["name"], str):
        raise _damaged(folder, f"a layer's name must be text, got {entry['name']!r}")
    for field in ("num_experts", "top_k"):
        value = entry[field]
        if type(value) is not int or not 1 <= value <= _MAX_EXPERTS:
            raise _damaged(folder, f"{field} must be an integer in [1, {_MAX_EXPERTS}], got {str(value)[:50]}")
    return LayerSpec(entry["name"], entry["num_experts"], entry["top_k"])


def _refuse_more_than_is_stored(layers: list[LayerSpec], parts: int, folder: Path) -> None:
    """Refuse a manifest that names more experts than the file can hold: the memory for them would be taken first."""
    path = folder / STATISTICS
    held = path.stat().st_size if path.is_file() else 0
    needed = parts * sum(layer.num_experts for layer in layers) * _BYTES_PER_EXPERT
    if held and needed > held:
        raise _damaged(folder, f"{STATISTICS} has {held:,} bytes, and the layers need at least {needed:,}")


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / STATISTICS
    if not path.is_file():
        raise _damaged(folder, f"{STATISTICS} is missing")
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
    except SafetensorError as error:
        raise _damaged(folder, f"{STATISTICS} cannot be read ({error})") from error


def _statistics(empty: LayerStatistics, place: str, tensors: dict[str, Tensor], folder: Path) -> LayerStatistics:
    def take(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        tensor = tensors.pop(f"{name}.{place}", None)
        if tensor is None:
            raise _damaged(folder, f"{STATISTICS} lacks {name}.{place}")
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise _damaged(
                folder,
                f"{name}.{place} must be {list(shape)} {dtype}, got {list(tensor.shape)} {tensor.dtype}",
            )
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise _damaged(folder, f"{name}.{place} is not finite")
        return tensor

    size = empty.num_experts
    has_coactivation = f"coactivation.{place}" in tensors
    totals = take("totals", (4,), torch.int64).tolist()
    entropy_sum, margin_sum = take("sums", (2,), torch.float64).tolist()
    found = replace(
        empty,
        counts=take("counts", (size,), torch.int64),
        weight_mass=take("weight_mass", (size,), torch.float64),
        coactivation=take("coactivation", (size, size), torch.int64) if has_coactivation else None,
        tokens=totals[0],
        empty_slots=totals[1],
        dropped=None if totals[2] == -1 else totals[2],
        scored_tokens=totals[3],
        entropy_sum=entropy_sum,
        margin_sum=margin_sum,
    )
    wrong = _contradiction(found)
    if wrong:
        raise _damaged(folder, f"layer {empty.name!r} (part and layer {place}): {wrong}")
    return found


def _contradiction(layer: LayerStatistics) -> str | None:
    """Reason why no model can have left these statistics, if there is one."""
    slots = layer.tokens * layer.top_k
    if layer.tokens < 0 or not 0 <= layer.scored_tokens <= layer.tokens:
        return f"{layer.tokens} tokens, {layer.scored_tokens} of them scored"
    if bool((layer.counts < 0).any()) or sum(layer.counts.tolist()) + layer.empty_slots != slots:
        return f"counts and {layer.empty_slots} empty slots do not add up to {layer.tokens} x {layer.top_k} slots"
    if not 0 <= (layer.dropped or 0) <= layer.empty_slots:
        return f"{layer.dropped} slots dropped of {layer.empty_slots} empty ones"
    if min(layer.entropy_sum, layer.margin_sum) < 0 or not math.isfinite(layer.entropy_sum + layer.margin_sum):
        return "entropies and margins must not be negative"
    pairs = layer.coactivation
    if pairs is not None and not (
        bool((pairs >= 0).all()) and torch.equal(pairs, pairs.T) and torch.equal(pairs.diagonal(), layer.counts)
    ):
        return "the co-activation must be symmetric, not negative, with the counts on its diagonal"
    return None


def _damaged(folder: Path, what: str) -> ValueError:
    return ValueError(f"{folder} is no valid routing trace: {what}. Record or copy the trace again.")

"""Is every operator right? Output and gradients against float64, twice the same, and what only a GPU shows.

The rule is the benchmark's (`expert_layers/correctness.py`): at most twice as far from float64 as plain torch in the
same dtype, plus rounding. Memory that nobody wrote is NaN meanwhile.
"""

import functools
import itertools
import json
import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.errors import TritonError

from hf_moe.kernels.layer_call import LayerCall
from hf_moe.kernels.triton.hybrid import triton_hybrid_experts
from hf_moe.kernels.triton.ops import triton_experts, triton_experts_lora
from hf_moe.kernels.triton.routing import sort_rows
from hf_moe.kernels.triton.tiles import TILE_HEIGHTS, Tile
from kernel_cases import Layer, plain_layer

from ..expert_layers.correctness import Judge, Outcome, distance
from ..expert_layers.timing import captured
from .problems import GPT_OSS, by_operator, by_plain_torch, random_factors, random_layer, with_gradients
from .products import products_of, tiles_of, title, with_tile
from .setting import Setting, Sizes

BF16 = torch.bfloat16
# what a library, a launch or a compiler raises; the process goes on with the next check
ERRORS = (
    *(ValueError, RuntimeError, TypeError, IndexError, AssertionError, NotImplementedError, KeyError, OSError),
    TritonError,  # too much shared memory, ptxas: a plain Exception
)
Found = dict[str, Any]
CRASHED = "it crashed, or was stopped"
UNREACHED = "not reached: no time was left, or its process ended before"
STOPPED = "not finished: its process was stopped, out of time"


class Check(NamedTuple):
    """`operator`: whose times are worth nothing if `run` objects."""

    operator: str
    run: Callable[[], Found]


def checks_of(setting: Setting) -> dict[str, Check]:
    """Every check by name; the tiles, which only the sweep needs, last."""
    found = _layer_checks(setting) | _lora_checks(setting) | _routing_checks(setting)
    for tokens in setting.batches:
        run = functools.partial(_decodes, setting.swept, tokens, setting.device)
        found[f"decode T={tokens}"] = Check("decode", run)
    if setting.device == "cuda":
        found["nothing waits for the GPU"] = Check("triton", functools.partial(_never_waits, setting))
        for tokens in (1, 16, 512):
            run = functools.partial(_graph_follows, setting.swept, tokens)
            found[f"CUDA graph T={tokens}"] = Check("triton" if tokens > 16 else "decode", run)
    return found | _tile_checks(setting)


def _layer_checks(setting: Setting) -> dict[str, Check]:
    few, tokens = setting.few, setting.tokens // 8
    operators: dict[str, Callable[[LayerCall], Tensor]] = {"triton": triton_experts}
    if setting.device == "cuda":  # the CPU's grouped product takes other widths than these
        operators["hybrid"] = triton_hybrid_experts
    layers = {
        "512 rows an expert, slots skipped": (few, tokens, {"sentinels": True}),
        "64 rows an expert": (few, max(tokens // 8, 1), {}),
        "16 rows an expert": (few, max(tokens // 32, 1), {}),
        "skewed": (few, tokens // 2 + 3, {"skew": 1.0}),
        "wide": (setting.wide, tokens, {}),
        "gpt-oss's layout": (setting.biased, tokens // 2, {"form": GPT_OSS, "bias": True}),
    }
    found = {}
    for (name, op), (what, (sizes, count, options)) in itertools.product(operators.items(), layers.items()):
        run = functools.partial(_trains, op, sizes, count, BF16, setting.device, **options)
        found[f"{name}: {what}"] = Check(name, run)
    for dtype in (torch.float16, torch.float32):
        count = tokens // 3 + 1
        run = functools.partial(_trains, triton_experts, setting.ragged, count, dtype, setting.device, bias=True)
        found[f"triton: ragged, {str(dtype).removeprefix('torch.')}"] = Check("triton", run)
    return found


def _trains(
    op: Callable[[LayerCall], Tensor], sizes: Sizes, tokens: int, dtype: torch.dtype, device: str, **options: Any
) -> Found:
    layer = random_layer(sizes, tokens, dtype, device, **options)
    return _compared(layer, op, layer.tensors())


def _lora_checks(setting: Setting) -> dict[str, Check]:
    def adapted(rank: int) -> Found:
        layer = random_layer(setting.few, setting.tokens // 8, BF16, setting.device)
        tensors = {"hidden": layer.hidden, "weights": layer.weights, **random_factors(layer, rank)}
        return _compared(layer, triton_experts_lora, tensors)

    return {f"lora: rank {rank}": Check("lora", functools.partial(adapted, rank)) for rank in setting.ranks}


def _compared(layer: Layer, op: Callable[[LayerCall], Tensor], tensors: Mapping[str, Tensor]) -> Found:
    """Output and every gradient against float64 and plain torch, and the same bits a second time."""
    found, again = (with_gradients(by_operator(layer, op), tensors) for _ in range(2))
    repeats = all(torch.equal(found[name], again[name]) for name in found)
    baseline = with_gradients(by_plain_torch(layer), tensors)
    doubles = {name: tensor.double() for name, tensor in tensors.items()}
    exact = with_gradients(by_plain_torch(layer.to(torch.float64, layer.hidden.device)), doubles)
    verdict = _verdict(layer, found, baseline, exact)
    return verdict if repeats else verdict | {"objection": "another result the second time"}


def _verdict(layer: Layer, found: dict[str, Tensor], baseline: dict[str, Tensor], exact: dict[str, Tensor]) -> Found:
    rows = int(torch.bincount(layer.index.flatten()).max()) if layer.index.numel() else 0
    longest_sum = max(sum(layer.down_weight.shape[1:]) + layer.index.shape[1], rows)
    judge = Judge.of(Outcome(exact), Outcome(baseline), longest_sum)
    shares = {name: distance(value, exact[name]) / max(judge.allowed[name], 1e-30) for name, value in found.items()}
    worst = max(shares, key=lambda name: (math.isnan(shares[name]), shares[name]))
    return {"objection": judge.objection(found), "share_of_allowed_error": round(shares[worst], 3), "worst": worst}


def _decodes(sizes: Sizes, tokens: int, device: str) -> Found:
    layer = random_layer(sizes, tokens, BF16, device)
    with torch.no_grad():
        found, baseline = {"out": triton_experts(layer.call())}, {"out": plain_layer(layer)}
        exact = {"out": plain_layer(layer.to(torch.float64, device))}
        steady = _starts_early(layer, found["out"], 20 if device == "cuda" else 1)
    verdict = _verdict(layer, found, baseline, exact)
    return verdict if steady else verdict | {"objection": "another result where its second launch starts early"}


def _starts_early(layer: Layer, wanted: Tensor, calls: int) -> bool:
    """The same bits where nothing is launched between the two kernels, as a fill of `out` with NaN is elsewhere.

    Calls with another input lie between, so that activations that are read too early are those of that one.
    """
    other = replace(layer, hidden=-layer.hidden)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        found = [triton_experts(each.call()) for _ in range(calls) for each in (other, layer)][1::2]
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
    return all(torch.equal(out, wanted) for out in found)


def _routing_checks(setting: Setting) -> dict[str, Check]:
    cases = [(setting.swept, setting.tokens, torch.int64, 0), (setting.few, setting.tokens + 1, torch.int32, 1)]
    return {
        f"routing: E={sizes.experts} T={tokens} {dtype}": Check(
            "routing", functools.partial(_sorts, sizes, tokens, dtype, skipped, setting.device)
        )
        for sizes, tokens, dtype, skipped in cases
    }


def _sorts(sizes: Sizes, tokens: int, dtype: torch.dtype, skipped: int, device: str) -> Found:
    """A stable sort, the ends of experts, and tiles that cover every row once."""
    generator = torch.Generator(device).manual_seed(tokens)
    scores = torch.rand(tokens, sizes.experts + skipped, generator=generator, device=device)
    index = scores.topk(sizes.slots, dim=-1).indices.to(dtype)
    order = sort_rows(index, sizes.experts, sizes.experts + skipped)
    ids = index.flatten().long()
    ends = torch.bincount(ids, minlength=sizes.experts + 1)[: sizes.experts].cumsum(0)
    if not torch.equal(order.order_N.long(), ids.argsort(stable=True)):
        return {"objection": "rows are in another order"}
    if not torch.equal(order.expert_end_E.long(), ends):
        return {"objection": "experts end elsewhere"}
    for height in TILE_HEIGHTS:
        start, wanted = 0, []
        for expert, end in enumerate([*ends.tolist(), ids.numel()]):
            label = expert if expert < sizes.experts else -1
            wanted += [(label, row) for row in range(start, end, height)]
            start = end
        tiles = order.tiles(height)
        listed = list(zip(tiles.expert_M.tolist(), tiles.row_M.tolist(), strict=True))
        if listed[: len(wanted)] != wanted or any(tile != (-1, -1) for tile in listed[len(wanted) :]):
            return {"objection": f"tiles of {height} rows do not cover every row once"}
    return {"objection": None}


def _tile_checks(setting: Setting) -> dict[str, Check]:
    """Every tile of the sweep on few experts: compared, and compiled for the sweep to come."""
    return {
        tile_check(kernel, tile): Check("", functools.partial(_as_shipped, setting, kernel, tile))
        for kernel in setting.tiles
        for tile in tiles_of(setting, kernel)
    }


def tile_check(kernel: str, tile: Tile) -> str:
    return f"tile of {kernel}: {title(tile)}"


@functools.cache
def _few_products(setting_device: str, few: Sizes, tokens: int) -> dict[str, Any]:
    return products_of(few, tokens, BF16, setting_device)


def _as_shipped(setting: Setting, kernel: str, tile: Tile) -> Found:
    """The same as with the shipped tile, up to what two orders of a float32 sum differ by after rounding."""
    for name, product in _few_products(setting.device, setting.few, setting.tokens // 8).items():
        if product.kernel == kernel:
            shipped = product.launch().double()
            with with_tile(kernel, tile):
                found = product.launch()
            allowed = 2 * torch.finfo(BF16).eps * shipped.abs().max().item()
            if not (error := distance(found, shipped)) <= allowed:
                return {"objection": f"{name}: {error:.3e} from the shipped tile's result, allowed {allowed:.3e}"}
    return {"objection": None}


def _never_waits(setting: Setting) -> Found:
    layer, few = (random_layer(setting.swept, tokens, BF16, "cuda") for tokens in (512, 4))

    def everything() -> None:
        with_gradients(by_operator(layer, triton_experts), layer.tensors())
        with torch.no_grad():
            triton_experts(few.call())

    everything()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"objection": None}


def _graph_follows(sizes: Sizes, tokens: int) -> Found:
    layer, other = (random_layer(sizes, tokens, BF16, "cuda", seed=seed) for seed in (0, 1))
    replay = captured(lambda: triton_experts(layer.call()))
    for name in ("hidden", "index", "weights"):
        getattr(layer, name).copy_(getattr(other, name))
    with torch.no_grad():
        same = torch.equal(replay(), triton_experts(replace(layer).call()))
    return {"objection": None if same else "a replay gives another result than a call"}


def run_part(setting: Setting, part: int, path: Path, until: float) -> None:
    """Every `check_processes`-th check, line by line into the file of all parts: who crashes is known by name."""
    # torch.empty is full of NaN: what is read before it is written cannot pass
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    with path.open("a", buffering=1) as file:
        for name, check in list(checks_of(setting).items())[part :: setting.check_processes]:
            if time.time() > until:
                break
            begun = {"name": name, "operator": check.operator, "objection": CRASHED, "part": part}
            file.write(json.dumps(begun) + "\n")
            begin = time.perf_counter()
            try:
                found = check.run()
                if setting.device == "cuda":
                    torch.cuda.synchronize()
            except ERRORS as error:
                found = {"objection": f"{type(error).__name__}: {error}"[:600]}
            seconds = round(time.perf_counter() - begin, 2)
            file.write(json.dumps({"name": name, "operator": check.operator, **found, "seconds": seconds}) + "\n")


def collected(setting: Setting, path: Path, stopped: Collection[int] = ()) -> list[Found]:
    """What all parts found; of the check that a `stopped` part was at, and of those that none reached, that."""
    found = {
        name: {"name": name, "operator": check.operator, "objection": UNREACHED}
        for name, check in checks_of(setting).items()
    }
    for line in path.read_text().splitlines(keepends=True) if path.exists() else ():
        if not line.endswith("\n"):  # a full disk cut it off
            continue
        record = json.loads(line)
        if record.pop("part", None) in stopped:
            record["objection"] = STOPPED
        found[record["name"]] = record  # the last line of a name counts
    return list(found.values())


def was_judged(record: Found) -> bool:
    return record["objection"] not in (UNREACHED, STOPPED)


def wrong_operators(found: list[Found]) -> set[str]:
    """Operators that may not be timed; without routing, none of ours may.

    One that time was too short for may: the benchmark compares it once more before it times it.
    """
    wrong = {record["operator"] for record in found if record["objection"] is not None and was_judged(record)}
    return {"triton", "hybrid", "lora", "decode"} if "routing" in wrong else wrong - {""}

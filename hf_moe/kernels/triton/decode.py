"""One layer of experts for few tokens: two launches, no sort, no row tiles.

The time is the time to read the touched experts' weights once, so programs own outputs, not rows: each reads the
weights of its outputs with wide loads, multiplies in float32 and adds up (no tl.dot, which would pad one row to 16),
and writes once. `decode_up` owns activation columns of one slot, `decode_down` hidden columns of one token with all
its experts. Slots, then tokens, are the fast index of the grid: programs that read the same columns of the same expert
run at the same time, so the second one finds them in L2.

An id out of range, on either side, reads nothing; its token's result is NaN, without a launch that checks ids.

On NVIDIA GPUs from SM90 `decode_down` starts while `decode_up` still runs (programmatic dependent launch): it finds
out which weights it reads, then waits for the activations. `decode_up` itself starts after all earlier kernels, and
nothing is launched between the two, so what `decode_down` reads before it waits is complete.

Where it ends: every slot reads its expert through L2, a sorted kernel reads every expert once. On an H100 (about
5.5 TB/s from L2, 3.0 from memory) slots may read 1.8 times as much as there is. With uniform routing that is
N = 1.45 E slots; up to N = E (128 experts, top 8: 16 tokens; 8 experts, top 2: 4 tokens) memory is the limit with some
room. An estimate, not a measurement.

Shape suffixes: T tokens, K slots per token, N = T*K slots, E experts, H hidden, I expert width, P pre-activation width
(2I gated, I ungated).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layer_call import LayerCall
from . import tiles
from .activation import activate, form_constants, glu
from .fp8 import load_scale, scale_arguments, scaled
from .routing import require_gpu
from .tiles import Tile
from .weight_gradient import unit_stride_rows

# transposed, outputs are neighbours in memory: a run of 64 is a full line of 128 bytes in 16 bits, 16 are a sector
TRANSPOSED_RUN = 64
SHORTEST_RUN = 16
SHORTEST_SCALED = 32  # of fp8, a sector


@triton.jit
def split_pre(pre, INTERLEAVED: tl.constexpr, BLOCK_N: tl.constexpr):
    """The gate and the up part of the 2 * BLOCK_N pre-activation columns that `decode_up_kernel` sums."""
    if INTERLEAVED:
        return tl.split(tl.reshape(pre, (BLOCK_N, 2)))
    else:
        return tl.split(tl.permute(tl.reshape(pre, (2, BLOCK_N)), (1, 0)))


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["index"])
def decode_up_kernel(
    hidden, index, up_weight, up_bias, act,
    num_rows, num_experts, H, width, stride_hidden, stride_e, stride_p, stride_h,
    weight_scale, stride_scale_e, stride_scale_n, stride_scale_k, SCALE_N: tl.constexpr, SCALE_K: tl.constexpr,
    TOP_K: tl.constexpr, KIND: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr,
    GATED: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_BIAS: tl.constexpr, OVERLAP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """act[n] = activation(up_weight[index[n]] @ hidden[n // K]), float32; grid (column blocks * N,), slots fastest."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    slot = tl.program_id(0) % num_rows
    first_col = (tl.program_id(0) // num_rows) * BLOCK_N
    expert = tl.load(index + slot)
    if (expert < 0) | (expert >= num_experts):  # the sentinel, or no id; `decode_down` does not read its row
        return
    COLS: tl.constexpr = 2 * BLOCK_N if GATED else BLOCK_N
    lanes = tl.arange(0, COLS)
    if not GATED:
        cols = first_col + lanes
        col_ok = cols < width
    elif INTERLEAVED:
        cols = 2 * first_col + lanes
        col_ok = cols < 2 * width
    else:
        cols = (lanes // BLOCK_N) * width + first_col + lanes % BLOCK_N
        col_ok = first_col + lanes % BLOCK_N < width
    ks = tl.arange(0, BLOCK_K)
    hidden_at = hidden + (slot // TOP_K).to(tl.int64) * stride_hidden + ks
    weight_at = up_weight + expert.to(tl.int64) * stride_e + cols[:, None] * stride_p + ks[None, :] * stride_h
    acc = tl.zeros((COLS, BLOCK_K), tl.float32)
    for k in tl.range(0, H, BLOCK_K, num_stages=STAGES):
        k_ok = ks < H - k
        w = tl.load(weight_at + k * stride_h, mask=col_ok[:, None] & k_ok[None, :], other=0.0)
        if SCALE_N > 0:
            scale_at = weight_scale + expert.to(tl.int64) * stride_scale_e
            scale_at = scale_at + (cols // SCALE_N)[:, None] * stride_scale_n
            all_ok = col_ok[:, None] & k_ok[None, :]
            factor = load_scale(scale_at, k, ks[None, :], stride_scale_k, col_ok[:, None], all_ok, SCALE_K, BLOCK_K)
            w = scaled(w, factor, hidden.dtype.element_ty)
        acc += w.to(tl.float32) * tl.load(hidden_at + k, mask=k_ok, other=0.0).to(tl.float32)[None, :]
    pre = tl.sum(acc, axis=1)
    if HAS_BIAS:
        bias_at = up_bias + expert.to(tl.int64) * (2 * width if GATED else width) + cols
        pre += tl.load(bias_at, mask=col_ok, other=0.0).to(tl.float32)
    if GATED:
        gate, up = split_pre(pre, INTERLEAVED, BLOCK_N)
        value = glu(gate, up, KIND, ALPHA, LIMIT, OFFSET)
    else:
        value = activate(pre, KIND, ALPHA)
    act_cols = first_col + tl.arange(0, BLOCK_N)
    tl.store(act + slot.to(tl.int64) * width + act_cols, value, mask=act_cols < width)


@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["index", "weights"])
def decode_down_kernel(
    act, index, weights, down_weight, down_bias, out,
    num_tokens, num_experts, num_ids, H, width, stride_e, stride_h, stride_i,
    weight_scale, stride_scale_e, stride_scale_n, stride_scale_k, SCALE_N: tl.constexpr, SCALE_K: tl.constexpr,
    TOP_K: tl.constexpr, SLOTS: tl.constexpr, HAS_BIAS: tl.constexpr, OVERLAP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out[t] = sum over its K slots of weight * (down_weight[e] @ act); grid (column blocks * T,), tokens fastest.

    All experts of the token are read side by side: one load is a block [SLOTS, BLOCK_N, BLOCK_K]. NaN for a token with
    an id that is not in [0, num_ids).
    """
    token = tl.program_id(0) % num_tokens
    cols = (tl.program_id(0) // num_tokens) * BLOCK_N + tl.arange(0, BLOCK_N)
    col_ok = cols < H
    slots = tl.arange(0, SLOTS)
    rows = token.to(tl.int64) * TOP_K + slots
    expert = tl.load(index + rows, mask=slots < TOP_K, other=0)
    # a scalar, so that the ids need no registers in the loop
    num_wrong = tl.sum(((expert < 0) | (expert >= num_ids)).to(tl.int32), axis=0)
    slot_ok = (expert >= 0) & (expert < num_experts) & (slots < TOP_K)
    ks = tl.arange(0, BLOCK_K)
    expert_at = down_weight + expert.to(tl.int64) * stride_e
    weight_at = expert_at[:, None, None] + cols[None, :, None] * stride_h + ks[None, None, :] * stride_i
    act_at = act + rows[:, None] * width + ks[None, :]
    ok = slot_ok[:, None, None] & col_ok[None, :, None]
    acc = tl.zeros((SLOTS, BLOCK_N, BLOCK_K), tl.float32)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    for k in tl.range(0, width, BLOCK_K, num_stages=STAGES):
        k_ok = ks < width - k
        w = tl.load(weight_at + k * stride_i, mask=ok & k_ok[None, None, :], other=0.0)
        if SCALE_N > 0:
            scale_at = weight_scale + expert.to(tl.int64)[:, None, None] * stride_scale_e
            scale_at = scale_at + (cols // SCALE_N)[None, :, None] * stride_scale_n
            all_ok = ok & k_ok[None, None, :]
            factor = load_scale(scale_at, k, ks[None, None, :], stride_scale_k, ok, all_ok, SCALE_K, BLOCK_K)
            w = scaled(w, factor, out.dtype.element_ty)
        value = tl.load(act_at + k, mask=slot_ok[:, None] & k_ok[None, :], other=0.0)
        acc += w.to(tl.float32) * value[:, None, :]
    y = tl.sum(acc, axis=2)
    if HAS_BIAS:
        bias_at = down_bias + expert.to(tl.int64)[:, None] * H + cols[None, :]
        y += tl.load(bias_at, mask=slot_ok[:, None] & col_ok[None, :], other=0.0).to(tl.float32)
    weight = tl.load(weights + rows, mask=slot_ok, other=0.0).to(tl.float32)
    total = tl.sum(weight[:, None] * y, axis=0)
    total = tl.where(num_wrong == 0, total, float("nan"))
    tl.store(out + token.to(tl.int64) * H + cols, total.to(out.dtype.element_ty), mask=col_ok)


def output_block(tile: Tile, transposed: bool, slots: int = 1, scale_k: int = 0) -> tuple[int, int]:
    """Outputs and steps of a block that holds the tile's number of weights, for `slots` experts at once.

    It is wide in the direction in which weights lie in memory, but no wider than `scale_k` inputs that share a scale.
    """
    outputs, shortest = (TRANSPOSED_RUN, SHORTEST_RUN) if transposed else (tile.block_n, 1)
    outputs = max(shortest, outputs // slots)
    block_k = max(1, tile.block_n * tile.block_k // (slots * outputs))
    if scale_k >= SHORTEST_SCALED and block_k % scale_k == 0:
        return outputs * (block_k // scale_k), scale_k
    return outputs, block_k


def launch_decode(call: LayerCall) -> Tensor:
    """Weighted sum of every token's experts [T, H], in the dtype of the hidden states. For few tokens.

    NaN for tokens with an id that is not in [0, num_ids).
    """
    require_gpu(call.hidden_TH)
    call = _in_place(call)
    overlap = can_overlap(call.hidden_TH.device)
    return _launch_down(_launch_up(call, overlap), call, overlap)


def can_overlap(device: torch.device) -> bool:
    """Whether a kernel may start before the one in front of it has ended, and wait for it: NVIDIA from SM90."""
    if device.type == "cpu":
        return False
    name = tiles.device_name(device)
    return name.startswith("sm_") and int(name.removeprefix("sm_")) >= 90


def _in_place(call: LayerCall) -> LayerCall:
    """The call with its operands as the kernels read them: copies must not run between the two launches."""
    up_bias, down_bias = (
        None if bias is None else bias.contiguous() for bias in (call.experts.up_bias, call.experts.down_bias)
    )
    return call._replace(
        hidden_TH=unit_stride_rows(call.hidden_TH),
        index_TK=call.index_TK.contiguous(),
        weights_TK=call.weights_TK.contiguous(),
        experts=call.experts._replace(up_bias=up_bias, down_bias=down_bias),
    )


def _strides(weight: Tensor, transposed: bool) -> tuple[int, int, int]:
    """Strides over experts, outputs and inputs."""
    expert, first, second = weight.stride()
    return (expert, second, first) if transposed else (expert, first, second)


def _launch_up(call: LayerCall, overlap: bool) -> Tensor:
    """Activations [N, I] by slot, float32; rows of ids that are no expert's are not written."""
    hidden_TH, index_TK, weight, bias, form = *call[:2], *call.experts[:2], call.form
    (T, H), (E, *_), K, P = hidden_TH.shape, weight.shape, call.top_k, call.pre_width
    width = P // 2 if form.gated else P
    act_NI = torch.empty(T * K, width, dtype=torch.float32, device=hidden_TH.device)

    scales = scale_arguments(call.experts.up_scale, weight)

    def run(tile: Tile) -> None:
        columns, block_k = output_block(tile, form.transposed, 1, scales["SCALE_K"])
        block_n = max(1, columns // 2) if form.gated else columns
        decode_up_kernel[(T * K * triton.cdiv(width, block_n),)](
            hidden_TH, index_TK, weight, hidden_TH if bias is None else bias, act_NI,
            T * K, E, H, width, hidden_TH.stride(0), *_strides(weight, form.transposed),
            **scales, TOP_K=K, HAS_BIAS=bias is not None, **form_constants(form), OVERLAP=overlap,
            BLOCK_N=block_n, BLOCK_K=block_k, STAGES=tile.num_stages, num_warps=tile.num_warps,
        )  # fmt: skip

    if act_NI.numel():
        run(tiles.tile_for("decode_up", T * K // E, P, H, weight.dtype, weight.device, launch=run))
    return act_NI


def _launch_down(act_NI: Tensor, call: LayerCall, overlap: bool) -> Tensor:
    (T, K), width, transposed = call.index_TK.shape, act_NI.shape[1], call.form.transposed
    weight, bias = call.experts.down, call.experts.down_bias
    E, H, slots = weight.shape[0], weight.shape[2 if transposed else 1], triton.next_power_of_2(K)
    out_TH = torch.empty(T, H, dtype=call.hidden_TH.dtype, device=act_NI.device)
    options = {"launch_pdl": True} if overlap else {}  # other chips' compilers do not know it

    scales = scale_arguments(call.experts.down_scale, weight)

    def run(tile: Tile) -> None:
        block_n, block_k = output_block(tile, transposed, slots, scales["SCALE_K"])
        decode_down_kernel[(T * triton.cdiv(H, block_n),)](
            act_NI, call.index_TK, call.weights_TK, weight, act_NI if bias is None else bias, out_TH,
            T, E, call.num_ids, H, width, *_strides(weight, transposed),
            **scales, TOP_K=K, SLOTS=slots, HAS_BIAS=bias is not None, OVERLAP=overlap,
            BLOCK_N=block_n, BLOCK_K=block_k, STAGES=tile.num_stages, num_warps=tile.num_warps, **options,
        )  # fmt: skip

    if out_TH.numel():
        run(tiles.tile_for("decode_down", T * K // E, H, width, weight.dtype, weight.device, launch=run))
    return out_TH

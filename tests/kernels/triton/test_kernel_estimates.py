"""The parts of the ahead-of-time check that estimate times: on recorded texts, and against sums done by hand."""

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.kernel_checks import rendering, table
from benchmarks.kernel_checks.devices import DEVICES, Compiled
from benchmarks.kernel_checks.instructions import Loop, inner_loop, matrix_instruction, tensor_memory
from benchmarks.kernel_checks.launches import Call, Launch
from benchmarks.kernel_checks.occupancy import programs
from benchmarks.kernel_checks.traffic import traffic
from benchmarks.kernel_checks.uniform import Routing

QWEN3 = Routing(8192, 8, 128)  # 512 rows an expert
T, N, E, H, WIDTH = 8192, 65536, 128, 2048, 768


@pytest.mark.parametrize(
    ("text", "instruction"),
    [
        ("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {", "wgmma m64n64k16"),
        ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {", "mma m16n8k16"),
        ("v_mfma_f32_16x16x16_bf16 v[0:3]\nv_mfma_f32_32x32x8_bf16 v[16:31]", "mfma m32n32k8"),
        (
            "mov.b32 \t%r123, 135267472;\n"
            "@%p39 tcgen05.mma.cta_group::1.kind::f16 [ %r2 + 0 ], %rd99, %rd100, %r123, %p38;",
            "tcgen05 m128n64k16",
        ),
        ("fma.rn.f32 %f1, %f2, %f3, %f4;", ""),
    ],
)
def test_matrix_instruction(text, instruction):
    assert matrix_instruction(text) == instruction


def test_tensor_memory_is_what_a_program_allocates():
    line = "@%p9 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r22], 128;"
    assert tensor_memory(f"{line}\n{line}") == 256


# a loop over half the rows, then the whole loop inside of one that only walks tiles; abridged from nvdisasm
SASS = """
        /*0000*/                   S2R R7, SR_CTAID.X ;
.L_x_1:
        /*0010*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0020*/               @P0 LDGSTS.E.BYPASS.128 [R105], desc[UR26][R94.64], P5 ;
        /*0030*/              @!P5 BRA `(.L_x_1) ;
.L_x_2:
        /*0040*/                   ULEA UR5, UR25, UR7, 0xe ;
.L_x_3:
        /*0050*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0060*/              @!PT LDS RZ, [RZ] ;
        /*0070*/                   LDGSTS.E.BYPASS.128 [R105], desc[UR26][R94.64], P5 ;
        /*0080*/                   LDG.E R4, desc[UR26][R2.64] ;
        /*0090*/                   LDGDEPBAR ;
        /*00a0*/              @!P5 BRA `(.L_x_3) ;
        /*00b0*/               @P1 BRA `(.L_x_2) ;
        /*00c0*/                   BRA `(.L_x_4);
.L_x_4:
        /*00d0*/                   EXIT ;
"""
AMDGCN = """
.LBB0_9:                                ; =>This Inner Loop Header: Depth=1
\tbuffer_load_dwordx4 v[4:7], v3, s[4:7], 0 offen
\t; a comment
\tv_mfma_f32_32x32x8_bf16 v[16:31], v[92:93], v[100:101], v[16:31]
\ts_cbranch_scc1 .LBB0_9
"""


@pytest.mark.parametrize(
    ("text", "loop"),
    [
        (SASS, Loop(instructions=6, matrix=1, loads=2, asynchronous=1)),
        (AMDGCN, Loop(instructions=3, matrix=1, loads=1, asynchronous=0)),
        ("        /*0010*/                   EXIT ;", None),
    ],
)
def test_inner_loop(text, loop):
    assert inner_loop(text) == loop


@pytest.mark.parametrize(
    ("needs", "fitting"),
    [
        (("sm_90", 8, 128, 98304), 2),
        (("sm_90", 8, 129, 98304), 1),  # registers are handed out in steps of 8
        (("sm_90", 8, 64, 116736), 1),  # a KB of each program's shared memory is reserved
        (("sm_90", 4, 72, 0), 7),
        (("sm_120", 8, 32, 0), 6),  # 48 warps
        (("sm_100", 8, 64, 0, 256), 2),  # 512 columns of tensor memory
        (("gfx942", 8, 128, 32768), 2),
        (("gfx942", 8, 136, 0), 1),
        (("sm_80", 8, 64, 200000), 0),
    ],
)
def test_programs_of_a_multiprocessor(needs, fitting):
    assert programs(*needs) == fitting


def test_uniform_routing_by_hand():
    """Three tokens choose one of two experts: 1, 2 or 3 rows with 3/8, 3/8 and 1/8."""
    routing = Routing(3, 1, 2)
    assert routing.tiles(2) == pytest.approx(2 * (3 / 8 + 3 / 8 + 2 / 8))
    assert routing.rows_with_padding(2) == pytest.approx(4)
    assert routing.rows_with_padding(2, halves=True) == pytest.approx(3)
    assert routing.share_hit == pytest.approx(7 / 8)
    assert QWEN3.tiles(128) == pytest.approx(4.5 * E, rel=0.01)  # half a tile of padding
    assert QWEN3.rows_with_padding(128, halves=True) == pytest.approx((512 + 32) * E, rel=0.01)


def meta(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(sizes, dtype=dtype, device="meta")


def call(kernel: str, programs: int, **values: object) -> Call:
    return Call(Launch("", kernel, (), (), (), ()), values, programs)


def up_call(**changed: object) -> Call:
    """The up projection of a layer of Qwen3-30B in training, 128 x 128 activations at once."""
    num_tiles = N // 128 + E + 1
    tensors = {"hidden_TH": meta(T, H), "weight": meta(E, 2 * WIDTH, H), "act_NI": meta(N, WIDTH)}
    tensors["pre_NP"] = meta(N, 2 * WIDTH)
    sizes = {"num_tiles": num_tiles, "width": WIDTH, "BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "HAS_LOW": False}
    return call("up_kernel", num_tiles * (WIDTH // 128), **tensors | sizes | changed)


def test_up_projection_by_hand():
    work = traffic(up_call(), QWEN3, 50e6)
    rows, column_tiles = 576 * 128, 6  # 4.5 tiles an expert
    assert work.flops == pytest.approx(2 * rows * H * 2 * WIDTH, rel=0.01)
    assert work.hbm == 2 * (T * H + E * 2 * WIDTH * H + N * WIDTH + N * 2 * WIDTH)  # 1.14 GB
    assert work.l2 == pytest.approx(576 * column_tiles * H * (128 + 256) * 2, rel=0.01)  # 5.4 GB
    # 0.777 ms from L2, more than from tensor cores (0.587) or memory (0.288)
    device, compiled = DEVICES["H200"], Compiled("up_kernel", 2, "wgmma m64n256k16")
    milliseconds = device.milliseconds(work, compiled)
    assert milliseconds == pytest.approx(0.84, rel=0.01)
    # the next kernel waits for half of what is stored where no second program computes meanwhile
    exposed = device.milliseconds(work, compiled._replace(programs=1)) - milliseconds
    assert exposed == pytest.approx(0.5 * 2 * (N * WIDTH + N * 2 * WIDTH) / 4.0e9, rel=1e-6)
    assert milliseconds - device.milliseconds(work, compiled._replace(early=True)) == pytest.approx(0.001)
    # 64 columns at once: 4 KB of operands for 131072 FLOPs, and what arrives from L2, through 128 bytes a clock
    narrow = device.milliseconds(work, compiled._replace(matrix="wgmma m64n64k16"))
    assert narrow == pytest.approx(0.0025 + 1.08 * (work.flops * 4096 / 131072 + work.l2) / 24.7e9)


def test_half_tiles_save_padding_of_rows_but_not_of_weights():
    whole, halves = traffic(up_call(), QWEN3, 50e6), traffic(up_call(HALVES=True), QWEN3, 50e6)
    assert halves.flops / whole.flops == pytest.approx((512 + 32) / (512 + 64), rel=0.005)
    assert halves.l2 / whole.l2 == pytest.approx((544 * 6 + 4.5 * 1536) / (576 * 6 + 4.5 * 1536), rel=0.005)


def test_weight_gradient_by_hand():
    names = {"left": meta(N, 2 * WIDTH), "right": meta(T, H), "out": meta(E, 2 * WIDTH, H)}
    flags = {"A": 2 * WIDTH, "B": H, "GATHER_LEFT": False, "GATHER_RIGHT": True}
    blocks = {"BLOCK_A": 128, "BLOCK_B": 128, "BLOCK_K": 64}
    work = traffic(call("weight_gradient_kernel", E * 12 * 16, **names | flags | blocks), QWEN3, 50e6)
    rows = 544 * E  # half a step of 64 rows beyond 512
    assert work.flops == pytest.approx(2 * rows * 2 * WIDTH * H, rel=0.01)
    assert work.l2 == pytest.approx(E * 12 * 16 * 544 * (128 + 128) * 2, rel=0.01)  # 6.8 GB
    assert DEVICES["H200"].milliseconds(work, Compiled("weight_gradient_kernel", 2)) == pytest.approx(1.10, rel=0.01)


def test_a_matrix_whose_elements_lie_apart_costs_a_sector_for_each():
    near = traffic(up_call(), QWEN3, 50e6)
    apart = traffic(up_call(weight=meta(2 * WIDTH, H, E).permute(2, 0, 1)), QWEN3, 50e6)
    assert apart.l2 - near.l2 == pytest.approx(QWEN3.tiles(128) * 2 * WIDTH * H * (32 - 2))


def test_few_tokens_read_the_experts_that_they_hit():
    """Decode of one token: 8 of 128 experts, each once from memory and once from L2."""
    tensors = {"hidden": meta(1, H), "up_weight": meta(E, 2 * WIDTH, H), "act": meta(8, WIDTH, dtype=torch.float32)}
    work = traffic(call("decode_up_kernel", 8 * 96, **tensors), Routing(1, 8, E), 50e6)
    assert work.l2 == 8 * 2 * WIDTH * H * 2
    assert work.hbm == pytest.approx(work.l2 + 2 * H + 4 * 8 * WIDTH)


def test_fp8_weights_cost_half_the_bytes_and_their_scales():
    scale = meta(E, 2 * WIDTH // 128, H // 128, dtype=torch.float32)
    changed = {"weight": meta(E, 2 * WIDTH, H, dtype=torch.float8_e4m3fn), "weight_scale": scale, "SCALE_N": 128}
    dense, fp8 = traffic(up_call(), QWEN3, 50e6), traffic(up_call(**changed), QWEN3, 50e6)
    nbytes = 2 * WIDTH * H - 4 * scale[0].numel()
    assert dense.flops == fp8.flops
    assert dense.hbm - fp8.hbm == E * nbytes
    assert dense.l2 - fp8.l2 == pytest.approx(QWEN3.tiles(128) * nbytes)


def test_gathered_rows_that_l2_cannot_hold_are_read_again():
    small, large = (traffic(up_call(), QWEN3, size) for size in (2 * T * H / 4, 2 * T * H))
    assert small.hbm - large.hbm == pytest.approx(2 * T * H * 7 * 0.75)


def test_a_model_that_does_not_know_a_launch_says_so():
    with pytest.raises(ValueError, match=r"up_kernel also reads low_a: count them in .*traffic\.py"):
        traffic(up_call(low_a=meta(E, 16, H)), QWEN3, 50e6)
    without = up_call()
    del without.values["hidden_TH"]
    with pytest.raises(KeyError, match=r"up_kernel has no argument hidden_TH"):
        traffic(without, QWEN3, 50e6)


def rows(ms: float, device: str = "H200", chip: str = "sm_90") -> dict[str, list[dict]]:
    """A table with one step of two launches, one of which takes 1 ms."""
    launches = [
        {"kernel": "up_kernel", "layer": "A", "mode": "LoRA", "ms": {device: ms - 1.0}},
        {"kernel": "sum_k_kernel", "layer": "A", "mode": "LoRA", "ms": {device: 0.5}},
    ]
    step = {"chip": chip, "device": device, "layer": "A", "mode": "LoRA", "ms": ms, "floor_ms": 1.0}
    return {"steps": [step], "launches": table.merged([*launches, launches[1]])}


def test_a_slower_step_needs_an_updated_table():
    assert table.worse(rows(2.0), rows(2.05), ["sm_90"]) == []
    (failure,) = table.worse(rows(2.0), rows(2.08), ["sm_90"])
    assert failure.startswith("A LoRA on H200: 2 -> 2.08 ms (estimates), most of it in up_kernel (1 -> 1.08 ms).")
    assert failure.endswith("python benchmarks/ahead_of_time.py --update")
    assert table.changes(rows(2.0), rows(1.5), ["sm_90"]) == ["A LoRA on H200: 2 -> 1.5 ms (estimates)"]
    assert table.changes(rows(2.0), rows(2.01), ["sm_90"]) == []


def test_a_step_is_shown_with_its_floor():
    text = rendering.steps_markdown(rows(2.5)["steps"])
    assert "Estimates, not measurements" in text
    assert text.index("## H200\n") < text.index("| A | 2.5 (2.5) |\n")


def test_steps_that_only_one_table_has_fail_for_the_chips_that_are_checked():
    other = rows(2.0, "MI300X", "gfx942")
    gone, new = table.worse(rows(2.0), other, ["sm_90", "gfx942"])
    assert gone.startswith("A LoRA on H200: is in the table, but nothing estimates it.")
    assert new.startswith("A LoRA on MI300X: is not in the table.")
    assert len(table.worse(rows(2.0), other, ["gfx942"])) == 1

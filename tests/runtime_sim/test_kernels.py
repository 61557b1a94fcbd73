"""The kernel models: each formula worked by hand on a machine of round numbers, more hardware never slower,
equal inputs equal times.
"""

from __future__ import annotations

import math

import pytest

from tyir.runtime_sim.gpu.accelerator import Accelerator, load_accelerator
from tyir.runtime_sim.gpu.allreduce import all_reduce_ns
from tyir.runtime_sim.gpu.attention import Attention, attention_ns, decode_ns, prefill_ns
from tyir.runtime_sim.gpu.gemm import Product, gemm_ns, matrix_rate, weight_only_ns
from tyir.runtime_sim.gpu.rowwise import add_norm_ns, copy_ns, rope_ns, silu_mul_ns, softmax_ns
from tyir.runtime_sim.gpu.steps import MODELS, Step, kernels, step_ns

MACHINES = ("h200", "a100", "orin")


@pytest.fixture(scope="module")
def plain() -> Accelerator:
    """4 multiprocessors of 1000 operations a ns, 1000 bytes a ns of DRAM, launch 1 us and ramp 1 us,
    everything else out of the way.
    """
    values = {
        "clock.frequency_mhz": 1000,
        "sm.count": 4,
        "sm.macs_per_cycle_fp16": 500,
        "sm.macs_per_cycle_int8": 1000,
        "power.burst_share": 1,
        "power.sustained_share": 0.5,
        "power.window_us": 1000,
        "dram.bandwidth_gbps": 1000,
        "dram.efficiency": 1,
        "dram.write_cost": 1,
        "dram.ramp_us": 0,
        "l2.capacity_bytes": 1e6,
        "l2.bandwidth_gbps": 1e9,
        "launch.kernel_us": 1,
        "launch.ramp_us": 1,
        "gemm.efficiency": 1,
        "gemm.tile_us": 0,
        "gemm.operand_rows": 0,
        "gemm.step_ns": 0,
        "gemm.split_us": 1.5,
        "gemm.gemv": 0,
        "weight_only.bytes_per_weight": 0.5,
        "weight_only.dequant_per_cycle": 100,
        "weight_only.step_ns": 0,
        "weight_only.call_us": 1,
        "weight_only.gemv_max_rows": 0,
        "weight_only.two_blocks_rows": 0,
        "attention.efficiency": 1,
        "attention.max_group": 64,
        "attention.grouped_fill": 1000,
        "attention.call_us": 0,
        "attention.decode_call_us": 0,
        "attention.packed_passes": 0,
        "rowwise.bandwidth_gbps": 1000,
        "rowwise.row_ns_per_byte": 0.1,
        "rowwise.strided_us": 0.5,
        "rowwise.any_width_per_ns": 200,
        "rowwise.rotate_per_ns": 400,
        "rowwise.any_width_row_ns_per_byte": 0.2,
        "rowwise.call_us": 0,
        "link.bandwidth_gbps": 200,
        "link.efficiency": 1,
        "link.hop_us": 0.6,
        "link.spread_us": 0,
        "link.direct_efficiency": 0.5,
        "link.one_shot_us": 4,
        "link.peer_us": 0,
        "link.one_shot_max_bytes": 1e6,
        "link.two_shot_max_bytes": 2e6,
        "link.call_us": 10,
        **{
            f"{k}_decode.{n}": v
            for k in ("grouped", "head")
            for n, v in {
                "resident": 1,
                "block_us": 1,
                "wave_us": 0,
                "owner_us": 0,
                "first_keys_us": 0,
                "flat_keys": 0,
                "touch_us": 0,
                "l2_share": 1,
                "row_tile_share": 0,
            }.items()
        },
    }
    return load_accelerator("orin").with_values(values)


def test_product_bound_by_the_matrix_units(plain: Accelerator) -> None:
    """512 x 512 x 4096 by 256 x 256 quarters: the tiles of 256 x 128 are 8 blocks on 4 multiprocessors, 2
    waves of 2 * 256 * 128 * 4096 / 1000 = 268,435 ns.

    Bytes of a wave: (512 * 4096 * 2 * 2 + 512 * 512 * 2) / 2 = 4,456,448: 4456 ns, nothing beside it; launch
    and ramp 2000 ns: 538,871 ns.
    """
    assert gemm_ns(Product(512, 512, 4096), plain) == pytest.approx(538_871, rel=1e-4)


def test_waves_are_whole(plain: Accelerator) -> None:
    """One tile more than fits costs a wave: 4 tiles of 128 x 128 are one wave, 5 are two, when k is too short
    to split (and fills half of the pipeline's ramp).
    """
    one, two = (gemm_ns(Product(128, 128 * tiles, 256), plain) - 1500 for tiles in (4, 5))
    assert one == pytest.approx(2 * 128 * 128 * 256 / 1000, rel=0.01)
    assert one < two <= 2 * one * 1.01


def test_product_bound_by_bytes(plain: Accelerator) -> None:
    """One row through 8192 x 8192: 134,217,728 + 2 * 16,384 bytes take 134,250 ns at 1000 a ns.

    The matrix time of a tile of 64 rows for one, 128 blocks over 4: 32 waves * 2 * 64 * 64 * 8192 / 1000 =
    2,147,483 ns, is larger: a machine with 100 times the matrix units, 21,475 ns beside the bytes: (134,250^4
    + 21,475^4)^(1/4) = 134,272 ns, and 2000 ns.
    """
    strong = plain.with_values({"sm.macs_per_cycle_fp16": 50_000})
    assert gemm_ns(Product(1, 8192, 8192), strong) == pytest.approx(136_272, rel=1e-3)


def test_k_is_split_when_tiles_are_few(plain: Accelerator) -> None:
    """One tile on 4 multiprocessors: 4 parts of k take a quarter of the time, and 1.5 us to add them."""
    whole = 2 * 64 * 64 * 65536 / 1000
    assert gemm_ns(Product(64, 64, 65536), plain) == pytest.approx(2000 + whole / 4 + 1500, rel=0.02)


def test_few_blocks_wait_for_their_own_bytes(plain: Accelerator) -> None:
    """One row through 448 x 256 weights, too short to split: 7 steps of 1000 ns beside 230,784 bytes of 231
    ns: (231^2 + 7000^2)^(1/2) = 7004; launch and 7 / 8 of the ramp.

    The matrix time is nothing beside it (100,000 times the units).
    """
    slow = plain.with_values({"gemm.step_ns": 1000, "sm.macs_per_cycle_fp16": 5e7})
    assert gemm_ns(Product(1, 256, 448), slow) == pytest.approx(1875 + 7003.8, rel=1e-4)


def test_dequantisation_adds_to_the_matrix_time(plain: Accelerator) -> None:
    """64 rows through 256 x 1024 at 4 bits, tiles of 16 x 256: 4 blocks, one wave: 2 * 16 * 256 * 1024 / 1000
    = 8389 ns and 256 * 1024 weights at 100 a ns = 2621 ns, half hidden: (8389^1.5 + 2621^1.5)^(2/3) = 9339
    ns.  Tiles of 64 x 128 would be 2 blocks of 16,777 ns and more.
    """
    assert weight_only_ns(64, 256, 1024, plain) == pytest.approx(2000 + 9339, rel=1e-3)


def test_two_blocks_on_a_multiprocessor_dequantise_twice_as_much(plain: Accelerator) -> None:
    """16 rows through 2048 x 1000 at 4 bits, tiles of 16 x 256: 8 blocks on 4 multiprocessors; 25 weights a
    ns: 256 * 1000 / 25 = 10,240 ns a block.

    Matrix 2 * 16 * 256 * 1000 / 1000 = 8192 ns: alone (8192^1.5 + 10,240^1.5)^(2/3) = 14,675, two waves; two
    at once (16,384^1.5 + 10,240^1.5)^(2/3) = 21,413.
    """
    slow = plain.with_values({"weight_only.dequant_per_cycle": 25})
    assert weight_only_ns(16, 2048, 1000, slow) == pytest.approx(2000 + 2 * 14_675, rel=1e-3)
    assert weight_only_ns(
        16, 2048, 1000, slow.with_values({"weight_only.two_blocks_rows": 16})
    ) == pytest.approx(2000 + 21_413, rel=1e-3)


def test_power_limit(plain: Accelerator) -> None:
    """4000 operations a ns: 4e9 take 1000 us and are not more than the window; one more is, and runs at half
    the rate.
    """
    assert matrix_rate(4e9, plain, None) == 4000
    assert matrix_rate(4.01e9, plain, None) == 2000
    assert matrix_rate(1.0, plain, True) == 2000


def test_prefill_by_hand(plain: Accelerator) -> None:
    """4 heads, 256 queries: a block is 4 * 128 * 128 * 128 / 1000 = 8389 ns; owners of 1 and 2 blocks and a
    ramp each: 4 * (9389 + 17,777) / 4 + 17,777 / 2 = 36,055.

    Keys, values, queries and outputs: 4 * 4 * 128 * 256 * 2 = 1,048,576 bytes: (36,055^2 + 1049^2)^(1/2) =
    36,070; launch and ramp 2000.
    """
    assert prefill_ns(Attention(1, 4, 4, 128, 256, 256), plain) == pytest.approx(38_070, rel=1e-4)


def test_decode_by_hand(plain: Accelerator) -> None:
    """2 sequences of 2 groups, 512 keys: 4 owners of 4 blocks walk 4000 ns; 4 * 2 * 2 * 128 * 512 = 1,048,576
    bytes: (4000^2 + 1049^2)^(1/2) = 4135, and 2000.
    """
    assert decode_ns(Attention(2, 8, 2, 128, 1, 512), plain) == pytest.approx(6135, rel=1e-3)


def test_a_long_cache_is_split(plain: Accelerator) -> None:
    """1 group of 4096 keys is 32 blocks; 4 parts of 8 on 4 multiprocessors: (8000^2 + 2097^2)^(1/2) + 1500 to
    combine; unsplit it would be 32,000.
    """
    assert decode_ns(Attention(1, 4, 1, 128, 1, 4096), plain) == pytest.approx(
        2000 + math.hypot(8000, 2097.152) + 1500, rel=1e-6
    )


def test_groups_wait_for_a_place(plain: Accelerator) -> None:
    """One more start for a quarter more owners than places; far more cost owner_us for each wave after the
    first, as many times as fit a multiprocessor, and a block of 1 us.

    8 groups on 4 are 2 waves: 3, less than the 5 of a start; 64 heads on 4 are 16: 45; two at once: 8 waves,
    7 * 2 * 3 = 42; with 2 us for keys beyond 8: 7 * 2 * 5 = 70.
    """
    started = plain.with_values(
        {
            "grouped_decode.wave_us": 5,
            "grouped_decode.owner_us": 3,
            "head_decode.owner_us": 3,
            "dram.bandwidth_gbps": 1e9,
        }
    )
    assert decode_ns(Attention(1, 40, 5, 128, 1, 128), started) == pytest.approx(2000 + 5000 + 1000)
    assert decode_ns(Attention(1, 64, 8, 128, 1, 128), started) == pytest.approx(2000 + 5000 + 1000)
    for changes, start in (
        ({}, 45_000),
        ({"head_decode.resident": 2}, 42_000),
        ({"head_decode.resident": 2, "head_decode.first_keys_us": 2}, 70_000),
    ):
        heads = started.with_values({"attention.max_group": 4, **changes})
        assert decode_ns(Attention(1, 64, 8, 128, 1, 128), heads) == pytest.approx(2000 + start + 1000)
    assert decode_ns(Attention(1, 64, 8, 128, 1, 8), heads) == pytest.approx(2000 + 42_000 + 250)


def test_keys_that_are_walked_at_once(plain: Accelerator) -> None:
    """256 at once: 64 take the 2 us of two blocks, 32 half of it; 512 keys take four."""
    flat = plain.with_values({"grouped_decode.flat_keys": 256, "dram.bandwidth_gbps": 1e9})
    for keys, walk in ((32, 1000), (64, 2000), (256, 2000), (512, 4000)):
        assert decode_ns(Attention(1, 8, 4, 128, 1, keys), flat) == pytest.approx(2000 + walk)


def test_a_cache_of_keys_alone(plain: Accelerator) -> None:
    """4 heads of 16,384 keys are 16.8 MB of a 1 MB L2: nothing is held, all keys are read twice, 33.6 us; a
    group's kernel reads them once, 16.8.

    32 of 1024 keys, two at once on 4 multiprocessors: 8.4 MB are not held, but the 2.1 MB of the 8 that run
    are by an L2 of 4 MB, 1 / (1 + 0.524^6) = 0.98 of them: 8.4 * 1.02 = 8.56 us from DRAM, the other 8.22 MB
    from the L2 at 4000 a ns: 2.1 us.  And 2 heads of 1024 are held from call to call: 1.05 MB at 4000.
    """
    quick = plain.with_values({"head_decode.block_us": 0, "grouped_decode.block_us": 0, "launch.ramp_us": 0})
    long = Attention(1, 4, 4, 128, 1, 16_384, keys_alone=True)
    assert decode_ns(long, quick) == pytest.approx(1000 + 33_554, rel=1e-3)
    assert decode_ns(Attention(1, 4, 4, 128, 1, 16_384), quick) == pytest.approx(1000 + 33_554, rel=1e-3)
    assert decode_ns(Attention(1, 8, 4, 128, 1, 16_384, keys_alone=True), quick) == pytest.approx(
        1000 + 16_777, rel=1e-3
    )
    held = quick.with_values({"l2.capacity_bytes": 4e6, "l2.bandwidth_gbps": 4000, "head_decode.resident": 2})
    assert decode_ns(Attention(1, 32, 32, 128, 1, 1024, keys_alone=True), held) == pytest.approx(
        1000 + 8477 + 2074, rel=0.02
    )
    assert decode_ns(Attention(1, 2, 2, 128, 1, 1024, keys_alone=True), held) == pytest.approx(
        1000 + 262, rel=0.02
    )


def test_grouped_kernel_only_when_it_fills(plain: Accelerator) -> None:
    """1 group of 8 heads and 128 keys is one block, four times it fill 4 multiprocessors; of 2 times they do
    not, and the heads' own kernel (3 us a block) runs.
    """
    slow_heads = plain.with_values({"head_decode.block_us": 3, "dram.bandwidth_gbps": 1e9})
    shape = Attention(1, 8, 1, 128, 1, 128)
    assert decode_ns(shape, slow_heads.with_values({"attention.grouped_fill": 4})) == pytest.approx(
        2000 + 1000
    )
    assert decode_ns(shape, slow_heads.with_values({"attention.grouped_fill": 2})) == pytest.approx(
        2000 + 3000
    )


def test_cache_beyond_the_l2_is_touched_first(plain: Accelerator) -> None:
    """1 sequence, 4 groups of 128 keys: 262,144 bytes of a 1 MB L2: 10 us * (1 - exp(-0.262)) = 2306 ns and
    262 of bytes, beside 1 us of walking; 32 heads a group: twice that by the second 16.
    """
    touched = plain.with_values({"grouped_decode.touch_us": 10, "grouped_decode.row_tile_share": 1})
    assert decode_ns(Attention(1, 16, 4, 128, 1, 128), touched) == pytest.approx(
        2000 + math.hypot(1000, 2568), rel=1e-3
    )
    assert decode_ns(Attention(1, 128, 4, 128, 1, 128), touched) == pytest.approx(
        2000 + 2 * math.hypot(1000, 2568), rel=1e-3
    )


def test_rows_by_hand(plain: Accelerator) -> None:
    """1000 + 0.1 * 8192 + 128 * 8192 * 4 / 1000 = 6013.6; silu: 1000 + 3 * 128 * 8192 / 1000 = 4145.7; one
    row copied: 1500 + 1024 / 200; 100 rows of 2048 rotated: 1000 + 204,800 / 200 or / 400; 100 rows of 4096
    softmaxed 1000 + 0.1 * 8192 + 3 * 819,200 / 1000, of 1024 in two passes.

    For any width, 512 rows of 64 Ki columns: norm 1000 + 0.2 * 131,072 + the larger of 268,435 and 512 *
    65,536 / 200 = 167,772; on four times the bandwidth 167,772.
    """
    assert add_norm_ns(128, 4096, plain) == pytest.approx(6013.6, abs=0.1)
    assert silu_mul_ns(128, 4096, plain) == pytest.approx(4145.7, abs=0.1)
    assert copy_ns(1, 1024, plain) == pytest.approx(1505.1, abs=0.1)
    assert softmax_ns(100, 4096, plain) == pytest.approx(1000 + 819.2 + 3 * 819.2) and softmax_ns(
        100, 1024, plain
    ) == pytest.approx(1000 + 204.8 + 2 * 204.8)
    assert rope_ns(100, 2048, plain) == pytest.approx(2024) and rope_ns(
        100, 2048, plain, any_width=False
    ) == pytest.approx(1512)
    assert add_norm_ns(512, 65536, plain, any_width=True) == pytest.approx(1000 + 26_214.4 + 268_435.5, abs=1)
    assert add_norm_ns(
        512, 65536, plain.with_values({"rowwise.bandwidth_gbps": 4000}), any_width=True
    ) == pytest.approx(1000 + 26_214.4 + 167_772.2, abs=1)


def test_all_reduce_regimes(plain: Accelerator) -> None:
    """2 devices. 10 kB in one shot: 4000 + 100.  1.5 MB in two: 4000 + 15,000.  NCCL eagerly from 2 MB, in a
    graph always, 3 primitives on half of the bytes:

    10 MB: LL 15,000,000 / 100 = 150,000 + 7800; LL128 17,800 + 80,000; Simple 8400 + 6800 + 75,000 = 90,200,
    eager 100,200. 10 kB in a graph: LL 7800 + 150.  On 8 devices 15 primitives on an eighth: LL 6600 + 14 *
    600 + 1.875 * 10,000 / 100 = 15,187.5.
    """
    assert all_reduce_ns(10_000, 2, plain) == pytest.approx(4100)
    assert all_reduce_ns(1_500_000, 2, plain) == pytest.approx(19_000)
    assert all_reduce_ns(10_000_000, 2, plain) == pytest.approx(100_200)
    assert all_reduce_ns(10_000_000, 2, plain, custom=False) == pytest.approx(90_200)
    assert all_reduce_ns(10_000, 2, plain, custom=False) == pytest.approx(7950)
    assert all_reduce_ns(10_000, 8, plain, custom=False) == pytest.approx(15_187.5)
    assert all_reduce_ns(10_000, 1, plain) == 0
    spread = plain.with_values({"link.spread_us": 0.1})
    assert all_reduce_ns(1_000_000, 8, spread, custom=False) - all_reduce_ns(
        1_000_000, 8, plain, custom=False
    ) == pytest.approx(1400)


def test_waiting_for_links_leaves_power_to_the_products() -> None:
    """At the clock that a long step ends with, clock^3 times the working share is the sustained clock^3, up
    to the burst's; one device has nothing to wait for.
    """
    machine = load_accelerator("h200")
    for devices in (1, 4, 8):
        step = Step(MODELS["llama3-8b"], devices, 1, 8192, 0)
        layer, end = kernels(step, machine)
        total = step_ns(step, machine)
        working = 1 - 32 * (layer["o all-reduce"] + layer["down all-reduce"]) / total
        share = min(machine.power.sustained_share * working ** (-1 / 3), machine.power.burst_share)
        product = gemm_ns(
            Product(8192, 2 * 14336 // devices, 4096),
            machine.with_values({"power.sustained_share": share}),
            True,
        )
        assert layer["gate_up"] == pytest.approx(product, rel=1e-3)
        assert (working == 1) == (devices == 1) and total == pytest.approx(
            32 * sum(layer.values()) + sum(end.values())
        )


def test_a_step_is_the_sum_of_its_kernels() -> None:
    machine = load_accelerator("h200")
    step = Step(MODELS["llama3-8b"], 1, 1, 1, 127)
    layer, end = kernels(step, machine)
    assert step_ns(step, machine) == pytest.approx(32 * sum(layer.values()) + sum(end.values()))
    assert layer["o all-reduce"] == 0
    assert MODELS["llama3-8b"].weights == 7_504_658_432


SHAPES = [
    Product(m, n, k) for m in (1, 16, 100, 2048) for n, k in ((4096, 4096), (1536, 8960), (37888, 3584))
]


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize(
    ("constant", "factor"),
    [
        ("dram.bandwidth_gbps", 1.3),
        ("sm.macs_per_cycle_fp16", 1.5),
        ("l2.bandwidth_gbps", 2.0),
        ("launch.kernel_us", 0.5),
        ("power.burst_share", 1.2),
    ],
)
def test_more_is_never_slower(name: str, constant: str, factor: float) -> None:
    machine = load_accelerator(name)
    better = machine.with_values({constant: machine.constants[constant].value * factor})
    for shape in SHAPES:
        assert gemm_ns(shape, better) <= gemm_ns(shape, machine) * (1 + 1e-12)
    for attention in (Attention(8, 32, 8, 128, 1, 4000), Attention(1, 32, 8, 128, 1000, 1000)):
        assert attention_ns(attention, better) <= attention_ns(attention, machine) * (1 + 1e-12)


@pytest.mark.parametrize("name", MACHINES)
def test_more_work_is_never_faster(name: str) -> None:
    """Twice the k, keys or bytes takes at least as long, and any time is positive and finite."""
    machine = load_accelerator(name)
    for shape in SHAPES:
        assert (
            0 < gemm_ns(shape, machine) <= gemm_ns(Product(shape.m, shape.n, 2 * shape.k), machine) < math.inf
        )
    keys = [decode_ns(Attention(1, 32, 8, 128, 1, n), machine) for n in (128, 4096, 65536)]
    assert keys == sorted(keys)


@pytest.mark.parametrize("name", MACHINES)
def test_times_are_deterministic(name: str) -> None:
    times = {tuple(gemm_ns(s, load_accelerator(name)) for s in SHAPES) for _ in range(2)}
    assert len(times) == 1

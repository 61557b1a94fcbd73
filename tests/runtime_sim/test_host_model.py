"""Predictions of the host's code: files of processors, counts of kernels, and steps as sums of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import pytest

from tests.made_processor import NOTHING, machine, measured_like
from tyir.backends.host.kernels import EMITTERS, decided
from tyir.diagnostics import TyirError
from tyir.dialects import kv
from tyir.dialects.func import Func
from tyir.parser import parse_module
from tyir.runtime_sim.host.kernels import work_of
from tyir.runtime_sim.host.machine import (
    FOOTPRINTS,
    ROWWISE,
    HostMachine,
    load_host_machine,
    sections_of_kernels,
)
from tyir.runtime_sim.host.steps import executed, predict_step
from tyir.targets.machine import load_machine
from tyir.tools.sim.host_fit import least_squares
from tyir.tools.sim.host_points import points
from tyir.tools.tyir_sim import main


def step(tokens: int = 1) -> list[Func]:
    """A layer, called twice: a norm, a product of 4-bit weights, attention of 4 heads over 2 of the cache."""
    x, q = f"tensor<1x{tokens}x64xf16>", f"tensor<1x{tokens}x4x16xf16>"
    w, s, z, c = "tensor<64x64xui4>", "tensor<64x2xf16>", "tensor<64x2xui4>", "tensor<1x2x256x16xf16>"
    n, p = "tensor<64xf16>", "tensor<1xi32>"
    types = f"({x}, {n}, {w}, {s}, {z}, {c}, {p}) -> {x}"
    module = parse_module(f"""
    "func.func"() <{{sym_name = "layer", function_type = {types}}}> ({{
      ^bb0(%x: {x}, %n: {n}, %w: {w}, %s: {s}, %z: {z}, %c: {c}, %p: {p}):
        %0 = "ty.rms_norm"(%x, %n) <{{eps = 1.0e-06 : f64}}> : ({x}, {n}) -> {x}
        %1 = "ty.quantized_linear"(%0, %w, %s, %z) <{{group_size = 32 : i64}}> : ({x}, {w}, {s}, {z}) -> {x}
        %2 = "ty.reshape"(%1) <{{shape = array<i64: 1, -1, 4, 16>}}> : ({x}) -> {q}
        %3 = "kv.attention"(%2, %c, %c, %p) <{{kv_heads = array<i64: 0, 0, 1, 1>, scale = 0.25 : f64}}>
          : ({q}, {c}, {c}, {p}) -> {q}
        %4 = "ty.reshape"(%3) <{{shape = array<i64: 1, -1, 64>}}> : ({q}) -> {x}
        "func.return"(%4) : ({x}) -> ()
    }}) : () -> ()
    "func.func"() <{{sym_name = "main", function_type = {types}}}> ({{
      ^bb0(%x: {x}, %n: {n}, %w: {w}, %s: {s}, %z: {z}, %c: {c}, %p: {p}):
        %0 = "func.call"(%x, %n, %w, %s, %z, %c, %p) <{{callee = @layer}}> : {types}
        %1 = "func.call"(%0, %n, %w, %s, %z, %c, %p) <{{callee = @layer}}> : {types}
        "func.return"(%1) : ({x}) -> ()
    }}) : () -> ()
    """)
    return [op for op in module.body if isinstance(op, Func)]


def nanoseconds(
    made: HostMachine, position: int = 0, tokens: int = 1, threads: int = 1, dies: int = 1
) -> float:
    given = [step(tokens)] * dies
    found = predict_step(
        given, made, tokens=tokens, position=position, activations="int8", threads=threads, tensors=7
    )
    assert sum(p.ms for p in found.parts) == pytest.approx(found.ms)
    return found.ms * 1e6


# ----------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(
    ("constant", "by_hand"),
    [
        ("norm__element_ns", 2 * 64),
        ("product_int8_token__call_ns", 2),
        ("product_int8_token__row_ns", 2 * 64),
        ("attention_f16_token__call_ns", 2),
        ("attention_f16_token__tile_ns", 2 * 2),  # two heads share the keys of one
        ("attention_f16_token__element_ns", 2 * 2 * 11 * 2 * 16),  # keys and values of 11 positions, twice
        ("attention_f16_token__mac_ns", 2 * 4 * 11 * 2 * 16),
        ("attention_f16_token__score_ns", 2 * 4 * 11),
        ("step__tensor_us", 7e3),
        ("product_fp32_token__row_ns", 0),
        ("product_int8_chunk__call_ns", 0),
    ],
)
def test_a_token_by_hand(constant: str, by_hand: float) -> None:
    assert nanoseconds(machine(**{constant: 1.0}), position=10) == pytest.approx(by_hand)


@pytest.mark.parametrize(
    ("constant", "by_hand"),
    [
        ("product_int8_chunk__weight_ns", 2 * 64 * 64),
        ("product_int8_chunk__mac_ns", 2 * 16 * 64 * 64),
        ("product_int8_chunk__sum_ns", 2 * 16 * 64 * 64 / 32),
        ("product_int8_chunk__input_ns", 2 * 16 * 64),
        ("product_int8_chunk__spill_ns", 0),  # 1 KiB stays in the cache
        ("attention_f16_chunk__tile_ns", 2 * 4 * 2),  # tiles of eight tokens
        (
            "attention_f16_chunk__score_ns",
            2 * 4 * 8 * (10 + 8 + 10 + 16),
        ),  # a tile sees what its last token does
    ],
)
def test_a_chunk_by_hand(constant: str, by_hand: float) -> None:
    assert nanoseconds(machine(**{constant: 1.0}), position=10, tokens=16) == pytest.approx(by_hand)


def test_bytes_are_as_slow_as_what_the_step_reads() -> None:
    made = machine(**{f"product_int8_token__{n}_byte_ns": v for n, v in zip(FOOTPRINTS, (1.0, 3.0, 5.0))})
    weight = 64 * 32 + 64 * 2 * 2 + 64 * 1
    assert nanoseconds(made) == pytest.approx(2 * weight)  # less than the smallest footprint
    work = work_of(
        next(op for op in executed(step()) if op.name == "ty.quantized_linear"), 0, "int8", made.processor
    )
    assert (work.weight_bytes, work.counts["byte"]) == (weight, weight)


def test_activations_fill_the_cache() -> None:
    made = machine(product_int8_chunk__spill_ns=1.0, processor__cache_bytes=1024)
    assert nanoseconds(made, tokens=16) == pytest.approx(2 * 16 * 64 * 64)
    half = machine(product_int8_chunk__spill_ns=1.0, processor__cache_bytes=2048)
    assert nanoseconds(half, tokens=16) == 0


def test_dies_take_turns_and_meet() -> None:
    made = machine(norm__element_ns=1.0)
    assert nanoseconds(made, dies=4) == pytest.approx(4 * nanoseconds(made))
    two = machine(norm__element_ns=1.0, processor__threads=2, norm__speedup=2.0)
    assert nanoseconds(two, dies=4, threads=2) == pytest.approx(2 * nanoseconds(two))
    memory = machine(norm__element_ns=1.0, processor__threads=2, norm__speedup=1.0)
    assert nanoseconds(memory, dies=4, threads=2) == pytest.approx(4 * nanoseconds(memory))


def test_threads_are_started_for_enough_work() -> None:
    made = machine(
        product_int8_token__row_ns=100.0,
        product_int8_token__speedup=2.0,
        processor__threads=2,
        parallel__start_us=1.0,
    )
    assert nanoseconds(made, threads=2) == pytest.approx(2 * (1000 + 3200) + 2 * 1000)  # attention's too
    few = machine(product_int8_token__row_ns=100.0, product_int8_token__speedup=2.0, processor__threads=2)
    few = few.with_overrides({"parallel.least_operations": 10**6})
    assert nanoseconds(few, threads=2) == pytest.approx(2 * 6400)


def test_predictions_are_monotone() -> None:
    made = measured_like()
    by_position = [nanoseconds(made, position) for position in range(0, 250, 7)]
    assert by_position == sorted(by_position)
    assert by_position[0] < by_position[-1]
    by_threads = [nanoseconds(made, 200, 16, threads) for threads in (1, 2, 3, 4)]
    assert by_threads == sorted(by_threads, reverse=True)
    assert by_threads[0] > by_threads[-1]


def test_more_threads_than_were_measured_are_refused() -> None:
    with pytest.raises(TyirError, match="made-up was measured with 1 to 1 threads, 2 are asked about"):
        nanoseconds(machine(), threads=2)


# --------------------------------------------------------------------------------------------- all kernels

SPARSE = {"kv.block_scores", "kv.pick_blocks", "kv.sparse_attention"}


def test_every_kernel_has_a_model_or_is_refused_by_name() -> None:
    """One that is added to the back end is in one of these, or this test says so."""
    products = {"ty.linear", "ty.quantized_linear", "ty.attention", "kv.attention", "kv.dual_chunk_attention"}
    known = {op for ops in ROWWISE.values() for op in ops} | products
    of_4_bits = {"kv.quantize_groups"}  # caches: their attention is refused as well
    assert {kind.name for kind in EMITTERS} == known | SPARSE | of_4_bits


def test_a_kernel_without_a_model_is_refused() -> None:
    op = next(op for op in executed(step()) if isinstance(op, kv.CachedAttention))
    made = machine()
    with pytest.raises(TyirError, match=r"no model of how long the kernel of 'func\.return' takes"):
        work_of(step()[0].body.terminator, 0, "int8", made.processor)
    assert work_of(op, 0, "int8", made.processor).kind in sections_of_kernels()


def test_the_probe_measures_every_constant() -> None:
    """Each kind has points, and as many different counts as it has constants."""
    processor = machine().processor
    found: dict[str, set[str]] = {}
    rows: dict[str, int] = {}
    for point in points(("int16", "int8", "fp32")):
        for position in point.positions:
            work = work_of(point.op(), position, point.activations, processor)
            assert work.kind == point.kind
            found.setdefault(work.kind, set()).update(n for n, count in work.counts.items() if count)
            rows[work.kind] = rows.get(work.kind, 0) + 1
    for kind, section in sections_of_kernels().items():
        if kind != "meeting":
            wanted = {f.name.removesuffix("_ns") for f in fields(section)} - {"speedup"}
            assert (wanted - found[kind] <= {"spill"}) and found[kind] <= wanted, kind
            assert rows[kind] >= len(found[kind]), kind


def test_what_kernels_decide_by_is_theirs() -> None:
    assert decided.FEW_TOKENS < 16 and decided.ATTENTION_QUERIES > 1
    assert decided.WORTH_THREADS > decided.INTEGER_GROUP > 1


@pytest.mark.parametrize("times", [[(1, 0, 3.0), (0, 1, 5.0)], [(1, 1, 8.0), (2, 1, 11.0), (1, 3, 18.0)]])
def test_least_squares_find_what_was_added_up(times: Sequence[tuple[int, int, float]]) -> None:
    found = least_squares([({"a": a, "b": b}, t) for a, b, t in times])
    assert found == pytest.approx({"a": 3.0, "b": 5.0})


def test_nothing_takes_less_than_no_time() -> None:
    found = least_squares([({"a": 1, "b": 1}, 2.0), ({"a": 2, "b": 1}, 1.0), ({"a": 3, "b": 1}, 0.5)])
    assert found["a"] == 0 and found["b"] > 0
    with pytest.raises(ValueError, match="not positive"):
        least_squares([({"a": 1}, 0.0)])


# ---------------------------------------------------------------------------------------------- the file


def test_the_file_comes_back(tmp_path: Path) -> None:
    made, path = measured_like(), tmp_path / "made.toml"
    path.write_text(made.as_toml())
    again = load_host_machine(path)
    assert {n: c.value for n, c in again.constants.items()} == {n: c.value for n, c in made.constants.items()}
    assert (again.name, again.clock, again.kernels) == (made.name, made.clock, made.kernels)


@pytest.mark.parametrize("name", sorted(NOTHING))
def test_each_constant_is_needed_and_checked(name: str, tmp_path: Path) -> None:
    section, _, key = name.partition(".")
    head, _, rest = measured_like().as_toml().partition(f"[{section}]")
    text = re.sub(rf"(?m)^{key} = .*\n", "", rest, count=1)
    path = tmp_path / "made.toml"
    path.write_text(f"{head}[{section}]{text}")
    with pytest.raises(TyirError, match=rf"1 constant is missing: {re.escape(name)}") as caught:
        load_host_machine(path)
    assert "--probe-host" in str(caught.value.diagnostics[0].help)
    wrong = re.sub(rf"(?m)^{key} = {{ value = [^,]*", f"{key} = {{ value = -1", rest, count=1)
    path.write_text(f"{head}[{section}]{wrong}")
    with pytest.raises(TyirError, match=rf"{re.escape(name)}: value -1: rates, sizes"):
        load_host_machine(path)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (('clock = "wall"', 'clock = "sun"'), "clock = 'sun' is none of wall, processor"),
        (('clock = "wall"', 'clock = "processor"'), "processor.threads: 4 threads by the processor's clock"),
        (('kind = "processor"', 'kind = "gpu"'), "kind = 'gpu' is not that of a processor"),
        (('name = "made-up"', "name = 7"), "name = '7' is not a name"),
        (("[norm]", "[norms]"), "unknown constant 'norms.call_ns'"),
        (("[norm]", "[norm]\nextra_ns = 1"), "unknown constant 'norm.extra_ns'"),
    ],
)
def test_wrong_files_are_refused(changed: tuple[str, str], said: str, tmp_path: Path) -> None:
    path = tmp_path / "made.toml"
    path.write_text(measured_like().as_toml().replace(*changed))
    with pytest.raises(TyirError, match=re.escape(said)):
        load_host_machine(path)


def test_files_of_other_machines_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "made.toml"
    path.write_text(measured_like().as_toml())
    with pytest.raises(TyirError, match="describes a processor, which runs the host's code"):
        load_machine(path)
    (tmp_path / "other.toml").write_text('base = "edge10"\n')
    with pytest.raises(TyirError, match="describes no processor"):
        load_host_machine(tmp_path / "other.toml")


# ---------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--probe-host", "x.toml", "out"], "--probe-host measures this computer"),
        (
            ["--probe-host", "x.toml", "--clock", "processor", "--threads", "100000"],
            "100000 threads were asked for",
        ),
        ([], "there is nothing to simulate"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    assert said in capsys.readouterr().err


def test_without_a_compiler_nothing_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tyir.backends.host.tvm_host.linker", lambda: None)
    assert main(["--probe-host", str(tmp_path / "x.toml")]) == 1
    assert "there is no C++ compiler" in capsys.readouterr().err
    assert not (tmp_path / "x.toml").exists()

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
from tyir.runtime_sim.host.kernels import Loop, work_of
from tyir.runtime_sim.host.machine import (
    FOOTPRINTS,
    ROWWISE,
    HostMachine,
    by_footprint,
    load_host_machine,
    sections_of_kernels,
)
from tyir.runtime_sim.host.steps import executed, kernel_ns, predict_step
from tyir.targets.machine import load_machine
from tyir.tools.sim.host_fit import least_squares
from tyir.tools.sim.host_points import ABOUT_THREADS, points
from tyir.tools.sim.host_probe import Timed, constants_of
from tyir.tools.tyir_sim import main

WEIGHT = 64 * 32 + 64 * 2 * 2 + 64 * 1  # bytes of 64 by 64 numbers of 4 bits in groups of 32
CACHE = 2 * 2 * 2 * 11 * 16  # bytes of two heads' keys and values, f16, at 11 positions


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
        ("product_int8_token__input_ns", 2 * 64),
        ("product_int8_token__row_ns", 2 * 64),
        ("product_int8_token__byte_ns", 2 * WEIGHT),
        ("attention_f16_token__query_ns", 2 * 4),
        ("attention_f16_token__element_ns", 2 * 2 * 11 * 2 * 16),  # of 11 positions, once for two heads
        ("attention_f16_token__mac_ns", 2 * 4 * 11 * 2 * 16),
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
        ("attention_f16_chunk__query_ns", 2 * 4 * 16),
        ("attention_f16_chunk__element_ns", 2 * 4 * 2 * 16 * (18 + 26)),  # tiles of eight tokens
        ("attention_f16_chunk__score_ns", 2 * 4 * 8 * (18 + 26)),  # a tile sees what its last token does
    ],
)
def test_a_chunk_by_hand(constant: str, by_hand: float) -> None:
    assert nanoseconds(machine(**{constant: 1.0}), position=10, tokens=16) == pytest.approx(by_hand)


# What `step` reads at position 10 is more than a cache of 1 KiB, and less than the smallest footprint.
FAR = {"processor__cache_bytes": 1024, "memory__16mb_one_thread_byte_ns": 2.0}
TWO = {"processor__threads": 2, "memory__16mb_all_threads_byte_ns": 1.5, **FAR}


def test_nothing_is_faster_than_memory() -> None:
    read = 2 * (WEIGHT + CACHE)
    assert nanoseconds(machine(**FAR), position=10) == pytest.approx(2.0 * read)
    work = [work_of(op, 10, "int8", machine().processor) for op in executed(step())]
    assert sum(w.read_bytes for w in work) == read
    near = machine(**{**FAR, "processor__cache_bytes": 1 << 20})
    assert nanoseconds(near, position=10) == 0


def test_a_share_of_memory_is_waited_for() -> None:
    computes = machine(**FAR, product_int8_token__byte_ns=3.0, product_int8_token__wait_share=0.25)
    assert nanoseconds(computes, position=10) == pytest.approx(2 * (3.5 * WEIGHT + 2 * CACHE))
    waits = machine(**FAR, product_int8_token__byte_ns=0.1, product_int8_token__wait_share=0.25)
    assert nanoseconds(waits, position=10) == pytest.approx(2 * (2 * WEIGHT + 2 * CACHE))


def test_memory_takes_a_while_to_begin() -> None:
    made = machine(**FAR, memory__first_ns=100.0)
    assert nanoseconds(made, position=10) == pytest.approx(2 * (2 * WEIGHT + 100 + 2 * CACHE + 100))
    assert nanoseconds(machine(memory__first_ns=100.0)) == 0  # the cache holds what is read


def test_threads_share_memory() -> None:
    """A weight that both read takes what a byte takes both, also where they work on dies of their own."""
    made = machine(**TWO, parallel__least_operations=4000)
    assert nanoseconds(made, 10, threads=2) == pytest.approx(2 * 1.5 * (WEIGHT + CACHE))
    alone = made.with_overrides({"parallel.least_operations": 10**6})
    assert nanoseconds(alone, 10, threads=2) == pytest.approx(2 * 2.0 * (WEIGHT + CACHE))
    assert nanoseconds(alone, 10, threads=2, dies=2) == pytest.approx(2 * 2 * 1.5 * (WEIGHT + CACHE))


def test_footprints_between_measured_ones() -> None:
    first, second, third = FOOTPRINTS.values()
    assert by_footprint(first, first) == {}
    assert by_footprint(first / 2, 0) == {"16mb": 1.0, "256mb": 0.0}
    assert by_footprint(100 * third, 0) == pytest.approx({"256mb": 0.0, "1gb": 1.0})
    assert by_footprint((second * third) ** 0.5, 0) == pytest.approx({"256mb": 0.5, "1gb": 0.5})


def test_activations_fill_the_cache() -> None:
    made = machine(product_int8_chunk__spill_ns=1.0, processor__cache_bytes=1024)
    assert nanoseconds(made, tokens=16) == pytest.approx(2 * 16 * 64 * 64)
    half = machine(product_int8_chunk__spill_ns=1.0, processor__cache_bytes=2048)
    assert nanoseconds(half, tokens=16) == 0


def test_dies_take_turns_and_meet() -> None:
    made = machine(norm__element_ns=1.0)
    assert nanoseconds(made, dies=4) == pytest.approx(4 * nanoseconds(made))
    two = machine(norm__element_ns=1.0, processor__threads=2)
    assert nanoseconds(two, dies=4, threads=2) == pytest.approx(2 * nanoseconds(two))
    slower = machine(norm__element_ns=1.0, processor__threads=2, parallel__beside=1.5)
    assert nanoseconds(slower, dies=4, threads=2) == pytest.approx(3 * nanoseconds(slower))


def test_threads_are_started_for_enough_work() -> None:
    made = machine(product_int8_token__row_ns=100.0, processor__threads=2, parallel__start_us=1.0)
    assert nanoseconds(made, threads=2) == pytest.approx(2 * (1000 + 3200) + 2 * 1000)  # attention's too
    few = made.with_overrides({"parallel.least_operations": 10**6})
    assert nanoseconds(few, threads=2) == pytest.approx(2 * 6400)


def test_what_a_loop_does_before_is_not_shared() -> None:
    made = machine(product_int8_token__input_ns=100.0, processor__threads=2, parallel__start_us=1.0)
    assert nanoseconds(made, threads=2) == pytest.approx(2 * 6400 + 2 * 2 * 1000)


def test_the_slowest_part_is_waited_for() -> None:
    made = machine(product_int8_token__row_ns=100.0, processor__threads=3, parallel__beside=1.3)
    assert nanoseconds(made, threads=3) == pytest.approx(2 * 6400 / 3 * 1.3)
    assert nanoseconds(made, threads=2) == pytest.approx(2 * 6400 / 2 * 1.15)  # on the line between


@pytest.mark.parametrize(("threads", "busiest"), [(1, 1.0), (2, 0.6), (3, 0.4), (4, 0.4), (5, 0.2), (8, 0.2)])
def test_parts_are_cut_equal(threads: int, busiest: float) -> None:
    assert Loop({}, 1000, items=5).share(threads) == pytest.approx(busiest)
    assert Loop({}, 1000).share(threads) == pytest.approx(1 / threads)


def test_one_item_is_not_shared() -> None:
    assert [Loop({}, 1000, items).threads(4, 1000) for items in (0, 1, 2)] == [4, 1, 4]
    assert Loop({}, 999).threads(4, 1000) == 1


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
    """Each kind has points, and as many different counts as it has constants; so has what threads change."""
    processor = machine().processor
    found: dict[str, set[str]] = {}
    rows: dict[str, int] = {}
    about: dict[str, int] = {}
    for point in points(("int16", "int8", "fp32")):
        about[point.about] = about.get(point.about, 0) + 1
        for position in point.positions:
            work = work_of(point.op(), position, point.activations, processor)
            assert work.kind == point.kind
            counts = {f"{n}_ns" for n, count in work.counts.items() if count}
            if point.copies() * work.read_bytes > processor.cache_bytes:
                counts.add("wait_share")
            found.setdefault(work.kind, set()).update(counts)
            rows[work.kind] = rows.get(work.kind, 0) + 1
    for kind, section in sections_of_kernels().items():
        if kind != "meeting":
            wanted = {f.name for f in fields(section)}
            assert wanted - found[kind] <= {"spill_ns"} and found[kind] - wanted <= {"wait_share"}, kind
            assert rows[kind] >= len(wanted), kind
    assert about.keys() == {"", *ABOUT_THREADS}
    assert about["memory"] == len(FOOTPRINTS)


def test_memory_is_measured_beyond_the_cache() -> None:
    """And what a token's kernels compute within it: two constants of a product that are not mixed up."""
    processor = machine(processor__cache_bytes=2 << 20).processor
    near = far = 0
    for point in points(("int8",)):
        read = [
            point.copies() * work_of(point.op(), p, "int8", processor).read_bytes for p in point.positions
        ]
        if point.about == "memory":
            assert read == [pytest.approx(point.footprint, rel=0.2)]
        elif point.kind == "product_int8_token":
            near, far = near + (max(read) <= processor.cache_bytes), far + (min(read) > 16 << 20)
    assert near >= 4 and far >= 1


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


# ------------------------------------------------------------------------------------------------- the probe


def test_the_probe_finds_what_times_are_made_of() -> None:
    """Of times that a known machine would take, each constant comes back."""
    made = machine(
        processor__threads=2,
        processor__cache_bytes=2 << 20,
        parallel__least_operations=1 << 18,
        parallel__start_us=2.0,
        parallel__beside=1.25,
        memory__first_ns=500.0,
        **{f"memory__{label}_one_thread_byte_ns": 0.04 + 0.01 * n for n, label in enumerate(FOOTPRINTS)},
        **{f"memory__{label}_all_threads_byte_ns": 0.03 + 0.01 * n for n, label in enumerate(FOOTPRINTS)},
        product_f16_token__byte_ns=1e-5,
        product_f16_token__wait_share=1.0,
        product_int8_token__input_ns=0.5,
        product_int8_token__row_ns=3.0,
        product_int8_token__byte_ns=0.06,
        product_int8_token__more_mac_ns=0.01,
        product_int8_token__wait_share=0.25,
        product_int8_chunk__weight_ns=0.1,
        product_int8_chunk__sum_ns=0.4,
        product_int8_chunk__input_ns=0.3,
        attention_f16_token__mac_ns=0.05,
        attention_f16_token__wait_share=0.75,
        attention_f16_chunk__score_ns=0.7,
        attention_f16_chunk__element_ns=0.2,
        norm__call_ns=100.0,
        norm__element_ns=0.2,
    )
    kinds = {name.partition(".")[0] for name, c in made.constants.items() if c.value}
    timed = []
    for point in points(("int8",)):
        if point.kind in kinds:
            works = {p: work_of(point.op(), p, "int8", made.processor) for p in point.positions}
            one = Timed(point, works, lambda: None, lambda position: None, point.copies())
            for p, work in works.items():
                for threads in (1, 2):
                    ns = kernel_ns(made, work, one.copies * work.read_bytes, 1, threads)
                    one.seconds[p, threads] = [3e-9 * ns, 1e-9 * ns, 1e-9 * ns, 1e-9 * ns]  # one disturbed
            timed.append(one)
    found = constants_of(timed, made.processor, 1 << 18)
    wanted = {name: made.constants[name].value for name in found}
    assert wanted.keys() >= {n for n, c in made.constants.items() if c.value and n[:4] != "proc"} - {
        "parallel.least_operations"
    }
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=0.02, abs=1e-3), name


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


@pytest.mark.parametrize(("line", "model"), [("", "1"), ("model = 3\n", "3"), ('model = "x"\n', "x")])
def test_files_of_another_model_are_to_be_measured_again(line: str, model: str, tmp_path: Path) -> None:
    """One message, not one for each constant that was renamed: files of the first model say no number."""
    path = tmp_path / "made.toml"
    text = measured_like().as_toml().replace("beside =", "speedup =")
    path.write_text(re.sub(r"(?m)^model = .*\n", line, text))
    with pytest.raises(TyirError, match=f"measured for model {model} of how long") as caught:
        load_host_machine(path)
    assert [d.help for d in caught.value.diagnostics] == [
        f"measure the processor again: tyir-sim --probe-host {path}"
    ]


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

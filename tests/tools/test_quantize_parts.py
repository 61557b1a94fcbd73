"""The parts of tyir-quantize, each against what it should compute."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tyir.diagnostics import TyirError  # noqa: E402
from tyir.dialects.ty import QuantizeGroups, dequantize  # noqa: E402
from tyir.tools.bench import train_small  # noqa: E402
from tyir.tools.quantize import arithmetic, calibration, gptq, ranges, scales, settings  # noqa: E402
from tyir.tools.quantize.autoawq import settings_of  # noqa: E402
from tyir.tools.quantize.by_rows import by_rows, threads_for  # noqa: E402
from tyir.tools.quantize.choice import apart, chosen, difference  # noqa: E402
from tyir.tools.quantize.moments import Inputs, Moments  # noqa: E402
from tyir.tools.quantize.quantize import Text, perplexity_of  # noqa: E402

MODEL = Path(__file__).parents[1] / "models" / "tiny-qwen2"
GRIDS = [settings.Grid(4, 32, True), settings.Grid(4, 16, False), settings.Grid(4, 64, True)]


def weight_of(kind: str, seed: int = 0) -> Any:
    """A weight [24, 64] of some kind."""
    w = torch.randn(24, 64, generator=torch.Generator().manual_seed(seed)) * 0.05
    match kind:
        case "zero groups":
            w[::3, :32] = 0
        case "one sign":
            w = w.abs()
        case "tiny":
            w *= 1e-6
        case "ties":
            w = torch.round(w * 40) / 8
        case "outliers":
            w[:, 5] *= 50
    return w


KINDS = ["plain", "zero groups", "one sign", "tiny", "ties", "outliers"]


def moments_of(weight: Any, kind: str = "plain", tokens: int = 200) -> tuple[Moments, Any, Any]:
    """Moments of a weight's inputs, with the inputs and the outputs that are wanted."""
    n, k = weight.shape
    x = torch.randn(tokens, k, generator=torch.Generator().manual_seed(9))
    if kind == "correlated":
        x += 2 * x[:, :1]
    if kind == "outliers":
        x[:, 7] *= 40
    if kind == "dead":
        x[:, 10:20] = 0
    y = (x + 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(8))) @ weight.T
    inputs = Inputs(k, "cpu")
    found = Moments(inputs, torch.zeros(n, k))
    for part in (slice(0, 70), slice(70, tokens)):
        inputs.add(x[part])
        found.add_targets(x[part], y[part])
    return found, x, y


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"g{g.group_size}{'' if g.zero_point else '-sym'}")
def test_arithmetic_is_that_of_the_ir(kind: str, grid: settings.Grid) -> None:
    """Folded, clamped and quantised on torch: the very bits of numpy's in the IR."""
    w = weight_of(kind)
    rows = torch.rand(24, generator=torch.Generator().manual_seed(1)) + 0.3
    columns = torch.rand(64, generator=torch.Generator().manual_seed(2)) * 4 + 0.1
    folded = arithmetic.folded(w, rows, columns)
    of_numpy = w.numpy() / rows.numpy()[:, None] * columns.numpy()
    clamps = arithmetic.extremes(folded, grid) * 0.83
    op: Any = SimpleNamespace(group_size=grid.group_size, symmetric=not grid.zero_point)
    for clamp in (None, clamps):
        array = of_numpy
        if clamp is not None:
            low, high = (np.repeat(c.numpy(), grid.group_size, axis=1) for c in clamp)
            array = np.minimum(np.maximum(array, low), high)
        expected = QuantizeGroups.evaluate(op, array.astype(np.float16))
        found = arithmetic.quantized(folded, clamp, grid)
        for mine, theirs in zip(found, expected, strict=True):
            assert np.array_equal(mine.numpy(), theirs.astype(np.float32))
        assert np.array_equal(
            arithmetic.dequantized(found, grid).numpy(),
            dequantize(*expected, grid.group_size).astype(np.float32),
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"g{g.group_size}{'' if g.zero_point else '-sym'}")
def test_what_the_range_search_tries_is_what_the_table_gives(kind: str, grid: settings.Grid) -> None:
    w = arithmetic.folded(weight_of(kind))[:, : grid.group_size].contiguous()
    widest = arithmetic.extremes(w, grid)
    for a, b in ((1.0, 1.0), (0.9, 0.7), (0.6, 1.0)):
        b = b if grid.zero_point else a
        tried = torch.stack([arithmetic.to_f16(widest[0] * a), arithmetic.to_f16(widest[1] * b)])
        q, s, z = arithmetic.quantized(w, tried, grid)
        nothing = (torch.zeros_like(w), torch.eye(grid.group_size))
        best, chosen = ranges._best(w, nothing, tried[:, None, :, 0], grid)
        assert torch.equal(best, (q - z) * s) and torch.equal(chosen, tried[..., 0])


@pytest.mark.parametrize("kind", ["plain", "correlated", "outliers", "dead"])
def test_moments_give_the_error_of_the_outputs(kind: str) -> None:
    w = weight_of("plain")
    moments, x, y = moments_of(w, kind)
    other = w + 0.01 * weight_of("plain", 3)
    expected = float(((x @ other.T - y) ** 2).sum() / (y**2).sum())
    assert moments.error(other) == pytest.approx(expected, rel=1e-3)


def test_tokens_that_count_more_and_a_pull() -> None:
    """Moments with a weight for each token and a pull: the parabola's value, and where it is least."""
    w = weight_of("plain")
    _, x, y = moments_of(w)
    counts = torch.rand(len(x), generator=torch.Generator().manual_seed(4)) * 3
    inputs = Inputs(64, "cpu")
    moments = Moments(inputs, torch.zeros(24, 64))
    inputs.add(x, counts)
    moments.add_targets(x, y, counts)
    other = w + 0.01 * weight_of("plain", 3)
    off = ((x @ other.T - y) ** 2).sum(1)
    assert moments.error(other) == pytest.approx(
        float((counts * off).sum() / (counts * (y**2).sum(1)).sum()), rel=1e-3
    )
    moments.pull = weight_of("plain", 5) * 100
    assert torch.equal(moments.wanted, moments.targets - moments.pull)

    def parabola(weight: Any) -> float:
        return float((((weight @ inputs.second) - 2 * moments.wanted) * weight).sum(dtype=torch.float64))

    grid = settings.Grid(4, 32, True)
    for_loss = ranges.search_ranges(w, None, moments, grid, settings.Work(1, 6, 2))
    moments.pull, pull = None, moments.pull
    for_outputs = ranges.search_ranges(w, None, moments, grid, settings.Work(1, 6, 2))
    moments.pull = pull
    rounded = [
        arithmetic.dequantized(arithmetic.quantized(w, each, grid), grid) for each in (for_loss, for_outputs)
    ]
    assert parabola(rounded[0]) < parabola(rounded[1])
    moments.pull = None
    assert moments.error(rounded[0]) > moments.error(rounded[1])


@pytest.mark.parametrize("symmetric", [False, True])
def test_more_sweeps_try_values_between(symmetric: bool) -> None:
    """The grid is shifted within its step, its values stay in the widest range, and the error never rises."""
    grid = settings.Grid(4, 32, not symmetric)
    w = arithmetic.folded(weight_of("plain"))
    moments, _, _ = moments_of(w, "correlated")
    grids = [ranges._fractions(grid, 4, ranges._shift(sweep)) for sweep in range(5)]
    assert grids[0] == grids[1] and len({g[0] for g in grids}) == 4
    assert all(0 < low <= 1 and 0 < high <= 1 for g in grids for low, high in g)
    assert not symmetric or all(low == high for g in grids for low, high in g)
    errors = []
    for sweeps in (2, 3, 5):
        found = ranges.search_ranges(w, None, moments, grid, settings.Work(1, 4, sweeps))
        errors.append(moments.error(arithmetic.dequantized(arithmetic.quantized(w, found, grid), grid)))
    assert errors[0] * 1.001 > errors[1] and errors[1] * 1.001 > errors[2] and errors[2] < errors[0]


@pytest.mark.parametrize("kind", ["plain", "correlated", "outliers", "dead"])
@pytest.mark.parametrize("bits", [3, 4])
def test_ranges_then_gptq_lower_the_error(kind: str, bits: int) -> None:
    grid = settings.Grid(bits, 32, True)
    w = arithmetic.folded(weight_of("plain"))
    moments, _, _ = moments_of(w, kind)
    nearest = moments.error(arithmetic.dequantized(arithmetic.quantized(w, None, grid), grid))
    found = ranges.search_ranges(w, None, moments, grid, settings.Work(1, 6, 1))
    ranged = moments.error(arithmetic.dequantized(arithmetic.quantized(w, found, grid), grid))
    assert ranged < 0.95 * nearest
    widest = arithmetic.extremes(w, grid)
    assert bool((found[0] >= widest[0]).all()) and bool((found[1] <= widest[1]).all())
    rounded = gptq.gptq_rounded(w, None, widest, moments, grid, "a.linear")
    assert moments.error(arithmetic.dequantized(rounded, grid)) < 0.95 * nearest
    _, s, z = arithmetic.quantized(w, widest, grid)
    assert torch.equal(rounded[1], s) and torch.equal(rounded[2], z)
    assert float(rounded[0].min()) >= 0 and float(rounded[0].max()) <= grid.highest


@pytest.mark.parametrize("kind", ["plain", "correlated", "outliers", "dead"])
@pytest.mark.parametrize("scaled", [False, True])
def test_gptq_is_the_published_one_channel_by_channel(kind: str, scaled: bool) -> None:
    """Against the original's update with the inverse of the moments, loud channels first."""
    grid = settings.Grid(4, 32, True)
    columns = torch.linspace(0.5, 2, 64) if scaled else None
    w = arithmetic.folded(weight_of("plain"), None, columns)
    moments, _, _ = moments_of(weight_of("plain"), kind)
    widest = arithmetic.extremes(w, grid)
    q, s, z = gptq.gptq_rounded(w, columns, widest, moments, grid, "a.linear")
    by = torch.ones(64) if columns is None else columns
    second = (moments.inputs.second / by / by[:, None]).double()
    damping = 0.01 * second.diagonal().mean()
    second.diagonal()[second.diagonal() == 0] = 1
    second += damping * torch.eye(64)
    inverse = torch.linalg.inv(second)
    work = (moments.targets / by + damping * w).double() @ inverse
    loud = (moments.inputs.second.diagonal() / by**2).sort(stable=True).indices.flip(0)
    left = inverse.clone()
    for k in loud.tolist():
        scale, zero = s[:, k // 32].double(), z[:, k // 32].double()
        expected = (torch.round(work[:, k] / scale) + zero).clamp(0, 15)
        assert float((expected == q[:, k]).double().mean()) > 0.9  # but for ties within rounding
        off = (work[:, k] - (q[:, k].double() - zero) * scale) / left[k, k]
        work -= off[:, None] * left[k]
        left -= left[:, k : k + 1] * left[k] / left[k, k]


@pytest.mark.parametrize("kind", ["plain", "correlated", "outliers", "dead"])
@pytest.mark.parametrize(
    "grid", [settings.Grid(3, 32, True), settings.Grid(4, 32, True), settings.Grid(4, 16, False)]
)
def test_rounding_again_never_raises_the_error(kind: str, grid: settings.Grid) -> None:
    w = arithmetic.folded(weight_of("plain"))
    moments, _, _ = moments_of(w, kind)
    # the error that it descends on: with the damping that held the best weight near the one there is
    moments.inputs.second += 1e-3 * torch.eye(64) * moments.inputs.second.diagonal().mean()
    moments.targets += 1e-3 * w * moments.inputs.second.diagonal().mean()
    widest = arithmetic.extremes(w, grid)
    errors = [
        moments.error(
            arithmetic.dequantized(
                gptq.gptq_rounded(w, None, widest, moments, grid, "a.linear", rounds), grid
            )
        )
        for rounds in (0, 1, 2, 8)
    ]
    assert errors[1] < errors[0]
    assert all(b <= a * 1.002 + 1e-7 for a, b in pairwise(errors))


@pytest.mark.parametrize("count", [1, 255, 512, 1000, 5000])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_rows_are_divided_by_numbers_alone(count: int, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        parts = by_rows(count, 512, "cpu", lambda rows: (rows, torch.get_num_threads()))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert [i for rows, _ in parts for i in range(count)[rows]] == list(range(count))
    assert max(len(range(count)[rows]) for rows, _ in parts) <= 512
    assert len(parts) == max(-(-count // 512), min(2, count // 256), 1)
    assert len(parts) == 1 or {n for _, n in parts} == {1}


def test_little_work_is_done_by_one_thread() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for weights, tokens, threads in ((800_000, 512, 1), (800_000, 64 * 512, 3), (15_000_000, 2048, 3)):
            with pytest.raises(KeyboardInterrupt), threads_for(weights, tokens):
                assert torch.get_num_threads() == threads
                raise KeyboardInterrupt
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_the_end_of_a_text_judges_with_a_gap_before_it() -> None:
    searched, judging = apart(torch.arange(100)[:, None])
    assert searched[:, 0].tolist() == list(range(79)) and judging[:, 0].tolist() == list(range(80, 100))
    short = torch.arange(39)[:, None]
    assert torch.equal(apart(short)[0], short) and apart(short)[1].shape == (0, 1)


def _losses(windows: int, gain: float, seed: int, scatter: float = 0.02, alike: int = 1) -> tuple[Any, Any]:
    """Losses of windows that differ much from each other, and less by `gain` with a `scatter` of which runs
    of windows have theirs in common.
    """
    random = torch.Generator().manual_seed(seed)
    nearest = 3.7 + torch.randn(windows, generator=random, dtype=torch.float64)
    noise = torch.randn(-(-windows // alike), generator=random, dtype=torch.float64) * scatter
    return nearest, nearest - gain + noise.repeat_interleave(alike)[:windows]


def test_losses_are_compared_window_by_window() -> None:
    """What windows differ by among themselves is nothing to the error of the difference; what neighbours
    have in common is."""
    nearest, better = _losses(64, 0.01, 0)
    mean, error = difference(better, nearest)
    assert mean == pytest.approx(-0.01, abs=0.01) and 0.001 < error < 0.005
    assert difference(nearest, nearest) == (0, 0) and difference(better[:1], nearest[:1])[1] == 0
    errors = [
        [difference(*_losses(64, 0.01, seed, alike=alike)[::-1])[1] for seed in range(20)] for alike in (1, 4)
    ]
    assert np.mean(errors[1]) == pytest.approx(2 * np.mean(errors[0]), rel=0.15)


def test_the_bolder_candidate_has_to_be_better_by_more_than_chance() -> None:
    nearest, outputs = _losses(64, 0.01, 1, scatter=0)
    scatter = _losses(64, 0, 2)[1] - _losses(64, 0, 2)[0]
    scatter -= scatter.mean()
    for gain, taken in ((0.02, 1), (0.004, 0), (0.0, 0), (-0.02, 0)):
        assert chosen(nearest, [outputs, outputs - gain + scatter]) == taken, gain
    # no candidate that is worse than rounding to nearest, or the same; one that is worse is in nobody's way
    assert chosen(nearest, [nearest + 0.001, nearest + scatter - 0.004]) is None
    assert chosen(nearest, [nearest.clone(), nearest.clone()]) is None
    assert chosen(nearest, [nearest + 0.001, nearest + scatter - 0.02]) == 1
    assert chosen(nearest, [nearest + scatter - 0.0001, nearest + 1]) == 0


def test_chance_seldom_decides_for_the_bolder_candidate() -> None:
    taken = []
    for seed in range(200):
        outputs, loss = _losses(64, 0.0, seed)
        taken.append(chosen(outputs + 0.01, [outputs, loss]))
    assert set(taken) <= {0, 1} and taken.count(1) < 12


def test_an_error_in_the_rows_comes_out() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        by_rows(4000, 256, "cpu", lambda rows: 1 // (rows.start - rows.start))
    assert torch.get_num_threads() == before


def test_scales_divided_out_change_nothing_in_the_search() -> None:
    """Columns scaled by powers of two, inputs divided: the same ranges, scaled group by group alike."""
    grid = settings.Grid(4, 32, True)
    w = arithmetic.folded(weight_of("plain"))
    moments, _, _ = moments_of(w)
    columns = torch.full((64,), 4.0)
    plain = ranges.search_ranges(w, None, moments, grid, settings.Work(1, 4, 1))
    scaled = ranges.search_ranges(
        arithmetic.folded(w, None, columns), columns, moments, grid, settings.Work(1, 4, 1)
    )
    assert torch.equal(scaled, plain * 4)


def test_scales_are_for_loud_channels_and_identity_is_tried() -> None:
    grid = settings.Grid(4, 32, True)
    w = weight_of("plain")
    loud, _, _ = moments_of(w, "outliers")
    chosen = scales.search_scale([w, w * 2], loud.inputs, 64, 1, grid)
    assert chosen.scale is not None and chosen.error < 0.8 * chosen.identity
    assert int(chosen.scale.argmax()) == 7
    inputs = Inputs(64, "cpu")
    inputs.add(torch.eye(64))
    even = torch.ones(8, 64) * 0.3
    assert scales.search_scale([even], inputs, 64, 1, grid).scale is None


def test_scales_of_grouped_heads_are_one_for_each_channel_of_a_value_head() -> None:
    w = weight_of("plain")
    moments, _, _ = moments_of(w, "outliers")
    chosen = scales.search_scale([w], moments.inputs, 16, 2, settings.Grid(4, 32, True))
    assert chosen.scale is not None and chosen.scale.shape == (32,)
    assert int(chosen.scale.argmax()) == 7


def test_dead_zero_and_nan_inputs() -> None:
    w = torch.zeros(8, 32)
    grid = settings.Grid(4, 32, True)
    moments, _, _ = moments_of(w)
    for each in (
        arithmetic.quantized(w, None, grid),
        gptq.gptq_rounded(w, None, arithmetic.extremes(w, grid), moments, grid, "a"),
    ):
        assert not arithmetic.dequantized(each, grid).any()
    assert scales.search_scale([w], moments.inputs, 32, 1, grid).scale is None


# ---------------------------------------------------------------------------------------------------- texts


def test_texts_of_every_kind(tmp_path: Path) -> None:
    words = "The old house stood at the end of the road. " * 8
    (tmp_path / "a.txt").write_text(words)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": words}) + "\n\n" + json.dumps(words) + "\n")
    one = calibration.text_windows(MODEL, tmp_path / "a.txt", 16)
    assert one.shape[1] == 16 and len(one) >= 4
    assert len(calibration.text_windows(MODEL, tmp_path / "b.jsonl", 16)) >= 2 * len(one)
    assert torch.equal(calibration.text_windows(MODEL, tmp_path / "a.txt", 16, 150)[0], one[0])
    some = calibration.drawn(one, 2, 5)
    assert len(some) == 2 and torch.equal(some, calibration.drawn(one, 2, 5))
    assert torch.equal(calibration.drawn(one, 99, 5), one)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"short", "less than one window"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.jsonl", b"{", "is not JSON"),
        ("a.jsonl", b'{"x": 1}', "has no text"),
        ("a.jsonl", b'{"text": 3}', "has no text"),
    ],
)
def test_texts_that_are_none(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TyirError, match=message):
        calibration.text_windows(MODEL, tmp_path / name, 16)


def test_a_parquet_file_needs_pyarrow(tmp_path: Path) -> None:
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        (tmp_path / "a.parquet").write_bytes(b"PAR1")
        with pytest.raises(TyirError, match=r"needs pyarrow") as error:
            calibration.text_windows(MODEL, tmp_path / "a.parquet", 16)
        assert "tyir[quantize]" in error.value.render()
    else:
        import pyarrow as arrow
        import pyarrow.parquet as parquet

        words = "The old house stood at the end of the road. " * 8
        parquet.write_table(arrow.table({"text": [words, words]}), tmp_path / "a.parquet")
        assert len(calibration.text_windows(MODEL, tmp_path / "a.parquet", 16)) >= 8


# ------------------------------------------------------------------------------------------------- settings


def test_the_work_follows_from_shapes() -> None:
    tiny = settings.work_for(settings.QuantizeSettings(), 6, [(256, 256)] * 2 + [(768, 256)] * 3)
    half = [(896, 896)] * 2 + [(128, 896)] * 2 + [(4864, 896)] * 2 + [(896, 4864)]
    middle = settings.work_for(settings.QuantizeSettings(), 24, half)
    large = settings.work_for(settings.QuantizeSettings(), 28, [(3584, 3584)] * 2 + [(18944, 3584)] * 3)
    assert tiny.samples > middle.samples > large.samples >= 4
    assert tiny.points > middle.points >= large.points >= 4
    assert settings.work_for(settings.QuantizeSettings(samples=3), 24, half).samples == 3
    assert settings.work_for(settings.QuantizeSettings(quick=True), 1, [(8, 8)]) == settings.Work(
        4, 4, 1, 2, ratios=5
    )
    assert tiny.rounds > middle.rounds == large.rounds > 0
    # both objectives are tried of a small model whose numbers are not searched
    shapes = [(256, 256)] * 2 + [(768, 256)] * 3
    awq = settings.QuantizeSettings("awq")
    assert settings.work_for(awq, 6, shapes).both and not tiny.both
    assert not settings.work_for(awq, 24, half).both
    for other in ({"objective": "loss"}, {"quick": True}, {"sequential": False}):
        assert not settings.work_for(settings.QuantizeSettings("awq", **other), 6, shapes).both


@pytest.mark.parametrize(
    "bad",
    [
        {"method": "awk"},
        {"bits": 5},
        {"group_size": 0},
        {"samples": 0},
        {"window": 4},
        {"objective": "los"},
        {"objective": "loss"},  # numbers are not searched for it
        {"method": "awq", "objective": "loss", "sequential": False},
    ],
)
def test_settings_that_cannot_be(bad: dict[str, Any]) -> None:
    with pytest.raises(TyirError):
        settings.QuantizeSettings(**bad)


def test_autoawq_configurations() -> None:
    found = settings_of(
        {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM", "lm_head_enable": True}
    )
    assert (found.group_size, found.lm_head, found.zero_point) == (64, True, True)
    assert settings_of({}).group_size == 128
    assert settings_of({"modules_to_not_convert": None}).modules_to_not_convert == ()
    for bad in ({"version": "GEMV"}, {"q_groupsize": 128}, {"w_bit": 5}):
        with pytest.raises(TyirError):
            settings_of(bad)


def test_the_plot_of_a_report_can_be_read() -> None:
    from pathlib import Path

    from tests.pictures import illegible
    from tyir.tools.quantize import report
    from tyir.tools.quantize.layer_search import LinearReport
    from tyir.tools.quantize.quantize import Outcome
    from tyir.tools.quantize.settings import QuantizeSettings

    for layers in (1, 2, 80):
        reports = {i: [LinearReport(f"model.layers.{i}.q", 0.5, True, 1.0, 0.1, 0.05)] for i in range(layers)}
        plot = report._plot(Outcome(Path("out"), QuantizeSettings(), reports, None, None))
        assert illegible(plot) == [] and "rounded to nearest</text>" in plot


def test_a_small_model_is_trained_to_be_judged_by(tmp_path: Path) -> None:
    """Six steps leave less loss than one, and a checkpoint that a perplexity is measured on."""
    text = tmp_path / "text.txt"
    text.write_text("The old house stood at the end of the road, and nobody had lived in it for years. " * 90)
    found = []
    words = ["--text", str(text), "--tokenizer", str(MODEL), "--batch", "1"]
    for steps in ("1", "6"):
        out = str(tmp_path / steps)
        assert train_small.main(["qwen3", out, *words, "--steps", steps]) == 0
        found.append(perplexity_of(Path(out), Text(text), 64).value)
    assert found[1] < found[0]
    config = json.loads((tmp_path / "6" / "config.json").read_text())
    assert config["eos_token_id"] == json.loads((MODEL / "config.json").read_text())["eos_token_id"]
    assert train_small.main(["qwen3", str(tmp_path / "6"), *words]) == 1

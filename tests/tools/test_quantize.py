"""tyir-quantize on a small model: what it writes, that it goes on where it was stopped, what it refuses."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import transformers  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402

from tests.tools.small_qwen3 import save_small  # noqa: E402
from tyir.diagnostics import TyirError  # noqa: E402
from tyir.execution.awq_table import AwqTable  # noqa: E402
from tyir.frontends.dense_state import dense_state  # noqa: E402
from tyir.frontends.huggingface import import_model  # noqa: E402
from tyir.frontends.torch_export import build_plain_model  # noqa: E402
from tyir.pipeline import run_pipeline  # noqa: E402
from tyir.tools.quantize import layer_search, loss_terms, search  # noqa: E402
from tyir.tools.quantize import quantize as quantize_module  # noqa: E402
from tyir.tools.quantize.calibration import drawn, text_windows  # noqa: E402
from tyir.tools.quantize.perplexity import model_perplexity, window_losses  # noqa: E402
from tyir.tools.quantize.quantize import Text, perplexity_of, quantize  # noqa: E402
from tyir.tools.quantize.report import write_report  # noqa: E402
from tyir.tools.quantize.settings import QuantizeSettings  # noqa: E402
from tyir.tools.quantize.streamed_model import StreamedModel  # noqa: E402
from tyir.tools.tyir_quantize import main  # noqa: E402

TINY = Path(__file__).parents[1] / "models" / "tiny-qwen2"
TEXTS = Path(__file__).parents[3] / "shared" / "text"
SETTINGS = QuantizeSettings(method="awq", group_size=32, samples=2, window=16)
WORDS = "The old house stood at the end of the road, and nobody went there. " * 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers with grouped heads, biases, and norms of queries and keys as Qwen3 has them."""
    return save_small(tmp_path_factory.mktemp("models") / "small", layers=2, positions=128, seed=3)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(WORDS)
    return path


@pytest.fixture(scope="module")
def awq(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The outcome of `quantize`, with perplexities."""
    out = tmp_path_factory.mktemp("awq") / "out"
    return quantize(model, out, SETTINGS, calibration=text, evaluate=Text(text, 200))


def test_the_checkpoint_is_the_table_applied(awq: Any, model: Path) -> None:
    assert json.loads((awq.out / "config.json").read_text())["quantization_config"]["quant_method"] == "awq"
    table = AwqTable.open(awq.out / "awq.safetensors")
    assert len(table.ranges) == 14
    assert not awq.out.with_name("out.search").exists()
    before, after = dict(dense_state(model)), dict(dense_state(awq.out))
    name = "model.layers.1.mlp.down_proj"
    scale = table.scales.get("model.layers.1.mlp.up_proj", np.ones(96, np.float32))
    low, high = table.ranges[name]
    folded = (before[f"{name}.weight"] * scale).reshape(64, 3, 32)
    steps = (high - low)[..., None] / 15
    off = np.abs(
        after[f"{name}.weight"].reshape(64, 3, 32) - np.clip(folded, low[..., None], high[..., None])
    )
    assert (off <= 0.52 * steps + 1e-4).all()


def test_the_report(awq: Any) -> None:
    reports = [r for each in awq.reports.values() for r in each]
    assert {r.path for r in reports} == set(AwqTable.open(awq.out / "awq.safetensors").ranges)
    assert all(r.error_after < r.error_before and 0.5 < r.kept_range <= 1 for r in reports)
    assert awq.before.tokens == awq.after.tokens > 15
    assert awq.after.value == pytest.approx(awq.before.value, rel=0.2)


def test_the_plot(awq: Any, tmp_path: Path) -> None:
    """As PNG where matplotlib is installed, and in the page in any case."""
    problems = write_report(awq, tmp_path)
    assert "<svg" in (tmp_path / "report.html").read_text()
    if importlib.util.find_spec("matplotlib") is None:
        assert len(problems) == 1 and "tyir[plots]" in problems[0]
    else:
        assert problems == [] and (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")


def test_a_search_that_is_stopped_goes_on_with_the_same_bytes(
    awq: Any, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the second layer, and while the first layer's results are written; each time with a model
    that is opened anew.
    """
    module = import_model(model)
    run_pipeline(module, "to-ty")
    groups = search.scaled_channels(module, lambda path: False, "cpu")
    searched: list[int] = []
    real_search, real_write = search.search_layer, search._Store.write

    def searching(model: Any, index: int, *others: Any) -> Any:
        searched.append(index)
        if searched == [0, 0, 1]:
            raise KeyboardInterrupt
        return real_search(model, index, *others)

    def writing(store: Any, index: int, *others: Any) -> None:
        if searched == [0]:
            store._states(1).with_name("states_0001.safetensors.partial").write_bytes(b"half")
            raise KeyboardInterrupt
        real_write(store, index, *others)

    monkeypatch.setattr(search, "search_layer", searching)
    monkeypatch.setattr(search._Store, "write", writing)

    def once() -> search.Found:
        streamed = StreamedModel(model, SETTINGS.window)
        seen, _ = quantize_module._calibration(streamed, text, SETTINGS)
        return search.search(streamed, seen, groups, SETTINGS, tmp_path / "search")

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            once()
    found = once()
    assert searched == [0, 0, 1, 1]
    found.table.save(tmp_path / "awq.safetensors")
    assert (tmp_path / "awq.safetensors").read_bytes() == (awq.out / "awq.safetensors").read_bytes()


def test_what_the_loss_says_is_its_gradient_whenever_it_is_stopped(model: Path, tmp_path: Path) -> None:
    """The weights' gradients are those of the whole model at once; passes go on where they were stopped."""
    streamed = StreamedModel(model, 16)
    windows = torch.randint(4096, (3, 16), generator=torch.Generator().manual_seed(1))
    files = {}
    for after in (None, 1, 2, 3):  # of four: the states entering two layers, the gradients leaving them
        folder = tmp_path / str(after)
        folder.mkdir()
        left = [after]

        def write(path: Path, state: Any, left: list[int | None] = left) -> None:
            if left[0] == 0:
                left[0] = None
                raise KeyboardInterrupt
            search._write_state(path, state)
            left[0] = None if left[0] is None else left[0] - 1

        if after is not None:
            with contextlib.suppress(KeyboardInterrupt), torch.no_grad():
                loss_terms.write_gradients(streamed, windows, folder, write)
        with torch.no_grad():
            loss_terms.write_gradients(streamed, windows, folder, search._write_state)
        files[after] = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert all(each == files[None] for each in files.values())
    assert set(files[None]) == {"gradient_0000.safetensors", "gradient_0001.safetensors"}
    net = build_plain_model(model)
    with torch.no_grad():
        for name, array in dense_state(model):
            net.get_parameter(name).copy_(torch.tensor(array))
    net.tie_weights()
    logits = net(input_ids=windows, use_cache=False).logits[:, :-1]
    torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="sum"
    ).backward()
    hidden = streamed.embedded(windows)
    for index in range(2):
        gradient = loss_terms.read_state(loss_terms.gradient_file(tmp_path / "None", index), "cpu")
        tensors, linears = streamed.tensors(index), streamed.linears(index)
        terms = loss_terms.loss_terms(streamed, index, tensors, linears, hidden, gradient)
        for linear in linears:
            whole = net.get_parameter(f"model.layers.{index}.{linear.path}.weight").grad
            term = terms[linear.path]
            assert term.weights.shape == (3, 16) and float(term.weights.mean()) == pytest.approx(1, rel=1e-4)
            scale = whole.norm() / term.gradient.norm()
            assert torch.allclose(
                term.gradient * scale, whole, rtol=1e-3, atol=float(whole.abs().max()) * 1e-3
            )
        streamed.advance(index, tensors, hidden)


@pytest.fixture(scope="module")
def for_loss(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The outcome of `quantize` with the loss as the objective, with perplexities."""
    out = tmp_path_factory.mktemp("loss") / "out"
    settings = replace(SETTINGS, objective="loss")
    return quantize(model, out, settings, calibration=text, evaluate=Text(text, 200))


def test_ranges_for_the_loss(awq: Any, for_loss: Any) -> None:
    """On the very text that they were chosen on, the loss is less than with ranges for outputs."""
    assert for_loss.after.value < 0.98 * awq.after.value
    assert (for_loss.out / "model.safetensors").is_file()


def test_the_end_of_the_text_decides(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both objectives are searched on the text but its end, and that is taken which is best on the end."""
    monkeypatch.setattr(quantize_module, "_TOKENS", 32)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(str(n) for n in range(500)))
    streamed = StreamedModel(model, SETTINGS.window)
    windows = text_windows(model, text, SETTINGS.window)
    seen, judging = quantize_module._calibration(streamed, text, SETTINGS)
    assert torch.equal(judging, drawn(windows[-(len(windows) // 5) :], 64, 0)) and len(judging) >= 8
    assert torch.equal(seen, drawn(windows[: -(len(windows) // 5) - 1], 2, SETTINGS.seed))
    # nothing to choose, or too little to choose by: all of the text is searched
    for settings in (replace(SETTINGS, objective="loss"), replace(SETTINGS, samples=1)):
        seen, judging = quantize_module._calibration(streamed, text, settings)
        assert torch.equal(seen, drawn(windows, settings.samples or 0, 0)) and not len(judging)

    parts = windows[:2], windows[-8:]
    real, found = quantize_module.search, {}
    asked: list[str] = []

    def search_once(streamed: Any, seen: Any, groups: Any, settings: Any, *rest: Any) -> Any:
        assert torch.equal(seen, parts[0])
        asked.append(settings.objective)
        if settings.objective not in found:
            found[settings.objective] = real(streamed, seen, groups, settings, *rest)
        return found[settings.objective]

    monkeypatch.setattr(quantize_module, "search", search_once)
    judged: list[Any] = []
    best = ""

    def losses(streamed: Any, judging: Any, change: Any, progress: bool) -> Any:
        assert torch.equal(judging, parts[1])
        of = ("rtn", "outputs", "loss")[len(judged) % 3]
        judged.append(window_losses(streamed, judging, change, progress))
        return torch.linspace(1, 2, len(judging)) - (0.5 if of == best else 0)

    monkeypatch.setattr(quantize_module, "window_losses", losses)
    for best in ("rtn", "outputs", "loss"):
        said: list[str] = []
        taken, settings = quantize_module._searched(
            streamed, parts, [], SETTINGS, tmp_path / "search", said.append, False
        )
        if best == "rtn":
            assert settings.method == "rtn" and not taken.table.ranges and "to nearest is kept" in said[0]
        else:
            assert (settings.method, settings.objective) == ("awq", best) and not said
            assert taken is found[best]
    assert len({tuple(each.tolist()) for each in judged}) == 3  # of each its own weights
    assert asked == ["outputs", "loss"] * 3


def test_the_perplexity_of_a_small_model_takes_one_thread(model: Path) -> None:
    """A second one would only be waited for."""
    threads: list[int] = []

    def change(index: int, tensors: Any) -> Any:
        threads.append(torch.get_num_threads())
        return tensors

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        windows = torch.arange(48).reshape(3, 16)
        streamed = StreamedModel(model, 16)
        losses = window_losses(streamed, windows, change)
        assert torch.get_num_threads() == 3 and threads == [1, 1]
        assert model_perplexity(streamed, windows).value == pytest.approx(float((losses.sum() / 45).exp()))
    finally:
        torch.set_num_threads(before)


def test_another_question_starts_anew(model: Path, tmp_path: Path) -> None:
    first = search._Store(tmp_path / "s", "a")
    (tmp_path / "s" / "layer_0000.safetensors").write_bytes(b"x")
    assert first.done() == 1 and search._Store(tmp_path / "s", "a").done() == 1
    assert search._Store(tmp_path / "s", "b").done() == 0


def test_awq_and_gptq_with_kept_modules_and_own_text(model: Path, tmp_path: Path) -> None:
    """The model's own generations, GPTQ's numbers in the checkpoint, a linear that stays as it is."""
    settings = QuantizeSettings(
        method="awq+gptq",
        group_size=32,
        samples=2,
        window=16,
        modules_to_not_convert=("mlp.down_proj", "model.layers.0.self_attn"),
    )
    outcome = quantize(model, tmp_path / "out", settings)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert "model.layers.1.self_attn.q_proj.qweight" in stored
    kept = "model.layers.1.mlp.down_proj.weight"
    assert np.array_equal(
        stored[kept].astype(np.float32)
        * AwqTable.open(tmp_path / "out" / "awq.safetensors").scales.get("none", np.float32(1)),
        dict(dense_state(model))[kept],
    )
    assert not any("layers.0.self_attn" in r.path for r in outcome.reports[0])
    assert all(r.error_after < r.error_before for each in outcome.reports.values() for r in each)


def test_three_bits_give_a_table(model: Path, text: Path, tmp_path: Path) -> None:
    settings = QuantizeSettings(bits=3, group_size=32, samples=2, window=16)
    outcome = quantize(model, tmp_path / "out", settings, calibration=text, evaluate=Text(text, 200))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["awq.safetensors"]
    assert outcome.after is not None and outcome.before is not None
    assert outcome.after.value != outcome.before.value
    with pytest.raises(TyirError, match="4 bits"):
        quantize(model, tmp_path / "out", settings, calibration=text, format="awq")


@pytest.mark.parametrize(
    ("tensor", "where"),
    [
        ("model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp"),
        ("model.layers.0.input_layernorm.weight", "model.layers.0.self_attn"),
        ("model.layers.1.self_attn.o_proj.weight", "model.layers.1"),
    ],
)
def test_nan_stops_with_the_name(model: Path, text: Path, tmp_path: Path, tensor: str, where: str) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    tensors = dict(load_file(broken / "model.safetensors"))
    tensors[tensor] = tensors[tensor].copy()
    tensors[tensor].reshape(-1)[3] = np.nan
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(TyirError, match=where):
        quantize(broken, tmp_path / "out", SETTINGS, calibration=text)


def test_the_command(model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = [str(model), "-o", str(out), "--group-size", "32", "--method", "rtn", "--window", "16"]
    assert main([*arguments, "--evaluate", str(text), "--characters", "200", "--report", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert "perplexity " in said.out and str(out) in said.out
    assert {"report.json", "report.html"} <= {p.name for p in tmp_path.iterdir()}
    assert main([str(out), "--evaluate", str(text), "--characters", "200", "--window", "16"]) == 0
    measured = float(capsys.readouterr().out.split()[1])
    assert measured == pytest.approx(
        json.loads((tmp_path / "report.json").read_text())["after"]["perplexity"], abs=1e-3
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing is to be done"),
        (["-o", "X", "--group-size", "100"], "does not divide"),
        (["-o", "X", "--method", "awk"], "no method 'awk'"),
        (["-o", "X", "--device", "cuda:77"], "cannot be used"),
        (["-o", "X", "--window", "4096"], "has 128 positions"),
        (["--evaluate", "missing.txt"], "cannot read missing.txt"),
    ],
)
def test_refusals(
    model: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(tmp_path / "out") if a == "X" else a for a in arguments]
    assert (
        main([str(model), *given, "--window", "16"] if "--window" not in given else [str(model), *given]) == 1
    )
    assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- slow ones


def _texts() -> None:
    if not (TEXTS / "test.txt").is_file():
        pytest.skip("the texts beside the project are not here")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], tuple[float, float]]:
    """(before, after) of a method at a number of bits, on the first 120,000 characters of the test text."""
    _texts()

    def measure(method: str, bits: int) -> tuple[float, float]:
        out = tmp_path_factory.mktemp("table") / "out"
        outcome = quantize(
            TINY,
            out,
            QuantizeSettings(method=method, bits=bits),
            calibration=TEXTS / "valid.txt",
            evaluate=Text(TEXTS / "test.txt", 120_000),
        )
        assert outcome.before is not None and outcome.after is not None
        return outcome.before.value, outcome.after.value

    return measure


@pytest.mark.slow
@pytest.mark.parametrize("method", ["awq", QuantizeSettings.method])
@pytest.mark.parametrize("bits", [4, 3])
def test_half_of_the_loss_is_removed(
    measured: Callable[[str, int], tuple[float, float]], method: str, bits: int
) -> None:
    plain, nearest = measured("rtn", bits)
    assert measured(method, bits)[1] < nearest - 0.5 * (nearest - plain)


@pytest.mark.slow
def test_artifacts_have_the_perplexity_of_their_checkpoint(tmp_path: Path) -> None:
    from tyir.manifest import BuildOptions
    from tyir.tools.api import compile_path

    (tmp_path / "text.txt").write_text(WORDS)
    folder = compile_path(TINY, tmp_path / "out", BuildOptions(seqlens=(1, 8), max_kv=128))
    of_artifacts = perplexity_of(folder, Text(tmp_path / "text.txt"), 64)
    of_model = perplexity_of(TINY, Text(tmp_path / "text.txt"), 64)
    assert of_artifacts.tokens == of_model.tokens
    assert of_artifacts.value == pytest.approx(of_model.value, rel=2e-3)


def test_stages_follow_the_execution(model: Path) -> None:
    from tyir.tools.quantize.settings import Work

    streamed = StreamedModel(model, 16)
    hidden = streamed.embedded(torch.arange(16)[None])
    at_work = layer_search._LayerSearch(
        streamed, 0, (hidden, hidden.clone()), [], SETTINGS, Work(1, 4, 1), lambda path: False
    )
    assert [{m.path for m in stage} for stage in at_work._stages()] == [
        {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"},
        {"self_attn.o_proj"},
        {"mlp.gate_proj", "mlp.up_proj"},
        {"mlp.down_proj"},
    ]


# ------------------------------------------------------------------------------------------ killed, and depth

RESUMED = """
import sys, torch
torch.set_num_threads(2)
from tyir.tools.tyir_quantize import main
raise SystemExit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_killed_at_ten_random_moments(model: Path, text: Path, tmp_path: Path) -> None:
    """Each time a process that gets no chance to clean up, until one comes to its end."""

    def command(out: Path) -> list[str]:
        given = [str(model), "-o", str(out), "--group-size", "32", "--samples", "8", "--window", "64"]
        return [sys.executable, "-c", RESUMED, *given, "--calibration", str(text), "-q"]

    begin = time.monotonic()
    subprocess.run(command(tmp_path / "whole"), check=True)
    whole = time.monotonic() - begin
    moments, kills = random.Random(7), 0
    while kills < 10:
        process = subprocess.Popen(command(tmp_path / "killed"))
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(moments.uniform(0.3, 1.0) * whole)
        process.kill()
        if process.wait() == 0:
            break  # it goes on where the one before was struck, and so comes to its end early
        kills += 1
    else:
        subprocess.run(command(tmp_path / "killed"), check=True)
    assert kills
    names = sorted(p.name for p in (tmp_path / "whole").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "killed").iterdir())
    assert "awq.safetensors" in names and "model.safetensors" in names
    for name in names:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.slow
def test_memory_does_not_grow_with_the_depth(text: Path, tmp_path: Path) -> None:
    """Layers of 80 MiB in f32: two more of them would show."""
    peaks = {}
    for layers in (2, 4):
        config = transformers.LlamaConfig(
            vocab_size=4096,
            hidden_size=1024,
            intermediate_size=5120,
            num_hidden_layers=layers,
            num_attention_heads=16,
            num_key_value_heads=8,
            max_position_embeddings=128,
        )
        folder = tmp_path / str(layers)
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).to(torch.float16).save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(TINY / name, folder / name)
        code = RESUMED.replace("raise SystemExit(main(sys.argv[1:]))", "assert main(sys.argv[1:]) == 0") + (
            "from tyir.process.stopwatch import peak_mib; print(peak_mib())"
        )
        given = [str(folder), "-o", str(tmp_path / f"out{layers}"), "--quick", "--window", "64"]
        done = subprocess.run(
            [sys.executable, "-c", code, *given, "--calibration", str(text), "-q"],
            check=True,
            capture_output=True,
            text=True,
        )
        peaks[layers] = float(done.stdout.split()[-1])
    print(peaks)
    assert peaks[4] - peaks[2] < 60

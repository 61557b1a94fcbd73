"""`tyir-sim` with the file of a processor, on compiled artifacts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.conftest import Artifacts
from tests.made_processor import measured_like
from tyir.execution.artifacts import Artifacts as Opened
from tyir.runtime_sim.host.steps import HostPredictor
from tyir.tools.tyir_sim import main


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "made.toml"
    path.write_text(measured_like().as_toml())
    return path


def test_artifacts_are_predicted(
    file: Path, artifacts: Artifacts, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(artifacts(1, "int4")), "--machine", str(file), "--threads", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for name in ("decode_step", "prefill_step"):
        assert sum(p["ms"] for p in found[name]["parts"]) == pytest.approx(found[name]["ms"])
    assert found["tpot_ms"] == found["decode_step"]["ms"] > 0
    assert (
        main([str(artifacts(1, "int4")), "--machine", str(file), "--pos", "5", "--prompt-tokens", "9"]) == 0
    )
    assert "TPOT at position 5 (ms)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sweep", "norm.call_ns=1,2"], "--sweep would simulate command programs"),
        (["--tornado"], "--tornado would simulate command programs"),
        (["--threads", "9"], "was measured with 1 to 4 threads, 9 are asked about"),
        (["--set", "norm.calls_ns=1"], "has no constant 'norm.calls_ns'"),
        (["--pos", "1000000"], "--pos 1000000 is not in 0.."),
        (["--prompt-tokens", "0"], "--prompt-tokens 0 is not in 1.."),
        (["--machine", "edge10"], "it is not compared with other machines"),
    ],
)
def test_what_cannot_be_asked_is_refused(
    arguments: list[str], said: str, file: Path, artifacts: Artifacts, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(artifacts(1, "int4")), "--machine", str(file), *arguments]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("dies", [1, 4])
@pytest.mark.parametrize("weights", ["int4", "checkpoint"])
def test_every_kernel_of_the_model_has_a_time(dies: int, weights: str, artifacts: Artifacts) -> None:
    made = measured_like()
    predictor = HostPredictor(Opened.open(artifacts(dies, weights)), made, 1)
    kinds = {part.kind for tokens in (1, 8) for part in predictor.step(tokens, 3).parts}
    assert {"norm", "rope", "elementwise", "activation", "movement", "attention_f16_token"} <= kinds
    assert ("meeting" in kinds) == (dies > 1)
    both = predictor.prompt_ms(9)
    assert both == predictor.step(8, 0, wanted=False).ms + predictor.step(1, 8).ms
    assert predictor.prompt_ms(17) > both

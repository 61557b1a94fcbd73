"""`python -m tyir.tools.gpu.predict`: a step by its kernels, measured rows beside predictions, errors that
say what to do.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tyir.tools.gpu.predict import main

DATA = Path(__file__).resolve().parents[1] / "data" / "h200"
CONFIG = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
}


def run(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert main(arguments) == code
    out, err = capsys.readouterr()
    return err if code else out


def test_kernels_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(
        run(
            capsys,
            "--model",
            "llama3-8b",
            "--devices",
            "2",
            "--batch",
            "8",
            "--measured-us",
            "3952",
            "--json",
        )
    )
    assert found["step_us"] == pytest.approx(
        32 * sum(found["layer_us"].values()) + sum(found["end_us"].values())
    )
    assert (
        found["error_percent"] == pytest.approx(100 * (found["step_us"] / 3952 - 1))
        and abs(found["error_percent"]) < 5
    )


def test_a_config_is_a_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The same sizes from a Hugging Face config.json give the same text, phase by phase."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG))
    for phase in (["--past", "4095"], ["--phase", "prefill", "--tokens", "512"]):
        assert run(capsys, "--model", str(config), *phase) == run(capsys, "--model", "llama3-8b", *phase)


@pytest.mark.parametrize("machine", ["h200", "h100", "a100", "orin"])
def test_any_machine(machine: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "tokens/s" in run(capsys, "--machine", machine, "--model", "qwen2-1.5b")


def test_measured_rows(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "--rows", str(DATA / "models.jsonl"))
    assert len(text.splitlines()) == 1 + 30 + 2 and "decode: 18 steps" in text and "prefill: 12 steps" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no model is named"),
        (["--model", "lama3-8b"], "did you mean 'llama3-8b'?"),
        (["--model", "llama3-8b", "--phase", "prefill"], "needs --tokens"),
        (
            ["--model", "llama3-8b", "--devices", "3"],
            "14336 intermediate cannot be split over 3 devices: 2 devices",
        ),
        (["--model", "llama3-8b", "--batch", "0", "--past", "-1"], "past = -1: must be at least 0"),
        (["--model", "absent.json"], "cannot read absent.json"),
        (["--rows", str(DATA / "collectives.jsonl")], "no rows of kind 'model'"),
    ],
)
def test_errors(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in run(capsys, *arguments, code=1)


def test_a_config_says_what_it_lacks(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"hidden_size": 4096}))
    text = run(capsys, "--model", str(config), code=1)
    assert all(f"no '{key}'" in text for key in CONFIG if key not in ("hidden_size", "num_key_value_heads"))
    config.write_text(json.dumps(CONFIG | {"num_local_experts": 8}))
    assert "mixtures of experts" in run(capsys, "--model", str(config), code=1)

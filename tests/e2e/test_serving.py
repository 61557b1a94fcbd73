"""`tyir-bench-serving` end to end on the embedded model: simulated and measured, one sequence and a batch;
every figure recomputed from the requests' times.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tyir.tools.tyir_bench_serving import main

Artifacts = Callable[[int, str], Path]
TRACE = [(0.0, 9, 4), (0.001, 17, 1), (0.002, 3, 6), (0.5, 20, 3)]  # arrival, prompt, output


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "requests.jsonl"
    path.write_text(
        "".join(
            json.dumps({"arrival": a, "prompt_tokens": p, "output_tokens": o}) + "\n" for a, p, o in TRACE
        )
    )
    return path


def bench(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[dict[str, Any], dict[str, float]]:
    """The JSON and the printed block, by its labels."""
    result = tmp_path / "result.json"
    assert main([str(folder), "--result", str(result), *arguments]) == 0
    printed = re.findall(r"^([A-Z].*?):\s+([\d.]+)$", capsys.readouterr().out, re.MULTILINE)
    return json.loads(result.read_text()), {label: float(value) for label, value in printed}


def percentile(values: list[float], share: float) -> float:
    """numpy's default: linear between the neighbours."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * share
    low = int(place)
    return ordered[low] + (ordered[min(low + 1, len(ordered) - 1)] - ordered[low]) * (place - low)


def check(found: dict[str, Any], block: dict[str, float]) -> None:
    """vLLM's definitions, from each request's arrival, TTFT and gaps alone."""
    rows = found["requests"]
    latency = [r["ttft"] + sum(r["itl"]) for r in rows]
    samples = {
        "TTFT": [r["ttft"] for r in rows],
        "TPOT": [(e - r["ttft"]) / (r["output"] - 1) for r, e in zip(rows, latency) if r["output"] > 1],
        "ITL": [gap for r in rows for gap in r["itl"]],
        "E2EL": latency,
    }
    assert all(len(r["itl"]) == r["output"] - 1 for r in rows)
    for name, seconds in samples.items():
        for word, figure in (
            ("Mean", statistics.fmean(seconds)),
            ("Median", statistics.median(seconds)),
            ("P99", percentile(seconds, 0.99)),
        ):
            assert found[f"{word.lower()}_{name.lower()}_ms"] == pytest.approx(figure * 1000)
            assert block[f"{word} {name} (ms)"] == pytest.approx(figure * 1000, abs=0.0051)
    assert found["std_itl_ms"] == pytest.approx(statistics.pstdev(samples["ITL"]) * 1000)
    sent = [r["sent"] for r in rows]
    duration = max(s + e for s, e in zip(sent, latency)) - min(sent)
    tokens = sum(r["output"] for r in rows)
    assert found["duration"] == pytest.approx(duration)
    assert found["request_throughput"] == pytest.approx(len(rows) / duration)
    assert found["output_throughput"] == pytest.approx(tokens / duration)
    assert found["total_token_throughput"] == pytest.approx(
        (tokens + sum(r["prompt"] for r in rows)) / duration
    )
    assert (block["Successful requests"], block["Total generated tokens"]) == (len(rows), tokens)
    assert block["Total input tokens"] == sum(r["prompt"] for r in rows)


@pytest.mark.parametrize("engine", ["sim", "host", "edge10"])
def test_a_trace(
    artifacts: Artifacts, trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], engine: str
) -> None:
    found, block = bench(
        artifacts(2, "int4"),
        tmp_path,
        capsys,
        "--trace",
        str(trace),
        "--engine",
        engine,
        "--goodput",
        "ttft:10000000",
    )
    check(found, block)
    assert [(r["arrival"], r["prompt"], r["output"]) for r in found["requests"]] == TRACE
    assert found["request_goodput"] == pytest.approx(found["request_throughput"])
    assert ("simulated" in found["note"]) == (engine == "sim")


def test_poisson_arrivals_and_a_limit(
    artifacts: Artifacts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--num-prompts", "6", "--request-rate", "200", "--input-len", "12", "--output-len", "5")
    found, block = bench(artifacts(2, "int4"), tmp_path, capsys, *arguments)
    check(found, block)
    limited, block = bench(artifacts(2, "int4"), tmp_path, capsys, *arguments, "--max-concurrency", "1")
    check(limited, block)
    assert limited["max_concurrent_requests"] == 1 < found["max_concurrent_requests"]
    assert limited["mean_ttft_ms"] < found["mean_ttft_ms"] and limited["duration"] == pytest.approx(
        found["duration"]
    )


@pytest.mark.parametrize("engine", ["sim", "host"])
def test_a_batch_serves_several_at_once(
    four: Path, trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], engine: str
) -> None:
    found, block = bench(four, tmp_path, capsys, "--trace", str(trace), "--engine", engine)
    check(found, block)
    assert found["max_concurrent_requests"] >= 2 and len(found["requests"]) == 4


def test_what_is_refused(artifacts: Artifacts, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(artifacts(2, "int4"))
    for arguments, message in (
        (
            ["--num-prompts", "0", "--request-rate", "-1"],
            "--num-prompts 0, --request-rate -1 must be positive",
        ),
        (["--seed", "-1"], "--seed -1 must be 0 or more"),
        (["--sweep", "seed=0,-1"], "--seed -1 must be 0 or more"),
        (["--input-len", "128", "--output-len", "64"], "do not fit the cache of 128 tokens"),
        (["--goodput", "speed:3"], "is none of ttft:MS, tpot:MS, e2el:MS"),
        (["--trace", str(tmp_path / "none.jsonl")], "cannot read"),
        (["--machine", "edge11"], "known machines"),
    ):
        assert main([folder, *arguments]) == 1
        assert message in capsys.readouterr().err
    assert main([str(tmp_path)]) == 1
    assert "holds no manifest.json" in capsys.readouterr().err

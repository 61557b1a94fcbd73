"""Clients as they are published, unchanged and in environments of their own, against a real server.

pytest tests/clients --slow; `environments.py` installs them, what is not installed is skipped by name.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")

from tests.clients.environments import python_of
from tests.e2e.serving import Served, serving
from tyir.runtime_sim.session.session import Session

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
SENTENCES = (
    "The old house stood at the end of the road.",
    "She looked at him in the morning and said nothing.",
    "It was a cold day, and the river was high.",
)
CHOICES = ([" and the road", " qqq zz"], [" to her", " 7 7 7"], [" and wet", " the the"])


@pytest.fixture
def served(folder: Path) -> Iterator[Served]:
    """A server, which must have answered everything without an error of its own in the end."""
    with serving(folder) as made:
        yield made
        assert made.ask("GET", "/health")[0] == 200
        assert not made.counts().get("vllm:request_success_total error")


def run(name: str, *arguments: str, cwd: Path | None = None, module: bool = False) -> str:
    """What a program of an environment prints; it must end well."""
    environment = {
        k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "PYTHONPATH", "VIRTUAL_ENV")
    }
    python = python_of(name)
    environment |= {"OPENAI_API_KEY": "none", "PATH": f"{python.parent}:{environment['PATH']}"}
    environment |= {"HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [str(python), *(["-m"] if module else []), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=1500)
    assert done.returncode == 0, (done.stdout[-3000:], done.stderr[-3000:])
    return done.stdout


def test_langchain(served: Served) -> None:
    found = json.loads(run("langchain", str(HERE / "langchain_client.py"), served.url).splitlines()[-1])
    assert found["whole"] and "".join(found["parts"]) == found["whole"] and len(found["parts"]) > 4
    assert found["usage"]["output_tokens"] == 8
    assert found["plain"] == found["streamed"] and found["batch"] == [found["whole"]] * 6
    assert found["placed"]["corner"] in ("left", "right") and isinstance(found["placed"]["far"], bool)


def test_dify(served: Served) -> None:
    """All pieces and the usage arrive, on a network without anything else."""
    found = json.loads(run("dify", str(HERE / "dify_client.py"), served.url).splitlines()[-1])
    assert "".join(found["parts"]) == found["whole"] and len([p for p in found["parts"] if p]) > 4
    assert found["completion_tokens"] == 8


def log_likelihood(session: Session, ids: list[int], start: int) -> float:
    """Of the tokens from `start` on, natural logarithm."""
    session.reset()
    rows = session.feed(ids).astype(np.float64)
    rows -= rows.max(axis=1, keepdims=True)
    rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
    return float(sum(rows[i - 1, ids[i]] for i in range(start, len(ids))))


MULTIPLE_CHOICE = """
task: tyir_mc
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}}}}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
metadata: {{version: 1}}
"""
ROLLING = """
task: tyir_roll
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}}}}}
validation_split: validation
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}]
metadata: {{version: 1}}
"""


def evaluated(url: str, folder: Path, out: Path) -> dict[tuple[str, int, int], float]:
    """What lm_eval reads of a server: log-likelihoods by task, document and choice."""
    lines = [{"text": t[:-1], "choices": c, "label": 0} for t, c in zip(SENTENCES, CHOICES)]
    out.mkdir()
    data = out / "data.json"
    data.write_text("\n".join(map(json.dumps, lines)))
    for name, text in (("mc", MULTIPLE_CHOICE), ("roll", ROLLING)):
        (out / f"{name}.yaml").write_text(text.format(data=data))
    given = f"base_url={url}/v1/completions,model=tiny,tokenizer={folder},max_length=511,num_concurrent=4"
    run(
        "lm-eval", "lm_eval", "run", "--model", "local-completions", "--model_args", given,
        "--tasks", "tyir_mc,tyir_roll", "--include_path", str(out), "--output_path", str(out / "found"),
        "--log_samples", "--batch_size", "1", module=True,
    )  # fmt: skip
    found = {}
    for file in (out / "found").rglob("samples_*.jsonl"):
        task = "mc" if "tyir_mc" in file.name else "roll"
        for sample in map(json.loads, file.read_text().splitlines()):
            for number, reply in enumerate(sample["resps"]):
                found[task, sample["doc_id"], number] = float(np.ravel(reply[0])[0])
    return found


def test_lm_eval(served: Served, folder: Path, tmp_path: Path) -> None:
    """Every log-likelihood it reads is the compiled programs' own, within 1e-3."""
    found = evaluated(served.url, folder, tmp_path / "own")
    session, tokenizer = Session(folder), served.engine.tokenizer
    assert len(found) == 9
    for (task, document, number), value in found.items():
        text = SENTENCES[document][:-1]
        if task == "mc":
            choice = json.loads((tmp_path / "own" / "data.json").read_text().splitlines()[document])[
                "choices"
            ][number]
            ids, start = tokenizer(text + choice)["input_ids"], len(tokenizer(text)["input_ids"])
        else:
            prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
            ids, start = [prefix, *tokenizer(text, add_special_tokens=False)["input_ids"]], 1
        assert value == pytest.approx(log_likelihood(session, ids, start), abs=1e-3), (task, text, number)


def test_schemathesis(served: Served, tmp_path: Path) -> None:
    """Requests made from the OpenAPI schema, right ones and wrong ones: never an error of the server."""
    run(
        "schemathesis", "schemathesis.cli", "run", f"{served.url}/openapi.json",
        "--checks", "not_a_server_error", "--max-examples", "25", "--request-timeout", "120",
        "--seed", "1", "--no-color", module=True, cwd=tmp_path,
    )  # fmt: skip


def exact(served: Served, before: dict[str, float], requests: int, tokens: int) -> None:
    """At least so many answers, each of `tokens`, and none that failed."""
    after = served.counts()
    more = lambda name: after.get(name, 0) - before.get(name, 0)  # noqa: E731
    answers = more("vllm:request_success_total length")
    assert answers >= requests, after
    assert more("vllm:request_success_total abort") == 0
    assert more("vllm:generation_tokens_total") >= requests * tokens


def test_evalscope(served: Served, folder: Path, tmp_path: Path) -> None:
    before = served.counts()
    run(
        "evalscope", "evalscope.cli.cli", "perf", "--url", f"{served.url}/v1/completions", "--api", "openai",
        "--model", "tiny", "--tokenizer-path", str(folder), "--dataset", "random", "--number", "8",
        "--parallel", "4", "--min-prompt-length", "24", "--max-prompt-length", "24", "--prefix-length", "0",
        "--max-tokens", "8", "--min-tokens", "8", "--no-apply-chat-template", "--stream",
        "--extra-args", '{"ignore_eos": true}', "--outputs-dir", str(tmp_path), module=True, cwd=tmp_path,
    )  # fmt: skip
    exact(served, before, 8, 8)
    (summary,) = tmp_path.rglob("benchmark_summary.json")
    figures: dict[str, Any] = json.loads(summary.read_text())
    assert figures["Failed Requests"] == 0 and figures["Success Requests"] == 8
    assert figures["Avg Output Tokens"] == 8


@pytest.mark.parametrize("kind", ["completions", "chat"])
def test_aiperf(served: Served, folder: Path, tmp_path: Path, kind: str) -> None:
    """It reads /metrics too, and finds there what it has seen."""
    before = served.counts()
    run(
        "aiperf", str(python_of("aiperf").parent / "aiperf"), "profile", "--model", "tiny",
        "--url", served.url, "--endpoint-type", kind, "--streaming", "--tokenizer", str(folder),
        "--request-count", "8", "--concurrency", "4", "--isl", "24", "--osl", "8",
        "--extra-inputs", "ignore_eos:true", "--use-server-token-count", "--random-seed", "1",
        "--ui", "none", "--no-gpu-telemetry", "--output-artifact-dir", str(tmp_path), cwd=tmp_path,
    )  # fmt: skip
    exact(served, before, 8, 8)
    figures: dict[str, Any] = json.loads((tmp_path / "profile_export_aiperf.json").read_text())
    assert figures["request_count"]["avg"] == 8 and figures["error_summary"] == []
    lines = (tmp_path / "profile_export.jsonl").read_text().splitlines()
    assert [json.loads(line)["metrics"]["output_sequence_length"]["value"] for line in lines] == [8] * 8
    read = json.loads((tmp_path / "server_metrics_export.json").read_text())
    assert read["summary"]["endpoints_successful"] == [f"{served.url}/metrics"]
    assert read["metrics"]["vllm:generation_tokens"]["series"][0]["stats"]["total"] == 64


def test_guidellm(served: Served, folder: Path, tmp_path: Path) -> None:
    before = served.counts()
    found = tmp_path / "found.json"
    run(
        "guidellm", str(python_of("guidellm").parent / "guidellm"), "run", "--disable-console",
        "--backend", f"kind=openai_http,target={served.url},model=tiny",
        "--tokenizer", f"kind=huggingface_auto,model={folder}",
        "--profile", "kind=concurrent,streams=4", "--constraint", "kind=max_requests,count=8",
        "--data", "kind=synthetic_text,prompt_tokens=24,output_tokens=8",
        "--output", f"kind=json,path={found}", cwd=tmp_path,
    )  # fmt: skip
    exact(served, before, 8, 8)
    (benchmark,) = json.loads(found.read_text())["benchmarks"]
    requests = benchmark["requests"]
    assert not requests["errored"] and not requests["incomplete"]
    assert [r["output_tokens"] for r in requests["successful"]] == [8] * 8

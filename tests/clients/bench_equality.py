"""TTFT, TPOT and ITL of the same load by those who report them: vLLM's client, the server's own histograms,
and `tyir-bench-serving`, which runs the same scheduler without HTTP.

    python -m tests.clients.bench_equality OUT/1die --rounds 5

Needs the environment `vllm` (`environments.py`).  A round asks the server through vLLM's client, then runs
`tyir-bench-serving`, so that what else the computer does meets both; figures are medians of rounds.  Times
are wall time: none of them is asserted, but the numbers of requests and tokens are.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from tests.clients.environments import folder
from tests.e2e.serving import counts_of

NAMES: Final = {
    "ttft": "vllm:time_to_first_token_seconds",
    "tpot": "vllm:request_time_per_output_token_seconds",
    "itl": "vllm:inter_token_latency_seconds",
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Serving figures by who reports them.")
    parser.add_argument("artifacts", type=Path, metavar="OUT/{n}die")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=8, help="of a round (default 8)")
    parser.add_argument("--concurrency", type=int, default=4, help="at once (default 4)")
    parser.add_argument("--input", type=int, default=384, help="tokens of a prompt (default 384)")
    parser.add_argument("--output", type=int, default=64, help="tokens of an answer (default 64)")
    args = parser.parse_args()
    rows: dict[str, list[dict[str, float]]] = {"server": [], "vllm": [], "bench": []}
    with served(args.artifacts) as place, tempfile.TemporaryDirectory() as out:
        for number in range(args.rounds):
            before = counts(place)
            rows["vllm"].append(by_vllm(place, args, number, Path(out)))
            rows["server"].append(by_server(before, counts(place), args))
            rows["bench"].append(by_bench(args))
            print(json.dumps({who: found[-1] for who, found in rows.items()}), flush=True)
    for name in NAMES:
        middle = {who: statistics.median(row[name] for row in found) for who, found in rows.items()}
        off = {
            who: statistics.median(row[name] / own[name] for row, own in zip(found, rows["server"])) - 1
            for who, found in rows.items()
        }
        print(
            f"mean {name.upper()} of {args.requests} requests of {args.input} + {args.output} tokens,"
            f" {args.concurrency} at once, median of {args.rounds}: the server {middle['server']:.1f} ms,"
            f" vLLM's client {middle['vllm']:.1f} ({off['vllm']:+.1%}), tyir-bench-serving"
            f" {middle['bench']:.1f} ({off['bench']:+.1%})"
        )


@contextmanager
def served(artifacts: Path) -> Iterator[str]:
    """Where `tyir-serve` serves, in a process of its own."""
    command = [sys.executable, "-m", "tyir.tools.tyir_serve", str(artifacts), "--port", "0", "-q"]
    command += ["--served-model-name", "tiny"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        place = process.stdout.readline().split()[-1].removeprefix("http://")
        try:
            while asked(place, "/health")[0] != 200:
                assert process.poll() is None, "the server has ended"
            yield place
        finally:
            process.terminate()


def asked(place: str, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(place, timeout=60)
    connection.request("GET", path)
    reply = connection.getresponse()
    text = reply.read().decode()
    connection.close()
    return reply.status, text


def counts(place: str) -> dict[str, float]:
    return counts_of(asked(place, "/metrics")[1])


def by_vllm(place: str, args: argparse.Namespace, seed: int, out: Path) -> dict[str, float]:
    """`vllm bench serve`; prompts of another `seed` share no begin, which would not be computed again."""
    program = folder() / "vllm" / "bin" / "vllm"
    line = [
        str(program), "bench", "serve", "--backend", "openai", "--base-url", f"http://{place}",
        "--endpoint", "/v1/completions", "--model", "tiny", "--tokenizer", str(args.artifacts),
        "--dataset-name", "random", "--random-input-len", str(args.input), "--random-output-len",
        str(args.output), "--num-prompts", str(args.requests), "--max-concurrency", str(args.concurrency),
        "--ignore-eos", "--seed", str(seed), "--num-warmups", "0", "--ready-check-timeout-sec", "0",
        "--save-result", "--result-dir", str(out), "--result-filename", "found.json",
    ]  # fmt: skip
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    kept |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "PATH": f"{program.parent}:{kept['PATH']}"}
    subprocess.run(line, check=True, env=kept, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    found: dict[str, Any] = json.loads((out / "found.json").read_text())
    assert found["completed"] == args.requests, found
    assert found["total_output_tokens"] == args.requests * args.output, found
    return {name: found[f"mean_{name}_ms"] for name in NAMES}


def by_server(
    before: dict[str, float], after: dict[str, float], args: argparse.Namespace
) -> dict[str, float]:
    """Means of what its histograms have got in between."""
    more = {name: value - before.get(name, 0) for name, value in after.items()}
    assert more[f"{NAMES['tpot']}_count"] == more[f"{NAMES['ttft']}_count"] == args.requests
    assert more[f"{NAMES['itl']}_count"] == args.requests * (args.output - 1)
    return {name: more[f"{h}_sum"] / more[f"{h}_count"] * 1000 for name, h in NAMES.items()}


def by_bench(args: argparse.Namespace) -> dict[str, float]:
    """`tyir-bench-serving --engine host`."""
    line = [
        sys.executable, "-m", "tyir.tools.tyir_bench_serving", str(args.artifacts), "--engine", "host",
        "--num-prompts", str(args.requests), "--input-len", str(args.input), "--output-len",
        str(args.output), "--max-concurrency", str(args.concurrency), "--json",
    ]  # fmt: skip
    found = json.loads(subprocess.run(line, check=True, capture_output=True, text=True).stdout)
    return {name: found[f"mean_{name}_ms"] for name in NAMES}


if __name__ == "__main__":
    main()

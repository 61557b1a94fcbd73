"""A compile and a sweep over a Ray cluster: the same bytes and figures, also when workers are killed."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tyir.backends.pieces import tool_identity
from tyir.backends.workers import Workers, check_tools
from tyir.diagnostics import TyirError
from tyir.manifest import BuildOptions
from tyir.runtime_sim.timing.summary import SweepRow, sweep
from tyir.tools import tyir_bench_serving, tyir_sim
from tyir.tools.api import compile_path
from tyir.tools.sim.requests import Asked, served, with_value
from tyir.tools.sim.sources import Choice, open_source
from tyir.tools.sim.sweeps import served_each, swept

MODEL = Path(__file__).parents[1] / "models" / "tiny-qwen2"


def hashes(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_another_tyir_is_refused() -> None:
    check_tools(tool_identity())
    with pytest.raises(TyirError, match="a worker has another tyir"):
        check_tools("0" * 64)


class Here:
    """Workers that are this process: what is sent and comes back, without a cluster."""

    count = 2

    def __init__(self) -> None:
        self.made: list[str] = []

    def run(self, make: Callable[..., Any], *arguments: Any) -> Any:
        import pickle

        self.made.append(make.__name__)
        return pickle.loads(pickle.dumps(make(*pickle.loads(pickle.dumps(arguments)))))


TWO = BuildOptions(dies=2, seqlens=(1,), max_kv=64, weights="int4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two dies, compiled by this process."""
    return compile_path(MODEL, tmp_path_factory.mktemp("alone"), TWO, jobs=1)


def test_what_workers_make_are_the_bytes_that_one_process_makes(folder: Path, tmp_path: Path) -> None:
    workers = Here()
    spread = compile_path(MODEL, tmp_path / "spread", TWO, workers=workers)
    assert hashes(folder) == hashes(spread)
    assert {"stored_blocks", "built_library"} == set(workers.made)


VALUES = [34.1, 8, 17, 68.3, 30]
RATES = [3.0, 0.5, float("inf")]


def constants_swept(workers: Workers, folder: Path) -> list[SweepRow]:
    return swept(workers, [folder], Choice(None, {}), "dram.bandwidth_gbps", VALUES, 8, 40)


def settings_of(folder: Path) -> list[Asked]:
    asked = Asked(folder, "sim", None, None, 3, 1.0, 8, 4, 0, None, {})
    return [with_value(asked, "request-rate", str(rate)) for rate in RATES]


def test_a_sweep_by_workers_has_the_figures_of_one_process_in_its_order(folder: Path) -> None:
    workers = Here()
    alone = sweep(open_source([folder], Choice(None, {})).predictor, "dram.bandwidth_gbps", VALUES, 8, 40)
    assert constants_swept(workers, folder) == alone
    assert [row.value for row in alone] == VALUES and len({row.tpot_device_ms for row in alone}) == 5
    assert served_each(workers, settings_of(folder)) == [served(one) for one in settings_of(folder)]
    assert workers.made == ["_swept"] * 5 + ["_served"] * 3


def test_a_sweep_of_requests_is_a_table_and_data(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = tmp_path / "sweep.json"
    few = ("--input-len", "8", "--output-len", "4", "--num-prompts", "3")
    rates = ("--sweep", "request-rate=3,0.5,inf")
    assert tyir_bench_serving.main([str(folder), *few, *rates, "--result", str(result)]) == 0
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in printed[:4]] == ["request-rate", "3", "0.5", "inf"]
    found = json.loads(result.read_text())
    assert found["sweep"] == "request-rate" and [row["value"] for row in found["rows"]] == RATES
    for row, line, one in zip(found["rows"], printed[1:], settings_of(folder)):
        assert (
            row == {"value": one.request_rate, **served(one)}
            and line[1] == f"{row['request_throughput']:.2f}"
        )
    for wrong, says in (
        (["--sweep", "request-rat=1"], "did you mean 'request-rate'?"),
        (["--sweep", "input-len=8,0"], "--input-len 0 must be positive"),
        (["--sweep", "input-len=8,x"], "'x' is not a whole number"),
        (["--sweep", "input-len=8,9", "--trace", "t.jsonl"], "--trace gives them"),
        (["--ray", "auto"], "add --sweep"),
        ([*rates, "--engine", "host", "--ray", "auto"], "measures this computer"),
    ):
        assert tyir_bench_serving.main([str(folder), *few, *wrong]) == 1
        assert says in capsys.readouterr().err


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Three nodes of one processor each, all on this machine."""
    pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        for _ in range(2):
            made.add_node(num_cpus=1)
        made.wait_for_nodes()
        yield made.address
    finally:
        import ray

        ray.shutdown()
        made.shutdown()


def workers_of_ray() -> list[int]:
    """The processes that make pieces now."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            name = (entry / "cmdline").read_bytes() if entry.name.isdecimal() else b""
            if name.startswith(
                (b"ray::stored_blocks", b"ray::built_library", b"ray::_swept", b"ray::_served")
            ):
                found.append(int(entry.name))
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_cluster_compiles_the_same_bytes_and_a_killed_worker_costs_its_piece(
    cluster: str, tmp_path: Path
) -> None:
    from tyir.tools.cluster.ray_workers import RayWorkers

    options = BuildOptions(dies=4, seqlens=(1, 8), max_kv=256, weights="int4")
    wanted = hashes(compile_path(MODEL, tmp_path / "alone", options, jobs=1))
    workers = RayWorkers(cluster)
    assert workers.count == 3
    assert hashes(compile_path(MODEL, tmp_path / "spread", options, workers=workers)) == wanted
    with killing(2) as killed:
        made = compile_path(MODEL, tmp_path / "killed", options, workers=workers)
    assert killed and hashes(made) == wanted


@contextmanager
def killing(count: int) -> Iterator[list[int]]:
    """Inside, so many workers are killed while they make something; their numbers."""
    killed: list[int] = []
    done = threading.Event()

    def kill() -> None:
        while not done.is_set() and len(killed) < count:
            for pid in workers_of_ray()[:1]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
            time.sleep(0.3)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        yield killed
    finally:
        done.set()
        killer.join()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_killed_worker_costs_a_sweep_its_piece(cluster: str, folder: Path) -> None:
    from tyir.tools.cluster.ray_workers import RayWorkers

    workers = RayWorkers(cluster)
    alone = sweep(open_source([folder], Choice(None, {})).predictor, "dram.bandwidth_gbps", VALUES, 8, 40)
    with killing(2) as killed:
        assert constants_swept(workers, folder) == alone
    assert killed
    assert served_each(workers, settings_of(folder)) == [served(one) for one in settings_of(folder)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_commands_print_the_same_over_a_cluster(
    cluster: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--input-len", "8", "--output-len", "4", "--num-prompts", "3", "--sweep", "request-rate=3,inf"]
    for main, words in (
        (tyir_sim.main, ["--sweep", "dram.bandwidth_gbps=17,30"]),
        (tyir_bench_serving.main, few),
    ):
        printed = []
        for spread in ([], ["--ray", cluster]):
            assert main([str(folder), *words, *spread]) == 0
            printed.append(capsys.readouterr().out)
        assert printed[0] == printed[1]


@pytest.mark.slow
def test_no_cluster() -> None:
    ray = pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    from tyir.tools.cluster.ray_workers import RayWorkers

    ray.shutdown()
    with pytest.raises(TyirError, match=r"there is no Ray cluster at '127\.0\.0\.1:1'"):
        RayWorkers("127.0.0.1:1")

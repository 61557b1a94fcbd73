"""A compile over a Ray cluster: the same bytes, also when workers are killed."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tyir.backends.pieces import tool_identity
from tyir.backends.workers import check_tools
from tyir.diagnostics import TyirError
from tyir.manifest import BuildOptions
from tyir.tools.api import compile_path

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


def test_what_workers_make_are_the_bytes_that_one_process_makes(tmp_path: Path) -> None:
    options = BuildOptions(dies=2, seqlens=(1,), max_kv=64, weights="int4")
    workers = Here()
    alone = compile_path(MODEL, tmp_path / "alone", options, jobs=1)
    spread = compile_path(MODEL, tmp_path / "spread", options, workers=workers)
    assert hashes(alone) == hashes(spread)
    assert {"stored_blocks", "built_library"} == set(workers.made)


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
            if entry.name.isdecimal() and (entry / "cmdline").read_bytes().startswith(
                (b"ray::stored_blocks", b"ray::built_library")
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
    killed: list[int] = []
    done = threading.Event()

    def kill() -> None:
        while not done.is_set() and len(killed) < 2:
            for pid in workers_of_ray()[:1]:
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
            time.sleep(0.3)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        made = compile_path(MODEL, tmp_path / "killed", options, workers=workers)
    finally:
        done.set()
        killer.join()
    assert killed and hashes(made) == wanted


@pytest.mark.slow
def test_no_cluster() -> None:
    ray = pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    from tyir.tools.cluster.ray_workers import RayWorkers

    ray.shutdown()
    with pytest.raises(TyirError, match=r"there is no Ray cluster at '127\.0\.0\.1:1'"):
        RayWorkers("127.0.0.1:1")

"""The cores that a process may use: of its control groups the smallest share counts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tyir.process.cores import on_cores, usable_cores

ALL = len(os.sched_getaffinity(0))


def groups(folder: Path, **quotas: str) -> tuple[Path, Path]:
    """A system of groups `a/b` whose `cpu.max` are given by depth: `own`, `outer`, `root`."""
    places = {"root": folder / "groups", "outer": folder / "groups/a", "own": folder / "groups/a/b"}
    places["own"].mkdir(parents=True)
    for name, quota in quotas.items():
        (places[name] / "cpu.max").write_text(quota + "\n")
    (folder / "cgroup").write_text("0::/a/b\n")
    return folder / "groups", folder / "cgroup"


@pytest.mark.parametrize(
    ("quotas", "expected"),
    [
        ({}, ALL),
        ({"own": "max 100000"}, ALL),
        ({"own": "50000 100000"}, 1),
        ({"own": "max 100000", "outer": "100000 100000"}, 1),
        ({"root": "90000 100000"}, 1),
        ({"own": f"{(ALL - 1) * 100000 + 1} 100000"}, ALL),  # a part of a core is one to use
        ({"own": "nonsense", "outer": "1 0"}, ALL),
    ],
)
def test_the_smallest_share_counts(quotas: dict[str, str], expected: int, tmp_path: Path) -> None:
    assert usable_cores(*groups(tmp_path, **quotas)) == expected


def test_a_system_without_groups_has_the_affinity(tmp_path: Path) -> None:
    assert usable_cores(tmp_path, tmp_path / "none") == ALL


def test_a_thread_runs_on_the_cores_it_is_given() -> None:
    before = os.sched_getaffinity(0)
    with on_cores([min(before)]):
        assert os.sched_getaffinity(0) == {min(before)}
    for cores in (None, [1 << 20], []):  # none, one that is not there
        with on_cores(cores):
            assert os.sched_getaffinity(0) == before
    assert os.sched_getaffinity(0) == before

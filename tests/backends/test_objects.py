"""Object files of kernels are made once: in a process, and over processes with a cache."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tyir.backends.host import objects, tvm_host
from tyir.backends.host.objects import made_once
from tyir.backends.host.tvm_host import HostTarget, assign_kernels, build_library
from tyir.dialects import func, ty
from tyir.process.cache import Cache
from tyir.types import TensorType, f16


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that remembers nothing yet."""
    monkeypatch.setattr(objects, "_known", OrderedDict())
    monkeypatch.setattr(objects, "_making", dict[str, Future[bytes]]())


def test_threads_wait_for_the_one_that_makes_it() -> None:
    begun, go_on, made = threading.Event(), threading.Event(), []

    def make() -> bytes:
        begun.set()
        assert go_on.wait(60)
        made.append(1)
        return b"object"

    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(made_once, "k", make)
        assert begun.wait(60)
        others = [pool.submit(made_once, "k", make) for _ in range(2)]
        go_on.set()
        assert [f.result() for f in (first, *others)] == [b"object"] * 3
    assert made == [1] and made_once("k", lambda: b"other") == b"object"


def test_a_failure_reaches_all_and_is_not_remembered() -> None:
    def fail() -> bytes:
        raise ValueError("no such kernel")

    for _ in range(2):
        with pytest.raises(ValueError, match="no such kernel"):
            made_once("k", fail)
    assert made_once("k", lambda: b"object") == b"object"


def test_what_was_not_used_for_longest_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "_REMEMBERED", 20)
    for key in ("a", "b", "a", "c"):  # b goes
        made_once(key, lambda: b"12345678")
    assert [made_once(k, lambda: b"new") for k in ("a", "c", "b")] == [b"12345678", b"12345678", b"new"]


def test_a_damaged_object_of_the_cache_is_made_again(tmp_path: Path) -> None:
    cache = Cache.open(tmp_path / "cache")
    made_once("0" * 64, lambda: b"object", cache)
    objects._known.clear()
    assert made_once("0" * 64, lambda: b"other", cache) == b"object"
    objects._known.clear()
    (piece,) = (p for p in (tmp_path / "cache" / "pieces").rglob("*") if p.is_file())
    piece.chmod(0o600)
    piece.write_bytes(b"0bject")
    assert made_once("0" * 64, lambda: b"other", cache) == b"other"


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The kernels that were compiled."""
    names: list[str] = []
    compile_functions = tvm_host._kernel_functions

    def noted(name: str, *rest: object) -> object:
        names.append(name.partition("_")[0])
        return compile_functions(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(tvm_host, "_kernel_functions", noted)
    yield names


def two_ops(width: int) -> func.Func:
    """y = silu(x + x) over [1, 4, 8], and silu of a row of `width`."""
    function = func.Func.make("main", (TensorType((1, 4, 8), f16), TensorType((1, width), f16)))
    x, row = function.args
    for op in (add := ty.Add(x, x), ty.Silu(add.results[0]), ty.Silu(row)):
        function.body.append(op)
    return function


def test_a_change_builds_the_kernels_of_other_shapes_alone(tmp_path: Path, compiled: list[str]) -> None:
    cache, target = Cache.open(tmp_path / "cache"), HostTarget.generic()

    def library(name: str, width: int, target: HostTarget = target) -> bytes:
        build_library(assign_kernels([two_ops(width)]), target, tmp_path / name, cache=cache)
        return (tmp_path / name).read_bytes()

    first = library("first.so", 16)
    assert sorted(compiled) == ["add", "silu", "silu"]
    objects._known.clear()  # as another process
    compiled.clear()
    library("other.so", 24)
    assert compiled == ["silu"]
    assert library("again.so", 16) == first and compiled == ["silu"]
    library("one_core.so", 16, HostTarget.generic(1))
    assert sorted(compiled) == ["add", "silu", "silu", "silu"]

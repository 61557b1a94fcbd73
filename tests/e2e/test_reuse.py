"""What has been compiled is not compiled again: the cache, and what a killed compile has left."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from tests.backends.test_replacing import end_of, left, start
from tyir.attributes import IntegerAttr
from tyir.backends.edge10 import compile, programs
from tyir.backends.edge10.compile import CompileContext, to_program
from tyir.backends.edge10.plan_memory import dies_of
from tyir.backends.edge10.weight_windows import WindowReader
from tyir.backends.host import tvm_host
from tyir.backends.pieces import Journal
from tyir.diagnostics import TyirError
from tyir.dialects.ty import Param
from tyir.frontends import huggingface
from tyir.frontends.huggingface import import_model
from tyir.manifest import BuildOptions
from tyir.pipeline import run_pipeline
from tyir.printer import print_op
from tyir.process.cache import Cache
from tyir.tools import tyir_import
from tyir.tools.api import compile_path, load_module
from tyir.types import i64

MODEL = Path(__file__).resolve().parents[1] / "models" / "tiny-qwen2"
OPTIONS: dict[str, Any] = {"dies": 1, "seqlens": (1,), "max_kv": 32}


@pytest.fixture(autouse=True)
def a_settled_checkpoint() -> Iterator[None]:
    """Files that have changed a moment ago have no identity; these are copied for the test and stay."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tyir.backends.pieces._RECENT", -1e9)
        yield


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The small model, older than what is told from a file that is being written."""
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    return folder


def bytes_of(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


class Counts:
    """How often each kind of piece was made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: dict[str, int] = {}
        for name, place, function in (
            ("libraries", tvm_host, "build_library"),
            ("programs", programs, "lower_die"),
            ("blocks", WindowReader, "stored"),
        ):
            monkeypatch.setattr(place, function, self._counted(name, getattr(place, function)))

    def _counted(self, name: str, function: Any) -> Any:
        def counted(*args: Any, **options: Any) -> Any:
            self.made[name] = self.made.get(name, 0) + 1
            return function(*args, **options)

        return counted

    def since(self) -> dict[str, int]:
        made, self.made = self.made, {}
        return made


def test_only_what_depends_on_a_change_is_made_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts, cache = Counts(monkeypatch), Cache.open(tmp_path / "cache")
    plain = bytes_of(compile_path(model, tmp_path / "plain", OPTIONS))
    all_of_it = counts.since()
    assert bytes_of(compile_path(model, tmp_path / "out", OPTIONS, cache=cache, jobs=2)) == plain
    assert counts.since() == all_of_it

    said: list[str] = []
    assert bytes_of(compile_path(model, tmp_path / "again", OPTIONS, cache=cache, warn=said.append)) == plain
    assert counts.since() == {} and not said

    other = {**OPTIONS, "max_kv": 48}
    compile_path(model, tmp_path / "other", other, cache=cache)
    made = counts.since()
    assert made["programs"] == made["libraries"] == 1 and made["blocks"] == 2  # the rotary tables
    os.utime(model / "model.safetensors")  # another time: perhaps other weights
    assert bytes_of(compile_path(model, tmp_path / "touched", OPTIONS, cache=cache)) == plain
    assert counts.since() == {"blocks": all_of_it["blocks"] - 2}  # programs do not depend on them

    params = tmp_path / "out" / "1die" / "batch_1" / "common_die0.params"
    params.chmod(0o644)
    with params.open("r+b") as file:  # an artifact that is a link to the cache's piece
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    assert bytes_of(compile_path(model, tmp_path / "mended", OPTIONS, cache=cache)) == plain
    assert counts.since()["blocks"] > 0


def test_dies_of_one_kind_are_lowered_once(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = Counts(monkeypatch)
    compile_path(model, tmp_path / "out", {"dies": 2, "seqlens": (1, 8), "max_kv": 32})
    assert counts.since()["programs"] == 2


def imports(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The positions of every import that is made from now on."""
    found: list[int] = []

    def counted(*args: Any, **options: Any) -> Any:
        found.append(options["positions"])
        return import_model(*args, **options)

    monkeypatch.setattr(huggingface, "import_model", counted)
    return found


@pytest.mark.parametrize("kind", ["default", "dynamic"])
def test_a_model_is_imported_once(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """For every length of the cache, unless the rotary frequencies follow it."""
    config = json.loads((model / "config.json").read_text())
    if kind != "default":
        config["rope_scaling"] = {"rope_type": kind, "factor": 2.0}
        (model / "config.json").write_text(json.dumps(config))
    made, cache = imports(monkeypatch), Cache.open(tmp_path / "cache")
    fresh = print_op(load_module(model, positions=512))
    said: list[str] = []
    for positions in (512, 512, 1024):
        found = print_op(load_module(model, positions=positions, cache=cache, warn=said.append))
        assert positions != 512 or found == fresh
    assert made == ([512, 512] if kind == "default" else [512, 512, 1024])
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert print_op(load_module(model, positions=512, cache=cache)) != fresh


def test_the_import_command_uses_the_cache(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, cache = imports(monkeypatch), ["--cache-dir", str(tmp_path / "cache")]
    runs = ([*cache], [*cache], ["--no-cache"], [*cache, "--check-weights"], [*cache, "--dtype", "f32"])
    for number, options in enumerate(runs):
        assert not tyir_import.main([str(model), "-o", str(tmp_path / f"{number}.ir"), *options])
    assert len(made) == 4
    texts = [(tmp_path / f"{number}.ir").read_text() for number in range(len(runs))]
    assert texts[0] == texts[1] == texts[2] != texts[4]


def test_what_an_import_has_warned_of_is_said_again(model: Path, tmp_path: Path) -> None:
    tensors = safetensors.numpy.load_file(model / "model.safetensors")
    tensors["v_head.weight"] = np.zeros((2, 2), np.float16)
    safetensors.numpy.save_file(tensors, model / "model.safetensors")
    cache = Cache.open(tmp_path / "cache")
    said: list[list[str]] = [[], []]
    for messages in said:
        load_module(model, cache=cache, warn=messages.append)
    assert said[0] == said[1] and "v_head.weight" in said[0][0]


def test_an_edited_plan_is_another_program(model: Path, tmp_path: Path) -> None:
    """Where parameters lie is written on them, and nowhere in the program that names them."""
    module = load_module(model)
    to_program(module, BuildOptions(**OPTIONS), CompileContext())
    run_pipeline(module, "plan-memory")
    cache, file = Cache.open(tmp_path / "cache"), tmp_path / "plan.ir"
    file.write_text(print_op(module))
    compile_path(file, tmp_path / "plan", {}, cache=cache)
    (die,) = dies_of(module)
    last = [op for op in die.body if isinstance(op, Param)][-1]
    (address,) = (a.value for a in [last.attributes["tyir.address"]] if isinstance(a, IntegerAttr))
    last.set_attribute("tyir.address", IntegerAttr(address + (1 << 30), i64))
    file.write_text(print_op(module))
    cached = bytes_of(compile_path(file, tmp_path / "cached", {}, cache=cache))
    assert cached == bytes_of(compile_path(file, tmp_path / "fresh", {}))


def compile_in_process(model: Path, out: Path, **options: Any) -> int:
    def work() -> None:
        compile_path(model, out, OPTIONS, **options)

    return start(work)


@pytest.fixture
def strike(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Lets a process end itself with a signal when so many blocks of weights are written."""
    add = Journal.add

    def set_up(count: int, number: int) -> None:
        def struck(self: Journal, *args: Any) -> None:
            nonlocal count
            add(self, *args)
            count -= 1
            if not count:
                os.kill(os.getpid(), number)
                time.sleep(3)

        monkeypatch.setattr(Journal, "add", struck)

    yield set_up


@pytest.mark.parametrize(("number", "count"), [(signal.SIGKILL, 40), (signal.SIGINT, 9)])
def test_a_compile_goes_on_where_one_was_struck(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strike: Any, number: int, count: int
) -> None:
    with monkeypatch.context():
        strike(count, number)
        code = end_of(compile_in_process(model, tmp_path / "out", jobs=1))  # which block is the last is known
    monkeypatch.undo()
    assert code == (-9 if number == signal.SIGKILL else 130)
    assert left(tmp_path / "out") and not (tmp_path / "out" / "1die").exists()
    counts = Counts(monkeypatch)
    found = bytes_of(compile_path(model, tmp_path / "out", OPTIONS))
    resumed = counts.since()["blocks"]
    assert not left(tmp_path / "out")
    assert found == bytes_of(compile_path(model, tmp_path / "whole", OPTIONS))
    assert resumed == counts.since()["blocks"] - count


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True])
def test_killed_at_twenty_moments(model: Path, tmp_path: Path, cached: bool) -> None:
    whole = bytes_of(compile_path(model, tmp_path / "whole", OPTIONS))
    chosen = random.Random(int(cached))
    options = {"cache": Cache.open(tmp_path / "cache")} if cached else {}
    begin = time.monotonic()
    assert end_of(compile_in_process(model, tmp_path / "timed")) == 0
    seconds = time.monotonic() - begin
    for turn in range(20):
        number = compile_in_process(model, tmp_path / "out", jobs=1 + turn % 2, **options)
        time.sleep(chosen.random() * seconds)
        os.kill(number, signal.SIGKILL)
        end_of(number)
        if turn % 4 == 3:  # otherwise several are killed one after the other
            assert bytes_of(compile_path(model, tmp_path / "out", OPTIONS, **options)) == whole
            assert not left(tmp_path / "out")
            shutil.rmtree(tmp_path / "out")


@pytest.mark.slow
def test_two_at_once_into_one_cache_and_one_folder(model: Path, tmp_path: Path) -> None:
    whole = bytes_of(compile_path(model, tmp_path / "whole", OPTIONS))
    cache = Cache.open(tmp_path / "cache")
    for outs in (("one", "two"), ("same", "same")):
        numbers = [compile_in_process(model, tmp_path / out, cache=cache) for out in outs]
        assert [end_of(number) for number in numbers] == [0, 0]
        for out in outs:
            assert bytes_of(tmp_path / out / "1die") == whole and not left(tmp_path / out)


@pytest.mark.parametrize("above", ["file", "/proc", "forbidden"])
@pytest.mark.parametrize("stage", ["checkpoint", "module"])
def test_where_nothing_can_be_written_no_work_is_done(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, above: str, stage: str
) -> None:
    if above == "forbidden" and not os.getuid():
        pytest.skip("root may write everywhere")
    (tmp_path / "file").write_text("")
    (tmp_path / "forbidden").mkdir(mode=0o500)
    if stage == "module":
        (tmp_path / "model.ir").write_text(print_op(load_module(model)))
        model = tmp_path / "model.ir"
    before = sorted(tmp_path.iterdir())
    work: list[str] = []
    monkeypatch.setattr(huggingface, "import_model", lambda *args, **options: work.append("import"))
    monkeypatch.setattr(compile, "to_program", lambda *args: work.append("passes"))
    with pytest.raises(TyirError, match=rf"cannot write to .*{above}/some/out: "):
        compile_path(model, tmp_path / above / "some" / "out", OPTIONS)
    assert not work and sorted(tmp_path.iterdir()) == before


def test_a_full_disk_is_refused_before_weights_are_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = Counts(monkeypatch)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(TyirError, match=r"the artifacts need 0\.1 GB, .* has 0\.0 GB free"):
        compile_path(model, tmp_path / "out", OPTIONS, jobs=2)
    assert "blocks" not in counts.since() and not left(tmp_path / "out")

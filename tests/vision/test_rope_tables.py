"""compute_rope_param: the program that fills a request's rotary tables gives the plain routine's rows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tyir.artifacts.schema import sha256_of
from tyir.artifacts.vision import Rope
from tyir.backends.edge10.params import ParamsFile, write_params
from tyir.backends.edge10.rope_program import RopeProgram
from tyir.diagnostics import TyirError
from tyir.dialects.ty import Param
from tyir.execution.artifacts import Artifacts
from tyir.execution.weights import CheckpointReader, tensors_of
from tyir.interpreter import Interpreter, run_lockstep
from tyir.manifest import Manifest
from tyir.runtime_sim.session.session import EngineName
from tyir.runtime_sim.vision.positions import RopePositions, VisionSpan, rope_rows
from tyir.runtime_sim.vision.rope_tables import RopeTables
from tyir.runtime_sim.vision.session import VisionSession

FREQUENCIES = tuple(float(np.float32(1e6) ** np.float32(-i / 64)) for i in range(64))
SECTIONS = {
    "Qwen2.5-VL": (0,) * 16 + (1,) * 24 + (2,) * 24,
    "Qwen3-VL": tuple(i % 3 if i < 60 else 0 for i in range(64)),
    "one axis only": (1,) * 64,
}


@pytest.mark.parametrize("scale", [1.0, 1.1386])
@pytest.mark.parametrize("section", SECTIONS)
def test_rows_are_the_routines_bit_by_bit(tmp_path: Path, section: str, scale: float) -> None:
    """Of the axes that the families use, with YaRN's factor: all positions that there are."""
    rope, slots = Rope(SECTIONS[section], FREQUENCIES, scale), 1500
    program = RopeProgram(rope, slots)
    program.module.verify()
    file = ParamsFile(tmp_path / "tables", [op for op in program.module.body if isinstance(op, Param)])
    write_params([file], CheckpointReader(tmp_path))
    tables = tensors_of(np.fromfile(file.path, np.uint8), tmp_path)
    run = Interpreter(program.module, constants=tables)
    rng = np.random.default_rng(3)
    positions = rng.integers(0, slots, (3, slots)).astype(np.int32)
    positions[:, :3] = slots - 1, 0, 1
    (found,) = run_lockstep([run.run("compute_rope_param", [positions])])
    for mine, wanted in zip(found, rope_rows(positions.astype(np.int64), rope)):
        assert mine.dtype == np.float16 and mine.tobytes() == wanted.tobytes()


PROMPTS = {
    "text": RopePositions(300),
    "pictures": RopePositions(300, [VisionSpan(3, (8, 12)), VisionSpan(120, (4, 9))]),
    "a video": RopePositions(300, [VisionSpan(1, (5, 4), (0, 2, 4, 6))]),
}


@pytest.mark.parametrize("engine", ["host", "interpreter", "edge10"])
def test_artifacts_have_the_program_for_every_engine(
    compiled: Callable[[str, int], Path], engine: EngineName
) -> None:
    artifacts = Artifacts.open(compiled("tiny-qwen2.5-vl", 1))
    tables = RopeTables(artifacts, engine)
    assert tables.rope is not None and tables.rope.program is not None
    names = {f"compute_rope_param.{end}" for end in ("so", "edge10", "ir", "params")}
    assert set(tables.rope.program.files) == names <= artifacts.manifest.files.keys()
    for positions in PROMPTS.values():
        found = tables.filled(positions)
        wanted = rope_rows(positions.at(0, tables.slots), tables.rope)
        assert list(found) == ["rope_cos", "rope_sin"]
        for mine, theirs in zip(found.values(), wanted):
            assert mine.tobytes() == theirs.tobytes()


def test_positions_beyond_the_tables_are_computed(compiled: Callable[[str, int], Path]) -> None:
    """A video of few tokens that lasts long: the same rows as ever."""
    tables = RopeTables(Artifacts.open(compiled("tiny-qwen2.5-vl", 1)))
    long = RopePositions(60, [VisionSpan(1, (2, 2), (0, 400, 800))])
    assert tables.rope is not None and long.at(0, tables.slots).max() >= tables.slots
    wanted = rope_rows(long.at(0, tables.slots), tables.rope)
    for mine, theirs in zip(tables.filled(long).values(), wanted):
        assert mine.tobytes() == theirs.tobytes() and np.isfinite(mine).all()


def test_models_of_plain_positions_have_none(compiled: Callable[[str, int], Path]) -> None:
    artifacts = Artifacts.open(compiled("tiny-llava", 1))
    assert RopeTables(artifacts).filled(PROMPTS["text"]) == {}
    assert not [name for name in artifacts.manifest.files if "rope" in name]


def changed(folder: Path, out: Path, change: Callable[[dict], None]) -> Path:
    """The artifacts with another manifest."""
    shutil.copytree(folder, out)
    content = json.loads((out / "manifest.json").read_text())
    change(content["vision"]["rope"])
    del content["sha256"]
    (out / "manifest.json").write_text(json.dumps({**content, "sha256": sha256_of(content)}))
    return out


def test_artifacts_of_older_compilers_run(compiled: Callable[[str, int], Path], tmp_path: Path) -> None:
    """They have no such program: the routine fills the tables."""
    folder = compiled("tiny-qwen2.5-vl", 1)
    older = changed(folder, tmp_path / "older", lambda rope: rope.pop("program"))
    ids = [1, 5, 9, 4]
    logits = [VisionSession(path).prefill(ids) for path in (folder, older)]
    np.testing.assert_array_equal(*logits)


CONTRADICTIONS: dict[str, tuple[Callable[[dict], None], str]] = {
    "another length": (lambda p: p.update(seqlen=9), "of die 0 for 9 slots, not of die 0 for max_kv = 512"),
    "another die": (lambda p: p.update(die=1), "of die 1 for 512 slots"),
    "another input": (lambda p: p["inputs"][0].update(name="tokens"), "takes or returns other tensors"),
    "another table": (lambda p: p["outputs"][0].update(shape=[512, 3]), "takes or returns other tensors"),
    "no such file": (lambda p: p.update(library="other.so"), "files lists no other.so"),
}


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_contradictions_are_refused(compiled: Callable[[str, int], Path], tmp_path: Path, what: str) -> None:
    change, message = CONTRADICTIONS[what]
    folder = changed(compiled("tiny-qwen2.5-vl", 1), tmp_path / "x", lambda rope: change(rope["program"]))
    with pytest.raises(TyirError, match=message):
        Artifacts.open(folder)


def test_a_program_of_others_is_refused(compiled: Callable[[str, int], Path], tmp_path: Path) -> None:
    """The IR beside it must be what the manifest says, though nothing of it is a language program."""
    out = tmp_path / "x"
    shutil.copytree(compiled("tiny-qwen2.5-vl", 1), out)
    path = out / "compute_rope_param.ir"
    path.write_text(path.read_text().replace("rope_cos", "rope_was"))
    artifacts = Artifacts.open(out, check=False)
    with pytest.raises(TyirError, match="rope_was"):
        RopeTables(artifacts, "interpreter").filled(PROMPTS["text"])


def test_the_manifest_says_what_it_takes(compiled: Callable[[str, int], Path]) -> None:
    manifest = Manifest.load(compiled("tiny-qwen2.5-vl", 1))
    assert manifest.vision is not None and manifest.vision.rope is not None
    program = manifest.vision.rope.program
    assert program is not None
    assert [(t.name, t.dtype, t.shape) for t in program.inputs] == [("positions", "i32", (3, 512))]
    pairs = len(manifest.vision.rope.axes)
    assert [(t.name, t.dtype, t.shape) for t in program.outputs] == [
        ("rope_cos", "f16", (512, pairs)),
        ("rope_sin", "f16", (512, pairs)),
    ]
    given = {t.name: t for t in manifest.programs[0].inputs}
    assert [given[t.name] for t in program.outputs] == list(program.outputs)

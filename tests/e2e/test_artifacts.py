"""What lies in the artifact folder: complete, deterministic, replaced as a whole, refused when damaged."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.llm import dies_of
from tyir.backends.edge10.lowering.die import lower_die
from tyir.backends.edge10.memory.summary import memory_summary
from tyir.diagnostics import TyirError
from tyir.execution.weights import read_safetensors
from tyir.manifest import BuildOptions, Manifest
from tyir.parser import parse_file
from tyir.passes.pipelines import remaining_pipeline
from tyir.pipeline import run_pipeline
from tyir.printer import print_op
from tyir.runtime_sim.session.session import Session
from tyir.targets.machine import load_machine
from tyir.tools.api import build_and_compile_llm, compile_path

Artifacts = Callable[[int, str], Path]
OPTIONS = BuildOptions(dies=2, seqlens=(1, 8), max_kv=128, weights="int4")


def hashes(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def test_layout(artifacts: Artifacts) -> None:
    folder = artifacts(4, "fp16")
    names = set(hashes(folder))
    for die in range(4):
        assert f"batch_1/common_die{die}.params" in names
        for seqlen in (1, 8):
            assert {
                f"batch_1/seqlen_{seqlen}/llm_die{die}.{e}" for e in ("so", "params", "edge10", "ir")
            } <= names
    assert {"buffer_config.json", "config.json", "empty.bin", "manifest.json", "tokenizer.json"} <= names
    assert set(Manifest.load(folder).files) == names - {"manifest.json"}
    assert not list(folder.parent.glob(".*")), "no temporary folder is left"


def test_both_ways_and_a_second_time_give_identical_bytes(
    imported: Path, model: Path, artifacts: Artifacts, tmp_path: Path
) -> None:
    """tyir-compile HF_DIR in a process of its own; tyir-import, then tyir-opt with the pipeline, then
    tyir-compile; and a third compile.
    """
    wanted = hashes(artifacts(2, "int4"))
    command = [
        sys.executable,
        "-P",
        "-m",
        "tyir.tools.tyir_compile",
        str(model),
        "-o",
        str(tmp_path / "a"),
        "--dies",
        "2",
        "--max-kv",
        "128",
    ]
    subprocess.run([*command, "--weights", "int4", "-q"], check=True, cwd=tmp_path, capture_output=True)
    module = parse_file(imported)
    run_pipeline(
        module,
        "to-ty,quantize-weights,kv-materialize{max-kv=128},partition-dies{dies=2},specialize-seqlen{seqlens=1,8},to-program",
    )
    (tmp_path / "program.ir").write_text(print_op(module))
    opted = compile_path(tmp_path / "program.ir", tmp_path / "b", OPTIONS)
    assert hashes(tmp_path / "a" / "2die") == wanted
    assert hashes(opted) == wanted


def test_a_changed_byte_is_named(artifacts: Artifacts, tmp_path: Path) -> None:
    folder = tmp_path / "2die"
    shutil.copytree(artifacts(2, "fp16"), folder)
    params = folder / "batch_1" / "common_die1.params"
    data = bytearray(params.read_bytes())
    data[len(data) // 2] ^= 1
    params.write_bytes(data)
    with pytest.raises(TyirError, match=r"common_die1\.params has changed since it was compiled"):
        Session(folder)
    (folder / "config.json").unlink()
    with pytest.raises(TyirError, match=r"common_die1\.params has changed(.|\n)*config\.json is missing"):
        Session(folder)


def test_a_folder_without_manifest_suggests_the_right_one(artifacts: Artifacts) -> None:
    folder = artifacts(2, "fp16")
    with pytest.raises(TyirError, match=r"holds no manifest\.json(.|\n)*did you mean .*die"):
        Session(folder.parent)


def test_foreign_output_folders_are_left_alone(imported: Path, tmp_path: Path) -> None:
    (tmp_path / "2die").mkdir()
    (tmp_path / "2die" / "thesis.tex").write_text("do not lose me")
    with pytest.raises(TyirError, match="was not written by tyir-compile"):
        compile_path(imported, tmp_path, OPTIONS)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["thesis.tex"]


def test_a_failing_compile_leaves_the_old_artifacts(
    imported: Path, artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "2die"
    shutil.copytree(artifacts(2, "int4"), folder)
    before = hashes(folder)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tyir.backends.edge10.compile._copy_model_files", full)
    with pytest.raises(TyirError, match="No space left on device"):
        compile_path(imported, tmp_path, OPTIONS)
    assert hashes(folder) == before
    assert [p.name for p in tmp_path.iterdir()] == ["2die"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (BuildOptions(dies=0), "0 dies: a board has 1 to 16"),
        (BuildOptions(dies=17), "17 dies"),
        (BuildOptions(seqlens=()), "list of sequence lengths is empty"),
        (BuildOptions(seqlens=(8, 1)), "must ascend"),
        (BuildOptions(seqlens=(1, 2048)), "2048 is larger than the cache of 1024 tokens"),
        (BuildOptions(max_kv=0), "a cache of 0 tokens"),
        (BuildOptions(weights="int3"), "one of fp16, int4"),
        (
            BuildOptions(dies=6, mesh=(2, 2)),
            "mesh=2,2 is no arrangement of 6 dies(.|\n)*mesh=3,2 or mesh=2,3",
        ),
    ],
)
def test_options_that_cannot_be_are_refused_before_any_work(
    model: Path, tmp_path: Path, options: BuildOptions, message: str
) -> None:
    with pytest.raises(TyirError, match=message):
        compile_path(model, tmp_path / "out", options)
    assert not (tmp_path / "out").exists()


def test_prompts_longer_than_the_cache(artifacts: Artifacts) -> None:
    session = Session(artifacts(2, "fp16"))
    with pytest.raises(TyirError, match=r"129 tokens do not fit(.|\n)*--max-kv 129"):
        session.feed([1] * 129)
    with pytest.raises(TyirError, match="list of tokens is empty"):
        session.feed([])
    with pytest.raises(TyirError, match="token 4096 is not in the vocabulary of 4096"):
        session.feed([4096])
    assert len(session.feed([1] * 128)) == 128


def test_build_and_compile_llm_has_the_embedding_outside_when_asked(
    model: Path, artifacts: Artifacts, tmp_path: Path
) -> None:
    folder = build_and_compile_llm(
        model,
        tmp_path / "out",
        max_kv_cache_size=128,
        seq_len_list=[1, 8],
        dev_count=2,
        embedding_as_input=True,
    )
    assert folder == tmp_path / "out" / "2die"
    assert read_safetensors(folder / "embedding.params")["embedding"].shape == (4096, 256)
    ids = [5, 17, 300, 42, 9]
    np.testing.assert_allclose(Session(folder).feed(ids), Session(artifacts(2, "fp16")).feed(ids), atol=0.05)


def test_buffer_config_tells_what_to_allocate(artifacts: Artifacts) -> None:
    config = json.loads((artifacts(3, "fp16") / "buffer_config.json").read_text())
    assert config["dev_count"] == 3
    assert config["seq_len_list"] == [1, 8]
    assert len(config["dies"]["0"]["kv_cache"]) == 12
    assert config["dies"]["0"]["inputs"]["8"]["ids"] == {"dtype": "i32", "shape": [1, 8]}
    memory = config["dies"]["0"]["memory"]["8"]
    assert memory["kv"] == sum(2 * math.prod(t["shape"]) for t in config["dies"]["0"]["kv_cache"].values())
    assert 0 < memory["sram"] <= 3 << 20 and memory["dram"] >= memory["weights"] + memory["kv"]


def small_machine(folder: Path, capacity: int) -> Path:
    """A machine file: Edge10 with less DRAM."""
    file = folder / "small.toml"
    file.write_text(
        f'name = "small"\nbase = "edge10"\n[dram]\ncapacity_bytes = {{ value = {capacity}, label = "derived",'
        ' source = "a test" }\n'
    )
    return file


def test_too_much_memory_names_remedies_that_fit(imported: Path, tmp_path: Path) -> None:
    """11 MiB of weights and 6 MiB of caches on a die of 11 MiB: each of the three remedies compiles; nothing
    was written before.
    """
    file = small_machine(tmp_path, 11 << 20)
    small = load_machine(file)
    with pytest.raises(
        TyirError,
        match=r"needs 17\.1 MiB of DRAM \(weights 11\.0 MiB, caches 6\.0 MiB\), small has 11\.0 MiB per die",
    ) as error:
        compile_path(imported, tmp_path / "out", BuildOptions(dies=1, max_kv=4096), machine=file)
    assert not (tmp_path / "out").exists()
    remedies = {"--weights int4": {"weights": "int4"}, "--dies 2": {"dies": 2}, "--max-kv 64": {"max_kv": 64}}
    help = error.value.diagnostics[0].help or ""
    for words, changes in remedies.items():
        assert f"{words} (" in help
        module = parse_file(imported)
        options = replace(BuildOptions(dies=1, max_kv=4096), **changes)
        run_pipeline(module, remaining_pipeline("aten", options))
        for die in dies_of(module):
            assert memory_summary(lower_die(die, 8, small))["dram"] <= 11 << 20


@pytest.mark.slow
def test_remedies_are_those_of_the_machine(imported: Path, tmp_path: Path) -> None:
    """Over links of a megabyte a second nothing is worth cutting, so more dies are no remedy; on Edge10's
    links, which the same compile would choose by default, two would do.
    """
    file = small_machine(tmp_path, 11 << 20)
    slow = 'bandwidth_gbps = { value = 0.001, label = "derived", source = "a test" }\n'
    file.write_text(f"{file.read_text()}[d2d]\n{slow}[c2c]\n{slow}")
    with pytest.raises(TyirError, match=r"needs 17\.1 MiB of DRAM") as error:
        compile_path(imported, tmp_path / "out", BuildOptions(dies=1, max_kv=4096), machine=file)
    help = error.value.diagnostics[0].help or ""
    assert "--weights int4 (" in help and "--dies" not in help


def test_a_machine_file_of_any_name(imported: Path, tmp_path: Path) -> None:
    """The cuts are chosen with it, in a pipeline's text."""
    folder = tmp_path / "it's a machine"
    folder.mkdir()
    done = compile_path(
        imported,
        tmp_path / "out",
        BuildOptions(dies=2, seqlens=(1,), max_kv=64),
        machine=small_machine(folder, 1 << 30),
    )
    assert "machine.toml" in Manifest.load(done).files


def test_too_much_memory_on_any_number_of_dies(imported: Path, tmp_path: Path) -> None:
    with pytest.raises(TyirError, match="nothing up to 16 dies fits: use a smaller model"):
        compile_path(
            imported,
            tmp_path / "out",
            BuildOptions(dies=1, max_kv=1024),
            machine=small_machine(tmp_path, 3 << 19),
        )

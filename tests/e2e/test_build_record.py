"""A module says what it was built with: compiled on from any point of its way, with and without debug
information, with and without the options repeated, it becomes the same artifacts; options that contradict it
are refused.
"""

from __future__ import annotations

import functools
import json
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.e2e.test_artifacts import hashes
from tyir.artifacts.schema import sha256_of
from tyir.backends.edge10.compile import CompileContext, to_program
from tyir.diagnostics import TyirError
from tyir.execution.awq_table import AwqSettings, AwqTable
from tyir.frontends.huggingface import import_model
from tyir.manifest import MANIFEST, BuildOptions, recorded, settled, sha256_file
from tyir.parser import parse_module
from tyir.passes.pipelines import awq_pipeline, remaining_pipeline
from tyir.pipeline import PassContext, Pipeline, build_pipeline, run_pipeline
from tyir.printer import print_op
from tyir.runtime_sim.session.chunks import Chunk
from tyir.runtime_sim.session.session import EngineName, Session
from tyir.stages import stage_of
from tyir.tools.api import compile_path
from tyir.tools.tyir_compile import main

# Every option of a build, with a value that is not its default and another one.
CHOICES: dict[str, tuple[Any, Any]] = {
    "dies": (2, 3),
    "die_map": ((3, 2, 1, 0), (0, 1, 2, 3)),
    "seqlens": ((1, 4), (1, 2)),
    "max_kv": (16, 32),
    "weights": ("int4", "fp16"),
    "group_size": (16, 32),
    "embedding_as_input": (True, False),
    "batch": (2, 3),
    "output": ("topk=3", "argmax"),
    "output_rows": ("last", "all"),
    "kv_dtype": ("int8", "fp16"),
    "kv_layout": ("NHD", "HND"),
    "pp": (2, 1),
    "mesh": ((2, 2), (4,)),
    "kv_split": ("heads", "tokens"),
    "kv_block": (16, 32),
    "sparse_prefill": ((2, 16, 0, 1), (3, 16, 0, 1)),
}
OTHERS = ("kv_block", "sparse_prefill")  # which do not go with the rest
ALL = {name: first for name, (first, _) in CHOICES.items() if name not in OTHERS} | {"dies": 4, "pp": 1}
BLOCKS = {"dies": 8, "kv_split": "tokens", "kv_block": 16, "max_kv": 64, "seqlens": (1,)}
SPARSE = {"dies": 2, "sparse_prefill": (2, 16, 0, 1), "max_kv": 64, "seqlens": (1, 4)}
STAGED = {"dies": 2, "pp": 2, "max_kv": 16, "seqlens": (1,)}
ALONE = {
    "dies": {"dies": 2},
    "die_map": {"dies": 4, "die_map": (3, 2, 1, 0)},
    "weights": {"weights": "int4", "group_size": 32},
    "group_size": {"weights": "int4", "group_size": 16},
    "mesh": {"dies": 4, "mesh": (2, 2)},
    "pp": {"pp": 2},
    "kv_block": BLOCKS,
    "sparse_prefill": SPARSE,
}
IDS = [5, 17, 30, 42, 9]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers with random weights."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
    )
    folder = tmp_path_factory.mktemp("checkpoint")
    Qwen2ForCausalLM(config).half().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def aten(checkpoint: Path) -> str:
    return print_op(import_model(checkpoint))


@functools.cache
def points(aten: str, options: BuildOptions) -> tuple[tuple[str, str, str], ...]:
    """(name, text, text without locations) of a module before the first and after every pass of its way."""
    module = parse_module(aten)
    pipeline, context = build_pipeline(remaining_pipeline("aten", options)), PassContext()
    found = [("imported", aten, print_op(module, locations=False))]
    for item in pipeline.items:
        Pipeline(pipeline.anchor, (item,)).run(module, context)
        found.append((item.text(), print_op(module), print_op(module, locations=False)))
    assert {stage_of(parse_module(text)) for _, text, _ in found} == {
        "aten", "ty", "kv", "dist", "static", "program"
    }  # fmt: skip
    return tuple(found)


def built(text: str, options: dict[str, Any]) -> tuple[BuildOptions, str]:
    """What the artifacts of a module are made of: the options and the program."""
    module = parse_module(text)
    done = to_program(module, settled(options, module), CompileContext())
    return done, print_op(module)


def check_every_point(aten: str, options: dict[str, Any]) -> None:
    wanted = built(aten, options)
    assert {name: getattr(wanted[0], name) for name in options} == options
    for name, text, bare in points(aten, BuildOptions(**options)):
        done = recorded(parse_module(text))
        rest = {key: value for key, value in options.items() if key not in done}
        for variant, asked in product((text, bare), (options, rest)):
            assert built(variant, asked) == wanted, name


@pytest.mark.parametrize(
    "options",
    [ALL, STAGED, *(pytest.param(o, marks=pytest.mark.slow) for o in (BLOCKS, SPARSE))],
    ids=["all", "stages", "blocks", "sparse"],
)
def test_the_same_program_from_every_point(aten: str, options: dict[str, Any]) -> None:
    check_every_point(aten, options)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHOICES)
def test_each_option_alone(aten: str, name: str) -> None:
    check_every_point(aten, ALONE.get(name, {name: CHOICES[name][0]}))


def test_every_option_has_a_case() -> None:
    found = {"awq", "kv_parts"}  # what a table was, and what follows from other options: no choices
    assert {*CHOICES, *found} == set(BuildOptions.__dataclass_fields__)
    for name, (first, other) in CHOICES.items():
        assert first != other and (getattr(BuildOptions(), name) != first or name in ALL), name


@pytest.mark.parametrize("options", [ALL, STAGED, BLOCKS, SPARSE], ids=["all", "stages", "blocks", "sparse"])
def test_a_contradiction_names_both(aten: str, options: dict[str, Any]) -> None:
    refused: set[str] = set()
    for _, text, _ in points(aten, BuildOptions(**options)):
        module = parse_module(text)
        for name in set(recorded(module)) & set(options):
            other = next(v for v in CHOICES[name] if v != options[name])
            mine = [
                ",".join(map(str, v)) if isinstance(v, tuple) else str(v).lower()
                for v in (options[name], other)
            ]
            if name == "mesh":
                mine[1] = "none"
            with pytest.raises(TyirError) as caught:
                settled({name: other}, module)
            message = str(caught.value).lower()
            wanted = f"{name} = {mine[1]} is asked for, the module was built with {name} = {mine[0]}"
            assert wanted.lower() in message
            refused.add(name)
    assert refused == set(options)


def test_what_was_not_done_cannot_be_asked_for_later(aten: str) -> None:
    """Once the caches are there weights stay as they are, once the dies are there batch, output and whose
    rows are returned do.
    """
    plain = {"max_kv": 16, "dies": 2, "seqlens": (1,)}
    texts = {stage_of(parse_module(t)): t for _, t, _ in points(aten, BuildOptions(**plain))}
    for stage, asked in (
        ("kv", {"weights": "int4"}),
        ("dist", {"batch": 2}),
        ("dist", {"output_rows": "last"}),
        ("program", {"output": "argmax"}),
    ):
        with pytest.raises(TyirError, match="is asked for, the module was built with"):
            settled(asked, parse_module(texts[stage]))


def test_a_module_without_a_record_is_not_guessed_at(aten: str) -> None:
    *_, (_, text, _) = points(aten, BuildOptions(**STAGED))
    module = parse_module(text)
    module.attributes = module.attributes.without("tyir.build")
    with pytest.raises(TyirError, match=r"does not say with which weights, max_kv, .*seqlens it was built"):
        to_program(module, settled(STAGED, module), CompileContext())


def test_a_table_that_was_folded_in_is_kept(aten: str, tmp_path: Path) -> None:
    """Its hash and the weights it made go with the module, whatever else follows."""
    path = tmp_path / "awq.safetensors"
    scale = np.linspace(0.5, 2, 64, dtype=np.float32)
    AwqTable(AwqSettings(group_size=16), {"model.layers.1.input_layernorm": scale}).save(path)
    module = parse_module(aten)
    run_pipeline(module, f"to-ty,{awq_pipeline(path)}")
    wanted = sha256_file(path)
    for text in (print_op(module), print_op(module, locations=False)):
        done, program = built(text, {**STAGED, "weights": "awq"})
        assert (done.weights, done.awq, done.group_size) == ("awq", wanted, 16)
        assert program == built(text, STAGED)[1]
    for asked, message in (
        ({"weights": "int4"}, "weights = int4 is asked for, the module was built with weights = awq"),
        ({"group_size": 32}, "group_size = 32 is asked for"),
        ({"awq": "0" * 64}, f"the module was built with awq = {wanted}"),
    ):
        with pytest.raises(TyirError, match=message):
            settled(asked, module)


def test_the_machine_that_was_cut_for_is_kept(aten: str) -> None:
    module = parse_module(aten)
    to_program(module, BuildOptions(**STAGED), CompileContext(machine="hopper_sm"))
    assert recorded(module)["machine"] == "hopper_sm"
    text = print_op(module)
    again, context = parse_module(text), CompileContext()
    to_program(again, settled({}, again), context.for_module(again))
    assert context.for_module(again).chosen_machine == "hopper_sm"
    with pytest.raises(
        TyirError, match="machine = edge10 is asked for, the module was cut for machine = hopper_sm"
    ):
        CompileContext(machine="edge10").for_module(again)


# ---------------------------------------------------------------------------------------------- whole folders


@pytest.fixture(scope="module")
def whole(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_path(checkpoint, tmp_path_factory.mktemp("whole"), ALL)


def some_points(aten: str) -> dict[str | None, tuple[str, str]]:
    """The text of the last point of each stage, with and without locations."""
    found = points(aten, BuildOptions(**ALL))
    return {stage_of(parse_module(bare)): (text, bare) for _, text, bare in found}


@pytest.mark.parametrize("stage", ["kv", "program"])
def test_the_same_bytes_by_the_command_line(aten: str, whole: Path, tmp_path: Path, stage: str) -> None:
    text, bare = some_points(aten)[stage]
    (tmp_path / "m.ir").write_text(bare if stage == "program" else text)
    rest = {
        key: value
        for key, value in ALL.items()
        if key not in recorded(parse_module(text)) and key != "embedding_as_input"
    }
    flags = [
        part
        for key, value in rest.items()
        for part in (
            "--" + key.replace("_", "-"),
            ",".join(map(str, value)) if isinstance(value, tuple) else str(value),
        )
    ]
    assert main([str(tmp_path / "m.ir"), "-o", str(tmp_path / "out"), "-q", *flags]) == 0
    assert hashes(tmp_path / "out" / "4die") == hashes(whole)
    assert main([str(tmp_path / "m.ir"), "-o", str(tmp_path / "other"), "-q", "--max-kv", "17"]) == 1
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "debug"), product(["aten", "ty", "kv", "dist", "static", "program"], [0, 1])
)
def test_the_same_bytes_from_every_stage(
    aten: str, whole: Path, tmp_path: Path, stage: str, debug: int
) -> None:
    text = some_points(aten)[stage][1 - debug]
    (tmp_path / "m.ir").write_text(text)
    assert hashes(compile_path(tmp_path / "m.ir", tmp_path, ALL)) == hashes(whole)


@pytest.mark.parametrize("engine", ["interpreter", "edge10"])
def test_a_missing_input_is_no_cache(whole: Path, tmp_path: Path, engine: EngineName) -> None:
    """A manifest that keeps silent about the embeddings: an error, not zeros."""
    folder = tmp_path / "4die"
    shutil.copytree(whole, folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["options"]["embedding_as_input"] = False
    del manifest["sha256"]
    (folder / MANIFEST).write_text(json.dumps({**manifest, "sha256": sha256_of(manifest)}))
    with pytest.raises(TyirError, match="takes embeddings, which no step gives"):
        Session(folder, engine)
    session = Session(whole, engine)
    with pytest.raises(TyirError, match="takes embeddings, pos: the step lacks embeddings and has ids"):
        session.engine.step({"ids": np.zeros((2, 1), np.int32), "pos": np.zeros(2, np.int32)}, Chunk(0, 1, 1))

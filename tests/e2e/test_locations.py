"""No pass loses where an op comes from: every pass runs on the tiny model, and afterwards every op that
computes something has a location, and its module path as an attribute.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tyir.dialects.builtin import Module
from tyir.layers import layer_of, path_of
from tyir.location import UNKNOWN, NameLoc
from tyir.parser import parse_file
from tyir.pass_manager.registry import PassRegistry
from tyir.pipeline import PassContext, run_pipeline

PIPELINE = (
    "print-op-stats,view-op-graph{{file={folder}/graph.dot}},snapshot-locations{{filename={folder}/before.ir}},raise-aten,canonicalize,cse,dce,"
    "quantize-weights{{group-size=64}},scale-keys,kv-materialize,select-output{{kind=topk"
    " k=4}},select-rows,annotate-sharding,propagate-sharding,insert-collectives,"
    "localize-dies,specialize-seqlen,"
    "sparse-prefill{{keep=4 block=16 window=32 every=2}},"
    "outline-params,outline-layers,symbol-dce,plan-memory,lower-edge10{{seqlen=1}}"
)
BRANCHES = ("partition-dies", "inline", "specialize-batch")  # they stand for, undo or exclude passes above
FORGETS = ("strip-debuginfo",)  # its purpose
PASSES = Path(__file__).parents[1] / "passes"
INPUTS = {
    "tower.ir": "extract-graph{graph=visual_12x4},scale-residual,static-step",
    "layer.ir": f"awq-fold{{table={PASSES}/layer.awq.safetensors}}",
}  # passes that want more than a text model, and what they have it from
STRUCTURE = {
    "builtin.module",
    "func.func",
    "func.return",
    "ty.global",
    "ty.yield",
    "sdy.mesh",
}  # written by tyir, not by the model's author
ADDRESSES = {
    "edge10.address_of",
    "edge10.affine",
    "edge10.join",
    "edge10.offset",
    "edge10.register",
}  # shared by commands of many places


def _lost(module: Module) -> Counter[str]:
    return Counter(
        op.name
        for op in module.walk()
        if op.loc is UNKNOWN and op.name not in STRUCTURE | ADDRESSES and op.results
    )


def _layers(module: Module) -> set[int]:
    return {layer for op in module.walk() if (layer := layer_of(op)) is not None}


def test_the_list_is_complete() -> None:
    named = {
        item.partition("{")[0] for pipeline in (PIPELINE, *INPUTS.values()) for item in pipeline.split(",")
    }
    assert named | {*BRANCHES, *FORGETS} == set(PassRegistry().names())


def test_no_pass_drops_locations(imported: Path, tmp_path: Path) -> None:
    module = parse_file(imported)
    layers = _layers(module)
    assert not _lost(module) and layers == set(range(6))
    branches = {
        "annotate-sharding": "partition-dies",
        "symbol-dce": "inline",
        "select-output": "specialize-batch{batch=2}",
    }  # the pass before which to branch off
    for item in PIPELINE.split(","):
        name = item.partition("{")[0]
        if name in branches:
            copy = module.clone()
            run_pipeline(copy, branches[name], PassContext())
            assert not _lost(copy) and _layers(copy) == layers, branches[name]
        run_pipeline(module, item.format(folder=tmp_path), PassContext())
        assert not _lost(module), name
        assert _layers(module) == layers, name


@pytest.mark.parametrize("name", INPUTS)
def test_no_pass_drops_locations_of_its_own_input(name: str) -> None:
    module = parse_file(PASSES / name)
    for op in module.walk():
        if op.name not in STRUCTURE:
            op.loc = NameLoc(path_of(op) or op.name)
    layers = _layers(module)
    assert layers
    for item in INPUTS[name].split(","):
        before = [*module.walk()]
        run_pipeline(module, item, PassContext())
        assert [*module.walk()] != before, f"{item} did nothing"
        assert not _lost(module), item
        assert _layers(module) == layers, item

"""No pass loses where an op comes from: every pass runs on the tiny model, and afterwards every op that
computes something has a location, and its module path as an attribute.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from tyir.dialects.builtin import Module
from tyir.layers import layer_of
from tyir.location import UNKNOWN
from tyir.parser import parse_file
from tyir.pass_manager.registry import PassRegistry
from tyir.pipeline import PassContext, run_pipeline

PIPELINE = (
    "print-op-stats,view-op-graph{{file={folder}/graph.dot}},snapshot-locations{{filename={folder}/before.ir}},raise-aten,canonicalize,cse,dce,"
    "quantize-weights{{group-size=64}},kv-materialize,select-output{{kind=topk"
    " k=4}},annotate-sharding,propagate-sharding,insert-collectives,"
    "localize-dies,specialize-seqlen,outline-params,outline-layers,symbol-dce,plan-memory,lower-edge10{{seqlen=1}}"
)
BRANCHES = ("partition-dies", "inline", "specialize-batch")  # they stand for, undo or exclude passes above
FORGETS = ("strip-debuginfo",)  # its purpose
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
    named = {item.partition("{")[0] for item in PIPELINE.split(",")}
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

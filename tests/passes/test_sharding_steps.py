"""The steps of partition-dies one by one: what they write can be read, edited and pinned; choices follow
cost; collectives are the minimum.
"""

from __future__ import annotations

import math

import pytest

from tests.llm import Shape, build, dies_of
from tyir.attributes import StringAttr
from tyir.diagnostics import TyirError
from tyir.dialects.dist import AllGather, AllReduce
from tyir.dialects.func import Func
from tyir.dialects.sdy import Mesh
from tyir.dialects.ty import Linear, SiluMul, tensor_type
from tyir.layers import path_of
from tyir.parser import parse_module
from tyir.pipeline import run_pipeline
from tyir.printer import print_op
from tyir.sharding import PARTIAL, Split, from_attribute, to_attribute
from tyir.targets.collectives import all_reduce_ns
from tyir.targets.machine import load_machine
from tyir.types import f16

STEPS = (
    "annotate-sharding{dies=3 strategy=split}",
    "propagate-sharding",
    "insert-collectives",
    "localize-dies",
)


def test_steps_through_text_equal_partition_dies() -> None:
    """Print, parse and go on after every step: the same dies as in one go."""
    module, _ = build(Shape(heads=6, kv_heads=2))
    run_pipeline(module, "kv-materialize{max-kv=16}")
    whole = parse_module(print_op(module))
    run_pipeline(whole, "partition-dies{dies=3 strategy=split}")
    for step in STEPS:
        run_pipeline(module, step)
        module = parse_module(print_op(module))
    assert print_op(module) == print_op(parse_module(print_op(whole)))


def test_placements_are_written_on_every_op_in_both_vocabularies() -> None:
    module, _ = build(Shape(heads=6, kv_heads=2))
    run_pipeline(module, "kv-materialize{max-kv=16}," + ",".join(STEPS[:2]))
    activation = next(module.walk_type(SiluMul))
    placement = from_attribute(activation.attributes["tyir.sharding"])
    assert isinstance(placement, Split) and placement.axis == 2 and sum(s for _, s in placement.ranges) == 96
    assert (
        str(activation.attributes["sdy.sharding"]) == '#sdy.sharding_per_value<[<@mesh, [{}, {}, {"die"}]>]>'
    )
    (down,) = (op for op in module.walk_type(Linear) if path_of(op) == "model.layers.0.mlp.down_proj")
    assert from_attribute(down.attributes["tyir.sharding"]) is PARTIAL
    assert str(down.attributes["sdy.sharding"]).endswith('unreduced={"die"}>]>')


def test_sixteen_dies_are_four_groups_of_four() -> None:
    module, _ = build(Shape())
    run_pipeline(
        module,
        "kv-materialize{max-kv=16},annotate-sharding{dies=16 remap=3,2,1,0,4,5,6,7,8,9,10,11,12,13,14,15}",
    )
    mesh = next(module.walk_type(Mesh))
    assert mesh.axes == (("group", 4), ("die", 4)) and mesh.dies == 16
    assert mesh.devices[:4] == (3, 2, 1, 0), "the first is the main die"


def test_small_blocks_stay_whole_because_a_collective_costs_more_and_large_ones_are_split() -> None:
    module, _ = build(Shape(layers=1), draw=False)
    run_pipeline(module, "kv-materialize{max-kv=16},partition-dies{dies=4}")
    assert not list(module.walk_type(AllReduce)), "a few KiB of weights are read faster than four dies meet"
    large, _ = build(
        Shape(layers=1, hidden=1024, heads=16, kv_heads=16, head_dim=64, width=4096, vocabulary=4096),
        draw=False,
    )
    run_pipeline(large, "kv-materialize{max-kv=16},partition-dies{dies=4}")
    assert sum(1 for _ in dies_of(large)[0].walk_type(AllReduce)) == 3


def test_the_choice_says_why_and_a_pin_decides() -> None:
    module, _ = build(Shape(layers=1), draw=False)
    run_pipeline(module, "kv-materialize{max-kv=16}")
    (up,) = (op for op in module.walk_type(Linear) if path_of(op) == "model.layers.0.mlp.up_proj")
    up.set_attribute("tyir.pin", StringAttr("split"))
    run_pipeline(module, "annotate-sharding{dies=2}")
    assert "split: " in up.attributes["tyir.choice"].value and up.attributes["tyir.choice"].value.endswith(
        "replicated (pinned)"
    )
    assert "tyir.sharding" in up.attributes
    (q,) = (op for op in module.walk_type(Linear) if path_of(op) == "model.layers.0.self_attn.q_proj")
    assert (
        q.attributes["tyir.choice"].value.startswith("replicated: ") and "tyir.sharding" not in q.attributes
    )


def test_pins_that_contradict_are_refused() -> None:
    module, _ = build(Shape(layers=1), draw=False)
    run_pipeline(module, "kv-materialize{max-kv=16}")
    for op in module.walk_type(Linear):
        if (path := path_of(op)) in ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj"):
            op.set_attribute("tyir.pin", StringAttr("split" if path.endswith("up_proj") else "replicated"))
    with pytest.raises(TyirError, match="is replicated and split"):
        run_pipeline(module, "annotate-sharding{dies=2}")


@pytest.mark.parametrize("dies", [2, 3, 4, 7])
def test_collectives_and_their_bytes_are_the_closed_form_minimum(dies: int) -> None:
    """Per token: 2 L + 1 all-reduces of one hidden row each, one gather of the vocabulary's f32 logits."""
    shape = Shape(layers=3, hidden=64, vocabulary=112)
    module, _ = build(shape)
    run_pipeline(
        module,
        f"kv-materialize{{max-kv=16}},partition-dies{{dies={dies}"
        " strategy=split},specialize-seqlen{seqlens=1}",
    )
    main = next(dies_of(module)[0].walk_type(Func))
    reduces = [tensor_type(op.out).nbytes for op in main.walk_type(AllReduce)]
    gathers = [tensor_type(op.out).nbytes for op in main.walk_type(AllGather)]
    assert reduces == [2 * shape.hidden] * (2 * shape.layers + 1)
    assert gathers == [4 * shape.vocabulary]


def test_attributes_round_trip() -> None:
    split = Split(1, ((0, 3), (2, 3), (5, 0)))
    assert from_attribute(to_attribute(split)) == split
    assert from_attribute(to_attribute(PARTIAL)) is PARTIAL
    assert math.prod(s for _, s in split.ranges) == 0


def test_a_mesh_of_the_users_own() -> None:
    """6 dies as 2 groups of 3: sums say so, and what travels between the groups is the larger part of their
    time.
    """
    module, _ = build(Shape())
    run_pipeline(module, "kv-materialize{max-kv=16},partition-dies{dies=6 mesh=[2,3] strategy=split}")
    assert next(module.walk_type(Mesh)).axes == (("group", 2), ("die", 3))
    assert {op.group for op in module.walk_type(AllReduce)} == {3}
    machine = load_machine()
    assert all_reduce_ns(7168, f16, 6, machine, 3) > all_reduce_ns(7168, f16, 6, machine, 6)


def test_stages_of_groups() -> None:
    module, _ = build(Shape(layers=2))
    run_pipeline(module, "kv-materialize{max-kv=16},partition-dies{dies=8 pp=2 mesh=2,2}")
    assert next(module.walk_type(Mesh)).axes == (("stage", 2), ("group", 2), ("die", 2))
    assert {(len(op.dies or ()), op.group) for op in module.walk_type(AllReduce)} == {(0, 2), (4, 2)}


@pytest.mark.parametrize("mesh", ["4,2", "3", "2,3,1", "0,6"])
def test_meshes_that_do_not_count_the_dies_name_those_that_do(mesh: str) -> None:
    module, _ = build(Shape())
    with pytest.raises(
        TyirError, match=rf"mesh={mesh} is no arrangement of 6 dies(.|\n)*use mesh=6 or mesh=3,2 or mesh=2,3"
    ):
        run_pipeline(module, f"kv-materialize{{max-kv=16}},partition-dies{{dies=6 mesh={mesh}}}")

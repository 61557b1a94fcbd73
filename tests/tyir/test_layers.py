"""Layers and module paths of ops: read from attributes, carried on, never taken from locations."""

from __future__ import annotations

import pytest

from tests.llm import Shape, build
from tyir.diagnostics import TyirError
from tyir.dialects.func import Call
from tyir.layers import any_layer, layer_in, layer_of, layer_root, path_of, within_layer
from tyir.pipeline import run_pipeline
from tyir.printer import print_op


@pytest.mark.parametrize(
    ("path", "layer", "root", "inside", "any"),
    [
        ("model.layers.3.mlp.up_proj", 3, "model.layers.3", "mlp.up_proj", "model.layers.*.mlp.up_proj"),
        ("transformer.h.11", 11, "transformer.h.11", "", "transformer.h.*"),
        ("blocks.0.norm", 0, "blocks.0", "norm", "blocks.*.norm"),
        ("blocks.1.x.h.2.up", 1, "blocks.1", "x.h.2.up", "blocks.*.x.h.2.up"),
        ("model.norm", None, None, "model.norm", "model.norm"),
        ("bath.3.x", None, None, "bath.3.x", "bath.3.x"),
    ],
)  # fmt: skip
def test_layers_of_paths(path: str, layer: int | None, root: str | None, inside: str, any: str) -> None:
    assert (layer_in(path), layer_root(path), within_layer(path), any_layer(path)) == (
        layer,
        root,
        inside,
        any,
    )


PIPELINE = (
    "quantize-weights{group-size=32},kv-materialize{max-kv=16},select-output,partition-dies{dies=2 pp=2},"
    "specialize-seqlen{seqlens=1},to-program"
)


def test_stripped_locations_change_nothing() -> None:
    """At each step the text without locations is the same."""
    whole, stripped = build(Shape())[0], build(Shape())[0]
    run_pipeline(stripped, "strip-debuginfo")
    for step in PIPELINE.replace("},", "},;").split(",;"):
        run_pipeline(whole, step)
        run_pipeline(stripped, f"{step},strip-debuginfo")
        assert print_op(stripped) == print_op(whole, locations=False), step
    calls = list(whole.walk_type(Call))
    assert {(layer_of(c), path_of(c)) for c in calls} == {(0, "model.layers.0"), (1, "model.layers.1")}


def test_an_inlined_layer_has_its_number_again() -> None:
    module = build(Shape())[0]
    run_pipeline(module, PIPELINE + ",inline")
    found = {(layer_of(op), path_of(op)) for op in module.walk() if "mlp" in (path_of(op) or "")}
    assert (1, "model.layers.1.mlp.up_proj") in found and not any("*" in str(path) for _, path in found)


def test_quantising_a_module_that_names_no_layers_is_an_error() -> None:
    module = build(Shape())[0]
    for op in module.walk():
        op.attributes = op.attributes.without("tyir.layer", "tyir.path")
    with pytest.raises(
        TyirError, match=r"which decoder layer it belongs to \(tyir.layer\); no linear can be"
    ):
        run_pipeline(module, "quantize-weights{group-size=32}")

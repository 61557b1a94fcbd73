"""Layers traced once: the module is the one that tracing every layer gives, and layers that differ in
anything are not taken for one another.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tyir.dialects.builtin import Module
from tyir.frontends import torch_export
from tyir.frontends.graph_importer import traced_layers
from tyir.frontends.huggingface import import_model, open_model
from tyir.printer import print_op

SaveModel = Callable[..., Path]
MODELS: dict[str, tuple[dict[str, Any], int]] = {  # config, kinds of layers
    "llama": ({}, 1),
    "qwen2": ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}, 2),
    "qwen3": ({"head_dim": 32}, 1),
    "smollm3": ({"no_rope_layers": [1, 0, 1, 0, 1]}, 2),
    "granite": ({"residual_multiplier": 0.22}, 1),
    "phi3": ({}, 1),
}  # fmt: skip


def text_of(module: Module) -> str:
    """The printed module with values numbered in the order they appear in."""
    numbers: dict[str, str] = {}
    return re.sub(r"%\w+", lambda match: numbers.setdefault(match[0], f"%{len(numbers)}"), print_op(module))


@pytest.mark.parametrize(
    "model_type",
    [m if m in ("qwen2", "smollm3") else pytest.param(m, marks=pytest.mark.slow) for m in MODELS],
)
def test_the_same_module(save_model: SaveModel, monkeypatch: pytest.MonkeyPatch, model_type: str) -> None:
    config, kinds = MODELS[model_type]
    folder = save_model(model_type, num_hidden_layers=5, **config)
    program = torch_export.export_model(open_model(folder, "f16").meta)
    assert len(traced_layers(program.graph_module.graph.nodes)) == kinds
    quick = text_of(import_model(folder))
    monkeypatch.setattr(torch_export, "export_model", torch_export.trace_all)
    assert quick == text_of(import_model(folder))


@pytest.mark.parametrize("what", ["attribute", "class", "shape", "number"])
def test_layers_that_differ(save_model: SaveModel, what: str) -> None:
    """A factor of the attention, an activation, a width; or a layer that computes with its number, of which
    every one is traced.
    """
    import torch

    meta = open_model(save_model("llama", num_hidden_layers=5), "f16").meta
    layers: Any = meta.model.get_submodule("model.layers")
    if what == "attribute":
        layers[2].self_attn.scaling = 0.5
    elif what == "class":
        layers[2].mlp.act_fn = torch.nn.ReLU()
    elif what == "shape":
        layers[2].mlp.up_proj = torch.nn.Linear(64, 48, bias=False, dtype=torch.float16, device="meta")
        layers[2].mlp.gate_proj = torch.nn.Linear(64, 48, bias=False, dtype=torch.float16, device="meta")
        layers[2].mlp.down_proj = torch.nn.Linear(48, 64, bias=False, dtype=torch.float16, device="meta")
    else:
        original = type(layers[0].mlp).forward

        class Numbered(type(layers[0].mlp)):  # type: ignore[misc]
            layer_idx: int

            def forward(self, x: Any) -> Any:
                return original(self, x) * (self.layer_idx + 1)

        for i, layer in enumerate(layers):
            layer.mlp.__class__, layer.mlp.layer_idx = Numbered, i
    before = [(type(m), m.__dict__.get("layer_idx")) for m in meta.model.modules()]
    found = traced_layers(torch_export.export_model(meta).graph_module.graph.nodes)
    assert {path: layer.count for path, layer in found.items()} == (
        {f"model.layers.{i}": 1 for i in range(5)}
        if what == "number"
        else {"model.layers.0": 4, "model.layers.2": 1}
    )
    assert before == [(type(m), m.__dict__.get("layer_idx")) for m in meta.model.modules()]


def test_the_number_stays_an_int(save_model: SaveModel) -> None:
    """However a layer asks for its number, it sees what it sees in eager execution: factors of each layer's
    MLP that depend on it arrive in the graph.
    """
    import torch

    factors = [2.0, 3.0, 5.0]
    ways: list[Callable[[Any], float]] = [
        lambda n: factors[n] if isinstance(n, int) else 7.0,
        lambda n: factors[n] if type(n) is int else 7.0,
        lambda n: 13.0 if n == 0 else 17.0,
        lambda n: float(f"1{n}"),
        lambda n: 19.0 if n % 2 else 23.0,
        lambda n: {0: 29.0, 1: 31.0}.get(n, 37.0),
    ]
    meta = open_model(save_model("llama", num_hidden_layers=3), "f16").meta
    layers: Any = meta.model.get_submodule("model.layers")
    original = type(layers[0].mlp).forward

    class Numbered(type(layers[0].mlp)):  # type: ignore[misc]
        layer_idx: int

        def forward(self, x: Any) -> Any:
            out = original(self, x)
            for way in ways:
                out = out * way(self.layer_idx)
            return out

    for i, layer in enumerate(layers):
        layer.mlp.__class__, layer.mlp.layer_idx = Numbered, i
    graph = torch_export.export_model(meta).graph_module.graph
    numbers = [n.args[1] for n in graph.nodes if n.target is torch.ops.aten.mul.Tensor]
    found = [n for n in numbers if isinstance(n, float) and n != 1.0]  # rotary tables are multiplied by 1.0
    assert found == [way(i) for i in range(3) for way in ways]


@pytest.mark.parametrize("way", ["class", "vars", "dict"])
def test_modules_are_what_they_are(save_model: SaveModel, way: str) -> None:
    """A module that asks for its class sees its own; one that looks its number up past the attribute gets
    what eager execution gives it.
    """
    import torch

    meta = open_model(save_model("llama", num_hidden_layers=3), "f16").meta
    layers: Any = meta.model.get_submodule("model.layers")
    original = type(layers[0].mlp).forward

    class Asking(type(layers[0].mlp)):  # type: ignore[misc]
        layer_idx: int

        def forward(self, x: Any) -> Any:
            if way == "class":
                factor = 3.0 if type(self) is Asking and self.__class__ is Asking else 7.0
            else:
                factor = 3.0 + (vars(self) if way == "vars" else self.__dict__)["layer_idx"]
            return original(self, x) * factor

    for i, layer in enumerate(layers):
        layer.mlp.__class__, layer.mlp.layer_idx = Asking, i
    program = torch_export.export_model(meta).graph_module.graph
    numbers = [n.args[1] for n in program.nodes if n.target is torch.ops.aten.mul.Tensor]
    found = [n for n in numbers if isinstance(n, float) and n != 1.0]
    assert found == ([3.0] if way == "class" else [3.0, 4.0, 5.0])
    assert [vars(layer.mlp)["layer_idx"] for layer in layers] == [0, 1, 2]
    assert all("forward" not in vars(m) for m in meta.model.modules()) and "layer_idx" not in vars(Asking)

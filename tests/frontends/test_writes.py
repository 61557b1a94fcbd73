"""Nodes that write into a tensor are refused by name, with and without users: dropping one changes the
result.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tyir.diagnostics import TyirError


def _into_a_part(x: Any) -> Any:
    y = x.clone()
    y[..., 1::3] = x[..., 0::3] * 2  # aten.copy_ of a view, as interleaved rotary tables are made
    return y


def _of_one_index(x: Any) -> Any:
    y = x.clone()
    y[:, 0] = 1.0
    return y


def _indexed(x: Any) -> Any:
    import torch

    y = x.clone()
    y[:, torch.tensor([0, 2])] += x[:, :2]  # index_put_
    return y


def _scaled(x: Any) -> Any:
    y = x * 1.0
    y.mul_(2.0)
    return y


def _added_and_used(x: Any) -> Any:
    return (x * 1.0).add_(1.0)


def _seen_through_a_view(x: Any) -> Any:
    y = x.clone()
    y.view(-1).zero_()
    return y


def _masked(x: Any) -> Any:
    return (x * 1.0).masked_fill_(x > 0, 0.0)


WRITERS: dict[str, Callable[[Any], Any]] = {
    "copy_": _into_a_part,
    "fill_": _of_one_index,
    "index_put_": _indexed,
    "mul_": _scaled,
    "add_": _added_and_used,
    "zero_": _seen_through_a_view,
    "masked_fill_": _masked,
}


def _import(function: Callable[[Any], Any]) -> Any:
    import torch

    from tyir.frontends.checkpoint import Checkpoint
    from tyir.frontends.graph_importer import import_graph
    from tyir.frontends.weights import Weights

    class Model(torch.nn.Module):  # type: ignore[misc]  # torch is not followed by the type check
        def forward(self, x: Any) -> Any:
            return function(x)

    with torch.no_grad():
        program = torch.export.export(Model(), (torch.zeros(3, 6),), strict=False)
    weights = Weights(Checkpoint(Path(), {}, {}, {}), {})
    return import_graph(program, weights, lambda name: None)


@pytest.mark.parametrize("name", WRITERS)
def test_a_write_is_refused_by_name(name: str) -> None:
    with pytest.raises(TyirError, match=rf"aten\.{name}\.\w+, which writes into its operand"):
        _import(WRITERS[name])


@pytest.mark.parametrize(
    "function",
    [lambda x: x * 2 + x, lambda x: x.clone().transpose(0, 1), lambda x: x.relu().neg()],
    ids=["arithmetic", "clone", "unary"],
)
def test_what_makes_new_tensors_is_imported(function: Callable[[Any], Any]) -> None:
    main = _import(function)
    assert len(list(main.body)) >= 2

"""Decoder layers that are the same program are traced once: an 80-layer model is exported as quickly as one
of a few layers.

While `layers_traced_once` is in force, the first layer of each kind runs between the marks
`tyir::layer_begin` and `tyir::layer_end`, and a later layer of that kind emits `tyir::layer_copy` alone,
which the graph importer replaces by the first layer's nodes with the layer's own parameters.

Two layers are of one kind when a trace cannot tell them apart: modules of the same classes with equal
attributes and parameters of equal shapes, called with the same arguments beside the hidden state (the same
tensors, equal numbers: a layer with another mask or other rotary tables is of another kind).  The one
attribute that may differ is `layer_idx`: it stays the number it is, and a layer that has asked for it while
it was traced stands for no other.  Modules keep their classes, which their code may ask for; meanwhile the
number is not in their `__dict__`, so that who looks there fails, and every layer is traced.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch.utils import _pytree as pytree

__all__ = ["LAYER_BEGIN", "LAYER_COPY", "LAYER_END", "decoder_layers", "layers_traced_once"]

LAYER_BEGIN: Final = "tyir.layer_begin.default"
LAYER_END: Final = "tyir.layer_end.default"
LAYER_COPY: Final = "tyir.layer_copy.default"
_NUMBER: Final = "layer_idx"
_OF_EVERY_MODULE: Final = frozenset(torch.nn.Module().__dict__) - {"training"}
_PLAIN: Final = (bool, int, float, str, type(None))


@torch.library.custom_op("tyir::layer_begin", mutates_args=())  # type: ignore[untyped-decorator]
def layer_begin(x: torch.Tensor, path: str) -> torch.Tensor:
    """The hidden state that enters layer `path`, which is traced; only ever traced, like the two ops
    below.
    """
    return x.clone()


@torch.library.custom_op("tyir::layer_end", mutates_args=())  # type: ignore[untyped-decorator]
def layer_end(x: torch.Tensor, path: str) -> torch.Tensor:
    """The hidden state that leaves layer `path`."""
    return x.clone()


@torch.library.custom_op("tyir::layer_copy", mutates_args=())  # type: ignore[untyped-decorator]
def layer_copy(x: torch.Tensor, path: str, source: str) -> torch.Tensor:
    """What layer `path` makes of x: what layer `source` would make of it with the parameters of `path`."""
    return x.clone()


for _op in (layer_begin, layer_end, layer_copy):
    _op.register_fake(lambda x, *paths: torch.empty_like(x))


@dataclass
class _Kinds:
    """The layers traced so far, one of each kind: (what it is, arguments it was called with, path); and how
    often a module was asked for its layer's number.
    """

    traced: list[tuple[object, list[Any], str]] = field(default_factory=list)
    asked: int = 0

    def find(self, structure: object, arguments: list[Any]) -> str | None:
        """The path of a traced layer of this structure that was called with these arguments."""
        for known, others, path in self.traced:
            if known == structure and len(others) == len(arguments) and all(map(_same, others, arguments)):
                return path
        return None


def _same(a: Any, b: Any) -> bool:
    return a is b or (isinstance(a, _PLAIN) and type(a) is type(b) and a == b)


def _numbered(kinds: _Kinds, numbers: dict[torch.nn.Module, Any]) -> property:
    """A class's `layer_idx` that gives its modules in `numbers` their own, and counts who asks."""

    def get(module: torch.nn.Module) -> Any:
        kinds.asked += 1
        try:
            return numbers[module] if module in numbers else module.__dict__[_NUMBER]
        except KeyError:
            raise AttributeError(_NUMBER) from None

    def set_to(module: torch.nn.Module, number: Any) -> None:
        kinds.asked += 1
        if module in numbers:
            numbers[module] = number
        else:
            module.__dict__[_NUMBER] = number

    return property(get, set_to)


def _reusing(kinds: _Kinds, layer: Any, structure: object, path: str) -> Callable[..., Any]:
    """A layer's `forward` that traces the layer or notes that it is a copy."""
    own = layer.forward

    @functools.wraps(own)
    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        leaves, tree = pytree.tree_flatten((args, kwargs))
        arguments = [*leaves, str(tree), str(hidden_states.shape), hidden_states.dtype]
        source = kinds.find(structure, arguments)
        if source is not None:
            return torch.ops.tyir.layer_copy(hidden_states, path, source)
        before = kinds.asked
        out = own(torch.ops.tyir.layer_begin(hidden_states, path), *args, **kwargs)
        if (
            not isinstance(out, torch.Tensor)
            or str(out.shape) != str(hidden_states.shape)
            or out.dtype != hidden_states.dtype
        ):
            raise RuntimeError("the layer does not return a hidden state alone")
        if kinds.asked == before:
            kinds.traced.append((structure, arguments, path))
        return torch.ops.tyir.layer_end(out, path)

    return forward


@contextlib.contextmanager
def layers_traced_once(model: torch.nn.Module, prefix: str = "") -> Iterator[None]:
    """Let equal layers of `model` be traced once.  The model is as before afterwards.

    `prefix`: what stands before its modules' paths when it is a part of what is exported.
    """
    kinds, numbers = _Kinds(), dict[torch.nn.Module, Any]()
    layers = [(path, layer, _structure(layer)) for path, layer in decoder_layers(model)]
    known = [(path, layer, structure) for path, layer, structure in layers if structure is not None]
    for _, layer, _ in known:
        for module in layer.modules():
            if _NUMBER in module.__dict__:
                numbers[module] = module.__dict__.pop(_NUMBER)
    with contextlib.ExitStack() as undo:
        undo.callback(lambda: [m.__dict__.update({_NUMBER: number}) for m, number in numbers.items()])
        for kind in {type(module) for module in numbers}:
            undo.callback(_restoring(kind, _NUMBER))
            setattr(kind, _NUMBER, _numbered(kinds, numbers))
        for path, layer, structure in known:
            undo.callback(_restoring(layer, "forward"))
            layer.__dict__["forward"] = _reusing(kinds, layer, structure, prefix + path)
        yield


def _restoring(owner: Any, name: str) -> Callable[[], None]:
    """What gives an object or a class back what it has of its own under a name, or that it has nothing."""
    had, own = name in owner.__dict__, owner.__dict__.get(name)

    def restore() -> None:
        if had:
            setattr(owner, name, own)
        else:
            delattr(owner, name)

    return restore


def decoder_layers(model: Any) -> list[tuple[str, Any]]:
    """Path and module of each entry of the longest list of modules: the decoder layers.  A list within
    another (norms of single heads) belongs to a layer.
    """
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.ModuleList)]
    outer = [(n, m) for n, m in lists if not any(n.startswith(f"{other}.") for other, _ in lists)]
    name, longest = max(outer, key=lambda item: len(item[1]), default=("", ()))
    return [(f"{name}.{i}", layer) for i, layer in enumerate(longest)]


def _structure(layer: torch.nn.Module) -> object | None:
    """What a trace can see of a layer beside its arguments; None when it holds buffers, whose values are not
    known here.
    """
    if next(layer.buffers(), None) is not None:
        return None
    return [
        (
            path,
            type(module),
            [(n, tuple(p.shape), p.dtype) for n, p in module.named_parameters(recurse=False)],
            _attributes(module),
        )
        for path, module in layer.named_modules()
    ]


def _attributes(module: torch.nn.Module) -> list[tuple[str, object]]:
    """A module's own attributes: values of plain ones, identities of others."""
    own = {k: v for k, v in module.__dict__.items() if k not in _OF_EVERY_MODULE and k != _NUMBER}
    hooks = {k: bool(v) for k, v in module.__dict__.items() if k.endswith("_hooks") and v}
    return [*((k, _value(v)) for k, v in sorted(own.items())), *hooks.items()]


def _value(value: Any) -> object:
    if isinstance(value, _PLAIN):
        return (type(value), value)
    if isinstance(value, (list, tuple)):
        return (type(value), [_value(v) for v in value])
    if isinstance(value, functools.partial):  # made anew for each layer: an activation with its arguments
        return (functools.partial, id(value.func), _value(value.args), _value(sorted(value.keywords.items())))
    return id(value)

"""A transformers model of which one decoder layer is in memory at a time.

    model = StreamedModel(folder, window=512)
    hidden = model.embedded(ids)                       # [1, T, C], what enters the first layer
    for index in range(model.depth):
        tensors = model.tensors(index)                 # read from the checkpoint, f32
        hidden = model.run(index, tensors, hidden)
    logits = model.logits(hidden)

Of a model that sees pictures it is the language model, given text: what is in front of it is never run.

The model is built on torch's meta device; layers are called with the tensors of the moment.  What a layer is
called with beside the hidden state (rotary tables, masks) is what the model itself calls it with, recorded
once: all windows have the same length.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from tyir.diagnostics import Diagnostic, TyirError
from tyir.execution.weights import CheckpointReader
from tyir.frontends.dense_state import parameter_array
from tyir.frontends.huggingface import OpenedModel, open_model
from tyir.frontends.layer_reuse import decoder_layers
from tyir.frontends.torch_export import build_plain_model, freeze_rope, real_buffer
from tyir.frontends.vision.parts import LANGUAGE_MODEL, language_of

__all__ = ["LinearModule", "StreamedModel", "Tensors"]

Tensor = Any
Tensors = dict[str, Any]
_CHUNK: Final = 128  # tokens whose logits are held at once
_AT_ONCE: Final = 1 << 22  # values of a layer's widest linear that are held at once


class _Stop(Exception):
    """What was to be recorded is."""


class _Boundary(torch.nn.Module):  # type: ignore[misc]  # torch is not followed by the type check
    """Stands in a layer's place and tells what the layer would be called with."""

    def __init__(self, layer: torch.nn.Module, called: Callable[..., Tensor]) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # no submodule: its parameters are not the model's any more
        self.called = called

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["layer"], name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.called(hidden, args, kwargs)


@contextlib.contextmanager
def _gradients(wanted: bool) -> Iterator[None]:
    """A graph is made, or none; of attention by the kernel whose gradients are the same in every run."""
    with torch.set_grad_enabled(wanted), sdpa_kernel(SDPBackend.MATH) if wanted else contextlib.nullcontext():
        yield


class LinearModule:
    """A linear of a layer: its path in the layer, and how its weight lies ([K, N] in GPT-2's Conv1D)."""

    def __init__(self, path: str, module: torch.nn.Module) -> None:
        self.path, self.module = path, module
        self.turned = type(module).__name__ == "Conv1D"
        shape = tuple(module.weight.shape)
        self.shape: tuple[int, int] = (shape[1], shape[0]) if self.turned else shape

    @property
    def weight_name(self) -> str:
        return f"{self.path}.weight"

    def weight(self, tensors: Tensors) -> Tensor:
        """The weight [N, K] among a layer's tensors."""
        weight = tensors[self.weight_name]
        return weight.T if self.turned else weight

    def stored(self, weight: Tensor) -> Tensor:
        """A weight [N, K] as the module holds it."""
        return weight.T.contiguous() if self.turned else weight


class StreamedModel:
    """See the module's docstring.  `TyirError` for a folder that is not a model's."""

    def __init__(
        self,
        folder: Path,
        window: int,
        device: str = "cpu",
        note: Callable[[Diagnostic], None] | None = None,
        base: Path | None = None,
    ) -> None:
        self.folder, self.window, self.device = folder, window, device
        self.opened: OpenedModel = open_model(folder, "f32", note, base=base)
        self._reader = CheckpointReader(self.opened.checkpoint.folder)
        with torch.device("meta"):
            self.model = build_plain_model(folder, base=base)
        self.model.requires_grad_(False)
        # one kernel in place of scores, mask and softmax one after another; it knows no capped scores
        config = self.model.config.get_text_config()
        if self.model._supports_sdpa and not getattr(config, "attn_logit_softcapping", None):
            self.model.set_attn_implementation("sdpa")
        limit = getattr(config, "max_position_embeddings", None)
        if isinstance(limit, int) and window > limit:
            raise TyirError(
                f"windows of {window} tokens, the model has {limit} positions", help=f"use --window {limit}"
            )
        freeze_rope(self.model, None)
        self._inside = ""  # of a model that sees pictures only this is ever run, and the head
        if self.opened.meta.sees:
            language_of(self.model)
            self._inside = f"{LANGUAGE_MODEL}."
        found = decoder_layers(self.model.get_submodule(self._inside.rstrip(".")))
        self.paths = [self._inside + path for path, _ in found]
        self.layers = [layer for _, layer in found]
        self.depth = len(found)
        self._state = set(self.model.state_dict())
        self._calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._entered: Tensor = None
        self._leaving: Tensor = None
        self._outer: Tensors | None = None
        owner = self.model.get_submodule(self.paths[0].rpartition(".")[0])
        for index, layer in enumerate(self.layers):
            owner[index] = _Boundary(layer, self._hook(index))

    # ------------------------------------------------------------------------------------------- tensors

    def _tensor(self, name: str) -> Tensor:
        """A parameter, or a buffer that follows from the config."""
        if name not in self._state:
            return torch.tensor(real_buffer(self.opened.meta, name), device=self.device)
        array = parameter_array(self.opened.weights, name, self._reader)
        # what was converted is held once; what the file holds as it is is not written to
        tensor = torch.from_numpy(np.require(array, requirements=("C", "W")))
        return tensor.to(self.device)

    def tensors(self, index: int) -> Tensors:
        """All parameters and buffers of a layer, by their names in it."""
        layer = self.layers[index]
        names = [n for n, _ in layer.named_parameters()] + [n for n, _ in layer.named_buffers()]
        found = {name: self._tensor(f"{self.paths[index]}.{name}") for name in names}
        self._reader.give_back()
        return found

    def linears(self, index: int) -> list[LinearModule]:
        """The linears of a layer in the order of its modules."""
        return [
            LinearModule(path, module)
            for path, module in self.layers[index].named_modules()
            if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
        ]

    @property
    def layer_weights(self) -> int:
        """How many weights the linears of the first layer have."""
        return sum(n * k for n, k in (linear.shape for linear in self.linears(0)))

    @property
    def head_weights(self) -> int:
        """How many weights make logits."""
        head = self.model.get_output_embeddings()
        return 0 if head is None else int(head.weight.numel())

    def _around(self, without: torch.nn.Module) -> Tensors:
        """What lies outside of the layers, except one module."""
        skipped = {id(p) for p in without.parameters()} if without is not None else set()
        head = self.model.get_output_embeddings()
        named = [*self.model.named_parameters(), *self.model.named_buffers()]  # tied ones once
        inside = {
            name: tensor
            for name, tensor in named
            if name.startswith(self._inside) or (head is not None and tensor is head.weight)
        }
        return {name: self._tensor(name) for name, tensor in inside.items() if id(tensor) not in skipped}

    # --------------------------------------------------------------------------------------------- calls

    def _hook(self, index: int) -> Callable[..., Tensor]:
        def called(hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            if self._leaving is not None:
                return self._leaving
            if index == 0:
                self._entered = hidden
            if index in self._calls:
                raise _Stop
            self._calls[index] = (args, kwargs)
            if index == self.depth - 1:
                raise _Stop
            return hidden

        return called

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def embedded(self, ids: Tensor) -> Tensor:
        """What enters the first layer [S, T, C] for windows of tokens [S, T]."""
        head = self.model.get_output_embeddings()
        tied = head is not None and head.weight is self.model.get_input_embeddings().weight
        outer = self._around(None if tied else head)
        parts = []
        for window in ids.to(self.device):
            with contextlib.suppress(_Stop):
                functional_call(self.model, outer, (window[None],), {"use_cache": False})
            parts.append(self._entered[0])
        return torch.stack(parts)

    def run(self, index: int, tensors: Tensors, hidden: Tensor) -> Tensor:
        """What leaves a layer [B, T, C]; needs `embedded` to have been called.  With a graph of what was
        computed if `hidden` requires gradients.
        """
        args, kwargs = self._calls[index]
        with _gradients(hidden.requires_grad):
            result = functional_call(self.layers[index], tensors, (hidden, *args), kwargs)
        return result[0] if isinstance(result, tuple) else result

    def batches(self, count: int) -> list[slice]:
        """So many windows in parts that go through a layer at once."""
        widest = max(size for linear in self.linears(0) for size in linear.shape)
        most = max(1, _AT_ONCE // (widest * self.window))
        return [slice(start, min(start + most, count)) for start in range(0, count, most)]

    def advance(self, index: int, tensors: Tensors, states: Tensor) -> None:
        """Take windows [S, T, C] through a layer, in place."""
        for windows in self.batches(len(states)):
            states[windows] = self.run(index, tensors, states[windows])

    @contextlib.contextmanager
    def finishing(self) -> Iterator[Callable[[Tensor], Iterator[Tensor]]]:
        """`logits(hidden)` of one window [T, C]: the logits [t, V] of some tokens at a time, with a graph if
        `hidden` requires gradients.
        """
        embedding = self.model.get_input_embeddings()
        head = self.model.get_output_embeddings()
        tied = head is not None and head.weight is embedding.weight
        outer = self._around(None if tied else embedding)

        def logits(hidden: Tensor) -> Iterator[Tensor]:
            for start in range(0, len(hidden), _CHUNK):
                with _gradients(hidden.requires_grad):
                    part = hidden[None, start : start + _CHUNK]
                    self._leaving = part
                    try:
                        result = functional_call(
                            self.model, outer, (), {"inputs_embeds": part, "use_cache": False}
                        )
                        of_part = result.logits[0]
                    finally:
                        self._leaving = None
                yield of_part

        yield logits

"""What the model's loss on the calibration text says of every linear's output.

With g the gradient of the loss with respect to what a linear gives for a token, an error e in it changes the
loss by g e + c |e|^2 / 2 or so: c, the mean of g^2 over the outputs, stands for the Fisher information, which
is the loss's curvature in expectation (the weights of GuidedQuant, Kim et al., arXiv 2505.07004).  g is not
zero on a text that the model was not trained on: among roundings of equal error those which lower the loss
are better.  Each linear would make a whole Newton step, as if it were the only one; all of them together must
not, so a linear's g counts by one over the number of linears.

One pass forwards and one backwards, a layer in memory at a time, each layer's result in a file:

    OUT.search/entering_0003.safetensors    what enters a layer, while the pass goes forwards
    OUT.search/gradient_0003.safetensors    the loss's gradient with respect to what leaves it
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from tyir.diagnostics import TyirError
from tyir.tools.quantize.arithmetic import is_finite
from tyir.tools.quantize.streamed_model import LinearModule, StreamedModel, Tensors

__all__ = ["LossTerm", "gradient_file", "loss_terms", "read_state", "write_gradients"]

Tensor = Any
Write = Callable[[Path, Tensor], None]


@dataclass(frozen=True)
class LossTerm:
    """Of one linear [N, K]: how much each token counts [S, T], on average 1, and the gradient of the loss by
    the weight [N, K] on the same scale.
    """

    weights: Tensor
    gradient: Tensor


def gradient_file(folder: Path, index: int) -> Path:
    return folder / f"gradient_{index:04}.safetensors"


def _entering_file(folder: Path, index: int) -> Path:
    return folder / f"entering_{index:04}.safetensors"


def read_state(path: Path, device: str) -> Tensor:
    """The one tensor [S, T, C] of a file."""
    with safe_open(path, framework="pt", device=device) as file:
        return file.get_tensor("state")


def write_gradients(model: StreamedModel, windows: Tensor, folder: Path, write: Write) -> None:
    """Write every layer's gradient, of the loss summed over the tokens of windows [S, T].

    Goes on behind what `folder` has already; `write` makes a file appear when it is complete.
    """
    hidden = model.embedded(windows)
    if gradient_file(folder, 0).exists():
        return
    begun = [i for i in range(model.depth) if gradient_file(folder, i).exists()]
    if not begun:
        for index in range(model.depth):
            if not _entering_file(folder, index).exists():
                write(_entering_file(folder, index), hidden)
            if _entering_file(folder, index + 1).exists():
                hidden = read_state(_entering_file(folder, index + 1), model.device)
            else:
                model.advance(index, model.tensors(index), hidden)
        gradient = _of_the_loss(model, hidden, windows)
        write(gradient_file(folder, model.depth - 1), gradient)
        begun = [model.depth - 1]
    first = begun[0]
    gradient = read_state(gradient_file(folder, first), model.device)
    for index in range(first, 0, -1):
        entering = read_state(_entering_file(folder, index), model.device)
        tensors = model.tensors(index)
        for part in model.batches(len(entering)):
            leaf = entering[part].requires_grad_()
            left = model.run(index, tensors, leaf)
            (gradient[part],) = torch.autograd.grad(left, leaf, gradient[part])
        if not is_finite(gradient):
            raise TyirError(
                f"the loss's gradient before {model.paths[index]} is not finite",
                help="mend the checkpoint, or use --objective outputs",
            )
        write(gradient_file(folder, index - 1), gradient)
    for index in range(model.depth):
        _entering_file(folder, index).unlink(missing_ok=True)


def _of_the_loss(model: StreamedModel, hidden: Tensor, windows: Tensor) -> Tensor:
    """The gradient [S, T, C] with respect to what leaves the last layer."""
    found = torch.zeros_like(hidden)
    with model.finishing() as logits:
        for window, state, gradient in zip(windows.to(model.device), hidden, found, strict=True):
            leaf, start = state.clone().requires_grad_(), 0
            for part in logits(leaf):
                targets = window[start + 1 : start + 1 + len(part)]
                with torch.enable_grad():
                    loss = torch.nn.functional.cross_entropy(
                        part[: len(targets)].float(), targets, reduction="sum"
                    )
                gradient += torch.autograd.grad(loss, leaf)[0]
                start += len(part)
    return found


def loss_terms(
    model: StreamedModel,
    index: int,
    tensors: Tensors,
    linears: Sequence[LinearModule],
    entering: Tensor,
    gradient: Tensor,
) -> dict[str, LossTerm]:
    """The terms of a layer's linears by path, from what enters the layer [S, T, C] and the loss's gradient
    with respect to what leaves it.
    """
    weights = {linear.path: torch.empty(entering.shape[:2], device=model.device) for linear in linears}
    sums = {linear.path: torch.zeros(linear.shape, device=model.device) for linear in linears}
    for part in model.batches(len(entering)):
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def note(path: str, seen: dict[str, tuple[Tensor, Tensor]] = seen) -> Callable[..., None]:
            def hook(module: Any, args: Any, output: Any) -> None:
                seen[path] = (args[0].detach(), output)

            return hook

        handles = [linear.module.register_forward_hook(note(linear.path)) for linear in linears]
        try:
            left = model.run(index, tensors, entering[part].clone().requires_grad_())
        finally:
            for handle in handles:
                handle.remove()
        found = torch.autograd.grad(left, [y for _, y in seen.values()], gradient[part])
        for (path, (x, _)), g in zip(seen.items(), found, strict=True):
            weights[path][part] = g.square().mean(-1).reshape(weights[path][part].shape)
            sums[path].addmm_(g.reshape(-1, g.shape[-1]).T, x.reshape(-1, x.shape[-1]))
    terms = {}
    for path, weight in weights.items():
        mean = float(weight.mean()) or 1.0
        terms[path] = LossTerm(weight / mean, sums[path] / mean)
    return terms

"""Perplexity: exp of the mean negative log-likelihood of a text's tokens, in windows without overlap.

The first token of a window is not predicted by anything and is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tyir.diagnostics import TyirError
from tyir.process.progress import track
from tyir.tools.quantize.arithmetic import is_finite
from tyir.tools.quantize.by_rows import threads_for
from tyir.tools.quantize.streamed_model import StreamedModel, Tensors

__all__ = ["Perplexity", "artifact_perplexity", "model_perplexity", "window_losses"]

Tensor = Any
Change = Callable[[int, Tensors], Tensors]
"""(layer, its tensors) -> the tensors to compute with."""


@dataclass(frozen=True)
class Perplexity:
    value: float
    tokens: int


def _mean(total: float, count: int) -> Perplexity:
    return Perplexity(math.exp(total / count), count)


def _loss(logits: Tensor, targets: Tensor) -> float:
    """The summed negative log-likelihood of targets [t] under logits [t, V]."""
    total = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    return float(total.sum(dtype=torch.float64))


def model_perplexity(
    model: StreamedModel, windows: Tensor, change: Change | None = None, progress: bool = False
) -> Perplexity:
    """Of a model, on windows [S, T]; `change` puts other tensors in a layer's place."""
    losses = window_losses(model, windows, change, progress)
    return _mean(float(losses.sum()), windows.numel() - len(windows))


def window_losses(
    model: StreamedModel, windows: Tensor, change: Change | None = None, progress: bool = False
) -> Tensor:
    """The negative log-likelihood [S] of each of windows [S, T], summed over its tokens but the first, layer
    by layer; `change` puts other tensors in a layer's place.  `TyirError` names a layer whose values are not
    finite.
    """
    with threads_for(max(model.layer_weights, model.head_weights), windows.numel()):
        hidden = model.embedded(windows)
        for index in track(range(model.depth), "perplexity", "layer", show=progress):
            tensors = model.tensors(index)
            if change is not None:
                tensors = change(index, tensors)
            model.advance(index, tensors, hidden)
            if not is_finite(hidden):
                raise TyirError(
                    f"the values that leave {model.paths[index]} are not finite",
                    help="the checkpoint is damaged, or its weights do not fit the type they are stored in",
                )
        losses = torch.zeros(len(windows), dtype=torch.float64)
        with model.finishing() as logits:
            for number, (window, state) in enumerate(zip(windows.to(model.device), hidden, strict=True)):
                start = 0
                for part in logits(state):
                    targets = window[start + 1 : start + 1 + len(part)]
                    losses[number] += _loss(part[: len(targets)], targets)
                    start += len(part)
    return losses


def artifact_perplexity(folder: Path, windows: Tensor, progress: bool = False) -> Perplexity:
    """Of compiled artifacts, through their host engine; windows [S, T] must fit the cache.

    `TyirError` for programs that do not return logits of all tokens.
    """
    from tyir.runtime_sim.session.session import Session

    session = Session(folder, "host")
    if session.choices is not None:
        raise TyirError(
            f"{folder} returns tokens, not logits", help="compile it with --output logits for a perplexity"
        )
    session.manifest.need_every_row("a perplexity")
    if windows.shape[1] > session.capacity:
        raise TyirError(
            f"windows of {windows.shape[1]} tokens, the cache holds {session.capacity}",
            help=f"use --window {session.capacity}, or compile with a larger --max-kv",
        )
    total, count = 0.0, 0
    for window in track(list(windows), "perplexity", "window", show=progress):
        session.reset()
        logits = torch.from_numpy(session.feed(window.tolist()))
        total += _loss(logits[:-1], window[1:])
        count += len(window) - 1
    return _mean(total, count)

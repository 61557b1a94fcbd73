"""Dual chunk attention by its definition, for tests: a distance for every pair of positions, nothing rotated
in parts, nothing merged; and a Qwen2 model that uses it, for prompts of thousands of tokens.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

Array = npt.NDArray[Any]
_TILE = 256  # queries at a time: scores of all would not fit memory


@dataclass(frozen=True)
class Chunks:
    """Positions in chunks of `size - local`, up to `size`; `original`: what the temperature counts from."""

    size: int
    local: int
    original: int = 0

    @property
    def step(self) -> int:
        return self.size - self.local

    def query(self, gap: Array | int, position: Array) -> Array:
        """Where a query is rotated that sees keys of `gap` chunks before its own."""
        near = position % self.step
        far = np.minimum(near + self.step, self.size)
        last = min(2 * self.step - 1, self.size)
        return np.where(np.equal(gap, 0), near, np.where(np.equal(gap, 1), far, last))

    def distance(self, query: Array, key: Array) -> Array:
        """The relative position that query i sees of key j <= i."""
        gap = query // self.step - key // self.step
        return self.query(gap, query) - key % self.step

    def temperature(self, length: int) -> float:
        if not self.original:
            return 1.0
        return max(1.0, 0.1 * math.log(length / self.original) + 1.0) ** 2


def scores(q: Array, k: Array, chunks: Chunks, theta: float, length: int) -> Array:
    """q [t, H, D] with k [t, G, D], not rotated -> [H, t, t] in f64, -inf where j > i; pairs are turned by
    their distance.
    """
    t, heads, dim = q.shape
    group, half = heads // k.shape[1], dim // 2
    i, j = np.arange(t)[:, None], np.arange(t)[None, :]
    turn = np.exp(1j * chunks.distance(i, j)[..., None] * frequencies(dim, theta))
    scale = chunks.temperature(length) / math.sqrt(dim)
    found = np.empty((heads, t, t))
    for head in range(heads):
        x, y = (z[:, n, :half] + 1j * z[:, n, half:] for z, n in ((q, head), (k, head // group)))
        found[head] = np.where(j <= i, np.einsum("id,jd,ijd->ij", x, y.conj(), turn).real * scale, -np.inf)
    return found


def attention(q: Array, k: Array, v: Array, chunks: Chunks, theta: float, length: int) -> Array:
    """q [t, H, D], k and v [t, G, D], not rotated -> [t, H, D] in f64."""
    return np.stack(
        [
            softmax(own) @ v[:, head // (q.shape[1] // k.shape[1])]
            for head, own in enumerate(scores(q, k, chunks, theta, length))
        ],
        axis=1,
    )


def softmax(x: Array) -> Array:
    """Over the last axis."""
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))


def frequencies(dim: int, theta: float) -> npt.NDArray[np.float64]:
    return np.asarray(theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim))


def rotated(x: Array, positions: Array, theta: float) -> Array:
    """x [t, heads, D] turned by its positions, as halves."""
    angles = positions.astype(np.float64)[:, None, None] * frequencies(x.shape[-1], theta)
    cos, sin = np.cos(angles).astype(x.dtype), np.sin(angles).astype(x.dtype)
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class Model:
    """A Qwen2 checkpoint in f32; `chunks` None: plain rotary positions."""

    def __init__(self, folder: Path, chunks: Chunks | None) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.theta = self.config["rope_parameters"]["rope_theta"]
        self.chunks = chunks
        self.weights = {
            name.removeprefix("model."): array.astype(np.float32)
            for name, array in load_file(folder / "model.safetensors").items()
        }

    def logits(self, ids: list[int], last: int = 0) -> Array:
        """Of all tokens, or of the `last` ones."""
        config, w = self.config, self.weights
        heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
        x = w["embed_tokens.weight"][ids]
        for layer in range(config["num_hidden_layers"]):
            own = f"layers.{layer}."
            h = self._norm(x, own + "input_layernorm")
            q, k, v = (
                (h @ w[f"{own}self_attn.{n}_proj.weight"].T + w[f"{own}self_attn.{n}_proj.bias"]).reshape(
                    len(ids), count, -1
                )
                for n, count in (("q", heads), ("k", groups), ("v", groups))
            )
            mixed = self._attention(q, k, v).reshape(len(ids), -1)
            x = x + mixed @ w[own + "self_attn.o_proj.weight"].T
            h = self._norm(x, own + "post_attention_layernorm")
            gate, up = (h @ w[f"{own}mlp.{n}_proj.weight"].T for n in ("gate", "up"))
            x = x + (gate / (1 + np.exp(-gate)) * up) @ w[own + "mlp.down_proj.weight"].T
        return np.asarray(self._norm(x[-last:], "norm") @ w["embed_tokens.weight"].T)

    def _norm(self, x: Array, name: str) -> Array:
        mean = np.mean(x * x, axis=-1, keepdims=True)
        return np.asarray(x / np.sqrt(mean + self.config["rms_norm_eps"]) * self.weights[name + ".weight"])

    def _attention(self, q: Array, k: Array, v: Array) -> Array:
        t, heads, dim = q.shape
        group = heads // k.shape[1]
        chunks = self.chunks or Chunks(2 * t + 2, 1)
        step, out = chunks.step, np.empty_like(q)
        k = rotated(k, np.arange(t) % step, self.theta)
        scale = np.float32(chunks.temperature(t) / math.sqrt(dim))
        for chunk in range(-(-t // step)):
            for first in range(chunk * step, min((chunk + 1) * step, t), _TILE):
                rows = np.arange(first, min(first + _TILE, (chunk + 1) * step, t))
                ends = (0, max(chunk - 1, 0) * step, chunk * step, int(rows[-1]) + 1)
                turned = [rotated(q[rows], chunks.query(gap, rows), self.theta) * scale for gap in (2, 1, 0)]
                hidden = np.arange(ends[3])[None, :] > rows[:, None]
                for head in range(heads):
                    own = k[:, head // group]
                    scores = np.concatenate(
                        [x[:, head] @ own[a:b].T for x, a, b in zip(turned, ends, ends[1:])], axis=1
                    )
                    scores[hidden] = -np.inf
                    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
                    total = weights.sum(axis=1, keepdims=True)
                    out[rows, head] = weights @ v[: ends[3], head // group] / total
        return out


def copy_case(generator: np.random.Generator, distance: int, symbols: int = 256) -> list[int]:
    """A needle of 8 symbols, noise without them, and the needle again, `distance` tokens after it: a model
    that finds what it has seen gives the last four.
    """
    lead = int(generator.integers(96))
    order = generator.permutation(symbols)
    needle, others = order[:8], order[8:]
    noise = others[generator.integers(len(others), size=lead + distance - 8)]
    return [int(x) for x in np.concatenate([noise[:lead], needle, noise[lead:], needle])]

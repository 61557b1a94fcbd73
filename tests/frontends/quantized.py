"""Quantised checkpoints for tests, written and read from the formats' descriptions alone: nothing here comes
from the front end.

Sources: AutoAWQ (awq/utils/packing_utils.py), GPTQModel (README, "gptq" and "gptq_v2"), compressed-tensors
(pack_quantized.py).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Groups:
    """q [N, K] and zeros [N, K/g] in 0..15, scales [N, K/g] f16."""

    q: Array
    zeros: Array
    scales: Array

    def dense(self) -> Array:
        """f16((q - z) s)."""
        g = self.q.shape[1] // self.scales.shape[1]
        wide = (self.q.astype(np.float32) - np.repeat(self.zeros, g, 1).astype(np.float32)) * np.repeat(
            self.scales, g, 1
        ).astype(np.float32)
        return wide.astype(np.float16)


def quantize(w: Array, group: int, symmetric: bool) -> Groups:
    """Round to nearest; symmetric: zero point 8."""
    n, k = w.shape
    blocks = w.astype(np.float32).reshape(n, k // group, group)
    if symmetric:
        scales = (np.abs(blocks).max(2) / 7).astype(np.float16)
        zeros = np.full(scales.shape, 8)
    else:
        scales = ((blocks.max(2) - blocks.min(2)) / 15).astype(np.float16)
        zeros = np.clip(np.rint(-blocks.min(2) / scales.astype(np.float32)), 0, 15).astype(int)
    q = np.clip(np.rint(blocks / scales.astype(np.float32)[:, :, None]) + zeros[:, :, None], 0, 15).astype(
        int
    )
    return Groups(q.reshape(n, k), zeros, scales)


def _words(nibbles: Array) -> Array:
    """[..., 8] nibbles, lowest first, to int32."""
    total = sum(nibbles[..., i].astype(np.uint64) << np.uint64(4 * i) for i in range(8))
    return np.asarray(total, np.uint64).astype(np.uint32).view(np.int32)


def _pack_rows(x: Array, order: tuple[int, ...]) -> Array:
    """[A, 8 B] -> [A, B]; nibble i holds column order[i] of each eight; padded with zeros."""
    padded = np.pad(x, ((0, 0), (0, -x.shape[1] % 8)))
    return _words(padded.reshape(x.shape[0], -1, 8)[..., list(order)])


NATURAL, AWQ = tuple(range(8)), (0, 2, 4, 6, 1, 3, 5, 7)


def awq(g: Groups) -> dict[str, Array]:
    return {
        "qweight": _pack_rows(g.q.T, AWQ),
        "qzeros": _pack_rows(g.zeros.T, AWQ),
        "scales": g.scales.T.copy(),
    }


def gptq(g: Groups, version: int) -> dict[str, Array]:
    k = g.q.shape[1]
    return {
        "qweight": _pack_rows(g.q, NATURAL).T.copy(),
        "qzeros": _pack_rows((g.zeros.T - (version == 1)) % 16, NATURAL),
        "scales": g.scales.T.copy(),
        "g_idx": (np.arange(k) // (k // g.scales.shape[1])).astype(np.int32),
    }


def compressed(g: Groups, symmetric: bool) -> dict[str, Array]:
    parts = {
        "weight_packed": _pack_rows(g.q, NATURAL),
        "weight_scale": g.scales,
        "weight_shape": np.array(g.q.shape, np.int64),
    }
    return parts if symmetric else {**parts, "weight_zero_point": _pack_rows(g.zeros.T, NATURAL).T.copy()}


# ------------------------------------------------------------------------------ unpackers, element by element


def nibble(word: int, i: int) -> int:
    return (int(word) & 0xFFFFFFFF) >> (4 * i) & 15


def unpack_awq(t: dict[str, Array], n: int, k: int) -> Array:
    where, g = (0, 4, 1, 5, 2, 6, 3, 7), k // t["scales"].shape[0]
    out = np.empty((n, k), np.float16)
    for row in range(k):
        for column in range(n):
            i = where[column % 8]
            q, z = nibble(t["qweight"][row, column // 8], i), nibble(t["qzeros"][row // g, column // 8], i)
            out[column, row] = np.float16(np.float32(q - z) * np.float32(t["scales"][row // g, column]))
    return out


def unpack_gptq(t: dict[str, Array], n: int, k: int, version: int) -> Array:
    out = np.empty((n, k), np.float16)
    for row in range(k):
        g = int(t["g_idx"][row])
        for column in range(n):
            q, z = (
                nibble(t["qweight"][row // 8, column], row % 8),
                nibble(t["qzeros"][g, column // 8], column % 8),
            )
            out[column, row] = np.float16(
                np.float32(q - ((z + (version == 1)) & 15)) * np.float32(t["scales"][g, column])
            )
    return out


def unpack_compressed(t: dict[str, Array], n: int, k: int, groups: Array | None = None) -> Array:
    """`groups`: the group of each column, where groups are not ranges of columns."""
    g = k // t["weight_scale"].shape[1]
    of = np.arange(k) // g if groups is None else groups
    zeros = t.get("weight_zero_point")
    out = np.empty((n, k), np.float16)
    for row in range(n):
        for column in range(k):
            q = nibble(t["weight_packed"][row, column // 8], column % 8) - 8
            z = 0 if zeros is None else nibble(zeros[row // 8, of[column]], row % 8) - 8
            out[row, column] = np.float16(np.float32(q - z) * np.float32(t["weight_scale"][row, of[column]]))
    return out


# ------------------------------------------------------------------------------------------------ checkpoints


@dataclass(frozen=True)
class Kind:
    """A format: how groups are packed and unpacked, and what config.json says of it."""

    group: int | None
    symmetric: bool
    pack: Callable[[Groups], dict[str, Array]]
    unpack: Callable[[dict[str, Array], int, int], Array]
    config: dict[str, Any]
    head: bool = False


def _ct(symmetric: bool, strategy: str, group: int | None) -> dict[str, Any]:
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": symmetric,
        "strategy": strategy,
        "group_size": group,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
    }


def _awq_config(group: int) -> dict[str, Any]:
    return {
        "quant_method": "awq",
        "zero_point": True,
        "group_size": group,
        "bits": 4,
        "version": "gemm",
        "modules_to_not_convert": None,
    }


def _gptq_config(group: int, version: int) -> dict[str, Any]:
    form = "gptq" if version == 1 else "gptq_v2"
    return {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": group,
        "desc_act": False,
        "sym": False,
        "checkpoint_format": form,
    }


KINDS: dict[str, Kind] = {
    "awq": Kind(64, False, awq, unpack_awq, _awq_config(64)),
    "awq-head": Kind(32, False, awq, unpack_awq, _awq_config(32), head=True),
    # as GPTQModel writes AWQ: no zero points in the settings, 8 in the tensors
    "awq-symmetric": Kind(64, True, awq, unpack_awq, {**_awq_config(64), "zero_point": False}),
    "gptq": Kind(
        32, False, lambda g: gptq(g, 1), lambda t, n, k: unpack_gptq(t, n, k, 1), _gptq_config(32, 1)
    ),
    "gptq_v2": Kind(
        64, True, lambda g: gptq(g, 2), lambda t, n, k: unpack_gptq(t, n, k, 2), _gptq_config(64, 2)
    ),
    "ct-group": Kind(64, False, lambda g: compressed(g, False), unpack_compressed, _ct(False, "group", 64)),
    "ct-symmetric": Kind(32, True, lambda g: compressed(g, True), unpack_compressed, _ct(True, "group", 32)),
    "ct-channel": Kind(
        None, True, lambda g: compressed(g, True), unpack_compressed, _ct(True, "channel", None)
    ),
}


def write_quantized(source: Path, target: Path, kind: Kind) -> dict[str, dict[str, Array]]:
    """`source` (one safetensors file, numpy dtypes) with its projections quantised, as `target`; the stored
    tensors by parameter name.
    """
    from safetensors.numpy import load_file, save_file

    shutil.copytree(source, target)
    tensors, stored = load_file(source / "model.safetensors"), {}
    if kind.head and "lm_head.weight" not in tensors:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    for name in list(tensors):
        module = name.removesuffix(".weight")
        if "visual" in module:
            continue  # quantisers leave a vision tower as it is
        if (module.endswith(PROJECTIONS) and name.endswith(".weight")) or (kind.head and module == "lm_head"):
            w = tensors.pop(name)
            parts = kind.pack(quantize(w, kind.group or w.shape[1], kind.symmetric))
            stored[name] = parts
            tensors.update({f"{module}.{part}": np.ascontiguousarray(array) for part, array in parts.items()})
    save_file(tensors, target / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = kind.config
    config["tie_word_embeddings"] = config["tie_word_embeddings"] and not kind.head
    (target / "config.json").write_text(json.dumps(config))
    return stored

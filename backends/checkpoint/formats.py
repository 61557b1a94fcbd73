"""How the three formats of 4-bit checkpoints store q, scales and zero points, and announce it in config.json.

All come from the same numbers: q and zeros 0..15, W[n, k] = (q[n, k] - zeros[n, k // g]) * scales[n, k // g].
Sources: AutoAWQ's WQLinear_GEMM, GPTQModel's README (gptq and gptq_v2), compressed-tensors' pack_to_int32.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from tyir.dialects.quant import AWQ_ORDER, pack_words

__all__ = ["FORMATS", "CheckpointFormat", "Quantization", "Stored"]

Array = npt.NDArray[Any]
Stored = Mapping[str, tuple[str, tuple[int, ...]]]  # dtype as safetensors calls it, and shape
_PER_WORD: Final = 8


@dataclass(frozen=True)
class Quantization:
    """What a checkpoint says of itself: `kept` are the module paths of linears that are not quantised,
    `apart` those of modules of which nothing is (a vision tower).
    """

    group_size: int
    symmetric: bool
    kept: tuple[str, ...]
    lm_head: bool
    apart: tuple[str, ...] = ()


class CheckpointFormat(Protocol):
    """One way of storing quantised linears."""

    def problem(self, n: int, k: int) -> str | None:
        """Why a weight [n, k] cannot be stored, or None."""

    def stored(self, n: int, k: int, quantization: Quantization) -> Stored:
        """What follows the module path in the names of its tensors, in their order."""

    def tensors(self, q: Array, scales: Array, zeros: Array) -> dict[str, Array]:
        """The tensors of q [n, k], scales and zeros [n, k / g]; more than `stored` names may be there."""

    def config(self, quantization: Quantization) -> dict[str, Any]:
        """`quantization_config` of config.json."""


def _words(count: int) -> int:
    return -(-count // _PER_WORD)


@dataclass(frozen=True)
class _Awq:
    """AutoAWQ GEMM.  Symmetric weights have zero points of 8: `zero_point` false means kernels of another
    kind to its readers.
    """

    def problem(self, n: int, k: int) -> str | None:
        if n % _PER_WORD:
            return f"{n} output channels, which AutoAWQ's layout packs by {_PER_WORD}"
        return None

    def stored(self, n: int, k: int, quantization: Quantization) -> Stored:
        groups = k // quantization.group_size
        return {
            "qweight": ("I32", (k, n // _PER_WORD)),
            "qzeros": ("I32", (groups, n // _PER_WORD)),
            "scales": ("F16", (groups, n)),
        }

    def tensors(self, q: Array, scales: Array, zeros: Array) -> dict[str, Array]:
        return {
            "qweight": pack_words(q.T, 1, AWQ_ORDER),
            "qzeros": pack_words(zeros.T, 1, AWQ_ORDER),
            "scales": scales.T,
        }

    def config(self, quantization: Quantization) -> dict[str, Any]:
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": quantization.group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": [*quantization.apart, *quantization.kept] or None,
            **({"lm_head": True} if quantization.lm_head else {}),
        }


@dataclass(frozen=True)
class _Gptq:
    """GPTQ without reordering.  Version 1 stores zero points less 1, which has no room for 0: only symmetric
    weights are written so, others as version 2.
    """

    def problem(self, n: int, k: int) -> str | None:
        if n % _PER_WORD or k % _PER_WORD:
            return f"{n} output and {k} input channels, both of which GPTQ's layout packs by {_PER_WORD}"
        return None

    def stored(self, n: int, k: int, quantization: Quantization) -> Stored:
        groups = k // quantization.group_size
        return {
            "qweight": ("I32", (k // _PER_WORD, n)),
            "qzeros": ("I32", (groups, n // _PER_WORD)),
            "scales": ("F16", (groups, n)),
            "g_idx": ("I32", (k,)),
        }

    def tensors(self, q: Array, scales: Array, zeros: Array) -> dict[str, Array]:
        groups, k = scales.shape[1], q.shape[1]
        symmetric = bool((zeros == 8).all())
        return {
            "qweight": pack_words(q.T, 0),
            "qzeros": pack_words((zeros.T - np.uint8(1)) & 15 if symmetric else zeros.T, 1),
            "scales": scales.T,
            "g_idx": (np.arange(k) // (k // groups)).astype(np.int32),
        }

    def config(self, quantization: Quantization) -> dict[str, Any]:
        kept: dict[str, dict[str, Any]] = {
            **{rf"-:^{re.escape(path)}\.": {} for path in quantization.apart},
            **{f"-:^{re.escape(path)}$": {} for path in quantization.kept},
        }
        return {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": quantization.group_size,
            "desc_act": False,
            "sym": quantization.symmetric,
            "checkpoint_format": "gptq" if quantization.symmetric else "gptq_v2",
            "lm_head": quantization.lm_head,
            **({"dynamic": kept} if kept else {}),
        }


@dataclass(frozen=True)
class _CompressedTensors:
    """compressed-tensors' pack-quantized: signed numbers, stored with 8 added, which are q again."""

    def problem(self, n: int, k: int) -> str | None:
        return None

    def stored(self, n: int, k: int, quantization: Quantization) -> Stored:
        groups = k // quantization.group_size
        zeros: Stored = {} if quantization.symmetric else {"weight_zero_point": ("I32", (_words(n), groups))}
        return {
            "weight_packed": ("I32", (n, _words(k))),
            "weight_scale": ("F16", (n, groups)),
            **zeros,
            "weight_shape": ("I64", (2,)),
        }

    def tensors(self, q: Array, scales: Array, zeros: Array) -> dict[str, Array]:
        return {
            "weight_packed": pack_words(q, 1),
            "weight_scale": scales,
            "weight_zero_point": pack_words(zeros, 0),
            "weight_shape": np.array(q.shape, np.int64),
        }

    def config(self, quantization: Quantization) -> dict[str, Any]:
        weights = {
            "num_bits": 4,
            "type": "int",
            "symmetric": quantization.symmetric,
            "strategy": "group",
            "group_size": quantization.group_size,
            "dynamic": False,
            "actorder": None,
        }
        head = () if quantization.lm_head else ("lm_head",)
        apart = [rf"re:^{re.escape(path)}\..*" for path in quantization.apart]
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": weights,
                    "input_activations": None,
                    "output_activations": None,
                }
            },
            "ignore": [*head, *apart, *(path for path in quantization.kept if path not in head)],
            "kv_cache_scheme": None,
            # compressed-tensors 0.20 prepares unpacked zero points for its packed ones, its own files' too;
            # transformers de-quantises while it loads instead, where it is told so
            **({} if quantization.symmetric else {"dequantize": True}),
        }


FORMATS: Final[Mapping[str, CheckpointFormat]] = {
    "awq": _Awq(),
    "gptq": _Gptq(),
    "compressed-tensors": _CompressedTensors(),
}

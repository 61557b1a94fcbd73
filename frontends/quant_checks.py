"""The quantisation a config states against the tensors that are there.

The tensors decide; what the config says otherwise is reported.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from tyir.diagnostics import Diagnostic
from tyir.dialects.ty.tensors import bf16_to_f32
from tyir.frontends.quant_formats import AwqFormat, CompressedTensorsFormat, GptqFormat
from tyir.frontends.weights import TensorReader, Weights
from tyir.types import Type, bf16, f16, i32

__all__ = ["quantization_contradictions"]

_PACKED_ENDINGS = (".qweight", ".weight_packed")


def quantization_contradictions(weights: Weights, note: Callable[[Diagnostic], None]) -> Iterator[Diagnostic]:
    """Contradictions: errors when nothing can be read as stated, notes when tensors and lists of names merely
    disagree.
    """
    tensors, where = weights.checkpoint.tensors, str(weights.checkpoint.folder / "config.json")
    formats = [f for f in weights.formats if isinstance(f, (AwqFormat, GptqFormat, CompressedTensorsFormat))]
    packed = [name for name in tensors if name.endswith(_PACKED_ENDINGS)]
    if packed and not formats:
        message = (
            f"{len(packed)} tensors are quantised ('{packed[0]}'), but config.json has no quantization_config"
        )
        yield Diagnostic(
            message,
            where=where,
            help=(
                "restore the config.json that came with these weights: the tensors alone do not say how to"
                " read them"
            ),
        )
    _note_rounding(weights, note)
    for weight_format in formats:
        _note_scattered(weights, weight_format, note)
        if isinstance(weight_format, GptqFormat) and weight_format.config.zero_shift:
            _note_wrapping_zeros(weights, note)
        own = [name for name in packed if name.endswith(f".{weight_format.packed}")]
        if not own:
            message = (
                f"config.json says the weights are quantised ({weight_format.config.method}), but no"
                " tensor is"
            )
            yield Diagnostic(
                message,
                where=where,
                help="remove quantization_config from config.json if these are the unquantised weights",
            )
        modules = {n: n.rpartition(".")[0] for n in own}
        excluded = [
            n
            for n, module in modules.items()
            if weights.canonical(f"{module}.weight") == f"{module}.weight"  # not a tied one stored once more
            and _is_excluded(module, weight_format)
        ]
        if excluded:
            message = (
                f"{len(excluded)} tensors are quantised although config.json excludes them (first"
                f" '{excluded[0]}'); the tensors decide"
            )
            note(Diagnostic(message, severity="warning", where=where))
        plain = (
            []
            if not own
            else [
                n
                for n in weights.shapes
                if n.endswith("_proj.weight")
                and n in tensors
                and not _is_excluded(n.removesuffix(".weight"), weight_format)
            ]
        )
        if plain:
            message = (
                f"{len(plain)} linears are not quantised although config.json does not exclude them (first"
                f" '{plain[0]}'); the tensors decide"
            )
            note(Diagnostic(message, severity="warning", where=where))


def _note_scattered(
    weights: Weights,
    weight_format: AwqFormat | GptqFormat | CompressedTensorsFormat,
    note: Callable[[Diagnostic], None],
) -> None:
    """Dies and kernels take groups that are ranges of input channels; other weights are computed densely."""
    tensors, ending = weights.checkpoint.tensors, f".{weight_format.index}"
    bases = [
        n.removesuffix(ending) for n, t in tensors.items() if n.endswith(ending) and len(t.type.dims) == 1
    ]
    scattered = [base for base in bases if weight_format.scattered(base, tensors)]
    if scattered:
        message = (
            f"{len(scattered)} linears are quantised in order of activations (desc_act, actorder; first"
            f" '{scattered[0]}'): their values are taken exactly, as fp16; --weights int4 groups them anew"
        )
        note(Diagnostic(message, severity="warning", where=str(weights.checkpoint.folder)))


def _note_rounding(weights: Weights, note: Callable[[Diagnostic], None]) -> None:
    """Scales are f16 in the IR and on the chip: others are rounded, which libraries that compute in the
    scales' own type do not do.
    """
    tensors = weights.checkpoint.tensors
    wide = [
        n for n in tensors if n.endswith((".scales", ".weight_scale")) and tensors[n].type.element is not f16
    ]
    if wide:
        kinds = " and ".join(sorted({str(tensors[n].type.element) for n in wide}))
        message = f"{len(wide)} tensors of scales are {kinds} and are rounded to f16 (first '{wide[0]}')"
        note(Diagnostic(message, severity="warning", where=str(weights.checkpoint.folder)))
    read = TensorReader(weights.checkpoint.folder)
    lost = [n for n in wide if _vanishes(read(tensors[n]), tensors[n].type.element)]
    if lost:
        message = (
            f"{len(lost)} tensors of scales hold values that are 0 in f16, whose smallest is 6e-08: their"
            f" groups become 0 (first '{lost[0]}')"
        )
        note(Diagnostic(message, severity="warning", where=str(weights.checkpoint.folder)))


def _vanishes(scales: npt.NDArray[Any], element: Type) -> bool:
    """Whether a scale that is not 0 becomes 0 in f16."""
    wide = bf16_to_f32(scales) if element is bf16 else scales
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):  # what is too large is refused later
        return bool(((wide != 0) & (wide.astype(np.float16) == 0)).any())


def _note_wrapping_zeros(weights: Weights, note: Callable[[Diagnostic], None]) -> None:
    """GPTQ v1 stores zero - 1 in 4 bits.

    A stored 15 means 0 to kernels that add within 4 bits (AutoGPTQ's) and 16 to those that do not
    (exllama's).
    """
    tensors, read = weights.checkpoint.tensors, TensorReader(weights.checkpoint.folder)
    wrapping = []
    for name in (n for n, stored in tensors.items() if n.endswith(".qzeros") and stored.type.element is i32):
        words = np.ascontiguousarray(read(tensors[name])).view(np.uint32)
        if (words & words >> 1 & words >> 2 & words >> 3 & np.uint32(0x11111111)).any():
            wrapping.append(name)
    if wrapping:
        message = (
            f"{len(wrapping)} tensors hold stored zero points of 15 (first '{wrapping[0]}'), read as 0: 15 +"
            " 1 within 4 bits, as AutoGPTQ does"
        )
        note(Diagnostic(message, severity="warning", where=str(weights.checkpoint.folder)))


def _is_excluded(module: str, weight_format: AwqFormat | GptqFormat | CompressedTensorsFormat) -> bool:
    """Whether the config's list names the module: by substring for AWQ and GPTQ, by name, last part or
    regular expression ("re:...") for compressed-tensors.
    """
    names = weight_format.config.excluded
    if isinstance(weight_format, CompressedTensorsFormat):
        return any(
            _matches(name[3:], module)
            if name.startswith("re:")
            else module == name or module.endswith(f".{name}")
            for name in names
        )
    return any(name in module for name in names)


def _matches(pattern: str, module: str) -> bool:
    try:
        return re.match(pattern, module) is not None
    except re.error:
        return False

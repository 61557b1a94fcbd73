"""GGUF files: tensors under Hugging Face's names, and the model's config from the metadata.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.  Read with the `gguf` package (extra
`gguf`), imported when a file is opened; no tensor is read.  A config.json beside the file is preferred to the
metadata.  A model may lie in several files, NAME-00001-of-0000N.gguf (llama.cpp's gguf-split).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any, Final

import numpy as np

from tyir.attributes import DenseElementsAttr
from tyir.diagnostics import Diagnostic, TyirError
from tyir.dialects import quant, ty
from tyir.dialects.quant import GGML_BLOCKS
from tyir.frontends.checkpoint import StoredTensor
from tyir.frontends.gguf.config import (
    ARCHITECTURES,
    ROPE_FREQS,
    Architecture,
    config_of,
    head_count,
    parameter_name,
)
from tyir.frontends.gguf.header import gguf_header_problem
from tyir.frontends.quant_formats import emit_dequantized
from tyir.frontends.weights import Emit, PlainFormat, Weights
from tyir.ir import Value
from tyir.types import TensorType, Type, bf16, f16, f32, f64, ui8

__all__ = ["GgufFormat", "check_pieces", "gguf_model", "open_gguf", "read_gguf"]

_PLAIN: Final[dict[str, Type]] = {"F32": f32, "F16": f16, "BF16": bf16, "F64": f64}
_SPLIT: Final = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
# A file that was cut for a hub with a limit: model.gguf.part1of3, model.gguf-split-a, model.gguf.part-aa.
_PIECE: Final = re.compile(r"(.+\.gguf)[.-](?:part|split)[._-]?[0-9a-z]+", re.IGNORECASE)
_PART_KEYS: Final = ("split.count", "split.no")
_TWICE: Final = "lie in the files more than once"
_OUTSIDE: Final = "lie outside the file: it is incomplete"
_NOT_BLOCKS: Final = "are not matrices of whole blocks"
# Types of llama.cpp's past: the quantisers that wrote them are gone, so no release of the package reads them.
_REMOVED: Final = {
    4: "Q4_2",
    5: "Q4_3",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}
_NOT_A_MODEL: Final = "mmproj"  # how llama.cpp names the image encoder beside a language model


def gguf_model(path: Path) -> tuple[Path, ...]:
    """The files of the GGUF model that `path` is or that lies in folder `path`, in order; none when there is
    none.

    `TyirError` when a folder holds several models, or a part is missing, and for pieces of a file that are
    to be joined.
    """
    check_pieces(path)
    if path.is_dir():
        files = sorted(f for f in path.glob("*.gguf") if not f.name.startswith(_NOT_A_MODEL))
        models = dict.fromkeys(_first_part(f) for f in files)
        if len(models) > 1:
            names = ", ".join(f.name for f in list(models)[:5])
            raise TyirError(
                f"the folder holds {len(models)} GGUF files: {names}",
                where=str(path),
                help="give one of the files instead of the folder; parts of one model are named"
                " NAME-00001-of-00002.gguf and so on",
            )
        if not models:
            return ()
        path = next(iter(models))
    elif path.suffix != ".gguf" or not path.is_file():
        return ()
    match = _SPLIT.fullmatch(path.name)
    if match is None:
        return (path,)
    count = int(match[3])
    parts = [path.with_name(f"{match[1]}-{i + 1:05}-of-{match[3]}.gguf") for i in range(count)]
    missing = [p.name for p in parts if not p.is_file()]
    if missing:
        raise TyirError(
            f"{len(missing)} of the {count} files of this model are missing: {', '.join(missing[:5])}",
            where=str(path.parent),
            help="download them into the same folder",
        )
    return tuple(parts)


def check_pieces(path: Path) -> None:
    """`TyirError` for a piece of a file that was cut anywhere, and for a folder with nothing else: such have
    no headers of their own, unlike the parts that llama.cpp's gguf-split makes.
    """
    folder = path if path.is_dir() else path.parent
    match = None if path.is_dir() else _PIECE.fullmatch(path.name)
    if not folder.is_dir() or (match is None and (not path.is_dir() or any(path.glob("*.gguf")))):
        return
    found = [(m[1], f.name) for f in folder.iterdir() if (m := _PIECE.fullmatch(f.name)) and f.is_file()]
    whole = match[1] if match is not None else min((name for name, _ in found), default=None)
    pieces = [piece for name, piece in found if name == whole]
    if whole is None or not pieces:
        return
    pieces.sort(key=lambda name: [int(d) if d.isdecimal() else d for d in re.split(r"(\d+)", name)])
    raise TyirError(
        f"{path.name if match is not None else pieces[0]} is a piece of {whole}, which was cut into"
        f" {len(pieces)} that are here",
        where=str(path),
        help=f"join them: cat {' '.join(map(quote, pieces))} > {quote(whole)}",
    )


def _first_part(path: Path) -> Path:
    match = _SPLIT.fullmatch(path.name)
    return path if match is None else path.with_name(f"{match[1]}-00001-of-{match[3]}.gguf")


def read_gguf(
    files: Sequence[Path], *, needs_config: bool = True
) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """(config as config.json would have it, empty unless needed; tensors by transformers' names) of the files
    that `gguf_model` gives.

    `TyirError` holds everything that cannot be imported.
    """
    try:
        return _read(files, needs_config)
    except TyirError as error:
        raise TyirError(replace(d, where=d.where or str(files[0])) for d in error.diagnostics) from None


def _check_parts(files: Sequence[Path], fields: Sequence[Mapping[str, Any]]) -> None:
    """`TyirError` where a file says that it is a part of more files than were found beside it: their names
    tell the parts of a model, and somebody has changed them.
    """
    for path, own in zip(files, fields):
        count, number = (own[key].contents() if key in own else None for key in _PART_KEYS)
        if not isinstance(count, int) or not isinstance(number, int) or count in (0, len(files)):
            continue
        match = _SPLIT.fullmatch(path.name)
        name = match[1] if match is not None else path.stem
        raise TyirError(
            f"{path.name} is part {number + 1} of a model in {count} files",
            where=str(path.parent),
            help="put all parts into one folder, named as they were:"
            f" {name}-00001-of-{count:05}.gguf and so on",
        )


def _read(files: Sequence[Path], needs_config: bool) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    readers = [open_gguf(path) for path in files]
    first = readers[0]
    fields = {
        name: value.contents()
        for name, value in first.fields.items()
        if not name.startswith("tokenizer.ggml.") or name.endswith("_token_id")
    }
    _check_parts(files, [reader.fields for reader in readers])
    name = fields.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise TyirError(
            f"{files[0].name} holds architecture {name!r}, which cannot be imported from GGUF",
            help=f"architectures: {', '.join(ARCHITECTURES)}; others import from safetensors",
        )
    wanted, found = fields.get("split.tensors.count"), sum(len(r.tensors) for r in readers)
    if wanted is not None and wanted != found:
        raise TyirError(
            f"the {len(files)} files of this model hold {found} tensors, the first one says {wanted!r}",
            help="the files are of different models; download them again",
        )
    tensors: dict[str, StoredTensor] = {}
    troubles: dict[str, list[str]] = {}
    row = ARCHITECTURES[name]
    for path, reader in zip(files, readers):
        for tensor in reader.tensors:
            stored = _stored(tensor, path)
            if isinstance(stored, StoredTensor):
                target, part = parameter_name(tensor.name, row)
                if target in tensors:
                    troubles.setdefault(_TWICE, []).append(tensor.name)
                tensors[target] = _converted(stored, part, row, name, fields)
            else:
                troubles.setdefault(stored, []).append(tensor.name)
    if troubles:
        raise TyirError(
            Diagnostic(f"{len(names)} tensors {what} (first '{names[0]}')", help=_cure(what))
            for what, names in troubles.items()
        )
    freqs = next((t for r in readers for t in r.tensors if t.name == ROPE_FREQS), None)
    tensors.pop(ROPE_FREQS, None)  # the config says how the frequencies are scaled
    if not needs_config:
        return {}, tensors
    table = tensors.get("model.embed_tokens.weight")
    config = config_of(
        name,
        fields,
        {t.name for r in readers for t in r.tensors},
        None if table is None else table.type.dims[0],
        None if freqs is None else np.asarray(freqs.data, np.float32).ravel(),
    )
    return config, tensors


def open_gguf(path: Path) -> Any:
    """A `gguf.GGUFReader` of a file; `TyirError` when it or the package cannot be used."""
    try:
        import gguf
    except ImportError:
        raise TyirError(f"{path.name} needs the gguf package", help="pip install 'tyir[gguf]'") from None
    try:
        if (problem := gguf_header_problem(path)) is not None:
            raise ValueError(problem)
        reader = gguf.GGUFReader(path)
    except Exception as error:
        text = next(iter(str(error).splitlines()), type(error).__name__)
        number = re.search(r"(\d+)\)? is not a valid GGMLQuantizationType", text)
        if number is not None and int(number[1]) in _REMOVED:
            kind = _REMOVED[int(number[1])]
            instead = "IQ4_NL" if kind.startswith("IQ") else "Q4_0"
            raise TyirError(
                f"{path.name} holds tensors of type {kind}, which llama.cpp has removed",
                where=str(path),
                help=f"take the file of type {instead} of the same model",
            ) from None
        if "GGMLQuantizationType" in text:
            raise TyirError(
                f"{path.name} holds a tensor type that the installed gguf package does not know: {text}",
                where=str(path),
                help="pip install --upgrade gguf; if that does not help, the file is damaged",
            ) from None
        raise TyirError(
            f"{path.name} is no GGUF file, or damaged: {text}",
            where=str(path),
            help="download the file again",
        ) from None
    if reader.byte_order == "S":  # values are mapped as they lie in the file
        raise TyirError(
            f"{path.name} is written in the other byte order than this machine's",
            where=str(path),
            help=f"rewrite it with the gguf package's own: gguf-convert-endian {path} {sys.byteorder}",
        )
    return reader


def _cure(trouble: str) -> str:
    """What to do about tensors that cannot be read."""
    if trouble in (_TWICE, _OUTSIDE):
        return "download the files again"
    if _NOT_BLOCKS in trouble:
        return (
            "only matrices may be quantised, in whole blocks of a row; make the file again with llama.cpp's"
            " llama-quantize, which leaves other tensors in F32"
        )
    types = ", ".join((*_PLAIN, *GGML_BLOCKS))
    return f"types that are read: {types}; make the file again with llama.cpp's llama-quantize"


def _stored(tensor: Any, path: Path) -> StoredTensor | str:
    """A tensor as it lies in the file, or what is wrong with it (equal for tensors with the same trouble)."""
    kind = tensor.tensor_type.name
    dims = tuple(int(d) for d in reversed(tensor.shape))  # GGUF writes the fastest dimension first
    offset, nbytes = int(tensor.data_offset), int(tensor.n_bytes)
    if kind in _PLAIN:
        type = TensorType(dims, _PLAIN[kind])
    elif kind in GGML_BLOCKS:
        elements, size = GGML_BLOCKS[kind]
        if len(dims) != 2 or dims[1] % elements:
            return f"of type {kind} {_NOT_BLOCKS} of {elements}, as {list(dims)} is not"
        type = TensorType((dims[0], dims[1] // elements * size), ui8)
    else:
        return f"have type {kind}, which cannot be imported"
    if type.nbytes != nbytes or offset + nbytes > path.stat().st_size:
        return _OUTSIDE
    return StoredTensor(tensor.name, path.name, type, offset, nbytes, kind if kind in GGML_BLOCKS else "")


def _converted(
    stored: StoredTensor, part: str, row: Architecture, name: str, fields: Mapping[str, Any]
) -> StoredTensor:
    """With what llama.cpp's converter has done to the values."""
    if row.norm_offset and stored.key.endswith("norm.weight"):
        return replace(stored, added=1)
    if not row.interleaved or part not in ("attn_q", "attn_k"):
        return stored
    return replace(stored, interleaved=head_count(name, fields, key_value=part == "attn_k"))


class GgufFormat:
    """GGUF's blocks, and what llama.cpp's converter does to values: rows of q and k with the two halves of a
    head interleaved, norms with 1 added.

    Q4_0 stays 4-bit, the other formats become dense.
    """

    def stored_keys(self, name: str, tensors: Mapping[str, StoredTensor]) -> tuple[str, ...]:
        stored = tensors.get(name)
        return (name,) if stored is not None and stored.converted else ()

    def problem(self, name: str, shape: tuple[int, ...], tensors: Mapping[str, StoredTensor]) -> str | None:
        stored = tensors[name]
        if not stored.encoding:
            return PlainFormat().problem(name, shape, tensors)
        elements, nbytes = GGML_BLOCKS[stored.encoding]
        rows, width = stored.type.static_shape
        found = (rows, width // nbytes * elements)
        if found != shape:
            return f"tensor '{name}' has shape {list(found)}, the config asks for {list(shape)}"
        return None

    def value(self, name: str, element: Type, weights: Weights, emit: Emit) -> Value:
        stored = weights.checkpoint.tensors[name]
        data = emit(weights.reference(name)).result
        if stored.added:
            return _cast(_less(_cast(data, f32, emit), stored.added, emit), element, emit)
        if not stored.encoding:
            return _deinterleaved(_cast(data, element, emit), stored.interleaved, emit)
        if stored.encoding != "Q4_0":
            out = emit(quant.GgmlDequantize(data, format=stored.encoding, element=element)).result
            return _deinterleaved(out, stored.interleaved, emit)
        blocks = emit(quant.GgmlQ40(data))
        q, scales = (_deinterleaved(v, stored.interleaved, emit) for v in blocks.results)
        return emit_dequantized(q, scales, None, GGML_BLOCKS["Q4_0"][0], element, emit)


def _cast(value: Value, element: Type, emit: Emit) -> Value:
    assert isinstance(value.type, TensorType)
    return value if value.type.element is element else emit(ty.Cast(value, element=element)).result


def _less(value: Value, amount: int, emit: Emit) -> Value:
    """An f32 value less a number."""
    assert isinstance(value.type, TensorType)
    number = DenseElementsAttr(np.float32(-amount).tobytes(), value.type)
    return emit(ty.Add(value, emit(ty.Constant(value=number)).result)).result


def _deinterleaved(value: Value, heads: int, emit: Emit) -> Value:
    """Rows (head, i, half) -> (head, half, i) of a matrix or a bias, for 0 heads the value itself."""
    assert isinstance(value.type, TensorType)
    if not heads:
        return value
    rows, *width = value.type.static_shape
    split = emit(ty.Reshape(value, shape=(heads, rows // heads // 2, 2, *width))).result
    perm = (0, 2, 1, 3)[: len(width) + 3]
    return emit(ty.Reshape(emit(ty.Transpose(split, perm=perm)).result, shape=(rows, *width))).result

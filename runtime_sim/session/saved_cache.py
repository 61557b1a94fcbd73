"""Key/value caches saved to files and restored from them.

numpy's .npz with the caches' used positions, the tokens they hold, and what they were computed with.

A file appears by rename, so a full disk or an interrupt leaves what was there before.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import os
import shutil
import struct
import tempfile
import tokenize
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tyir.artifacts.cache_layout import position_axis
from tyir.artifacts.consistency import cache_inputs, is_recall
from tyir.artifacts.dual_chunk import DualChunk
from tyir.diagnostics import TyirError
from tyir.execution.artifacts import Artifacts
from tyir.manifest import Manifest, TensorInfo
from tyir.process.files import open_regular, parse_json
from tyir.runtime_sim.session.program_engine import CacheName

__all__ = ["Kind", "identity_of", "read_cache", "saved_bytes", "write_cache"]

Array = npt.NDArray[Any]
_AGAIN: Final = "run the prompt again"
_MOST_HEADER: Final = 1 << 16  # bytes of an array besides its elements, and of what is no array
_OPTIONS: Final = ("dies", "pp", "batch", "max_kv", "kv_dtype", "kv_layout", "weights", "group_size")
_BLOCKS: Final = ("kv_parts", "kv_block")  # of caches that are cut by tokens


def identity_of(artifacts: Artifacts) -> dict[str, Any]:
    """What two artifact folders must have in common for one to use the caches of the other.

    The model, what decides how a cache is computed and laid out, and the hash of the weights as they were
    opened, whatever the manifest says of them.
    """
    manifest = artifacts.manifest
    params = [(name, artifacts.content(name)) for name in sorted(manifest.files) if name.endswith(".params")]
    names = _OPTIONS + (_BLOCKS if manifest.options.kv_parts > 1 else ())
    options = {name.replace("_", "-"): getattr(manifest.options, name) for name in names}
    return {
        "model": (
            f"{manifest.model.get('architecture', 'unknown')} of"
            f" {manifest.model.get('num_hidden_layers', '?')} layers"
        ),
        **options,
        "rotary positions": _positions(manifest),
        **_seen(manifest),
        "content of the weights": hashlib.sha256(repr(params).encode()).hexdigest()[:16],
    }


def _seen(manifest: Manifest) -> dict[str, str]:
    """What prompts see of themselves, where that is not all: keys and values depend on it."""
    choice = manifest.options.choice
    return {} if choice is None else {"sparse prefill": choice.text()}


def saved_bytes(manifest: Manifest, tokens: int) -> int:
    """What the caches of so many tokens take in a file, a few kilobytes aside."""
    return 8 * tokens + sum(
        math.prod(tensor.shape) * tensor.storage_dtype.itemsize
        for _, tensor in _expected(manifest, tokens).values()
    )


def _positions(manifest: Manifest) -> str:
    """What decides at which angles keys lie in the cache."""
    rope = json.dumps(manifest.model.get("rope_parameters"), sort_keys=True)
    chunks = DualChunk.used(manifest.model, manifest.options.max_kv)
    return rope if chunks is None else f"{rope} in chunks of {chunks.step} up to {chunks.chunk_size}"


def write_cache(
    path: Path,
    artifacts: Artifacts,
    tokens: Sequence[int],
    caches: Mapping[CacheName, Array],
    beside: Mapping[str, Array] | None = None,
) -> None:
    """Write the positions that hold `tokens`, and what else is to be known of them.

    `TyirError` when the file cannot be written; what was there then stays.
    """
    options, identity = artifacts.manifest.options, identity_of(artifacts)
    before = (slice(None),) * position_axis(options.kv_layout)
    arrays: dict[str, Any] = {
        f"die{die}/{name}": array[(*before, slice(options.cache_rows(die, len(tokens))))]
        for (die, name), array in caches.items()
        if not is_recall(name, options)
    }
    arrays |= {"tokens": np.array(tokens, np.int64), "identity": np.array(json.dumps(identity))}
    arrays |= beside or {}
    if path.exists() and not path.is_file():
        raise TyirError(f"cannot write the cache {path}: it is not a file", help="choose another file")
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        needed, free = sum(a.nbytes for a in arrays.values()), shutil.disk_usage(path.parent).free
        if needed > free:
            raise OSError(errno.ENOSPC, f"it takes {needed / 1e6:.1f} MB, and {free / 1e6:.1f} MB are free")
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(descriptor, "wb") as file:
            np.savez(file, **arrays)
        temporary.replace(path)
    except OSError as error:
        raise TyirError(
            f"cannot write the cache {path}: {error.strerror or error}",
            help="free some space or choose another file",
        ) from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


# Of an array beside the caches: its shape, None being one for each token, and its type.
Kind = tuple[tuple[int | None, ...], np.dtype[Any]]


def read_cache(
    path: Path, artifacts: Artifacts, beside: Mapping[str, Kind] | None = None
) -> tuple[list[int], dict[CacheName, Array], dict[str, Array]]:
    """The tokens and caches of a file that artifacts like these have saved, each cache at its full
    size, and the arrays `beside` them.

    All of it or nothing: `TyirError` when the file is damaged or cut off, when it was saved with other
    artifacts (with everything in which they differ), and when an array is missing, unknown, of another
    shape or type, has not a row for each token, or holds NaN or infinity.
    """
    manifest = artifacts.manifest
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            members = _members(archive, path)
            _check_identity(_text(archive, members, "identity"), identity_of(artifacts), path)
            tokens = _tokens(archive, members, manifest, path)
            more = beside or {}
            wanted = _expected(manifest, len(tokens)) if tokens or len(members) > 2 + len(more) else {}
            if missing := sorted((wanted.keys() | more.keys()) - members.keys()):
                raise _refused(path, f"has no {', '.join(missing[:8])}")
            if unknown := sorted(members.keys() - wanted.keys() - more.keys() - {"identity", "tokens"}):
                raise _refused(path, f"has {', '.join(unknown[:8])}, which no cache of these artifacts is")
            axis = position_axis(manifest.options.kv_layout)
            caches = {
                cache: _with_room(_cache(archive, members[name], name, tensor, path), manifest, axis)
                for name, (cache, tensor) in wanted.items()
            }
            others = {
                name: _beside(archive, members[name], name, kind, len(tokens), path)
                for name, kind in more.items()
            }
    except OSError as error:
        raise TyirError(
            f"cannot read the saved cache {path}: {error.strerror or error}", help=_AGAIN
        ) from None
    except (
        *(KeyError, ValueError, TypeError, AttributeError, SyntaxError, EOFError, IndexError, OverflowError),
        *(MemoryError, RuntimeError),  # RuntimeError: encrypted, another version of zip, nested too deeply
        *(zipfile.BadZipFile, zlib.error, struct.error, tokenize.TokenError),
    ):
        raise TyirError(f"{path} is not a saved cache, or is cut off or damaged", help=_AGAIN) from None
    return tokens, caches, others


def _expected(manifest: Manifest, tokens: int) -> dict[str, tuple[CacheName, TensorInfo]]:
    """The caches of all dies by their names in a file, with the rows that hold so many tokens."""
    axis, found = position_axis(manifest.options.kv_layout), {}
    for die in range(manifest.options.dies):
        program = manifest.program(die, min(manifest.options.seqlens))
        rows = manifest.options.cache_rows(die, tokens)
        for tensor in (program.inputs[i] for i in sorted(cache_inputs(program))):
            if is_recall(tensor.name, manifest.options):
                continue
            shape = (*tensor.shape[:axis], rows, *tensor.shape[axis + 1 :])
            found[f"die{die}/{tensor.name}"] = (die, tensor.name), replace(tensor, shape=shape)
    return found


def _members(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    """The arrays of an archive by name; as numpy writes them, each once and not compressed."""
    members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
    plain = all(
        i.compress_type == zipfile.ZIP_STORED and i.filename.endswith(".npy") for i in archive.infolist()
    )
    if len(members) != len(archive.infolist()) or not plain or not {"identity", "tokens"} <= members.keys():
        raise _refused(path, "is not a saved cache: it does not hold what tyir-run saves")
    return members


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo, most: int = 0) -> tuple[Array, bool]:
    """An array of the archive of at most `most` bytes besides its header, and whether it is in row-major
    order.

    Nothing is unpickled: objects have no elements of known size.  `ValueError` for a wrong size.
    """
    if info.file_size > most + _MOST_HEADER:
        raise ValueError
    file = io.BytesIO(archive.read(info))  # checks the CRC
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, columns_first, dtype = readers[version](file)
    if dtype.hasobject or len(rest := file.read()) != math.prod(shape) * dtype.itemsize:
        raise ValueError
    return np.frombuffer(rest, dtype).reshape(shape), not columns_first or len(shape) < 2


def _text(archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo], name: str) -> str:
    array, _ = _array(archive, members[name])
    if array.shape != () or array.dtype.kind != "U":
        raise ValueError
    return str(array)


def _check_identity(text: str, mine: Mapping[str, Any], path: Path) -> None:
    theirs = parse_json(text.encode(), finite=True)
    different = [
        f"{name} {_said(theirs, name)} there, {_said(mine, name)} here"
        for name in dict.fromkeys((*mine, *theirs))
        if theirs.get(name) != mine.get(name) or type(theirs.get(name)) is not type(mine.get(name))
    ]
    if different:
        raise TyirError(
            f"{path} was saved with other artifacts: {'; '.join(different)}",
            help="restore it with those artifacts, or run the prompt again",
        )


def _said(identity: Mapping[str, Any], name: str) -> str:
    return str(identity[name])[:80] if name in identity else "none"


def _tokens(
    archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo], manifest: Manifest, path: Path
) -> list[int]:
    array, _ = _array(archive, members["tokens"], 8 * manifest.options.max_kv)
    if array.ndim != 1 or array.dtype != np.int64:
        raise _refused(path, f"has tokens of {array.dtype}{list(array.shape)}, not a list of whole numbers")
    tokens: list[int] = array.tolist()
    vocabulary = manifest.model.get("vocab_size", 2**31)
    if len(tokens) > manifest.options.max_kv:
        raise _refused(path, f"has {len(tokens)} tokens, the cache {manifest.options.max_kv} positions")
    if bad := [t for t in tokens if not 0 <= t < vocabulary]:
        raise _refused(path, f"has token {bad[0]}, which is not in the vocabulary of {vocabulary}")
    return tokens


def _beside(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str, kind: Kind, tokens: int, path: Path
) -> Array:
    shape, dtype = tuple(tokens if side is None else side for side in kind[0]), kind[1]
    array, in_order = _array(archive, info, math.prod(shape) * dtype.itemsize)
    if (array.shape, array.dtype) != (shape, dtype) or not in_order:
        raise _refused(
            path, f"has {name} as {array.dtype}{list(array.shape)}, these tokens have {dtype}{list(shape)}"
        )
    return array


def _cache(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str, wanted: TensorInfo, path: Path
) -> Array:
    nbytes = math.prod(wanted.shape) * wanted.storage_dtype.itemsize
    array, in_order = _array(archive, info, nbytes)
    if (array.shape, array.dtype) != (wanted.shape, wanted.storage_dtype) or not in_order:
        raise _refused(
            path,
            f"has {name} as {array.dtype}{list(array.shape)}, these tokens have"
            f" {wanted.storage_dtype}{list(wanted.shape)}",
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise _refused(path, f"has NaN or infinity in {name}")
    return array


def _refused(path: Path, problem: str) -> TyirError:
    return TyirError(f"{path} {problem}", help=_AGAIN)


def _with_room(array: Array, manifest: Manifest, axis: int) -> Array:
    """A cache whose `axis` has the used rows, at its full size."""
    used, extent = array.shape[axis], manifest.options.cache_extent
    whole = np.zeros((*array.shape[:axis], extent, *array.shape[axis + 1 :]), array.dtype)
    whole[(slice(None),) * axis + (slice(used),)] = array
    return whole

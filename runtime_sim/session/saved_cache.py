"""Key/value caches saved to files and restored from them.

numpy's .npz with the caches' used positions, the tokens they hold, and what they were computed with.

A file appears by rename, so a full disk or an interrupt leaves what was there before.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tyir.diagnostics import TyirError
from tyir.dialects.kv import position_axis
from tyir.manifest import Manifest
from tyir.process.files import open_regular
from tyir.runtime_sim.session.program_engine import CacheName

__all__ = ["identity_of", "read_cache", "write_cache"]

Array = npt.NDArray[Any]
_OPTIONS = ("dies", "pp", "batch", "max_kv", "kv_dtype", "kv_layout", "weights", "group_size")


def identity_of(manifest: Manifest) -> dict[str, Any]:
    """What two artifact folders must have in common for one to use the caches of the other.

    The model, what decides how a cache is computed and laid out, and the weights' hash.
    """
    params = sorted(
        (name, record["sha256"]) for name, record in manifest.files.items() if name.endswith(".params")
    )
    options = {name.replace("_", "-"): getattr(manifest.options, name) for name in _OPTIONS}
    return {
        "model": (
            f"{manifest.model.get('architecture', 'unknown')} of"
            f" {manifest.model.get('num_hidden_layers', '?')} layers"
        ),
        **options,
        "content of the weights": hashlib.sha256(repr(params).encode()).hexdigest()[:16],
    }


def write_cache(
    path: Path, identity: Mapping[str, Any], tokens: Sequence[int], caches: Mapping[CacheName, Array]
) -> None:
    """Write the positions that hold `tokens`.

    `TyirError` when the file cannot be written; what was there then stays.
    """
    used = (slice(None),) * position_axis(identity["kv-layout"]) + (slice(len(tokens)),)
    arrays: dict[str, Any] = {f"die{die}/{name}": array[used] for (die, name), array in caches.items()}
    arrays |= {"tokens": np.array(tokens, np.int64), "identity": np.array(json.dumps(identity))}
    if path.exists() and not path.is_file():
        raise TyirError(f"cannot write the cache {path}: it is not a file", help="choose another file")
    temporary: Path | None = None
    try:
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


def read_cache(
    path: Path, identity: Mapping[str, Any], capacity: int
) -> tuple[list[int], dict[CacheName, Array]]:
    """The tokens and caches, each with room for `capacity` positions.

    `TyirError` when the file is damaged, or says everything in which it is another's.
    """
    try:
        with open_regular(path) as file, np.load(file) as saved:
            data = {name: saved[name] for name in saved.files}
        theirs = json.loads(str(data.pop("identity")))
        tokens = [int(token) for token in data.pop("tokens")]
        axis = position_axis(theirs.setdefault("kv-layout", "HND"))
        caches = {_cache_name(name): _with_room(array, capacity, axis) for name, array in data.items()}
    except OSError as error:
        raise TyirError(
            f"cannot read the saved cache {path}: {error.strerror or error}", help="run the prompt again"
        ) from None
    except (KeyError, ValueError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error):
        raise TyirError(
            f"{path} is not a saved cache, or is cut off or damaged", help="run the prompt again"
        ) from None
    different = [
        f"{name} {theirs.get(name)} there, {mine} here"
        for name, mine in identity.items()
        if theirs.get(name) != mine
    ]
    if different:
        raise TyirError(
            f"{path} was saved with other artifacts: {'; '.join(different)}",
            help="restore it with those artifacts, or run the prompt again",
        )
    return tokens, caches


def _cache_name(text: str) -> CacheName:
    die, _, cache = text.partition("/")
    return int(die.removeprefix("die")), cache


def _with_room(array: Array, capacity: int, axis: int) -> Array:
    """A cache whose `axis` has the used positions, at its full size."""
    used = array.shape[axis]
    whole = np.zeros((*array.shape[:axis], max(capacity, used), *array.shape[axis + 1 :]), array.dtype)
    whole[(slice(None),) * axis + (slice(used),)] = array
    return whole

"""A whole folder of artifacts out of the cache: nothing has changed since it was written.

    key = artifacts_key(model, options, machine, ...)
    if take_artifacts(cache, key, target, warn): ...     # verified, in its place
    ...                                                  # otherwise: compile, then
    keep_artifacts(cache, key, target, warnings)

The key holds every file of the checkpoint folder, by name, size and times, everything that was asked for, the
tools and the processor.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from tyir.backends.pieces import compiler_identity, file_identity, tool_identity
from tyir.backends.replacing import replacing
from tyir.manifest import MANIFEST
from tyir.process.cache import Cache, cache_key
from tyir.process.files import parse_json

__all__ = ["artifacts_key", "folder_identity", "keep_artifacts", "take_artifacts"]

_ADAPTER: Final = "adapter_config.json"


def folder_identity(model: Path) -> list[str] | None:
    """The tools, and every file of a checkpoint folder by name, size and times; None where a file has changed
    just now, and of an adapter, whose base model lies elsewhere.
    """
    parts = [tool_identity()]
    for path in sorted(model.rglob("*")):
        if path.is_dir():
            continue
        if path.name == _ADAPTER or not (identity := file_identity(path)):
            return None
        parts += [path.relative_to(model).as_posix(), identity]
    return parts


def artifacts_key(model: Path, asked: Mapping[str, Any], machine: str | Path | None) -> str | None:
    """The key of what a compile of a checkpoint folder gives; None where `folder_identity` is."""
    if (files := folder_identity(model)) is None:
        return None
    parts: list[str] = [repr(sorted(asked.items())), _processor(), *files]
    parts += [compiler_identity(os.environ.get("CXX") or "g++"), shutil.which("g++") or ""]
    if machine is not None and (file := Path(machine)).suffix == ".toml":
        parts.append(file.read_text(errors="replace"))
    return cache_key("artifacts", *parts)


def _processor() -> str:
    """What code for this machine's processor depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    kept = {
        line
        for line in lines
        if line.startswith(("model name", "flags", "Features", "cpu family", "model\t"))
    }
    return repr((os.cpu_count(), os.uname().machine, sorted(kept)))


def take_artifacts(cache: Cache, key: str, target: Path, warn: Callable[[str], None]) -> bool:
    """Make `target` what a compile of this key has written; False when the cache does not have all of it.

    What that compile has warned of is said again.  `TyirError` as `replacing` raises it.
    """
    entry = cache.read(key)
    content = parse_json(entry) if entry is not None else None
    if content is None or not all(cache.has(sha256) for sha256 in content["files"].values()):
        return False
    files: dict[str, str] = content["files"]
    try:
        with replacing(target, _writes(files)) as folder:
            for name in files:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with ThreadPoolExecutor() as pool:
                found = pool.map(lambda name: cache.bring(files[name], folder / name), files)
                if not all(found):
                    raise _Gone
    except _Gone:
        return False
    for message in content["said"]:
        warn(message)
    return True


class _Gone(Exception):
    """A piece went while artifacts were put together, or was damaged."""


def _writes(files: Mapping[str, str]) -> Callable[[str, bool], bool]:
    folders = {name[:i] for name in files for i, c in enumerate(name) if c == "/"}
    return lambda name, is_folder: name in folders if not is_folder else name in files


def keep_artifacts(cache: Cache, key: str, target: Path, said: Sequence[str]) -> None:
    """Keep a folder of artifacts that has just been written, with what was warned of."""
    data = (target / MANIFEST).read_bytes()
    written = json.loads(data)["files"]  # by this process, a moment ago
    files = {name: str(record["sha256"]) for name, record in written.items()}
    for name, sha256 in files.items():
        cache.put(None, target / name, sha256)
    cache.write(cache_key("manifest", data), data)
    files[MANIFEST] = hashlib.sha256(data).hexdigest()
    cache.write(key, json.dumps({"files": files, "said": list(said)}).encode())
    cache.trim()

"""A checkpoint's module out of the cache: it has been imported before, and nothing that it follows from has
changed.

    module = kept_import(cache, folder, 4096, {"dtype": "f16"}, make, warn)

Importing loads torch and transformers and traces the model, which takes seconds; the module is text of some
hundred kilobytes, without weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tyir.artifacts.rope_scaling import CHANGING
from tyir.attributes import DictAttr
from tyir.backends.reuse import folder_identity
from tyir.diagnostics import TyirError
from tyir.dialects.builtin import Module
from tyir.process.cache import Cache, cache_key
from tyir.process.files import parse_json

__all__ = ["kept_import"]

Warn = Callable[[str], None]


def kept_import(
    cache: Cache | None,
    folder: Path,
    positions: int | None,
    asked: Mapping[str, Any],
    make: Callable[[Warn], Module],
    warn: Warn,
) -> Module:
    """What `make` imports of a checkpoint folder for a cache of `positions` tokens, as it is `asked`; from
    the cache where that has it.  What it has warned of is said again.

    Not kept: what is no folder of its own (a file, an adapter), and what has changed just now.
    """
    files = folder_identity(folder) if cache is not None and folder.is_dir() else None
    if cache is None or files is None:
        return make(warn)
    parts = ("import", str(folder), repr(sorted(asked.items())), *files)
    for_all, for_these = cache_key(*parts), cache_key(*parts, repr(positions))
    for key in (for_all, for_these):
        if (module := _kept(cache, key, warn)) is not None:
            return module
    from tyir.printer import print_op

    said: list[str] = []

    def warn_and_note(message: str) -> None:
        said.append(message)
        warn(message)

    module = make(warn_and_note)
    key = for_these if _follows_positions(module) else for_all
    cache.write(key, json.dumps({"module": print_op(module), "said": said}).encode())
    return module


def _follows_positions(module: Module) -> bool:
    """Whether the rotary frequencies of a model are those of prompts of one length."""
    model = module.attributes.get("tyir.model")
    parameters = model.get("rope_parameters") if isinstance(model, DictAttr) else None
    if not isinstance(parameters, DictAttr):
        return False
    entries = [parameters, *(entry for _, entry in parameters.items() if isinstance(entry, DictAttr))]
    return any(getattr(entry.get("rope_type"), "value", None) in CHANGING for entry in entries)


def _kept(cache: Cache, key: str, warn: Warn) -> Module | None:
    from tyir.execution.weights import check_files
    from tyir.parser import parse_module

    entry = cache.read(key)
    content = parse_json(entry) if entry is not None else None
    if content is None:
        return None
    module = parse_module(content["module"])
    try:
        check_files(module)  # weights may lie elsewhere
    except TyirError:
        return None
    for message in content["said"]:
        warn(message)
    return module

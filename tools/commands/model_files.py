"""Which existing files are parts of a model: nothing that a command writes may take their place."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from tyir.process.files import load_json

__all__ = ["model_of"]

_CONFIG: Final = "config.json"
_MANIFEST: Final = "manifest.json"
_DEEPEST: Final = 3  # folders between a file of artifacts and their manifest
_WEIGHTS: Final = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".model")
_SETTINGS: Final = ("config.json", ".index.json", "tokenizer.json", "vocab.json", "tokens.json", "merges.txt")


def model_of(path: Path) -> str | None:
    """What the file is a part of ("the checkpoint in qwen"), None for all others: reports and modules may lie
    beside a model and are written again.
    """
    path = Path(path.resolve())
    folder = path.parent
    checkpoint = (folder / _CONFIG).is_file() and not (folder / _MANIFEST).is_file()
    if checkpoint and (path.suffix in _WEIGHTS or path.name.endswith(_SETTINGS)):
        return f"the checkpoint in {folder}"
    for above in list(path.parents)[:_DEEPEST]:
        if (above / _MANIFEST).is_file() and path.relative_to(above).as_posix() in _listed(above):
            return f"the artifacts in {above}"
    return None


def _listed(folder: Path) -> set[str]:
    """The files of artifacts by their manifest, and itself; none where it is another's or damaged."""
    try:
        content = load_json(folder / _MANIFEST)
    except (OSError, ValueError):
        return set()
    files = content.get("files") if isinstance(content, dict) else None
    return {*files, _MANIFEST} if isinstance(files, dict) else set()

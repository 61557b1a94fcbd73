"""A Hugging Face checkpoint folder as it lies on disk: `config.json` and the tensor files' headers, checked
before anything is built from them.

Safetensors files are preferred, then `pytorch_model.bin`, then one GGUF file.  No tensor is read, and torch
is imported for `pytorch_model.bin` alone.  Every problem found is appended to a list, so that one run reports
them all. File format: https://github.com/huggingface/safetensors#format (8 bytes header length, JSON header,
tensors without gaps).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tyir.diagnostics import Diagnostic, TyirError
from tyir.dtypes import DTYPES
from tyir.execution.weights import FileStamp
from tyir.process.files import json_kind, missing_hint, open_regular, parse_json, stand_in
from tyir.text.json_files import read_json_object
from tyir.types import TensorType, Type, bit_width, scalar_type

__all__ = [
    "CONFIG_FILE",
    "TENSOR_FILES",
    "Checkpoint",
    "StoredTensor",
    "is_compiled",
    "no_checkpoint",
    "open_checkpoint",
]

CONFIG_FILE: Final = "config.json"
SINGLE_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
TORCH_FILE: Final = "pytorch_model.bin"
TORCH_INDEX: Final = "pytorch_model.bin.index.json"
TENSOR_FILES: Final = (SINGLE_FILE, INDEX_FILE, TORCH_FILE, TORCH_INDEX)
_COMPILED: Final = "manifest.json"  # of artifacts, which have the model's config.json too
_MAX_HEADER: Final = 100_000_000  # the limit of the safetensors library

# The element types of safetensors files by their names there.
ELEMENTS: Final[dict[str, Type]] = {
    dtype.safetensors: kind for dtype in DTYPES if (kind := scalar_type(dtype.element)) is not None
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of the checkpoint: `nbytes` bytes at `offset` (from the start of the file) of `file`.

    `encoding`: the block format of a GGUF tensor, whose `type` then is rows of bytes; `interleaved`: heads
    whose halves' rows alternate, as in llama.cpp; `added`: what was added to every value.
    """

    key: str
    file: str
    type: TensorType
    offset: int
    nbytes: int
    encoding: str = ""
    interleaved: int = 0
    added: int = 0

    @property
    def converted(self) -> bool:
        """Whether the values are not the parameter's as they are."""
        return bool(self.encoding or self.interleaved or self.added)


@dataclass(frozen=True)
class Checkpoint:
    """What a folder holds.

    `unreadable` names the tensors that lie in files which could not be read (already reported); `low_rank`
    gives the scales of an adapter's factors, by the key of A.  `described_by`: where `config` was read,
    `pictures`: the folder that says how pictures are prepared, where that is another one.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    stamps: Mapping[str, FileStamp]
    unreadable: frozenset[str] = frozenset()
    whole: bool = True
    low_rank: Mapping[str, float] = field(default_factory=dict)
    described_by: str = CONFIG_FILE
    pictures: Path | None = None


@dataclass
class _Reader:
    folder: Path
    problems: list[Diagnostic]
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    stamps: dict[str, FileStamp] = field(default_factory=dict)

    def problem(self, message: str, help: str, path: Path | None = None) -> None:
        self.problems.append(Diagnostic(message, where=str(path or ""), help=help))

    def json_file(self, name: str, help: str) -> dict[str, Any] | None:
        """A JSON object from a file; None (and a problem) when it is not one."""
        try:
            return read_json_object(self.folder / name, help)
        except TyirError as error:
            self.problems.extend(error.diagnostics)
            return None

    def tensor_file(self, name: str) -> bool:
        """Read the header of one safetensors file; False (and a problem) when the file cannot be used."""
        path = self.folder / name
        again = "the file is incomplete or damaged; download it again"
        try:
            with open_regular(path) as file:
                size = os.fstat(file.fileno()).st_size
                instead = stand_in(file.peek())
                length = int.from_bytes(file.read(8), "little")
                header_bytes = file.read(length) if length <= min(_MAX_HEADER, size - 8) else b""
        except OSError as error:
            self.problem(f"cannot read {name}: {error.strerror}", "download the file again", path)
            return False
        if instead is not None:
            self.problem(f"{name} is {instead[0]}, not the file itself", instead[1], path)
            return False
        if size - 8 >= length > _MAX_HEADER:
            self.problem(
                f"{name} is no safetensors file: its header would have {length} bytes, more than the"
                f" {_MAX_HEADER} it may have",
                again,
                path,
            )
            return False
        if size < 8 or not header_bytes:
            self.problem(
                f"{name} is truncated: its header needs {length} bytes, the file has {size}", again, path
            )
            return False
        try:
            header = parse_json(header_bytes)
        except json.JSONDecodeError:
            self.problem(f"{name} is no safetensors file: its header is not JSON", again, path)
            return False
        except ValueError as error:
            self.problem(f"{name} is no safetensors file: its header is not JSON: {error}", again, path)
            return False
        if not isinstance(header, dict):
            self.problem(
                f"{name} is no safetensors file: its header is a JSON {json_kind(header)}", again, path
            )
            return False
        return self.header(name, header, 8 + length, size)

    def header(self, name: str, header: dict[str, Any], base: int, size: int) -> bool:
        """Check a header against the file's size and note its tensors, whose data begins at byte `base`."""
        spans: list[tuple[int, int, str]] = []
        for key, entry in header.items():
            if key == "__metadata__":
                continue
            tensor = _stored_tensor(key, name, entry, base)
            if isinstance(tensor, str):
                self.problem(
                    f"{name}: {tensor}", "the file is damaged; download it again", self.folder / name
                )
                return False
            if (other := self.tensors.get(key)) is not None:
                self.problem(
                    f"tensor '{key}' is in both {other.file} and {name}",
                    "remove the file that does not belong",
                    self.folder / name,
                )
            self.tensors[key] = tensor
            spans.append((tensor.offset, tensor.offset + tensor.nbytes, key))
        end = base
        for start, stop, key in sorted(spans):
            if start != end:
                self.problem(
                    f"{name}: tensor '{key}' begins at byte {start}, expected {end}",
                    "the file is damaged; download it again",
                    self.folder / name,
                )
                return False
            end = stop
        if end != size:
            state = "truncated" if end > size else "longer than its header says"
            self.problem(
                f"{name} is {state}: the header describes {end} bytes, the file has {size}",
                "the file is incomplete or damaged; download it again",
                self.folder / name,
            )
            return False
        self.stamps[name] = FileStamp.of(self.folder / name)
        return True

    def torch_file(self, name: str) -> bool:
        """Note the tensors of a `pytorch_model.bin`; False (and problems) when the file cannot be used."""
        path = self.folder / name
        if not os.path.lexists(path):
            self.problem(f"cannot read {name}: No such file or directory", "download the missing file", path)
            return False
        from tyir.frontends.torch_files import read_torch_file

        try:
            self.tensors.update(read_torch_file(path))
        except TyirError as error:
            self.problems.extend(error.diagnostics)
            return False
        self.stamps[name] = FileStamp.of(path)
        return True

    def gguf_files(self, paths: Sequence[Path]) -> dict[str, Any] | None:
        """Note the tensors of a GGUF model; returns the config in its metadata, None (and problems) when the
        files cannot be used.
        """
        from tyir.frontends.gguf.files import read_gguf

        try:
            config, tensors = read_gguf(paths, needs_config=not (self.folder / "config.json").exists())
        except TyirError as error:
            self.problems.extend(error.diagnostics)
            return None
        self.tensors.update(tensors)
        self.stamps.update((path.name, FileStamp.of(path)) for path in paths)
        return config

    def sharded(self, index_file: str, suffix: str, read: Callable[[str], bool]) -> frozenset[str]:
        """Read all files of the index; returns the tensors that lie in unreadable files."""
        index = self.json_file(index_file, "download the index again")
        if index is None:
            return frozenset()
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            self.problem(
                f"{index_file} has no 'weight_map' from tensor names to file names",
                "download the index again",
                self.folder / index_file,
            )
            return frozenset()
        bad: set[str] = set()
        for name in sorted(set(weight_map.values())):
            if not _is_plain_name(name, suffix):
                self.problem(
                    f"{index_file} refers to {name!r}, which is not a file name inside the checkpoint folder",
                    f"an index may only name *{suffix} files beside it; do not use this checkpoint unless you"
                    " trust where it comes from",
                    self.folder / index_file,
                )
                bad.add(name)
            elif not read(name):
                bad.add(name)
        for key, name in weight_map.items():
            if name not in bad and (key not in self.tensors or self.tensors[key].file != name):
                self.problem(
                    f"{index_file} says that tensor '{key}' is in {name}, but it is not",
                    "download the index and that file again",
                    self.folder / index_file,
                )
        return frozenset(key for key, name in weight_map.items() if name in bad)


def _is_plain_name(name: str, suffix: str) -> bool:
    return Path(name).name == name and not set(name) & set("\\\0") and name.endswith(suffix)


def _stored_tensor(key: str, file: str, entry: Any, base: int) -> StoredTensor | str:
    """One header entry, or what is wrong with it."""
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        return f"the entry of tensor '{key}' lacks dtype, shape or data_offsets"
    if not isinstance(dtype, str) or dtype not in ELEMENTS:
        return f"tensor '{key}' has dtype {dtype!r}; known: {', '.join(ELEMENTS)}"
    if not isinstance(shape, list) or not all(
        type(n) is int and 0 <= n < 2**62 for n in (*shape, start, stop)
    ):
        return (
            f"tensor '{key}' has shape {shape} and data_offsets {[start, stop]}, which must be non-negative"
            " integers"
        )
    tensor_type = TensorType(tuple(shape), ELEMENTS[dtype])
    wanted = tensor_type.size * max(bit_width(tensor_type.element), 8) // 8
    if wanted >= 2**63:
        return f"tensor '{key}' has shape {str(shape)[:60]}, of more elements than any file holds"
    if stop - start != wanted:
        return (
            f"tensor '{key}' of shape {shape} and dtype {dtype} takes {wanted} bytes, its data_offsets span"
            f" {stop - start}"
        )
    return StoredTensor(key, file, tensor_type, base + start, stop - start)


def _read_tensors(reader: _Reader) -> tuple[frozenset[str], bool]:
    """Headers of all tensor files: the tensors in unreadable files, and whether the list of tensors is
    complete.
    """
    folder = reader.folder
    # a link to nothing is a file that is missing, and is told where it is opened
    if os.path.lexists(folder / SINGLE_FILE):
        return frozenset(), reader.tensor_file(SINGLE_FILE)
    for index_file, suffix, read in (
        (INDEX_FILE, ".safetensors", reader.tensor_file),
        (TORCH_INDEX, ".bin", reader.torch_file),
    ):
        if os.path.lexists(folder / index_file):
            before = len(reader.problems)
            unreadable = reader.sharded(index_file, suffix, read)
            return unreadable, len(reader.problems) == before or bool(unreadable)
        if suffix == ".safetensors" and os.path.lexists(folder / TORCH_FILE):
            return frozenset(), reader.torch_file(TORCH_FILE)
    other = sorted(
        p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf")
    )
    reader.problem(
        f"no {SINGLE_FILE}, no {INDEX_FILE} and no {TORCH_FILE} in the folder"
        + (f" (it holds {', '.join(other[:5])})" if other else ""),
        f"save the model with transformers' save_pretrained, which writes {SINGLE_FILE}, or download the"
        " missing files",
        folder,
    )
    return frozenset(), False


def _open_gguf(paths: Sequence[Path], problems: list[Diagnostic]) -> Checkpoint | None:
    """A GGUF model, with the config.json beside it when there is one."""
    folder = paths[0].parent
    reader = _Reader(folder, problems)
    config, described_by = reader.gguf_files(paths), f"the metadata of {paths[0].name}"
    if (folder / "config.json").exists():
        described_by = CONFIG_FILE
        config = reader.json_file(
            "config.json", "restore config.json, or remove it to use the file's own metadata"
        )
    if config is None:
        return None
    return Checkpoint(
        folder,
        config,
        reader.tensors,
        reader.stamps,
        whole=bool(reader.stamps),
        described_by=described_by,
    )


def is_compiled(folder: Path) -> bool:
    """Whether a folder is one of artifacts: they are easily given in place of their checkpoint."""
    return (folder / _COMPILED).is_file() and not any((folder / name).exists() for name in TENSOR_FILES)


def no_checkpoint(given: Path) -> Diagnostic:
    """What is wrong with a place that is no checkpoint folder, and what to do when it is a model of the
    hub.
    """
    folder = given.absolute()
    if folder.is_dir():
        return Diagnostic(
            f"{given} is a folder of artifacts, not a checkpoint: it holds {_COMPILED}",
            help="give the folder of the model that was compiled",
        )
    if folder.exists():
        return Diagnostic(
            f"checkpoint folder {given} is a file, not a folder",
            help=f"give the folder it lies in: {given.parent}",
        )
    help = missing_hint(given) or "give the folder that holds config.json and the *.safetensors files"
    return Diagnostic(f"checkpoint folder {given} does not exist", help=help)


def open_checkpoint(
    folder: Path, problems: list[Diagnostic], base: Path | None = None, vision_tower: Path | None = None
) -> Checkpoint | None:
    """What `folder` holds; problems are appended.  Of a LoRA adapter, its base with the adapter merged, where
    `base` is the base's folder unless the adapter says it.  A model in LLaVA's own format is given as
    transformers has it, with the CLIP model of `vision_tower`; with a `base` it is a delta to that.

    None when there is no usable config.json (tensor files are checked all the same).
    """
    from tyir.frontends.adapters import CONFIG

    if (folder / CONFIG).is_file():
        return _open_adapter(folder.absolute(), problems, base)
    from tyir.frontends.vision.llava import in_own_format, not_in_own_format, translated

    if in_own_format(folder):
        opened = _open_model(folder, problems)
        tower = None if vision_tower is None else _open_model(vision_tower, problems)
        llama = None if base is None else _open_model(base, problems)
        if opened is None or (vision_tower and tower is None) or (base and llama is None):
            return None
        return translated(opened, tower, llama, problems)
    if base is not None:
        message = f"{folder} is not a LoRA adapter: it holds no {CONFIG}"
        problems.append(Diagnostic(message, help="leave --base out, or give the adapter's folder"))
        return None
    if vision_tower is not None:
        problems.append(not_in_own_format(folder))
        return None
    return _open_model(folder, problems)


def _open_adapter(folder: Path, problems: list[Diagnostic], base: Path | None) -> Checkpoint | None:
    from tyir.frontends.adapters import CONFIG, FILES, base_folder, merged, no_base
    from tyir.frontends.vision.llava import in_own_format

    reader = _Reader(folder, problems)
    config = reader.json_file(CONFIG, "restore it from where the adapter came from")
    if config is None:
        return None
    found = base or base_folder(folder, config, any((folder / n).exists() for n in TENSOR_FILES))
    if found is None:
        problems.append(no_base(folder, config))
        return None
    file = next((name for name in FILES if (folder / name).is_file()), None)
    if file is None:
        reader.problem(f"the adapter's weights are missing: {FILES[0]}", "download them", folder)
        return None
    if not (reader.tensor_file(file) if file.endswith(".safetensors") else reader.torch_file(file)):
        return None
    opened = _open_model(found, problems)
    if in_own_format(folder) or in_own_format(found):
        reader.problem(
            "the adapter is of a LLaVA in its own format, which is not merged here",
            "merge it with LLaVA's merge_lora_weights.py, and import the result with --vision-tower",
            folder,
        )
        return None
    return None if opened is None else merged(opened, folder, config, reader.tensors, problems)


def _open_model(folder: Path, problems: list[Diagnostic]) -> Checkpoint | None:
    """`open_checkpoint` of a whole model."""
    given, folder = folder, folder.absolute()
    if not (folder.is_dir() and any((folder / n).exists() for n in TENSOR_FILES)):
        from tyir.frontends.gguf.files import gguf_model

        try:
            if files := gguf_model(folder):
                return _open_gguf(files, problems)
        except TyirError as error:
            problems.extend(error.diagnostics)
            return None
    if not folder.is_dir() or is_compiled(folder):
        problems.append(no_checkpoint(given))
        return None
    reader = _Reader(folder, problems)
    config = reader.json_file(
        "config.json", "give a folder in the Hugging Face layout: config.json beside the *.safetensors files"
    )
    unreadable, whole = _read_tensors(reader)
    return (
        None
        if config is None
        else Checkpoint(folder, config, reader.tensors, reader.stamps, unreadable, whole)
    )

"""`manifest.json`: what an artifact folder holds and what it was built with.  The compiler writes it last,
the runtime checks it first.

    OUT/{n}die/manifest.json
      format, version         "tyir-artifacts", 1
      model                   what the front end knew of the model (architecture, vocabulary, ...)
      options                 dies, die_map, mesh, seqlens, max_kv, batch, weights, group_size, embedding_as_input, output, kv_dtype, kv_layout, pp
      build                   versions and targets the code was generated with; the machine by name, or machine.toml beside the manifest
      params                  per die: file
      programs                per die and sequence length: library, program, ir, constants, function, inputs and outputs
      files                   every file: size in bytes and sha256

Paths are relative to the folder, with forward slashes.
"""  # noqa: E501

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Self

import numpy as np

from tyir.diagnostics import Diagnostic, TyirError
from tyir.types import FloatType, IntegerType, storage_dtype

__all__ = [
    "MACHINE",
    "MANIFEST",
    "BuildOptions",
    "DieProgram",
    "Manifest",
    "TensorInfo",
    "file_record",
    "sha256_file",
]

MANIFEST: Final = "manifest.json"
MACHINE: Final = "machine.toml"  # a machine file of the user's own that the programs were compiled for
FORMAT: Final = "tyir-artifacts"
VERSION: Final = 1


@dataclass(frozen=True)
class BuildOptions:
    """What a user chooses; everything here changes the artifacts.

    `weights`: "fp16", "int4" (quantised by the compiler), or in a manifest "checkpoint" (the checkpoint's own
    quantised weights, nothing more). `output`: what a step returns for each token: "logits", "argmax" or
    "topk=K" (the K best tokens with their values). `pp`: pipeline stages; the decoder's layers are dealt out
    to that many groups of dies. `mesh`: how the dies of a stage are grouped, (2, 3) being 2 groups of 3;
    empty: whole packages are groups. `kv_dtype`: what the key/value caches hold: "fp16", or "int8" with a
    scale per head and token.  `kv_layout`: "HND" or "NHD" (`tyir.dialects.kv`).
    """

    dies: int = 4
    die_map: tuple[int, ...] = ()
    seqlens: tuple[int, ...] = (1, 8)
    max_kv: int = 1024
    weights: str = "fp16"
    group_size: int = 128
    embedding_as_input: bool = False
    batch: int = 1
    output: str = "logits"
    kv_dtype: str = "fp16"
    kv_layout: str = "HND"
    pp: int = 1
    mesh: tuple[int, ...] = ()


@dataclass(frozen=True)
class TensorInfo:
    """An input or output of a program: `dtype` in IR spelling (f16, i32), `alias` the index of the input an
    output updates in place.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    alias: int | None = None

    @property
    def storage_dtype(self) -> np.dtype[Any]:
        """The numpy dtype of a buffer for it."""
        return storage_dtype(
            FloatType(self.dtype) if "f" in self.dtype else IntegerType(int(self.dtype.lstrip("sui")))
        )


@dataclass(frozen=True)
class DieProgram:
    """The files of one die at one sequence length."""

    die: int
    seqlen: int
    function: str
    library: str
    program: str
    ir: str
    constants: str
    params: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]


@dataclass(frozen=True)
class Manifest:
    """The whole of `manifest.json`."""

    model: dict[str, Any]
    options: BuildOptions
    build: dict[str, Any]
    programs: tuple[DieProgram, ...]
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    def program(self, die: int, seqlen: int) -> DieProgram:
        return next(p for p in self.programs if p.die == die and p.seqlen == seqlen)

    def to_json(self) -> str:
        return (
            json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1, sort_keys=True)
            + "\n"
        )

    @classmethod
    def load(cls, folder: Path, *, check: bool = True) -> Self:
        """Read and (with `check`) verify every file's size and hash.

        `TyirError` lists everything that is wrong.
        """
        path = folder / MANIFEST
        try:
            raw = json.loads(path.read_text())
        except FileNotFoundError:
            raise TyirError(f"{folder} holds no {MANIFEST}", help=_nearest_artifacts(folder)) from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise TyirError(f"cannot read {path}: {error}", help="compile the model again") from None
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise TyirError(f"{path} is not a manifest of tyir artifacts")
        if raw.get("version") != VERSION:
            raise TyirError(
                f"{path} has version {raw.get('version')}; this tyir reads version {VERSION}",
                help="compile the model again",
            )
        try:
            manifest = cls(
                model=raw["model"],
                options=_options(raw["options"]),
                build=raw["build"],
                programs=tuple(_program(p) for p in raw["programs"]),
                files=raw["files"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise TyirError(
                f"{path} is damaged: {type(error).__name__} {error}", help="compile the model again"
            ) from None
        if check:
            manifest.check_files(folder)
        return manifest

    def check_files(self, folder: Path) -> None:
        """`TyirError` naming every file that is missing or has changed."""
        problems = [
            p for name, record in sorted(self.files.items()) if (p := _file_problem(folder / name, record))
        ]
        if problems:
            raise TyirError(
                Diagnostic(p, help="compile the model again, or restore the file") for p in problems
            )


def _options(raw: Mapping[str, Any]) -> BuildOptions:
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
    return BuildOptions(**values)


def _program(raw: Mapping[str, Any]) -> DieProgram:
    tensors = {
        k: tuple(TensorInfo(**{**t, "shape": tuple(t["shape"])}) for t in raw[k])
        for k in ("inputs", "outputs")
    }
    return DieProgram(**{**raw, **tensors})


def _file_problem(path: Path, record: Mapping[str, Any]) -> str | None:
    if not path.is_file():
        return f"{path} is missing"
    size = path.stat().st_size
    if size != record["size"]:
        return f"{path} has {size} bytes, {record['size']} were written"
    if sha256_file(path) != record["sha256"]:
        return f"{path} has changed since it was compiled (its hash differs)"
    return None


def _nearest_artifacts(folder: Path) -> str:
    found = sorted(p.parent.name for p in folder.glob(f"*/{MANIFEST}")) if folder.is_dir() else []
    return (
        f"did you mean {folder / found[0]}?"
        if found
        else "give the folder that tyir-compile printed, for example out/4die"
    )


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_record(path: Path) -> dict[str, Any]:
    """The entry of `files` for one file."""
    return {"size": path.stat().st_size, "sha256": sha256_file(path)}

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

While a module is compiled, `tyir.build = {max_kv = 1024 : i64, ...}` on it records what passes have done
(`record`); the options of the finished module are read from there and nowhere else.

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

from tyir.attributes import Attribute, BoolAttr, DenseArrayAttr, DictAttr, IntegerAttr, StringAttr
from tyir.diagnostics import Diagnostic, TyirError
from tyir.ir import Op
from tyir.process.files import load_json, open_regular
from tyir.types import FloatType, IntegerType, i64, storage_dtype

__all__ = [
    "BUILD",
    "MACHINE",
    "MANIFEST",
    "SETTLED_BY",
    "BuildOptions",
    "DieProgram",
    "Manifest",
    "TensorInfo",
    "file_record",
    "record",
    "recorded",
    "settled",
    "sha256_file",
]

MANIFEST: Final = "manifest.json"
MACHINE: Final = "machine.toml"  # a machine file of the user's own that the programs were compiled for
FORMAT: Final = "tyir-artifacts"
VERSION: Final = 1
BUILD: Final = "tyir.build"
Recorded = bool | int | str | tuple[int, ...]


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

    @classmethod
    def of(cls, module: Op) -> Self:
        """What a finished module was built with, as its passes have recorded it.

        `TyirError` names what it does not say.
        """
        done = recorded(module)
        missing = [name for name in SETTLED_BY if name not in done and name not in _MAY_BE_MISSING]
        if missing:
            raise TyirError(
                f"the module does not say with which {', '.join(missing)} it was built ({BUILD})",
                help="make it again from the imported model: passes record what they do",
            )
        values: dict[str, Any] = {name: value for name, value in done.items() if name in SETTLED_BY}
        return cls(**values)


# What a module may be built with, and the pass that settles it.
SETTLED_BY: Final = {
    "weights": "quantize-weights",
    "group_size": "quantize-weights",
    "max_kv": "kv-materialize",
    "embedding_as_input": "kv-materialize",
    "kv_dtype": "kv-materialize",
    "kv_layout": "kv-materialize",
    "batch": "specialize-batch",
    "output": "select-output",
    "dies": "partition-dies",
    "die_map": "partition-dies",
    "pp": "partition-dies",
    "mesh": "partition-dies",
    "seqlens": "specialize-seqlen",
}
_MAY_BE_MISSING: Final = ("group_size", "mesh")  # fp16 weights have no groups, and a mesh need not have any


def record(module: Op, **done: Recorded) -> None:
    """Write on a module what a pass has done to it; an empty list is not written."""
    entries = {name: _to_attribute(value) for name, value in done.items() if value != ()}
    module.set_attribute(
        BUILD, DictAttr({**dict(module.attributes.get(BUILD, DictAttr()).items()), **entries})
    )


def recorded(module: Op) -> dict[str, Recorded]:
    """What passes have recorded."""
    written = module.attributes.get(BUILD, DictAttr())
    if not isinstance(written, DictAttr):
        raise TyirError(f"{BUILD} is {written}, not a dictionary")
    return {name: _from_attribute(name, value) for name, value in written.items()}


def _to_attribute(value: Recorded) -> Attribute:
    if isinstance(value, bool):
        return BoolAttr(value)
    if isinstance(value, int):
        return IntegerAttr(value, i64)
    return StringAttr(value) if isinstance(value, str) else DenseArrayAttr.i64(value)


def _from_attribute(name: str, value: Attribute) -> Recorded:
    if isinstance(value, DenseArrayAttr):
        return value.ints()
    if isinstance(value, (BoolAttr, IntegerAttr, StringAttr)):
        return value.value
    raise TyirError(f"{BUILD} has {name} = {value}, which is no option's value")


def settled(asked: BuildOptions | Mapping[str, Any], module: Op) -> BuildOptions:
    """The options to go on building a module with: what is recorded, then what is asked for (of a mapping
    what it names, of `BuildOptions` all), then the defaults.

    `TyirError` names both values wherever what is asked for contradicts the record.
    """
    done = {name: value for name, value in recorded(module).items() if name in SETTLED_BY}
    given = asdict(asked) if isinstance(asked, BuildOptions) else dict(asked)
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items() if v != ()}
    if done.get("weights", "int4") != "int4":
        given.pop("group_size", None)  # says nothing of weights without groups
        if given.get("weights") == "fp16":
            del given["weights"]  # as the checkpoint holds them
    if "dies" in done:
        done.setdefault("mesh", ())
        if len(given.get("mesh", ())) == 1:
            given["mesh"] = ()  # one group is recorded as none
    problems = [
        Diagnostic(
            f"{name} = {_said(value)} is asked for, the module was built with {name} = {_said(done[name])}",
            help=f"leave {name} out, or start from a file that {SETTLED_BY[name]} has not been run on",
        )
        for name, value in given.items()
        if name in done and value != done[name]
    ]
    if problems:
        raise TyirError(problems)
    return BuildOptions(**{**given, **done})


def _said(value: Recorded) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


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
            raw = load_json(path)
        except FileNotFoundError:
            raise TyirError(f"{folder} holds no {MANIFEST}", help=_nearest_artifacts(folder)) from None
        except (OSError, ValueError) as error:
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
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_record(path: Path) -> dict[str, Any]:
    """The entry of `files` for one file."""
    return {"size": path.stat().st_size, "sha256": sha256_file(path)}

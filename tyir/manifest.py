"""`manifest.json`: what an artifact folder holds and what it was built with.  The compiler writes it last,
the runtime checks it first.

    OUT/{n}die/manifest.json
      format, version         "tyir-artifacts", 2
      sha256                  of the manifest itself: of everything else in it, in canonical form (`tyir.artifacts.schema`)
      model                   what the front end knew of the model (architecture, vocabulary, ...)
      options                 dies, die_map, mesh, seqlens, max_kv, batch, weights, group_size, embedding_as_input, output, output_rows, kv_dtype, kv_layout, kv_split, kv_block, kv_parts, sparse_prefill, pp, awq
      build                   versions, targets, the processor's features and the activations' precision (host) the code was generated with; the machine by name, or machine.toml beside the manifest
      params                  per die: file
      programs                per die and sequence length: library, program, ir, constants, function, inputs and outputs
      vision                  of a vision-language model: sizes of pictures, their programs, tokens (`tyir.artifacts.vision`); null of others
      files                   every file: size in bytes and sha256

While a module is compiled, `tyir.build = {max_kv = 1024 : i64, ...}` on it records what passes have done
(`record`); the options of the finished module are read from there and nowhere else.

Paths are relative to the folder, with forward slashes.

The annotations of the classes below are the file's schema: what `Manifest.load` returns is of these types and in these
ranges, its entries fit each other, and its names are of files inside the folder.  Whoever loads a program asks
`tyir.artifacts.agreement` whether it has the interface that is written here.
"""  # noqa: E501

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Final,
    NotRequired,  # pydantic reads those of Python 3.11 not
    Self,
    cast,
)

from annotated_types import Interval, MaxLen, MinLen
from typing_extensions import TypedDict

from tyir.artifacts.consistency import problems_of
from tyir.artifacts.programs import MAX_DIES, Count, DieProgram, FileName, Name, TensorInfo
from tyir.artifacts.schema import Matches, checked, closed, first_of, sha256_of, with_others
from tyir.artifacts.sparse_prefill import BlockChoice
from tyir.artifacts.token_blocks import BLOCK, TokenBlocks
from tyir.artifacts.vision import Vision
from tyir.attributes import Attribute, BoolAttr, DenseArrayAttr, DictAttr, IntegerAttr, StringAttr
from tyir.diagnostics import Diagnostic, TyirError
from tyir.ir import Op
from tyir.process.files import download_hint, missing_hint, open_regular, parse_json
from tyir.types import i64

__all__ = [
    "BUILD",
    "FORMAT",
    "MACHINE",
    "MANIFEST",
    "MAX_DIES",
    "SETTLED_BY",
    "Build",
    "BuildOptions",
    "DieProgram",
    "FileRecord",
    "Manifest",
    "Model",
    "TensorInfo",
    "file_record",
    "no_manifest",
    "record",
    "recorded",
    "settled",
    "sha256_file",
]

MANIFEST: Final = "manifest.json"
MACHINE: Final = "machine.toml"  # a machine file of the user's own that the programs were compiled for
FORMAT: Final = "tyir-artifacts"
VERSION: Final = 2
BUILD: Final = "tyir.build"
AGAIN: Final = "compile the model again"

_QUANTIZED: Final = ("int4", "awq")
Version = Annotated[str, Matches("[A-Za-z0-9_.+!-]+"), MaxLen(100)]
Recorded = bool | int | str | tuple[int, ...]


@closed
@dataclass(frozen=True)
class BuildOptions:
    """What a user chooses; everything here changes the artifacts.

    `weights`: "fp16", "int4" (quantised by the compiler), "awq" (the same after an AWQ table has been folded
    in, the file of SHA-256 `awq`), or in a manifest "checkpoint" (the checkpoint's own quantised weights,
    nothing more). `output`: what a step returns for each token: "logits", "argmax" or "topk=K" (the K best
    tokens with their values, and the logsumexp of all). `pp`: pipeline stages; the decoder's layers are dealt
    out to that many groups of dies. `mesh`: how the dies of a stage are grouped, (2, 3) being 2 groups of 3;
    empty: whole packages are groups. `kv_dtype`: what the key/value caches hold: "fp16", "int8" with a scale
    per head and token, or "int4" with one per head, token and 32 channels.  `kv_layout`: "HND" or "NHD"
    (`tyir.dialects.kv`).  `kv_split`: what dies have of a cache with fewer heads than dies, "heads" (copies),
    "tokens" (blocks of `kv_block` positions in turn, `tyir.artifacts.token_blocks`) or "auto" (what is
    faster); a manifest says which, and with `kv_parts` how many dies share a block's heads, which nobody
    chooses.  `output_rows`: of which tokens a step returns that: "all", or "last", one of each sequence,
    which the caller names (`row`).  `sparse_prefill`: the numbers of `tyir.artifacts.sparse_prefill` for
    steps of the longest length, which then see some blocks of the cache; none: all steps see all of it.
    """

    dies: Annotated[int, Interval(ge=1, le=MAX_DIES)] = 4
    die_map: tuple[Annotated[int, Interval(ge=0, le=2**15)], ...] = ()
    seqlens: Annotated[tuple[Count, ...], MinLen(1), MaxLen(256)] = (1, 8)
    max_kv: Count = 1024
    weights: Annotated[str, Matches("fp16|int4|awq|checkpoint")] = "fp16"
    group_size: Count = 128
    embedding_as_input: bool = False
    batch: Annotated[int, Interval(ge=1, le=2**15)] = 1
    output: Annotated[str, Matches("logits|argmax|topk=[1-9][0-9]{0,8}")] = "logits"
    output_rows: Annotated[str, Matches("all|last")] = "all"
    kv_dtype: Annotated[str, Matches("fp16|int8|int4")] = "fp16"
    kv_layout: Annotated[str, Matches("HND|NHD")] = "HND"
    pp: Annotated[int, Interval(ge=1, le=MAX_DIES)] = 1
    mesh: Annotated[tuple[Count, ...], MaxLen(2)] = ()
    awq: Annotated[str, Matches("([0-9a-f]{64})?")] = ""
    kv_split: Annotated[str, Matches("auto|heads|tokens")] = "auto"
    kv_block: Count = BLOCK
    kv_parts: Annotated[int, Interval(ge=1, le=MAX_DIES)] = 1
    sparse_prefill: Annotated[tuple[Annotated[int, Interval(ge=0, le=2**31 - 1)], ...], MaxLen(4)] = ()

    def __post_init__(self) -> None:
        if self.sparse_prefill and self.kv_split == "auto":  # blocks are chosen among whole caches
            object.__setattr__(self, "kv_split", "heads")

    @property
    def choice(self) -> BlockChoice | None:
        """What steps of the longest length see of the cache; None: all."""
        return BlockChoice.of(self.sparse_prefill)

    @property
    def dense_seqlens(self) -> tuple[int, ...]:
        """The lengths whose steps see the whole cache."""
        return self.seqlens if self.choice is None else tuple(sorted(self.seqlens)[:-1])

    def token_blocks(self, die: int) -> TokenBlocks | None:
        """Which positions a die's caches hold; None: all."""
        return None if self.kv_parts == 1 else TokenBlocks(die % self.kv_parts, self.kv_parts, self.kv_block)

    def cache_rows(self, die: int, positions: int) -> int:
        """Rows of a die's caches that hold positions below this one."""
        blocks = self.token_blocks(die)
        return positions if blocks is None else blocks.rows_before(positions)

    @property
    def cache_extent(self) -> int:
        """Rows of every die's caches."""
        blocks = self.token_blocks(0)
        return self.max_kv if blocks is None else blocks.rows(self.max_kv)

    @property
    def steps_ahead(self) -> int:
        """How many of a prompt's steps are under way beside the one that is waited for: none where stages
        wait for each other within a step, at the embedding, which is cut over all dies, or at the head.
        """
        apart = self.embedding_as_input and self.output_rows == "last"
        return self.pp if self.pp > 1 and apart else 0

    def takes_row(self, seqlen: int) -> bool:
        """Whether a step of this length returns one row of each sequence and is told which: the only one of a
        step of one token needs no naming.
        """
        return self.output_rows == "last" and seqlen > 1

    @property
    def quantizes(self) -> bool:
        """Whether the compiler makes 4-bit weights of the checkpoint's."""
        return self.weights in _QUANTIZED

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
    "awq": "awq-fold",
    "group_size": "quantize-weights",
    "max_kv": "kv-materialize",
    "embedding_as_input": "kv-materialize",
    "kv_dtype": "kv-materialize",
    "kv_layout": "kv-materialize",
    "batch": "specialize-batch",
    "output": "select-output",
    "output_rows": "select-rows",
    "dies": "partition-dies",
    "die_map": "partition-dies",
    "pp": "partition-dies",
    "mesh": "partition-dies",
    "kv_split": "partition-dies",
    "kv_block": "partition-dies",
    "kv_parts": "partition-dies",
    "seqlens": "specialize-seqlen",
    "sparse_prefill": "sparse-prefill",
}
# fp16 weights have no groups, a mesh need not have any, not every model has a table, not every cache blocks,
# a module that was cut before there were rows to select returns all, and not every step leaves blocks out
_MAY_BE_MISSING: Final = (
    *("group_size", "mesh", "awq", "kv_split", "kv_block", "kv_parts", "output_rows", "sparse_prefill"),
)


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
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items() if v not in ((), "")}
    given.pop("kv_parts", None)  # follows from the others
    if given.get("kv_split") == "auto":
        del given["kv_split"]  # either will do
    if "dies" in done and done.get("kv_split", "heads") == "heads":
        given.pop("kv_block", None)  # says nothing of caches without blocks
        done["kv_split"] = "heads"
    if done.get("weights", "int4") not in _QUANTIZED:
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
            help=f"leave {name} out, or start from a file that neither {SETTLED_BY[name]} nor a later pass"
            " has been run on",
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


@closed
class FileRecord(TypedDict):
    """What a file was when it was written: bytes, SHA-256 in hexadecimal digits."""

    size: Annotated[int, Interval(ge=0, le=2**53)]
    sha256: Annotated[str, Matches("[0-9a-f]{64}")]


@closed
class Host(TypedDict):
    """What the libraries were compiled for: LLVM's name of the processor, its features
    that they need (`tyir.execution.processor`), what 4-bit weights are multiplied with, and the schedule
    that tuning found."""

    mcpu: Version
    features: list[Version]
    activations: NotRequired[Annotated[str, Matches("fp32|int16|int8")]]  # fp32 where it does not say
    schedule: NotRequired[Annotated[str, Matches("[a-z0-9= -]{1,200}")]]  # the default where it does not say


@closed
class Build(TypedDict):
    """What the artifacts were made with: versions, the processor, and the machine by name or as
    `machine.toml`.
    """

    tyir: Version
    tvm: Version
    host: Host
    machine: Name


@with_others
class Model(TypedDict, total=False):
    """What is asked of a model; the rest of what the front end knew is kept as it is."""

    architecture: Name
    num_hidden_layers: Count
    hidden_size: Count
    vocab_size: Count
    rope_scaling: Annotated[str, Matches("(yarn|linear)=[0-9.e+]+")]


@closed
@dataclass(frozen=True)
class Manifest:
    """The whole of `manifest.json`."""

    model: Model
    options: BuildOptions
    build: Build
    programs: Annotated[tuple[DieProgram, ...], MinLen(1)]
    files: Annotated[dict[FileName, FileRecord], MinLen(1)] = field(default_factory=dict)
    vision: Vision | None = None

    @property
    def choices(self) -> int | None:
        """How many tokens a step returns for each position; None when it returns logits."""
        return next((t.shape[-1] for t in self.programs[0].outputs if t.name == "top_ids"), None)

    @property
    def has_logsumexp(self) -> bool:
        """Whether the best tokens come with the logsumexp of all logits, which turns a logit into a
        log-probability: those of artifacts of older versions do not.
        """
        return any(t.name == "logsumexp" for t in self.programs[0].outputs)

    @property
    def one_row(self) -> bool:
        """Whether steps of several tokens return one row of each sequence: who needs those of all tokens is
        refused (`need_every_row`) or runs a step for each.
        """
        return self.options.takes_row(max(self.options.seqlens))

    def need_every_row(self, what: str) -> None:
        """`TyirError` when `what` needs a row for each token and the programs return the last alone."""
        if self.one_row:
            raise TyirError(
                f"{what} needs logits of all tokens: these artifacts return those of a step's last token"
                " alone",
                help="compile with --output-rows all",
            )

    def program(self, die: int, seqlen: int) -> DieProgram:
        return next(p for p in self.programs if p.die == die and p.seqlen == seqlen)

    def to_json(self) -> str:
        """The text of the file; `TyirError` when a number of the model is not finite."""
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        try:
            whole = {**content, "sha256": sha256_of(content)}
        except ValueError:
            raise TyirError(
                "the model's configuration holds a number that is not finite", help="mend its config.json"
            ) from None
        return json.dumps(whole, indent=1, sort_keys=True) + "\n"

    @classmethod
    def load(cls, folder: Path, *, check: bool = True) -> Self:
        """The manifest alone; what is to be run, timed or compared is opened with
        `tyir.execution.artifacts.Artifacts`.

        With `check` the manifest's own hash and every file's size and hash are verified.
        `TyirError` lists everything that is wrong.
        """
        from tyir.execution.artifacts import Artifacts

        return cast(Self, Artifacts.open(folder, check=check).manifest)

    @classmethod
    def parse(cls, data: bytes, path: Path, *, check: bool = True) -> Self:
        """The manifest that a file holds: every value is held against the schema and against the others and,
        with `check`, the whole against its own hash.

        `TyirError` lists everything that is wrong.
        """
        content = _read(data, path)
        written = content.pop("sha256", None)
        said = sha256_of(content)
        del content["format"], content["version"]
        manifest = checked(cls, content, str(path), AGAIN)
        if problems := [Diagnostic(p) for p in problems_of(manifest)]:
            raise TyirError(first_of(problems, str(path), AGAIN))
        if check and written != said:
            raise TyirError(
                f"{path} has changed since it was compiled (its hash differs)",
                help=f"{AGAIN}, or restore the file",
            )
        return manifest


def _read(data: bytes, path: Path) -> dict[str, Any]:
    """The JSON of a manifest of this version."""
    try:
        raw = parse_json(data, finite=True)
    except ValueError as error:
        raise TyirError(f"cannot read {path}: {error}", help=AGAIN) from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise TyirError(f"{path} is not a manifest of tyir artifacts")
    if raw.get("version") != VERSION or isinstance(raw["version"], (bool, float)):
        raise TyirError(
            f"{path} has version {str(raw.get('version'))[:40]}; this tyir reads version {VERSION}",
            help=AGAIN,
        )
    return raw


def no_manifest(folder: Path) -> TyirError:
    """What to say of a folder without a manifest: which one may have been meant."""
    found = sorted(p.parent.name for p in folder.glob(f"*/{MANIFEST}")) if folder.is_dir() else []
    if left := sorted(folder.parent.glob(f".{folder.name}.*/old/{MANIFEST}")):
        return TyirError(
            f"{folder} is gone: a compile that was to replace it was killed",
            help=f"compile again, or move {left[0].parent} back",
        )
    return TyirError(f"{folder} {_instead(folder)}", help=_artifacts_near(folder, found))


def _instead(folder: Path) -> str:
    """What a place is that is not a folder of artifacts."""
    if not folder.exists():
        return "does not exist"
    if not folder.is_dir():
        return "is a file, not a folder of artifacts"
    if (folder / "config.json").is_file():
        return f"is a checkpoint, not a folder of artifacts: it holds no {MANIFEST}"
    return f"holds no {MANIFEST}"


def _artifacts_near(folder: Path, found: list[str]) -> str:
    if found:
        return f"did you mean {folder / found[0]}?"
    if (folder / "config.json").is_file() or folder.suffix in (".ir", ".gguf", ".safetensors"):
        model = folder.parent if folder.suffix == ".safetensors" else folder
        return f"compile it: tyir-compile {model} -o out, then give the folder which that prints"
    if hint := download_hint(folder):
        return f"{hint}, then compiled: tyir-compile {folder.name} -o out"
    if not folder.exists() and (hint := missing_hint(folder)):
        return hint
    return "give the folder that tyir-compile printed, for example out/4die"


def sha256_file(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_record(path: Path) -> FileRecord:
    """The entry of `files` for one file."""
    return {"size": path.stat().st_size, "sha256": sha256_file(path)}

"""Whether a program has the interface that the manifest says: its function, tensors, types and aliases.

The manifest is asked how many tokens fit and what a step takes, the programs do the work.  They come from
different files, so nothing is run, timed or restored before both say the same; hashes say nothing of who
wrote them.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from tyir.artifacts.consistency import cache_inputs
from tyir.attributes import DictAttr, IntegerAttr
from tyir.diagnostics import TyirError
from tyir.dialects.builtin import Module
from tyir.dialects.func import Func
from tyir.execution.entry_points import alias_of, entry_points, name_of
from tyir.ir import Op
from tyir.manifest import AGAIN, DieProgram, TensorInfo
from tyir.traits import StoredTensor
from tyir.types import TensorType

__all__ = ["check_commands", "check_ir", "interface_of"]

Interface = tuple[tuple[TensorInfo, ...], tuple[TensorInfo, ...]]


def interface_of(function: Func) -> Interface:
    """The inputs and outputs of an entry point; `TyirError` where a type is not a tensor of known size."""
    returned = function.body.terminator.operands
    return (
        tuple(_tensor(a.type, function.arg_attr(i)) for i, a in enumerate(function.args)),
        tuple(_tensor(v.type, function.res_attr(i), alias_of(function, i)) for i, v in enumerate(returned)),
    )


def _tensor(kind: Any, attributes: DictAttr, alias: int | None = None) -> TensorInfo:
    if not isinstance(kind, TensorType) or not kind.is_static:
        raise TyirError(f"an entry point takes and returns tensors of known size, not {kind}")
    return TensorInfo(
        name=name_of(attributes) or "", shape=kind.static_shape, dtype=str(kind.element), alias=alias
    )


def check_ir(module: Module, program: DieProgram, path: Path, vocabulary: int | None = None) -> None:
    """`TyirError` unless a die's IR is the program that the manifest describes; `vocabulary`: the tokens that
    the manifest counts.
    """
    entry = _entry(module, program, path)
    inputs, outputs = interface_of(entry)
    problems = [
        *_differences("input", program.inputs, inputs),
        *_differences("output", program.outputs, outputs),
        *_references(module, program),
        *(_vocabulary(module, vocabulary) if vocabulary is not None and _takes_tokens(program) else ()),
    ]
    _refuse(problems, path)


def check_commands(module: Module, program: DieProgram, path: Path) -> None:
    """The same of a die's command program: its buffers say which input or output they are
    (`tyir.argument`, `tyir.result`).
    """
    _entry(module, program, path)
    problems: list[str] = []
    state, seen = cache_inputs(program), set[int]()
    for buffer in module.body:
        kind = getattr(buffer, "kind", None)
        if kind not in ("kv", "input", "output"):
            continue
        of = program.outputs if kind == "output" else program.inputs
        index = _number(buffer, "tyir.result" if kind == "output" else "tyir.argument")
        wanted = of[index] if index is not None and 0 <= index < len(of) else None
        found = _tensor(getattr(buffer, "type", None), DictAttr())
        name = str(getattr(buffer, "sym_name", ""))
        if wanted is None or (kind == "kv") != (kind != "output" and index in state):
            problems.append(f"has the {kind} buffer @{name}, which the manifest does not know")
        elif (name, found.shape, found.dtype) != (wanted.name, wanted.shape, wanted.dtype):
            problems.append(f"has @{name}: {_shown(found)}, the manifest {wanted.name}: {_shown(wanted)}")
        if kind == "kv" and index is not None:
            seen.add(index)
    if lacking := sorted(state - seen):
        problems.append(f"has no buffer for {', '.join(program.inputs[i].name for i in lacking)}")
    _refuse(problems, path)


def _entry(module: Module, program: DieProgram, path: Path) -> Func:
    """The one entry point, of the die and length that the manifest says."""
    entries = entry_points(module)
    entry = entries.get(program.seqlen)
    if len(entries) != 1 or entry is None:
        lengths = ", ".join(map(str, entries)) or "no length"
        raise _error(path, f"is for {lengths}, the manifest has it for {program.seqlen} tokens")
    if str(entry.sym_name) != program.function:
        raise _error(path, f"is entered at @{entry.sym_name}, the manifest says {program.function}")
    die = _number(module, "tyir.die")
    if die != program.die:
        raise _error(path, f"is of die {die}, the manifest has it for die {program.die}")
    return entry


def _differences(what: str, said: tuple[TensorInfo, ...], found: tuple[TensorInfo, ...]) -> Iterator[str]:
    for number, (mine, theirs) in enumerate(zip_longest(found, said)):
        if mine != theirs:
            yield f"has {what} {number} {_named(mine)}, the manifest {_named(theirs)}"


def _references(module: Module, program: DieProgram) -> Iterator[str]:
    """Weights in files that are not the program's own: another die's have the same names and sizes."""
    for op in module.walk():
        if op.has_trait(StoredTensor) and (file := getattr(op, "file", "")) not in (
            program.params,
            program.constants,
        ):
            name, files = getattr(op, "sym_name", ""), f"{program.params} and {program.constants}"
            yield f"has @{name} in {file[:200]!r}, the manifest has its weights in {files}"


def _takes_tokens(program: DieProgram) -> bool:
    """Whether what it looks up are tokens: the program of rotary tables looks up positions."""
    return all(tensor.name != "positions" for tensor in program.inputs)


def _vocabulary(module: Module, vocabulary: int) -> Iterator[str]:
    """Rows of the embedding table, or of the die's part of it, that there are no tokens for."""
    for op in module.walk():
        if op.name != "ty.embedding" or not op.operands:
            continue
        table, offset = op.operands[0].type, getattr(op, "offset", 0)
        rows = table.static_shape[0] if isinstance(table, TensorType) and table.is_static else 0
        partial = "tyir.partial" in op.attributes
        if offset < 0 or offset + rows > vocabulary or (not partial and rows != vocabulary):
            yield f"embeds tokens {offset} to {offset + rows - 1}, the manifest counts {vocabulary}"


def _refuse(problems: list[str], path: Path) -> None:
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise _error(path, problems[0] + more)


def _error(path: Path, problem: str) -> TyirError:
    return TyirError(f"{path} {problem}", help=f"they are of different builds, or one was changed; {AGAIN}")


def _number(op: Op, name: str) -> int | None:
    value = op.attributes.get(name)
    return value.value if isinstance(value, IntegerAttr) else None


def _named(tensor: TensorInfo | None) -> str:
    if tensor is None:
        return "none"
    alias = "" if tensor.alias is None else f" in the place of input {tensor.alias}"
    return f"{tensor.name}: {_shown(tensor)}{alias}"


def _shown(tensor: TensorInfo) -> str:
    return "x".join(map(str, (*tensor.shape, tensor.dtype)))

"""A die's memory plan as attributes of its program: printed, edited, and lowered from there.

    ty.param @w                {tyir.address = 4096}                                   where a weight lies in DRAM, for all sequence lengths
    func.func @main_s8(%ids    {tyir.address = ...}) -> (... {tyir.address = ...})     inputs, caches and outputs
    edge10.buffer @spill.layer_s8 {address = ..., kind = "activation"}                 what SRAM has no room for
    func.func @main_s8         {tyir.sram = {temp = 44, side = [4, 4], ...}}           the division of SRAM, in 256ths (`allocate.SramShares`)
    %a = ty.rms_norm(...)      {tyir.place = "sram 16384..31744"}                      a result, from its op to its last reader
    %h = kv.attention(...)     {tyir.place = "...", tyir.scratch = "sram ..."}         what an op needs besides while it runs

The pass `plan-memory` writes one, `lower` reads it.  What a plan does not say is decided by the lowering,
as without a plan.
"""  # noqa: E501

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, Final

from tyir.attributes import (
    ArrayAttr,
    Attribute,
    BoolAttr,
    DenseArrayAttr,
    DictAttr,
    FloatAttr,
    IntegerAttr,
    StringAttr,
)
from tyir.backends.edge10.lowering.context import Place
from tyir.backends.edge10.memory.allocate import SramShares, align
from tyir.backends.edge10.memory.places import Places, Scratch, root
from tyir.diagnostics import Diagnostic, TyirError
from tyir.dialects import edge10, ty
from tyir.dialects.builtin import Module
from tyir.dialects.func import Call, Func
from tyir.ir import Op, Value
from tyir.types import f64, i64

__all__ = ["activation_address", "address_in", "planned_places", "read_shares", "write_plan"]

ADDRESS: Final = "tyir.address"
SRAM: Final = "tyir.sram"
PLACE: Final = "tyir.place"
SCRATCH: Final = "tyir.scratch"
_PLACE: Final = re.compile(r"(sram|@\S+) (\d+)\.\.(\d+)")


# --------------------------------------------------------------------------------------------- the whole plan


def write_plan(
    source: Module,
    main: Func,
    program: Module,
    shares: SramShares,
    layers: Mapping[str, Func],
    placed: Mapping[Func, tuple[Places, Mapping[Op, Scratch]]],
) -> None:
    """Say on `source` where `program`, lowered from its function `main`, has everything.

    `layers` are replaced by their copies in the order in which they were lowered; `placed`: where each
    function's values lie, and the sizes of its ops' scratch.
    """
    buffers = {b.sym_name: b for b in program.body if isinstance(b, edge10.Buffer)}
    for param in [p for p in source.body if isinstance(p, ty.Param) and p.sym_name in buffers]:
        param.attributes = _with_address(param.attributes, buffers[param.sym_name].address)
    given = [main.arg_attr(index) for index in range(len(main.args))]
    made = [main.res_attr(index) for index in range(len(main.function_type.results))]
    for buffer in buffers.values():
        for key, dicts in (("tyir.argument", given), ("tyir.result", made)):
            if isinstance(index := buffer.attributes.get(key), IntegerAttr):
                dicts[index.value] = _with_address(dicts[index.value], buffer.address)
        if buffer.kind == "activation":
            if (old := source.lookup(buffer.sym_name)) is not None:
                old.erase()
            buffer.clone().insert_before(main)
    main.set_arg_attrs(given)
    main.set_res_attrs(made)
    _write_shares(main, shares)
    for name, function in layers.items():
        original = source.lookup(name)
        assert original is not None
        function.insert_before(original)
        original.erase()
    for function, (places, scratch) in placed.items():
        if (
            function.parent_op is source
        ):  # not the blocks of rows of a long step, which are made while lowering
            _write_places(function, places, scratch)


# --------------------------------------------------------------------------------------- the division of SRAM


def _write_shares(main: Func, shares: SramShares) -> None:
    """Say on the entry function of a length how SRAM is divided."""
    main.set_attribute(SRAM, DictAttr({f.name: _share(getattr(shares, f.name)) for f in fields(shares)}))


def read_shares(main: Func) -> SramShares | None:
    """The division that a plan asks for; None without one.  `TyirError` for what is not a division."""
    written = main.attributes.get(SRAM)
    if written is None:
        return None
    known = {f.name: getattr(SramShares(), f.name) for f in fields(SramShares)}
    values = dict(written.items()) if isinstance(written, DictAttr) else {}
    read = {name: _value(values[name]) for name in known if name in values}
    if set(values) != set(known) or any(type(read[n]) is not type(v) for n, v in known.items()):
        example = ", ".join(f"{n} = {_share(v)}" for n, v in known.items())
        raise TyirError(
            Diagnostic(
                f"{SRAM} of @{main.sym_name} is not a division of SRAM: {written}",
                help=f"write {{{example}}}",
            )
        )
    shares = SramShares(**read)
    if (
        shares.arena < 1
        or not 0 <= shares.boundary <= 1
        or min(shares.temp, *shares.side, *shares.packed, *shares.wide) < 1
    ):
        message = f"{SRAM} of @{main.sym_name} leaves {shares.arena} of 256 parts of SRAM for activations"
        raise TyirError(
            Diagnostic(message, help="all parts must be positive and together at most 255, boundary in 0..1")
        )
    return shares


def _share(value: Any) -> Attribute:
    if isinstance(value, bool):
        return BoolAttr(value)
    if isinstance(value, tuple):
        return DenseArrayAttr.i64(value)
    return FloatAttr(value, f64) if isinstance(value, float) else IntegerAttr(value, i64)


def _value(attribute: Attribute) -> Any:
    if isinstance(attribute, DenseArrayAttr):
        return attribute.ints()
    return attribute.value if isinstance(attribute, (BoolAttr, FloatAttr, IntegerAttr)) else None


# --------------------------------------------------------------------------------------- places in a function


def _write_places(function: Func, places: Places, scratch: Mapping[Op, Scratch]) -> None:
    """Say on each op where its results and its scratch lie.

    What a call gives lies where its function says.
    """
    for op in [op for op in function.body if not isinstance(op, Call)]:
        named = [places.values.get(v) if root(v) is v else None for v in op.results]
        texts = [
            "" if p is None or p.constant else _text(p, ty.tensor_type(v).nbytes)
            for p, v in zip(named, op.results)
        ]
        if any(texts):
            op.set_attribute(PLACE, _one_or_all(texts))
        if op in places.scratch and op in scratch:
            (offset, spilled), size = places.scratch[op], scratch[op]
            parts = [
                _text(Place("sram", offset), size.sram_bytes),
                *([_text(spilled, size.dram_bytes)] if size.dram_bytes else []),
            ]
            op.set_attribute(SCRATCH, _one_or_all(parts))


def planned_places(
    function: Func, decided: Places, fixed: Mapping[Value, Place], scratch: Mapping[Op, Scratch]
) -> Places:
    """`decided`, with the places that a plan asks for instead; `fixed` ones stay.

    `TyirError` for places that are none, or of another size than the tensor.
    """
    values, scratches, spilled = dict(decided.values), dict(decided.scratch), decided.spill_bytes
    for op in function.body:
        for value, text in zip(op.results, _texts(op, PLACE)):
            if text and value not in fixed:
                values[value] = place = _place(op, text, ty.tensor_type(value).nbytes)
                spilled = max(spilled, 0 if place.in_sram else place.offset + ty.tensor_type(value).nbytes)
        if op in scratch and (texts := _texts(op, SCRATCH)):
            sram = _place(op, texts[0], scratch[op].sram_bytes)
            kept = _place(op, texts[1], scratch[op].dram_bytes) if len(texts) > 1 else scratches[op][1]
            scratches[op] = sram.offset, kept
    return Places(values, scratches, align(spilled))


def _text(place: Place, nbytes: int) -> str:
    """A place as it is written: `sram 0..64`, `@spill.layer_s8 0..64`.

    Empty for a place that is relative to an address the caller gives.
    """
    if place.memory == "dram" and not isinstance(place.base, str):
        return ""
    return f"{'sram' if place.in_sram else f'@{place.base}'} {place.offset}..{place.offset + nbytes}"


def _one_or_all(texts: Sequence[str]) -> Attribute:
    return StringAttr(texts[0]) if len(texts) == 1 else ArrayAttr([StringAttr(t) for t in texts])


def _texts(op: Op, name: str) -> list[str]:
    written = op.attributes.get(name)
    parts = list(written) if isinstance(written, ArrayAttr) else [written]
    return [p.value for p in parts if isinstance(p, StringAttr)]


def _place(op: Op, text: str, nbytes: int) -> Place:
    match = _PLACE.fullmatch(text)
    if match is None:
        raise TyirError(
            Diagnostic(
                f"'{text}' is not a place",
                where=str(op.loc),
                help='write "sram 4096..8192" or "@spill.layer_s8 0..4096"',
            )
        )
    memory, low, high = match.group(1), int(match.group(2)), int(match.group(3))
    if high - low != nbytes:
        message = f"'{op.name}' needs {nbytes} bytes, its place '{text}' has {high - low}"
        raise TyirError(
            Diagnostic(message, where=str(op.loc), help=f'write "{memory} {low}..{low + nbytes}"')
        )
    return Place("sram", low) if memory == "sram" else Place("dram", low, memory[1:])


# ------------------------------------------------------------------------------------------ addresses in DRAM


def _with_address(attributes: DictAttr, address: int) -> DictAttr:
    """The dictionary of an argument, a result or a parameter, with the address of its buffer."""
    return attributes.with_entry(ADDRESS, IntegerAttr(address, i64))


def address_in(attributes: DictAttr) -> int | None:
    """The address that a plan gives there; None without one."""
    written = attributes.get(ADDRESS)
    return written.value if isinstance(written, IntegerAttr) else None


def activation_address(die: Module, name: str) -> int | None:
    """The address that a plan gives a buffer for activations."""
    buffer = die.lookup(name)
    return buffer.address if isinstance(buffer, edge10.Buffer) else None

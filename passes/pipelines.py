"""The named pipelines, as text; where the order matters the reason stands beside the entry.

Usable wherever a pass name is: `--pass-pipeline=to-ty`,
`--pass-pipeline='builtin.module(to-ty,kv-materialize{max-kv=512})'`.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Final

from tyir.artifacts.token_blocks import BLOCK
from tyir.diagnostics import TyirError
from tyir.execution.awq_table import AwqTable
from tyir.manifest import BuildOptions
from tyir.passes.select_output import parse_output
from tyir.stages import STAGES

__all__ = ["PIPELINES", "awq_pipeline", "reference_pipeline", "remaining_pipeline", "tower_pipeline"]

_MACHINE: Final = "edge10"

PIPELINES: Final[dict[str, str]] = {
    # aten -> ty.  cse first merges what the exported graph repeats per layer (the rotary tables), dce drops
    # position checks.
    "to-ty": "raise-aten,canonicalize,cse,dce",
    # ty -> program with the default options: 4 dies, lengths 1 and 8, a cache of 1024 tokens.
    "llm": (
        "to-ty,kv-materialize{max-kv=1024},partition-dies{dies=4},specialize-seqlen{seqlens=1,8},to-program"
    ),
    # static -> program.  Parameters first: a layer's body must not hold weight expressions, or no two layers
    # would be equal.
    "to-program": "outline-params,outline-layers",
}


def remaining_pipeline(
    stage: str, options: BuildOptions, machine: str = _MACHINE, done: Collection[str] = ()
) -> str:
    """The pipeline that takes a module from `stage` to `program`; this is what `tyir-compile` runs.
    `machine` (a name or a file) is what cuts are chosen for, `done` what passes have recorded (`tyir.build`).

    Quantisation stands before partition-dies, which cuts the MLP in whole quantisation groups; specialisation
    after it, so that dies are cut once, and after outline-params, so that lengths do not repeat weight
    expressions.  select-output stands before the cut, so that each die chooses among its own columns of the
    vocabulary, and select-rows, so that what is exchanged is one row's.  sparse-prefill changes one length
    alone, and each die's heads for themselves, so it comes when both are known.
    """
    if (
        stage == "sharded"
    ):  # partition-dies was begun by hand; its later steps do nothing where they have been
        return ",".join(
            (
                "propagate-sharding,insert-collectives,localize-dies",
                remaining_pipeline("dist", options, machine, done),
            )
        )
    best = parse_output(options.output)
    cache = [f"max-kv={options.max_kv}"]
    cache += ["embedding-as-input=true"] if options.embedding_as_input else []
    cache += [f"dtype={options.kv_dtype}"] if options.kv_dtype != "fp16" else []
    cache += [f"layout={options.kv_layout}"] if options.kv_layout != "HND" else []
    dies = [f"dies={options.dies}", *([f"remap={numbers(options.die_map)}"] if options.die_map else [])]
    dies += [f"pp={options.pp}"] if options.pp > 1 else []
    dies += [f"mesh={numbers(options.mesh)}"] if options.mesh else []
    dies += [f"kv-split={options.kv_split}"] if options.kv_split != "auto" else []
    dies += [f"kv-block={options.kv_block}"] if options.kv_block != BLOCK else []
    quote = '"' if "'" in machine else "'"  # of a path
    dies += [f"machine={quote}{machine}{quote}"] if machine != _MACHINE else []
    entries = [
        ("aten", "to-ty"),
        ("ty", quantization(options) if "weights" not in done else ""),
        ("ty", _scaled_keys(options)),
        ("ty", f"kv-materialize{{{' '.join(cache)}}}"),
        (
            "kv",
            f"specialize-batch{{batch={options.batch}}}" if options.batch > 1 and "batch" not in done else "",
        ),
        ("kv", f"select-output{{kind=topk k={best}}}" if best and "output" not in done else ""),
        (
            "kv",
            "select-rows{rows=last}" if options.output_rows == "last" and "output_rows" not in done else "",
        ),
        ("kv", f"partition-dies{{{' '.join(dies)}}}"),
        ("dist", f"outline-params,specialize-seqlen{{seqlens={numbers(options.seqlens)}}}"),
        (
            "static",
            f"sparse-prefill{{{options.choice.text().replace(',', ' ')}}}"
            if options.choice is not None and "sparse_prefill" not in done
            else "",
        ),
        ("static", "to-program" if stage == "static" else "outline-layers"),  # specialised by hand
    ]
    order = list(STAGES)
    if stage not in order:
        raise TyirError(f"there is no stage '{stage}'; stages are {', '.join(order)}")
    first = order.index(stage)
    if options.choice is not None and "sparse_prefill" not in done and first > order.index("static"):
        raise TyirError(
            f"sparse prefill is asked for, the module is at stage '{stage}' without it",
            help="start from a file of stage static or before, or leave it out",
        )
    return ",".join(text for s, text in entries if text and order.index(s) >= first)


def tower_pipeline(
    stage: str,
    patches: int,
    dies: int,
    die_map: tuple[int, ...] = (),
    machine: str = _MACHINE,
    exponent: int = 0,
    strategy: str = "cost",
) -> str:
    """The pipeline that takes a module of one vision tower (`extract-graph`) from `stage` to `program`:
    without cache and with one length, its `patches`; its residual stream divided by 2^`exponent`, cut over
    the dies by `strategy` (`annotate-sharding`).

    Reshapes that the tower's lines of patches needed meet in static-step; canonicalize merges them.
    """
    cut = [f"dies={dies}", *([f"remap={numbers(die_map)}"] if die_map else [])]
    quote = '"' if "'" in machine else "'"  # of a path
    cut += [f"machine={quote}{machine}{quote}"] if machine != _MACHINE else []
    cut += [f"strategy={strategy}"] if strategy != "cost" else []
    entries = [
        ("aten", "to-ty"),
        ("ty", f"scale-residual{{exponent={exponent}}}" if exponent else ""),
        ("ty", "static-step,canonicalize,cse,dce"),
        ("kv", f"partition-dies{{{' '.join(cut)}}}"),
        ("dist", f"specialize-seqlen{{seqlens={patches}}}"),
        ("static", "to-program"),
    ]
    order = list(STAGES)
    if stage not in order or order.index(stage) > order.index("ty"):
        raise TyirError(
            f"a vision tower at stage '{stage}' is not compiled beside its language model",
            help="give the module as tyir-import writes it, or at stage ty",
        )
    return ",".join(text for s, text in entries if text and order.index(s) >= order.index(stage))


def reference_pipeline(options: BuildOptions) -> str:
    """From `aten` to `ty` with the artifacts' weights: the whole model, uncut and without a cache, that
    verification compares with.
    """
    return ",".join(text for text in ("to-ty", quantization(options), _scaled_keys(options)) if text)


def _scaled_keys(options: BuildOptions) -> str:
    """The entry that prepares keys for a cache of 8 or 4 bits; empty for one of f16."""
    return {"int8": "scale-keys", "int4": "scale-keys{dtype=int4}"}.get(options.kv_dtype, "")


def quantization(options: BuildOptions) -> str:
    """The entry that makes the weights what `options` asks for; empty when they stay as they are.

    `TyirError` for weights that only a table can make (`awq_pipeline`).
    """
    if options.weights == "awq":
        raise TyirError(
            "weights awq are made with an AWQ table, and none has been folded in",
            help="give --awq-table FILE, or run awq-fold and quantize-weights first",
        )
    return f"quantize-weights{{group-size={options.group_size}}}" if options.weights == "int4" else ""


def awq_pipeline(table: Path) -> str:
    """From `ty` to quantised weights with an AWQ table: awq-fold, then quantize-weights with the table's
    settings.

    `TyirError` for a table that cannot be read, or for a number of bits that no engine computes with.
    """
    settings = AwqTable.open(table).settings
    if settings.bits != 4:
        raise TyirError(
            f"{table} was made for {settings.bits} bits; weights are quantised to 4",
            help="make a table for 4 bits",
        )
    text = f"group-size={settings.group_size}"
    text += "" if settings.zero_point else " zero-point=false"
    text += " lm-head=true" if settings.lm_head else ""
    if settings.modules_to_not_convert:
        text += f" skip={','.join(settings.modules_to_not_convert)}"
    quote = '"' if "'" in str(table) else "'"
    return f"awq-fold{{table={quote}{table}{quote}}},quantize-weights{{{text}}}"


def numbers(values: tuple[int, ...]) -> str:
    """A list as pipeline text writes it."""
    return ",".join(map(str, values))

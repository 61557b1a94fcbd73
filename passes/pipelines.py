"""The named pipelines, as text; where the order matters the reason stands beside the entry.

Usable wherever a pass name is: `--pass-pipeline=to-ty`, `--pass-pipeline='builtin.module(to-ty,kv-materialize{max-kv=512})'`.
"""

from __future__ import annotations

from typing import Final

from tyir.passes.select_output import parse_output

__all__ = ["PIPELINES", "remaining_pipeline"]

PIPELINES: Final[dict[str, str]] = {
    # aten -> ty.  cse first merges what the exported graph repeats per layer (the rotary tables), dce drops position checks.
    "to-ty": "raise-aten,canonicalize,cse,dce",
    # ty -> program with the default options: 4 dies, lengths 1 and 8, a cache of 1024 tokens.
    "llm": "to-ty,kv-materialize{max-kv=1024},partition-dies{dies=4},specialize-seqlen{seqlens=1,8},to-program",
    # static -> program.  Parameters first: a layer's body must not hold weight expressions, or no two layers would be equal.
    "to-program": "outline-params,outline-layers",
}


def remaining_pipeline(
    stage: str,
    *,
    weights: str,
    group_size: int,
    max_kv: int,
    dies: int,
    die_map: tuple[int, ...],
    seqlens: tuple[int, ...],
    embedding_as_input: bool,
    output: str = "logits",
    kv_dtype: str = "fp16",
) -> str:
    """The pipeline that takes a module from `stage` to `program`; this is what `tyir-compile` runs.

    Quantisation stands before partition-dies, which cuts the MLP in whole quantisation groups; specialisation after it, so that dies are cut once.
    So does select-output: each die then chooses among its own columns of the vocabulary.
    """
    remap = f" remap={numbers(die_map)}" if die_map else ""
    entry = " embedding-as-input=true" if embedding_as_input else ""
    cache = f" dtype={kv_dtype}" if kv_dtype != "fp16" else ""
    best = parse_output(output)
    entries = [
        ("aten", "to-ty"),
        ("ty", f"quantize-weights{{group-size={group_size}}}" if weights == "int4" else ""),
        ("ty", f"kv-materialize{{max-kv={max_kv}{entry}{cache}}}"),
        ("kv", f"select-output{{kind=topk k={best}}}" if best else ""),
        ("kv", f"partition-dies{{dies={dies}{remap}}}"),
        ("dist", f"specialize-seqlen{{seqlens={numbers(seqlens)}}}"),
        ("static", "to-program"),
    ]
    stages = [s for s, _ in entries]
    first = stages.index(stage) if stage in stages else len(entries)
    return ",".join(text for _, text in entries[first:] if text)


def numbers(values: tuple[int, ...]) -> str:
    """A list as pipeline text writes it."""
    return ",".join(map(str, values))

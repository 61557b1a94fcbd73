"""What `tyir-verify` says of prompts: a row for each, a verdict, the same as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from tyir.tools.cli import note
from tyir.tools.commands.json_forms import Checked, PictureChecked, PromptChecked
from tyir.tools.verify.compare import PromptResult
from tyir.tools.verify.locate import Divergence

__all__ = ["HEAD", "TOKENS", "agrees", "form_of", "print_end", "row_of", "tell_divergence"]

LOGIT_COSINE: Final = 0.9999
LOGIT_SIZE: Final = 0.01  # how far the logits' norm may be from Hugging Face's, of 1
# The same with a 4-bit cache, which Hugging Face's is not: of the embedded model 0.988 and 0.002.
FOUR_BIT_COSINE: Final = 0.97
FOUR_BIT_SIZE: Final = 0.05
TOKENS: Final = {False: 32, True: 64}  # greedy tokens per prompt, without and with --full

HEAD: Final = (
    f"{'prompt':>6}{'tokens':>8}{'positions':>11}{'min logit cosine':>18}{'logit size':>12}"
    f"{'max logit error':>17}{'same greedy tokens':>20}"
)


def agrees(r: PromptResult, kv_dtype: str = "fp16") -> bool:
    """Whether a prompt's logits and tokens are Hugging Face's, but for rounding; of a 4-bit cache whether its
    logits are near them.
    """
    if kv_dtype == "int4":
        return bool(r.logit_cosine.min() >= FOUR_BIT_COSINE and abs(r.logit_size - 1) <= FOUR_BIT_SIZE)
    right = r.logit_cosine.min() >= LOGIT_COSINE and abs(r.logit_size - 1) <= LOGIT_SIZE
    return bool(right) and not r.differing


def row_of(number: int, r: PromptResult) -> str:
    """The line of a prompt, below `HEAD`."""
    same = r.positions - len(r.differing) - len(r.ties)
    ties = f" (+{len(r.ties)} tied)" if r.ties else ""
    return (
        f"{number:>6}{r.prompt_length:>8}{len(r.logit_cosine):>11}{r.logit_cosine.min():>18.7f}"
        f"{r.logit_size:>12.5f}{r.logit_error.max():>17.4f}{f'{same}/{r.positions}{ties}':>20}"
    )


def print_end(results: Sequence[PromptResult], engine: str, good: bool, kv_dtype: str = "fp16") -> None:
    """The layers, and the verdict."""
    if layers := _layers(results):
        print("\nlayer  min cosine of the hidden state after it")
        for i, layer in enumerate(layers):
            print(f"{i:>5}  {layer:.7f}")
    tied = sum(len(r.ties) for r in results)
    ties = f"; {tied} near ties of Hugging Face's own logits fell the other way" if tied else ""
    print(
        f"\n{'OK' if good else 'DIFFERENT'}: {engine} engine against Hugging Face fp32 on the same"
        f" weights{ties}"
    )
    if kv_dtype == "int4":
        note(
            "Hugging Face's cache has no 4 bits: cosines from"
            f" {FOUR_BIT_COSINE} on are taken for their rounding, and tokens may differ; compile with"
            " --kv-dtype fp16 to compare the rest more closely"
        )


def _layers(results: Sequence[PromptResult]) -> tuple[float, ...]:
    return tuple(min(column) for column in zip(*(r.layer_cosine for r in results)))


def form_of(
    results: Sequence[PromptResult],
    good: bool,
    divergence: str | None,
    pictures: Sequence[PictureChecked] = (),
) -> Checked:
    """The same for `--json`."""
    prompts = tuple(
        PromptChecked(
            prompt_tokens=r.prompt_length,
            positions=len(r.logit_cosine),
            min_logit_cosine=float(r.logit_cosine.min()),
            logit_size=r.logit_size,
            max_logit_error=float(r.logit_error.max()),
            tokens=r.positions,
            differing=len(r.differing),
            ties=len(r.ties),
        )
        for r in results
    )
    return Checked(
        ok=good,
        min_logit_cosine=min(p.min_logit_cosine for p in prompts),
        logit_size=max((p.logit_size for p in prompts), key=lambda size: abs(size - 1)),
        max_logit_error=max(p.max_logit_error for p in prompts),
        tokens=sum(p.tokens for p in prompts),
        differing=sum(p.differing for p in prompts),
        ties=sum(p.ties for p in prompts),
        layer_cosine=_layers(results),
        prompts=prompts,
        first_divergence=divergence,
        pictures=tuple(pictures),
    )


def tell_divergence(found: Divergence | None) -> None:
    """The first op that is off, to people."""
    note(
        f"first divergence: {found}"
        if found
        else "no single op is off by more than rounding: errors add up over the layers"
    )

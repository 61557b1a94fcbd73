"""vLLM's sampling parameters as tyir's: tokens are chosen as `tyir-serve` chooses them."""

from __future__ import annotations

from typing import Any, Final

from tyir.diagnostics import TyirError
from tyir.manifest import Manifest
from tyir.runtime_sim.serving.choosing import Sampling

__all__ = ["check", "sampling_of"]

# Fields that change which tokens come or what is said of them, and are not done.
_REFUSED: Final = (
    "logprob_token_ids",
    "prompt_logprob_token_ids",
    "thinking_token_budget",
    "trace_decode_token_ids",
)


def sampling_of(params: Any) -> Sampling:
    """What a request asks of the choice of its tokens."""
    return Sampling(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        seed=params.seed,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        bias={int(token): float(value) for token, value in (params.logit_bias or {}).items()},
        allowed=None if params.allowed_token_ids is None else frozenset(params.allowed_token_ids),
        bad=tuple(map(tuple, params.bad_words_token_ids or ())),
    )


def check(params: Any, manifest: Manifest) -> None:
    """`ValueError`, which vLLM answers with 400, for what artifacts cannot do.

    A nucleus and a smallest share of all tokens, which the best may not hold at some position, are refused:
    vLLM has no way to end one request alone.
    """
    vocabulary, choices = int(manifest.model["vocab_size"]), manifest.choices
    if asked := [name for name in _REFUSED if getattr(params, name, None) is not None]:
        raise ValueError(f"{', '.join(asked)}: vllm-tyir does not do this")
    sampling, others = sampling_of(params), []
    if choices is not None:
        among_all = params.temperature > 0 and sampling.top_k <= 0
        wanted = {
            "prompt_logprobs": params.prompt_logprobs is not None,
            "structured_outputs": params.structured_outputs is not None,
            "bad_words": bool(params.bad_words),  # their tokens are not known yet
            "top_p without top_k": among_all and params.top_p < 1,
            "min_p without top_k": among_all and params.min_p > 0,
        }
        others = [name for name, is_asked in wanted.items() if is_asked]
    logprobs = vocabulary if params.logprobs == -1 else params.logprobs
    try:
        sampling.check(vocabulary, choices, manifest.has_logsumexp, logprobs=logprobs, others=others)
        if params.prompt_logprobs is not None:
            manifest.need_every_row("prompt_logprobs")
    except TyirError as error:
        raise ValueError(str(error)) from None

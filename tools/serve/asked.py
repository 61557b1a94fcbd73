"""From the fields of a request to `Params`: ranges, with vLLM's words for what is out of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

from tyir.diagnostics import TyirError
from tyir.runtime_sim.serving.choosing import Sampling
from tyir.tools.run.prompts import token_ids
from tyir.tools.serve.async_engine import AsyncEngine, Params
from tyir.tools.serve.errors import RequestError, refusal
from tyir.tools.serve.fields import SamplingFields
from tyir.tools.serve.structured import constraint_of

__all__ = ["MOST_LOGPROBS", "MOST_MESSAGES", "limit_of", "messages_of", "params_of"]

MOST_LOGPROBS: Final = 20
MOST_MESSAGES: Final = 1024
_MOST_STOPS: Final = 4
_MOST_NAMED: Final = 1024  # tokens or words in a list
_SEED: Final = 1 << 63


def params_of(fields: SamplingFields, engine: AsyncEngine, most_answers: int) -> Params:
    """All that both kinds of completions share, but for the number of tokens.

    `RequestError` names the field that is at fault.
    """
    stops = [fields.stop] if isinstance(fields.stop, str) else fields.stop or []
    n = 1 if fields.n is None else fields.n
    least = fields.min_tokens or 0
    wrong = [
        ("n", not 1 <= n <= most_answers, f"n must be from 1 to {most_answers}, got {n}."),
        ("stop", len(stops) > _MOST_STOPS, f"stop may hold {_MOST_STOPS} strings, got {len(stops)}."),
        ("stop", not all(stops), "stop cannot contain an empty string."),
        ("min_tokens", least < 0, f"min_tokens must be greater than or equal to 0, got {least}."),
        ("seed", not -_SEED <= (fields.seed or 0) < _SEED, f"seed must have 64 bits, got {fields.seed}."),
        ("stream_options", fields.stream_options is not None and not fields.stream,
         "stream_options can only be set when stream is true."),
    ]  # fmt: skip
    for name in ("logit_bias", "bad_words", "allowed_token_ids", "stop_token_ids"):
        count = len(getattr(fields, name) or ())
        wrong.append((name, count > _MOST_NAMED, f"{name} may hold {_MOST_NAMED} entries, got {count}."))
    for param, is_wrong, message in wrong:
        if is_wrong:
            raise RequestError(400, message, param)
    vocabulary = engine.engine.vocabulary
    for token in fields.stop_token_ids or ():
        if not 0 <= token < vocabulary:
            raise RequestError(
                400, f"token {token} is not in the vocabulary of {vocabulary}", "stop_token_ids"
            )
    return Params(
        n=n,
        sampling=_sampling(fields, engine),
        stop=tuple(stops),
        stop_token_ids=tuple(fields.stop_token_ids or ()),
        include_stop=bool(fields.include_stop_str_in_output),
        ignore_eos=bool(fields.ignore_eos),
        min_tokens=least,
        skip_special_tokens=fields.skip_special_tokens is not False,
        constraint=constraint_of(fields.response_format, fields.structured_outputs, engine),
        salt=fields.cache_salt or "",
        whole=not fields.stream,
    )


def _sampling(fields: SamplingFields, engine: AsyncEngine) -> Sampling:
    bias: dict[int, float] = {}
    for key, value in (fields.logit_bias or {}).items():
        try:
            bias[int(key)] = min(max(value, -100.0), 100.0)
        except ValueError:
            raise RequestError(400, f"logit_bias: '{key[:40]}' is not a token id", "logit_bias") from None
    given: dict[str, Any] = {
        name: value
        for name in ("temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty",
                     "presence_penalty", "frequency_penalty")
        if (value := getattr(fields, name)) is not None
    }  # fmt: skip
    ranges: dict[str, tuple[Callable[[float], bool], str]] = {
        "temperature": (lambda v: v >= 0, "non-negative"),
        "top_p": (lambda v: 0 < v <= 1, "in (0, 1]"),
        "top_k": (lambda v: v >= -1, "-1 or more (0 and -1: all)"),
        "min_p": (lambda v: 0 <= v <= 1, "in [0, 1]"),
        "repetition_penalty": (lambda v: v > 0, "greater than zero"),
        "presence_penalty": (lambda v: -2 <= v <= 2, "in [-2, 2]"),
        "frequency_penalty": (lambda v: -2 <= v <= 2, "in [-2, 2]"),
    }
    for name, (holds, what) in ranges.items():
        if name in given and not holds(given[name]):
            raise RequestError(400, f"{name} must be {what}, got {given[name]}.", name)
    words = [w for w in fields.bad_words or () if w]
    bad = {tuple(token_ids(engine.tokenizer, form)) for word in words for form in (word, f" {word}")}
    sampling = replace(
        engine.defaults(),
        **given,
        bias=bias,
        allowed=frozenset(fields.allowed_token_ids) if fields.allowed_token_ids is not None else None,
        bad=tuple(sorted(bad)),
    )
    try:
        sampling.check(engine.engine.vocabulary, engine.engine.choices)
    except TyirError as error:
        raise refusal(error) from None
    return sampling


def limit_of(asked: int | None, default: int | None, prompt: int, engine: AsyncEngine, param: str) -> int:
    """How many tokens may be made after a prompt; `RequestError` when what is asked for does not fit."""
    capacity = engine.capacity
    cure = f"shorten it, or compile with --max-kv {prompt + max(asked or 1, 1)} or more"
    if prompt + (asked != 0) > capacity:
        raise RequestError(
            400,
            f"This model's maximum context length is {capacity} tokens. However, your prompt has {prompt}"
            f" tokens: {cure}.",
            "input_tokens",
        )
    if asked is not None and asked < 0:
        raise RequestError(400, f"{param} must be at least 1, got {asked}.", param)
    if asked is not None and prompt + asked > capacity:
        raise RequestError(
            400,
            f"This model's maximum context length is {capacity} tokens. However, you requested {asked} output"
            f" tokens and your prompt has {prompt}, {prompt + asked} together: {cure}.",
            param,
        )
    wanted = default if asked is None else asked
    return min(capacity - prompt, wanted) if wanted is not None else capacity - prompt


def messages_of(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """The messages as templates know them: text where all parts are text; `RequestError` for pictures."""
    if not messages:
        raise RequestError(400, "messages must hold at least one message", "messages")
    if len(messages) > MOST_MESSAGES:
        raise RequestError(400, f"messages may hold {MOST_MESSAGES}, got {len(messages)}", "messages")
    plain = []
    for number, message in enumerate(messages):
        content = message.content
        if isinstance(content, list):
            texts = []
            for part in content:
                kind = part.get("type", "text" if "text" in part else None)
                if kind not in ("text", "input_text") or not isinstance(part.get("text"), str):
                    raise RequestError(
                        400,
                        "this server answers text alone: it is not a multimodal model"
                        if kind in ("image_url", "input_audio", "video_url")
                        else f"a part of kind {str(kind)[:40]!r} is not known, use text",
                        f"messages.{number}.content",
                    )
                texts.append(part["text"])
            content = "\n".join(texts)
        plain.append({**message.model_dump(exclude_none=True), "content": content or ""})
    return plain

"""From the fields of a request to `Params`: ranges, with vLLM's words for what is out of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from tyir.diagnostics import TyirError
from tyir.runtime_sim.serving.choosing import PENALTIES, Sampling
from tyir.runtime_sim.vision.pictures import Picture
from tyir.tools.run.prompts import token_ids
from tyir.tools.serve.async_engine import AsyncEngine, Params
from tyir.tools.serve.errors import RequestError, refusal
from tyir.tools.serve.fields import SamplingFields
from tyir.tools.serve.pictures import MOST_PICTURES
from tyir.tools.serve.structured import constraint_of
from tyir.tools.serve.tool_calls import Tools

__all__ = ["MOST_LOGPROBS", "MOST_MESSAGES", "limit_of", "messages_of", "params_of", "template_options"]

MOST_LOGPROBS: Final = 20
MOST_MESSAGES: Final = 1024
_MOST_STOPS: Final = 4
_MOST_NAMED: Final = 1024  # tokens or words in a list
# What `chat_template_kwargs` may not replace.
_SAID_ELSEWHERE: Final = frozenset(
    (
        *("messages", "tools", "documents", "chat_template", "tokenize"),
        *("add_generation_prompt", "continue_final_message"),
    )
)
_SEED: Final = 1 << 63


def params_of(
    fields: SamplingFields, engine: AsyncEngine, most_answers: int, tools: Tools | None = None
) -> Params:
    """All that both kinds of completions share, but for the number of tokens.

    `RequestError` names the field that is at fault.
    """
    stops = [fields.stop] if isinstance(fields.stop, str) else fields.stop or []
    n = 1 if fields.n is None else fields.n
    least = fields.min_tokens or 0
    wrong = [
        ("n", not 1 <= n <= most_answers, f"n must be from 1 to {most_answers}, got {n}."),
        ("best_of", fields.best_of not in (None, n),
         f"best_of must be n, which is {n}: answers are not compared, got {fields.best_of}."),
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
        skip_special_tokens=fields.skip_special_tokens is not False and tools is None,  # calls may be marked
        constraint=constraint_of(
            fields.response_format,
            fields.structured_outputs,
            engine,
            tools.grammar() if tools is not None else None,
        ),
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
        "repetition_penalty": (
            lambda v: PENALTIES[0] <= v <= PENALTIES[1],
            "from {:g} to {:g}".format(*PENALTIES),
        ),
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
        served = engine.engine
        sampling.check(served.vocabulary, served.choices, served.has_logsumexp)
    except TyirError as error:
        raise refusal(error) from None
    return sampling


def template_options(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a request tells the chat template (`chat_template_kwargs`), as Qwen3's `enable_thinking`;
    `RequestError` for what the request says elsewhere.
    """
    param = "chat_template_kwargs"
    if said := [name for name in given or {} if name in _SAID_ELSEWHERE]:
        where = "is a field of the request" if said[0] != "tokenize" else "is not the template's"
        raise RequestError(400, f"{param} may not hold {said[0]}, which {where}.", param)
    return dict(given or {})


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


def messages_of(messages: Sequence[Any], engine: AsyncEngine) -> tuple[list[dict[str, Any]], list[Picture]]:
    """The messages as templates know them, and the pictures in them, in order: without pictures text, where
    all parts are text.  `RequestError` for pictures that a model does not take, or cannot be read.
    """
    if not messages:
        raise RequestError(400, "messages must hold at least one message", "messages")
    if len(messages) > MOST_MESSAGES:
        raise RequestError(400, f"messages may hold {MOST_MESSAGES}, got {len(messages)}", "messages")
    plain: list[dict[str, Any]] = []
    pictures: list[Picture] = []
    for number, message in enumerate(messages):
        where = f"messages.{number}.content"
        said = message.model_dump(exclude_none=True)
        parts: list[dict[str, str]] = []
        images = [(url, False) for url in said.pop("images", None) or ()]  # as Ollama's clients send them
        for part in message.content if isinstance(message.content, list) else ():
            kind = part.get("type", "text" if "text" in part else None)
            if kind in ("text", "input_text") and isinstance(part.get("text"), str):
                parts.append({"type": "text", "text": part["text"]})
            elif kind == "image_url":
                holder = part.get("image_url")
                images.append((holder.get("url") if isinstance(holder, dict) else holder, True))
                parts.append({"type": "image"})
            elif kind in ("input_audio", "video_url", "image"):
                raise RequestError(
                    400, f"{engine.artifacts.path.name} does not take parts of kind {kind!r}", where
                )
            else:
                raise RequestError(400, f"a part of kind {str(kind)[:40]!r} is not known, use text", where)
        if isinstance(message.content, str):
            parts.append({"type": "text", "text": message.content})
        if len(pictures) + len(images) > MOST_PICTURES:
            raise RequestError(400, f"a request may hold {MOST_PICTURES} pictures", where)
        pictures += [
            _picture(text, url, len(pictures) + i, engine, where) for i, (text, url) in enumerate(images)
        ]
        parts = [{"type": "image"} for _, url in images if not url] + parts
        text = "\n".join(p["text"] for p in parts if p["type"] == "text")
        whole = engine.eyes is not None and message.role == "user"  # templates of such models read parts
        plain.append({**said, "content": parts if whole or images else text})
        _read_arguments(plain[-1], number)
    return plain, pictures


def _picture(text: Any, url: bool, number: int, engine: AsyncEngine, where: str) -> Picture:
    if engine.eyes is None:
        raise RequestError(400, f"{engine.artifacts.path.name} is not a multimodal model", where)
    if not isinstance(text, str):
        raise RequestError(400, 'image_url is {"url": "data:image/png;base64,.."}', where)
    try:
        return engine.eyes.picture(text, f"picture {number + 1}", url=url)
    except TyirError as error:
        raise refusal(error, where) from None


def _read_arguments(message: dict[str, Any], number: int) -> None:
    """Arguments of calls are JSON in requests, and what it says in templates."""
    calls = message.get("tool_calls")
    if calls is None:
        return
    where = f"messages.{number}.tool_calls"
    if not isinstance(calls, list) or not all(isinstance(c, dict) for c in calls):
        raise RequestError(400, "tool_calls is a list of calls", where)
    read = []
    for call in calls:
        function = call.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RequestError(400, "a call has a function with a name", where)
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError):
                raise RequestError(400, "arguments of a call must be JSON", where) from None
        read.append({**call, "function": {**function, "arguments": arguments}})
    message["tool_calls"] = read

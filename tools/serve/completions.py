"""`/v1/completions` and `/v1/chat/completions`: from requests to answers, whole or as they come."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from tyir.diagnostics import TyirError
from tyir.runtime_sim.serving.generation import Finish, Scored
from tyir.runtime_sim.vision.pictures import Picture
from tyir.runtime_sim.vision.request import VisionRequest
from tyir.tools.serve.asked import MOST_LOGPROBS, limit_of, messages_of, params_of, template_options
from tyir.tools.serve.async_engine import Answer, AsyncEngine, Delta, Params, Prompt
from tyir.tools.serve.errors import RequestError, error_body, refusal
from tyir.tools.serve.fields import ChatFields, CompletionFields, SamplingFields, TokenizeFields
from tyir.tools.serve.json_reply import event, json_reply
from tyir.tools.serve.metrics import Metrics
from tyir.tools.serve.settings import Settings
from tyir.tools.serve.token_texts import TokenTexts
from tyir.tools.serve.tool_calls import Calls, HermesReader, Tools
from tyir.tools.tokenizer import tokenizing

__all__ = ["Completions", "failure", "merged", "until_gone"]

_DEFAULT_TOKENS = 16  # of a plain completion
_MOST_PROMPTS = 256
_MOST_CHARACTERS = 1 << 22


async def until_gone(request: Request, work: Callable[[], Any]) -> Any:
    """The result of a coroutine, which is cancelled when the client goes away meanwhile: `RequestError`."""
    running = asyncio.ensure_future(work())
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({running, gone}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            return running.result()
        raise RequestError(499, "the client has gone")  # nobody reads it
    finally:
        for task in (running, gone):
            task.cancel()
        await asyncio.gather(running, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def merged(answers: Sequence[Answer]) -> AsyncGenerator[Delta, None]:
    """What becomes of several answers, as it comes."""
    if len(answers) == 1:
        async with contextlib.aclosing(answers[0].deltas()) as deltas:
            async for delta in deltas:
                yield delta
        return
    queue: asyncio.Queue[Delta | None] = asyncio.Queue()

    async def forward(answer: Answer) -> None:
        async for delta in answer:
            queue.put_nowait(delta)
        queue.put_nowait(None)

    tasks = [asyncio.ensure_future(forward(answer)) for answer in answers]
    try:
        left = len(answers)
        while left:
            part = await queue.get()
            if part is None:
                left -= 1
            else:
                yield part
    finally:
        for task, answer in zip(tasks, answers):
            task.cancel()
            answer.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@dataclass
class _Choice:
    """One answer of a reply, as it grows."""

    text: str = ""
    tokens: list[Scored] = field(default_factory=list)
    prompt: tuple[Scored, ...] = ()
    finish: Finish | None = None

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.tokens += delta.tokens
        self.prompt = self.prompt or delta.prompt
        self.finish = delta.finish or self.finish


@dataclass(frozen=True)
class _Asked:
    """A request that has been understood: prompts as tokens, and what is wanted of the reply."""

    prompts: Sequence[Prompt]
    params: Params
    fields: SamplingFields
    chat: bool
    id: str
    model: str
    created: int
    texts: Sequence[str] = ()  # of the prompts, that `echo` puts before the answers
    tools: Tools | None = None

    def reader(self) -> HermesReader | None:
        """What tells calls from text in an answer; None where nothing may be called."""
        return HermesReader(parallel=self.tools.parallel) if self.tools is not None else None


class Completions:
    """Both kinds; `engine` answers."""

    def __init__(self, engine: AsyncEngine, settings: Settings, metrics: Metrics) -> None:
        self.engine = engine
        self.settings = settings
        self.metrics = metrics
        self.texts = TokenTexts(engine.tokenizer)

    async def complete(self, fields: CompletionFields, request: Request) -> Response:
        self._check_model(fields.model)
        if fields.suffix:
            raise RequestError(400, "suffix is not currently supported", "suffix")
        asked = await asyncio.to_thread(self._completion, fields)
        return await self._reply(asked, request)

    async def chat(self, fields: ChatFields, request: Request) -> Response:
        self._check_model(fields.model)
        asked = await asyncio.to_thread(self._chat, fields)
        return await self._reply(asked, request)

    def _check_model(self, name: str | None) -> None:
        if name is not None and name not in self.settings.names:
            raise RequestError(
                404,
                f"The model `{name[:200]}` does not exist. Valid names: {', '.join(self.settings.names)}",
                "model",
            )

    # ---------------------------------------------------------------------------------------- understanding

    def _completion(self, fields: CompletionFields) -> _Asked:
        params = params_of(fields, self.engine, self.engine.slots)
        prompts = self._prompts(fields.prompt)
        logprobs = fields.logprobs
        if logprobs is not None and not 0 <= logprobs <= MOST_LOGPROBS:
            raise RequestError(
                400, f"logprobs must be from 0 to {MOST_LOGPROBS}, got {logprobs}.", "logprobs"
            )
        if fields.top_logprobs is not None:
            raise RequestError(
                400, "top_logprobs is of chats: logprobs says how many tokens to give here", "top_logprobs"
            )
        if fields.max_tokens == 0 and not fields.echo:
            raise RequestError(400, "max_tokens must be at least 1, got 0.", "max_tokens")
        longest = max(map(len, prompts))
        limits = [limit_of(fields.max_tokens, _DEFAULT_TOKENS, longest, self.engine, "max_tokens")]
        params = replace(
            params, max_tokens=limits[0], logprobs=logprobs, echo=bool(fields.echo) and logprobs is not None
        )
        texts: Sequence[str] = ()
        if fields.echo:
            texts = [
                fields.prompt if isinstance(fields.prompt, str) and len(prompts) == 1 else self._text(ids)
                for ids in prompts
            ]
        return self._asked(prompts, params, fields, False, texts)

    def _chat(self, fields: ChatFields) -> _Asked:
        if fields.chat_template:
            raise RequestError(400, "a template in a request is not allowed", "chat_template")
        tools = Tools.of(fields)
        params = params_of(fields, self.engine, self.engine.slots, tools)
        if fields.top_logprobs is not None and not fields.logprobs:
            raise RequestError(400, "when using top_logprobs, logprobs must be set to true", "top_logprobs")
        top = fields.top_logprobs or 0
        if not 0 <= top <= MOST_LOGPROBS:
            raise RequestError(
                400, f"top_logprobs must be from 0 to {MOST_LOGPROBS}, got {top}.", "top_logprobs"
            )
        messages, pictures = messages_of(fields.messages, self.engine)
        options = template_options(fields.chat_template_kwargs)
        if fields.continue_final_message:
            options |= {"continue_final_message": True, "add_generation_prompt": False}
        elif fields.add_generation_prompt is not None:
            options["add_generation_prompt"] = fields.add_generation_prompt
        if tools is not None:
            self.check_tools()
            options["tools"] = tools.offered
        prompt = self.seen(self.chat_text(messages, options), pictures, "messages")
        param = "max_tokens" if fields.max_completion_tokens is None else "max_completion_tokens"
        asked = fields.max_tokens if fields.max_completion_tokens is None else fields.max_completion_tokens
        if asked is not None and asked < 1:
            raise RequestError(400, f"{param} must be at least 1, got {asked}.", param)
        limit = limit_of(asked, None, len(_ids_of(prompt)), self.engine, param)
        params = replace(params, max_tokens=limit, logprobs=top if fields.logprobs else None)
        return self._asked([prompt], params, fields, True, tools=tools)

    def check_tools(self) -> None:
        """`RequestError` where a request's tools would not be told to the model, or calls not be read."""
        if self.settings.tool_parser is None:
            raise RequestError(
                400, "tools cannot be called: start the server with --tool-call-parser hermes", "tools"
            )
        try:
            known = "tools" in self.engine.template
        except TyirError as error:
            raise refusal(error, "tools") from None
        if not known:
            raise RequestError(
                400,
                "the chat template of this model does not know tools: start the server with --chat-template"
                " FILE, of a model that was trained to call them",
                "tools",
            )

    def seen(self, text: str, pictures: Sequence[Picture], param: str) -> Prompt:
        """The prompt of a text with places for pictures; `RequestError` for what does not fit."""
        if self.engine.eyes is None:
            return self._ids(text, param)
        try:
            return self.engine.seen(text, pictures)
        except TyirError as error:
            raise refusal(error, param) from None

    def tokens_of(self, fields: TokenizeFields) -> list[int]:
        """What `/tokenize` is asked for."""
        if (fields.prompt is None) == (fields.messages is None):
            raise RequestError(400, "give prompt or messages", "prompt")
        if fields.messages is None:
            special = fields.add_special_tokens is not False
            return self._tokenized(fields.prompt or "", special)
        given = fields.add_generation_prompt
        messages, pictures = messages_of(fields.messages, self.engine)
        options = template_options(fields.chat_template_kwargs)
        text = self.chat_text(
            messages, options if given is None else {**options, "add_generation_prompt": given}
        )
        return [*_ids_of(self.seen(text, pictures, "messages"))] if pictures else self._tokenized(text, False)

    def _tokenized(self, text: str, special: bool) -> list[int]:
        with tokenizing("cannot tokenize the prompt"):
            return [int(t) for t in self.engine.tokenizer(text, add_special_tokens=special)["input_ids"]]

    def chat_text(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> str:
        try:
            return self.engine.chat_text(messages, **options)
        except TyirError as error:
            raise refusal(error, "messages") from None

    def _asked(
        self,
        prompts: Sequence[Prompt],
        params: Params,
        fields: SamplingFields,
        chat: bool,
        texts: Sequence[str] = (),
        tools: Tools | None = None,
    ) -> _Asked:
        name = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        model = fields.model or self.settings.names[0]
        return _Asked(prompts, params, fields, chat, name, model, int(time.time()), texts, tools)

    def _prompts(self, prompt: Any) -> list[list[int]]:
        """A text, texts, tokens, or lists of tokens."""
        if isinstance(prompt, str):
            prompt = [prompt]
        if prompt and isinstance(prompt[0], int):
            prompt = [prompt]
        if not prompt:
            raise RequestError(400, "prompt must not be empty", "prompt")
        if len(prompt) > _MOST_PROMPTS:
            raise RequestError(400, f"prompt may hold {_MOST_PROMPTS} prompts, got {len(prompt)}", "prompt")
        ids = [self._ids(p, "prompt") if isinstance(p, str) else [int(i) for i in p] for p in prompt]
        vocabulary = self.engine.engine.vocabulary
        for one in ids:
            if not one:
                raise RequestError(400, "prompt must not be empty", "prompt")
            if (bad := next((i for i in one if not 0 <= i < vocabulary), None)) is not None:
                raise RequestError(
                    400, f"token id {str(bad)[:40]} is not in the vocabulary of {vocabulary}", "prompt"
                )
        return ids

    def _ids(self, text: str, param: str) -> list[int]:
        if len(text) > _MOST_CHARACTERS:
            raise RequestError(400, f"{param} has {len(text)} characters, more than any that fits", param)
        try:
            return self.engine.ids_of(text)
        except TyirError as error:
            raise refusal(error, param) from None

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.engine.tokenizer.decode(list(ids), skip_special_tokens=False))

    # ------------------------------------------------------------------------------------------------ replies

    async def _reply(self, asked: _Asked, request: Request) -> Response:
        if not self.engine.ready:
            raise RequestError(503, "the server is loading or stopping, try again later")
        try:
            answers = self.engine.submit(asked.prompts, asked.params)
        except TyirError as error:
            if self.engine.engine.failed is not None:
                raise RequestError(503, str(error)) from None
            raise refusal(error) from None
        self.metrics.asked(asked.params.n)
        if asked.fields.stream:
            return StreamingResponse(self._stream(asked, answers), media_type="text/event-stream")
        whole = await until_gone(request, lambda: self._whole(asked, answers))
        return json_reply(whole)

    async def _whole(self, asked: _Asked, answers: Sequence[Answer]) -> Mapping[str, Any]:
        choices = [_Choice() for _ in range(len(answers) * asked.params.n)]
        async with contextlib.aclosing(merged(answers)) as deltas:
            async for delta in deltas:
                if (failed := failure(delta.finish)) is not None:
                    raise failed
                choices[delta.index].add(delta)
        return {
            **self._head(asked, "chat.completion" if asked.chat else "text_completion"),
            "choices": [self._choice(asked, number, choice) for number, choice in enumerate(choices)],
            "usage": _usage(answers),
        }

    def _head(self, asked: _Asked, kind: str) -> dict[str, Any]:
        return {"id": asked.id, "object": kind, "created": asked.created, "model": asked.model}

    def _choice(self, asked: _Asked, number: int, choice: _Choice) -> Mapping[str, Any]:
        ended = self._ended(choice.finish)
        if asked.chat:
            message: dict[str, Any] = {"role": "assistant", "content": choice.text}
            if (reader := asked.reader()) is not None:
                calls = Calls()
                parts = [reader.put(choice.text), reader.end()]
                for _, pieces in parts:
                    calls.add(pieces)
                if calls.calls:
                    text = "".join(text for text, _ in parts)
                    message |= {"content": text or None, "tool_calls": calls.calls}
                    ended = _called(asked, ended)
            logprobs = self._chat_logprobs(asked, choice.tokens)
            return {"index": number, "message": message, "logprobs": logprobs, **ended}
        before = asked.texts[number // asked.params.n] if asked.texts else ""
        logprobs = self._logprobs(asked, [*choice.prompt, *choice.tokens], 0)
        return {"index": number, "text": before + choice.text, "logprobs": logprobs, **ended}

    async def _stream(self, asked: _Asked, answers: Sequence[Answer]) -> AsyncGenerator[str, None]:
        """Events; an error after the headers is one too."""
        options = asked.fields.stream_options
        continuous = options is not None and bool(options.continuous_usage_stats)
        usage = (
            continuous or self.settings.always_usage or (options is not None and bool(options.include_usage))
        )
        head = self._head(asked, "chat.completion.chunk" if asked.chat else "text_completion")
        offsets = [0] * (len(answers) * asked.params.n)
        readers = [asked.reader() for _ in offsets]

        def chunk(choice: Mapping[str, Any]) -> str:
            return event({**head, "choices": [choice], **({"usage": _usage(answers)} if continuous else {})})

        if asked.chat:
            for number in range(asked.params.n):
                opening = {"role": "assistant", "content": ""}
                yield chunk({"index": number, "delta": opening, "logprobs": None, "finish_reason": None})
        elif asked.texts:
            for number in range(len(offsets)):
                text = asked.texts[number // asked.params.n]
                if asked.params.logprobs is None:
                    yield chunk({"index": number, "text": text, "logprobs": None, "finish_reason": None})
        async with contextlib.aclosing(merged(answers)) as deltas:
            async for delta in deltas:
                if (failed := failure(delta.finish)) is not None:
                    yield event(error_body(failed))
                elif (reader := readers[delta.index]) is not None:
                    if (part := self._call_part(asked, delta, reader)) is not None:
                        yield chunk(part)
                elif delta.text or delta.tokens or delta.prompt or delta.finish:
                    yield chunk(self._part(asked, delta, offsets))
        if usage:
            yield event({**head, "choices": [], "usage": _usage(answers)})
        yield "data: [DONE]\n\n"

    def _part(self, asked: _Asked, delta: Delta, offsets: list[int]) -> Mapping[str, Any]:
        ended = self._ended(delta.finish)
        if asked.chat:
            content = {"content": delta.text} if delta.text or delta.tokens else {}
            logprobs = self._chat_logprobs(asked, delta.tokens) if delta.tokens else None
            return {"index": delta.index, "delta": content, "logprobs": logprobs, **ended}
        text = delta.text
        if delta.prompt:
            text = asked.texts[delta.index // asked.params.n] + text
        scored = [*delta.prompt, *delta.tokens]
        logprobs = self._logprobs(asked, scored, offsets[delta.index]) if scored else None
        offsets[delta.index] += sum(len(self.texts.text_of(s.token)) for s in scored)
        return {"index": delta.index, "text": text, "logprobs": logprobs, **ended}

    def _call_part(self, asked: _Asked, delta: Delta, reader: HermesReader) -> Mapping[str, Any] | None:
        """A part of an answer that may call tools; None when there is nothing to say yet."""
        text, pieces = reader.put(delta.text)
        ended = self._ended(delta.finish)
        if delta.finish is not None:
            more, last = reader.end()
            text, pieces = text + more, [*pieces, *last]
            ended = _called(asked, ended) if reader.called else ended
        said: dict[str, Any] = {"content": text} if text else {}
        if pieces:
            said["tool_calls"] = [piece.body() for piece in pieces]
        logprobs = self._chat_logprobs(asked, delta.tokens) if delta.tokens else None
        if not said and logprobs is None and delta.finish is None:
            return None
        return {"index": delta.index, "delta": said, "logprobs": logprobs, **ended}

    def _ended(self, finish: Finish | None) -> dict[str, Any]:
        """`stop_reason`: the token or text that was asked to stop; null for the model's own ends."""
        if finish is None:
            return {"finish_reason": None}
        own = isinstance(finish.stop, int) and finish.stop in self.engine.ends
        return {"finish_reason": finish.reason, "stop_reason": None if own else finish.stop}

    # ---------------------------------------------------------------------------------------------- logprobs

    def _name(self, asked: _Asked, token: int) -> str:
        return f"token_id:{token}" if asked.fields.return_tokens_as_token_ids else self.texts.text_of(token)

    def _logprobs(self, asked: _Asked, scored: Sequence[Scored], offset: int) -> Mapping[str, Any] | None:
        """Of a plain completion; the chosen token is among the best ones, with the same number."""
        if asked.params.logprobs is None:
            return None
        offsets: list[int] = []
        tops: list[dict[str, float] | None] = []
        for one in scored:
            offsets.append(offset)
            offset += len(self.texts.text_of(one.token))
            if one.logprob is None:
                tops.append(None)
                continue
            best = {self._name(asked, one.token): one.logprob}
            for token, value in one.top:
                best.setdefault(self._name(asked, token), value)
            tops.append(best)
        return {
            "text_offset": offsets,
            "token_logprobs": [s.logprob for s in scored],
            "tokens": [self._name(asked, s.token) for s in scored],
            "top_logprobs": tops,
        }

    def _chat_logprobs(self, asked: _Asked, scored: Sequence[Scored]) -> Mapping[str, Any] | None:
        if asked.params.logprobs is None:
            return None

        def entry(token: int, value: float | None) -> dict[str, Any]:
            return {
                "token": self._name(asked, token),
                "logprob": value,
                "bytes": list(self.texts.bytes_of(token)),
            }

        return {
            "content": [
                {**entry(s.token, s.logprob), "top_logprobs": [entry(t, v) for t, v in s.top]} for s in scored
            ]
        }


def failure(finish: Finish | None) -> RequestError | None:
    """What a client is told of an answer that did not come to its end."""
    if finish is None or finish.reason in ("stop", "length"):
        return None
    if finish.reason == "timeout":
        return RequestError(504, finish.message)
    if finish.refused:
        return RequestError(400, finish.message.replace("--top-", "top_").replace("--min-p", "min_p"))
    return RequestError(503, finish.message or "the server is stopping")


def _called(asked: _Asked, ended: dict[str, Any]) -> dict[str, Any]:
    """How an answer with calls ended; vLLM says `stop` of a call that the request named."""
    named = asked.tools is not None and asked.tools.named
    return (
        {**ended, "finish_reason": "tool_calls"} if ended["finish_reason"] == "stop" and not named else ended
    )


def _ids_of(prompt: Prompt) -> Sequence[int]:
    return prompt.ids if isinstance(prompt, VisionRequest) else prompt


def _usage(answers: Sequence[Answer]) -> Mapping[str, Any]:
    prompt, made = sum(len(a.prompt) for a in answers), sum(a.made for a in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": sum(a.cached for a in answers)},
    }

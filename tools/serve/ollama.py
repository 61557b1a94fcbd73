"""Ollama's interface, as far as its clients ask a server that serves one model.

Streams are JSON lines and the default; times are nanoseconds.  A prompt that does not fit is an error, never
cut short.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from tyir.diagnostics import TyirError
from tyir.runtime_sim.vision.request import VisionRequest
from tyir.tools.serve.asked import limit_of, messages_of, params_of
from tyir.tools.serve.async_engine import Answer, Params, Prompt
from tyir.tools.serve.completions import Completions, failure, until_gone
from tyir.tools.serve.errors import RequestError, refusal
from tyir.tools.serve.fields import (
    ChatFields,
    Message,
    OllamaChatFields,
    OllamaFields,
    OllamaGenerateFields,
    OllamaOptions,
    SamplingFields,
    ShowFields,
)
from tyir.tools.serve.json_reply import json_reply, line
from tyir.tools.serve.tool_calls import Calls, HermesReader, Tools

__all__ = ["Ollama"]


class Ollama:
    """The same answers in Ollama's forms."""

    def __init__(self, completions: Completions) -> None:
        self._completions = completions
        self._engine = completions.engine
        self._names = completions.settings.names
        self._began = time.time()
        self._load_ns = 0

    # ---------------------------------------------------------------------------------------- what is here

    def tags(self) -> Mapping[str, Any]:
        return {"models": [self._model(name) for name in self._names]}

    def running(self) -> Mapping[str, Any]:
        never = datetime.datetime.max.replace(tzinfo=datetime.UTC).isoformat()
        return {
            "models": [{**self._model(n), "expires_at": never, "size_vram": 0} for n in self._names]
            if self._engine.ready
            else []
        }

    def show(self, fields: ShowFields) -> Mapping[str, Any]:
        self._check(fields.model or fields.name or self._names[0])
        model = self._engine.artifacts.manifest.model
        family = str(model.get("architecture", "unknown"))
        return {
            "details": self._details(),
            "model_info": {
                "general.architecture": family,
                f"{family}.context_length": self._engine.capacity,
                f"{family}.block_count": model.get("num_hidden_layers"),
                f"{family}.embedding_length": model.get("hidden_size"),
            },
            "capabilities": ["completion", *(["vision"] if self._engine.eyes else []), *self._tools()],
            "template": str(self._engine.tokenizer.chat_template or ""),
        }

    def _tools(self) -> list[str]:
        try:
            self._completions.check_tools()
        except RequestError:
            return []
        return ["tools"]

    def _model(self, name: str) -> Mapping[str, Any]:
        manifest = self._engine.artifacts.manifest
        tagged = name if ":" in name else f"{name}:latest"
        when = datetime.datetime.fromtimestamp(self._began, datetime.UTC).isoformat()
        return {
            "name": tagged,
            "model": tagged,
            "modified_at": when,
            "size": sum(f["size"] for f in manifest.files.values()),
            "digest": next(f["sha256"] for n, f in sorted(manifest.files.items())),
            "details": self._details(),
        }

    def _details(self) -> Mapping[str, Any]:
        manifest = self._engine.artifacts.manifest
        family = str(manifest.model.get("architecture", "unknown"))
        return {
            "parent_model": "",
            "format": "tyir",
            "family": family,
            "families": [family],
            "parameter_size": "",
            "quantization_level": manifest.options.weights,
        }

    # --------------------------------------------------------------------------------------------- answers

    async def generate(self, fields: OllamaGenerateFields, request: Request) -> Response:
        self._check(fields.model)
        if fields.suffix:
            raise RequestError(400, "suffix is not supported", "suffix")
        if not fields.prompt:
            return json_reply({**self._head(fields), "response": "", "done": True, "done_reason": "load"})

        def prompt() -> Prompt:
            text = fields.prompt or ""
            if not fields.images and (fields.raw or not self._has_template()):
                return self._completions.seen(
                    f"{fields.system}\n{text}" if fields.system else text, (), "prompt"
                )
            system = [Message(role="system", content=fields.system)] if fields.system else []
            user = Message(role="user", content=text, images=fields.images)
            messages, pictures = messages_of([*system, user], self._engine)
            return self._completions.seen(self._completions.chat_text(messages, {}), pictures, "prompt")

        return await self._answer(fields, request, prompt, "response")

    async def chat(self, fields: OllamaChatFields, request: Request) -> Response:
        self._check(fields.model)
        tools = Tools.of(ChatFields(messages=[], tools=fields.tools))
        if not fields.messages:
            message = {"role": "assistant", "content": ""}
            return json_reply({**self._head(fields), "message": message, "done": True, "done_reason": "load"})

        def prompt() -> Prompt:
            messages, pictures = messages_of(fields.messages, self._engine)
            options: dict[str, Any] = {}
            if tools is not None:
                self._completions.check_tools()
                options["tools"] = tools.offered
            text = self._completions.chat_text(messages, options)
            return self._completions.seen(text, pictures, "messages")

        return await self._answer(fields, request, prompt, "message", tools)

    def _has_template(self) -> bool:
        try:
            self._engine.chat_text([{"role": "user", "content": "a"}])
        except TyirError:
            return False
        return True

    async def _answer(
        self,
        fields: OllamaFields,
        request: Request,
        prompt: Callable[[], Prompt],
        form: str,
        tools: Tools | None = None,
    ) -> Response:
        began = time.perf_counter_ns()
        given, params = await asyncio.to_thread(self._understood, fields, prompt, tools)
        if not self._engine.ready:
            raise RequestError(503, "the server is loading or stopping, try again later")
        try:
            (answer,) = self._engine.submit([given], params)
        except TyirError as error:
            raise refusal(error) from None
        parts = self._parts(fields, answer, form, began, HermesReader() if tools is not None else None)
        if fields.stream is not False:
            return StreamingResponse(parts, media_type="application/x-ndjson")
        whole = await until_gone(request, lambda: self._whole(parts, form))
        return json_reply(whole)

    def _understood(
        self, fields: OllamaFields, prompt: Callable[[], Prompt], tools: Tools | None
    ) -> tuple[Prompt, Params]:
        options = fields.options or OllamaOptions()
        capacity = self._engine.capacity
        if options.num_ctx is not None and options.num_ctx > capacity:
            raise RequestError(
                400,
                f"num_ctx {options.num_ctx} is more than the {capacity} tokens this model was compiled for:"
                f" compile with --max-kv {options.num_ctx}",
                "options.num_ctx",
            )
        schema = {"type": "json_schema", "json_schema": {"schema": fields.format}}
        sampling = SamplingFields(
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            seed=options.seed,
            repetition_penalty=options.repeat_penalty,
            presence_penalty=options.presence_penalty,
            frequency_penalty=options.frequency_penalty,
            stop=options.stop,
            stream=fields.stream is not False,
            response_format=schema
            if isinstance(fields.format, dict)
            else {"type": "json_object"}
            if fields.format
            else None,
        )
        params = params_of(sampling, self._engine, 1, tools)
        given = prompt()
        ids = given.ids if isinstance(given, VisionRequest) else given
        asked = options.num_predict if options.num_predict is not None and options.num_predict > 0 else None
        limit = limit_of(asked, None, len(ids), self._engine, "num_predict")
        return given, replace(params, max_tokens=limit)

    async def _parts(
        self, fields: OllamaFields, answer: Answer, form: str, began: int, reader: HermesReader | None
    ) -> AsyncGenerator[str, None]:
        head = self._head(fields)
        calls = Calls()
        streamed = fields.stream is not False

        def put(text: str, **more: Any) -> str:
            said = {"role": "assistant", "content": text} if form == "message" else text
            return line({**head, form: said, "done": False, **more})

        async with contextlib.aclosing(answer.deltas()) as deltas:
            async for delta in deltas:
                text = delta.text
                if reader is not None:
                    text, pieces = reader.put(text)
                    calls.add(pieces)
                    if delta.finish is not None:
                        more, pieces = reader.end()
                        calls.add(pieces)
                        text += more
                if delta.finish is None:
                    if text:
                        yield put(text)
                elif (failed := failure(delta.finish)) is not None:
                    if not streamed:
                        raise failed
                    yield line({"error": failed.message})
                else:
                    if calls.calls:
                        said = {"role": "assistant", "content": "", "tool_calls": _ollama_calls(calls)}
                        yield line({**head, form: said, "done": False})
                    (generation,) = answer.generations
                    times, made = generation.times, len(generation.made)
                    yield put(
                        text,
                        done=True,
                        done_reason=delta.finish.reason,
                        total_duration=time.perf_counter_ns() - began,
                        load_duration=self._load_ns,
                        prompt_eval_count=len(answer.prompt),
                        prompt_eval_duration=int((times.first - times.scheduled) * 1e9),
                        eval_count=made,
                        eval_duration=int((times.last - times.first) * 1e9),
                    )

    async def _whole(self, parts: AsyncGenerator[str, None], form: str) -> Mapping[str, Any]:
        text = ""
        last: dict[str, Any] = {}
        calls: list[Any] = []
        async for part in parts:
            last = json.loads(part)
            text += last[form]["content"] if form == "message" else last[form]
            calls += last[form].get("tool_calls", ()) if form == "message" else ()
        if form == "message":
            said = {"role": "assistant", "content": text}
            return {**last, form: {**said, "tool_calls": calls} if calls else said}
        return {**last, form: text}

    def _head(self, fields: OllamaFields) -> dict[str, Any]:
        return {"model": fields.model, "created_at": datetime.datetime.now(datetime.UTC).isoformat()}

    def _check(self, name: str) -> None:
        self._completions._check_model(name.removesuffix(":latest") if name not in self._names else name)


def _ollama_calls(calls: Calls) -> list[Mapping[str, Any]]:
    """Ollama's clients take arguments as objects; what is none is left as text under one name."""
    found: list[Mapping[str, Any]] = []
    for call in calls.calls:
        function = call["function"]
        try:
            arguments = json.loads(function["arguments"])
        except (ValueError, RecursionError):
            arguments = {"arguments": function["arguments"]}
        found.append({"function": {"name": function["name"], "arguments": arguments}})
    return found

"""The routes: which path is answered by what, and how everything that is refused looks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from importlib.metadata import version
from importlib.resources import files
from typing import Annotated, Any

from fastapi import Body, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response

from tyir.diagnostics import TyirError
from tyir.tools.serve.async_engine import AsyncEngine
from tyir.tools.serve.completions import Completions
from tyir.tools.serve.errors import RequestError, error_reply, refusal
from tyir.tools.serve.fields import (
    ChatFields,
    CompletionFields,
    DetokenizeFields,
    OllamaChatFields,
    OllamaGenerateFields,
    ShowFields,
    TokenizeFields,
)
from tyir.tools.serve.guard import Guard
from tyir.tools.serve.json_reply import json_reply
from tyir.tools.serve.metrics import Metrics
from tyir.tools.serve.ollama import Ollama
from tyir.tools.serve.settings import Settings

__all__ = ["Gate", "make_app"]

_POLICY = (
    "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
_PAGE = {
    "/": ("page.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
    "/page.svg": ("page.svg", "image/svg+xml"),
}
_NOT_HERE = ("pull", "push", "create", "delete", "copy", "embed", "embeddings", "blobs/{digest}")


class Gate:
    """Whether work is taken: not before the engine is ready, nor once the server is told to stop."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self.draining = False

    def refuses(self) -> str | None:
        """Why none is taken; None when it is."""
        if self._engine.engine.failed is not None:
            return f"the engine has failed: {self._engine.engine.failed}"
        if self.draining:
            return "the server is stopping"
        return None if self._engine.ready else "the server is loading"


def make_app(engine: AsyncEngine, settings: Settings, metrics: Metrics, gate: Gate) -> Any:
    """An ASGI application that answers with `engine`, which its owner starts and stops."""
    app = FastAPI(title="tyir-serve", version=version("tyir"), docs_url=None, redoc_url=None)
    completions = Completions(engine, settings, metrics)
    ollama = Ollama(completions)
    began = int(time.time())
    options = engine.artifacts.manifest.options
    metrics.watch(
        engine.engine,
        {
            "block_size": str(options.max_kv),
            "num_gpu_blocks": str(options.batch),
            "cache_dtype": options.kv_dtype,
        },
    )
    _add_errors(app, metrics)

    # ------------------------------------------------------------------------------------------ OpenAI, vLLM

    @app.get("/v1/models")
    async def models() -> Response:
        card = {
            "object": "model",
            "created": began,
            "owned_by": "tyir",
            "root": engine.artifacts.path.name,
            "parent": None,
            "max_model_len": engine.capacity,
            "tyir": {
                "batch": options.batch,
                "seqlens": list(options.seqlens),
                "output": options.output,
                "dies": options.dies,
                "engine": type(engine.session.engine).__name__,
                "images": engine.eyes.sizes if engine.eyes is not None else [],
            },
        }
        return json_reply({"object": "list", "data": [{"id": name, **card} for name in settings.names]})

    @app.post("/v1/completions")
    async def complete(request: Request, fields: Annotated[CompletionFields, Body()]) -> Response:
        return await completions.complete(fields, request)

    @app.post("/v1/chat/completions")
    async def chat(request: Request, fields: Annotated[ChatFields, Body()]) -> Response:
        return await completions.chat(fields, request)

    @app.post("/tokenize")
    async def tokenize(fields: Annotated[TokenizeFields, Body()]) -> Response:
        tokens = await asyncio.to_thread(completions.tokens_of, fields)
        names = [completions.texts.name_of(t) for t in tokens] if fields.return_token_strs else None
        return json_reply(
            {"count": len(tokens), "max_model_len": engine.capacity, "tokens": tokens, "token_strs": names}
        )

    @app.post("/detokenize")
    async def detokenize(fields: Annotated[DetokenizeFields, Body()]) -> Response:
        vocabulary = engine.engine.vocabulary
        if (bad := next((t for t in fields.tokens if not 0 <= t < vocabulary), None)) is not None:
            raise RequestError(
                400, f"token id {str(bad)[:40]} is not in the vocabulary of {vocabulary}", "tokens"
            )
        return json_reply({"prompt": completions._text(fields.tokens) if fields.tokens else ""})

    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=200 if gate.refuses() is None else 503)

    @app.get("/version")
    async def version_() -> Response:
        return json_reply({"version": version("tyir")})

    @app.get("/load")
    async def load() -> Response:
        return json_reply({"server_load": sum(engine.engine.counts)})

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    for path, route in (("/health", health), ("/metrics", prometheus)):
        app.add_api_route(path, route, methods=["HEAD"], include_in_schema=False)

    # ------------------------------------------------------------------------------------------------- Ollama

    @app.get("/api/version")
    async def ollama_version() -> Response:
        return json_reply({"version": version("tyir")})

    @app.get("/api/tags")
    async def tags() -> Response:
        return json_reply(ollama.tags())

    @app.get("/api/ps")
    async def running() -> Response:
        return json_reply(ollama.running())

    @app.post("/api/show")
    async def show(fields: Annotated[ShowFields, Body()]) -> Response:
        return json_reply(ollama.show(fields))

    @app.post("/api/generate")
    async def generate(request: Request, fields: Annotated[OllamaGenerateFields, Body()]) -> Response:
        return await ollama.generate(fields, request)

    @app.post("/api/chat")
    async def ollama_chat(request: Request, fields: Annotated[OllamaChatFields, Body()]) -> Response:
        return await ollama.chat(fields, request)

    async def not_here(request: Request) -> Response:
        raise RequestError(501, f"{request.url.path}: this server serves the one model it was started with")

    for name in _NOT_HERE:
        app.add_api_route(f"/api/{name}", not_here, methods=["POST", "DELETE"], include_in_schema=False)

    # --------------------------------------------------------------------------------------------------- page

    for path, (name, kind) in _PAGE.items():
        app.add_api_route(path, _page(name, kind), methods=["GET", "HEAD"], include_in_schema=False)
    return Guard(app, settings, gate.refuses)


def _page(name: str, kind: str) -> Any:
    content = files("tyir.tools.serve").joinpath(name).read_bytes()
    headers = {
        "Content-Security-Policy": _POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }

    async def page(request: Request) -> Response:
        if request.method == "HEAD" or (
            name == "page.html" and "html" not in request.headers.get("accept", "")
        ):
            return PlainTextResponse("Ollama is running")  # what its clients look for
        return Response(content, media_type=kind, headers=headers)

    return page


def _add_errors(app: FastAPI, metrics: Metrics) -> None:
    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        if error.status in (429, 503):
            metrics.refused("queue_full" if error.status == 429 else "unavailable")
        return _shaped(request, error)

    @app.exception_handler(TyirError)
    async def cannot(request: Request, error: TyirError) -> Response:
        return _shaped(request, refusal(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        places = [_place(e["loc"]) for e in error.errors()[:10]]
        text = "; ".join(f"{p}: {e['msg'][:200]}" for p, e in zip(places, error.errors()))
        return _shaped(request, RequestError(400, text, places[0] if places else None))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        return _shaped(request, RequestError(error.status_code, f"{request.url.path}: {error.detail}"))


def _place(loc: Sequence[object]) -> str:
    """Where in a body, without which of a field's types was tried: `body.prompt`."""
    named = [str(part) for part in loc if part != "str" and "[" not in str(part)]
    return ".".join(named)[:200]


def _shaped(request: Request, error: RequestError) -> Response:
    """OpenAI's shape, and Ollama's under its own paths."""
    if request.url.path.startswith("/api/"):
        return json_reply({"error": error.message}, error.status)
    return error_reply(error)

"""Pictures in requests: the answers are a `VisionSession`'s, and what is no picture is refused."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
pytest.importorskip("PIL", reason="the extra 'vision' is not installed")

from tests.browser import BROWSER, open_page
from tests.e2e.serving import Served, serving
from tests.vision.scenes import DESCRIBE, Scene, draw
from tyir.runtime_sim.vision.pictures import Picture
from tyir.tools.serve.async_engine import AsyncEngine, Params

SIZE = (112, 112)
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def seeing(compiled: Callable[..., Path]) -> Path:
    """For pictures of two sizes, in steps of 16 tokens."""
    return compiled("tiny-qwen2.5-vl", 1)


@pytest.fixture(scope="module")
def served(seeing: Path) -> Iterator[Served]:
    with serving(seeing, template=None, resize=True) as made:
        yield made


def png(scene: Scene) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(scene.picture).save(file, "PNG")
    return file.getvalue()


def url_of(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def message(*parts: str) -> list[dict[str, Any]]:
    """A user's message: `data:` URLs are pictures, the rest is text."""
    content = [
        {"type": "image_url", "image_url": {"url": p}}
        if p.startswith(("data:", "http"))
        else {"type": "text", "text": p}
        for p in parts
    ]
    return [{"role": "user", "content": content}]


def described(served: Served, *parts: str, **more: Any) -> Any:
    return served.post(CHAT, messages=message(*parts), temperature=0, **more)


def test_answers_are_about_the_picture(served: Served) -> None:
    """One after the other, streamed, from the cache, by Ollama's routes; another picture is not the first."""
    scenes = [draw(seed, SIZE) for seed in (3, 7)]
    urls = [url_of(png(s)) for s in scenes]
    for scene, url in zip(scenes, urls):
        reply = described(served, url, DESCRIBE)
        assert reply["choices"][0]["message"]["content"] == scene.answers[DESCRIBE]
        assert reply["choices"][0]["finish_reason"] == "stop"
        assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] < 8, "what stands before the picture"
    again = described(served, urls[1], DESCRIBE)
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == again["usage"]["prompt_tokens"] - 1
    assert again["choices"][0]["message"]["content"] == scenes[1].answers[DESCRIBE]
    stream = served.events(CHAT, messages=message(urls[0], DESCRIBE), temperature=0)
    said = "".join(e["choices"][0]["delta"].get("content", "") for e in stream if e["choices"])
    assert said == scenes[0].answers[DESCRIBE]
    raw = base64.b64encode(png(scenes[0])).decode()
    options = {"temperature": 0}
    user = {"role": "user", "content": DESCRIBE, "images": [raw]}
    chat = served.post("/api/chat", model="tiny", messages=[user], stream=False, options=options)
    assert chat["message"]["content"] == said
    made = served.post(
        "/api/generate", model="tiny", prompt=DESCRIBE, images=[raw], stream=False, options=options
    )
    assert made["response"] == said
    assert "vision" in served.post("/api/show", model="tiny")["capabilities"]
    assert served.ask("GET", "/v1/models")[1]["data"][0]["tyir"]["images"] == ["112x112", "168x112"]
    count = served.post("/tokenize", messages=message(urls[0], DESCRIBE))["count"]
    assert count == again["usage"]["prompt_tokens"]


def test_text_alone_and_two_pictures(served: Served) -> None:
    assert described(served, "Hello", max_tokens=4)["usage"]["completion_tokens"] <= 4
    assert served.post("/v1/completions", prompt="Hello", max_tokens=4)["choices"]
    one, two = (url_of(png(draw(seed, SIZE))) for seed in (3, 7))
    both = described(served, one, two, DESCRIBE, max_tokens=4)["usage"]["prompt_tokens"]
    assert both > described(served, one, DESCRIBE, max_tokens=4)["usage"]["prompt_tokens"] + 10


def test_from_python(seeing: Path) -> None:
    scene = draw(3, SIZE)

    async def ask(prompt: Any, *images: Picture) -> str:
        async with AsyncEngine(seeing) as engine:
            params = Params(max_tokens=None)
            return "".join([d.text async for d in engine.generate(prompt, params, images)])

    assert asyncio.run(ask(DESCRIBE, Picture(scene.picture))) == scene.answers[DESCRIBE]
    messages = [{"role": "user", "content": [{"type": "text", "text": DESCRIBE}, {"type": "image"}]}]
    assert asyncio.run(ask(messages, Picture(scene.picture)))


def bomb() -> bytes:
    """A PNG of 30000x30000 pixels in a few kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(b"\0" * 10000))
        + chunk(b"IEND", b"")
    )


def test_what_is_refused(served: Served, text_only: Path) -> None:
    good = url_of(png(draw(3, SIZE)))
    for parts, words in (
        (["http://127.0.0.1/a.png", "a"], "not fetched"),
        (["data:image/png;base64,????", "a"], "is not base64"),
        (["data:image/png;base64,", "a"], "is empty"),
        ([url_of(b"GIF89a nonsense"), "a"], "is not a picture"),
        ([url_of(png(draw(3, SIZE))[:200]), "a"], "damaged or cut off"),
        ([url_of(bomb()), "a"], "pixels"),
        ([good, "what is <|image_pad|>"], "places"),
        ([good] * 17, "may hold 16 pictures"),
    ):
        status, content = served.ask("POST", CHAT, {"messages": message(*parts)})
        assert status == 400 and words in content["error"]["message"], content
        assert content["error"]["param"].startswith("messages")
    with serving(text_only) as deaf:
        status, content = deaf.ask("POST", CHAT, {"messages": message(good, "a")})
        assert status == 400 and "is not a multimodal model" in content["error"]["message"]


def test_a_size_that_was_not_compiled(seeing: Path) -> None:
    with serving(seeing, template=None) as strict:
        status, content = strict.ask(
            "POST", CHAT, {"messages": message(url_of(png(draw(3, (224, 84)))), "a")}
        )
        assert status == 400 and "compiled are 112x112, 168x112" in content["error"]["message"]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium to look with")
def test_a_picture_is_dropped_on_the_page(served: Served, tmp_path: Path) -> None:
    scene = draw(3, SIZE)
    text = json.dumps(base64.b64encode(png(scene)).decode())
    drop = f"""(async () => {{
        const bytes = Uint8Array.from(atob({text}), c => c.charCodeAt(0));
        const data = new DataTransfer();
        data.items.add(new File([bytes], "scene.png", {{ type: "image/png" }}));
        document.dispatchEvent(new DragEvent("drop", {{ dataTransfer: data, cancelable: true }}));
    }})()"""
    with open_page(served.url, tmp_path / "profile") as page:
        page.until("!document.getElementById('add').hidden")
        page.value(drop)
        page.until("document.querySelectorAll('#pictures img').length === 1")
        page.value(
            f"document.getElementById('text').value = {json.dumps(DESCRIBE)};"
            " document.getElementById('form').requestSubmit()"
        )
        page.until(
            "document.getElementById('stop').disabled"
            " && document.querySelector('#talk p.assistant')?.textContent"
        )
        assert (
            page.value("document.querySelector('#talk p.assistant').textContent") == scene.answers[DESCRIBE]
        )
        assert page.value("document.querySelector('#talk p.user img').naturalWidth") == SIZE[0]
        assert page.value("document.querySelectorAll('#pictures img').length") == 0
        assert all(u.startswith((f"{served.url}/", "data:")) for u in page.requests) and not page.problems

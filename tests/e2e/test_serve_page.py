"""The chat page in a real browser.  Skipped where there is no Chromium."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")

from tests.browser import BROWSER, Page, open_page
from tests.e2e.serving import Served, serving

IDLE = "document.getElementById('stop').disabled"


@pytest.fixture
def served(four: Path) -> Iterator[Served]:
    with serving(four) as made:
        yield made


def _send(page: Page, text: str) -> None:
    page.value(
        f"document.getElementById('text').value = {json.dumps(text)};"
        " document.getElementById('form').requestSubmit()"
    )


def _lines(page: Page) -> list[list[str]]:
    found = page.value("[...document.querySelectorAll('#talk p')].map(p => [p.className, p.textContent])")
    return [[str(kind), str(text)] for kind, text in found]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium to look with")
def test_a_conversation(served: Served, tmp_path: Path) -> None:
    """Answers stream, are stopped and forgotten, and a reload begins anew; text is never markup, and nobody
    else is asked.
    """
    with open_page(served.url, tmp_path / "profile") as page:
        page.until("document.getElementById('model').options.length === 2")
        asked = "The <b>old</b> house"
        _send(page, asked)
        page.until("document.querySelectorAll('#talk p.assistant').length === 1")
        page.until(IDLE)
        (user, answer) = _lines(page)
        assert user == ["user", asked] and answer[0] == "assistant" and answer[1]
        assert page.value("document.querySelector('#talk b') === null")
        assert "tokens/s" in str(page.value("document.getElementById('rate').textContent"))

        page.value("document.getElementById('clear').click()")
        assert _lines(page) == []
        _send(page, "Tell me a long story")
        page.until("document.querySelector('#talk p.assistant')?.textContent.length > 0")
        page.value("document.getElementById('stop').click()")
        page.until(IDLE)
        (_, stopped) = _lines(page)
        assert stopped[0] == "assistant" and stopped[1]

        page.value("document.getElementById('clear').click()")
        _send(page, "word " * 400)  # more than the cache holds
        page.until("document.querySelectorAll('#talk p.error').length === 1")
        page.until(IDLE)
        assert "--max-kv" in _lines(page)[-1][1]
        _send(page, "And now?")  # what was refused is not sent with it
        page.until("document.querySelectorAll('#talk p.assistant')[1]?.textContent.length > 0")
        page.until(IDLE)

        page.reload()
        page.until("document.getElementById('model').options.length === 2")
        assert _lines(page) == [] and page.value(IDLE)
        _send(page, asked)
        page.until("document.querySelector('#talk p.assistant')?.textContent.length > 0")
        page.until(IDLE)
        assert page.requests and all(url.startswith(f"{served.url}/") for url in page.requests)
        assert all("400" in problem for problem in page.problems), page.problems

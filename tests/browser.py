"""A headless Chromium, driven over its debugging pipe (chromedevtools.github.io/devtools-protocol)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["BROWSER", "Page", "open_page"]

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


class Page:
    """One page; `requests` are the addresses that it has asked for, `problems` what its console says."""

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back = to, os.fdopen(back, "rb", buffering=0)
        self._held = b""
        self._number = 0
        self._at: dict[str, str] = {}
        self.requests: list[str] = []
        self.problems: list[str] = []
        self._loads = 0

    def open(self, url: str) -> None:
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._at = {"sessionId": attached["sessionId"]}
        for domain in ("Network", "Log", "Runtime", "Page"):
            self._call(f"{domain}.enable")
        self._call("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def reload(self) -> None:
        """As its user would, until it has loaded."""
        before = self._loads
        self._call("Page.reload")
        while self._loads == before:
            self._note(self._next())

    def value(self, expression: str) -> Any:
        """What an expression is in the page; of a promise what it becomes."""
        found = self._call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, condition: str) -> None:
        """Wait until an expression holds."""
        loop = f"(async () => {{ while (!({condition})) await new Promise(r => setTimeout(r, 20)); }})()"
        self.value(loop)

    def close(self) -> None:
        self._back.close()

    def _call(self, method: str, **params: Any) -> Any:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params, **self._at}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            reply = self._next()
            if reply.get("id") == self._number:
                assert "error" not in reply, reply
                return reply["result"]
            self._note(reply)

    def _next(self) -> Any:
        while b"\0" not in self._held:
            more = self._back.read(1 << 16)
            assert more, "Chromium has ended"
            self._held += more
        message, _, self._held = self._held.partition(b"\0")
        return json.loads(message)

    def _note(self, event: Any) -> None:
        params = event.get("params", {})
        if event["method"] == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif event["method"] == "Page.loadEventFired":
            self._loads += 1
        elif event["method"] == "Log.entryAdded":
            self.problems.append(params["entry"]["text"])
        elif event["method"] == "Runtime.exceptionThrown":
            self.problems.append(params["exceptionDetails"]["text"])


@contextmanager
def open_page(url: str, profile: Path) -> Iterator[Page]:
    """A page of a browser that is ended with the block; `profile` is a folder of its own."""
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe")
    # The pipe is descriptors 3 and 4, which a shell can give a child.
    command = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
    browser = subprocess.Popen(
        ["bash", "-c", command, str(BROWSER), *flags, f"--user-data-dir={profile}"],
        pass_fds=(theirs_in, theirs_out),
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs_in)
    os.close(theirs_out)
    page = Page(ours_out, ours_in)
    try:
        page.open(url)
        yield page
    finally:
        browser.kill()
        browser.wait()
        os.close(ours_out)
        page.close()

"""Pictures in requests: `data:` URLs and plain base64, looked at one after the other by the towers.

Nothing is fetched from anywhere; a picture's size in pixels is looked at before it is decoded.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from tyir.diagnostics import TyirError
from tyir.execution.artifacts import Artifacts
from tyir.runtime_sim.session.session import EngineName
from tyir.runtime_sim.vision.pictures import Picture, decode_picture
from tyir.runtime_sim.vision.placeholders import Marks
from tyir.runtime_sim.vision.request import VisionRequest
from tyir.tools.run.seeing import Seeing

__all__ = ["MOST_PICTURES", "Eyes", "picture_of"]

MOST_PICTURES: Final = 16  # of a request
_MOST_PIXELS: Final = 25_000_000  # 75 MB as RGB; models see a tenth of it at most
_DATA: Final = re.compile(r"data:[a-zA-Z0-9.+-]*/?[a-zA-Z0-9.+-]*(?:;[a-zA-Z0-9=.+-]+)*;base64,")


def picture_of(text: str, name: str = "the picture", *, url: bool = True) -> Picture:
    """The picture of a `data:` URL, or with `url` false of base64; `TyirError` for anything else."""
    start = 0
    if url:
        match = _DATA.match(text[:256])
        if match is None:
            raise TyirError(
                f"{name} is not in the request: pictures are not fetched from addresses",
                help="send it as data:image/png;base64,...",
            )
        start = match.end()
    try:
        data = base64.b64decode(text[start:], validate=True)
    except (binascii.Error, ValueError):
        raise TyirError(f"{name} is not base64", help="send it as data:image/png;base64,...") from None
    return decode_picture(data, name, _MOST_PIXELS)


class Eyes:
    """`Seeing` for any thread: towers run in a thread of their own."""

    def __init__(
        self, artifacts: Artifacts, engine: EngineName, tokenizer: Any, marks: Marks, *, resize: bool
    ) -> None:
        self._seeing = Seeing(artifacts, engine, tokenizer, marks, resize=resize)
        self._thread = ThreadPoolExecutor(1, "tyir-tower")

    @property
    def sizes(self) -> list[str]:
        """The sizes that pictures may have, as `112x112`."""
        return [size.name for size in self._seeing.preprocessor.sizes]

    def picture(self, text: str, name: str, *, url: bool) -> Picture:
        """As `picture_of`."""
        return self._thread.submit(picture_of, text, name, url=url).result()

    def request(self, text: str, pictures: Sequence[Picture]) -> VisionRequest:
        """As `Seeing.request`, of stills."""
        return self._thread.submit(self._look, text, pictures).result()

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()

    def _look(self, text: str, pictures: Sequence[Picture]) -> VisionRequest:
        preprocessor = self._seeing.preprocessor
        try:
            return self._seeing.request(text, [preprocessor.image(picture) for picture in pictures])
        finally:
            preprocessor.said.clear()

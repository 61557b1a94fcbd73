"""What processes of a group tell each other beside their dies' data: a kind, fields as JSON, and arrays.

    channel.send("step", {"ids": ids}, seqlen=8)
    message = channel.receive(timeout=8)

One message is one write.  Nothing of it is executed: fields are JSON, arrays their bytes.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Final

import numpy as np
import numpy.typing as npt

__all__ = ["Channel", "Message"]

Array = npt.NDArray[Any]
_LENGTH: Final = 4  # bytes of the header's length


@dataclass(frozen=True)
class Message:
    """What was received."""

    kind: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, Array] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        return self.fields[name]


class Channel:
    """Both directions between two processes; `send` may be called by several threads."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._sending = threading.Lock()

    def send(self, kind: str, arrays: Mapping[str, Array] | None = None, **fields: Any) -> None:
        """`OSError` when the other end is gone."""
        given = {name: np.ascontiguousarray(array) for name, array in (arrays or {}).items()}
        shapes = [[name, a.dtype.str, a.shape] for name, a in given.items()]
        header = json.dumps({"kind": kind, "fields": fields, "arrays": shapes}).encode()
        parts = [len(header).to_bytes(_LENGTH, "little"), header, *(a.tobytes() for a in given.values())]
        with self._sending:
            self.connection.send_bytes(b"".join(parts))

    def receive(self, timeout: float | None = None) -> Message:
        """The next message; `TimeoutError` after so many seconds of silence, `EOFError` or `OSError` when
        the other end is gone.
        """
        if not self.connection.poll(timeout):
            raise TimeoutError
        data = self.connection.recv_bytes()
        first = _LENGTH + int.from_bytes(data[:_LENGTH], "little")
        header = json.loads(data[_LENGTH:first])
        arrays: dict[str, Array] = {}
        for name, dtype, shape in header["arrays"]:
            array = np.frombuffer(data, dtype, math.prod(shape), first).reshape(shape)
            arrays[name], first = array, first + array.nbytes
        return Message(header["kind"], header["fields"], arrays)

    def close(self) -> None:
        self.connection.close()

"""The session of an artifact folder: with pictures where its model takes them."""

from __future__ import annotations

from pathlib import Path

from tyir.execution.artifacts import Artifacts
from tyir.runtime_sim.session.session import EngineName, Session

__all__ = ["open_session"]


def open_session(
    folder: Path, engine: EngineName, *, check: bool = True, threads: int | None = None
) -> Session:
    """A session of the folder; `TyirError` lists what is wrong with it.  `threads`: of the host engine."""
    artifacts = Artifacts.open(folder, check=check)
    if artifacts.manifest.vision is None:
        return Session(artifacts, engine, threads=threads)
    from tyir.runtime_sim.vision.session import VisionSession

    return VisionSession(artifacts, engine, threads=threads)

"""What an answer needs, opened from an artifact folder: the session, its tokenizer, and where answers end."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyir.execution.artifacts import Artifacts
from tyir.process.cache import checked_files
from tyir.process.extras import is_command
from tyir.runtime_sim.session.ending import check_limit
from tyir.runtime_sim.session.sampling import Sampler, check_sampling, make_sampler
from tyir.runtime_sim.session.session import EngineName, Session
from tyir.tools.cli import note, quiet
from tyir.tools.run.arguments import frames_per_second
from tyir.tools.run.end_tokens import end_tokens
from tyir.tools.run.group_of import end_with, open_with_group
from tyir.tools.tokenizer import load_tokenizer, without_models

if TYPE_CHECKING:
    from tyir.runtime_sim.processes.group import DieGroup

__all__ = ["Opened", "open_session", "open_to_answer", "save_cache"]


@dataclass(frozen=True)
class Opened:
    """A session with what else decides its answers.

    `tokenizer`: transformers', None where prompts are token ids; `stops`: the tokens that end an answer, with
    the source that says so; `began`: `time.perf_counter()` of the process's beginning.
    """

    session: Session
    tokenizer: Any
    sampler: Sampler
    stops: Mapping[int, str]
    limit: int
    began: float


def open_to_answer(args: argparse.Namespace, *, text: bool = True) -> Opened:
    """Open what `add_answer_arguments` named; `TyirError` for numbers out of range, then for the folder.

    With `text` false no tokenizer is needed.
    """
    began = time.perf_counter() - _age()
    sampler = make_sampler(args.temperature, args.top_k, args.top_p, args.seed, args.min_p)
    check_limit(args.max_tokens)
    artifacts, group = open_with_group(args, check=not args.no_check)
    if group is not None:
        end_with(group)
    args.fps = frames_per_second(args, pictures=artifacts.manifest.vision is not None)
    session = _session_of(artifacts, args.engine, args.threads, group, dense=args.dense)
    check_sampling(session.choices, args.temperature, args.top_k)
    with without_models():
        tokenizer = load_tokenizer(session.artifacts) if text else None
    stops = end_tokens(session.artifacts, tokenizer)
    session.show_progress = not quiet()
    return Opened(session, tokenizer, sampler, stops, args.max_tokens, began)


def open_session(
    folder: Path, engine: EngineName, *, check: bool = True, threads: int | None = None
) -> Session:
    """A session of the folder, with pictures where its model takes them; `TyirError` lists what is wrong.

    `threads`: of the host engine.
    """
    return _session_of(Artifacts.open(folder, check=check, seen=checked_files()), engine, threads)


def _session_of(
    artifacts: Artifacts,
    engine: EngineName,
    threads: int | None,
    group: DieGroup | None = None,
    *,
    dense: bool = False,
) -> Session:
    if artifacts.manifest.vision is None:
        return Session(artifacts, engine, threads=threads, group=group, dense=dense)
    from tyir.runtime_sim.vision.session import VisionSession

    return VisionSession(artifacts, engine, threads=threads, group=group)


def save_cache(session: Session, path: Path) -> None:
    """Write a session's cache, after saying how much that is: a long prompt's takes gigabytes and minutes."""
    size = f"{session.saved_bytes / 1e6:.1f} MB"
    note(f"writing the cache of {len(session.tokens)} tokens to {path}: {size}")
    session.save(path)


def _age() -> float:
    """Seconds since this process began, or 0 where the system does not tell or a program has called `main`:
    what the interpreter and imports took belongs to the loading.
    """
    if not is_command():
        return 0.0
    try:
        began = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return max(time.clock_gettime(time.CLOCK_BOOTTIME) - began / os.sysconf("SC_CLK_TCK"), 0.0)
    except (OSError, AttributeError, ValueError, IndexError):
        return 0.0

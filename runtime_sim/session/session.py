"""Running compiled artifacts: all dies in lockstep, prompts in chunks, the cache kept between calls.

Chunks are of the compiled lengths.

    session = Session(Path("out/4die"))
    logits = session.feed([12, 7, 99])          # [3, V] float32, one row per token; for programs that return logits
    best = session.next_tokens([4])             # the best tokens after each, best first; for every program
    for token in session.generate(prompt, 32): ...

The engine decides what executes an op: `host` the compiled library, `interpreter` the ops' reference
meaning (on the same files), `edge10` the command program on modelled memories.
"""  # noqa: E501

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import numpy as np
import numpy.typing as npt

from tyir.artifacts.dual_chunk import DualChunk
from tyir.artifacts.long_rope import FACT as LONG_ROPE
from tyir.artifacts.long_rope import LongRope
from tyir.diagnostics import TyirError, did_you_mean
from tyir.execution.artifacts import Artifacts
from tyir.execution.lockstep import Links
from tyir.process.interrupts import interrupts_wait
from tyir.process.progress import Bar
from tyir.runtime_sim.session.chunks import Chunk, pad, plan_chunks
from tyir.runtime_sim.session.embedding import embedding_table
from tyir.runtime_sim.session.ending import check_limit, end_reason
from tyir.runtime_sim.session.finite_steps import FiniteSteps
from tyir.runtime_sim.session.program_engine import CacheName, ProgramEngine, StepProbe
from tyir.runtime_sim.session.recall import Recall
from tyir.runtime_sim.session.sampling import Candidates, Sampler, choose, greedy, logsumexp
from tyir.runtime_sim.session.saved_cache import Kind, read_cache, saved_bytes, write_cache
from tyir.runtime_sim.session.token_ids import checked_ids

__all__ = ["ENGINES", "Engine", "EngineName", "Session", "make_engine"]

Array = npt.NDArray[Any]
EngineName = Literal["host", "interpreter", "edge10"]
_UnderWay = tuple["Chunk", list[int], Callable[[], dict[str, Array]]]  # a step, its tokens, what waits for it
_LONG: Final = 16  # chunks of a prompt from which on it is said how far it is
ENGINES: Final[tuple[EngineName, ...]] = ("host", "interpreter", "edge10")


class Engine(Protocol):
    """Executes one step of all dies and keeps their caches."""

    artifacts: Artifacts

    def step(self, inputs: dict[str, Array], chunk: Chunk) -> dict[str, Array]:
        """Run one chunk; the main die's outputs by name, caches excepted, each [b, seqlen, ..].

        `inputs` by name are `pos` and `ids` or `embeddings`, padded to `chunk.seqlen`.
        """

    def begin(self, inputs: dict[str, Array], chunk: Chunk) -> Callable[[], dict[str, Array]]:
        """Begin a step behind those that were begun before; what is returned waits for its end and returns
        what `step` does.
        """

    def reset(self) -> None:
        """Forget the caches."""

    def caches(self) -> dict[CacheName, Array]:
        """All caches by die and name."""

    def load_caches(self, caches: dict[CacheName, Array]) -> None:
        """Take over caches that `caches` gave."""

    def copy_sequence(self, source: int, target: int) -> None:
        """Make the caches of one sequence of the batch those of another."""


class EngineGroup(Protocol):
    """Processes that the dies of artifacts run in (`tyir.runtime_sim.processes`)."""

    artifacts: Artifacts
    engine_name: EngineName
    engine: Engine
    problem: TyirError | None  # why nothing can be computed with it any more


def make_engine(
    name: str,
    artifacts: Artifacts,
    probe: StepProbe | None = None,
    threads: int | None = None,
    links: Links | None = None,
) -> Engine:
    """The engine of a name, for an artifact folder.

    `probe` sees the ops, which the engines that can then walk one by one.  `threads` of the engine `host`:
    None for all cores that this process may use.  `links`: which dies run in this process, None for all.
    """
    if threads is not None and name != "host" and name in ENGINES:
        raise TyirError(f"the engine '{name}' runs in one thread", help="leave --threads out, or use host")
    if name == "edge10":
        from tyir.runtime_sim.session.edge10_engine import Edge10Engine

        return Edge10Engine(artifacts, links)
    if name not in ENGINES:
        raise TyirError(
            f"there is no engine '{name}'", help=did_you_mean(name, ENGINES) or f"one of {', '.join(ENGINES)}"
        )
    if name == "host":
        from tyir.runtime_sim.session.host_engine import HostEngine

        return HostEngine(artifacts, probe=probe, threads=threads, links=links)
    return ProgramEngine(artifacts, compiled=False, probe=probe, links=links)


class Session:
    """One conversation: artifacts, an engine, and the tokens that its cache holds.

    Artifacts for a batch run it as their sequence `sequence`, the others being padding; `BatchSession` runs
    several conversations.
    """

    def __init__(
        self,
        folder: str | Path | Artifacts,
        engine: EngineName = "host",
        *,
        check: bool = True,
        probe: StepProbe | None = None,
        sequence: int = 0,
        threads: int | None = None,
        group: EngineGroup | None = None,
        dense: bool = False,
    ) -> None:
        """`folder`: its name, or the folder opened already.  `threads`: as `make_engine` takes them.

        `group`: processes that the dies of these artifacts run in, with the engine of theirs.  `dense`: take
        no steps that leave blocks of the cache out; in several processes none are taken, since what they have
        seen is state of each.
        """
        self.artifacts = folder if isinstance(folder, Artifacts) else Artifacts.open(folder, check=check)
        self.manifest = self.artifacts.manifest
        self.sequence = sequence
        if not 0 <= sequence < self.manifest.options.batch:
            raise TyirError(
                f"there is no sequence {sequence}",
                help=f"{self.artifacts.path} runs {self.manifest.options.batch}, numbered from 0",
            )
        self.group = group
        self.engine_name: EngineName = engine if group is None else group.engine_name
        self.engine = (
            group.engine if group is not None else make_engine(engine, self.artifacts, probe, threads)
        )
        self._step = FiniteSteps(self.engine, sees_caches=group is None)
        self._chunks = DualChunk.used(self.manifest.model, self.capacity)
        self._ropes = LongRope.used(self.manifest.model, self.capacity)
        self._long = False  # whether what is cached was turned by the long frequencies
        self._expected = 0  # tokens that the conversation was said to come to
        self._choice = None if dense or group is not None else self.manifest.options.choice
        self.recall = Recall()  # of prompt steps since the cache was empty that left blocks out and measured
        self.tokens: list[int] = []
        self.show_progress = False  # of long prompts, on standard error

    @property
    def capacity(self) -> int:
        """How many tokens the cache holds."""
        return self.manifest.options.max_kv

    @property
    def choices(self) -> int | None:
        """How many tokens the program returns for each position; None when it returns logits."""
        return self.manifest.choices

    def reset(self) -> None:
        """Start over with an empty cache."""
        self.tokens.clear()
        self.recall = Recall()
        self._expected = 0
        self.engine.reset()

    def expect(self, length: int) -> None:
        """Say to how many tokens the conversation will come, before its first: models with two rotary tables
        (`tyir.artifacts.long_rope`) turn all of its keys by those of that length, as `generate` has it for
        its prompt and limit.  Where nothing is said, the tokens given so far decide; a conversation that
        outgrows the short table is computed anew with the long one.
        """
        self._expected = min(length, self.capacity)

    def rewind(self, count: int) -> None:
        """Keep the first `count` tokens and forget the rest; what follows is computed anew."""
        if not 0 <= count <= len(self.tokens):
            raise TyirError(f"cannot rewind to {count} tokens: the cache holds {len(self.tokens)}")
        del self.tokens[count:]

    def prefill(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Make the cache hold exactly `ids`, computing only what it does not hold yet.

        The second turn of a chat costs its new tokens.

        Logits [1, V] after the last of them: those of a whole prompt (`feed`) take 4 V bytes a token, and
        work that programs compiled with `output_rows="last"` do not do.
        """
        self._check_logits()
        return np.asarray(self._last(self._new_of(ids))["logits"], np.float32)

    def _new_of(self, ids: Sequence[int]) -> Sequence[int]:
        """Keep what the cache shares with `ids`; the tokens that are still to be computed."""
        same = self._ropes is None or self._long == self._ropes.is_long(max(len(ids), self._expected))
        self.rewind(self.shared_prefix(ids) if same else 0)
        return ids[len(self.tokens) :]

    def shared_prefix(self, ids: Sequence[int]) -> int:
        """How many of the first tokens of `ids` the cache holds, the last one excepted.

        The last one's logits must be computed.
        """
        differing = (number for number, (mine, theirs) in enumerate(zip(self.tokens, ids)) if mine != theirs)
        shared = next(differing, min(len(self.tokens), len(ids)))
        return min(shared, max(len(ids) - 1, 0))

    @property
    def saved_bytes(self) -> int:
        """What `save` writes now, a few kilobytes aside."""
        return saved_bytes(self.manifest, len(self.tokens))

    def save(self, path: Path) -> None:
        """Write the cache and its tokens to a file of about `saved_bytes`, for `restore`.

        `TyirError` when the weights have been written to since the artifacts were opened.
        """
        self.artifacts.unchanged()
        write_cache(path, self.artifacts, self.tokens, self.engine.caches(), self._beside())

    def _beside(self) -> dict[str, Array]:
        """What is to be known of cached tokens besides their keys and values."""
        return {} if self._ropes is None else {LONG_ROPE: np.array(self._long)}

    def _kinds(self) -> dict[str, Kind]:
        """Shapes and types of `_beside`."""
        return {} if self._ropes is None else {LONG_ROPE: ((), np.dtype(bool))}

    def _restored(self, tokens: list[int], beside: Mapping[str, Array]) -> None:
        """Go on with tokens and what was saved beside them."""
        self.tokens = tokens
        self._expected = 0
        self._long = LONG_ROPE in beside and bool(beside[LONG_ROPE])

    def restore(self, path: Path) -> None:
        """Continue where `save` stopped.

        `TyirError` when the file is damaged or belongs to other artifacts; the session then stays as it was.
        """
        tokens, caches, beside = read_cache(path, self.artifacts, self._kinds())
        self.engine.load_caches(caches)
        self._restored(tokens, beside)

    def feed(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Append tokens to the cache; logits [len(ids), V] f32, row i predicting what follows ids[i].

        Programs that return a step's last row alone run once for each row: `prefill` needs one of them.
        Raises `TyirError` when the program returns tokens and no logits.
        """
        self._check_logits()
        return _joined(self._advance(ids, every=True))["logits"].astype(np.float32, copy=False)

    def _check_logits(self) -> None:
        if self.choices is not None:
            raise TyirError(
                "these artifacts return the"
                f" {'best token' if self.choices == 1 else f'{self.choices} best tokens'} of each position"
                " and no logits",
                help="use Session.next_tokens or Session.generate, or compile with --output logits",
            )

    def next_tokens(self, ids: Sequence[int]) -> Candidates:
        """Append tokens to the cache.

        Row i holds the best tokens to follow ids[i]: as many as the program returns, one if it returns
        logits.  As `feed`, of programs that return a step's last row alone, this takes a run for each row.
        """
        found = _joined(_with_best(outputs) for outputs in self._advance(ids, every=True))
        return Candidates(found["top_values"], found["top_ids"], found.get("logsumexp"))

    def _last(self, ids: Sequence[int]) -> dict[str, Array]:
        """Run tokens through the program; its outputs by name after the last of them, [1, ..] each."""
        row: dict[str, Array] = {}
        for outputs in self._advance(ids):
            row = {name: array[-1:].copy() for name, array in outputs.items()}
        return row

    def _advance(self, ids: Sequence[int], *, every: bool = False) -> Iterator[dict[str, Array]]:
        """Run tokens through the program, chunk by chunk; the outputs of each by name, [its tokens, ..],
        all of them finite.  Of programs that return a chunk's last row alone that is [1, ..] of the last
        chunk and [0, ..] of those before, which compute none, unless `every` row is wanted.

        A chunk's tokens are in the cache when its outputs are given: whoever stops there may go on later.
        """
        ids = checked_ids(ids, self.manifest.model.get("vocab_size"))
        if not ids:
            raise TyirError(
                "nothing to run: the list of tokens is empty", help="give a prompt of at least one token"
            )
        self._take_table(len(ids))
        first = len(self.tokens)
        options = self.manifest.options
        longest = max(options.seqlens)
        shown = self.show_progress and len(ids) >= _LONG * longest
        sparse = None if self._choice is None else longest
        chunks = plan_chunks(
            len(ids), first, options.dense_seqlens, self.capacity, self._chunks, sparse=sparse
        )
        apart = not every and options.steps_ahead
        steps = self._in_stages(chunks, ids) if apart else self._in_turn(chunks, ids, every)
        with Bar("prompt", len(ids), "token", show=shown) as bar, closing(steps):
            for count, rows in steps:
                bar.advance(count)
                yield rows

    def _in_turn(
        self, chunks: Iterable[Chunk], ids: Sequence[int], every: bool
    ) -> Generator[tuple[int, dict[str, Array]]]:
        """Chunks one after the other: how many tokens, and their rows."""
        first = len(self.tokens)
        for chunk in chunks:
            part = list(ids[chunk.start - first : chunk.start - first + chunk.count])
            with interrupts_wait():
                inputs = self._inputs(part, chunk, first + len(ids))
                last = every or chunk.start + chunk.count == first + len(ids)
                rows = _joined(self._step_to(inputs, upto, last) for upto in self._parts(chunk, every))
                self._note_recall(chunk)
                self.tokens += part
            yield chunk.count, rows

    def _in_stages(
        self, chunks: Iterable[Chunk], ids: Sequence[int]
    ) -> Generator[tuple[int, dict[str, Array]]]:
        """The same with several under way, so that each stage of dies works on another; one that measures
        what it has seen is the last until that is read.  Who stops has those under way finished, and their
        tokens in the cache.
        """
        first = len(self.tokens)
        begun: deque[_UnderWay] = deque()
        try:
            for chunk in chunks:
                part = list(ids[chunk.start - first : chunk.start - first + chunk.count])
                with interrupts_wait():
                    inputs = self._inputs(part, chunk, first + len(ids))
                    last = chunk.start + chunk.count == first + len(ids)
                    begun.append((chunk, part, self._begin(inputs, chunk, last)))
                ahead = 0 if self._measures(chunk) else self.manifest.options.steps_ahead
                while len(begun) > ahead:
                    yield self._ended(begun)
            while begun:
                yield self._ended(begun)
        finally:
            while begun:
                self._ended(begun)

    def _ended(self, begun: deque[_UnderWay]) -> tuple[int, dict[str, Array]]:
        """The first of the steps under way, which is waited for; of those behind one that fails nothing is
        kept.
        """
        with interrupts_wait():
            chunk, part, end = begun.popleft()
            try:
                rows = end()
            except BaseException:
                for _, _, other in begun:
                    with suppress(Exception):
                        other()
                begun.clear()
                raise
            self._note_recall(chunk)
            self.tokens += part
            return len(part), rows

    def _take_table(self, count: int) -> None:
        """Have the rotary table that the conversation needs with `count` tokens more; what is cached is
        computed anew if that is another than so far.
        """
        if self._ropes is None:
            return
        known = list(self.tokens)
        long = self._ropes.is_long(max(len(known) + count, self._expected))
        if not known:
            self._long = long
        elif long and not self._long:
            self.rewind(0)
            self.expect(max(len(known) + count, self._expected))
            for _ in self._advance(known):
                pass

    def _measures(self, chunk: Chunk) -> bool:
        """Whether a step leaves something out and measures what it has seen."""
        choice, step = self._choice, None if self._chunks is None else self._chunks.step
        longest = max(self.manifest.options.seqlens)
        if choice is None or chunk.seqlen != longest or not choice.measures(chunk.start, longest):
            return False
        return choice.leaves_out(chunk.start, step)

    def _note_recall(self, chunk: Chunk) -> None:
        """Keep what a step that measures has seen."""
        if self._choice is not None and self._measures(chunk):
            self.recall.add(self.engine.caches(), self._choice, chunk.count)

    def _parts(self, chunk: Chunk, every: bool) -> Iterator[Chunk]:
        """The runs of a chunk, each up to the last row that it returns: the whole, or once for each row.

        Again and again the same rows are written to the caches.
        """
        once = not (every and self.manifest.options.takes_row(chunk.seqlen))
        for count in (chunk.count,) if once else range(1, chunk.count + 1):
            yield replace(chunk, count=count)

    def _step_to(self, inputs: dict[str, Array], chunk: Chunk, wanted: bool) -> dict[str, Array]:
        """What a step returns of the first `chunk.count` of its rows, by name; of a program that returns one
        row nothing where it is not `wanted`.
        """
        counts = self._used(chunk, wanted)
        return self._own(self._step(inputs, chunk, counts, self._used(chunk, True)), counts)

    def _begin(self, inputs: dict[str, Array], chunk: Chunk, wanted: bool) -> Callable[[], dict[str, Array]]:
        """`_step_to`, begun behind those that were begun before."""
        counts = self._used(chunk, wanted)
        end = self._step.begin(inputs, chunk, counts, self._used(chunk, True))
        return lambda: self._own(end(), counts)

    def _used(self, chunk: Chunk, wanted: bool) -> list[int]:
        """How many rows of each sequence of a step are used."""
        used = 0 if not wanted and self.manifest.options.takes_row(chunk.seqlen) else chunk.count
        return [used if i == self.sequence else 0 for i in range(self.manifest.options.batch)]

    def _own(self, outputs: Mapping[str, Array], counts: Sequence[int]) -> dict[str, Array]:
        """Of a step's outputs those rows of this sequence that are used."""
        return {name: array[self.sequence, : counts[self.sequence]] for name, array in outputs.items()}

    def _inputs(self, ids: list[int], chunk: Chunk, length: int) -> dict[str, Array]:
        """What a step of a conversation of `length` tokens, those to come included, is given."""
        padded = np.zeros((self.manifest.options.batch, chunk.seqlen), np.int32)
        padded[self.sequence] = pad(ids, chunk.seqlen)
        pos = np.zeros(self.manifest.options.batch, np.int32)
        pos[self.sequence] = chunk.start
        inputs: dict[str, Array] = {"pos": pos}
        if self._chunks is not None:
            inputs["temperature"] = np.full(len(pos), self._chunks.temperature(length), np.float32)
        if self._ropes is not None:
            rows = self._ropes.rows(chunk.start, chunk.seqlen, self._long, self.capacity)
            inputs["rope_rows"] = np.tile(rows, (len(pos), 1))
        if self.manifest.options.embedding_as_input:
            return {"embeddings": self._embedding_table[padded], **inputs}
        return {"ids": padded, **inputs}

    @cached_property
    def _embedding_table(self) -> Array:
        return embedding_table(self.artifacts)

    def generate(
        self,
        prompt: Sequence[int],
        limit: int,
        *,
        sampler: Sampler = greedy,
        stop: Callable[[int], bool] = lambda token: False,
    ) -> Iterator[int]:
        """Yield up to `limit` new tokens after `prompt`.

        What the cache already holds of the prompt is not computed again.  Ends early at a token for which
        `stop` holds, or when the cache is full (`end_reason` tells which).  `TyirError` when logits are not
        finite.
        """
        check_limit(limit)
        self.expect(len(prompt) + limit)
        made = [self._sample(self._new_of(prompt), sampler)]
        if not limit:
            return
        while True:
            yield made[-1]
            if end_reason(made, limit, self.capacity - len(self.tokens), stop) is not None:
                return
            made.append(self._sample(made[-1:], sampler))

    def _sample(self, ids: Sequence[int], sampler: Sampler) -> int:
        """The token to follow `ids`, chosen among all tokens or among those that the program returns."""
        return choose({name: array[-1] for name, array in self._last(ids).items()}, sampler)


def _joined(parts: Iterable[dict[str, Array]]) -> dict[str, Array]:
    """The rows of all chunks, by name."""
    rows: dict[str, list[Array]] = {}
    for outputs in parts:
        for name, array in outputs.items():
            rows.setdefault(name, []).append(np.asarray(array))
    return {name: np.concatenate(arrays) for name, arrays in rows.items()}


def _with_best(outputs: dict[str, Array]) -> dict[str, Array]:
    """The best token of each row with its value, in place of logits."""
    if "logits" not in outputs:
        return outputs
    logits = outputs["logits"]
    best = logits.argmax(axis=-1)[:, None]
    values = np.take_along_axis(logits, best, axis=-1)
    return {
        "top_values": values.astype(np.float32),
        "top_ids": best.astype(np.int32),
        "logsumexp": logsumexp(logits).astype(np.float32),
    }

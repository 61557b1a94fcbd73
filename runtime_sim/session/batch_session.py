"""Several sequences at once through artifacts compiled for a batch.

Each has its own position and is padded to a common length per step.

    session = BatchSession(Path("out/4die"))
    logits = session.feed([[12, 7, 99], [4]])          # one array [n, V] for each sequence

What a step writes beyond a sequence's own tokens is padding at positions that its next tokens overwrite.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tyir.artifacts.dual_chunk import DualChunk
from tyir.artifacts.long_rope import LongRope
from tyir.diagnostics import TyirError
from tyir.execution.artifacts import Artifacts
from tyir.runtime_sim.session.chunks import Chunk, length_for, pad
from tyir.runtime_sim.session.embedding import embedding_table
from tyir.runtime_sim.session.ending import check_limit, end_reason
from tyir.runtime_sim.session.finite_steps import FiniteSteps
from tyir.runtime_sim.session.program_engine import StepProbe
from tyir.runtime_sim.session.sampling import Sampler, choose, greedy
from tyir.runtime_sim.session.session import EngineGroup, EngineName, make_engine
from tyir.runtime_sim.session.token_ids import checked_ids

__all__ = ["BatchSession"]

Array = npt.NDArray[Any]


class BatchSession:
    """As many conversations as the artifacts were compiled for, one of them also."""

    def __init__(
        self,
        folder: str | Path | Artifacts,
        engine: EngineName = "host",
        *,
        check: bool = True,
        probe: StepProbe | None = None,
        threads: int | None = None,
        group: EngineGroup | None = None,
    ) -> None:
        """`folder`: its name, or the folder opened already.  `threads`: as `make_engine` takes them;
        `group`: as `Session` takes it.
        """
        self.artifacts = folder if isinstance(folder, Artifacts) else Artifacts.open(folder, check=check)
        self.manifest = self.artifacts.manifest
        self.group = group
        self.engine = (
            group.engine if group is not None else make_engine(engine, self.artifacts, probe, threads)
        )
        self._step = FiniteSteps(self.engine, sees_caches=group is None)
        self._chunks = DualChunk.used(self.manifest.model, self.manifest.options.max_kv)
        self._ropes = LongRope.used(self.manifest.model, self.manifest.options.max_kv)
        self._long = [False] * self.manifest.options.batch  # what turned the keys of each
        self.tokens: list[list[int]] = [[] for _ in range(self.manifest.options.batch)]

    def reset(self) -> None:
        """Start over with empty caches."""
        self.tokens = [[] for _ in self.tokens]
        self.engine.reset()

    def feed(self, ids: Sequence[Sequence[int]]) -> list[npt.NDArray[np.float32]]:
        """Append tokens to each sequence (an empty list adds none); for each its logits [n, V] f32.

        Programs that return a step's last rows alone run once for each row.  Raises `TyirError` for another
        number of sequences, tokens that do not fit and programs that return no logits.
        """
        rows = self.advance(ids)
        if "logits" not in rows[0]:
            raise TyirError(
                "these artifacts return tokens and no logits",
                help="use BatchSession.generate, or compile with --output logits",
            )
        return [np.asarray(own["logits"], np.float32) for own in rows]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        limit: int,
        *,
        sampler: Sampler = greedy,
        stop: Callable[[int], bool] = lambda token: False,
    ) -> list[list[int]]:
        """Up to `limit` new tokens after each prompt, every sequence for itself.

        It ends at a token for which `stop` holds, or when its cache is full (`end_reason` tells which).
        """
        check_limit(limit)
        made: list[list[int]] = [[] for _ in self.tokens]
        following = [list(p) for p in prompts]
        most = [len(known) + len(p) + limit for known, p in zip(self.tokens, prompts)]
        for _ in range(limit):
            outputs = self.advance(following, last=True, most=most)
            for number, own in enumerate(outputs):
                if following[number]:
                    made[number].append(choose({n: a[-1] for n, a in own.items()}, sampler))
            going = [
                bool(f) and end_reason(m, limit, self.manifest.options.max_kv - len(t), stop) is None
                for f, m, t in zip(following, made, self.tokens)
            ]
            following = [[m[-1]] if goes else [] for goes, m in zip(going, made)]
            if not any(going):
                break
        return made

    def advance(
        self,
        ids: Sequence[Sequence[int]],
        *,
        last: bool = False,
        lengths: Sequence[int] | None = None,
        most: Sequence[int] | None = None,
    ) -> list[dict[str, Array]]:
        """Append tokens to each sequence, in as many steps as they take; its outputs by name, [n, ..] each,
        or of the `last` token alone.

        `lengths`, `most`: as `step` takes them; None when no more of the prompts comes.  Raises `TyirError`
        for another number of sequences and for tokens that do not fit.
        """
        left = self._checked(ids)
        rows: list[dict[str, list[Array]]] = [{} for _ in left]
        if lengths is None:
            lengths = [len(known) + len(part) for known, part in zip(self.tokens, left)]
        while any(left) or not rows[0]:
            rooms = [
                len(p) if self._chunks is None else self._chunks.room(len(t))
                for p, t in zip(left, self.tokens)
            ]
            seqlen = length_for(max(map(min, map(len, left), rooms)), self.manifest.options.dense_seqlens)
            parts = [part[: min(seqlen, room)] for part, room in zip(left, rooms)]
            for own, outputs in zip(rows, self.step(parts, seqlen, lengths, every=not last, most=most)):
                for name, array in outputs.items():
                    kept = own.setdefault(name, [])
                    if last and len(array):
                        kept[:] = [array[-1:].copy()]
                    elif not last or not kept:
                        kept.append(array)
            left = [rest[len(part) :] for part, rest in zip(parts, left)]
        return [{name: np.concatenate(arrays) for name, arrays in own.items()} for own in rows]

    def step(
        self,
        parts: Sequence[Sequence[int]],
        seqlen: int,
        lengths: Sequence[int] | None = None,
        *,
        every: bool = False,
        most: Sequence[int] | None = None,
    ) -> list[dict[str, Array]]:
        """One step of a compiled length: append at most `seqlen` tokens to each sequence; its outputs by
        name, [n, ..] each.  Of programs that return the last row alone those are [1, ..] ([0, ..] of a
        sequence that waits, or whose prompt goes on after the step), unless `every` row is wanted: the step
        then runs once for each.

        `lengths`: of the sequences, the tokens that are still to come of their prompts included; None when
        none are.  With dual chunk attention a part ends at a chunk's border at the latest.  `most`: tokens
        that the sequences may come to, None for `lengths`; those of a model with two rotary tables
        (`tyir.artifacts.long_rope`) have one from their first token on, by this, and `TyirError` is raised
        for one that outgrows it.

        Nothing is appended when it fails: `NotFinite` names the sequence whose numbers are at fault, and the
        others may go on.
        """
        if seqlen in set(self.manifest.options.seqlens) - set(self.manifest.options.dense_seqlens):
            raise TyirError(
                f"a step of {seqlen} tokens leaves blocks of the cache out (sparse prefill), which a Session"
                " alone runs",
                help=f"use {', '.join(map(str, self.manifest.options.dense_seqlens))}",
            )
        counts = [len(part) for part in parts]
        whole = lengths or [len(known) + len(part) for known, part in zip(self.tokens, parts)]
        self._take_tables(parts, most or whole)
        inputs, chunk = self._inputs(parts, seqlen, whole), Chunk(0, seqlen, seqlen)
        if every and self.manifest.options.takes_row(seqlen):
            rows = self._each_row(inputs, chunk, counts)
        else:
            fed = counts
            if self.manifest.options.takes_row(seqlen):
                ended = [len(known) + n >= w for known, n, w in zip(self.tokens, counts, whole)]
                counts = [n if end else 0 for n, end in zip(counts, ended)]
            outputs = self._step(inputs, chunk, counts, fed)
            rows = [
                {name: array[number, :count] for name, array in outputs.items()}
                for number, count in enumerate(counts)
            ]
        for known, part in zip(self.tokens, parts):
            known += part
        return rows

    def _take_tables(self, parts: Sequence[Sequence[int]], most: Sequence[int]) -> None:
        """The rotary table of each sequence that begins."""
        if (ropes := self._ropes) is None:
            return
        for number, (known, part) in enumerate(zip(self.tokens, parts)):
            if part and not known:
                self._long[number] = ropes.is_long(most[number])
            length = len(known) + len(part)
            if part and ropes.is_long(length) and not self._long[number]:
                raise TyirError(
                    f"sequence {number} comes to {length} tokens, and began with the rotary frequencies of up"
                    f" to {ropes.original}",
                    help="begin it anew, and say then how long it may become (`most`)",
                )

    def _each_row(
        self, inputs: dict[str, Array], chunk: Chunk, counts: Sequence[int]
    ) -> list[dict[str, Array]]:
        """The outputs of all rows of a step that returns one: the same rows are written to the caches each
        time.
        """
        found: list[dict[str, list[Array]]] = [{} for _ in counts]
        for upto in range(1, max(1, *counts) + 1):
            outputs = self._step(inputs, chunk, [min(upto, count) for count in counts])
            for number, (own, count) in enumerate(zip(found, counts)):
                for name, array in outputs.items():
                    own.setdefault(name, []).append(array[number, : int(upto <= count)])
        return [{name: np.concatenate(arrays) for name, arrays in own.items()} for own in found]

    def rewind(self, sequence: int, count: int) -> None:
        """Keep the first `count` tokens of a sequence and forget the rest; what follows is computed anew."""
        if not 0 <= count <= len(self.tokens[sequence]):
            raise TyirError(
                f"cannot rewind sequence {sequence} to {count} tokens: its cache holds"
                f" {len(self.tokens[sequence])}"
            )
        del self.tokens[sequence][count:]

    def copy(self, source: int, target: int, count: int) -> None:
        """Make `target` hold the first `count` tokens of `source`, without computing them again."""
        if not 0 <= count <= len(self.tokens[source]):
            raise TyirError(
                f"cannot copy {count} tokens of sequence {source}: its cache holds {len(self.tokens[source])}"
            )
        self.engine.copy_sequence(source, target)
        self.tokens[target] = self.tokens[source][:count]
        self._long[target] = self._long[source]

    def _checked(self, given: Sequence[Sequence[int]]) -> list[list[int]]:
        """The tokens of each sequence; `TyirError` for what cannot be run."""
        vocabulary = self.manifest.model.get("vocab_size")
        ids = [checked_ids(part, vocabulary, f"sequence {number}: ") for number, part in enumerate(given)]
        if len(ids) != len(self.tokens):
            raise TyirError(
                f"{len(ids)} sequences were given, the artifacts run {len(self.tokens)}",
                help="give an empty list for a sequence that waits",
            )
        if not any(ids):
            raise TyirError("nothing to run: all lists of tokens are empty", help="give at least one token")
        capacity = self.manifest.options.max_kv
        for number, (part, known) in enumerate(zip(ids, self.tokens)):
            if len(known) + len(part) > capacity:
                raise TyirError(
                    f"sequence {number}: {len(part)} tokens do not fit, {len(known)} of the cache's"
                    f" {capacity} positions are taken",
                    help=f"shorten it, or compile with --max-kv {len(known) + len(part)} or more",
                )
        return ids

    def _inputs(
        self, parts: Sequence[Sequence[int]], seqlen: int, lengths: Sequence[int]
    ) -> dict[str, Array]:
        padded = np.array([pad(part, seqlen) for part in parts], np.int32)
        pos = np.array([len(known) for known in self.tokens], np.int32)
        inputs: dict[str, Array] = {"pos": pos}
        if (chunks := self._chunks) is not None:
            for number, (part, known) in enumerate(zip(parts, self.tokens)):
                if len(part) > chunks.room(len(known)):
                    raise TyirError(
                        f"sequence {number}: {len(part)} tokens from position {len(known)} cross a border of"
                        f" chunks of {chunks.step}",
                        help="end the step there",
                    )
            inputs["temperature"] = np.array([chunks.temperature(n) for n in lengths], np.float32)
        if (ropes := self._ropes) is not None:
            capacity = self.manifest.options.max_kv
            inputs["rope_rows"] = np.stack([
                ropes.rows(len(known), seqlen, long, capacity)
                for known, long in zip(self.tokens, self._long)
            ])  # fmt: skip
        if self.manifest.options.embedding_as_input:
            return {"embeddings": self._embedding_table[padded], **inputs}
        return {"ids": padded, **inputs}

    @cached_property
    def _embedding_table(self) -> Array:
        return embedding_table(self.artifacts)

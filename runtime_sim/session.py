"""Running compiled artifacts: all dies in lockstep, prompts in chunks over the compiled lengths, the cache kept between calls.

    session = Session(Path("out/4die"))
    logits = session.feed([12, 7, 99])          # [3, V] float32, one row per token
    for token in session.generate(prompt, 32): ...

The engine decides what executes an op: `host` the compiled library, `interpreter` the ops' reference meaning (on the same files), `edge10` the command
program on modelled memories.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import numpy as np
import numpy.typing as npt

from tyir.diagnostics import TyirError, did_you_mean
from tyir.dialects.builtin import Module
from tyir.dialects.func import Call
from tyir.dialects.ty import Global
from tyir.interpreter import Evaluator, Interpreter, Probe, evaluate_op, run_lockstep
from tyir.ir import Op
from tyir.manifest import DieProgram, Manifest, TensorInfo
from tyir.parser import parse_file
from tyir.runtime_sim.chunks import Chunk, plan_chunks
from tyir.runtime_sim.sampling import Sampler, greedy
from tyir.types import storage_dtype
from tyir.weights import CheckpointReader

__all__ = ["ENGINES", "Engine", "EngineName", "Session", "StepProbe"]

Array = npt.NDArray[Any]
EngineName = Literal["host", "interpreter", "edge10"]
ENGINES: Final[tuple[EngineName, ...]] = ("host", "interpreter", "edge10")


class StepProbe(Protocol):
    """Sees every op of every die: the chunk, the die, and what `tyir.interpreter.Probe` sees."""

    def __call__(self, chunk: Chunk, die: int, stack: tuple[Call, ...], op: Op, results: tuple[Array, ...]) -> None: ...


class Engine(Protocol):
    """Executes one step of all dies and keeps their caches."""

    def step(self, inputs: dict[str, Array], chunk: Chunk) -> Array:
        """The step's first output (logits [1, seqlen, V]) for `inputs` by name (`pos` and `ids` or `embeddings`, padded to `chunk.seqlen`)."""

    def reset(self) -> None:
        """Forget the caches."""


class ProgramEngine:
    """Walks the dies' IR; ops are executed by compiled kernels or by their reference meaning."""

    def __init__(self, folder: Path, manifest: Manifest, *, compiled: bool, probe: StepProbe | None = None) -> None:
        self.folder = folder
        self.manifest = manifest
        self.compiled = compiled
        self.probe = probe
        self._params: dict[tuple[int, str], Array] = {}
        self._programs: dict[tuple[int, int], tuple[DieProgram, Module, dict[str, Array], Evaluator]] = {}
        self._caches: dict[tuple[int, str], Array] = {}

    def reset(self) -> None:
        self._caches.clear()

    def step(self, inputs: dict[str, Array], chunk: Chunk) -> Array:
        runs = []
        for die in range(self.manifest.options.dies):
            program, module, constants, evaluator = self._program(die, chunk.seqlen)
            args = [inputs[t.name] if t.name in inputs else self._cache(die, t) for t in program.inputs]
            interpreter = Interpreter(module, constants=constants, evaluator=evaluator, probe=self._probe_of(die, chunk))
            runs.append(interpreter.run(program.function, args))
        outputs = run_lockstep(runs)
        for die, results in enumerate(outputs):
            program = self.manifest.program(die, chunk.seqlen)
            for info, array in zip(program.outputs, results):
                if info.alias is not None:
                    self._caches[die, program.inputs[info.alias].name] = array
        return outputs[0][0]

    def _probe_of(self, die: int, chunk: Chunk) -> Probe | None:
        probe = self.probe
        if probe is None:
            return None
        return lambda stack, op, results: probe(chunk, die, stack, op, results)

    def _cache(self, die: int, info: TensorInfo) -> Array:
        from tyir.types import FloatType

        key = (die, info.name)
        if key not in self._caches:
            self._caches[key] = np.zeros(info.shape, storage_dtype(FloatType(info.dtype)))
        return self._caches[key]

    def _program(self, die: int, seqlen: int) -> tuple[DieProgram, Module, dict[str, Array], Evaluator]:
        key = (die, seqlen)
        if key not in self._programs:
            program = self.manifest.program(die, seqlen)
            module = parse_file(self.folder / program.ir)
            constants = {str(g.sym_name): self._param(die, g) for g in module.body if isinstance(g, Global)}
            self._programs[key] = (program, module, constants, self._evaluator(program))
        return self._programs[key]

    def _evaluator(self, program: DieProgram) -> Evaluator:
        if not self.compiled:
            return evaluate_op
        from tyir.runtime_sim.host_runtime import HostLibrary

        return HostLibrary(self.folder / program.library).evaluate

    @cached_property
    def _reader(self) -> CheckpointReader:
        return CheckpointReader(self.folder)

    def _param(self, die: int, ref: Global) -> Array:
        """A parameter, once per die: mapped and packed for compiled kernels, one element per entry for the reference."""
        key = (die, str(ref.sym_name))
        if key not in self._params:
            self._params[key] = self._reader.read_packed(ref) if self.compiled else self._reader.read(ref)
        return self._params[key]


class Session:
    """One conversation: artifacts, an engine, and the tokens that its cache holds."""

    def __init__(self, folder: Path, engine: EngineName = "host", *, check: bool = True, probe: StepProbe | None = None) -> None:
        self.folder = Path(folder)
        self.manifest = Manifest.load(self.folder, check=check)
        self.engine = self._make_engine(engine, probe)
        self.tokens: list[int] = []

    def _make_engine(self, name: str, probe: StepProbe | None) -> Engine:
        if name == "edge10":
            from tyir.runtime_sim.edge10_engine import Edge10Engine

            return Edge10Engine(self.folder, self.manifest)
        if name not in ENGINES:
            raise TyirError(f"there is no engine '{name}'", help=did_you_mean(name, ENGINES) or f"one of {', '.join(ENGINES)}")
        return ProgramEngine(self.folder, self.manifest, compiled=name == "host", probe=probe)

    @property
    def capacity(self) -> int:
        return self.manifest.options.max_kv

    def reset(self) -> None:
        """Start over with an empty cache."""
        self.tokens.clear()
        self.engine.reset()

    def feed(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Append tokens to the cache; logits [len(ids), V] f32, row i predicting what follows ids[i]."""
        if not ids:
            raise TyirError("nothing to run: the list of tokens is empty", help="give a prompt of at least one token")
        vocabulary = self.manifest.model.get("vocab_size")
        if vocabulary is not None and not all(0 <= i < vocabulary for i in ids):
            bad = next(i for i in ids if not 0 <= i < vocabulary)
            raise TyirError(f"token {bad} is not in the vocabulary of {vocabulary}")
        rows = []
        first = len(self.tokens)
        for chunk in plan_chunks(len(ids), first, self.manifest.options.seqlens, self.capacity):
            part = list(ids[chunk.start - first : chunk.start - first + chunk.count])
            logits = self.engine.step(self._inputs(part, chunk), chunk)
            rows.append(np.asarray(logits[0, : chunk.count], np.float32))
            self.tokens += part
        return np.concatenate(rows)

    def _inputs(self, ids: list[int], chunk: Chunk) -> dict[str, Array]:
        padded = np.array([ids + [0] * (chunk.seqlen - len(ids))], np.int32)
        pos = np.array([chunk.start], np.int32)
        if self.manifest.options.embedding_as_input:
            return {"embeddings": self._embedding_table[padded], "pos": pos}
        return {"ids": padded, "pos": pos}

    @cached_property
    def _embedding_table(self) -> Array:
        from tyir.weights import read_safetensors

        return read_safetensors(self.folder / "embedding.params")["embedding"]

    def generate(
        self, prompt: Sequence[int], limit: int, *, sampler: Sampler = greedy, stop: Callable[[int], bool] = lambda token: False
    ) -> Iterator[int]:
        """Yield up to `limit` new tokens after `prompt`; ends early at a token for which `stop` holds, or when the cache is full."""
        logits = self.feed(prompt)[-1]
        for produced in range(1, limit + 1):
            token = sampler(logits)
            yield token
            if stop(token) or produced == limit or len(self.tokens) == self.capacity:
                return
            logits = self.feed([token])[-1]

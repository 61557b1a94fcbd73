"""A module of stage `ty` as its dies' programs, run by the reference meaning of its ops and as commands;
nothing is compiled for this processor.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.llm import dies_of
from tyir.artifacts.dual_chunk import DualChunk
from tyir.artifacts.json_attributes import to_json
from tyir.backends.edge10.lowering.die import lower_die
from tyir.dialects.builtin import Module
from tyir.dialects.func import Func
from tyir.dialects.ty import Param
from tyir.execution.entry_points import arguments
from tyir.execution.storage import pack
from tyir.execution.weights import CheckpointReader, WeightSource
from tyir.interpreter import Interpreter, evaluate_param, run_lockstep
from tyir.pipeline import run_pipeline
from tyir.runtime_sim.execution.functional import FunctionalDie, run_step
from tyir.runtime_sim.session.chunks import plan_chunks
from tyir.runtime_sim.timing.program import EdgeProgram
from tyir.targets.machine import Machine, load_machine
from tyir.types import storage_dtype

Array = npt.NDArray[Any]
EDGE10 = load_machine("edge10")


class Programs:
    """All dies, for steps of `seqlen` tokens; `feed` runs tokens through one of the engines."""

    def __init__(
        self,
        module: Module,
        stored: Path | WeightSource,
        *,
        max_kv: int,
        seqlen: int,
        dies: int = 1,
        pp: int = 1,
        cache: str = "",
        cut: str = "",
        sparse: str = "",
        machine: Machine = EDGE10,
        commands: bool = True,
    ) -> None:
        weights = CheckpointReader(stored) if isinstance(stored, Path) else stored
        self.chunks = DualChunk.used(to_json(module.attributes["tyir.model"]), max_kv)
        self.seqlen, self.max_kv = seqlen, max_kv
        run_pipeline(
            module,
            f"kv-materialize{{max-kv={max_kv} {cache}}},"
            f"partition-dies{{dies={dies} pp={pp} strategy=split {cut}}},"
            + (
                f"specialize-seqlen{{seqlens=1,{seqlen}}},sparse-prefill{{{sparse}}},to-program"
                if sparse
                else f"specialize-seqlen{{seqlens={seqlen}}},to-program"
            ),
        )
        self.modules = dies_of(module)
        self.interpreters = [Interpreter(die, weights) for die in self.modules]
        self.mains = [f for die in self.modules if isinstance(f := die.lookup(f"main_s{seqlen}"), Func)]
        self.functional: list[FunctionalDie] = []
        self.lowered: list[Module] = []
        for die in self.modules:
            params = {
                p.sym_name: pack(evaluate_param(p, weights), p.type) for p in die.body if isinstance(p, Param)
            }
            if not commands:
                continue
            self.lowered.append(lower_die(die, seqlen, machine))
            program = EdgeProgram(self.lowered[-1])
            self.functional.append(FunctionalDie(program, params, machine))
        self.reset()

    def reset(self) -> None:
        """Empty caches (of the interpreter; what commands find beyond `position` they overwrite)."""
        self.position = 0
        self.caches = [
            [np.zeros(a.type.static_shape, storage_dtype(a.type.element)) for a in arguments(main, "cache")]
            for main in self.mains
        ]

    def feed(self, ids: Sequence[int], engine: str) -> Array:
        """Logits [len(ids), V], in steps as a session plans them."""
        rows, first = [], self.position
        length = first + len(ids)
        for chunk in plan_chunks(len(ids), first, (self.seqlen,), self.max_kv, self.chunks):
            own = list(ids[chunk.start - first : chunk.start - first + chunk.count])
            inputs = {"ids": np.array([own + own[-1:] * (self.seqlen - len(own))], np.int32)}
            if self.chunks is not None:
                inputs["temperature"] = np.array([self.chunks.temperature(length)], np.float32)
            step = self._interpret if engine == "interpreter" else self._command
            rows.append(step(inputs, chunk.start)[0, : chunk.count])
            self.position += chunk.count
        return np.concatenate(rows)

    def _interpret(self, inputs: dict[str, Array], pos: int) -> Array:
        given = [inputs["ids"], np.array([pos], np.int32)]
        given += [inputs["temperature"]] if "temperature" in inputs else []
        runs = [
            interpreter.run(f"main_s{self.seqlen}", [*given, *caches])
            for interpreter, caches in zip(self.interpreters, self.caches)
        ]
        return np.asarray(run_lockstep(runs)[0][0])

    def _command(self, inputs: dict[str, Array], pos: int) -> Array:
        return np.asarray(run_step(self.functional, inputs, pos)["logits"])

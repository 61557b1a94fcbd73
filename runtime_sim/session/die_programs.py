"""The IR of dies with their weights, ready to be run op by op: compiled, or by its reference meaning."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from tyir.artifacts.agreement import check_ir
from tyir.dialects.ty import Global
from tyir.execution.artifacts import Artifacts, ArtifactWeights
from tyir.execution.processor import check_processor
from tyir.interpreter import Evaluator, Interpreter, evaluate_op
from tyir.manifest import DieProgram
from tyir.parser import parse_bytes

if TYPE_CHECKING:
    from tyir.runtime_sim.session.host_runtime import HostLibrary

__all__ = ["DiePrograms"]

Array = npt.NDArray[Any]


class DiePrograms:
    """Programs of an artifact folder; those of one die share its weights, whatever they compute."""

    def __init__(self, artifacts: Artifacts, *, compiled: bool) -> None:
        """`TyirError` when the libraries were compiled for another processor than this."""
        self.artifacts = artifacts
        self.compiled = compiled
        self._params: dict[tuple[int, str, str], Array] = {}
        self._loaded: dict[tuple[int, str], Interpreter] = {}
        self._libraries: dict[tuple[int, str], HostLibrary] = {}
        if compiled:
            host = artifacts.manifest.build["host"]
            check_processor(host["mcpu"], host["features"], artifacts.path)

    def interpreter(self, program: DieProgram) -> Interpreter:
        """What runs a program; `TyirError` unless its IR has the interface that the manifest says."""
        key = (program.die, program.ir)
        if key not in self._loaded:
            path = self.artifacts.path / program.ir
            module = parse_bytes(self.artifacts.read(program.ir), str(path))
            check_ir(module, program, path, self.artifacts.manifest.model.get("vocab_size"))
            weights = {
                str(g.sym_name): self._param(program.die, g) for g in module.body if isinstance(g, Global)
            }
            self._loaded[key] = Interpreter(module, constants=weights, evaluator=self._evaluator(program))
        return self._loaded[key]

    def _evaluator(self, program: DieProgram) -> Evaluator:
        if not self.compiled:
            return evaluate_op
        return self.library(program).evaluate

    def library(self, program: DieProgram) -> HostLibrary:
        """The compiled library of a program."""
        from tyir.runtime_sim.session.host_runtime import HostLibrary

        key = (program.die, program.library)
        if key not in self._libraries:
            content = self.artifacts.executable(program.library)
            self._libraries[key] = HostLibrary(self.artifacts.path / program.library, content)
        return self._libraries[key]

    @cached_property
    def _reader(self) -> ArtifactWeights:
        return ArtifactWeights(self.artifacts)

    def _param(self, die: int, ref: Global) -> Array:
        """A parameter, once per die and file.

        Mapped and packed for compiled kernels, one element per entry for the reference.
        """
        key = (die, ref.file, str(ref.sym_name))
        if key not in self._params:
            self._params[key] = self._reader.read_packed(ref) if self.compiled else self._reader.read(ref)
        return self._params[key]

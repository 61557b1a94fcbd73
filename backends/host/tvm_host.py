"""Host code: one TVM kernel per distinct op of a die's program, all of them in one shared library.

`assign_kernels` names the kernel of every op (`tyir.kernel`); ops that compute the same thing share one, so
the layers of a model cost the compile time of a layer.  `build_library` emits each kernel
(`tyir.backends.host.kernels`), compiles them together and links them.

The library's bytes depend only on the kernels and the target: functions are ordered by name, the linker
writes no build id, debug sections (which hold the compiler's directory) are stripped.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import tvm
from tvm.ir import IRModule
from tvm.script.ir_builder import IRBuilder
from tvm.support.cc import get_cc
from tvm.target import codegen
from tvm.tirx.script.builder import ir as T

from tyir.attributes import StringAttr
from tyir.backends.host.kernels import EMITTERS
from tyir.backends.host.kernels.tir import Cpu
from tyir.diagnostics import Diagnostic, TyirError
from tyir.dialects import func, kv
from tyir.dialects.ty import tensor_type
from tyir.execution.processor import features_of
from tyir.execution.storage import packed_shape
from tyir.ir import Op, Value
from tyir.types import FloatType, IntegerType, bit_width, storage_dtype

__all__ = [
    "GENERIC_CPU",
    "KERNEL_ATTRIBUTE",
    "HostTarget",
    "assign_kernels",
    "build_library",
    "detected_cpu",
    "kernel_name",
    "linker",
]

KERNEL_ATTRIBUTE: Final = "tyir.kernel"
GENERIC_CPU: Final = (
    "x86-64-v3"  # AVX2, FMA and F16C: every x86 server since 2015 (x86-64 psABI, micro-architecture levels)
)

_LINK_OPTIONS: Final = ("-Wl,--build-id=none", "-Wl,--strip-debug", "-Wl,--hash-style=gnu")
_MOST_ELEMENTS: Final = 1 << 31  # kernels index with 32-bit integers


def detected_cpu() -> str:
    """LLVM's name of the processor this runs on, `znver4` for example."""
    return str(codegen.llvm_get_system_cpu())


@dataclass(frozen=True)
class HostTarget:
    """The processor that the library is for.

    `num_cores` = 1 gives code without threads; the number of threads used is the runtime's choice.
    """

    kind: str = "llvm"
    mcpu: str = field(default_factory=detected_cpu)
    num_cores: int = field(default_factory=lambda: os.cpu_count() or 1)

    def __post_init__(self) -> None:
        triple = codegen.llvm_get_system_triple()
        if self.kind != "llvm":
            raise TyirError(f"host target kind '{self.kind}' is not supported", help="use 'llvm'")
        if not codegen.llvm_is_valid_cpu(self.mcpu, triple):
            raise TyirError(
                f"LLVM knows no processor '{self.mcpu}' for {triple}",
                help=f"use '{detected_cpu()}' (this machine) or '{GENERIC_CPU}'",
            )
        if self.num_cores < 1:
            raise TyirError(f"num_cores must be at least 1, got {self.num_cores}")

    @classmethod
    def generic(cls, num_cores: int = 2) -> HostTarget:
        """Code for any x86 processor with AVX2."""
        return cls(mcpu=GENERIC_CPU, num_cores=num_cores)

    def tvm_target(self) -> Any:
        """TVM's target object."""
        return tvm.target.Target({"kind": self.kind, "mcpu": self.mcpu, "num-cores": self.num_cores})

    def features(self) -> list[str]:
        """What the code needs of the processor that it runs on (`tyir.execution.processor`)."""
        return features_of(str(name) for name in codegen.llvm_get_cpu_features(self.tvm_target()))

    def cpu(self) -> Cpu:
        """What the kernels need to know of the processor."""
        target = self.tvm_target()
        if codegen.target_has_features("avx512f", target):
            return Cpu(lanes=16, registers=32, lookup=True, cores=self.num_cores)
        if codegen.target_has_features("avx2", target):
            return Cpu(lanes=8, registers=16, lookup=False, cores=self.num_cores)
        return Cpu(lanes=4, registers=16, lookup=False, cores=self.num_cores)


# ---------------------------------------------------------------------------------------------------- names


def kernel_name(op: Op) -> str:
    """A name that equal ops share: `linear_1x8x256_128x256_f16`, ending in a hash of the properties when
    there are any.
    """
    types = [tensor_type(v) for v in (*op.operands, *op.results)]
    shapes = ["x".join(map(str, t.static_shape)) or "scalar" for t in types[: len(op.operands)]]
    elements = list(dict.fromkeys(str(t.element) for t in types))
    name = "_".join((op.name.partition(".")[2], *shapes, *elements))
    if len(elements) > 1 or op.properties.keys():
        text = f"{op.name} {[str(t) for t in types]} {op.properties}"
        name += "_" + hashlib.sha256(text.encode()).hexdigest()[:8]
    return name


def assign_kernels(functions: Iterable[func.Func]) -> dict[str, Op]:
    """Sets `tyir.kernel` on every op that runs as a kernel; returns one op for each name.

    Raises TyirError when a shape is not static.
    """
    kernels: dict[str, Op] = {}
    problems: list[Diagnostic] = []
    for function in functions:
        for op in function.walk():
            if type(op) not in EMITTERS:
                continue
            dynamic = [v for v in (*op.operands, *op.results) if not tensor_type(v).is_static]
            if dynamic:
                problems.append(
                    Diagnostic(
                        f"'{op.name}' in @{function.sym_name} has the dynamic type {dynamic[0].type}",
                        help="run specialize-seqlen first",
                    )
                )
                continue
            name = kernel_name(op)
            op.set_attribute(KERNEL_ATTRIBUTE, StringAttr(name))
            kernels.setdefault(name, op)
    if problems:
        raise TyirError(problems)
    return kernels


# --------------------------------------------------------------------------------------------------- building


def _parameters(op: Op) -> list[tuple[str, Value]]:
    """The kernel's parameters: operands, then results (none for an op that writes its first operand)."""
    results = () if isinstance(op, kv.Append) else op.results
    return [(f"in{i}", v) for i, v in enumerate(op.operands)] + [
        (f"out{i}", v) for i, v in enumerate(results)
    ]


def _check_types(op: Op) -> Iterable[Diagnostic]:
    for _, value in _parameters(op):
        t = tensor_type(value)
        known = isinstance(t.element, IntegerType) or (
            isinstance(t.element, FloatType) and t.element.name in ("f16", "f32", "bf16")
        )
        if (
            not known
            or (bit_width(t.element) == 4 and op.name != "ty.quantized_linear")
            or (str(t.element) == "bf16" and op.name != "ty.cast")
        ):
            yield Diagnostic(
                f"no host kernel of '{op.name}' takes {t}",
                help="activations are f16 or f32; convert with ty.cast before",
            )
        elif t.size >= _MOST_ELEMENTS:
            yield Diagnostic(
                f"{t} of '{op.name}' has {t.size} elements, a kernel can index {_MOST_ELEMENTS - 1}",
                help="use more dies",
            )


def _prim_func(name: str, op: Op, cpu: Cpu) -> Any:
    """The kernel as a TensorIR function."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(name)
        T.func_attr({"global_symbol": name, "tirx.noalias": True})
        buffers = []
        for parameter, value in _parameters(op):
            t = tensor_type(value)
            dtype = storage_dtype(t.element)
            buffers.append(T.arg(parameter, T.buffer(packed_shape(t), dtype.name, align=dtype.itemsize)))
        EMITTERS[type(op)](op, buffers, cpu)
    return builder.get()


def linker() -> str | None:
    """The C++ compiler that links libraries, None where there is none."""
    found = get_cc()
    return None if found is None else str(found)


def build_library(kernels: Mapping[str, Op], target: HostTarget, path: Path) -> None:
    """Compiles the kernels into the shared library `path`, replacing it only when all of it is there.

    Raises TyirError when an op has a type that no kernel takes or no linker is installed.
    """
    problems = [d for name in sorted(kernels) for d in _check_types(kernels[name])]
    if problems:
        raise TyirError(problems)
    if get_cc() is None:
        raise TyirError(
            "there is no C++ compiler to link the host library with",
            help="install g++ or clang++, or name one in CXX",
        )
    cpu = target.cpu()
    functions = {name: _prim_func(name, kernels[name], cpu) for name in sorted(kernels)}
    executable = tvm.compile(IRModule(functions), target=target.tvm_target())
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".host-") as workspace:
        partial = Path(workspace) / "library.so"
        executable.export_library(
            str(partial), workspace_dir=workspace, options=["-shared", "-fPIC", *_LINK_OPTIONS]
        )
        if not partial.is_file():
            raise TyirError(
                f"the compiler {get_cc()} ended without an error and without writing a library",
                help="install g++ or clang++, or name one in CXX",
            )
        partial.replace(path)

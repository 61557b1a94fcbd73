"""Host code: one TVM kernel per distinct op of a die's program and the step that calls them, in one shared
library.

`assign_kernels` names the kernel of every op (`tyir.kernel`); ops that compute the same thing share one, so
the layers of a model cost the compile time of a layer.  `build_library` emits each kernel
(`tyir.backends.host.kernels`) as a function of pointers, with an exported one beside it that checks its
tensors, compiles it to an object file of its own (`tyir.backends.host.objects`), and links them with the
code of a step and the tables of this one (`tyir.backends.host.step`).

The library's bytes depend only on the kernels and the target: functions are ordered by name, the linker
writes no build id, debug sections (which hold the compiler's directory) are stripped.
"""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from tyir.process.extras import torch_hidden

with torch_hidden():
    import tvm
from tvm import tirx
from tvm.ir import Call, GlobalVar, IRModule, PrimType
from tvm.script.ir_builder import IRBuilder
from tvm.support.cc import get_cc
from tvm.target import codegen
from tvm.tirx.script.builder import ir as T
from tvm_ffi.libinfo import find_dlpack_include_path, find_include_path

from tyir.attributes import StringAttr
from tyir.backends.host import meeting
from tyir.backends.host.kernels import EMITTERS
from tyir.backends.host.kernels.tir import Cpu
from tyir.backends.host.objects import made_once
from tyir.backends.host.step import Program, kernel_symbol, step_code, tables_of
from tyir.backends.pieces import compiler_identity, tool_identity
from tyir.diagnostics import Diagnostic, TyirError
from tyir.dialects import func
from tyir.dialects.ty import tensor_type
from tyir.execution.processor import TILES, features_of, may_use_tiles
from tyir.execution.storage import packed_shape
from tyir.ir import Op, Value
from tyir.process.cache import Cache, cache_key
from tyir.traits import InPlace
from tyir.types import FloatType, IntegerType, TensorType, bit_width, storage_dtype

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

_ACTIVATIONS: Final = ("fp32", "int16", "int8")
_WITHOUT_TILES: Final = "icelake-server"  # all that kernels make use of in later ones, but for tiles
_CPU: Final = 1  # kDLCPU of DLPack
_SYMBOL: Final = "symbol"  # of a TensorIR function: what it is called in its object file
_CODE_OPTIONS: Final = ("-x", "c", "-std=c11", "-O2", "-fPIC", "-c")
_LINK_OPTIONS: Final = ("-Wl,--build-id=none", "-Wl,--strip-debug", "-Wl,--hash-style=gnu")
_MOST_ELEMENTS: Final = 1 << 31  # kernels index with 32-bit integers


def detected_cpu() -> str:
    """LLVM's name of the processor this runs on, `znver4` for example; of one with tiles (AMX) that this
    process may not use, the name of one without them.
    """
    name = str(codegen.llvm_get_system_cpu())
    tiles = codegen.target_has_features("amx-tile", tvm.target.Target({"kind": "llvm", "mcpu": name}))
    return _WITHOUT_TILES if tiles and not may_use_tiles() else name


@dataclass(frozen=True)
class HostTarget:
    """The processor that the library is for.

    `num_cores` = 1 gives code without threads; the number of threads used is the runtime's choice.
    `activations`: what 4-bit weights are multiplied with, "fp32", "int16" or "int8"
    (`kernels/integer_linear.py`).
    """

    kind: str = "llvm"
    mcpu: str = field(default_factory=detected_cpu)
    num_cores: int = field(default_factory=lambda: os.cpu_count() or 1)
    activations: str = "fp32"

    def __post_init__(self) -> None:
        triple = codegen.llvm_get_system_triple()
        if self.kind != "llvm":
            raise TyirError(f"host target kind '{self.kind}' is not supported", help="use 'llvm'")
        if not codegen.llvm_is_valid_cpu(self.mcpu, triple):
            raise TyirError(
                f"LLVM knows no processor '{self.mcpu}' for {triple}",
                help=f"use '{detected_cpu()}' (this machine) or '{GENERIC_CPU}'",
            )
        if not self._of_64_bits():
            raise TyirError(
                f"a {self.mcpu} processor has 32 bits, {triple} needs 64",
                help=f"use '{detected_cpu()}' (this machine) or '{GENERIC_CPU}'",
            )
        if self.activations not in _ACTIVATIONS:
            raise TyirError(
                f"activations '{self.activations}' are not supported", help="use 'fp32', 'int16' or 'int8'"
            )
        if self.activations != "fp32" and not self.cpu().byte_products:
            raise TyirError(
                f"a {self.mcpu} processor does not multiply 8-bit numbers: it has neither AVX2 nor VNNI",
                help="use fp32 activations",
            )
        if self.num_cores < 1:
            raise TyirError(f"num_cores must be at least 1, got {self.num_cores}")

    @classmethod
    def preferred(cls, mcpu: str | None = None) -> HostTarget:
        """The processor with the activations that it is fast with and that cost no exactness: int16 where it
        multiplies bytes, else fp32.
        """
        target = cls() if mcpu is None else cls(mcpu=mcpu)
        return replace(target, activations="int16") if target.cpu().byte_products else target

    @classmethod
    def generic(cls, num_cores: int = 2) -> HostTarget:
        """Code for any x86 processor with AVX2."""
        return cls(mcpu=GENERIC_CPU, num_cores=num_cores)

    def tvm_target(self) -> Any:
        """TVM's target object.

        It names no options of LLVM (`cl-opt`): those belong to the process, TVM sets them back when one
        compile ends, and a second one that is under way in another thread goes on without them.
        """
        return tvm.target.Target({"kind": self.kind, "mcpu": self.mcpu, "num-cores": self.num_cores})

    def _of_64_bits(self) -> bool:
        """Whether the processor has the triple's instructions: LLVM ends the process where it has not."""
        x86 = codegen.llvm_get_system_triple().startswith("x86_64")
        return not x86 or bool(codegen.target_has_features("64bit", self.tvm_target()))

    def features(self) -> list[str]:
        """What the code needs of the processor that it runs on (`tyir.execution.processor`)."""
        names = [str(name) for name in codegen.llvm_get_cpu_features(self.tvm_target())]
        return sorted([*features_of(names), *(TILES if self.cpu().tiles else ())])

    def cpu(self) -> Cpu:
        """What the kernels need to know of the processor."""
        target = self.tvm_target()

        def has(*names: str) -> bool:
            return all(codegen.target_has_features(name, target) for name in names)

        lanes, registers = (16, 32) if has("avx512f") else (8, 16) if has("avx2") else (4, 16)
        vnni = has("avx512vnni", "avx512vl") if lanes == 16 else has("avxvnni")
        products = "vnni" if vnni else "madd" if has("avx2") else ""
        tiles = lanes == 16 and has("amx-int8", "amx-tile") and self.activations != "fp32"
        return Cpu(
            lanes,
            registers,
            lookup=lanes == 16,
            cores=self.num_cores,
            byte_products=products,
            activations=self.activations,
            tiles=tiles,
        )


# ---------------------------------------------------------------------------------------------------- names


def _meaning(op: Op) -> str:
    """All that a kernel is made from."""
    return f"{op.name} {[str(tensor_type(v)) for v in (*op.operands, *op.results)]} {op.properties}"


def kernel_name(op: Op) -> str:
    """A name that equal ops share: `linear_1x8x256_128x256_f16`, ending in a hash of the properties when
    there are any.
    """
    types = [tensor_type(v) for v in (*op.operands, *op.results)]
    shapes = ["x".join(map(str, t.static_shape)) or "scalar" for t in types[: len(op.operands)]]
    elements = list(dict.fromkeys(str(t.element) for t in types))
    name = "_".join((op.name.partition(".")[2], *shapes, *elements))
    if len(elements) > 1 or op.properties.keys():
        name += "_" + hashlib.sha256(_meaning(op).encode()).hexdigest()[:8]
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
    results = () if op.has_trait(InPlace) else op.results
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
                help="use more dies; a cache is smaller with a lower --batch or --max-kv as well",
            )


def _kernel(name: str, op: Op, cpu: Cpu) -> Any:
    """The kernel as a TensorIR function of pointers, which other objects of the library call as `name`."""
    with IRBuilder() as builder, T.prim_func(is_private=True, s_tir=True):
        T.func_attr({"tirx.noalias": True, _SYMBOL: name})
        T.func_ret(PrimType("int32"))  # what a loop over cores that cannot start returns
        stored = [(name, packed_shape(t), storage_dtype(t.element)) for name, t in _stored(op)]
        pointers = [T.arg(name, T.handle(dtype.name)) for name, _, dtype in stored]
        buffers = [
            T.decl_buffer(shape, dtype.name, data=pointer, align=dtype.itemsize)
            for pointer, (_, shape, dtype) in zip(pointers, stored)
        ]
        EMITTERS[type(op)](op, buffers, cpu)
    return builder.get()


def _exported(name: str, op: Op, kernel: GlobalVar) -> Any:
    """A function of tensors that calls the kernel."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(name)
        T.func_attr({"global_symbol": name})
        buffers = []
        for parameter, t in _stored(op):
            dtype = storage_dtype(t.element)
            buffers.append(T.arg(parameter, T.buffer(packed_shape(t), dtype.name, align=dtype.itemsize)))
        T.evaluate(Call(kernel, [buffer.data for buffer in buffers], ret_ty="int32"))
    return builder.get()


def _stored(op: Op) -> list[tuple[str, TensorType]]:
    return [(name, tensor_type(value)) for name, value in _parameters(op)]


def _pipeline() -> tuple[Any, Any, Any]:
    """TVM's own for TensorIR; at its end inner functions are told whose memory their temporaries are, which
    exported ones know from their tensors, and kernels get the names that other objects call them by: one that
    had its name from the start would be made to take tensors.
    """
    passes, for_host, for_device = tirx.get_tir_pipeline("s_tir")

    def on_cpu(function: Any, module: Any, context: Any) -> Any:
        if "global_symbol" in function.attrs:
            return function
        body = tirx.AttrStmt("default", "device_type", tirx.const(_CPU, "int32"), function.body)
        return function.with_body(tirx.AttrStmt("default", "device_id", tirx.const(0, "int32"), body))

    def named(function: Any, module: Any, context: Any) -> Any:
        symbol = function.attrs.get(_SYMBOL)
        return function if symbol is None else function.with_attr("global_symbol", symbol)

    def for_cpu() -> Any:
        first, last = (tirx.transform.prim_func_pass(f, opt_level=0) for f in (on_cpu, named))
        return tvm.transform.Sequential([first, for_host(), last])

    return passes, for_cpu, for_device


_PIPELINE: Final = "tyir"
tirx.register_tir_pipeline(_PIPELINE, _pipeline)


def linker() -> str | None:
    """The C++ compiler that links libraries, None where there is none."""
    found = get_cc()
    return None if found is None else str(found)


def _kernel_functions(name: str, op: Op, cpu: Cpu) -> IRModule:
    """A kernel, and the exported function beside it."""
    symbol = kernel_symbol(name)
    variable = GlobalVar(symbol)
    functions = {variable: _kernel(symbol, op, cpu), GlobalVar(name): _exported(name, op, variable)}
    return IRModule(functions)


def _object(functions: IRModule, target: HostTarget) -> bytes:
    """The functions as an object file."""
    executable = tvm.compile(functions, target=target.tvm_target(), tir_pipeline=_PIPELINE)
    with tempfile.TemporaryDirectory(prefix="tyir-host-") as folder:
        path = Path(folder) / "functions.o"
        executable.mod.write_to_file(str(path))
        return path.read_bytes()


def _objects(
    kernels: Mapping[str, Op], target: HostTarget, program: Program | None, cache: Cache | None
) -> Iterator[bytes]:
    """The object files of a library: kernels in the order of their names, then the step's code."""
    cpu = target.cpu()
    tools = ("kernel", tool_identity(), repr(target), repr(target.features()), repr(cpu))
    for name in sorted(kernels):
        op = kernels[name]
        make = functools.partial(lambda name, op: _object(_kernel_functions(name, op, cpu), target), name, op)
        yield made_once(cache_key(*tools, name, _meaning(op)), make, cache)
    if program is not None:
        yield _code(step_code(program), cache)
        if sites := _met(program):
            yield _code(meeting.CODE.read_text(), cache)
            for name, layout in meeting.sums_of(sites).items():
                make = functools.partial(
                    lambda name, layout: _object(meeting.sum_functions(name, layout, cpu), target),
                    name,
                    layout,
                )
                yield made_once(cache_key(*tools, name, str(layout)), make, cache)


def _code(text: str, cache: Cache | None) -> bytes:
    """The object file of C code."""
    key = cache_key("code", compiler_identity(linker() or ""), *_CODE_OPTIONS, text)
    return made_once(key, lambda: _compiled(text), cache)


def _met(program: Program) -> list[Op]:
    """Where the library's dies meet those of the same process."""
    return program.collectives() if meeting.knows_system(str(codegen.llvm_get_system_triple())) else []


def _tables(program: Program) -> Iterator[str]:
    """What the code of a step is given of its program, in the assembler's language."""
    yield tables_of(program)
    if sites := _met(program):
        yield meeting.sites_of(sites)


# Only what TVM looks up by name is seen outside of a library.
_SYMBOLS: Final = "{ global: __tvm_*; __TVM*; local: __tvm_ffi_main; *; };\n"


def build_library(
    kernels: Mapping[str, Op],
    target: HostTarget,
    path: Path,
    program: Program | None = None,
    cache: Cache | None = None,
) -> None:
    """Links the kernels, and the step of `program` that calls them, into the shared library `path`, replacing
    it only when all of it is there.  `cache`: where kernels are looked for and kept; None: in this process.

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
    objects = list(_objects(kernels, target, program, cache))
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".host-") as workspace:
        folder = Path(workspace)
        partial = folder / "library.so"
        (folder / "symbols").write_text(_SYMBOLS)
        names = [f"{number}.o" for number in range(len(objects))]
        for name, data in zip(names, objects):
            (folder / name).write_bytes(data)
        if program is not None:
            for number, tables in enumerate(_tables(program)):
                names.append(f"{number}.s")
                (folder / names[-1]).write_text(tables)
        # named from within the folder: a path may have a comma, which -Wl would take for its own
        options = ("-shared", "-fPIC", "-Wl,--version-script=symbols", *_LINK_OPTIONS)
        _run_compiler([*options, "-o", partial.name, *names], partial, "link the host library")
        partial.replace(path)


def _compiled(code: str) -> bytes:
    """The object file of C code."""
    with tempfile.TemporaryDirectory(prefix="tyir-host-") as workspace:
        source, made = Path(workspace) / "code.c", Path(workspace) / "code.o"
        source.write_text(code)
        headers = [f"-I{find_include_path()}", f"-I{find_dlpack_include_path()}"]
        _run_compiler([*_CODE_OPTIONS, *headers, "-o", made.name, source.name], made, "compile the step")
        return made.read_bytes()


def _run_compiler(arguments: Sequence[str], made: Path, what: str) -> None:
    """Has the C++ compiler make a file, in its folder; `TyirError` where it does not."""
    compiler = linker() or ""
    try:
        done = subprocess.run(
            [compiler, *arguments], cwd=made.parent, capture_output=True, text=True, errors="replace"
        )
        code, said = done.returncode, (done.stdout + done.stderr).strip()
    except OSError as error:
        code, said = 1, str(error)
    if code:
        raise TyirError(
            f"the compiler {compiler} could not {what}: {said or 'it does not say why'}",
            help="tyir doctor shows which compiler is used; name another one in CXX",
        )
    if not made.is_file():
        raise TyirError(
            f"the compiler {compiler} ended without an error and could not {what}: it wrote nothing",
            help="install g++ or clang++, or name one in CXX",
        )

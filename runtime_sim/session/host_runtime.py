"""Loads a die's compiled library and runs its kernels as an interpreter's evaluator.

Arrays are passed where they lie: no copy is made of operands, weights may be read-only mappings of a file at
any offset, results are fresh arrays.  Only the small runtime of TVM is loaded (`tvm_ffi` and
`libtvm_runtime`), never the compiler.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import os
import struct
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tyir.attributes import StringAttr
from tyir.diagnostics import TyirError
from tyir.dialects import ty
from tyir.execution.storage import packed_shape
from tyir.interpreter import Evaluator, evaluate_op
from tyir.ir import Op
from tyir.process.extras import torch_hidden
from tyir.process.files import open_regular
from tyir.traits import InPlace
from tyir.types import TensorType, storage_dtype

__all__ = ["CompiledStep", "Exchange", "HostLibrary", "check_threads", "use_threads"]

Array = npt.NDArray[Any]

# Times a thread of TVM's pool yields before it sleeps: milliseconds, enough for what lies between two
# kernels of a step.  Its own 300,000 keep a processor for half a second after the last kernel, and threads of
# closed sessions for minutes where many wait at once.
_YIELDS = "20000"
_SHARE_ALL_CORES = -3  # tvm::runtime::threading::ThreadGroup::AffinityMode::kSpecifyThreadShareAllCore


@cache
def _ffi() -> Any:
    """tvm_ffi with TVM's runtime library loaded into the process."""
    spec = importlib.util.find_spec(
        "tvm"
    )  # finds the package without importing it: `import tvm` loads the compiler, 250 MB
    if spec is None or spec.origin is None:
        raise TyirError("the TVM runtime is not installed", help="pip install apache-tvm")
    with torch_hidden():
        import tvm_ffi

    os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", _YIELDS)
    ctypes.CDLL(str(Path(spec.origin).parent / "lib" / "libtvm_runtime.so"), ctypes.RTLD_GLOBAL)
    return tvm_ffi


def check_threads(count: int) -> None:
    """`TyirError` for a number of threads that this process has no cores for."""
    cores = len(os.sched_getaffinity(0))
    if not 1 <= count <= cores:
        raise TyirError(
            f"{count} threads were asked for, this process may use 1 to {cores} cores",
            help="leave --threads out for all of them",
        )


def use_threads(count: int) -> None:
    """Lets kernels called from this thread run on `count` cores of those this process may use.

    To be called before the first kernel.

    Without it TVM takes half of the logical processors.
    """
    check_threads(count)
    cores = sorted(os.sched_getaffinity(0))
    # All cores are named, so that the calling thread stays free to run on any of them.
    _ffi().get_global_func("runtime.config_threadpool")(
        _SHARE_ALL_CORES, count, [str(core) for core in cores]
    )


class _DLTensor(ctypes.Structure):
    """`DLTensor` of dlpack.h (DLPack 1.0), on the CPU."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


_DLPACK_CODES = {"i": 0, "u": 1, "f": 2, "b": 6}
_DLPACK_CPU = 1
_OPAQUE_POINTER = 4  # kTVMFFIOpaquePtr


def _descriptor(shape: Sequence[int], dtype: np.dtype[Any]) -> _DLTensor:
    """Of an array that lies nowhere yet."""
    extents = (ctypes.c_int64 * len(shape))(*shape)
    code, bits = _DLPACK_CODES[dtype.kind], dtype.itemsize * 8
    return _DLTensor(None, _DLPACK_CPU, 0, len(shape), code, bits, 1, extents, None, 0)


def _address(array: Array) -> int:
    return int(array.__array_interface__["data"][0])


class _Kernel:
    """One compiled function with the descriptors of its parameters, made once.

    A call only fills in where the arrays lie.

    numpy's own DLPack export would do but for two things: it refuses read-only arrays, which mapped weights
    are, and it costs more per call.
    """

    def __init__(self, function: Any, types: Sequence[TensorType], results: int) -> None:
        self._function = function
        self._layouts = [(packed_shape(t), storage_dtype(t.element)) for t in types]
        self._tensors = [_descriptor(shape, dtype) for shape, dtype in self._layouts]
        self._arguments = [ctypes.c_void_p(ctypes.addressof(t)) for t in self._tensors]
        self._first_result = len(types) - results

    def __call__(self, operands: Sequence[Array]) -> list[Array]:
        """Runs the kernel on contiguous operands; returns the results."""
        results = [np.empty(shape, dtype) for shape, dtype in self._layouts[self._first_result :]]
        for tensor, (shape, dtype), array in zip(
            self._tensors, self._layouts, (*operands, *results), strict=True
        ):
            if array.shape != shape or array.dtype != dtype:
                raise ValueError(
                    f"an operand is {array.dtype}{list(array.shape)} where {dtype}{list(shape)} is stored"
                )
            tensor.data = _address(array)
        self._function(*self._arguments)
        return results


# int32_t exchange(void *context, int32_t site, const void *operand, void *result)
Exchange = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p)


class CompiledStep:
    """The step of a die, one call of compiled code (`step` in docs/deploy.md)."""

    def __init__(
        self,
        function: Any,
        layouts: Sequence[tuple[tuple[int, ...], np.dtype[Any]]],
        weights: Sequence[Array],
        workspace: Array,
        exchange: Any = None,
        context: int | None = None,
    ) -> None:
        """`layouts`: shapes and dtypes of inputs and outputs; `weights` in the order of the program's
        `ty.global`s; `exchange`: an `Exchange`, of programs that meet others, and what it is called with.
        """
        self.function = function
        self._layouts = list(layouts)
        self._tensors = [_descriptor(shape, dtype) for shape, dtype in layouts]
        self._given: list[Array | None] = [None] * len(layouts)  # where the descriptors point
        addresses = np.array([_address(w) for w in weights] or [0], np.int64)
        self._kept = (weights, addresses, workspace, exchange)  # what the arguments point into
        table, space = (_descriptor(a.shape, a.dtype) for a in (addresses, workspace))
        table.data, space.data = _address(addresses), _address(workspace)
        self._own = (table, space)
        call = ctypes.c_void_p(None) if exchange is None else ctypes.cast(exchange, ctypes.c_void_p)
        self._arguments = [
            *(ctypes.c_void_p(ctypes.addressof(t)) for t in (*self._tensors, *self._own)),
            call,
            ctypes.c_void_p(context),
        ]

    def __call__(self, arrays: Sequence[Array]) -> None:
        """Runs the step on contiguous inputs and outputs; caches among the inputs are written."""
        self.take(arrays)
        self.function(*self._arguments)

    def take(self, arrays: Sequence[Array]) -> None:
        """Inputs and outputs of the next run."""
        for number, (array, before) in enumerate(zip(arrays, self._given, strict=True)):
            if array is not before:
                self._point(number, array)

    def packed_arguments(self) -> npt.NDArray[np.int64]:
        """What a call from compiled code passes: types and pointers, `TVMFFIAny` of tvm/ffi/c_api.h."""
        return np.array([(_OPAQUE_POINTER, a.value or 0) for a in self._arguments], np.int64).reshape(-1)

    def forget(self) -> None:
        """Keeps no array that a call was given."""
        self._given = [None] * len(self._layouts)

    def _point(self, number: int, array: Array) -> None:
        """Most arrays of a step are caches, which stay where they are from one to the next."""
        shape, dtype = self._layouts[number]
        if array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous:
            raise ValueError(f"{array.dtype}{list(array.shape)} is given where {dtype}{list(shape)} is taken")
        self._tensors[number].data = _address(array)
        self._given[number] = array


def _check_complete(data: bytes, path: Path) -> None:
    """Refuses bytes that are not an ELF library or were cut short.

    The dynamic loader maps a cut file and the process dies of SIGBUS.

    The section header table stands last in the file; its place is in the ELF header (System V ABI, chapter
    4).
    """
    size, header = len(data), data[:64]
    complete = False
    if len(header) == 64 and header.startswith(b"\x7fELF\x02\x01"):
        (table,) = struct.unpack_from("<Q", header, 40)
        entry_size, entries = struct.unpack_from("<HH", header, 58)
        complete = table + entry_size * entries <= size
    if not complete:
        raise TyirError(
            f"{path} is not a compiled library: it is cut short or not an ELF file ({size} bytes)",
            help="compile the model again",
        )


_serial = itertools.count(1)


def _load(content: bytes, name: str) -> Any:
    """TVM's module of a library's bytes, from a private copy in memory.

    Nobody else can change that.
    """
    descriptor = os.memfd_create(name)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        # glibc takes a path that it has loaded once for the same library, and numbers of descriptors are used
        # again: the path has a number of its own, spelled in steps that lead nowhere ("." and "")
        steps = "/".join("." if bit == "1" else "" for bit in f"{next(_serial):b}")
        load = _ffi().get_global_func("ffi.Module.load_from_file.so")
        return load(f"/proc/self/fd/{steps}/{descriptor}", "so")
    finally:
        os.close(descriptor)


class HostLibrary:
    """The kernels of one die.

    Several libraries may be loaded in one process; one library serves one thread at a time.
    """

    def __init__(self, path: Path, content: bytes | None = None) -> None:
        """Loads the library from `content`, which is what was checked of the file `path`; without it from
        what the file holds now.

        Raises TyirError naming the file when it is missing or cannot be loaded.
        """
        self.path = path
        if content is None:
            try:
                with open_regular(path) as file:
                    content = file.read()
            except OSError as error:
                raise TyirError(
                    f"there is no library {path}: {error.strerror}",
                    help="compile the model again, or give the directory that tyir-compile wrote",
                ) from None
        _check_complete(content, path)
        try:
            self._module = _load(content, path.name)
        except (RuntimeError, OSError, ValueError) as error:
            raise TyirError(
                f"{path} cannot be loaded as a compiled library: {error}",
                help="the file is damaged; compile the model again",
            ) from error
        self._kernels: dict[str, _Kernel] = {}

    def function(self, name: str) -> Any:
        """An exported function; `TyirError` when the library has none of that name."""
        try:
            return self._module[name]
        except AttributeError as error:
            raise TyirError(
                f"{self.path} has no function '{name}'",
                help="it was compiled by an older tyir; compile the model again",
            ) from error

    def has(self, name: str) -> bool:
        """Whether it exports a function."""
        try:
            return self._module[name] is not None
        except AttributeError:
            return False

    def evaluator(self) -> Evaluator:
        """The evaluator for `tyir.interpreter.Interpreter`.

        `Interpreter(module, constants=..., evaluator=library.evaluator())`.
        """
        return self.evaluate

    def evaluate(self, op: Op, operands: Sequence[Array]) -> Array | tuple[Array, ...]:
        """Runs one op: a kernel by its `tyir.kernel`, reshapes and constants directly.

        Operands have the shapes and dtypes of the op's operand types as stored (`tyir.execution.storage`: ui4
        packed); so have the results. An op that works in place returns the array it was given.
        """
        if isinstance(op, (ty.Reshape, ty.Constant)):
            return evaluate_op(op, operands)
        name = op.attributes.get("tyir.kernel")
        if not isinstance(name, StringAttr):
            raise TyirError(
                f"'{op.name}' has no kernel",
                help="compile the module first: every op of the program stage gets a 'tyir.kernel'",
            )
        arrays = [self._contiguous(op, i, a) for i, a in enumerate(operands)]
        kernel = self._kernels.get(name.value) or self._find(name.value, op)
        try:
            results = kernel(arrays)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TyirError(f"kernel '{name.value}' of {self.path} cannot run: {error}") from error
        return operands[0] if op.has_trait(InPlace) else results[0] if len(results) == 1 else tuple(results)

    def _contiguous(self, op: Op, index: int, array: Array) -> Array:
        if array.flags.c_contiguous:
            return array
        if index == 0 and op.has_trait(InPlace):
            raise TyirError(f"'{op.name}' writes its first operand in place, which must be contiguous")
        return np.ascontiguousarray(array)

    def _find(self, name: str, op: Op) -> _Kernel:
        try:
            function = self._module[name]
        except AttributeError as error:
            raise TyirError(
                f"{self.path} has no kernel '{name}'",
                help="the library and the program come from different compiles",
            ) from error
        results = [] if op.has_trait(InPlace) else op.results
        types = [ty.tensor_type(v) for v in (*op.operands, *results)]
        self._kernels[name] = _Kernel(function, types, len(results))
        return self._kernels[name]

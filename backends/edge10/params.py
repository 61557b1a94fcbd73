"""Writing `.params` files: safetensors, a block of rows at a time, so that a compile never holds more than a
few blocks.

All dies' files are written side by side, source tensor by source tensor, by as many threads as `jobs` says:
the checkpoint is read once, an expensive expression (quantising a weight) is computed once for all that take
parts of it, and pages of the checkpoint are given back as soon as they have been used.  Bytes are hashed as
they go out: a file's SHA-256 is known when its last tensor is written (`ParamsFile.sha256`).
"""

from __future__ import annotations

import hashlib
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from tyir.attributes import SymbolRefAttr
from tyir.backends.edge10.weight_windows import Window, WindowReader, whole_window
from tyir.backends.pieces import Done, tool_identity
from tyir.backends.workers import Workers, check_tools
from tyir.diagnostics import Diagnostic, TyirError
from tyir.dialects.builtin import Module
from tyir.dialects.ty import GetGlobal, Global, Param, Slice, Yield
from tyir.dialects.ty.tensors import bf16_to_f32
from tyir.dtypes import by_element
from tyir.execution.finite import all_finite, number_problem
from tyir.execution.safetensors_layout import SafetensorsLayout
from tyir.execution.storage import packed_shape
from tyir.execution.weights import CheckpointReader, WeightSource
from tyir.interpreter import SymbolIndex
from tyir.ir import Value
from tyir.parser import parse_module
from tyir.printer import print_op
from tyir.process.progress import Bar
from tyir.types import FloatType, Type, bf16, bit_width, f16, from_dtype, storage_dtype

__all__ = ["ParamsFile", "stored_blocks", "write_params"]

Array = npt.NDArray[Any]
_BLOCK: Final = 16 << 20  # bytes of a tensor that are computed and written at once
_TASK: Final = 64 << 20  # bytes of blocks that one thread takes at a time
_WAITING: Final = 32 << 20  # bytes of a file that may wait in memory for those before them to be hashed
_ALIGNED: Final = 64  # rows; whole words and whole rows of blocks


class ParamsFile:
    """The layout of one `.params` file: tensors in order of first use.

    `sha256`: of the file, once it is written.  `keys`: of tensors (`TensorKeys`), where a journal is kept.
    `left`: blocks that a writer that was killed has left in the file, by offset.
    """

    def __init__(self, path: Path, params: Sequence[Param]) -> None:
        self.path = path
        self.params = params
        self.layout = SafetensorsLayout(
            {
                str(param.sym_name): (_dtype_name(param.type.element), packed_shape(param.type))
                for param in params
            },
            {"format": "tyir"},
        )
        self.slots = {param: self.layout.slots[str(param.sym_name)] for param in params}
        self.sha256: str | None = None
        self.keys: dict[Param, str] = {}
        self.left: Mapping[int, Done] = {}

    def global_for(self, param: Param, file: str) -> Global:
        """The reference by which a program names this tensor."""
        slot = self.slots[param]
        return Global(
            sym_name=str(param.sym_name),
            type=param.type,
            file=file,
            key=str(param.sym_name),
            offset=slot.offset,
            nbytes=slot.nbytes,
            loc=param.loc,
        )


# ---------------------------------------------------------------------------------------------------- writing


def write_params(
    files: Sequence[ParamsFile],
    weights: WeightSource,
    *,
    jobs: int = 1,
    progress: bool = False,
    journal: Callable[[ParamsFile, int, Done], None] | None = None,
    stop: threading.Event | None = None,
    workers: Workers | None = None,
) -> None:
    """Evaluate every parameter and write it; the bytes are the same for every number of `jobs`.

    With `workers` blocks are computed by them where they can read the checkpoint (`CheckpointReader`).

    `journal` is told of every block when it is written.  Blocks that `file.left` has under the same key are
    read again and compared with their CRC-32 instead.  With `stop` set it ends early, and files without
    `sha256` are not complete.  `TyirError` lists the tensors that hold NaN or infinity or overflow f16.
    """
    symbols = SymbolIndex()
    tasks = list(_tasks(files, symbols))
    problems: dict[tuple[int, int], Diagnostic] = {}  # by file and offset, whoever finds them first
    total = sum(slot.nbytes for file in files for slot in file.layout.slots.values())
    local, stop = threading.local(), stop or threading.Event()
    with ExitStack() as stack:
        sinks = [stack.enter_context(_Sink(file)) for file in files]
        bar = stack.enter_context(Bar("weights", total, "byte", show=progress))

        def work(task: list[_Block]) -> None:
            reader: WindowReader | None = getattr(local, "reader", None)
            if reader is None:
                reader = local.reader = WindowReader(weights)
            away = _from(workers, task, sinks, weights, symbols) if workers is not None else {}
            for block in task:
                if stop.is_set():
                    return
                sink, key = sinks[block.file], sinks[block.file].file.keys.get(block.param)
                left = sink.left(block, key)
                if left is None:
                    with np.errstate(all="ignore"):  # reported below, by the tensor's name
                        made = away.get((block.file, block.offset))
                        array = reader.stored(block.root, block.window) if made is None else made
                    place = (block.file, block.slot)
                    if place not in problems:
                        problem = _check(block.param, array, weights, symbols)
                        if problem is not None:
                            problems[place] = problem
                    data = memoryview(array.reshape(-1).view(np.uint8).data)
                else:
                    data = left
                sink.write(block.offset, data, there=left is not None)
                if journal is not None and key is not None:
                    journal(sink.file, block.offset, Done(len(data), key, zlib.crc32(data)))
                bar.advance(len(data))
            _let_go(reader, weights)

        if workers is None and jobs == 1:
            for task in tasks:
                work(task)
        else:
            _in_threads(work, tasks, jobs if workers is None else workers.count, stop)
        if not stop.is_set():
            for sink in sinks:
                sink.finish()
    if problems:
        raise TyirError([problems[place] for place in sorted(problems)])


def _from(
    workers: Workers,
    task: Sequence[_Block],
    sinks: Sequence[_Sink],
    weights: WeightSource,
    symbols: SymbolIndex,
) -> dict[tuple[int, int], Array]:
    """The blocks of a task that are not there yet, by file and offset, made by a worker."""
    wanted = [b for b in task if sinks[b.file].left(b, sinks[b.file].file.keys.get(b.param)) is None]
    if not wanted or type(weights) is not CheckpointReader:
        return {}
    text, names = _as_text([b.param for b in wanted], symbols)
    asked = [(names[b.param], b.window) for b in wanted]
    folder = str(weights.folder.resolve())
    made = workers.run(stored_blocks, tool_identity(), folder, text, asked)
    return {
        (b.file, b.offset): np.frombuffer(data, storage_dtype(b.param.type.element))
        for b, data in zip(wanted, made, strict=True)
    }


def _as_text(params: Sequence[Param], symbols: SymbolIndex) -> tuple[str, dict[Param, str]]:
    """A module of parameters and the stored tensors that they are made of, with a name for each parameter."""
    module, names, tensors = Module.empty("blocks"), dict[Param, str](), dict[tuple[str, str], str]()
    for param in dict.fromkeys(params):
        copy = param.clone()
        copy.sym_name = names[param] = f"param{len(names)}"
        for op in copy.body:
            if not isinstance(op, GetGlobal):
                continue
            target = symbols.lookup(param, op.symbol.leaf)
            assert isinstance(target, Global)
            place = (str(target.file), f"{target.offset} {target.type}")
            if place not in tensors:
                tensors[place] = f"tensor{len(tensors)}"
                stored = target.clone()
                stored.sym_name = tensors[place]
                module.body.append(stored)
            op.symbol = SymbolRefAttr(tensors[place])
        module.body.append(copy)
    return print_op(module), names


def stored_blocks(identity: str, folder: str, text: str, wanted: Sequence[tuple[str, Window]]) -> list[bytes]:
    """Windows of the parameters of a module, as files hold them, computed from a checkpoint folder: what a
    worker does.  `TyirError` unless it has the tools that `identity` names, and the folder.
    """
    check_tools(identity)
    if not Path(folder).is_dir():
        raise TyirError(
            f"a worker does not have the checkpoint {folder}",
            help="put it on a file system that all machines have, under the same path",
        )
    module = parse_module(text)
    params = {str(op.sym_name): op for op in module.body if isinstance(op, Param)}
    reader = WindowReader(CheckpointReader(Path(folder)))
    with np.errstate(all="ignore"):  # what is not finite is told by who asks
        return [reader.stored(_root(params[name]), window).tobytes() for name, window in wanted]


def _in_threads(
    work: Callable[[list[_Block]], None], tasks: Sequence[list[_Block]], jobs: int, stop: threading.Event
) -> None:
    """All tasks, in order as far as several threads can; the first exception ends it."""
    with ThreadPoolExecutor(jobs, thread_name_prefix="weights") as pool:
        futures = [pool.submit(work, task) for task in tasks]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            stop.set()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def _let_go(reader: WindowReader, weights: WeightSource) -> None:
    if isinstance(weights, CheckpointReader):
        for target in reader.touched:
            weights.give_back(target)
    reader.forget()


@dataclass(frozen=True, slots=True)
class _Block:
    """Rows of a parameter, and where in which file they go; `slot` is where the parameter begins."""

    file: int
    param: Param
    root: Value
    window: Window
    slot: int
    offset: int
    nbytes: int


def _tasks(files: Sequence[ParamsFile], symbols: SymbolIndex) -> Iterator[list[_Block]]:
    """Blocks in the order in which they are written: sources as the files first use them, all that is made of
    one source together, row by row, so that what its parts share is at hand.
    """
    rank: dict[tuple[Any, ...], int] = {}
    places: list[tuple[int, int, int, Param]] = []
    for index in range(max((len(file.params) for file in files), default=0)):
        for number, file in enumerate(files):
            if index < len(file.params):
                param = file.params[index]
                source = tuple(id(s) for s in _sources(param, symbols)) or (id(param),)
                places.append((rank.setdefault(source, len(rank)), number, index, param))
    task: list[_Block] = []
    before, size = -1, 0
    for group, blocks in _grouped((p[0], b) for p in places for b in _blocks(files[p[1]], p[1], p[3])):
        blocks.sort(key=lambda b: (_first_row(b), b.file, b.offset))
        for block in blocks:
            if task and (size >= _TASK or (group != before and size >= _BLOCK)):
                yield task
                task, size = [], 0
            task.append(block)
            size += block.nbytes
            before = group
    if task:
        yield task


def _grouped(blocks: Iterator[tuple[int, _Block]]) -> Iterator[tuple[int, list[_Block]]]:
    groups: dict[int, list[_Block]] = {}
    for group, block in blocks:
        groups.setdefault(group, []).append(block)
    yield from sorted(groups.items())


def _first_row(block: _Block) -> int:
    """The row of the whole weight that a block begins with."""
    value, row = block.root, block.window[0].start if block.window else 0
    while isinstance(value.op, Slice):
        row += value.op.offset if value.op.axis == 0 else 0
        value = value.op.x
    return row


def _blocks(file: ParamsFile, number: int, param: Param) -> Iterator[_Block]:
    root, kind, slot = _root(param), param.type, file.slots[param]
    window = whole_window(kind.static_shape)
    indivisible = kind.rank == 0 or (kind.rank == 1 and bit_width(kind.element) == 4)
    if indivisible or slot.nbytes <= _BLOCK:
        yield _Block(number, param, root, window, slot.offset, slot.offset, slot.nbytes)
        return
    extent = kind.static_shape[0]
    row = slot.nbytes // extent
    step = max(1, _BLOCK // row)
    step = step // _ALIGNED * _ALIGNED or step
    for begin in range(0, extent, step):
        end = min(begin + step, extent)
        rows = (slice(begin, end), *window[1:])
        yield _Block(number, param, root, rows, slot.offset, slot.offset + begin * row, (end - begin) * row)


class _Sink:
    """One file that is written in blocks, roughly in order, and hashed in order as it is.

    A block that comes before those that stand before it waits to be hashed, in memory as long as there are
    few of them; beyond that it is read again.
    """

    def __init__(self, file: ParamsFile) -> None:
        self.file = file
        self.hash = hashlib.sha256(file.layout.start)
        self.hashed = len(file.layout.start)
        self.waiting: dict[int, memoryview | int] = {}
        self.waiting_bytes = 0
        self.lock = threading.Lock()
        self.busy = False

    def __enter__(self) -> Self:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | (0 if self.file.left else os.O_TRUNC)
        self.descriptor = os.open(self.file.path, flags, 0o666)
        os.truncate(self.descriptor, self.file.layout.size)
        self._put(0, memoryview(self.file.layout.start))
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self.descriptor)

    def left(self, block: _Block, key: str | None) -> memoryview | None:
        """The bytes of a block that are in the file already, if they are what they were."""
        done = self.file.left.get(block.offset)
        if done is None or (done.nbytes, done.key) != (block.nbytes, key):
            return None
        found = os.pread(self.descriptor, done.nbytes, block.offset)
        return memoryview(found) if len(found) == done.nbytes and zlib.crc32(found) == done.crc else None

    def write(self, offset: int, data: memoryview, *, there: bool = False) -> None:
        """Write a block, which may be `there` already; several threads may."""
        if not there:
            self._put(offset, data)
        with self.lock:
            few = self.waiting_bytes + len(data) <= _WAITING or offset == self.hashed
            self.waiting[offset] = data if few else len(data)
            self.waiting_bytes += len(data) if few else 0
            if self.busy:
                return
            self.busy = True
        while (found := self._next()) is not None:
            self.hash.update(found if isinstance(found, memoryview) else self._again(found))
            size = found if isinstance(found, int) else len(found)
            with self.lock:
                self.hashed += size

    def _next(self) -> memoryview | int | None:
        """What is to be hashed next; whoever is told that there is nothing has stopped being busy."""
        with self.lock:
            found = self.waiting.pop(self.hashed, None)
            if found is None:
                self.busy = False
            elif isinstance(found, memoryview):
                self.waiting_bytes -= len(found)
            return found

    def _put(self, offset: int, data: memoryview) -> None:
        while data:
            count = os.pwrite(self.descriptor, data, offset)
            data, offset = data[count:], offset + count

    def _again(self, size: int) -> bytes:
        found = os.pread(self.descriptor, size, self.hashed)
        if len(found) != size:
            raise OSError(f"{self.file.path} ended while it was written")
        return found

    def finish(self) -> None:
        """All is written."""
        assert self.hashed == self.file.layout.size, self.file.path
        self.file.sha256 = self.hash.hexdigest()


def _dtype_name(element: Type) -> str:
    """What safetensors calls an element; packed 4-bit elements are bytes."""
    found = by_element.get(str(element)) or by_element[str(from_dtype(storage_dtype(element)))]
    return found.safetensors


def _root(param: Param) -> Value:
    """What the initializer of a parameter yields."""
    for op in param.body:
        if isinstance(op, Yield):
            return op.value
    raise TyirError(f"the initializer of @{param.sym_name} yields nothing")


def _check(param: Param, array: Array, weights: WeightSource, symbols: SymbolIndex) -> Diagnostic | None:
    """What of a parameter cannot be computed with, by the stored tensor that it comes from."""
    if not isinstance(param.type.element, FloatType) or all_finite(array):
        return None
    sources = _sources(param, symbols)
    for source in sources:
        found = weights.read(source)
        if source.type.element is bf16:
            found = bf16_to_f32(found)
        if (problem := number_problem(found, f16=param.type.element is f16)) is not None:
            where = f"{source.file}: " if source.file else ""
            return Diagnostic(f"{where}tensor '{source.key}' {problem[0]}", help=problem[1])
    made = f", made of {', '.join(repr(s.key) for s in sources)}" if sources else ""
    what, help = number_problem(array, f16=False) or ("", "")
    return Diagnostic(f"weight {param.sym_name}{made}, {what}", help=help)


def _sources(param: Param, symbols: SymbolIndex) -> list[Global]:
    """The stored tensors that a parameter is made of."""
    found = (symbols.lookup(param, op.symbol.leaf) for op in param.body if isinstance(op, GetGlobal))
    return [target for target in found if isinstance(target, Global)]

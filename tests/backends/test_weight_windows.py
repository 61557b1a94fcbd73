"""A window of a weight expression is that window of the whole, whatever moves, cuts or quantises it; files
written in blocks by any number of threads are the bytes of the whole.
"""

from __future__ import annotations

import hashlib
import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tyir.attributes import SymbolRefAttr
from tyir.backends.edge10 import params as writer
from tyir.backends.edge10.params import ParamsFile, write_params
from tyir.backends.edge10.weight_windows import WindowReader, whole_window
from tyir.backends.pieces import Done
from tyir.dialects import quant, ty
from tyir.dialects.builtin import Module
from tyir.dialects.ty import GetGlobal, Global, Param, tensor_type
from tyir.execution.constexpr import expression_ops
from tyir.execution.storage import pack
from tyir.execution.weights import TensorReference, read_safetensors
from tyir.interpreter import evaluate_op, lookup_symbol
from tyir.ir import Block, Region, Value
from tyir.types import TensorType, Type, bf16, f16, f32, i32, ui8

Array = npt.NDArray[Any]


class Stored:
    """Tensors by name."""

    def __init__(self) -> None:
        self.arrays: dict[str, Array] = {}

    def read(self, ref: TensorReference) -> Array:
        return self.arrays[ref.key]


class Model:
    """Parameters over stored tensors of random content."""

    def __init__(self, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.weights, self.module = Stored(), Module.empty()
        self.params: list[Param] = []

    def tensor(self, name: str, shape: tuple[int, ...], element: Type) -> tuple[Block, Value]:
        """A stored tensor, made the first time, and a block that reads it."""
        type, name = TensorType(shape, element), "_".join((name, *map(str, shape)))
        if name not in self.weights.arrays:
            found = self.random.integers(0, 1 << 16, shape)
            if element is i32:
                found = self.random.integers(-(1 << 31), 1 << 31, shape)
                array = found.astype(np.int32)
            elif element is ui8:
                array = found.astype(np.uint8)
            elif element is bf16:
                array = (self.random.standard_normal(shape).astype(np.float32).view(np.uint32) >> 16).astype(
                    np.uint16
                )
            else:
                array = self.random.standard_normal(shape).astype(
                    np.float32 if element is f32 else np.float16
                )
            self.weights.arrays[name] = array
            self.module.body.append(
                Global(
                    sym_name=name, type=type, file="m", key=name, offset=len(self.params), nbytes=array.nbytes
                )
            )
        block = Block()
        return block, block.append(GetGlobal(symbol=SymbolRefAttr(name), result_types=[type])).results[0]

    def add(self, block: Block, value: Value) -> Param:
        block.append(ty.Yield(value=value))
        name = f"p{len(self.params)}"
        param = Param(sym_name=name, type=tensor_type(value), initializer=Region([block]))
        self.params.append(param)
        self.module.body.append(param)
        return param

    def whole(self, param: Param) -> Array:
        """What the ops' own `evaluate` makes of it, one after the other."""
        root = next(op for op in param.body if isinstance(op, ty.Yield)).value
        known: dict[Value, Array] = {}
        for op in expression_ops(root):
            if isinstance(op, GetGlobal):
                target = lookup_symbol(op, op.symbol.leaf)
                assert isinstance(target, Global)
                result: Any = self.weights.read(target)
            else:
                result = evaluate_op(op, [known[v] for v in op.operands])
            known.update(zip(op.results, result if isinstance(result, tuple) else (result,)))
        return known[root]


def awq(model: Model, order: tuple[int, ...], axis: int, cut: int, offset: int, size: int) -> Param:
    """Words taken apart along `axis`, turned so that input channels are last, and cut along `cut`."""
    block, words = model.tensor("words", (32, 5) if axis == 1 else (5, 32), i32)
    value: Value = block.append(quant.Unpack(words, axis=axis, order=order)).results[0]
    value = block.append(ty.Transpose(value, perm=(1, 0))).results[0]
    value = block.append(ty.Slice(value, axis=cut, offset=offset, size=size)).results[0]
    return model.add(block, value)


def params_of_all_kinds(model: Model) -> None:
    """One parameter at least for each rule, and for what has none."""
    identity = tuple(range(8))
    for order in (quant.AWQ_ORDER, identity):
        for axis in (0, 1):
            for cut, offset, size in ((0, 4, 16), (0, 3, 9), (1, 2, 12), (1, 3, 13)):
                awq(model, order, axis, cut, offset, size)
    for number in range(3):
        block, stored = model.tensor("dense", (48, 32), bf16)
        value: Value = block.append(ty.Cast(stored, element=f16)).results[0]
        groups = block.append(ty.QuantizeGroups(value, group_size=8))
        value = block.append(ty.Slice(groups.results[number], axis=0, offset=8, size=36)).results[0]
        model.add(block, value)
    block, stored = model.tensor("dense", (48, 32), bf16)
    value = block.append(ty.Cast(stored, element=f16)).results[0]
    _, factors = model.tensor("scales", (48,), f32)
    assert factors.op is not None
    factors = block.append(factors.op.detach()).results[0]
    for op in (ty.MultiplyChannels, ty.DivideChannels):
        value = block.append(op(value, factors, axis=0)).results[0]
    groups = block.append(ty.QuantizeGroups(value, group_size=16))
    back = block.append(ty.Dequantize(*groups.results, group_size=16)).results[0]
    value = block.append(ty.Concat((back, value), axis=0)).results[0]
    model.add(block, block.append(ty.Repeat(value, axis=1, times=2)).results[0])
    block, stored = model.tensor("dense", (48, 32), bf16)
    value = block.append(ty.Reshape(stored, shape=(32, 48))).results[0]  # no rule: whole
    model.add(block, block.append(ty.Cast(value, element=f32)).results[0])
    block, words = model.tensor("words", (5, 32), i32)
    value = block.append(quant.Unpack(words, axis=1, order=identity, size=250)).results[0]
    model.add(block, block.append(quant.AddWrapping(value, value=1)).results[0])
    block, data = model.tensor("ggml", (6, 36), ui8)
    model.add(block, block.append(quant.GgmlQ40(data)).results[0])


@pytest.mark.parametrize("grid", [1, 64, 1 << 21])
def test_a_window_is_a_window_of_the_whole(grid: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tyir.backends.edge10.weight_windows._GRID", grid)
    model, chosen = Model(), random.Random(0)
    params_of_all_kinds(model)
    reader = WindowReader(model.weights)
    for param in model.params:
        whole = model.whole(param)
        root = next(op for op in param.body if isinstance(op, ty.Yield)).value
        assert np.array_equal(reader.evaluate(param), whole)
        assert np.array_equal(reader.stored(root, whole_window(whole.shape)), pack(whole, param.type))
        for _ in range(6):
            begin = [chosen.randrange(n) for n in whole.shape]
            window = tuple(slice(b, chosen.randrange(b + 1, n + 1)) for b, n in zip(begin, whole.shape))
            assert np.array_equal(reader.elements(root, window), whole[window])
            assert np.array_equal(reader.stored(root, window), pack(whole[window], param.type))


def files_of(model: Model, folder: Path) -> list[ParamsFile]:
    folder.mkdir()
    half = len(model.params) // 2
    files = [ParamsFile(folder / "a", model.params[half:]), ParamsFile(folder / "b", model.params)]
    for file in files:
        file.keys = {param: str(param.sym_name) for param in file.params}
    return files


@pytest.mark.parametrize("jobs", [1, 2, 5])
@pytest.mark.parametrize("waiting", [0, 1 << 20])
def test_files_are_the_same_for_every_number_of_threads(
    jobs: int, waiting: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """... and of the whole tensors' bytes, with the hash of what is there."""
    monkeypatch.setattr(writer, "_BLOCK", 256)
    monkeypatch.setattr(writer, "_TASK", 300)
    monkeypatch.setattr(writer, "_WAITING", waiting)
    model = Model()
    params_of_all_kinds(model)
    files = files_of(model, tmp_path / "new")
    write_params(files, model.weights, jobs=jobs)
    for file in files:
        assert file.sha256 == hashlib.sha256(file.path.read_bytes()).hexdigest()
        found = read_safetensors(file.path)
        for param in file.params:
            wanted = pack(model.whole(param), param.type)
            assert found[str(param.sym_name)].tobytes() == wanted.tobytes()


def test_what_is_left_is_read_and_compared_and_the_rest_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_BLOCK", 256)
    model = Model()
    params_of_all_kinds(model)
    done: list[dict[int, Done]] = [{}, {}]
    files = files_of(model, tmp_path / "new")

    def journal(file: ParamsFile, offset: int, entry: Done) -> None:
        done[files.index(file)][offset] = entry

    write_params(files, model.weights, journal=journal)
    wanted = [file.path.read_bytes() for file in files]
    computed: list[Value] = []
    stored = WindowReader.stored

    def counted(self: WindowReader, root: Value, window: Any) -> Array:
        computed.append(root)
        return stored(self, root, window)

    monkeypatch.setattr(WindowReader, "stored", counted)
    again = files_of(model, tmp_path / "again")
    for file, data, entries in zip(again, wanted, done):
        file.left = dict(entries)
        damaged = bytearray(data)
        lost, spoilt, changed = sorted(entries)[1], sorted(entries)[3], sorted(entries)[5]
        del file.left[lost]  # the journal ends before it
        damaged[lost] ^= 255
        damaged[spoilt] ^= 255
        file.left[changed] = Done(entries[changed].nbytes, "another key", entries[changed].crc)
        file.path.write_bytes(bytes(damaged) + b"more than the file had")
    write_params(again, model.weights)
    assert [file.path.read_bytes() for file in again] == wanted
    assert [file.sha256 for file in again] == [hashlib.sha256(data).hexdigest() for data in wanted]
    assert len(computed) == 6


def test_a_stopped_writer_leaves_files_without_a_hash(tmp_path: Path) -> None:
    model = Model()
    params_of_all_kinds(model)
    stop = threading.Event()
    stop.set()
    files = files_of(model, tmp_path / "new")
    write_params(files, model.weights, jobs=2, stop=stop)
    assert [file.sha256 for file in files] == [None, None]

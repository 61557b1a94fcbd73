"""4-bit weights by activations of 8 and of 16 bits: the sums are exact, whatever the processor multiplies bytes with, and what the
rounding of the activations costs is bounded.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest

from tyir.backends.host.tvm_host import GENERIC_CPU, HostTarget, assign_kernels, build_library, detected_cpu
from tyir.diagnostics import TyirError
from tyir.dialects import func, ty
from tyir.execution.processor import features_here
from tyir.execution.storage import pack
from tyir.runtime_sim.session.host_runtime import HostLibrary
from tyir.types import TensorType, f16, f32, ui4


@dataclass(frozen=True)
class Shape:
    m: int
    k: int
    n: int
    group: int
    bias: bool = False
    width: int = 2  # bytes of an activation

    @property
    def types(self) -> tuple[TensorType, ...]:
        groups = self.k // self.group
        biases = (TensorType((self.n,), f16),) if self.bias else ()
        return (
            TensorType((1, self.m, self.k), f16 if self.width == 2 else f32),
            TensorType((self.n, self.k), ui4),
            TensorType((self.n, groups), f16),
            TensorType((self.n, groups), ui4),
            *biases,
        )

    def op(self) -> tuple[func.Func, ty.QuantizedLinear]:
        function = func.Func.make("f", self.types)
        op = ty.QuantizedLinear(*function.args, group_size=self.group, element=f32)
        function.body.append(op)
        return function, op


SHAPES = [
    Shape(1, 896, 40, 128),  # seven groups: an odd number of zero points in a row
    Shape(1, 1024, 600, 128),  # enough work for threads
    Shape(3, 96, 5, 32, bias=True),
    Shape(5, 256, 33, 64),
    Shape(13, 512, 70, 256, bias=True),  # blocks of rows, turned, and rows that are left
    Shape(37, 384, 96, 128),
    Shape(8, 64, 9, 32),
    Shape(33, 256, 71, 256, bias=True),  # of tiles: a token more than whole ones, rows that are left
    Shape(64, 512, 1024, 128),  # enough work for threads
]


# products of equal weights by few and by many tokens
TOGETHER = [
    [Shape(m, 896, 75, 128, bias=True) for m in (1, 5, 8, 40)],
    [Shape(m, 160, 43, 32) for m in (1, 3, 12)],
]


# activations of f16 and of f32, of few tokens and of many; the first has most rows
NOT_FINITE = [Shape(m, 256, 64, 128, width=width) for m in (13, 3) for width in (2, 4)]

LARGEST = {"int8": 127, "int16": 16319}  # code
# without tiles (AMX), and with them where this processor has them
CPUS = list(dict.fromkeys([GENERIC_CPU, detected_cpu(), "icelake-server"]))


@dataclass(frozen=True)
class Built:
    library: HostLibrary
    largest: int


@pytest.fixture(
    scope="module", params=[*CPUS[:2], *(pytest.param(cpu, marks=pytest.mark.slow) for cpu in CPUS[2:])]
)
def mcpu(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=list(LARGEST))
def built(mcpu: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    target = HostTarget(mcpu=mcpu, activations=request.param)
    if not target.cpu().byte_products:
        pytest.skip("this processor does not multiply bytes")
    here = features_here()
    if here is not None and not here.issuperset(target.features()):
        pytest.skip(f"this processor is no {mcpu}")
    path = tmp_path_factory.mktemp("integers") / "x.so"
    build_library(
        assign_kernels([shape.op()[0] for shape in sum(TOGETHER, SHAPES + NOT_FINITE)]), target, path
    )
    return Built(HostLibrary(path), LARGEST[request.param])


def operands(shape: Shape) -> list[npt.NDArray[np.generic]]:
    rng = np.random.default_rng(shape.k + shape.n)
    x = rng.standard_normal(shape.types[0].static_shape) * rng.choice([0.01, 1, 30], (1, shape.m, shape.k))
    x[0, 0, : shape.group] = 0  # a group without a largest value
    found: list[npt.NDArray[np.generic]] = [x.astype(np.float16)]
    for t in shape.types[1:]:
        whole = str(t.element) == "ui4"
        drawn = rng.integers(0, 16, t.static_shape) if whole else rng.uniform(0.001, 0.02, t.static_shape)
        found.append(drawn.astype(np.uint8 if whole else np.float16))
    return found


def rounded(
    shape: Shape, largest: int, x: npt.NDArray[np.generic]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The activations that are multiplied, [m, groups, group], and how far apart two of a group are."""
    groups = x[0].astype(np.float32).reshape(shape.m, -1, shape.group)
    most = np.abs(groups).max(axis=2, keepdims=True)
    times = np.divide(np.float32(largest), most, out=np.zeros_like(most), where=most > 0)
    step = most / np.float32(largest)
    codes = np.rint(groups.astype(np.float64) * times)  # a product is rounded once, to a code
    return codes * step, step.astype(np.float64)


def by_hand(
    shape: Shape, largest: int, x: npt.NDArray[np.generic], *others: npt.NDArray[np.generic]
) -> npt.NDArray[np.float64]:
    """The same from rounded activations, in f64."""
    q, scales, zeros, *bias = (a.astype(np.float64) for a in others)
    weight = (q.reshape(shape.n, -1, shape.group) - zeros[:, :, None]) * scales[:, :, None]
    out = np.einsum("mgk,ngk->mn", rounded(shape, largest, x)[0], weight)
    return out + bias[0] if bias else out


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_of_rounded_activations_are_exact(shape: Shape, built: Built) -> None:
    function, op = shape.op()
    assign_kernels([function])
    arrays = operands(shape)
    got = built.library.evaluate(op, [pack(a, t) for a, t in zip(arrays, shape.types)])
    wanted = by_hand(shape, built.largest, *arrays)
    np.testing.assert_allclose(got[0], wanted, atol=2e-5 * np.abs(wanted).max())  # type: ignore[index]
    most = np.repeat(rounded(shape, built.largest, arrays[0])[1] / 2, shape.group, axis=2).reshape(
        shape.m, -1
    )
    weight = ty.dequantize(arrays[1], arrays[2], arrays[3], shape.group).astype(np.float64)
    bound = most @ np.abs(weight).T + 1e-3 * np.abs(wanted).max()  # weights are rounded to f16 by the op
    assert (np.abs(got[0] - op.evaluate(*arrays)[0]) <= bound).all()  # type: ignore[index]


@pytest.mark.parametrize("shapes", TOGETHER, ids=str)
def test_a_token_is_the_same_bits_in_every_company(shapes: Sequence[Shape], built: Built) -> None:
    """As rows of the weight lie, turned, and by tiles."""
    most = max(shapes, key=lambda s: s.m)
    x, *weight = operands(most)
    found = {}
    for shape in shapes:
        function, op = shape.op()
        assign_kernels([function])
        packed = [pack(a, t) for a, t in zip([x[:, -shape.m :], *weight], shape.types)]
        (found[shape.m],) = built.library.evaluate(op, packed)
    for m, got in found.items():
        np.testing.assert_array_equal(got, found[most.m][-m:])  # type: ignore[index]


@pytest.mark.parametrize("m", [3, 13])
def test_activations_of_either_type_and_those_that_are_no_number(m: int, built: Built) -> None:
    """f32 gives the bits that the same values in f16 give; what is no number is not lost on the way."""
    x, *weight = operands(NOT_FINITE[0])
    x = x[:, :m].astype(np.float16)
    x[0, -1, 5], x[0, -2, 7] = np.nan, np.inf
    found = []
    for shape in (s for s in NOT_FINITE if s.m == m):
        function, op = shape.op()
        assign_kernels([function])
        (got,) = built.library.evaluate(
            op, [x.astype(f"f{shape.width}"), *map(pack, weight, shape.types[1:])]
        )
        found.append(np.asarray(got).reshape(m, -1))
    np.testing.assert_array_equal(*found)
    assert np.isnan(found[0][-1]).all() and not np.isfinite(found[0][-2]).any()
    assert np.isfinite(found[0][:-2]).all()


def test_a_processor_that_multiplies_no_bytes_is_refused() -> None:
    with pytest.raises(TyirError, match="a x86-64 processor does not multiply 8-bit numbers"):
        HostTarget(mcpu="x86-64", activations="int8")


def test_other_activations_are_refused() -> None:
    with pytest.raises(TyirError, match="activations 'int4' are not supported"):
        HostTarget(activations="int4")

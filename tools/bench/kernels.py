"""Times the host kernels of one projection beside numpy's and torch's matrix product.

    python -m tyir.tools.bench.kernels --n 8960 --k 1536 --tokens 1 8 96

Implementations take turns, round by round, so that all of them meet the same disturbances; each reads weights
that are not in the caches (several copies are visited in turn).  numpy's BLAS chooses its own number of
threads.  Printed: the median time of a call, GFLOP/s, and the bytes of the weight read per second.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tyir.tools.cli import run_tool

__all__ = ["main"]

Array = npt.NDArray[Any]
_COLD_BYTES = 256 << 20  # more than any cache


def _library(ops: Sequence[Any], functions: Sequence[Any], threads: int) -> Any:
    from tyir.backends.host.tvm_host import HostTarget, assign_kernels, build_library
    from tyir.runtime_sim.session.host_runtime import HostLibrary, use_threads

    use_threads(threads)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "bench.so"
        build_library(assign_kernels(functions), HostTarget(num_cores=threads), path)
        return HostLibrary(path)


def _rotating(call: Callable[..., object], sets: Sequence[Sequence[Any]]) -> Callable[[], float]:
    """A round: every set of weights once; gives seconds per call."""

    def one_round() -> float:
        start = time.perf_counter()
        for arrays in sets:
            call(*arrays)
        return (time.perf_counter() - start) / len(sets)

    return one_round


def _candidates(
    n: int, k: int, group: int, tokens: int, threads: int
) -> dict[str, tuple[Callable[[], float], int]]:
    """Round functions by name, with the bytes of weight that a call reads."""
    import torch

    from tyir.dialects import func, ty
    from tyir.types import TensorType, f16, ui4

    x_type, w_type = TensorType((1, tokens, k), f16), TensorType((n, k), f16)
    q_types = (TensorType((n, k), ui4), TensorType((n, k // group), f16), TensorType((n, k // group), ui4))
    function = func.Func.make("bench", (x_type, w_type, *q_types))
    x_value, w_value, q_value, scales, zeros = function.args
    linear = ty.Linear(x_value, w_value, None)
    quantized = ty.QuantizedLinear(x_value, q_value, scales, zeros, None, group_size=group)
    function.body.append(linear)
    function.body.append(quantized)
    library = _library([linear, quantized], [function], threads)

    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, tokens, k)).astype(np.float16)
    copies = max(2, _COLD_BYTES // (n * k * 2))
    w = [rng.standard_normal((n, k), np.float32).astype(np.float16) for _ in range(copies)]
    packed = [
        (
            rng.integers(0, 256, (n, k // 2), np.uint8),
            rng.random((n, k // group)).astype(np.float16),
            rng.integers(0, 256, (n, (k // group + 1) // 2), np.uint8),
        )
        for _ in range(max(2, _COLD_BYTES // (n * k // 2)))
    ]
    torch.set_num_threads(threads)
    torch_x = {dtype: torch.from_numpy(x[0]).to(dtype) for dtype in (torch.bfloat16, torch.float32)}
    torch_w = {dtype: [torch.from_numpy(a).to(dtype) for a in w] for dtype in torch_x}
    wide = [a.astype(np.float32) for a in w]
    wide_x = x[0].astype(np.float32)
    return {
        "tyir linear f16": (
            _rotating(lambda a: library.evaluate(linear, [x, a]), [(a,) for a in w]),
            n * k * 2,
        ),
        "tyir quantized_linear": (
            _rotating(lambda *a: library.evaluate(quantized, [x, *a]), packed),
            sum(a.nbytes for a in packed[0]),
        ),
        "torch bf16": (
            _rotating(lambda a: torch_x[torch.bfloat16] @ a.T, [(a,) for a in torch_w[torch.bfloat16]]),
            n * k * 2,
        ),
        "torch f32": (
            _rotating(lambda a: torch_x[torch.float32] @ a.T, [(a,) for a in torch_w[torch.float32]]),
            n * k * 4,
        ),
        "numpy f32": (_rotating(lambda a: wide_x @ a.T, [(a,) for a in wide]), n * k * 4),
    }


@run_tool
def main(argv: Sequence[str]) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Times the host kernels of one projection beside numpy and torch."
    )
    parser.add_argument("--n", type=int, default=8960, help="rows of the weight (output features)")
    parser.add_argument("--k", type=int, default=1536, help="columns of the weight (input features)")
    parser.add_argument("--group", type=int, default=128, help="columns per quantisation group")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 96])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args(argv)
    print(
        f"{options.k} -> {options.n}, groups of {options.group}, {options.threads} threads, median of"
        f" {options.rounds} alternating rounds"
    )
    for tokens in options.tokens:
        candidates = _candidates(options.n, options.k, options.group, tokens, options.threads)
        times: dict[str, list[float]] = {name: [] for name in candidates}
        for _ in range(options.rounds + 1):
            for name, (run, _nbytes) in candidates.items():
                times[name].append(run())
        for name, (_run, nbytes) in candidates.items():
            median = statistics.median(times[name][1:])
            gflops, rate = 2 * tokens * options.n * options.k / median / 1e9, nbytes / median / 1e9
            print(
                f"tokens {tokens:4}  {name:22} {median * 1e6:9.0f} us  {gflops:7.1f} GFLOP/s  {rate:6.1f}"
                " GB/s",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A million tokens without computing a million: addresses and positions over a cache that is made up, and the
memory of the runtime, which does not grow with the prompt.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.long_context.attention_only import attention_only
from tests.long_context.programs import Programs
from tests.long_context.reference import Chunks, rotated
from tyir.backends.host.tvm_host import HostTarget, assign_kernels, build_library
from tyir.diagnostics import TyirError
from tyir.dialects import kv
from tyir.dialects.func import Func
from tyir.manifest import BuildOptions
from tyir.printer import print_op
from tyir.runtime_sim.session.session import ENGINES, Session
from tyir.tools.api import compile_path
from tyir.types import TensorType, f16, i32

Array = npt.NDArray[Any]
TINY_COPY = Path(__file__).parents[1] / "models" / "tiny-copy"
QWEN = Chunks(262144, 8192, 262144)
HEADS, GROUPS, DIM, THETA = 4, 2, 8, 1e7


def parts() -> tuple[Array, Array, Array]:
    """Rows of q, k and v by token."""
    rng = np.random.default_rng(5)
    q, k, v = (rng.standard_normal((32, count, DIM)) for count in (HEADS, GROUPS, GROUPS))
    return q, k, v


def made_up(capacity: int, position: int) -> tuple[Array, Array]:
    """Keys, as they lie rotated in a cache, and values: [1, G, capacity, D], up to a position."""
    rng = np.random.default_rng(6)
    keys, values = (np.zeros((1, GROUPS, capacity, DIM), np.float16) for _ in "kv")
    for cache in (keys, values):
        cache[:, :, :position] = rng.standard_normal((1, GROUPS, position, DIM), np.float32)
    return keys, values


def wanted(token: int, position: int, caches: tuple[Array, Array], chunks: Chunks) -> Array:
    """What one token at a position gets over made-up caches, in f64 from the definition."""
    (q, k, v), own = parts(), np.array([position])
    keys, values = (cache[0, :, : position + 1].astype(np.float64) for cache in caches)
    keys[:, position], values[:, position] = rotated(k[[token]], own % chunks.step, THETA)[0], v[token]
    gap = position // chunks.step - np.arange(position + 1) // chunks.step
    scale, out = chunks.temperature(position + 1) / np.sqrt(DIM), np.empty((HEADS, DIM))
    for head in range(HEADS):
        scores = np.empty(position + 1)
        for kind in np.unique(gap):
            turned = rotated(q[[token]], chunks.query(int(kind), own), THETA)[0, head]
            scores[gap == kind] = keys[head // 2][gap == kind] @ turned * scale
        weights = np.exp(scores - scores.max())
        out[head] = weights @ values[head // 2] / weights.sum()
    return out.ravel()


def test_far_beyond_the_trained_length(tmp_path: Path) -> None:
    """One token over a made-up cache of eight thousand, four chunks behind it."""
    chunks, capacity, position = Chunks(2000, 40, 2000), 8000, 7990
    module = attention_only(*parts(), THETA, chunks, tmp_path)
    programs = Programs(module, tmp_path, max_kv=capacity, seqlen=1)
    caches = made_up(capacity, position)
    expected = wanted(3, position, caches, chunks)
    for name, cache in zip(("k0", "v0"), caches):
        programs.functional[0].memory.dram.write_buffer(name, cache)
    for engine in ("interpreter", "edge10"):
        programs.caches, programs.position = [[cache.copy() for cache in caches]], position
        (row,) = programs.feed([3], engine)
        np.testing.assert_allclose(row, expected, atol=2e-3, err_msg=engine)


@pytest.mark.slow
def test_a_restored_cache_of_a_million_tokens(tmp_path: Path) -> None:
    """Saved by one session and restored by others, on which each engine addresses the last rows."""
    folder, capacity, position = tmp_path / "model", 1_010_000, 1_009_000
    module = attention_only(*parts(), THETA, QWEN, folder)
    (folder / "model.ir").write_text(print_op(module))
    options = BuildOptions(dies=1, seqlens=(1,), max_kv=capacity, weights="fp16")
    artifacts = compile_path(folder / "model.ir", tmp_path / "out", options)
    caches = made_up(capacity, position)
    first = Session(artifacts)
    first.engine.load_caches({(0, name): cache for name, cache in zip(("k0", "v0"), caches)})
    first.tokens = [n % 32 for n in range(position)]
    first.save(tmp_path / "cache.npz")
    expected = wanted(7, position, caches, QWEN)
    for engine in ENGINES:
        session = Session(artifacts, engine)
        session.restore(tmp_path / "cache.npz")
        (row,) = session.feed([7])
        np.testing.assert_allclose(row, expected, atol=2e-3, err_msg=engine)


def test_a_cache_that_32_bits_do_not_index_is_refused(tmp_path: Path) -> None:
    """Of the 14B's 8 heads of 128 a batch of 4 at a million tokens; a batch of 2 is compiled."""

    def append(batch: int) -> Func:
        types = [TensorType((batch, 8, 1_010_000, 128), f16), TensorType((batch, 1, 8, 128), f16)]
        function = Func.make("f", [*types, TensorType((batch,), i32)])
        function.body.append(kv.Append(*function.args))
        return function

    target = HostTarget(num_cores=1)
    build_library(assign_kernels([append(2)]), target, tmp_path / "two.so")
    with pytest.raises(TyirError, match=r"has 4136960000 elements, a kernel can index 2147483647") as error:
        build_library(assign_kernels([append(4)]), target, tmp_path / "four.so")
    assert "lower --batch or --max-kv" in str(error.value)


_RUN = """
import sys
from tyir.process.stopwatch import peak_mib
from tyir.runtime_sim.session.session import Session
session = Session(sys.argv[1])
session.prefill([n * n % 251 for n in range(int(sys.argv[2]))])
print(peak_mib())
"""


@pytest.mark.slow
def test_the_runtime_takes_no_more_memory_for_a_longer_prompt(
    tmp_path: Path, record_property: Callable[..., None]
) -> None:
    """4k and 32k tokens of the same artifacts: what differs is what of the cache has been touched."""
    options = BuildOptions(dies=1, seqlens=(256,), max_kv=32_768, weights="fp16")
    artifacts = compile_path(TINY_COPY, tmp_path, options)
    peaks = []
    for tokens in (4096, 32_768):
        command = [sys.executable, "-c", _RUN, str(artifacts), str(tokens)]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(float(run.stdout) * 2**20))
    record_property("peaks", peaks)
    cache = 32_768 * 2 * 2 * 2 * 16 * 2  # tokens, layers, k and v, heads, channels, bytes
    assert peaks[1] - peaks[0] <= cache + (4 << 20), peaks  # all logits would be another 32 MB

"""Reading measured times: one row per measurement, with what was run, its class, and microseconds.

Formats are those of the files' authors.

`h200/` JSON lines (measured for this project); `a100/` CSV of ai-dynamo/aiconfigurator (Apache-2.0) and
LLMCompass (BSD-3-Clause); `orin/` JSON of LLMCompassPlus (BSD-3-Clause).  A file that is absent gives no
rows.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

from tyir.runtime_sim.gpu.accelerator import Accelerator
from tyir.runtime_sim.gpu.allreduce import all_reduce_ns
from tyir.runtime_sim.gpu.attention import Attention, attention_ns
from tyir.runtime_sim.gpu.gemm import Product, gemm_ns, is_long, weight_only_ns
from tyir.runtime_sim.gpu.rowwise import (
    add_norm_ns,
    copy_ns,
    norm_ns,
    rope_ns,
    silu_mul_ns,
    softmax_ns,
    stream_ns,
)
from tyir.runtime_sim.gpu.steps import MODELS, Step, step_ns

__all__ = ["NARROW", "NEW", "Row", "read_rows"]

NEW: Final = "(new)"
_MARKS: Final = {"new_": NEW, "blind_": "(blind)", "repeat_": "(repeat)"}
_CALLS: Final = 24  # of one product in a graph, tools/gpu/measure.py


@dataclass(frozen=True)
class Row:
    """One measurement: `predict` gives nanoseconds.

    `flops` and `nbytes` (DRAM and links) are for the roofline and the affine fit; `m` sorts it into a bucket.

    `shape` holds the positive sizes of what was run: where a row lies among the others of its kind.
    """

    kind: str
    name: str
    m: int
    us: float
    flops: float
    nbytes: float
    predict: Callable[[Accelerator], float]
    shape: tuple[int, ...] = (1,)


def read_rows(*folders: Path) -> list[Row]:
    """All rows of a machine's folders, in the files' order.

    A file that several have is read from the first.
    """
    readers: dict[str, Callable[[Path], Iterator[Row]]] = {
        "peaks_and_ops.jsonl": _ops,
        "kernels.jsonl": _ops,
        "collectives.jsonl": _collectives,
        "models.jsonl": _models,
        "new_kernels.jsonl": _ops,
        "new_elementwise.jsonl": _ops,
        "new_collectives.jsonl": _collectives,
        "new_models.jsonl": _models,
        "blind_models.jsonl": _models,
        "repeat_models.jsonl": _models,
        "a100_sxm_gemm_trtllm_1.0.0.csv": _a100_gemm,
        "matmul_A100.csv": _llmcompass_matmul,
        "layernorm_A100.csv": _llmcompass_norm,
        "softmax_A100.csv": _llmcompass_softmax,
        "transformer_A100.csv": partial(_llmcompass_layer, tokens=2048),
        "transformerAR_A100.csv": partial(_llmcompass_layer, tokens=1),
        "a100_sxm_context_attention_trtllm_1.0.0.csv": _a100_prefill,
        "a100_sxm_generation_attention_trtllm_1.0.0.csv": _a100_decode,
        "a100_sxm_custom_allreduce_trtllm_1.0.0.csv": _a100_all_reduce,
        "allreduce_A100x4_NVLink3.csv": _llmcompass_all_reduce,
        "cutlass_perf_log.Orin.json": _orin_gemm,
        "marlin_perf_log.json": _orin_marlin,
        "flashattn_perf_log.Orin.json": _orin_attention,
        "layernorm_perf_log.Orin.json": _orin_norm,
    }
    found = [
        (name, read, next((f / name for f in folders if (f / name).exists()), None))
        for name, read in readers.items()
    ]
    return [row for name, read, path in found if path is not None for row in _marked(name, read(path))]


def _marked(file: str, rows: Iterator[Row]) -> Iterator[Row]:
    """Rows of the files `new_*`, `blind_*` and `repeat_*` are kinds of their own.

    They were measured after the models were fitted: nothing is fitted on them.
    """
    mark = next((m for start, m in _MARKS.items() if file.startswith(start)), None)
    for row in rows:
        yield row if mark is None else replace(row, kind=f"{row.kind} {mark}")


NARROW: Final = " narrow"
_NARROW = 512


def _sized(kind: str, n: int, k: int) -> str:
    """Weights with a side under 512 are a class of their own.

    The call is launch and latency, and language models have none.
    """
    return f"{kind}{NARROW}" if min(n, k) < _NARROW else kind


def _gemm(kind: str, m: int, n: int, k: int, us: float, extra_us: float = 0.0, calls: int = 1) -> Row:
    """`calls`: how many were timed in a row, for the power limit."""
    product = Product(m, n, k)

    def predict(a: Accelerator) -> float:
        return gemm_ns(product, a, is_long(calls * product.flops, a)) + extra_us * 1000

    nbytes = 2.0 * (m * k + n * k + m * n)
    return Row(_sized(kind, n, k), f"{m}x{n}x{k}", m, us, product.flops, nbytes, predict, (m, n, k))


def _weight_only(m: int, n: int, k: int, us: float) -> Row:
    nbytes = 0.516 * n * k + 2.0 * (m * k + m * n)
    return Row(
        _sized("gemm w4a16", n, k),
        f"{m}x{n}x{k}",
        m,
        us,
        2.0 * m * n * k,
        nbytes,
        lambda a: weight_only_ns(m, n, k, a),
        (m, n, k),
    )


def _int8(m: int, n: int, k: int, us: float) -> Row:
    def predict(a: Accelerator) -> float:
        return gemm_ns(
            Product(m, n, k, 1.0, 1.0, matrix_speed=a.sm.macs_per_cycle_int8 / a.sm.macs_per_cycle_fp16), a
        )

    return Row(
        "gemm int8", f"{m}x{n}x{k}", m, us, m * n * k, 1.0 * (m * k + n * k + m * n), predict, (m, n, k)
    )


def _attention(shape: Attention, us: float) -> Row:
    kind = "attention decode" if shape.queries == 1 else "attention prefill"
    seen = (shape.keys - (shape.queries - 1) / 2) if shape.causal else shape.keys
    flops = 4.0 * shape.batch * shape.query_heads * shape.head_dim * shape.queries * seen
    nbytes = shape.kv_bytes + 4.0 * shape.batch * shape.queries * shape.query_heads * shape.head_dim
    name = (
        f"b{shape.batch} {shape.query_heads}/{shape.kv_heads}x{shape.head_dim} q{shape.queries}"
        f" kv{shape.keys}"
    )
    place = (shape.batch, shape.query_heads, shape.kv_heads, shape.queries, shape.keys)
    return Row(kind, name, shape.keys, us, flops, nbytes, lambda a: attention_ns(shape, a), place)


def _all_reduce(nbytes: float, devices: int, us: float, call: bool = True) -> Row:
    def predict(a: Accelerator) -> float:
        return all_reduce_ns(nbytes, devices, a, custom=call)

    return Row(
        "all-reduce" if call else "all-reduce (LLMCompass)",
        f"{nbytes:.0f} B on {devices}",
        int(nbytes),
        us,
        0.0,
        2 * (devices - 1) / devices * nbytes,
        predict,
    )


# ------------------------------------------------------------------------------------------------------- h200


def _json_lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def _ops(path: Path) -> Iterator[Row]:
    """`peaks_and_ops.jsonl` was measured in one process.

    Its elementwise kernels are compiled for one width at the first and for any from the second on.
    """
    first: dict[str, int] = {}
    ours = (
        path.name != "peaks_and_ops.jsonl"
    )  # by `measure_gpu`: a process for each model, many calls in a row
    for row in _json_lines(path):
        us = float(str(row["us"]))
        size = {k: int(str(v)) for k, v in row.items() if k not in ("kind", "what", "us", "gbps", "tflops")}
        if row["kind"] != "op":
            continue
        if row["what"] == "linear":
            yield _gemm("gemm bf16", size["m"], size["n"], size["k"], us, calls=_CALLS if ours else 1)
        elif row["what"] == "attention":
            yield _attention(
                Attention(
                    size["batch"],
                    size["q_heads"],
                    size["kv_heads"],
                    size["head_dim"],
                    size["q_len"],
                    size["kv_len"],
                ),
                us,
            )
        elif row["what"] == "add_rmsnorm":
            several = not ours and size["hidden"] != first.setdefault("norm", size["hidden"])
            yield _rowwise(
                "add+norm", size["tokens"], size["hidden"], 4, us, partial(add_norm_ns, any_width=several)
            )
        elif row["what"] == "silu_mul":
            several = not ours and size["inter"] != first.setdefault("silu", size["inter"])
            yield _rowwise(
                "silu*mul", size["tokens"], size["inter"], 3, us, partial(silu_mul_ns, any_width=several)
            )
        elif row["what"] == "rope":
            yield _rowwise(
                "rotation", size["tokens"], size["width"], 2, us, partial(rope_ns, any_width=False)
            )
        elif row["what"] == "copy":
            yield _rowwise("cache copy", size["tokens"], size["width"], 2, us, copy_ns)


def _rowwise(
    kind: str, rows: int, width: int, passes: int, us: float, model: Callable[[int, int, Accelerator], float]
) -> Row:
    return Row(
        kind, f"{rows}x{width}", rows, us, 0.0, 2.0 * passes * rows * width, lambda a: model(rows, width, a)
    )


def _collectives(path: Path) -> Iterator[Row]:
    for row in _json_lines(path):
        yield _all_reduce(float(str(row["bytes"])), int(str(row["world"])), float(str(row["us"])))


def _models(path: Path) -> Iterator[Row]:
    for row in _json_lines(path):
        model = MODELS[str(row["model"])]
        several = not path.name.startswith(tuple(_MARKS))
        devices, batch, tokens, past = (int(str(row[k])) for k in ("world", "batch", "tokens", "past"))
        step = Step(model, devices, batch, tokens, past, several)
        kind = "model decode" if step.tokens == 1 else "model prefill"
        name = f"{row['model']} x{step.devices} b{step.batch} t{step.tokens} past{step.past}"
        flops = 2.0 * step.rows * model.weights / step.devices
        yield Row(
            kind,
            name,
            step.rows,
            float(str(row["us"])),
            flops,
            2.0 * model.weights / step.devices,
            lambda a, s=step: step_ns(s, a),
        )


# ------------------------------------------------------------------------------------------------------- a100


def _dicts(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _a100_gemm(path: Path) -> Iterator[Row]:
    for row in _dicts(path):
        m, n, k, us = int(row["m"]), int(row["n"]), int(row["k"]), float(row["latency_ms"]) * 1000
        if row["gemm_dtype"] == "bfloat16":
            yield _gemm("gemm bf16", m, n, k, us)
        elif row["gemm_dtype"] == "int4_wo":
            yield _weight_only(m, n, k, us)


def _a100_prefill(path: Path) -> Iterator[Row]:
    for row in _dicts(path):
        heads, kv, length = int(row["num_heads"]), int(row["num_key_value_heads"]), int(row["isl"])
        yield _attention(
            Attention(int(row["batch_size"]), heads, kv, int(row["head_dim"]), length, length),
            float(row["latency_ms"]) * 1000,
        )


def _a100_decode(path: Path) -> Iterator[Row]:
    """Decode attention of the A100, whose collector's cache holds no values.

    (`CacheType.SELFKONLY` in its collect_attn.py.)  They are read from the keys' blocks, in every replay the
    same.
    """
    for row in _dicts(path):
        heads, kv, keys = (
            int(row["num_heads"]),
            int(row["num_key_value_heads"]),
            int(row["isl"]) + int(row["step"]),
        )
        shape = Attention(int(row["batch_size"]), heads, kv, int(row["head_dim"]), 1, keys, keys_alone=True)
        yield _attention(shape, float(row["latency_ms"]) * 1000)


def _a100_all_reduce(path: Path) -> Iterator[Row]:
    for row in _dicts(path):
        yield _all_reduce(
            2.0 * int(row["message_size"]), int(row["num_gpus"]), float(row["latency_ms"]) * 1000
        )


_PYTHON_MATMUL_US, _PYTHON_SOFTMAX_US, _PYTHON_NORM_US = (
    21.0,
    12.0,
    45.0,
)  # LLMCompass' launches, by its authors


def _llmcompass_matmul(path: Path) -> Iterator[Row]:
    for line in path.read_text().splitlines():
        m, n, k, ms = (part.strip() for part in line.split(",")[:4])
        yield _gemm(
            "gemm bf16 (LLMCompass)",
            int(m),
            int(k),
            int(n),
            float(ms.removesuffix("ms")) * 1000,
            _PYTHON_MATMUL_US - 2.5,
        )


def _llmcompass_norm(path: Path) -> Iterator[Row]:
    yield from _llmcompass_rows(path, "layernorm", norm_ns, _PYTHON_NORM_US)


def _llmcompass_softmax(path: Path) -> Iterator[Row]:
    yield from _llmcompass_rows(path, "softmax", softmax_ns, _PYTHON_SOFTMAX_US)


def _llmcompass_rows(
    path: Path, kind: str, model: Callable[[int, int, Accelerator], float], launch_us: float
) -> Iterator[Row]:
    """Rows, columns and G elements/s; a launch from Python in place of one in a graph."""
    for line in path.read_text().splitlines():
        rows, width, rate = line.split(",")
        m, n = int(rows), int(width)
        us = m * n / (float(rate) * 1e3)
        yield Row(
            kind,
            f"{m}x{n}",
            m,
            us,
            0.0,
            4.0 * m * n,
            lambda a, m=m, n=n: model(m, n, a) + (launch_us - 2.5) * 1000,
        )


def _llmcompass_all_reduce(path: Path) -> Iterator[Row]:
    for row in _dicts(path):
        yield _all_reduce(float(row["size_bytes"]), 4, float(row["measured_us"]), call=False)


_Part = tuple[float, float, Callable[[Accelerator], float]]  # operations, bytes, nanoseconds


def _llmcompass_layer(path: Path, tokens: int) -> Iterator[Row]:
    """A layer of GPT-3 175B (12,288 wide, 96 heads of 128) on 4 devices, 8 sequences.

    A prompt of 2048, or one token after 3071; seconds by part, one a line, and their sum.

    Scores and their products with the values are one product each over all heads; GELU is a stream.
    LLMCompass calls each part from Python.
    """
    hidden, heads, dim, sequences, devices = 12288, 24, 128, 8, 4
    rows, keys, own = sequences * tokens, 2048 if tokens > 1 else 3072, hidden // devices
    every = sequences * heads  # heads of all sequences

    def product(m: int, n: int, k: int) -> _Part:
        shape = Product(m, n, k)
        return (
            shape.flops,
            2.0 * (m * k + n * k + m * n),
            lambda a: gemm_ns(shape, a) + (_PYTHON_MATMUL_US - 2.5) * 1000,
        )

    def stream(elements: int, launch_us: float) -> _Part:
        return 0.0, 4.0 * elements, lambda a: stream_ns(4.0 * elements, a) + launch_us * 1000

    def by_row(
        model: Callable[[int, int, Accelerator], float], count: int, width: int, launch_us: float
    ) -> _Part:
        return 0.0, 4.0 * count * width, lambda a: model(count, width, a) + (launch_us - 2.5) * 1000

    def reduce() -> _Part:
        nbytes = 2.0 * rows * hidden
        return (
            0.0,
            2 * (devices - 1) / devices * nbytes,
            lambda a: all_reduce_ns(nbytes, devices, a, custom=False),
        )

    def attend(width: int, depth: int) -> _Part:
        """All heads against rows of their own: a token reads them, a prompt's are read from the caches."""
        return product(every * tokens, width, depth) if tokens > 1 else product(1, every * width, depth)

    parts = {
        "qkv": product(rows, 3 * own, hidden),
        "q k": attend(keys, dim),
        "p v": attend(dim, keys),
        "o": product(rows, hidden, own),
        "up": product(rows, 4 * own, hidden),
        "down": product(rows, hidden, 4 * own),
        "softmax": by_row(softmax_ns, every * tokens, keys, _PYTHON_SOFTMAX_US),
        "attention norm": by_row(norm_ns, rows, hidden, _PYTHON_NORM_US),
        "mlp norm": by_row(norm_ns, rows, hidden, _PYTHON_NORM_US),
        "gelu": stream(rows * 4 * own, _PYTHON_NORM_US),
        "attention all-reduce": reduce(),
        "mlp all-reduce": reduce(),
    }
    measured = [float(text) * 1e6 for text in path.read_text().split()]
    phase = "prefill" if tokens > 1 else "decode"
    for (name, (flops, nbytes, predict)), us in zip(parts.items(), measured, strict=True):
        yield Row(f"GPT-3 layer {phase}, parts (LLMCompass)", name, rows, us, flops, nbytes, predict)
    flops, nbytes = sum(part[0] for part in parts.values()), sum(part[1] for part in parts.values())
    yield Row(
        f"GPT-3 layer {phase} (LLMCompass)",
        "layer",
        rows,
        sum(measured),
        flops,
        nbytes,
        lambda a: sum(part[2](a) for part in parts.values()),
    )


# ------------------------------------------------------------------------------------------------------- orin


def _logs(path: Path) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(path.read_text())
    return found


def _sizes(row: dict[str, object], *names: str) -> list[int]:
    return [int(str(row[n])) for n in names]


def _us(row: dict[str, object]) -> float:
    return float(str(row["min_runtime"])) * 1000


def _orin_gemm(path: Path) -> Iterator[Row]:
    for row in _logs(path):
        m, n, k = _sizes(row, "M", "N", "K")
        yield _gemm("gemm f16", m, n, k, _us(row)) if row["precision"] == "fp16" else _int8(m, n, k, _us(row))


def _orin_marlin(path: Path) -> Iterator[Row]:
    for row in _logs(path):
        m, n, k = _sizes(row, "M", "N", "K")
        yield _weight_only(m, n, k, _us(row))


def _orin_attention(path: Path) -> Iterator[Row]:
    for row in _logs(path):
        q, kv, heads, kv_heads, dim = _sizes(
            row, "seq_len_q", "seq_len_kv", "num_heads_q", "num_heads_kv", "head_dim"
        )
        if row["num_splits"] == 1 and not row["pack_gqa"]:
            yield _attention(Attention(1, heads, kv_heads, dim, q, kv, bool(row["is_causal"])), _us(row))


def _orin_norm(path: Path) -> Iterator[Row]:
    for row in _logs(path):
        m, n = _sizes(row, "M", "N")
        yield _rowwise("layernorm", m, n, 2, _us(row), norm_ns)

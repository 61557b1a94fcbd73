"""`python -m tyir.tools.gpu.measure`: time a decoder's kernels and steps on the GPUs at hand.

Kernels, all-reduce and whole-model steps, as JSON lines that `validate` reads.

The recipe of `tests/data/h200`: bf16, random weights, PyTorch; everything in CUDA graphs; the median of
replays between two events.  A step is, per layer: add+norm, qkv, rope, two cache copies, attention, o
(all-reduce), add+norm, gate_up, silu * mul, down (all-reduce); then a norm and the head on each sequence's
last token.  Products are `F.linear` (cuBLAS), attention is `F.scaled_dot_product_attention` (cuDNN on this
machine), the others are one `torch.compile` kernel each, all-reduce is NCCL. Kernels are measured over
buffers that rotate beyond the L2.  Nothing of tyir but the models' sizes is used.

    python -m tyir.tools.gpu.measure --kernels --models llama3-8b qwen2.5-7b --output h200.jsonl
    torchrun --standalone --nproc-per-node 4 -m tyir.tools.gpu.measure --collectives --models llama3-70b --output h200x4.jsonl
"""  # noqa: E501

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from tyir.runtime_sim.gpu.steps import MODELS, Model
from tyir.tools.cli import ToolParser, run_tool

__all__ = ["main"]

_ROTATE: Final = 300_000_000  # bytes, several times any L2
_LARGEST_BYTES: Final = 1 << 26
# batch, new tokens, tokens in the cache
_STEPS: Final = (
    (1, 1, 127), (1, 1, 1023), (1, 1, 4095), (1, 1, 16383), (8, 1, 1023), (32, 1, 1023),
    (1, 128, 0), (1, 512, 0), (1, 2048, 0), (1, 8192, 0),
)  # fmt: skip
_ROWS: Final = (1, 2, 8, 32, 128, 256, 512, 1024, 4096)


@run_tool
def main(argv: Sequence[str]) -> int:
    """Entry point.  Under `torchrun` every process is one GPU; the first one writes."""
    import torch

    args = _parser().parse_args(argv)
    rank, world = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    torch.cuda.set_device(rank)
    torch.manual_seed(rank)
    if world > 1:
        torch.distributed.init_process_group("nccl", device_id=torch.device("cuda", rank))
    file = args.output.open("a") if rank == 0 else None
    for row in _rows(args, world):
        if file is not None:
            file.write(json.dumps(row) + "\n")
            file.flush()
    if world > 1:
        torch.distributed.destroy_process_group()
    return 0


def _rows(args: argparse.Namespace, world: int) -> Iterator[dict[str, Any]]:
    if args.kernels:
        yield from _peaks()
        yield from _kernels([MODELS[n] for n in args.models], args.shards)
    if args.collectives:
        yield from _collectives(world)
    for name in args.models if args.steps else ():
        yield from _model_steps(name, world)


def _parser() -> argparse.ArgumentParser:
    parser = ToolParser(
        prog="measure_gpu",
        description=(
            "Measure kernels, all-reduce and whole-model steps on this machine's GPUs (PyTorch, CUDA)."
        ),
    )
    parser.add_argument(
        "--models",
        nargs="+",
        choices=list(MODELS),
        default=[],
        metavar="MODEL",
        help=f"of {', '.join(MODELS)}",
    )
    parser.add_argument("--steps", action="store_true", help="whole steps of the models")
    parser.add_argument(
        "--kernels", action="store_true", help="the kernels of the models' layers, one by one"
    )
    parser.add_argument(
        "--shards", nargs="+", type=int, default=[1], help="for --kernels: how many devices share a layer"
    )
    parser.add_argument(
        "--collectives", action="store_true", help="all-reduce over the processes that torchrun started"
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON lines, appended")
    return parser


# ----------------------------------------------------------------------------------------------------- timing


def _time_us(run: Callable[[], object], calls: int = 1) -> float:
    """Microseconds of one call: `run` makes `calls` of them.

    It is captured once, replayed, and the median taken.  Devices are aligned before every replay.
    """
    import torch

    aligned = torch.zeros(1, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL has threads of its own
        run()
    times: list[float] = []
    graph.replay()
    torch.cuda.synchronize()
    while len(times) < 7 or (len(times) < 25 and sum(times) < 200_000):
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(aligned)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1000)
        if torch.distributed.is_initialized():  # every device makes the same number of replays
            times[-1] = _of_first(times[-1])
    return statistics.median(times) / calls


def _of_first(value: float) -> float:
    import torch

    shared = torch.tensor([value], device="cuda", dtype=torch.float64)
    torch.distributed.broadcast(shared, 0)
    return float(shared.item())


def _rotated_us(make: Callable[[], Callable[[], object]], nbytes: float, most: int = 48) -> float:
    """Microseconds of one call over as many sets of buffers as exceed the L2.

    `make` makes a call with buffers of its own.
    """
    calls = [make() for _ in range(max(2, min(most, int(_ROTATE / nbytes))))]
    rounds = max(1, 24 // len(calls))

    def run() -> None:
        for _ in range(rounds):
            for call in calls:
                call()

    return _time_us(run, rounds * len(calls))


# ------------------------------------------------------------------------------------- the kernels of a layer


@dataclass(frozen=True)
class _Kernels:
    """The elementwise kernels, each compiled to one."""

    add_norm: Any
    norm: Any
    rope: Any
    silu_mul: Any


def _compiled() -> _Kernels:
    import torch
    import torch.nn.functional as functional

    def norm(x: Any, weight: Any) -> Any:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight

    def add_norm(x: Any, residual: Any, weight: Any) -> Any:
        total = x + residual
        return norm(total, weight), total

    def rope(x: Any, cosine: Any, sine: Any) -> Any:
        first, second = x.chunk(2, -1)
        return x * cosine + torch.cat((-second, first), -1) * sine

    def silu_mul(gate_up: Any) -> Any:
        gate, up = gate_up.chunk(2, -1)
        return functional.silu(gate) * up

    return _Kernels(*(torch.compile(f) for f in (add_norm, norm, rope, silu_mul)))


def _random(*shape: int) -> Any:
    import torch

    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def _peaks() -> Iterator[dict[str, Any]]:
    import torch

    a, b = _random(1 << 29), _random(1 << 29)
    size = a.numel() * 2
    one = torch.zeros(1, device="cuda")
    runs: dict[str, tuple[Callable[[], object], int]] = {
        "read": (lambda: torch.sum(a.view(torch.float32)), size),
        "write": (lambda: b.fill_(1.0), size),
        "add": (lambda: torch.add(a, 1.0, out=b), 2 * size),
        "copy": (lambda: b.copy_(a), 2 * size),
    }
    for what, (run, nbytes) in runs.items():
        us = _time_us(run)
        yield {"kind": "peak", "what": what, "bytes": nbytes, "us": us, "gbps": nbytes / us / 1000}
    yield {
        "kind": "peak",
        "what": "empty-kernel",
        "us": _time_us(lambda: [one.add_(1) for _ in range(40)], 40),
    }


def _kernels(models: Sequence[Model], shards: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Products, attention and elementwise kernels of the models' layers, each shape once."""
    for k, n in sorted({shape for model in models for s in shards for shape in _products(model, s)}):
        for rows in _ROWS:
            yield _product(rows, k, n)
    heads = sorted(
        {(m.query_heads // s, max(1, m.kv_heads // s), m.head_dim) for m in models for s in shards}
    )
    for query, kv, dim in heads:
        for batch in (1, 8):
            for keys in (128, 512, 2048, 8192, 32768):
                yield _attention(batch, query, kv, dim, 1, keys)
                if batch * keys <= 16384:
                    yield _attention(batch, query, kv, dim, keys, keys)
    for model in models:
        for s in shards:
            yield from _elementwise(model, s)


def _products(model: Model, shards: int) -> list[tuple[int, int]]:
    """(k, n) of a layer's products."""
    width, inter = model.query_heads // shards * model.head_dim, model.intermediate // shards
    qkv = width + 2 * max(1, model.kv_heads // shards) * model.head_dim
    return [(model.hidden, qkv), (width, model.hidden), (model.hidden, 2 * inter), (inter, model.hidden)]


def _product(rows: int, k: int, n: int) -> dict[str, Any]:
    import torch.nn.functional as functional

    x = _random(rows, k)

    def make() -> Callable[[], object]:
        weight = _random(n, k) * 0.02
        return lambda: functional.linear(x, weight)

    return {"kind": "op", "what": "linear", "m": rows, "k": k, "n": n, "us": _rotated_us(make, 2.0 * n * k)}


def _attention(batch: int, query: int, kv: int, dim: int, length: int, keys: int) -> dict[str, Any]:
    import torch.nn.functional as functional

    def make() -> Callable[[], object]:
        q, k, v = (
            _random(batch, query, length, dim),
            _random(batch, kv, keys, dim),
            _random(batch, kv, keys, dim),
        )
        return lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=length > 1, enable_gqa=True)

    us = _rotated_us(make, 4.0 * batch * dim * (kv * keys + query * length), 16)
    shape = {
        "batch": batch,
        "q_heads": query,
        "kv_heads": kv,
        "head_dim": dim,
        "q_len": length,
        "kv_len": keys,
    }
    return {"kind": "op", "what": "attention", **shape, "us": us}


def _elementwise(model: Model, shards: int) -> Iterator[dict[str, Any]]:
    """The kernels between the products, compiled for this model alone.

    A second width would make PyTorch compile them for any, which is slower.
    """
    import torch

    torch._dynamo.reset()
    kernels = _compiled()
    hidden, inter, dim = model.hidden, model.intermediate // shards, model.head_dim
    heads, kv = model.query_heads // shards, max(1, model.kv_heads // shards)
    for rows in (1, 8, 32, 128, 512, 2048, 8192):

        def norm(rows: int = rows) -> Callable[[], object]:
            return partial(kernels.add_norm, _random(rows, hidden), _random(rows, hidden), _random(hidden))

        def silu(rows: int = rows) -> Callable[[], object]:
            return partial(kernels.silu_mul, _random(rows, 2 * inter))

        def rope(rows: int = rows) -> Callable[[], object]:
            mixed = _random(1, rows, heads + 2 * kv, dim)
            return partial(
                kernels.rope, mixed[:, :, : heads + kv], _random(rows, 1, dim), _random(rows, 1, dim)
            )

        def copy(rows: int = rows) -> Callable[[], object]:
            return partial(
                _random(1, kv, rows + 1024, dim)[:, :, 1024:].copy_,
                _random(1, rows, heads + 2 * kv, dim)[:, :, heads + kv :].transpose(1, 2),
            )

        yield {
            "kind": "op",
            "what": "add_rmsnorm",
            "tokens": rows,
            "hidden": hidden,
            "us": _rotated_us(norm, 8.0 * rows * hidden),
        }
        yield {
            "kind": "op",
            "what": "silu_mul",
            "tokens": rows,
            "inter": inter,
            "us": _rotated_us(silu, 6.0 * rows * inter),
        }
        yield {
            "kind": "op",
            "what": "rope",
            "tokens": rows,
            "width": (heads + kv) * dim,
            "us": _rotated_us(rope, 4.0 * rows * (heads + kv) * dim),
        }
        yield {
            "kind": "op",
            "what": "copy",
            "tokens": rows,
            "width": kv * dim,
            "us": _rotated_us(copy, 4.0 * rows * kv * dim),
        }


def _collectives(world: int) -> Iterator[dict[str, Any]]:
    """All-reduce of 2 KiB to 64 MiB, ten in a graph."""
    import torch

    size = 2048
    while size <= _LARGEST_BYTES:
        data = _random(size // 2) * 0

        def run(data: Any = data) -> None:
            for _ in range(10):
                torch.distributed.all_reduce(data)

        yield {
            "kind": "collective",
            "what": "all_reduce",
            "world": world,
            "bytes": size,
            "us": _time_us(run, 10),
        }
        size *= 2


# ----------------------------------------------------------------------------------------------- whole models


class _Decoder:
    """One device's part of a decoder.

    Heads and intermediate columns are split over `world` devices, every device has the whole head.
    """

    def __init__(self, model: Model, world: int) -> None:
        self.model, self.world = model, world
        self.heads, self.kv = model.query_heads // world, max(1, model.kv_heads // world)
        self.layers = [
            [_random(n, k) * 0.02 for k, n in _products(model, world)] for _ in range(model.layers)
        ]
        self.head = _random(model.vocabulary, model.hidden) * 0.02
        self.weight = _random(model.hidden)
        self.kernels = _compiled()

    def step(self, x: Any, caches: Sequence[tuple[Any, Any]], past: int, angles: tuple[Any, Any]) -> Any:
        """Hidden states [batch, tokens, hidden] to the logits of each sequence's last token."""
        import torch
        import torch.nn.functional as functional

        batch, tokens, _ = x.shape
        residual, length, dim = x, past + tokens, self.model.head_dim
        for (qkv, o, gate_up, down), (keys, values) in zip(self.layers, caches):
            hidden, residual = self.kernels.add_norm(x, residual, self.weight)
            mixed = functional.linear(hidden, qkv).view(batch, tokens, self.heads + 2 * self.kv, dim)
            turned = self.kernels.rope(mixed[:, :, : self.heads + self.kv], *angles)
            keys[:, :, past:length].copy_(turned[:, :, self.heads :].transpose(1, 2))
            values[:, :, past:length].copy_(mixed[:, :, self.heads + self.kv :].transpose(1, 2))
            queries = turned[:, :, : self.heads].transpose(1, 2)
            seen = functional.scaled_dot_product_attention(
                queries, keys[:, :, :length], values[:, :, :length], is_causal=tokens > 1, enable_gqa=True
            )
            x = functional.linear(seen.transpose(1, 2).reshape(batch, tokens, -1), o)
            self._sum(x)
            hidden, residual = self.kernels.add_norm(x, residual, self.weight)
            x = functional.linear(self.kernels.silu_mul(functional.linear(hidden, gate_up)), down)
            self._sum(x)
        last = self.kernels.norm(x[:, -1], self.weight)
        return torch.nn.functional.linear(last, self.head)

    def _sum(self, x: Any) -> None:
        import torch

        if self.world > 1:
            torch.distributed.all_reduce(x)


def _model_steps(name: str, world: int) -> Iterator[dict[str, Any]]:
    import torch

    model = MODELS[name]
    torch._dynamo.reset()  # as in a process of its own
    decoder = _Decoder(model, world)
    for batch, tokens, past in _STEPS:
        caches = [
            tuple(_random(batch, decoder.kv, past + tokens, model.head_dim) for _ in range(2))
            for _ in range(model.layers)
        ]
        angles = (_random(tokens, 1, model.head_dim), _random(tokens, 1, model.head_dim))
        x = _random(batch, tokens, model.hidden)
        us = _time_us(partial(decoder.step, x, caches, past, angles))
        yield {
            "kind": "model",
            "model": name,
            "world": world,
            "batch": batch,
            "tokens": tokens,
            "past": past,
            "us": us,
        }
        del caches
        torch.cuda.empty_cache()


if __name__ == "__main__":
    raise SystemExit(main())

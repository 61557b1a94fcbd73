"""A step of a whole model, added up from the kernel models: nothing here is fitted.

Per layer: add+norm, qkv, rope, two cache copies, attention, o (all-reduce), add+norm, gate_up, silu * mul, down (all-reduce); at the end a norm and the head on the
last token of each sequence.  Tensor parallel over `devices`: heads and intermediate columns are split; every device has the whole head (the recipe gathers nothing).
Kernels run one after another in a graph, so their times add; a step with much matrix work runs at the sustained clock, as its kernels follow each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tyir.runtime_sim.kernels.allreduce import all_reduce_ns
from tyir.runtime_sim.kernels.attention import Attention, attention_ns
from tyir.runtime_sim.kernels.gemm import Product, gemm_ns
from tyir.runtime_sim.kernels.rowwise import add_norm_ns, copy_ns, norm_ns, rope_ns, silu_mul_ns
from tyir.targets.accelerator import Accelerator

__all__ = ["MODELS", "Model", "Step", "kernels", "step_ns"]


@dataclass(frozen=True, slots=True)
class Model:
    """A decoder of identical layers, f16 weights."""

    layers: int
    hidden: int
    query_heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int

    @property
    def weights(self) -> int:
        """Weights that a step reads: layers and head, embedding not counted.  Example (llama3-8b): 32 * 218,103,808 + 525,336,576 = 7,504,658,432."""
        attention = self.hidden * self.head_dim * (2 * self.query_heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate) + self.hidden * self.vocabulary


# Sizes as in the models' config.json.
MODELS: Final = {
    "qwen2-1.5b": Model(28, 1536, 12, 2, 128, 8960, 151936),
    "qwen2.5-7b": Model(28, 3584, 28, 4, 128, 18944, 152064),
    "qwen2.5-14b": Model(48, 5120, 40, 8, 128, 13824, 152064),
    "qwen2.5-32b": Model(64, 5120, 40, 8, 128, 27648, 152064),
    "qwen3-8b": Model(36, 4096, 32, 8, 128, 12288, 151936),
    "llama3.2-3b": Model(28, 3072, 24, 8, 128, 8192, 128256),
    "llama3-8b": Model(32, 4096, 32, 8, 128, 14336, 128256),
    "llama3-70b": Model(80, 8192, 64, 8, 128, 28672, 128256),
}


@dataclass(frozen=True, slots=True)
class Step:
    """`batch` sequences, each with `past` tokens in the cache and `tokens` new ones."""

    model: Model
    devices: int
    batch: int
    tokens: int
    past: int

    @property
    def rows(self) -> int:
        return self.batch * self.tokens


def kernels(step: Step, machine: Accelerator, sustained: bool) -> tuple[dict[str, float], dict[str, float]]:
    """Nanoseconds of each kernel of a layer, and of what follows the layers."""
    model, rows, devices = step.model, step.rows, step.devices
    heads, kv = model.query_heads // devices, max(1, model.kv_heads // devices)
    width, inter = heads * model.head_dim, model.intermediate // devices

    def linear(n: int, k: int, m: int = rows) -> float:
        return gemm_ns(Product(m, n, k), machine, sustained)

    shape = Attention(step.batch, heads, kv, model.head_dim, step.tokens, step.past + step.tokens)
    reduce = all_reduce_ns(2.0 * rows * model.hidden, devices, machine)
    layer = {
        "attention norm": add_norm_ns(rows, model.hidden, machine),
        "qkv": linear(width + 2 * kv * model.head_dim, model.hidden),
        "rope": rope_ns(rows, width + kv * model.head_dim, machine),
        "cache copies": 2 * copy_ns(rows, kv * model.head_dim, machine),
        "attention": attention_ns(shape, machine, sustained),
        "o": linear(model.hidden, width),
        "o all-reduce": reduce,
        "mlp norm": add_norm_ns(rows, model.hidden, machine),
        "gate_up": linear(2 * inter, model.hidden),
        "silu*mul": silu_mul_ns(rows, inter, machine),
        "down": linear(model.hidden, inter),
        "down all-reduce": reduce,
    }
    end = {"norm": norm_ns(step.batch, model.hidden, machine), "head": linear(model.vocabulary, model.hidden, step.batch)}
    return layer, end


def step_ns(step: Step, machine: Accelerator) -> float:
    """Nanoseconds of the step."""
    burst = machine.sm_flops_per_ns * machine.sm.count * machine.power.burst_share
    work = 2.0 * step.rows * step.model.weights / step.devices
    layer, end = kernels(step, machine, work / burst > machine.power.window_us * 1000)
    return step.model.layers * sum(layer.values()) + sum(end.values())

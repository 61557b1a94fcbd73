"""A step of a whole model, added up from the kernel models: nothing here is fitted.

Per layer: add+norm, qkv, rope, two cache copies, attention, o (all-reduce), add+norm, gate_up, silu * mul,
down (all-reduce); at the end a norm and the head on the last token of each sequence.  Tensor parallel over
`devices`: heads and intermediate columns are split; every device has the whole head (the recipe gathers
nothing). Kernels run one after another in a graph, so their times add; a step with much matrix work runs at
the sustained clock, as its kernels follow each other.

The sustained clock is what a power limit leaves when there is always work.  While a device waits for its
links it draws little, and the budget of that time is spent by the other kernels: power goes with the clock's
third power (frequency times voltage squared, the two in proportion), so that the clock is the sustained one
by (the share of the time in which the device works)^(-1/3), at most the burst's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tyir.diagnostics import Diagnostic, TyirError, did_you_mean
from tyir.runtime_sim.gpu.accelerator import Accelerator
from tyir.runtime_sim.gpu.allreduce import all_reduce_ns
from tyir.runtime_sim.gpu.attention import Attention, attention_ns
from tyir.runtime_sim.gpu.gemm import Product, gemm_ns, is_long
from tyir.runtime_sim.gpu.rowwise import add_norm_ns, copy_ns, norm_ns, rope_ns, silu_mul_ns
from tyir.text.json_files import read_json_object

__all__ = ["MODELS", "Model", "Step", "kernels", "model_of", "step_ns"]

_MOST: Final = 2**31 - 1  # of anything that is counted
_MOST_DEVICES: Final = 1 << 16  # that are looked at for a number that divides a model


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
        """Weights that a step reads: layers and head, embedding not counted.

        Example (llama3-8b): 32 * 218,103,808 + 525,336,576 = 7,504,658,432.
        """
        attention = self.hidden * self.head_dim * (2 * self.query_heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate) + self.hidden * self.vocabulary


# Sizes as in the models' config.json.
MODELS: Final = {
    "qwen2-1.5b": Model(28, 1536, 12, 2, 128, 8960, 151936),
    "qwen2.5-7b": Model(28, 3584, 28, 4, 128, 18944, 152064),
    "qwen2.5-14b": Model(48, 5120, 40, 8, 128, 13824, 152064),
    "qwen2.5-32b": Model(64, 5120, 40, 8, 128, 27648, 152064),
    "qwen2.5-3b": Model(36, 2048, 16, 2, 128, 11008, 151936),
    "qwen2.5-72b": Model(80, 8192, 64, 8, 128, 29568, 152064),
    "phi3-mini": Model(32, 3072, 32, 32, 96, 8192, 32064),
    "mistral-nemo-12b": Model(40, 5120, 32, 8, 128, 14336, 131072),
    "llama3.2-1b": Model(16, 2048, 32, 8, 64, 8192, 128256),
    "qwen3-8b": Model(36, 4096, 32, 8, 128, 12288, 151936),
    "llama3.2-3b": Model(28, 3072, 24, 8, 128, 8192, 128256),
    "llama3-8b": Model(32, 4096, 32, 8, 128, 14336, 128256),
    "llama3-70b": Model(80, 8192, 64, 8, 128, 28672, 128256),
}


def model_of(name_or_path: str) -> Model:
    """A model of `MODELS` by name, or one described by a Hugging Face `config.json`.

    `TyirError` for unknown names and for keys that the file lacks, all at once.
    """
    path = Path(name_or_path)
    if path.suffix != ".json":
        if name_or_path not in MODELS:
            help = (
                did_you_mean(name_or_path, MODELS)
                or f"known: {', '.join(MODELS)}; or the path of a config.json"
            )
            raise TyirError(f"there is no model '{name_or_path}'", help=help)
        return MODELS[name_or_path]
    return _from_config(read_json_object(path, "give the config.json of a Llama-like model"), str(path))


def _from_config(config: Mapping[str, Any], where: str) -> Model:
    keys = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
    given = {k: config.get(k) for k in (*keys, "num_key_value_heads", "head_dim")}
    optional = {k for k, value in given.items() if k not in keys and not value}
    if missing := [k for k in keys if given[k] is None]:
        raise TyirError([Diagnostic(f"the configuration has no '{k}'", where=where) for k in missing])
    wrong = [k for k, v in given.items() if k not in optional and not (type(v) is int and 0 < v <= _MOST)]
    if wrong:
        message = "'{}' is {}, a whole number from 1 to 2^31 - 1 is needed"
        raise TyirError([Diagnostic(message.format(k, str(given[k])[:40]), where=where) for k in wrong])
    if config.get("num_experts") or config.get("num_local_experts"):
        raise TyirError(
            "mixtures of experts are not modelled",
            where=where,
            help="the recipe of steps.py is a dense decoder's",
        )
    layers, hidden, heads, intermediate, vocabulary = (config[k] for k in keys)
    kv = config.get("num_key_value_heads") or heads
    return Model(
        layers, hidden, heads, kv, config.get("head_dim") or hidden // heads, intermediate, vocabulary
    )


@dataclass(frozen=True, slots=True)
class Step:
    """`batch` sequences, each with `past` tokens in the cache and `tokens` new ones.

    `any_width`: elementwise kernels are compiled for any width, as in a process that has run other models too
    (see `rowwise`); False: for this model alone.
    """

    model: Model
    devices: int
    batch: int
    tokens: int
    past: int
    any_width: bool = True

    def __post_init__(self) -> None:
        """`TyirError` for sizes that are not positive, and for devices that do not divide the model.

        They must divide its heads and columns.
        """
        problems = [
            f"{n} = {v}: must be at least {least}" if v < least else f"{n} = {v}: must be at most {_MOST}"
            for n, v, least in (
                ("devices", self.devices, 1),
                ("batch", self.batch, 1),
                ("tokens", self.tokens, 1),
                ("past", self.past, 0),
            )
            if not least <= v <= _MOST
        ]
        for name in ("query_heads", "intermediate") if not problems else ():
            size = getattr(self.model, name)
            if size % self.devices:
                near = max(d for d in range(1, min(self.devices, _MOST_DEVICES) + 1) if size % d == 0)
                problems.append(
                    f"{size} {name} cannot be split over {self.devices} devices: {near} devices divide them"
                )
        if problems:
            raise TyirError([Diagnostic(p) for p in problems])

    @property
    def rows(self) -> int:
        return self.batch * self.tokens


Times = tuple[dict[str, float], dict[str, float]]
_POWER: Final = 3  # of the clock
_ROUNDS: Final = 4  # until clock and times agree


def kernels(step: Step, machine: Accelerator) -> Times:
    """Nanoseconds of each kernel of a layer, and of what follows the layers."""
    if not is_long(2.0 * step.rows * step.model.weights / step.devices, machine):
        return _kernels(step, machine, sustained=False)
    times, limit = _kernels(step, machine, sustained=True), machine.power.sustained_share
    for _ in range(_ROUNDS if step.devices > 1 else 0):
        share = min(limit * _working_share(step, times) ** (-1 / _POWER), machine.power.burst_share)
        times = _kernels(step, machine.with_values({"power.sustained_share": share}), sustained=True)
    return times


def _working_share(step: Step, times: Times) -> float:
    """Which part of the step a device does not wait for its links.

    Example: two all-reduces of 10 us in layers of 100 us, nothing else: 0.8.
    """
    links = step.model.layers * sum(ns for name, ns in times[0].items() if name.endswith("all-reduce"))
    return 1 - links / _total(step, times)


def _total(step: Step, times: Times) -> float:
    layer, end = times
    return step.model.layers * sum(layer.values()) + sum(end.values())


def _kernels(step: Step, machine: Accelerator, sustained: bool) -> Times:
    model, rows, devices = step.model, step.rows, step.devices
    heads, kv = model.query_heads // devices, max(1, model.kv_heads // devices)
    width, inter = heads * model.head_dim, model.intermediate // devices

    def linear(n: int, k: int, m: int = rows) -> float:
        return gemm_ns(Product(m, n, k), machine, sustained)

    shape = Attention(step.batch, heads, kv, model.head_dim, step.tokens, step.past + step.tokens)
    reduce = all_reduce_ns(2.0 * rows * model.hidden, devices, machine)
    layer = {
        "attention norm": add_norm_ns(rows, model.hidden, machine, step.any_width),
        "qkv": linear(width + 2 * kv * model.head_dim, model.hidden),
        "rope": rope_ns(rows, width + kv * model.head_dim, machine, step.any_width),
        "cache copies": 2 * copy_ns(rows, kv * model.head_dim, machine),
        "attention": attention_ns(shape, machine, sustained),
        "o": linear(model.hidden, width),
        "o all-reduce": reduce,
        "mlp norm": add_norm_ns(rows, model.hidden, machine, step.any_width),
        "gate_up": linear(2 * inter, model.hidden),
        "silu*mul": silu_mul_ns(rows, inter, machine, step.any_width),
        "down": linear(model.hidden, inter),
        "down all-reduce": reduce,
    }
    end = {
        "norm": norm_ns(step.batch, model.hidden, machine, step.any_width),
        "head": linear(model.vocabulary, model.hidden, step.batch),
    }
    return layer, end


def step_ns(step: Step, machine: Accelerator) -> float:
    """Nanoseconds of the step."""
    return _total(step, kernels(step, machine))

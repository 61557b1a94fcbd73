"""Does a folder of artifacts compute what the model computes?

Three questions, each asked with the same prompts:

* logits: at every position, the artifacts' logits against Hugging Face in fp32 on the same (de-quantised) weights, by direction and by size;
* tokens: at every position, whether greedy decoding takes the token Hugging Face takes (positions are fed Hugging Face's own tokens, so one difference
  does not hide the next; a difference counts as a tie when Hugging Face's own preference is smaller than the numerical error there);
* layers: the hidden state after every decoder layer.

When something differs, `tyir.tools.verify.locate` finds the first op that is off.
"""  # noqa: E501

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np
import numpy.typing as npt

from tyir.artifacts.dual_chunk import DualChunk
from tyir.artifacts.long_rope import LongRope
from tyir.artifacts.rope_scaling import scaled_config
from tyir.artifacts.vision import ImageSize
from tyir.attributes import IntegerAttr
from tyir.diagnostics import TyirError
from tyir.dialects.builtin import Module
from tyir.dialects.func import Call, Func
from tyir.dialects.ty import GetGlobal, QuantizedLinear, Slice, Take, Transpose, dequantize, tensor_type
from tyir.execution.constexpr import ConstantExpressions, expression_ops
from tyir.execution.entry_points import alias_of
from tyir.execution.weights import CheckpointReader, checkpoint_of
from tyir.interpreter import Interpreter, lookup_symbol
from tyir.ir import Op, Value
from tyir.layers import path_of
from tyir.manifest import BuildOptions
from tyir.passes.pipelines import reference_pipeline
from tyir.pipeline import PassContext, run_pipeline
from tyir.runtime_sim.session.chunks import Chunk
from tyir.runtime_sim.session.sampling import logsumexp
from tyir.runtime_sim.session.session import Session

if TYPE_CHECKING:
    from tyir.frontends.plugin import ModelPlugin

_SMALL: Final = 50_000_000  # parameters
_FLAT: Final = 1e-5  # what logits of one position differ by that are the same, in their size

__all__ = [
    "PROMPTS",
    "LayerStates",
    "PromptResult",
    "Reference",
    "check_prompt",
    "cosine",
    "dense_model",
    "reference_module",
    "rope_positions",
    "scale_model",
    "size_ratio",
    "tower_module",
]

Array = npt.NDArray[Any]
_T = TypeVar("_T")

PROMPTS: Final = (
    "The old house stood at the end of",
    "She looked at him for a moment, and then",
    "It was a cold morning in the month of November",
    "\"I do not know,\" said the captain,",
    "There was no doubt in his mind that the",
    "When the carriage stopped at the door, Mr.",
    "In the evening they walked along the river and talked about",
    "He had never before",
)  # fmt: skip


def cosine(a: Array, b: Array) -> float:
    """Cosine of two tensors as vectors; 1 when both are zero, 0 when one is or when either holds NaN."""
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    norm = float(np.linalg.norm(x) * np.linalg.norm(y))
    if norm == 0:
        return float(not x.any() and not y.any())
    value = float(x @ y) / norm
    return value if np.isfinite(value) else 0.0


def size_ratio(a: Array, b: Array) -> float:
    """The norm of `a` in that of `b`, which a cosine does not see: 1 when both are zero, infinite when `b`
    alone is or when either holds NaN.
    """
    x, y = (float(np.linalg.norm(t.astype(np.float64))) for t in (a, b))
    if y == 0 or not np.isfinite(x / y):
        return 1.0 if x == y == 0 else float("inf")
    return x / y


def cosines(a: Array, b: Array) -> npt.NDArray[np.float64]:
    """Cosine row by row."""
    return np.array([cosine(x, y) for x, y in zip(a, b)])


def _is_flat(logits: Array) -> bool:
    """Whether logits [N, V] are the same for all tokens, but for rounding, at each position: a cosine of such
    rows is 1 whatever the model is.
    """
    spread = logits.max(axis=1) - logits.min(axis=1)
    return bool((spread <= _FLAT * np.abs(logits).max(axis=1)).all())


# ---------------------------------------------------------------------------------------------- the reference


class Reference:
    """Hugging Face in fp32, with the artifacts' weights.

    Those of the checkpoint, or what quantisation made of them.

    Rotary frequencies that change with the prompt's length are those of a full cache, as in the artifacts; of
    models with two tables those of the length that is compared (`take_length`).
    `plugin` is the one they were compiled with, `rope_scaling` what they were imported with.
    """

    reads_plainly = True  # transformers' own class of a model of text reads a folder that is not quantised

    def __init__(
        self,
        folder: Path,
        options: BuildOptions,
        plugin: ModelPlugin | None = None,
        base: Path | None = None,
        rope_scaling: str | None = None,
    ) -> None:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        from tyir.frontends.torch_export import freeze_rope

        logging.disable_progress_bar()
        self.folder = folder
        self.base = base
        if plugin is None and self.reads_plainly and _is_plain(folder, base):
            self.model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
            ).eval()
        else:
            self.model = dense_model(folder, plugin, base)
        if rope_scaling is not None:
            scale_model(self.model, rope_scaling)
        freeze_rope(self.model, options.max_kv)
        self._positions = options.max_kv
        if options.weights == "awq":
            raise TyirError(
                "the artifacts' weights were scaled and quantised with an AWQ table, which the checkpoint's"
                " were not",
                help="compare with the checkpoint that was written with the same table",
            )
        if options.weights == "int4":
            self._replace_weights(options, plugin)

    def _replace_weights(self, options: BuildOptions, plugin: ModelPlugin | None) -> None:
        import torch

        parameters = dict(self.model.named_parameters())
        module = reference_module(self.folder, options, plugin, self.base)
        for name, turned, rows, array in dequantized_weights(module, CheckpointReader(checkpoint_of(module))):
            with torch.no_grad():
                whole = parameters[name].T if turned else parameters[name]
                whole[torch.from_numpy(rows)] = torch.from_numpy(array.astype(np.float32))

    def take_length(self, model: Mapping[str, Any], length: int) -> None:
        """Take the rotary table that artifacts of a model take for conversations of `length` tokens."""
        from tyir.frontends.torch_export import freeze_rope

        freeze_rope(self.model, rope_positions(model, self._positions, length))

    def continue_greedily(self, ids: Sequence[int], count: int) -> list[int]:
        """`count` tokens after `ids`, always the most likely one, end-of-sequence tokens like any other."""
        import torch

        tokens, cache = list(ids), None
        feed = tokens
        with torch.no_grad(), self._threads():
            for _ in range(count):
                out = self.model(input_ids=torch.tensor([feed]), past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                feed = [int(out.logits[0, -1].argmax())]
                tokens += feed
        return tokens[len(ids) :]

    def run(self, ids: Sequence[int]) -> tuple[npt.NDArray[np.float32], list[Array]]:
        """Logits [n, V] and the hidden state [n, h] after each decoder layer."""
        import torch

        states: list[Array] = []
        layers = self._layers()
        hooks = [
            layer.register_forward_hook(
                lambda m, i, o: states.append((o[0] if isinstance(o, tuple) else o)[0].numpy())
            )
            for layer in layers
        ]
        try:
            with torch.no_grad(), self._threads():
                logits = self.model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].numpy()
        finally:
            for hook in hooks:
                hook.remove()
        return logits, [s.reshape(len(ids), -1) for s in states]

    @contextmanager
    def _threads(self) -> Iterator[None]:
        """Inside, a small model is computed by one thread: meeting after each product takes longer than the
        product, many times so where other programs run.
        """
        import torch

        before = torch.get_num_threads()
        small = sum(p.numel() for p in self.model.parameters()) < _SMALL
        torch.set_num_threads(1 if small else before)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def _layers(self) -> Sequence[Any]:
        from tyir.frontends.layer_reuse import decoder_layers

        return [layer for _, layer in decoder_layers(self.model)]


def rope_positions(model: Mapping[str, Any], capacity: int, length: int) -> int:
    """The length whose rotary frequencies a conversation of `length` tokens has: that of the cache, but of
    models with two tables its own.
    """
    return capacity if LongRope.used(model, capacity) is None else length


def _is_plain(folder: Path, base: Path | None) -> bool:
    """Whether transformers itself reads the folder: unquantised tensors under the model's names."""
    from tyir.frontends.huggingface import open_model
    from tyir.frontends.weights import PlainFormat

    opened = open_model(folder, "f32", base=base)
    return all(isinstance(f, PlainFormat) for f in opened.weights.formats) and all(
        name == stored.key for name, stored in opened.checkpoint.tensors.items()
    )


def scale_model(model: Any, text: str) -> None:
    """Give a model of transformers, made from config.json as it is, the rotary embeddings of a scaled one."""
    scaled = scaled_config(model.config.to_dict(), text)
    model.config.rope_parameters = scaled["rope_parameters"]
    model.config.max_position_embeddings = scaled["max_position_embeddings"]
    for name, module in list(model.named_modules()):
        if hasattr(module, "rope_type") and hasattr(module, "inv_freq"):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, type(module)(model.config))


def dense_model(folder: Path, plugin: ModelPlugin | None, base: Path | None = None) -> Any:
    """Hugging Face's model in fp32 of a checkpoint that is quantised or has its own layout.

    Built from the config, filled with the parameters as imported.
    """
    import torch

    from tyir.frontends.dense_state import dense_state
    from tyir.frontends.plugin import ModelPlugin
    from tyir.frontends.torch_export import build_plain_model

    plugin = plugin or ModelPlugin()
    tower = None if plugin.vision_tower is None else Path(plugin.vision_tower)
    model = build_plain_model(folder, plugin.model_class, base, tower)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, array in dense_state(folder, plugin, base):
            parameters[name].copy_(torch.tensor(array))
    return model


def reference_module(
    folder: Path,
    options: BuildOptions,
    plugin: ModelPlugin | None = None,
    base: Path | None = None,
    rope_scaling: str | None = None,
    positions: int | None = None,
) -> Module:
    """The unpartitioned model in `ty` ops, with the artifacts' weights and rotary scaling; with the rotary
    frequencies of a prompt of `positions` tokens, None for those of a full cache.
    """
    from tyir.frontends.huggingface import import_model

    module = import_model(
        folder,
        plugin=plugin,
        positions=positions or options.max_kv,
        base=base,
        rope_scaling=rope_scaling,
    )
    run_pipeline(module, reference_pipeline(options), PassContext())
    return module


def tower_module(
    folder: Path,
    image: ImageSize,
    exponent: int = 0,
    plugin: ModelPlugin | None = None,
    base: Path | None = None,
) -> Module:
    """The unpartitioned tower for pictures of a size in `ty` ops, on sequences and as large as artifacts have
    it.
    """
    from tyir.frontends.huggingface import import_model

    module = import_model(folder, plugin=plugin, base=base, images=[(image.given[0], image.given[1])])
    graph = f"extract-graph{{graph=visual_{image.name}}}"
    scaling = f"scale-residual{{exponent={exponent}}}"
    run_pipeline(module, f"to-ty,{graph},{scaling},static-step,canonicalize,cse,dce", PassContext())
    return module


def dequantized_weights(
    module: Module, weights: CheckpointReader
) -> Iterator[tuple[str, bool, Array, Array]]:
    """The de-quantised weight of each quantised linear of a `ty` module.

    As (parameter name, whether it is stored as [K, N], row numbers [N], weight [N, K]).

    Rows of a parameter come in parts where it is packed, and in another order where heads are turned
    otherwise (`raise-aten`).
    """
    interpreter = Interpreter(module, weights)
    constants = ConstantExpressions()
    for linear in module.walk_type(QuantizedLinear):
        if not constants.is_constant(linear.q):
            continue
        env: dict[Value, Array] = {}
        name = ""
        for root in (linear.q, linear.scales, linear.zeros):
            for op in expression_ops(root):
                if op.results[0] in env:
                    continue
                if isinstance(op, GetGlobal):
                    name = op.symbol.leaf
                    env[op.result] = interpreter.read_symbol(op)
                    continue
                out = interpreter.evaluator(op, [env[v] for v in op.operands])
                env.update(zip(op.results, out if isinstance(out, tuple) else (out,)))
        if not name.endswith(
            ".weight"
        ):  # one of several stored tensors: the module's path names the parameter
            name = f"{path_of(linear)}.weight"
        yield (
            name,
            any(isinstance(op, Transpose) for op in expression_ops(linear.q)),
            _rows(linear.q),
            dequantize(env[linear.q], env[linear.scales], env[linear.zeros], linear.group_size),
        )


def _rows(q: Value) -> Array:
    """Which rows of the stored parameter the rows of a quantised weight are.

    What its expression does to rows, done to their numbers.
    """
    rows: Array = np.empty(0, np.int64)
    for op in expression_ops(q):
        if isinstance(op, GetGlobal):
            rows = np.arange(tensor_type(op.result).static_shape[0])
        elif isinstance(op, Transpose):
            rows = np.arange(tensor_type(op.out).static_shape[0])
        elif isinstance(op, Slice) and op.axis == 0:
            rows = rows[op.offset : op.offset + op.size]
        elif isinstance(op, Take):  # between two reshapes: rows [heads x channels] as [heads, channels, K]
            heads = tensor_type(op.x).static_shape[0]
            rows = rows.reshape(heads, -1)[:, list(op.indices)].ravel()
    return rows


# --------------------------------------------------------------------------------------------- the comparison


@dataclass
class PromptResult:
    """One prompt's comparison; arrays have one entry per position."""

    ids: list[int]
    prompt_length: int
    logit_cosine: npt.NDArray[np.float64]
    logit_error: npt.NDArray[np.float64]
    logit_size: float  # norm of all logits in that of Hugging Face's
    layer_cosine: list[float]
    differing: list[int] = field(default_factory=list)
    ties: list[int] = field(default_factory=list)

    @property
    def positions(self) -> int:
        return len(self.ids) - self.prompt_length


def _no_step(count: float = 1) -> None:
    """Nobody watches."""


def check_prompt(
    session: Session,
    reference: Reference,
    ids: Sequence[int],
    count: int,
    states: LayerStates,
    step: Callable[[float], None] = _no_step,
    begin: Callable[[], None] = lambda: None,
) -> PromptResult:
    """Feed the prompt and Hugging Face's `count` greedy tokens, and compare every position; `begin` is called
    before, for what a prompt has besides tokens.

    `step(n)` is told of work done, 2 * `count` in all: Hugging Face's tokens, then ours.
    Of artifacts that return tokens only those are compared: the logits they come with against Hugging Face's
    of the same tokens, and the logsumexp of all.
    """
    chunks = DualChunk.used(session.manifest.model, session.capacity)
    if chunks is not None and len(ids) + count > chunks.exact:
        raise TyirError(
            f"{len(ids) + count} tokens are more than {chunks.exact}: beyond, these artifacts use dual chunk"
            " attention, which transformers does not know",
            help="compare shorter prompts",
        )
    reference.take_length(session.manifest.model, len(ids) + count)
    tokens = [*ids, *reference.continue_greedily(ids, count)]
    logits, wanted_states = reference.run(tokens)
    if _is_flat(logits):
        raise TyirError(
            "the model that is compared with gives every token the same logit at every position: nothing was"
            " compared",
            help="restore its weights, of the last norm and of the output layer above all",
        )
    step(count)
    session.reset()
    session.expect(len(tokens))
    begin()
    states.clear()
    feeds = [tokens[: len(ids)], *([t] for t in tokens[len(ids) : -1])]
    if session.choices is None:
        got = np.concatenate([_watched(session.feed(part), step) for part in feeds])
        best, wanted = got.argmax(axis=1), logits[: len(got)]
    else:
        found = [_watched(session.next_tokens(part), step) for part in feeds]
        got, names = np.concatenate([f.values for f in found]), np.concatenate([f.ids for f in found])
        best, wanted = names[:, 0], np.take_along_axis(logits[: len(got)], names, axis=1)
    error = np.abs(got - wanted).max(axis=1)
    if session.choices is not None and (sums := [f.logsumexp for f in found if f.logsumexp is not None]):
        error = np.maximum(error, np.abs(np.concatenate(sums) - logsumexp(logits[: len(got)])))
    result = PromptResult(
        ids=tokens,
        prompt_length=len(ids),
        logit_cosine=cosines(got, wanted),
        logit_error=error,
        logit_size=size_ratio(got, wanted),
        layer_cosine=(
            [float(cosines(states.rows(i), s[: len(got)]).min()) for i, s in enumerate(wanted_states)]
            if states.seen
            else []
        ),
    )
    for position in range(len(ids) - 1, len(got)):
        mine, theirs = int(best[position]), int(logits[position].argmax())
        if mine != theirs:
            gap = float(logits[position, theirs] - logits[position, mine])
            (result.ties if gap <= 2 * float(error[position]) and gap < 0.05 else result.differing).append(
                position
            )
    return result


def _watched(result: _T, step: Callable[[float], None]) -> _T:
    step(1)
    return result


class LayerStates:
    """A `StepProbe` that keeps each decoder layer's output of the first die that has the layer."""

    def __init__(self) -> None:
        self.seen: dict[int, dict[int, Array]] = defaultdict(dict)  # by layer and first position
        self.owner: dict[int, int] = {}
        self.sequence = 0  # of a batch

    def clear(self) -> None:
        self.seen.clear()

    def rows(self, layer: int) -> Array:
        """[positions, h] of one layer; `TyirError` when the program has no such layer."""
        if layer not in self.seen:
            raise TyirError(f"the compiled program has no layer {layer}: it was made from another model")
        return np.concatenate([rows for _, rows in sorted(self.seen[layer].items())])

    def __call__(
        self, chunk: Chunk, die: int, stack: tuple[Call, ...], op: Op, results: tuple[Array, ...]
    ) -> None:
        layer = op.attributes.get("tyir.layer") if isinstance(op, Call) else None
        if (
            isinstance(op, Call)
            and isinstance(layer, IntegerAttr)
            and self.owner.setdefault(layer.value, die) == die
        ):
            callee = lookup_symbol(op, op.callee.leaf)
            assert isinstance(callee, Func)
            own = [
                r for i, r in enumerate(results) if alias_of(callee, i) is None
            ]  # the scales of a cache have three axes too
            state = next(r for r in own if r.ndim == 3)
            # a step that returns one row runs again for each, and comes to more of them
            self.seen[layer.value][chunk.start] = state[self.sequence, : chunk.count].copy()

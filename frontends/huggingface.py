"""A Hugging Face checkpoint folder to a module at stage `aten`; the front end's public entry.

Everything that can be wrong with a folder is checked before the model is exported, and reported together:
`config.json`, the safetensors files, the tensors against what the model needs.  No weight is read; they
become `ty.global` references.
"""

from __future__ import annotations

import contextlib
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from tyir.artifacts.dual_chunk import CONFIG_KEY, DualChunk
from tyir.artifacts.json_attributes import to_attribute
from tyir.artifacts.long_rope import FACT as LONG_ROPE
from tyir.artifacts.rope_scaling import RECORDED, scaled_config
from tyir.attributes import Attribute, DenseElementsAttr, DictAttr, FloatAttr, StringAttr
from tyir.diagnostics import Diagnostic, TyirError, kind_of
from tyir.dialects.builtin import Module
from tyir.dialects.func import Func
from tyir.execution.finite import not_finite
from tyir.frontends.architectures import architecture_problem
from tyir.frontends.check_values import value_problems
from tyir.frontends.checkpoint import CONFIG_FILE, Checkpoint, open_checkpoint
from tyir.frontends.config_numbers import config_problems
from tyir.frontends.quant_checks import quantization_contradictions
from tyir.frontends.quant_config import read_quant_config
from tyir.frontends.quant_formats import quantized_format
from tyir.frontends.tensor_names import with_model_names
from tyir.frontends.weights import DeltaFormat, PlainFormat, TensorReader, WeightFormat, Weights, is_delta
from tyir.layers import layer_in, path_of
from tyir.process.collector import collector_paused
from tyir.process.extras import require, scipy_hidden
from tyir.process.import_structure import import_structure_kept
from tyir.process.progress import Bar
from tyir.vision.graphs import LANGUAGE, mark_graph

if TYPE_CHECKING:
    from tyir.frontends.plugin import ModelPlugin
    from tyir.frontends.torch_export import MetaModel

__all__ = ["OpenedModel", "formats_of", "import_model", "open_model"]

DTYPES: Final = ("f16", "f32")
_FOLLOWS: Final = "what follows from the config"
_GUESSES: Final = "layers that guess further tokens"
# Tensors that trainers, quantisers and old releases store beside a language model's own: what each is, by
# what the end of its name matches.  None of them changes the logits; transformers and vLLM leave them out.
_SURPLUS: Final = {
    _FOLLOWS: r"rotary_emb\.((original_)?inv_freq|(cos|sin)_cached)|attn_rot_embd|position_ids"
    r"|\w*(attn|attention)\.(masked_)?bias",
    "scales of a cache, attention or activations that are not quantised by them here":
    r"\w*(attn|attention)\.(\w+\.)?(k|v|q|kv|prob)_scale|\w+_proj\.(input|output)_scale",
    _GUESSES: r"(mtp|mtp_layers|nextn|medusa_head|eagle)\..*",
    "a head of a trainer, which makes no logits": r"(v_head|value_head|reward_head)\..*",
    "the state of an optimizer": r"(optimizer|optimizer_states|lr_scheduler)\..*",
}  # fmt: skip
_GUESSING: Final = re.compile(r"\.(eh_proj|enorm|hnorm)\.")  # parts that only such layers have
# Parts of modules that PEFT puts around a model's own while an adapter is not merged.
_UNMERGED: Final = re.compile(
    r"\.(lora_[A-Za-z_]+|modules_to_save|original_module|ia3_l|vera_lambda_\w)(\.|$)"
)
_BESIDE: Final = (
    "metadata do not say everything of a model: put the original model's config.json beside the file"
)
# What later stages and the artifacts need to know of config.json.
_MODEL_KEYS: Final = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "sliding_window",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)

# Of these the whole model's word counts where it has a language model inside.
_WHOLE_KEYS: Final = ("model_type", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")

Note = Callable[[Diagnostic], None]


def import_model(
    folder: str | Path,
    *,
    dtype: str = "f16",
    note: Note | None = None,
    check_weights: bool = False,
    plugin: ModelPlugin | None = None,
    positions: int | None = None,
    base: Path | None = None,
    progress: bool = False,
    images: Sequence[tuple[int, int]] = (),
    rope_scaling: str | None = None,
) -> Module:
    """The model of a Hugging Face folder at stage `aten`, computing in `dtype` ("f16" or "f32").

    `@main(%input_ids: tensor<1x?xi64>, %position_ids: tensor<1x?xi64>) -> tensor<1x?xVx{dtype}>`.  Weights
    stay in the folder (`ty.global`). `note` receives warnings (stray tensors).  `check_weights` reads them
    all; `plugin` says how a checkpoint of one's own is read. `positions`: tokens the cache will hold.  Rotary
    frequencies that change with the length (rope types dynamic and longrope) are those of a prompt that long:
    keys in a cache cannot be turned again when it grows; of longrope the module says the short ones as well
    (`tyir.artifacts.long_rope`).  `images`: of a vision-language
    model the sizes (width, height) of pictures; one function `@visual_{W}x{H}(%patches)` for each grid among
    them stands beside `@main`, its language model (`tyir.frontends.vision`).  `base`: the folder of the base
    model, when `folder` holds a LoRA adapter whose config does not say it, or of the Llama that a LLaVA's
    delta is added to.  `rope_scaling`: a kind and
    factor that config.json lacks, as "yarn=4" (`tyir.artifacts.rope_scaling`).  `progress` shows on standard
    error how far it is.  `TyirError` holds every problem
    of the folder, or every operation that cannot be imported.
    """
    require("importing a model", "torch", "transformers", "safetensors")
    if dtype not in DTYPES:
        raise TyirError(
            f"dtype {dtype!r} is not one a model can be imported in",
            help=f"choose one of {', '.join(DTYPES)}",
        )
    # importing torch and tracing make objects by the million: to look through them takes a fifth of the time
    with collector_paused(), Bar("import", 100, show=progress) as bar:
        opened = open_model(
            Path(folder),
            dtype,
            note,
            check_weights=check_weights,
            plugin=plugin,
            positions=positions,
            base=base,
            bar=bar,
            rope_scaling=rope_scaling,
        )
        if images and not opened.meta.sees:
            raise TyirError(
                f"{type(opened.meta.model).__name__} sees no pictures: it has no sizes of images",
                help="leave --image out",
            )
        module = _build(opened.checkpoint, opened.meta, opened.weights, bar, images)
        facts = module.attributes["tyir.model"]
        if rope_scaling is not None and isinstance(facts, DictAttr):
            module.set_attribute("tyir.model", facts.with_entry(RECORDED, StringAttr(rope_scaling)))
        return module


@dataclass(frozen=True)
class OpenedModel:
    """A checkpoint that has been checked: what is stored, the model without weights, and how its parameters
    are made of what is stored.
    """

    checkpoint: Checkpoint
    meta: MetaModel
    weights: Weights


def open_model(
    folder: Path,
    dtype: str,
    note: Note | None = None,
    *,
    check_weights: bool = False,
    plugin: ModelPlugin | None = None,
    positions: int | None = None,
    base: Path | None = None,
    bar: Bar | None = None,
    rope_scaling: str | None = None,
) -> OpenedModel:
    """Open and check a folder; the first half of `import_model`, with the same errors."""
    note = note or _ignore
    bar = bar or Bar("import", 100)
    bar.stage("reading the checkpoint", 2)
    problems: list[Diagnostic] = []
    tower = None if plugin is None or plugin.vision_tower is None else Path(plugin.vision_tower)
    checkpoint = open_checkpoint(folder, problems, base, tower)
    if checkpoint is not None and plugin is not None:
        checkpoint = plugin.apply(checkpoint, problems)
    if checkpoint is not None and rope_scaling is not None and not problems:
        checkpoint = replace(checkpoint, config=scaled_config(checkpoint.config, rope_scaling))
    formats = formats_of(checkpoint, problems, plugin) if checkpoint is not None else ()
    if checkpoint is not None:
        problems.extend(_early_problems(checkpoint, plugin))
    # all else would follow from these, and takes the seconds that torch and transformers need to be loaded
    meta = (
        _meta_model(checkpoint, dtype, problems, note, plugin, positions, bar)
        if checkpoint is not None and not problems
        else None
    )
    if checkpoint is not None and meta is not None:
        bar.stage("checking the tensors", 2)
        if meta.sees:
            checkpoint = _with_names_of(checkpoint, meta)
        named = with_model_names(checkpoint, meta.aliases, note)
        if isinstance(named, Diagnostic):
            raise TyirError([*problems, named])
        checkpoint = named
        weights = Weights(checkpoint, meta.aliases, meta.state, formats)
        bad: set[str] = set()
        problems.extend(one_of_each_kind(_tensor_problems(checkpoint, meta, weights, note, bad)))
        if check_weights:
            problems.extend(value_problems(weights, dtype, bad))
    if problems:
        raise TyirError(problems)
    assert checkpoint is not None and meta is not None
    return OpenedModel(checkpoint, meta, weights)


def _early_problems(checkpoint: Checkpoint, plugin: ModelPlugin | None) -> Iterator[Diagnostic]:
    """What config.json and the names of the tensors say alone is wrong."""
    config, where = checkpoint.config, str(checkpoint.folder / "config.json")
    yield from config_problems(config, where)
    if plugin is not None and plugin.model_class is not None:
        return
    if (unknown := architecture_problem(config, where)) is not None:
        yield unknown
    around = [] if checkpoint.low_rank else [name for name in checkpoint.tensors if _UNMERGED.search(name)]
    if around:
        yield Diagnostic(
            f"the checkpoint holds {len(around)} tensors of an adapter that is not merged (first"
            f" '{around[0]}')",
            where=str(checkpoint.folder),
            help="merge it with PEFT (merge_and_unload, save_pretrained) and import the result",
        )
        return
    wanted = config.get("num_hidden_layers")
    stored = len({layer_in(name) for name in checkpoint.tensors} - {None})
    few = stored or len(checkpoint.tensors) < (wanted or 0)  # layers may have names of a kind not known here
    if type(wanted) is int and stored < wanted and few and checkpoint.whole and not checkpoint.unreadable:
        yield Diagnostic(
            f"the checkpoint lacks layers: {stored} are stored, {checkpoint.described_by} asks for {wanted}",
            where=str(checkpoint.folder),
            help=_lacking_help(checkpoint),
        )


def _load_transformers() -> None:
    """Load it without scipy where nobody can miss that (`scipy_hidden`), without reading all of its models.

    If it has decided before that there is scipy, or decides it otherwise, it is loaded as it wants to be.
    """
    if "transformers" not in sys.modules:
        with contextlib.suppress(ImportError), scipy_hidden(), import_structure_kept():
            import tyir.frontends.torch_export  # noqa: F401


def _with_names_of(checkpoint: Checkpoint, meta: MetaModel) -> Checkpoint:
    """The checkpoint with its tensors under the names of transformers' modules."""
    from tyir.frontends.torch_export import module_name

    name = module_name(meta.model)
    tensors = {name(stored): tensor for stored, tensor in checkpoint.tensors.items()}
    return replace(checkpoint, tensors=tensors, unreadable=frozenset(map(name, checkpoint.unreadable)))


def formats_of(
    checkpoint: Checkpoint, problems: list[Diagnostic], plugin: ModelPlugin | None = None
) -> tuple[WeightFormat, ...]:
    """How the checkpoint's parameters are stored; empty (and problems) when that is not known."""
    before = len(problems)
    config = read_quant_config(checkpoint.folder, checkpoint.config, problems)
    if len(problems) > before:
        return ()
    formats: tuple[WeightFormat, ...] = (PlainFormat(),)
    if is_delta(checkpoint):
        formats = (DeltaFormat(), *formats)
    elif any(t.converted for t in checkpoint.tensors.values()):
        from tyir.frontends.gguf.files import GgufFormat

        formats = (GgufFormat(), *formats)
    elif config is not None:
        formats = (quantized_format(config, TensorReader(checkpoint.folder)), *formats)
    if checkpoint.low_rank:
        from tyir.frontends.adapters import LoraFormat

        formats = (LoraFormat(formats), *formats)
    return formats


def _ignore(warning: Diagnostic) -> None:
    """The `note` of callers who do not want any."""


def _meta_model(
    checkpoint: Checkpoint,
    dtype: str,
    problems: list[Diagnostic],
    note: Note,
    plugin: ModelPlugin | None,
    positions: int | None,
    bar: Bar,
) -> MetaModel | None:
    """The model without storage, None (and problems) when the config does not describe one that can be
    imported.
    """
    config, where = checkpoint.config, str(checkpoint.folder / "config.json")
    try:
        DualChunk.of_config(config)
    except TyirError as error:
        problems.extend(replace(d, where=where) for d in error.diagnostics)
        return None
    bar.stage("loading torch and transformers", 65)
    _load_transformers()
    from tyir.frontends.torch_export import build_meta_model, position_limit

    bar.stage("building the model", 3)
    try:
        model_class = plugin.model_class if plugin is not None else None
        meta = build_meta_model(checkpoint.folder, dict(config), dtype, model_class, positions)
        limit = position_limit(meta.text_config)
        if limit is not None and (rope := _rope_note(*limit, positions)) is not None:
            note(Diagnostic(rope, severity="warning", where=where))
        return meta
    except TyirError as error:
        problems.extend(error.diagnostics)
        return None


def _rope_note(limit: int, kind: str, positions: int | None) -> str | None:
    """What a cache of `positions` tokens means for frequencies that change beyond `limit` tokens."""
    if positions is None:
        return (
            f"rope_type '{kind}' has other frequencies beyond {limit} tokens; those up to there are imported"
            f" (--max-kv {limit} at most)"
        )
    if positions <= limit or kind == "longrope":  # of which both tables are kept
        return None
    return (
        f"rope_type '{kind}' has other frequencies beyond {limit} tokens: a cache of {positions} takes those"
        f" of {positions} tokens for every prompt, which for up to {limit} tokens are not the model's"
        f" (--max-kv {limit} is exact there)"
    )


def _tensor_problems(
    checkpoint: Checkpoint, meta: MetaModel, weights: Weights, note: Note, bad: set[str]
) -> Iterable[Diagnostic]:
    """The stored tensors against the model's: missing, of another shape (added to `bad`), and those nobody
    asked for.
    """
    if not checkpoint.whole:
        return
    where = str(checkpoint.folder)
    missing: list[str] = []
    used: set[str] = set()
    for name, shape in meta.state.items():
        found = weights.find(name)
        if found is None:
            if not any(alias in checkpoint.unreadable for alias in meta.aliases.get(name, (name,))):
                missing.append(name)
            continue
        weight_format, stored_name = found
        used.update(weight_format.stored_keys(stored_name, checkpoint.tensors))
        if (problem := weight_format.problem(stored_name, shape, checkpoint.tensors)) is not None:
            bad.update((name, stored_name))
            yield Diagnostic(
                problem,
                where=where,
                help=_mixed_help(checkpoint),
            )
    if missing:
        message = (
            f"the checkpoint lacks {len(missing)} of the model's {len(meta.state)} tensors: {_some(missing)}"
        )
        experts = any(".experts." in name for name in missing)
        stored, wanted = _layer_count(checkpoint.tensors), _layer_count(meta.state)
        layers = _counts(stored, wanted, checkpoint) if stored < wanted else ""
        help = (
            "models with a mixture of experts cannot be imported yet"
            if experts
            else _lacking_help(checkpoint) + layers
        )
        yield Diagnostic(message, where=where, help=help)
    yield from quantization_contradictions(weights, note)
    yield from _unexpected(meta, weights, used, note, whole=not missing and not bad)


def one_of_each_kind(problems: Iterable[Diagnostic]) -> Iterator[Diagnostic]:
    """Problems whose texts differ in names and numbers alone are said once, with their count."""
    kinds: dict[str, list[Diagnostic]] = {}
    for problem in problems:
        kinds.setdefault(kind_of(problem.message), []).append(problem)
    for first, *others in kinds.values():
        more = f" (and {len(others)} more like it)" if others else ""
        yield replace(first, message=first.message + more)


def _unexpected(
    meta: MetaModel, weights: Weights, used: set[str], note: Note, whole: bool
) -> Iterable[Diagnostic]:
    """Tensors the model does not use: a note when that is harmless, an error when the config seems to
    describe another model.  `whole`: whether nothing that the model has is missing or of another shape.
    """
    checkpoint = weights.checkpoint
    where, wrong = str(checkpoint.folder), []
    guessing = {layer_in(name) for name in checkpoint.tensors if _GUESSING.search(name)}
    guessing -= {layer_in(name) for name in meta.state}
    surplus: dict[str, list[str]] = {}
    for name in sorted(checkpoint.tensors.keys() - used):
        tied = next((a for a in meta.aliases.get(name, ()) if a in used), None)
        if tied is not None and not _same_bytes(checkpoint, name, tied):
            help = 'set "tie_word_embeddings": false in config.json if the model has two separate tensors'
            yield Diagnostic(
                f"'{name}' differs from '{tied}', but {checkpoint.described_by} ties them",
                where=where,
                help=help,
            )
        elif layer_in(name) in guessing:
            surplus.setdefault(_GUESSES, []).append(name)
        elif (why := _why_surplus(name, tied, weights, used)) is not None:
            surplus.setdefault(why, []).append(name)
        else:
            wrong.append(name)
    for why, names in surplus.items():
        what = f"'{names[0]}' is" if len(names) == 1 else f"{len(names)} tensors are"
        message = f"{what} not used: {why}" + (f" ({_some(names)})" if len(names) > 1 else "")
        note(Diagnostic(message, severity="warning", where=where))
    if wrong:
        message = (
            f"the checkpoint holds {len(wrong)} tensors that the model of {checkpoint.described_by} has no"
            f" place for: {_some(wrong)}"
        )
        stored, wanted = _layer_count(checkpoint.tensors), _layer_count(meta.state)
        layers = _counts(stored, wanted, checkpoint) if stored > wanted else ""
        help = _mixed_help(checkpoint) + layers
        own = {alias.partition(".")[0] for names in meta.aliases.values() for alias in names}
        beside = sorted({name.partition(".")[0] for name in wrong})
        if whole and not own.intersection(beside):
            rules = ", ".join(rf'r"{re.escape(first)}\..*"' for first in beside[:5])
            help = f"if the model is whole without them, leave them out: a --model-plugin of ignore=[{rules}]"
        yield Diagnostic(message, where=where, help=help)


def _counts(stored: int, wanted: int, checkpoint: Checkpoint) -> str:
    return f" ({stored} layers are stored, {checkpoint.described_by} asks for {wanted})"


def _lacking_help(checkpoint: Checkpoint) -> str:
    if checkpoint.described_by == CONFIG_FILE:
        return "download the missing files, or use the config.json that belongs to these weights"
    return _BESIDE


def _mixed_help(checkpoint: Checkpoint) -> str:
    if checkpoint.described_by == CONFIG_FILE:
        return "config.json and the weights are from different models, or one of them was edited"
    return _BESIDE


def _why_surplus(name: str, tied: str | None, weights: Weights, used: set[str]) -> str | None:
    """Why a tensor the model does not use does no harm, None when it may.

    Quantisers store more than the model has: a tied head once more, biases of zeros, the unquantised weight.
    """
    if tied is not None:
        return f"a copy of the tied '{tied}'"
    for what, pattern in _SURPLUS.items():
        vector = name.endswith(".bias") and len(weights.checkpoint.tensors[name].type.dims) == 1
        if re.fullmatch(rf"(.*\.)?({pattern})", name) and not (what == _FOLLOWS and vector):  # not a mask
            return what
    module = name.rpartition(".")[0]
    found = weights.find(f"{module}.weight")
    if f"{module}.weight" not in weights.aliases or found is None:
        return None
    keys = found[0].stored_keys(found[1], weights.checkpoint.tensors)
    if f"{module}.weight" != found[1]:
        return f"the tied '{found[1]}' stored once more"
    if name.endswith(".bias"):
        zeros = not TensorReader(weights.checkpoint.folder)(weights.checkpoint.tensors[name]).any()
        return "all zeros" if zeros else None  # AutoGPTQ writes these, and trainers that always have biases
    if name == f"{module}.weight" and used.issuperset(keys):
        return "stored quantised as well"
    return None


def _layer_count(names: Iterable[str]) -> int:
    """One more than the highest layer number in `names`."""
    return max((layer + 1 for name in names if (layer := layer_in(name)) is not None), default=0)


def _same_bytes(checkpoint: Checkpoint, first: str, second: str) -> bool:
    """Whether two stored tensors are equal, bit by bit."""
    read, (a, b) = TensorReader(checkpoint.folder), (checkpoint.tensors[key] for key in (first, second))
    return a.type is b.type and all(np.array_equal(x, y) for x, y in zip(read(a), read(b)))


def _some(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _build(
    checkpoint: Checkpoint,
    meta: MetaModel,
    weights: Weights,
    bar: Bar,
    images: Sequence[tuple[int, int]] = (),
) -> Module:
    """Export the checked model and convert the graphs."""
    from tyir.frontends.graph_importer import import_graph
    from tyir.frontends.torch_export import export_model, real_buffer

    bar.stage("tracing the model", 22)
    graph = export_model(meta)
    bar.stage("converting the graph", 6)
    main = import_graph(graph, weights, lambda name: real_buffer(meta, name))
    functions = [main]
    attributes: dict[str, Attribute] = {}
    if meta.sees:
        mark_graph(main, LANGUAGE)
    if images:
        from tyir.frontends.vision.functions import settings_of, tower_functions, vision_attribute

        settings = settings_of(checkpoint.pictures or checkpoint.folder, checkpoint.config)
        functions += tower_functions(meta, weights, [settings.size(*size) for size in images])
        attributes["tyir.vision"] = vision_attribute(meta, settings)
    for function in functions:
        _check_constants(function, str(checkpoint.folder / "config.json"))
    module = Module.empty()
    for reference in weights.globals.values():
        module.body.append(reference)
    for function in functions:
        module.body.append(function)
    module.attributes = DictAttr({
        "tyir.stage": StringAttr("aten"),
        "tyir.checkpoint": StringAttr(str(checkpoint.folder)),
        "tyir.model": _model_attribute(checkpoint, meta),
        "tyir.files": DictAttr({name: stamp.attribute() for name, stamp in checkpoint.stamps.items()}),
        **attributes,
    })  # fmt: skip
    return module


def _check_constants(main: Func, where: str) -> None:
    """`TyirError` for numbers that follow from the config and are not finite, though each of its own is:
    `rope_theta` 1e-300, or what only one family reads.
    """
    problems = []
    for op in main.walk():
        for name, value in op.properties.items():
            if isinstance(value, FloatAttr):
                bad = "" if math.isfinite(value.value) else f"is {value.value}"
            elif isinstance(value, DenseElementsAttr):
                bad = not_finite(value.to_numpy()) and f"holds {not_finite(value.to_numpy())}"
            else:
                continue
            if bad:
                place = f" at {path}" if (path := path_of(op)) else ""
                message = f"'{name}' of {op.name}{place}, which follows from config.json, {bad}"
                help = "compare the numbers of config.json with those of the original model"
                problems.append(Diagnostic(message, where=where, help=help))
    if problems:
        raise TyirError(problems)


def _model_attribute(checkpoint: Checkpoint, meta: MetaModel) -> DictAttr:
    """The facts of config.json that later stages need, with transformers' defaults filled in: those of the
    language model, and the whole's own name.
    """
    from tyir.frontends.torch_export import long_rope_of, position_limit

    # getattr, not to_dict: it also finds what a configuration class calls by another name (n_embd for
    # hidden_size).
    text = meta.text_config
    found = {key: getattr(text, key, None) for key in _MODEL_KEYS}
    found |= {key: value for key in _WHOLE_KEYS if (value := getattr(meta.config, key, None)) is not None}
    facts = {key: value for key, value in found.items() if value is not None}
    if (limit := position_limit(text)) is not None:
        facts["max_position_embeddings"] = max(limit[0], meta.positions or 0)
    if (both := long_rope_of(meta)) is not None:
        facts[LONG_ROPE] = both.facts()
    if (chunks := DualChunk.of_config(checkpoint.config)) is not None:  # transformers' models do not read it
        facts[CONFIG_KEY] = chunks.facts()
    if "hidden_size" in facts and "num_attention_heads" in facts:
        facts.setdefault("head_dim", facts["hidden_size"] // facts["num_attention_heads"])
    facts["architecture"] = checkpoint.config["architectures"][0]
    return DictAttr({key: to_attribute(value) for key, value in facts.items()})

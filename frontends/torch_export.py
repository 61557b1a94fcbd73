"""A transformers model as a graph without weights: built on torch's `meta` device, exported with a symbolic
sequence length.

No parameter is ever allocated, so a 72B model costs as little as a small one.  Loaded lazily: importing this
file imports torch and transformers.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tyir.artifacts.long_rope import LongRope
from tyir.artifacts.rope_scaling import CHANGING
from tyir.artifacts.vision import ImageSize
from tyir.diagnostics import Diagnostic, TyirError, did_you_mean
from tyir.frontends import attention_hook
from tyir.frontends.architectures import architecture_problem
from tyir.frontends.layer_reuse import layers_traced_once
from tyir.frontends.vision.parts import Tower, language_of, tower_of

__all__ = [
    "WRAPPER_PREFIX",
    "MetaModel",
    "build_meta_model",
    "build_plain_model",
    "export_model",
    "export_tower",
    "freeze_rope",
    "module_name",
    "position_limit",
    "real_buffer",
    "trace_all",
]

DTYPES: Final = {"f16": torch.float16, "f32": torch.float32}
WRAPPER_PREFIX: Final = "model_."  # what `_LogitsOnly` puts before every module path
_EXAMPLE_LENGTH: Final = 16
# How weights are stored is the front end's business: the model is built as if they were not quantised.
_NOT_THE_MODEL: Final = ("quantization_config", "compression_config", "auto_map")
# Parameters that checkpoints of a model_type store under another name: (beginning here, beginning there).
_STORED_AS: Final = {"gpt_neox": ("lm_head.", "embed_out.")}


class _LogitsOnly(torch.nn.Module):  # type: ignore[misc]  # torch is not followed by the type check
    """(input_ids, position_ids) [1, s] -> logits [1, s, V]; the signature of the imported `@main`."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model_ = model

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        # A padding mask of ones keeps transformers from looking for packed sequences in the position ids; the
        # attention hook ignores it.
        everything = torch.ones_like(input_ids)
        logits: torch.Tensor = self.model_(
            input_ids=input_ids, attention_mask=everything, position_ids=position_ids, use_cache=False
        ).logits
        return logits

    def examples(self, length: int) -> tuple[torch.Tensor, ...]:
        """Arguments for tracing, on the meta device."""
        ids = torch.zeros(1, length, dtype=torch.long, device="meta")
        return ids, ids.clone()

    def dimensions(self, length: Any) -> tuple[dict[int, Any], ...]:
        """Which axis of each argument is the length."""
        return ({1: length}, {1: length})

    def ready(self) -> contextlib.AbstractContextManager[None]:
        """While this holds the model is as it is exported."""
        return contextlib.nullcontext()

    def reuse(self) -> contextlib.AbstractContextManager[None]:
        """Equal layers are traced once."""
        return layers_traced_once(self.model_)


@dataclass(frozen=True)
class MetaModel:
    """The model without storage.  `aliases` maps each parameter name to all names of the same parameter (tied
    weights).

    `positions`: how long the prompts are whose rotary frequencies are meant, where these change with the
    length; None: up to `position_limit`.
    """

    model: torch.nn.Module
    config: Any
    aliases: dict[str, tuple[str, ...]]
    positions: int | None = None

    @property
    def sees(self) -> bool:
        """Whether it is a vision-language model: pictures enter its language model as embeddings."""
        return hasattr(self.config, "vision_config")

    @property
    def text_config(self) -> Any:
        """The configuration of the language model."""
        return self.config.get_text_config()

    @property
    def state(self) -> dict[str, tuple[int, ...]]:
        """Shape by name of everything a checkpoint must hold."""
        return {name: tuple(t.shape) for name, t in self.model.state_dict().items()}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' and torch's advice, which concerns training and eager execution; failures arrive
    as exceptions.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _summary(error: BaseException) -> str:
    """The beginning of an exception's text as one line; a missing key's name alone would say nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1])
    return f"{type(error).__name__} {text}".strip() if isinstance(error, KeyError) or not text else text


def _check_rope(folder: Path, raw: dict[str, Any]) -> None:
    """`TyirError` for a kind of rotary scaling that transformers does not know."""
    known = ("default", *ROPE_INIT_FUNCTIONS)
    for key in ("rope_parameters", "rope_scaling"):
        entry = raw.get(key)
        kind = entry.get("rope_type", entry.get("type")) if isinstance(entry, dict) else None
        if isinstance(entry, dict) and kind == "mrope" and "mrope_section" in entry:
            continue  # as the hub's Qwen2-VL and Qwen2.5-VL say it; their config classes make it "default"
        if isinstance(kind, str) and kind not in known:
            message = (
                f"config.json asks for {key} of type '{kind}', which transformers {transformers.__version__}"
                " does not know"
            )
            raise TyirError(
                message,
                where=str(folder / "config.json"),
                help=f"known: {', '.join(known)}. {did_you_mean(kind, known)}".rstrip(),
            )


def build_meta_model(
    folder: Path,
    raw: dict[str, Any],
    dtype: str,
    model_class: type[Any] | None = None,
    positions: int | None = None,
) -> MetaModel:
    """The model of `folder`'s config.json on the meta device in `dtype` ("f16" or "f32"), with the rotary
    frequencies of prompts of `positions` tokens.

    Code inside the folder is never executed.  `TyirError` when the model cannot be built.
    """
    _check_rope(folder, raw)
    attention_hook.install()
    settings = {"dtype": DTYPES[dtype], "attn_implementation": attention_hook.IMPLEMENTATION}
    try:
        with _quiet():
            config = _config(raw, model_class)
            with torch.device("meta"):
                if model_class is None:
                    model = _automatic(config).from_config(config, trust_remote_code=False, **settings).eval()
                else:
                    model = model_class._from_config(config, **settings).eval()
    except TyirError:
        raise
    except Exception as error:
        name = model_class.__name__ if model_class is not None else raw["architectures"][0]
        message = f"transformers cannot build {name} from this config.json: {_summary(error)}"
        raise TyirError(
            message,
            where=str(folder / "config.json"),
            help="compare config.json with that of the original model",
        ) from error
    _with_one_projection(model)
    for module in _changing_rope(model):
        module.rope_type = "default"  # `real_buffer` computes the frequencies
    _check_no_experts(model)
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).extend(_stored_names(name, model))
    return MetaModel(
        model, config, {name: tuple(names) for names in groups.values() for name in names}, positions
    )


def module_name(model: Any) -> Callable[[str], str]:
    """What a stored tensor of a vision-language model is called in the model, by transformers' own rules."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    steps = get_model_conversion_mapping(model, add_legacy=False)
    renaming, converting = (
        [t for t in steps if isinstance(t, kind)] for kind in (WeightRenaming, WeightConverter)
    )
    state = model.state_dict()

    def name(stored: str) -> str:
        found: str = rename_source_key(stored, renaming, converting, model.base_model_prefix, state)[0]
        return found

    return name


def _stored_names(name: str, model: torch.nn.Module) -> tuple[str, ...]:
    """The names a parameter may be stored under: the model's own, that in its decoder alone, and what
    checkpoints of the family call it.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    own, other = _STORED_AS.get(getattr(model.config, "model_type", ""), ("", ""))
    names = [name]
    if len(prefix) > 1 and name.startswith(prefix):
        names.append(name.removeprefix(prefix))
    if own and name.startswith(own):
        names.append(other + name.removeprefix(own))
    return tuple(names)


def _check_no_experts(model: torch.nn.Module) -> None:
    """`TyirError` for a mixture of experts."""
    path = next((name for name, _ in model.named_modules() if name.endswith(".experts")), None)
    if path is not None:
        raise TyirError(
            f"{type(model).__name__} is a mixture of experts ({path}), which cannot be imported yet",
            help="use a model whose layers have one MLP",
        )


def build_plain_model(
    folder: Path,
    model_class: type[Any] | None = None,
    base: Path | None = None,
    vision_tower: Path | None = None,
) -> Any:
    """The model of config.json on the CPU in fp32 with eager attention and weights yet to be filled in, built
    as if nothing were quantised.
    """
    from tyir.frontends.checkpoint import open_checkpoint

    problems: list[Diagnostic] = []
    checkpoint = open_checkpoint(folder, problems, base, vision_tower)
    if checkpoint is None or problems:
        raise TyirError(problems)
    raw = dict(checkpoint.config)
    settings = {"dtype": torch.float32, "attn_implementation": "eager"}
    with _quiet():
        if model_class is not None:
            return model_class._from_config(_config(raw, model_class), **settings).eval()
        if (problem := architecture_problem(raw, str(folder / "config.json"))) is not None:
            raise TyirError(problem)
        config = _config(raw)
        model = _automatic(config).from_config(config, trust_remote_code=False, **settings).eval()
        return _with_one_projection(model)


def _automatic(config: Any) -> Any:
    """The automatic class that builds the model of a configuration."""
    sees = hasattr(config, "vision_config")
    return transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM


def _with_one_projection(model: Any) -> Any:
    """The model, whose projector is the one linear layer of LLaVA's first versions where its config says so;
    transformers' LLaVA always has two.
    """
    if getattr(model.config, "mm_projector_type", None) == "linear":
        model.model.multi_modal_projector.linear_2 = torch.nn.Identity()
    return model


def _config(raw: dict[str, Any], model_class: type[Any] | None = None) -> Any:
    config_class = CONFIG_MAPPING[raw["model_type"]] if model_class is None else model_class.config_class
    return config_class.from_dict({k: v for k, v in raw.items() if k not in _NOT_THE_MODEL})


def _changing_rope(model: torch.nn.Module) -> list[Any]:
    """The rotary embeddings whose frequencies depend on the length of the prompt."""
    return [module for module in model.modules() if getattr(module, "rope_type", None) in CHANGING]


def freeze_rope(model: torch.nn.Module, positions: int | None) -> None:
    """Give the rotary embeddings of a model on the CPU the frequencies they take for a prompt of `positions`
    tokens, and keep them for all prompts, until it is called again.
    """
    for module in model.modules():
        kind = getattr(module, "frozen_rope_type", getattr(module, "rope_type", None))
        if kind not in CHANGING:
            continue
        module.frozen_rope_type = module.rope_type = kind
        if positions is not None:
            module(
                torch.zeros(1), torch.tensor([[positions - 1]])
            )  # transformers sets the frequencies by the last position it sees
        module.rope_type = "default"


def position_limit(config: Any) -> tuple[int, str] | None:
    """From how many positions on the model takes other rotary frequencies, and the rope type that says so;
    None when it never does.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    limits = []
    for entry in (parameters, *(v for v in parameters.values() if isinstance(v, dict))):
        if (kind := entry.get("rope_type")) in CHANGING:
            own = entry.get("original_max_position_embeddings") if kind == "longrope" else None
            limits.append(
                (
                    int(
                        own
                        or getattr(config, "original_max_position_embeddings", None)
                        or config.max_position_embeddings
                    ),
                    str(kind),
                )
            )
    return min(limits, default=None)


def long_rope_of(meta: MetaModel) -> LongRope | None:
    """The short rotary frequencies of a model that is imported with its long ones; None of others, and where
    kinds of layers have frequencies of their own.
    """
    limit = position_limit(meta.text_config)
    entry = getattr(meta.text_config, "rope_parameters", None) or {}
    if limit is None or entry.get("rope_type") != "longrope" or (meta.positions or 0) <= limit[0]:
        return None
    name = next(name for name, module in meta.model.named_modules() if hasattr(module, "original_inv_freq"))
    short = real_buffer(replace(meta, positions=limit[0]), f"{name}.inv_freq")
    return LongRope(limit[0], tuple(short.astype(np.float32).tolist()))


def export_model(meta: MetaModel) -> torch.export.ExportedProgram:
    """The exported graph of (input_ids, position_ids) [1, s] -> logits, s symbolic; equal layers are traced
    once where that can be (`layer_reuse`).

    `TyirError` when the model cannot be traced.
    """
    wrapper = _language(meta)
    try:
        with wrapper.reuse():
            return _trace(wrapper)
    except TyirError:
        raise
    except Exception:  # whatever reuse stumbles over; if the model itself cannot be traced, this says so
        return trace_all(meta)


def trace_all(meta: MetaModel) -> torch.export.ExportedProgram:
    """`export_model` without reuse: every layer is traced."""
    try:
        return _trace(_language(meta))
    except TyirError:
        raise
    except Exception as error:
        message = (
            f"torch.export cannot trace {type(meta.model).__name__} with a symbolic sequence length:"
            f" {_summary(error)}"
        )
        raise TyirError(
            message,
            help=(
                "the model's Python code depends on values or on the length of the prompt; such models cannot"
                " be compiled ahead of time"
            ),
        ) from error


def _language(meta: MetaModel) -> Any:
    """What is exported: (input ids, positions) to logits."""
    if not meta.sees:
        return _LogitsOnly(meta.model)
    return language_of(meta.model)


def _trace(wrapper: Any) -> torch.export.ExportedProgram:
    length = torch.export.Dim("s", min=1)
    with _quiet(), torch.no_grad(), wrapper.ready():
        return torch.export.export(
            wrapper,
            wrapper.examples(_EXAMPLE_LENGTH),
            dynamic_shapes=_dynamic(wrapper.dimensions(length)),
            strict=False,
        )


def _dynamic(dimensions: tuple[dict[int, Any], ...]) -> Any:
    """Dynamic shapes as torch.export wants them: what the last parameter collects is a tuple of its own."""
    ids, positions, *others = dimensions
    return (ids, positions, tuple(others)) if others else (ids, positions)


def export_tower(meta: MetaModel, size: ImageSize) -> tuple[torch.export.ExportedProgram, Tower]:
    """The exported graph of patches [N, columns] -> embeddings (and deepstack features) of a vision-language
    model's tower at one size, equal blocks traced once where that can be.

    `TyirError` when the tower cannot be traced, or is of a structure that is not known.
    """
    with _quiet():
        tower = tower_of(meta.model, size)
    patches = torch.zeros(size.patches, tower.columns, dtype=meta.model.dtype, device="meta")

    def trace() -> torch.export.ExportedProgram:
        with _quiet(), torch.no_grad(), tower.ready():
            return torch.export.export(tower.module, (patches,), strict=False)

    try:
        with layers_traced_once(meta.model.get_submodule(tower.path), f"{tower.path}."):
            return trace(), tower
    except TyirError:
        raise
    except Exception:
        try:
            return trace(), tower
        except TyirError:
            raise
        except Exception as error:
            raise TyirError(
                f"torch.export cannot trace the tower of {type(meta.model).__name__} at {size.name}:"
                f" {_summary(error)}",
                help="transformers 5.24 is the release this is tested with",
            ) from error


def real_buffer(meta: MetaModel, name: str) -> npt.NDArray[Any]:
    """The value of a buffer that no checkpoint stores (rotary frequencies): its submodule, built again on the
    CPU from the config.
    """
    owner_path, _, attribute = name.rpartition(".")
    owner = meta.model.get_submodule(owner_path)
    number = getattr(owner, f"scalar_{attribute}", None)  # a scaled embedding keeps its factor
    if isinstance(number, (int, float)):
        return np.asarray(number, np.float32)
    try:
        with _quiet(), torch.device("cpu"):
            rebuilt = type(owner)(owner.config)  # the constructor every rotary embedding of transformers has
            freeze_rope(rebuilt, meta.positions)
        return np.asarray(rebuilt.get_buffer(attribute).detach().cpu().numpy())
    except Exception as error:
        message = (
            f"buffer {name} is not in the checkpoint and {type(owner).__name__} cannot be built from the"
            f" config alone: {_summary(error)}"
        )
        raise TyirError(message, help="only buffers that follow from config.json can be imported") from error

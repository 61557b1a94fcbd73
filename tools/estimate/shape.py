"""The sizes `--plan` works with, read from config.json or from a GGUF file's metadata.

No tensor is read, torch is not imported.

What a config.json leaves out has the default of transformers' configuration class for that `model_type` (a
test compares them).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from tyir.diagnostics import Diagnostic, TyirError
from tyir.frontends.adapters import base_of
from tyir.frontends.checkpoint import StoredTensor
from tyir.frontends.config_numbers import config_problems
from tyir.frontends.quant_config import read_quant_config
from tyir.frontends.vision.llava import is_llava, not_in_own_format, translated_config
from tyir.process.files import json_kind, load_json, missing_hint
from tyir.tools.estimate.model import ModelShape

__all__ = ["FAMILIES", "Family", "language_config", "read_config", "read_shape"]

_SIZES: Final = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)
_FULL_EVERY: Final = 6  # layers of Gemma 3: the last of each six sees everything
_HEAD_KEYS: Final = ("lm_head", "lm_head_enable")  # GPTQ's and TyLLM's word for a quantised head
_RESTORE: Final = "restore config.json"


@dataclass(frozen=True)
class Family:
    """What a `model_type` adds to sizes: which biases its layers have, and its own defaults.

    A bias is True, False, or the config's key that says so.  `names`: what the config calls sizes; `only`:
    values that other settings must have for a plan to hold.  The other fields are those of `ModelShape`.
    """

    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool | str = False
    defaults: Mapping[str, Any] | None = None
    names: Mapping[str, str] | None = None
    only: Mapping[str, Any] | None = None
    gated: bool = True
    layer_norm: bool = False
    norm_bias: bool = False
    norms: int = 2
    head_norms: bool = False
    head_bias: bool = False
    rotary_tables: int = 1

    def flag(self, which: bool | str, raw: Mapping[str, Any]) -> bool:
        return (
            bool(raw.get(which, (self.defaults or {}).get(which, False))) if isinstance(which, str) else which
        )


_GPT: Final[dict[str, Any]] = {"gated": False, "layer_norm": True, "norm_bias": True}
_GEMMA: Final = {"head_dim": 256, "tie_word_embeddings": True}
_COHERE: Final[dict[str, Any]] = {
    "layer_norm": True,
    "norms": 1,
    "defaults": {"tie_word_embeddings": True, "max_position_embeddings": 8192},
}
_LLAMA: Final = Family("attention_bias", "attention_bias", "mlp_bias")
FAMILIES: Final[dict[str, Family]] = {
    "llama": _LLAMA,
    "mistral": Family(defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072}),
    "ministral": Family(defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072}),
    "qwen2": Family(qkv_bias=True, defaults={"num_key_value_heads": 32, "max_position_embeddings": 32768}),
    "qwen3": Family(
        "attention_bias",
        "attention_bias",
        qk_norm=True,
        defaults={"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768},
    ),
    "granite": _LLAMA,
    "phi3": Family(defaults={"max_position_embeddings": 4096}),
    "smollm3": Family(
        "attention_bias",
        "attention_bias",
        "mlp_bias",
        defaults={"num_key_value_heads": 4, "tie_word_embeddings": True, "max_position_embeddings": 32768},
    ),
    "seed_oss": Family(
        "attention_bias",
        "attention_out_bias",
        "mlp_bias",
        defaults={
            "num_key_value_heads": 8,
            "head_dim": 128,
            "attention_bias": True,
            "max_position_embeddings": 524288,
        },
    ),
    "exaone4": Family(qk_norm=True, defaults={"num_key_value_heads": 32}),
    "hunyuan_v1_dense": Family("attention_bias", "attention_bias", qk_norm=True),
    "gpt2": Family(
        True,
        True,
        True,
        names={
            "hidden_size": "n_embd",
            "intermediate_size": "n_inner",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "num_key_value_heads": "n_head",
            "max_position_embeddings": "n_positions",
        },
        defaults={"tie_word_embeddings": True, "max_position_embeddings": 1024},
        rotary_tables=0,
        **_GPT,
    ),
    "gpt_neox": Family(
        "attention_bias",
        "attention_bias",
        True,
        names={"num_key_value_heads": "num_attention_heads"},
        defaults={"attention_bias": True},
        **_GPT,
    ),
    "phi": Family(True, True, True, only={"qk_layernorm": False}, norms=1, head_bias=True, **_GPT),
    "opt": Family(
        "enable_bias",
        "enable_bias",
        "enable_bias",
        names={"intermediate_size": "ffn_dim", "num_key_value_heads": "num_attention_heads"},
        only={"do_layer_norm_before": True, "_remove_final_layer_norm": False},
        defaults={"enable_bias": True, "tie_word_embeddings": True},
        rotary_tables=0,
        **_GPT,
    ),
    "starcoder2": Family(
        "use_bias",
        "use_bias",
        "use_bias",
        defaults={
            "use_bias": True,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "max_position_embeddings": 4096,
        },
        **_GPT,
    ),
    "stablelm": Family(
        "use_qkv_bias",
        only={"qk_layernorm": False, "use_parallel_residual": False},
        defaults={"num_key_value_heads": 32, "max_position_embeddings": 4096},
        layer_norm=True,
        norm_bias=True,
    ),
    "gemma": Family(
        "attention_bias",
        "attention_bias",
        defaults={"num_key_value_heads": 16, "max_position_embeddings": 8192, **_GEMMA},
    ),
    "gemma2": Family(
        "attention_bias",
        "attention_bias",
        defaults={"num_key_value_heads": 4, "max_position_embeddings": 8192, **_GEMMA},
        norms=4,
    ),
    "gemma3_text": Family(
        "attention_bias",
        "attention_bias",
        qk_norm=True,
        defaults={"num_key_value_heads": 4, "max_position_embeddings": 131072, **_GEMMA},
        norms=4,
        rotary_tables=2,
    ),
    "cohere": Family("attention_bias", "attention_bias", qk_norm="use_qk_norm", head_norms=True, **_COHERE),
    "cohere2": Family("attention_bias", "attention_bias", **_COHERE),
    "cwm": Family(
        mlp_bias="mlp_bias",
        defaults={"num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072},
    ),
}


# The family that the language model of a vision-language model is of; LLaVA's says so itself.
_LANGUAGES: Final = {"qwen2_vl": "qwen2", "qwen2_5_vl": "qwen2", "qwen3_vl": "qwen3"}
# What Llama's class has by default, which converted LLaVA checkpoints leave out.
_LLAMA_7B: Final = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}


def language_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's part of a vision-language model's config; any other config as it is."""
    kind, text = raw.get("model_type"), raw.get("text_config")
    if kind not in (*_LANGUAGES, "llava"):
        return dict(raw)
    own = text if isinstance(text, dict) else raw
    tied = {"tie_word_embeddings": raw["tie_word_embeddings"]} if "tie_word_embeddings" in raw else {}
    defaults = _LLAMA_7B if kind == "llava" and own.get("model_type", "llama") == "llama" else {}
    language = _LANGUAGES.get(str(kind), own.get("model_type", "llama"))
    return {
        **{k: raw[k] for k in ("architectures", "quantization_config") if k in raw},
        **tied,
        **defaults,
        **{k: v for k, v in own.items() if k != "architectures"},
        "model_type": language,
    }


def read_config(path: Path, vision_tower: Path | None = None) -> tuple[Path, dict[str, Any]]:
    """The file that describes a model, and what it says; of LLaVA's own format what transformers' would."""
    where, raw, _ = _config(path, vision_tower)
    return where, raw


def read_shape(path: Path, base: Path | None = None, vision_tower: Path | None = None) -> ModelShape:
    """The sizes of a checkpoint folder, of a config.json itself, or of a GGUF file; of a vision-language
    model those of its language model.

    Of a LoRA adapter's folder those of its base model, `base` unless the adapter says it.  Which weights of a
    quantised base the adapter changes, so that they become fp16, its config alone does not say: all count so.

    `TyirError` lists every value that is missing or cannot be.
    """
    if (found := base_of(path, base)) is not None:
        return replace(_shape_of(found), group=None, quantised_head=False)
    return _shape_of(path, vision_tower)


def _shape_of(path: Path, vision_tower: Path | None = None) -> ModelShape:
    """`read_shape` of a whole model."""
    where, raw, tensors = _config(path, vision_tower)
    if problems := list(config_problems(raw, str(where))):
        raise TyirError(problems)
    raw = language_config(raw)
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise TyirError(
            f"no plan can be made for model_type {kind!r}",
            where=str(where),
            help=f"planned from config.json alone: {', '.join(FAMILIES)}",
        )
    family = FAMILIES[kind]
    quant = read_quant_config(where.parent, raw, problems)
    for key, value in (family.only or {}).items():
        if raw.get(key, value) != value:
            what = f"{key} is {raw[key]}; a plan can only be made where it is {value}"
            problems.append(Diagnostic(what, where=str(where), help="compile the model to see its sizes"))
    sizes = _sizes(raw, family, where, problems)
    if problems:
        raise TyirError(problems)
    names = raw.get("architectures")
    return ModelShape(
        name=str(names[0]) if isinstance(names, list) and names else kind,
        layers=sizes["num_hidden_layers"],
        hidden=sizes["hidden_size"],
        width=sizes["intermediate_size"],
        heads=sizes["num_attention_heads"],
        kv_heads=sizes["num_key_value_heads"],
        head_dim=sizes["head_dim"],
        vocabulary=sizes["vocab_size"],
        positions=sizes["max_position_embeddings"],
        tied=family.flag("tie_word_embeddings", raw),
        qkv_bias=family.flag(family.qkv_bias, raw),
        o_bias=family.flag(family.o_bias, raw),
        mlp_bias=family.flag(family.mlp_bias, raw),
        qk_norm=family.flag(family.qk_norm, raw),
        gated=family.gated,
        layer_norm=family.layer_norm,
        norm_bias=family.norm_bias,
        norms=family.norms,
        head_norms=family.head_norms and family.flag(family.qk_norm, raw),
        head_bias=family.head_bias,
        rotary_tables=_rotary_tables(family, raw, sizes["num_hidden_layers"]),
        short_positions=_short_positions(raw),
        group=(
            _gguf_group(tensors)
            if quant is None
            else None
            if quant.reordered  # groups that are not ranges of channels become fp16
            else quant.group_size or 0
        ),
        quantised_head=(
            _gguf_head(tensors)
            if quant is None
            else any((raw.get("quantization_config") or {}).get(key) is True for key in _HEAD_KEYS)
        ),
    )


def _rotary_tables(family: Family, raw: Mapping[str, Any], layers: int) -> int:
    """How many of a family's rotary tables the model's layers use: one for each kind of layer."""
    kinds = raw.get("layer_types")
    if family.rotary_tables < 2:
        return family.rotary_tables
    return len(set(kinds)) if isinstance(kinds, list) else 2 if layers >= _FULL_EVERY else 1


def _short_positions(raw: Mapping[str, Any]) -> int:
    """Up to how many tokens a model has other rotary frequencies than its long ones, 0 for one set."""
    entry = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(entry, Mapping) or entry.get("rope_type", entry.get("type")) != "longrope":
        return 0
    key = "original_max_position_embeddings"
    found = entry.get(key) or raw.get(key) or raw.get("max_position_embeddings")
    return found if type(found) is int and found > 0 else 0


def _config(path: Path, vision_tower: Path | None) -> tuple[Path, dict[str, Any], Mapping[str, StoredTensor]]:
    """The file that was read, its config, and the tensors of a GGUF file.

    The tensors' types say what stays 4-bit.
    """
    from tyir.frontends.gguf.files import gguf_model, read_gguf

    files = () if path.is_dir() and any(path.glob("*.safetensors")) else gguf_model(path)
    if not files:
        where = path / "config.json" if path.is_dir() else path
        raw = _json(where)
        if is_llava(raw):
            raw = translated_config(raw, where.parent, vision_tower)
        elif vision_tower is not None:
            raise TyirError(not_in_own_format(where.parent))
        return where, raw, {}
    beside = files[0].parent / "config.json"
    config, tensors = read_gguf(files, needs_config=not beside.exists())
    return files[0], _json(beside) if beside.exists() else config, tensors


def _gguf_group(tensors: Mapping[str, StoredTensor]) -> int | None:
    """32 when every decoder linear is Q4_0, the one block format that stays 4-bit.

    Otherwise all are taken for fp16, which is never too little.
    """
    linears = [t for name, t in tensors.items() if ".layers." in name and len(t.type.dims) == 2]
    return 32 if linears and all(t.encoding == "Q4_0" for t in linears) else None


def _gguf_head(tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether the head's matrix (the embedding's when they are tied) stays 4-bit."""
    head = tensors.get("lm_head.weight", tensors.get("model.embed_tokens.weight"))
    return head is not None and head.encoding == "Q4_0"


def _json(path: Path) -> dict[str, Any]:
    try:
        raw = load_json(path)
    except OSError as error:
        raise TyirError(
            f"cannot read {path}: {error.strerror}",
            help=missing_hint(path.parent if path.name == "config.json" else path)
            or "give a checkpoint folder, its config.json, or a GGUF file",
        ) from None
    except ValueError as error:
        raise TyirError(f"{path} is not valid JSON: {error}", help=_RESTORE) from None
    if not isinstance(raw, dict):
        raise TyirError(f"{path} holds a JSON {json_kind(raw)}, an object is needed", help=_RESTORE)
    return raw


def _sizes(raw: Mapping[str, Any], family: Family, path: Path, problems: list[Diagnostic]) -> dict[str, int]:
    """The whole numbers of a config, with transformers' defaults."""
    found: dict[str, int] = {}
    raw = {**raw, **{key: raw[name] for key, name in (family.names or {}).items() if name in raw}}
    heads, hidden = raw.get("num_attention_heads"), raw.get("hidden_size")
    derived = hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads > 0 else None
    defaults = {
        "num_key_value_heads": heads,
        "head_dim": derived,
        "max_position_embeddings": 2048,
        "intermediate_size": 4 * hidden if isinstance(hidden, int) and not family.gated else None,
        **(family.defaults or {}),
    }
    for key in _SIZES:
        value = raw[key] if raw.get(key) is not None else defaults.get(key)
        if key == "num_key_value_heads" and key in raw and raw[key] is None:
            value = heads  # an explicit null means as many as query heads
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            problems.append(
                Diagnostic(
                    f"{key} is {value!r}; a positive whole number is needed", where=str(path), help=_RESTORE
                )
            )
            value = 1
        found[key] = value
    if found["num_attention_heads"] % found["num_key_value_heads"]:
        message = (
            f"{found['num_attention_heads']} query heads are not a multiple of {found['num_key_value_heads']}"
            " key/value heads"
        )
        problems.append(Diagnostic(message, where=str(path), help=_RESTORE))
    if found["head_dim"] % 2:
        message = f"head_dim is {found['head_dim']}; rotary embeddings need an even number"
        problems.append(Diagnostic(message, where=str(path), help=_RESTORE))
    return found

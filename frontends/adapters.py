"""LoRA adapters: a folder with adapter_config.json and the factors A and B of some weights, merged into the
base model they belong to.

The merged weight is W + s B A, with s = lora_alpha / r (over the square root of r with use_rslora), computed
in f32 and rounded once.  Format and formula: https://github.com/huggingface/peft (LoraConfig, LoraLayer).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from tyir.diagnostics import Diagnostic, TyirError
from tyir.dialects import quant, ty
from tyir.frontends.checkpoint import TENSOR_FILES, Checkpoint, StoredTensor
from tyir.frontends.vision.llava import in_own_format
from tyir.frontends.weights import Emit, PlainFormat, WeightFormat, Weights
from tyir.ir import Value
from tyir.text.json_files import read_json_object
from tyir.types import TensorType, Type, f32

__all__ = ["CONFIG", "FILES", "LoraFormat", "base_folder", "base_of", "merged", "no_base"]

CONFIG: Final = "adapter_config.json"
FILES: Final = ("adapter_model.safetensors", "adapter_model.bin")
_WRAPPER: Final = "base_model.model."  # what PEFT puts before the names of the model
_WRAPPED: Final = ".base_layer."  # an embedding that has factors is stored whole as well
_FACTOR: Final = re.compile(r"(.*)\.(?:lora_|lora_embedding_)([AB])(?:\.\w+)?")
_A, _B = ".lora_A", ".lora_B"
# Settings that change what is computed, and the values with which it is W + s B A.
_NEEDED: Final[dict[str, tuple[Any, ...]]] = {
    "peft_type": ("LORA",),
    "use_dora": (None, False),
    "fan_in_fan_out": (None, False),
    "lora_bias": (None, False),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (None, False),
}
# Ways of beginning the training that take something from the base weights first.
_CHANGED_BASE: Final = ("pissa", "olora", "corda", "loftq")


def base_folder(folder: Path, config: Mapping[str, Any], own_weights: bool) -> Path | None:
    """Where the base model of the adapter in `folder` is, as far as its config says: the folder itself when
    it holds weights, or base_model_name_or_path when that is a folder here.
    """
    if own_weights:
        return folder
    name = config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        return None
    places = (Path(name), folder / name, folder.parent / name)
    return next((place for place in places if (place / "config.json").is_file()), None)


def base_of(folder: Path, base: Path | None = None) -> Path | None:
    """The folder of the base model, `base` unless the adapter in `folder` says it; None where there is no
    adapter.  `TyirError` when the base is not here, and for a `base` of what needs none.
    """
    if not (folder / CONFIG).is_file():
        if base is not None and not in_own_format(folder):
            raise TyirError(
                f"{folder} is not a LoRA adapter: it holds no {CONFIG}",
                help="leave --base out, or give the adapter's folder",
            )
        return None
    config = read_json_object(folder / CONFIG, "restore it from where the adapter came from")
    own = any((folder / name).exists() for name in TENSOR_FILES)
    if (found := base or base_folder(folder, config, own)) is None:
        raise TyirError(no_base(folder, config))
    return found


def merged(
    base: Checkpoint,
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, StoredTensor],
    problems: list[Diagnostic],
) -> Checkpoint:
    """`base` with the tensors of an adapter beside its own; `LoraFormat` adds them.

    What the adapter stores whole (modules_to_save, biases, embeddings with factors) takes the place of the
    base's.
    """
    where = str(folder / CONFIG)
    if unsupported := _unsupported(config):
        problems.extend(
            Diagnostic(f"the adapter has {what}, which is not merged", where=where, help=_MERGE)
            for what in unsupported
        )
        return base
    found, scales = dict(base.tensors), dict[str, float]()
    for key, stored in tensors.items():
        name = key.removeprefix(_WRAPPER).replace(_WRAPPED, ".")
        moved = replace(stored, file=str(folder / stored.file))
        match = _FACTOR.fullmatch(name.removesuffix(".weight"))
        if match is None:
            module = name.rpartition(".")[0]
            if name.endswith(".weight"):
                for other in [n for n in found if n.rpartition(".")[0] == module and not n.endswith(".bias")]:
                    del found[other]
            found[name] = moved
            continue
        found[f"{match[1]}.lora_{match[2]}"] = moved
        if match[2] == "A":
            scales[stored.key] = _scale(match[1], stored, config)
    stamps = {str(folder / name): stamp for name, stamp in _stamps(folder, tensors).items()}
    return replace(
        base, tensors=found, stamps={**base.stamps, **stamps}, low_rank={**base.low_rank, **scales}
    )


_MERGE: Final = "merge it with PEFT (merge_and_unload, save_pretrained) and import the result"


def _stamps(folder: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, Any]:
    from tyir.execution.weights import FileStamp

    return {name: FileStamp.of(folder / name) for name in sorted({t.file for t in tensors.values()})}


def _unsupported(config: Mapping[str, Any]) -> list[str]:
    found = [
        f"{key} {config.get(key)!r}" for key, accepted in _NEEDED.items() if config.get(key) not in accepted
    ]
    begun = config.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower().startswith(_CHANGED_BASE):
        found.append(f"init_lora_weights '{begun}'")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not (isinstance(alpha, (int, float)) and isinstance(rank, int)):
        found.append(f"r {rank!r} and lora_alpha {alpha!r}")
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or not all(isinstance(v, (int, float)) for v in patterns.values()):
        found.append(f"alpha_pattern {patterns!r}")
    return found


def _scale(module: str, stored: StoredTensor, config: Mapping[str, Any]) -> float:
    """s of one module; its rank is that of the stored factor A [r, K]."""
    rank = stored.type.dims[0] or 1
    patterns: Mapping[str, float] = config.get("alpha_pattern") or {}
    matching = (value for key, value in patterns.items() if _matches(key, module))
    alpha = next(matching, config["lora_alpha"])
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _matches(key: str, module: str) -> bool:
    """Whether a key of a pattern means a module: its name or the end of it, or a regular expression."""
    try:
        return re.fullmatch(rf"(.*\.)?({key})", module) is not None
    except re.error:
        return False


@dataclass(frozen=True)
class LoraFormat:
    """A parameter of one of the `inner` formats, and the factors beside it: A [r, K] and B [N, r] of a
    linear, A [r, N] and B [K, r] of an embedding.
    """

    inner: Sequence[WeightFormat]

    def _inner(self, name: str, tensors: Mapping[str, StoredTensor]) -> WeightFormat | None:
        return next((f for f in self.inner if f.stored_keys(name, tensors)), None)

    def stored_keys(self, name: str, tensors: Mapping[str, StoredTensor]) -> tuple[str, ...]:
        factors, inner = _factors(name, tensors), self._inner(name, tensors)
        return () if inner is None or factors is None else (*inner.stored_keys(name, tensors), *factors)

    def problem(self, name: str, shape: tuple[int, ...], tensors: Mapping[str, StoredTensor]) -> str | None:
        inner, factors = self._inner(name, tensors), _factors(name, tensors)
        assert inner is not None and factors is not None
        if (problem := inner.problem(name, shape, tensors)) is not None:
            return problem
        a, b = (tensors[key].type.static_shape for key in factors)
        (n, k), (rank, *_) = shape, a
        if (a, b) not in (((rank, k), (n, rank)), ((rank, n), (k, rank))):
            return (
                f"the adapter's factors of '{name}' are {list(a)} and {list(b)}, the weight is {list(shape)}"
            )
        plain = PlainFormat()
        return next((p for f, d in zip(factors, (a, b)) if (p := plain.problem(f, d, tensors))), None)

    def value(self, name: str, element: Type, weights: Weights, emit: Emit) -> Value:
        tensors = weights.checkpoint.tensors
        inner, factors = self._inner(name, tensors), _factors(name, tensors)
        assert inner is not None and factors is not None
        base = inner.value(name, f32, weights, emit)
        a, b = (PlainFormat().value(key, f32, weights, emit) for key in factors)
        assert isinstance(base.type, TensorType) and isinstance(a.type, TensorType)
        if "lora_embedding_" in tensors[factors[0]].key:
            a, b = (emit(ty.Transpose(v, perm=(1, 0))).result for v in (b, a))
        scale = weights.checkpoint.low_rank[tensors[factors[0]].key]
        return emit(quant.AddLowRank(base, a, b, scale=scale, element=element)).result


def _factors(name: str, tensors: Mapping[str, StoredTensor]) -> tuple[str, str] | None:
    module = name.removesuffix(".weight")
    keys = (module + _A, module + _B)
    return keys if module != name and all(key in tensors for key in keys) else None


def no_base(folder: Path, config: Mapping[str, Any]) -> Diagnostic:
    """What to say of an adapter whose base is not here."""
    name = config.get("base_model_name_or_path")
    whose = f"its base is '{name}'" if isinstance(name, str) and name else "its config names no base"
    return Diagnostic(
        f"{folder} holds a LoRA adapter, not a whole model; {whose}",
        where=str(folder / CONFIG),
        help="give the folder of the base model with --base",
    )

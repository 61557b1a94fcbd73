"""The values of a config.json: numbers finite and within what their keys mean, the rest of the right kind.

A checkpoint whose `rms_norm_eps` is NaN compiles as well as any other and answers nothing, so every family's
numbers are looked at before a model is built.  What a key means is decided by its name, which families share;
a name that is in no rule need only be finite.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from tyir.diagnostics import Diagnostic

__all__ = ["config_problems"]

_HELP: Final = "compare it with the config.json of the original model"


@dataclass(frozen=True)
class _Sense:
    """Keys that match `keys` hold numbers for which `holds`, in words `needed`."""

    keys: str
    holds: Callable[[float], bool]
    needed: str
    of_rope: bool = False  # only within a description of rotary embeddings
    or_word: bool = False  # or a rule of the model's own, as `inv_sqrt_d_model`


def _positive(value: float) -> bool:
    return value > 0


_SENSES: Final = (
    _Sense(r".+(eps|epsilon)", lambda v: 0 < v < 1, "a number between 0 and 1"),
    _Sense(r".*theta|rope_local_base_freq|rotary_emb_base", _positive, "a number above 0"),
    _Sense(r"(?!moe_).*soft_?cap(ping)?", _positive, "a number above 0, or null for no cap"),
    _Sense(
        r"query_pre_attn_scalar|.*_multiplier|logits?_scal(e|ing)|scale_(emb|depth)|softmax_scale|clip_qkv",
        _positive,
        "a number above 0",
        or_word=True,
    ),
    _Sense(r"partial_rotary_factor|rotary_(pct|percent)", lambda v: 0 < v <= 1, "a number in 0..1, not 0"),
    _Sense(r"(short_|long_)?mscale.*", lambda v: v >= 0, "a number from 0 on", of_rope=True),
    _Sense(r".*factor|beta_.*", _positive, "a number above 0", of_rope=True),
    _Sense(
        r"(vocab|hidden|intermediate|ffn_hidden)_size|(original_)?max_position_embeddings|head_dim"
        r"|num_(hidden_layers|attention_heads|key_value_heads|kv_heads)|n_(embd|layers?|heads?|positions|ctx|inner)"
        r"|d_model|ffn_dim|word_embed_proj_dim|rotary_dim|sliding_window",
        lambda v: 1 <= v < 2**31 and v == int(v),
        "a whole number from 1 to 2^31 - 1",
    ),
)


# The most that a model may have of what transformers makes one by one, a module or a name each; the largest
# have some 200 layers.
_MOST_PARTS: Final = {"layer": 1000, "expert": 100_000, "label": 100_000}
_COUNTS: Final = re.compile(
    r"(.*_)?(n|num)_.*|.*s"
)  # `num_hidden_layers`, `n_layer`; `vocab_size_per_layer` does not

# Of keys whose value all families understand alike; where null means the default it is one of the kinds.
_NOTHING: Final = type(None)
_FLAG: Final = ((bool, _NOTHING), "true or false")
_TABLE: Final = ((dict, _NOTHING), "an object")
_COUNT: Final = ((int, float, str), "a whole number from 1 to 2^31 - 1")  # what is no number has been said
_SIZES: Final = ((int, float, str, list, _NOTHING), "a whole number from 1 to 2^31 - 1")
_KINDS: Final[dict[str, tuple[tuple[type, ...], str]]] = {
    "hidden_size": _COUNT,
    "num_hidden_layers": _COUNT,
    "vocab_size": _COUNT,
    "intermediate_size": _SIZES,
    "num_attention_heads": _SIZES,
    "num_key_value_heads": _SIZES,
    "head_dim": _SIZES,
    "max_position_embeddings": _SIZES,
    "tie_word_embeddings": _FLAG,
    "quantization_config": _TABLE,
    "auto_map": _TABLE,
    "id2label": _TABLE,
    "rope_parameters": _TABLE,
    "rope_scaling": _TABLE,
    "text_config": _TABLE,
    "use_cache": _FLAG,
    "use_sliding_window": _FLAG,
    "hidden_act": ((str, _NOTHING), "a name"),
    "layer_types": ((list, _NOTHING), "a list"),
    "dtype": ((str, _NOTHING), "a name"),
    "torch_dtype": ((str, _NOTHING), "a name"),
}


def config_problems(config: Mapping[str, Any], where: str) -> Iterator[Diagnostic]:
    """One problem for each number of a config that is not finite, not what its key means, or more than a
    model has, by key and value.

    `where` is the file it came from.
    """
    for key, value in _scalars(config, ""):
        if (needed := _needed(config, key, value)) is not None:
            yield Diagnostic(f"'{key}' is {_said(value)}, {needed} is needed", where=where, help=_HELP)
        elif (problem := _too_large(key, value)) is not None:
            yield Diagnostic(problem, where=where, help=_HELP)
    for key, (kinds, needed) in _KINDS.items():
        if key in config and not isinstance(config[key], kinds):
            yield Diagnostic(f"'{key}' is {_said(config[key])}, {needed} is needed", where=where, help=_HELP)
    for name in ("rope_parameters", "rope_scaling"):
        entry = config.get(name)
        if isinstance(entry, dict):
            yield from _frequency_bands(name, entry, where)


def _too_large(key: str, value: Any) -> str | None:
    """What is wrong with a number that no model has; key by key, since the model is made of them before any
    tensor is looked at.
    """
    if not isinstance(value, int) or value <= min(_MOST_PARTS.values()):
        return None
    if value.bit_length() > 63:
        return f"'{key}' has more than 63 bits"
    name = key.rpartition(".")[2]  # what lies below `per_layer_config` counts no layers
    parts = _MOST_PARTS.items() if _COUNTS.fullmatch(name) else ()
    most = min((most for part, most in parts if part in name), default=value)
    return f"'{key}' is {value}, more than the {most} that a model may have" if value > most else None


def _scalars(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Every scalar below a value, with its path of keys: `rope_scaling.short_factor[3]`."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _scalars(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)):
        for number, inner in enumerate(value):
            yield from _scalars(inner, f"{key}[{number}]")
    elif value is not None:
        yield key, value


def _needed(config: Mapping[str, Any], key: str, value: Any) -> str | None:
    """What the key needs instead of the value; None when the value will do."""
    *above, last = key.split(".")
    name, rope = last.partition("[")[0], any(p.startswith("rope_") for p in above)
    sense = _sense_of(name, rope)
    if not rope and any(p != "text_config" for p in above):
        sense = None  # a quantisation's or a vision tower's keys mean other things
    if name == "sliding_window" and config.get("use_sliding_window") is False:
        sense = None  # the window is not used
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number and not _is_finite(value):
        return sense.needed if sense is not None else "a finite number"
    if sense is None or (isinstance(value, bool) and name.startswith("use_")):
        return None
    if sense.or_word and isinstance(value, str) and not _looks_like_a_number(value):
        return None
    return None if number and sense.holds(value) else sense.needed


@lru_cache(4096)
def _sense_of(name: str, rope: bool) -> _Sense | None:
    """What a key's numbers mean, where that is known; `rope`: it describes rotary embeddings."""
    return next((s for s in _SENSES if re.fullmatch(s.keys, name) and (rope or not s.of_rope)), None)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int that no float can hold
        return False


def _looks_like_a_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _said(value: Any) -> str:
    """A value as JSON writes it, cut where it is long."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, bool):
        return str(value).lower()
    text = f'"{value}"' if isinstance(value, str) else hex(value) if _is_long(value) else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _is_long(value: Any) -> bool:
    """An int whose decimal digits Python refuses to write."""
    return isinstance(value, int) and value.bit_length() > 10_000


def _frequency_bands(name: str, entry: Mapping[str, Any], where: str) -> Iterator[Diagnostic]:
    """`llama3` blends frequencies between two factors and divides by their difference."""
    low, high = entry.get("low_freq_factor"), entry.get("high_freq_factor")
    if isinstance(low, (int, float)) and isinstance(high, (int, float)) and high <= low:
        message = f"'{name}.high_freq_factor' is {high}, a number above low_freq_factor, {low}, is needed"
        yield Diagnostic(message, where=where, help=_HELP)

"""What a checkpoint says about its own quantisation: `quantization_config` of config.json, or the side files
that older tools wrote.

The tensors decide what is quantised; the config only says how to read them.  Everything that cannot be read
is a problem that names the value and what is accepted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tyir.diagnostics import Diagnostic
from tyir.process.files import load_json

__all__ = ["QuantConfig", "read_quant_config"]

METHODS: Final = ("awq", "gptq", "compressed-tensors")
_SIDE_FILES: Final = (
    ("quant_config.json", "awq"),
    ("quantize_config.json", "gptq"),
)  # before transformers knew the formats


@dataclass(frozen=True)
class QuantConfig:
    """`group_size` None: one group per row, or not said.  `excluded`: name parts (or names) of what is said
    not to be quantised.

    `zero_shift` is what must be added to stored zero points; `reordered` that groups may not be contiguous
    (GPTQ's desc_act, actorder).
    """

    method: str
    group_size: int | None
    excluded: tuple[str, ...] = ()
    zero_shift: int = 0
    reordered: bool = False
    symmetric: bool = False


def read_quant_config(
    folder: Path, config: Mapping[str, Any], problems: list[Diagnostic]
) -> QuantConfig | None:
    """The quantisation of a checkpoint, None when it has none or one that cannot be read (then a problem is
    appended).
    """
    where = str(folder / "config.json")
    raw = config.get("quantization_config") or config.get("compression_config")
    if raw is None:
        where, raw = _side_file(folder)
    if raw is None:
        return None
    if not isinstance(raw, dict):
        problems.append(
            Diagnostic(
                f"quantization_config is {raw!r}, an object is needed",
                where=where,
                help="restore config.json",
            )
        )
        return None
    method = str(raw.get("quant_method", "unknown")).lower()
    reader = {"awq": _awq, "gptq": _gptq, "compressed-tensors": _compressed_tensors}.get(method)
    if reader is None:
        help = (
            f"formats that can be imported: {', '.join(METHODS)} (4 bits each), GGUF, and unquantised"
            " checkpoints"
        )
        problems.append(
            Diagnostic(
                f"the checkpoint is quantised with quant_method '{method}', which cannot be imported",
                where=where,
                help=help,
            )
        )
        return None
    found = reader(raw)
    if isinstance(found, QuantConfig):
        return found
    help = f"import the unquantised checkpoint, or quantise it again as {_ACCEPTED[method]}"
    problems.extend(
        Diagnostic(f"{method} checkpoint with {what} cannot be imported", where=where, help=help)
        for what in found
    )
    return None


_ACCEPTED: Final = {
    "awq": 'AutoAWQ\'s 4-bit "gemm"',
    "gptq": "4-bit gptq or gptq_v2",
    "compressed-tensors": "4-bit pack-quantized weights by group or channel",
}


def _side_file(folder: Path) -> tuple[str, dict[str, Any] | None]:
    for name, method in _SIDE_FILES:
        path = folder / name
        try:
            content = load_json(path)
        except (OSError, ValueError):
            continue
        if isinstance(content, dict):
            return str(path), {**content, "quant_method": method}
    return "", None


def _group(value: Any) -> int | str | None:
    """A group size as written: positive, or -1 or null for one group per row; otherwise what is wrong."""
    if value is None or value == -1:
        return None
    return (
        value
        if isinstance(value, int) and not isinstance(value, bool) and value > 0
        else f"group_size {value!r} (a positive number or -1)"
    )


def _names(value: Any) -> tuple[str, ...]:
    return tuple(str(v) for v in value) if isinstance(value, list) else ()


def _awq(raw: Mapping[str, Any]) -> QuantConfig | list[str]:
    bits, version = raw.get("bits", raw.get("w_bit", 4)), str(raw.get("version", "gemm")).lower()
    group = _group(raw.get("group_size", raw.get("q_group_size", 128)))
    wrong = [f"bits {bits!r} (4 is accepted)"] if bits != 4 else []
    wrong += [f"version '{version}' ('gemm' is accepted)"] if version != "gemm" else []
    wrong += (
        [f"zero_point {raw['zero_point']!r} (true is accepted)"]
        if raw.get("zero_point", True) is not True
        else []
    )
    if isinstance(group, str):
        return [*wrong, group]
    return wrong or QuantConfig("awq", group, _names(raw.get("modules_to_not_convert")))


def _gptq(raw: Mapping[str, Any]) -> QuantConfig | list[str]:
    bits, form = raw.get("bits", 4), str(raw.get("checkpoint_format", raw.get("format", "gptq"))).lower()
    group = _group(raw.get("group_size", 128))
    wrong = [f"bits {bits!r} (4 is accepted)"] if bits != 4 else []
    wrong += (
        [f"checkpoint_format '{form}' (gptq and gptq_v2 are accepted)"]
        if form not in ("gptq", "gptq_v2")
        else []
    )
    if isinstance(group, str):
        return [*wrong, group]
    shift, reordered = int(form == "gptq"), bool(raw.get("desc_act", False))
    return wrong or QuantConfig(
        "gptq",
        group,
        _names(raw.get("modules_in_block_to_not_quantize")),
        shift,
        reordered,
        bool(raw.get("sym", True)),
    )


def _compressed_tensors(raw: Mapping[str, Any]) -> QuantConfig | list[str]:
    groups = raw.get("config_groups")
    schemes = [g for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []
    if len(schemes) != 1:
        return [f"{len(schemes)} config_groups (one is accepted)"]
    weights = schemes[0].get("weights")
    weights = weights if isinstance(weights, dict) else {}
    form = schemes[0].get("format") or raw.get("format")
    wanted: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "format": (form, ("pack-quantized",)),
        "num_bits": (weights.get("num_bits"), (4,)),
        "type": (weights.get("type", "int"), ("int",)),
        "strategy": (weights.get("strategy", "group"), ("group", "channel")),
        "input_activations": (schemes[0].get("input_activations"), (None,)),
        "kv_cache_scheme": (raw.get("kv_cache_scheme"), (None,)),
    }
    wrong = [
        f"{key} {value!r} ({', '.join(map(str, ok))} is accepted)"
        for key, (value, ok) in wanted.items()
        if value not in ok
    ]
    group = _group(weights.get("group_size"))
    if isinstance(group, str):
        return [*wrong, group]
    if weights.get("strategy") == "channel":
        group = None
    reordered = weights.get("actorder") not in (None, False, "weight", "static")
    return wrong or QuantConfig(
        "compressed-tensors",
        group,
        _names(raw.get("ignore")),
        0,
        reordered,
        bool(weights.get("symmetric", True)),
    )

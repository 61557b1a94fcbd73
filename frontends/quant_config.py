"""What a checkpoint says about its own quantisation: `quantization_config` of config.json, or the side files
that older tools wrote.

The tensors decide what is quantised; the config only says how to read them.  Everything that cannot be read
is a problem that names the value and what is accepted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tyir.diagnostics import Diagnostic
from tyir.process.files import load_json

__all__ = ["QuantConfig", "read_quant_config"]

METHODS: Final = ("awq", "gptq", "compressed-tensors", "auto-round")
_OTHER_NAMES: Final = {"intel/auto-round": "auto-round", "autoround": "auto-round"}  # of AutoRound before 0.5
# What older tools wrote beside config.json: (file, its method when it does not say so itself).
_SIDE_FILES: Final = (
    ("quant_config.json", "awq"),
    ("quantize_config.json", "gptq"),
    ("quantization_config.json", "unknown"),
)


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
    method = _OTHER_NAMES.get(method, method)
    reader = _READERS.get(method)
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


def _side_file(folder: Path) -> tuple[str, dict[str, Any] | None]:
    for name, method in _SIDE_FILES:
        path = folder / name
        try:
            content = load_json(path)
        except (OSError, ValueError):
            continue
        if isinstance(content, dict):
            return str(path), {"quant_method": method, **content}
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


Fields = Mapping[str, tuple[Any, tuple[Any, ...]]]


def _refused(fields: Fields) -> list[str]:
    """The fields, (value, accepted values) by name, whose value is another one."""
    return [
        f"{name} {value!r} ({' and '.join(map(_written, accepted))} {'is' if len(accepted) == 1 else 'are'}"
        " accepted)"
        for name, (value, accepted) in fields.items()
        if value not in accepted
    ]


def _written(value: Any) -> str:
    return (
        {None: "null", True: "true", False: "false"}.get(value, str(value)) if _plain(value) else str(value)
    )


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _awq(raw: Mapping[str, Any]) -> QuantConfig | list[str]:
    form = raw.get("version", raw.get("checkpoint_format", raw.get("format", "gemm")))
    group = _group(raw.get("group_size", raw.get("q_group_size", 128)))
    wrong = _refused({
        "bits": (raw.get("bits", raw.get("w_bit", 4)), (4,)),
        "version": (str(form).lower(), ("gemm",)),
        "zero_point": (raw.get("zero_point", True), (True, False)),  # GPTQModel stores zero points of 8
    })  # fmt: skip
    if isinstance(group, str):
        return [*wrong, group]
    return wrong or QuantConfig("awq", group, _names(raw.get("modules_to_not_convert")))


def _gptq(raw: Mapping[str, Any]) -> QuantConfig | list[str]:
    form = str(raw.get("checkpoint_format", raw.get("format", "gptq"))).lower()
    group = _group(raw.get("group_size", 128))
    wrong = _refused({
        "bits": (raw.get("bits", 4), (4,)),
        "checkpoint_format": (form, ("gptq", "gptq_v2")),
        "is_marlin_format": (raw.get("is_marlin_format", False), (False, None)),
        "pack_dtype": (raw.get("pack_dtype", "int32"), ("int32", None)),
        "rotation": (raw.get("rotation"), (None,)),
        "adapter": (raw.get("adapter"), (None,)),
    })  # fmt: skip
    excluded = list(_names(raw.get("modules_in_block_to_not_quantize")))
    dynamic = raw.get("dynamic")
    for pattern, changes in dynamic.items() if isinstance(dynamic, dict) else ():
        if not str(pattern).startswith("-"):
            wrong += _changed(f"dynamic['{pattern}'].", changes, raw, ("bits", "group_size"))
    if isinstance(group, str):
        return [*wrong, group]
    shift, reordered = int(form == "gptq"), bool(raw.get("desc_act", False))
    return wrong or QuantConfig("gptq", group, tuple(excluded), shift, reordered, bool(raw.get("sym", True)))


def _changed(prefix: str, changes: Any, raw: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Settings of some modules that differ from those of the whole."""
    given = changes if isinstance(changes, dict) else {}
    return _refused({f"{prefix}{n}": (given[n], (raw.get(n),)) for n in names if given.get(n) is not None})


_WHOLE_BITS: Final = 16  # of a module that AutoRound leaves as it is


def _auto_round(raw: Mapping[str, Any]) -> QuantConfig | list[str]:
    """AutoRound packs as GPTQ (version 1) or AutoAWQ do; `packing_format`, `backend` before 0.4.3, says
    which.
    """
    form = str(raw.get("packing_format") or raw.get("backend") or "auto_round:auto_gptq").lower()
    group = _group(raw.get("group_size", 128))
    wrong = _refused({
        "bits": (raw.get("bits", 4), (4,)),
        "data_type": (raw.get("data_type", "int"), ("int",)),
        "act_bits": (raw.get("act_bits"), (None, 16, 32)),
        "super_bits": (raw.get("super_bits"), (None,)),
    })  # fmt: skip
    parts = set(form.split(":"))
    if not parts & {"auto_gptq", "gptq", "auto_awq", "awq"}:
        wrong.append(f"packing_format '{form}' (auto_round:auto_gptq and auto_round:auto_awq are accepted)")
    excluded = []
    modules = raw.get("extra_config")
    for module, changes in modules.items() if isinstance(modules, dict) else ():
        if isinstance(changes, dict) and (changes.get("bits") or 0) >= _WHOLE_BITS:
            excluded.append(str(module))
        else:
            wrong += _changed(f"extra_config['{module}'].", changes, raw, ("bits", "group_size", "sym"))
    if isinstance(group, str):
        return [*wrong, group]
    if wrong:
        return wrong
    if parts & {"auto_awq", "awq"}:
        return QuantConfig("awq", group, tuple(excluded))
    return QuantConfig("gptq", group, tuple(excluded), 1, False, bool(raw.get("sym", True)))


# Settings of a compressed-tensors scheme's weights that say how they were found or stored, not what they are.
_HARMLESS: Final = ("observer", "observer_kwargs", "scale_dtype", "zp_dtype", "group_size", "symmetric")
_ACTORDERS: Final = (None, False, "weight", "static", "group", "dynamic", True)


def _compressed_tensors(raw: Mapping[str, Any]) -> QuantConfig | list[str]:
    groups = raw.get("config_groups")
    schemes = [g for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []
    if not schemes:
        return ["no config_groups"]
    first, *others = schemes
    weights = first.get("weights")
    weights = weights if isinstance(weights, dict) else {}
    if any(other.get("weights") != first.get("weights") for other in others):
        return [f"{len(schemes)} config_groups whose weights differ (one kind is accepted)"]
    sparsity = raw.get("sparsity_config") or {}
    fields: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "format": (first.get("format") or raw.get("format"), ("pack-quantized",)),
        "num_bits": (weights.get("num_bits"), (4,)),
        "type": (weights.get("type", "int"), ("int",)),
        "strategy": (weights.get("strategy", "group"), ("group", "channel")),
        "block_structure": (weights.get("block_structure"), (None,)),
        "dynamic": (weights.get("dynamic", False), (False, None)),
        "actorder": (weights.get("actorder"), _ACTORDERS),
        "kv_cache_scheme": (raw.get("kv_cache_scheme"), (None,)),
        "transform_config": (raw.get("transform_config") or None, (None,)),
        "sparsity_config.format": (sparsity.get("format", "dense"), ("dense",)),
    }
    for scheme in schemes:
        for name in ("input_activations", "output_activations"):
            if fields.get(name, (None,))[0] is None:
                fields[name] = (scheme.get(name), (None,))
    wrong = _refused(fields)
    wrong += [
        f"weights.{name} {value!r} (which is not known)"
        for name, value in weights.items()
        if name not in fields and name not in _HARMLESS and value is not None
    ]
    group = _group(weights.get("group_size"))
    if isinstance(group, str):
        return [*wrong, group]
    if weights.get("strategy") == "channel":
        group = None
    reordered = weights.get("actorder") in ("group", "dynamic", True)
    return wrong or QuantConfig(
        "compressed-tensors",
        group,
        _names(raw.get("ignore")),
        0,
        reordered,
        bool(weights.get("symmetric", True)),
    )


_READERS: Final = {
    "awq": _awq,
    "gptq": _gptq,
    "compressed-tensors": _compressed_tensors,
    "auto-round": _auto_round,
}
_ACCEPTED: Final = {
    "awq": 'AutoAWQ\'s 4-bit "gemm"',
    "gptq": "4-bit gptq or gptq_v2",
    "compressed-tensors": "4-bit pack-quantized weights by group or channel",
    "auto-round": "4-bit auto_round:auto_gptq or auto_round:auto_awq",
}

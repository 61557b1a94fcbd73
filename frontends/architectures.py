"""Which architectures transformers has, read off its source.

transformers' own tables are in a module that loads torch, which takes seconds; a config.json that names
something else is refused before.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

from tyir.diagnostics import Diagnostic, did_you_mean

__all__ = ["TESTED", "architecture_problem"]

TESTED: Final = ("Qwen2ForCausalLM", "LlamaForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM")
# How transformers calls causal language models, those that see pictures last.
_ENDINGS: Final = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_TABLES: Final = ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")
_FILE: Final = "models/auto/modeling_auto.py"


@cache
def causal_models() -> Mapping[str, str]:
    """`model_type` by the name of each causal language model of transformers, pictures seen or not."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None and spec.origin is not None, "a dependency of the front end"
    source = (Path(spec.origin).parent / _FILE).read_text(encoding="utf-8")
    found: dict[str, str] = {}
    for table in _TABLES:
        entries = dict(_entries(source, table))
        if not entries:  # written in another way by a release to come
            from transformers.models.auto import modeling_auto

            entries = dict(getattr(modeling_auto, table))
        for kind, names in entries.items():
            found.update(dict.fromkeys((names,) if isinstance(names, str) else names, kind))
    return {name: kind for name, kind in found.items() if name.endswith(_ENDINGS)}


def _entries(source: str, table: str) -> Iterator[tuple[str, Any]]:
    """The pairs of `TABLE = OrderedDict([(kind, name), ..])`; none when it is written otherwise."""
    start = source.find(f"\n{table} = OrderedDict(\n")
    end = source.find("\n)\n", start)
    if min(start, end) < 0:
        return
    value = ast.parse(source[start : end + 2].strip()).body[0]
    if isinstance(value, ast.Assign) and isinstance(value.value, ast.Call) and value.value.args:
        try:
            yield from ast.literal_eval(value.value.args[0])
        except ValueError:
            return


def architecture_problem(raw: Mapping[str, Any], where: str) -> Diagnostic | None:
    """Why transformers itself does not know the architecture of a config.json as a causal language model."""
    architectures = raw.get("architectures")
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        return Diagnostic(
            "config.json names no architecture",
            where=where,
            help=f'add "architectures": ["..."]; tested: {", ".join(TESTED)}',
        )
    name, known = architectures[0], causal_models()
    if (refusal := _known_refusal(name, raw)) is not None:
        return Diagnostic(refusal[0], where=where, help=refusal[1])
    if name not in known:
        help = (
            f"supported: {', '.join(TESTED)}, and other decoder models of transformers made of the same ops"
        )
        if raw.get("auto_map"):
            help += "; code in the folder is not run: give the class with --model-plugin"
        elif hint := did_you_mean(name, known):
            help += f"; {hint}"
        message = f"architecture {name[:100]} is not a causal language model that can be imported"
        return Diagnostic(message, where=where, help=help)
    if raw.get("model_type") != known[name]:
        message = (
            f"config.json is inconsistent: model_type is {str(raw.get('model_type'))[:100]!r} but {name}"
            f" belongs to {known[name]!r}"
        )
        return Diagnostic(message, where=where, help=f'set "model_type": "{known[name]}"')
    return None


_OWN_PYTHON: Final = (
    "write a class of transformers' form yourself, with a tower of one of the known structures, and give it"
    " with --model-plugin (docs/model-plugin.md)"
)


def _known_refusal(name: str, raw: Mapping[str, Any]) -> tuple[str, str] | None:
    """What to say of a model that sees pictures and cannot be imported as it is: message and cure."""
    if name not in causal_models() and raw.get("auto_map") and {"vision_config", "visual"} & raw.keys():
        return (
            f"{name[:100]} sees pictures and is written in the checkpoint's own Python, which is not run",
            _OWN_PYTHON,
        )
    return None

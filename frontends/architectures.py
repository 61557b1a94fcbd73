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
_ENDINGS: Final = ("ForCausalLM", "LMHeadModel")  # how transformers calls causal language models
_TABLE: Final = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
_FILE: Final = "models/auto/modeling_auto.py"


@cache
def causal_models() -> Mapping[str, str]:
    """`model_type` by the name of each causal language model of transformers."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None and spec.origin is not None, "a dependency of the front end"
    source = (Path(spec.origin).parent / _FILE).read_text(encoding="utf-8")
    entries = dict(_entries(source))
    if not entries:  # written in another way by a release to come
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        entries = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    return {
        name: kind
        for kind, names in entries.items()
        for name in ((names,) if isinstance(names, str) else names)
        if name.endswith(_ENDINGS)
    }


def _entries(source: str) -> Iterator[tuple[str, Any]]:
    """The pairs of `TABLE = OrderedDict([(kind, name), ..])`; none when it is written otherwise."""
    start = source.find(f"\n{_TABLE} = OrderedDict(\n")
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

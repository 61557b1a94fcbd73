"""A user's own architecture or checkpoint layout: what `--model-plugin file.py` may say.

The file is Python, run because the user named it (code inside a checkpoint folder never is), and defines one
`plugin = ModelPlugin(...)`. docs/model-plugin.md shows a whole one.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tyir.diagnostics import Diagnostic, TyirError
from tyir.frontends.checkpoint import Checkpoint, StoredTensor, open_checkpoint
from tyir.frontends.weights import with_base
from tyir.types import TensorType, bit_width

__all__ = ["ModelPlugin", "Split", "load_plugin", "plugin_of"]


@dataclass(frozen=True)
class Split:
    """A stored tensor that holds several parameters one after the other along its rows.

    `pattern` matches its whole name (after renaming); `parts` gives the parameters' names (with the pattern's
    groups, \\1) and the rows of each, a number or a function of config.json's contents.
    """

    pattern: str
    parts: Sequence[tuple[str, int | Callable[[Mapping[str, Any]], int]]]


@dataclass(frozen=True)
class ModelPlugin:
    """Everything optional.

    `model_class`: a transformers `PreTrainedModel` class for causal language modelling; its `config_class`
    reads config.json. `rename`: (pattern, replacement) applied in order to every stored name with `re.sub`.
    `split`: packed tensors.  `ignore`: patterns of tensors that are not used.  `base`: folder of the
    checkpoint to which this one's tensors must be added, `vision_tower`: that of the CLIP model of a
    checkpoint in LLaVA's own format (both relative to the plugin file).
    """

    model_class: type[Any] | None = None
    rename: Sequence[tuple[str, str]] = ()
    split: Sequence[Split] = ()
    ignore: Sequence[str] = ()
    base: str | Path | None = None
    vision_tower: str | Path | None = None

    def apply(self, checkpoint: Checkpoint, problems: list[Diagnostic]) -> Checkpoint:
        """The checkpoint as the rules say it is to be read; what does not work out is appended to
        `problems`.
        """
        named: dict[str, StoredTensor] = {}
        where = str(checkpoint.folder)
        for key, stored in checkpoint.tensors.items():
            name = self._renamed(key)
            if any(re.fullmatch(pattern, key) for pattern in self.ignore):
                continue
            for part, tensor in self._parts(name, stored, checkpoint.config, where, problems):
                if part in named:
                    message = f"the plugin gives the name '{part}' to both '{named[part].key}' and '{key}'"
                    problems.append(Diagnostic(message, where=where, help="make the rename rules more exact"))
                named[part] = tensor
        result = replace(checkpoint, tensors=named)
        return result if self.base is None else self._with_base(result, problems)

    def _renamed(self, name: str) -> str:
        for pattern, replacement in self.rename:
            name = re.sub(pattern, replacement, name)
        return name

    def _parts(
        self,
        name: str,
        stored: StoredTensor,
        config: Mapping[str, Any],
        where: str,
        problems: list[Diagnostic],
    ) -> Iterable[tuple[str, StoredTensor]]:
        """The parameters in a stored tensor: ranges of its rows, which lie one after the other in the
        file.
        """
        for rule in self.split:
            match = re.fullmatch(rule.pattern, name)
            if match is None:
                continue
            counts = [rows if isinstance(rows, int) else int(rows(config)) for _, rows in rule.parts]
            total = stored.type.dims[0] if stored.type.dims else 0
            if sum(counts) != total or stored.converted or bit_width(stored.type.element) < 8:
                message = (
                    f"'{stored.key}' of type {stored.type} cannot be split into"
                    f" {' + '.join(map(str, counts))} rows"
                )
                problems.append(
                    Diagnostic(message, where=where, help="the rows of a plain tensor must add up")
                )
                return []
            row = stored.nbytes // max(total or 0, 1)
            ends = [sum(counts[: i + 1]) for i in range(len(counts))]
            return [
                (
                    match.expand(part),
                    replace(
                        stored,
                        type=TensorType((n, *stored.type.dims[1:]), stored.type.element),
                        offset=stored.offset + (end - n) * row,
                        nbytes=n * row,
                    ),
                )
                for (part, _), n, end in zip(rule.parts, counts, ends)
            ]
        return [(name, stored)]

    def _with_base(self, checkpoint: Checkpoint, problems: list[Diagnostic]) -> Checkpoint:
        """The checkpoint as a delta to the base, which is read by the same rules."""
        assert self.base is not None
        opened = open_checkpoint(Path(self.base), problems)
        if opened is None:
            return checkpoint
        return with_base(checkpoint, replace(self, base=None).apply(opened, problems))


def _check_fields(plugin: ModelPlugin, where: str) -> None:
    """`TyirError` for a field of another shape: Python looks at none of them."""

    def items(value: object) -> Sequence[Any]:
        return value if isinstance(value, list | tuple) else [None]

    def is_pair(value: object, second: tuple[type, ...]) -> bool:
        return (
            isinstance(value, list | tuple)
            and len(value) == 2
            and isinstance(value[0], str)
            and (isinstance(value[1], second) or (int in second and callable(value[1])))
        )

    def is_split(rule: object) -> bool:
        return (
            isinstance(rule, Split)
            and isinstance(rule.pattern, str)
            and all(is_pair(part, (int,)) for part in items(rule.parts))
        )

    wrong = {
        "rename=[(r'^net\\.', 'model.')]": all(is_pair(pair, (str,)) for pair in items(plugin.rename)),
        "split=[Split(PATTERN, [(NAME, ROWS), ...])]": all(map(is_split, items(plugin.split))),
        "ignore=[r'optimizer\\..*']": all(isinstance(p, str) for p in items(plugin.ignore)),
        "base='../base-model'": plugin.base is None or isinstance(plugin.base, str | Path),
        "vision_tower='../clip'": plugin.vision_tower is None or isinstance(plugin.vision_tower, str | Path),
    }
    if bad := [example for example, fits in wrong.items() if not fits]:
        names = ", ".join(example.partition("=")[0] for example in bad)
        raise TyirError(f"the plugin's {names} cannot be read", where=where, help=f"write {', '.join(bad)}")


def load_plugin(path: Path) -> ModelPlugin:
    """Run a plugin file and return its `plugin`.  `TyirError` when it fails or defines none."""
    if not path.is_file():
        raise TyirError(
            f"there is no plugin file {path}",
            help="give a Python file that defines plugin = ModelPlugin(...)",
        )
    spec = importlib.util.spec_from_file_location("tyir_model_plugin", path)
    if spec is None or spec.loader is None:
        raise TyirError(f"{path} is not a Python file", help="give the path of a .py file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a file that ends the process is not the end of a command
        raise TyirError(
            f"the plugin fails: {type(error).__name__}: {error}",
            where=str(path),
            help="run it with python to see where",
        ) from error
    plugin = getattr(module, "plugin", None)
    if not isinstance(plugin, ModelPlugin):
        raise TyirError(
            "the plugin file defines no plugin",
            where=str(path),
            help="end it with plugin = ModelPlugin(...) from tyir.frontends.plugin",
        )
    _check_fields(plugin, str(path))
    if plugin.base is not None:
        plugin = replace(plugin, base=path.parent / plugin.base)
    if plugin.vision_tower is not None:
        plugin = replace(plugin, vision_tower=path.parent / plugin.vision_tower)
    for pattern in (*(p for p, _ in plugin.rename), *(s.pattern for s in plugin.split), *plugin.ignore):
        try:
            re.compile(pattern)
        except re.error as error:
            raise TyirError(
                f"'{pattern}' is no regular expression: {error}",
                where=str(path),
                help="escape special characters",
            ) from None
    return plugin


def plugin_of(file: Path | None, vision_tower: Path | None) -> ModelPlugin | None:
    """What --model-plugin and --vision-tower say of a checkpoint; None when neither is given."""
    plugin = None if file is None else load_plugin(file)
    if vision_tower is None:
        return plugin
    return replace(plugin or ModelPlugin(), vision_tower=vision_tower)

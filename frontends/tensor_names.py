"""Checkpoints whose names differ from the model's by a prefix: which rule mends them, and whether it is the
only one.

Training wrappers (torch.compile's `_orig_mod.`, DistributedDataParallel's `module.`) and models within other
models (`language_model.model.`) name the same tensors otherwise.  Rules are looked for with the tensors'
modules, so that they hold for packed weights as well.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from tyir.diagnostics import Diagnostic
from tyir.frontends.checkpoint import Checkpoint

__all__ = ["Rule", "with_model_names"]

# Modules that wrappers put around others, wherever they stand.
_WRAPPERS: Final = (
    "_orig_mod",
    "module",
    "_forward_module",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "base_layer",  # PEFT, around what an adapter changes
)
_ROUNDS: Final = 4
_ANCHORS: Final = 6


@dataclass(frozen=True, order=True)
class Rule:
    """`pattern`, of a regular expression, becomes `replacement`; `words` says so."""

    pattern: str
    replacement: str
    words: str

    def __call__(self, name: str) -> str:
        return re.sub(self.pattern, self.replacement, name)

    @property
    def plugin(self) -> str:
        """As a plug-in's rename rule."""
        return f'rename=[(r"{self.pattern}", "{self.replacement}")]'


def with_model_names(
    checkpoint: Checkpoint,
    aliases: Mapping[str, Sequence[str]],
    note: Callable[[Diagnostic], None],
) -> Checkpoint | Diagnostic:
    """The checkpoint with its tensors under the names in `aliases` (all names of each parameter).

    Names that fit are left alone.  Otherwise the rule that finds most parameters is applied and noted; when
    two rules do so with different tensors, what they are is returned as a problem.
    """
    where, wanted = str(checkpoint.folder), _Wanted(aliases)
    tensors = checkpoint.tensors
    for _ in range(_ROUNDS):
        missing = wanted.missing(tensors)
        if not missing:
            break
        gains = {rule: taken for rule in _rules(tensors, missing) if (taken := wanted.taken(rule, tensors))}
        most = max(map(len, gains.values()), default=0)
        if most == 0:
            bare = wanted.unwrapped(tensors)
            within = {bare.get(name, name): stored for name, stored in tensors.items()}
            if not bare or not any(wanted.taken(rule, within) for rule in _rules(within, missing)):
                break
            tensors = within
            words = ", ".join(f"'{w}.'" for w in _WRAPPERS if any(w in name.split(".") for name in bare))
            message = (
                f"{len(bare)} of {len(tensors)} stored tensors have names that differ: {words} is left out"
            )
            note(Diagnostic(message, severity="warning", where=where))
            continue
        best = sorted((rule for rule, taken in gains.items() if len(taken) == most), key=_simplest)
        other = next((r for r in best if set(gains[r]) != set(gains[best[0]])), None)
        if other is not None:
            return Diagnostic(
                f"the model's tensors are stored more than once: {best[0].words}, and {other.words}",
                where=where,
                help=f"say which are meant, with a --model-plugin of {best[0].plugin}",
            )
        taken, before = gains[best[0]], len(tensors)
        tensors = {taken.get(name, name): stored for name, stored in tensors.items()}
        message = f"{len(taken)} of {before} stored tensors have names that differ: {best[0].words}"
        note(Diagnostic(message, severity="warning", where=where))
    unreadable = frozenset(checkpoint.unreadable)
    return (
        checkpoint
        if tensors is checkpoint.tensors
        else replace(checkpoint, tensors=tensors, unreadable=unreadable)
    )


class _Wanted:
    """The modules that the model's parameters are in."""

    def __init__(self, aliases: Mapping[str, Sequence[str]]) -> None:
        self.parameters = {tuple(sorted({_module(alias) for alias in names})) for names in aliases.values()}
        self.modules = {module for group in self.parameters for module in group}

    def missing(self, tensors: Collection[str]) -> list[tuple[str, ...]]:
        """The modules, under all their names, that nothing is stored of."""
        stored = {_module(name) for name in tensors}
        return sorted(group for group in self.parameters if not stored.intersection(group))

    def taken(self, rule: Rule, tensors: Collection[str]) -> dict[str, str]:
        """Old and new name of each tensor that the rule brings to the model; none when it would give one name
        to two tensors.
        """
        found: dict[str, str] = {}
        for name in tensors:
            new = rule(name)
            if new != name and _module(name) not in self.modules and _module(new) in self.modules:
                found[name] = new
        new_names = set(found.values())
        return {} if len(new_names) < len(found) or new_names.intersection(tensors) else found

    def unwrapped(self, tensors: Collection[str]) -> dict[str, str]:
        """Old and new name of the tensors outside of the model that wrappers stand in: what is left may lack
        another rule besides.  None when that would give one name to two tensors.
        """
        found: dict[str, str] = {}
        for name in tensors:
            new = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
            if new != name and _module(name) not in self.modules:
                found[name] = new
        new_names = set(found.values())
        return {} if len(new_names) < len(found) or new_names.intersection(tensors) else found


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _simplest(rule: Rule) -> tuple[int, Rule]:
    return len(rule.pattern) + len(rule.replacement), rule


def _rules(tensors: Iterable[str], missing: Sequence[tuple[str, ...]]) -> set[Rule]:
    """What could bring stored names to missing modules: wrappers left out, or one beginning exchanged for
    another.
    """
    modules = {_module(name) for name in tensors}
    parts = {part for module in modules for part in module.split(".")}
    found = {
        Rule(rf"(^|(?<=\.)){re.escape(w)}\.", "", f"'{w}.' is left out") for w in _WRAPPERS if w in parts
    }
    # of the model's modules, those with the longest names say most
    anchors = sorted((m for group in missing for m in group), key=lambda m: -m.count("."))
    for anchor in [*anchors[:_ANCHORS], *anchors[-_ANCHORS:]]:
        found.update(rule for module in modules if (rule := _exchange(module, anchor)) is not None)
    return found


def _exchange(stored: str, wanted: str) -> Rule | None:
    """The rule that exchanges what two names do not have in common at their beginnings; None when they are of
    different layers, or have no last part in common.
    """
    a, b = stored.split("."), wanted.split(".")
    common = sum(1 for _ in _equal(reversed(a), reversed(b)))
    numbered = any(part.isdigit() for part in b)
    if not common or (numbered and not any(part.isdigit() for part in b[len(b) - common :])):
        return None
    old, new = ("".join(f"{part}." for part in parts[: len(parts) - common]) for parts in (a, b))
    if old == new:
        return None
    words = (
        f"'{new}' is put before them" if not old
        else f"'{old}' at the beginning is left out" if not new
        else f"'{old}' at the beginning is taken for '{new}'"
    )  # fmt: skip
    return Rule(f"^{re.escape(old)}", new, words)


def _equal(a: Iterator[str], b: Iterator[str]) -> Iterator[str]:
    for x, y in zip(a, b):
        if x != y:
            return
        yield x

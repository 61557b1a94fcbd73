"""Which special token a chat template writes after what is said: the end of a turn.

The template is read, not run: it is a program of the folder's, which may run for ever, and only a chat needs
what it makes.  What is looked for is the text that directly follows `message['content']` (or a part's
`text`), in every branch; a variable that is set to a text, texts that are added and the end-of-text token are
followed.  Calls of tools, thoughts and the ends of questions are no ends of answers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Final

__all__ = ["turn_ends"]

_SAID: Final = ("content", "text")
_NO_END: Final = re.compile(r"tool|call|think|reason", re.IGNORECASE)
# Roles in conditions: what only the others say ends with the token that asks for an answer ("[/INST]").
_ASKS: Final = re.compile(r"^(user|system|developer)$")
_ANSWERS: Final = re.compile(r"^(assistant|model)$")


def turn_ends(template: str, special: Collection[str], variables: Mapping[str, str]) -> set[str]:
    """The special tokens that follow what is said in a template; `variables`: texts of tokens by the names
    that templates know them by (`eos_token`).  None of a template that cannot be read.
    """
    try:
        import jinja2

        # the extensions of transformers' own environment, whose `generation` blocks are text here
        source = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", template)
        body = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(source).body
        reader = _Reader(special, dict(variables))
        reader.block(body, False)
    except Exception:  # whatever a hostile template leads the parser to; a chat says what is wrong with it
        return set()
    return reader.found


class _Reader:
    """Walks the template's statements; `after` is whether what is said was written last."""

    def __init__(self, special: Collection[str], texts: dict[str, str]) -> None:
        wanted = sorted((t for t in special if t and not _NO_END.search(t)), key=len, reverse=True)
        self._token = re.compile("|".join(map(re.escape, wanted)) or r"(?!)")
        self._texts = texts
        self.found: set[str] = set()

    def block(self, nodes: Sequence[Any], after: bool) -> bool:
        for node in nodes:
            after = self._statement(node, after)
        return after

    def _statement(self, node: Any, after: bool) -> bool:
        kind = type(node).__name__
        if kind == "Output":
            return self._written([piece for part in node.nodes for piece in self._pieces(part)], after)
        if kind == "Assign" and type(node.target).__name__ == "Name":
            pieces = list(self._pieces(node.node))
            if pieces and all(isinstance(piece, str) for piece in pieces):
                self._texts[node.target.name] = "".join(map(str, pieces))
            else:
                self._texts.pop(node.target.name, None)
            return after
        if kind == "If":
            branches = [(node.test, node.body), *((e.test, e.body) for e in node.elif_), (None, node.else_)]
            ends = [
                self.block(body, after and not _mentions(test, _NO_END))
                for test, body in branches
                if not _mentions(test, _ASKS) or _mentions(test, _ANSWERS)
            ]
            return any(ends) or (after and not node.else_)
        if kind == "For":
            inside = self.block(node.body, after and not _mentions(node.iter, _NO_END))
            return inside or after
        if kind == "Macro":
            self.block(node.body, False)
        return after

    def _written(self, pieces: Sequence[str | bool], after: bool) -> bool:
        """One text after the other; True stands for what is said, False for what is not known."""
        text = ""
        for piece in [*pieces, None]:
            if isinstance(piece, str):
                text += piece
                continue
            if after and (match := self._token.match(text.lstrip())):
                self.found.add(match[0])
            after, text = (after and not text.strip()) if piece is None else piece, ""
        return after

    def _pieces(self, node: Any) -> Iterator[str | bool]:
        """What an expression writes."""
        kind = type(node).__name__
        if kind == "TemplateData":
            yield node.data
        elif kind == "Const":
            yield str(node.value)
        elif kind == "Add":
            yield from self._pieces(node.left)
            yield from self._pieces(node.right)
        elif kind == "Concat":
            for part in node.nodes:
                yield from self._pieces(part)
        elif kind == "CondExpr":
            yield from self._pieces(node.expr1)
        elif kind == "Name" and node.name in self._texts:
            yield self._texts[node.name]
        else:
            yield _says(node)


def _says(node: Any) -> bool:
    """Whether an expression gives what is said, stripped or otherwise changed."""
    kind = type(node).__name__
    if kind == "Name":
        return node.name in _SAID
    if kind == "Getattr":
        return node.attr in _SAID or _says(node.node)
    if kind == "Getitem":
        return getattr(node.arg, "value", None) in _SAID or _says(node.node)
    parts = [node.node, *node.args] if kind in ("Filter", "Call") else []
    return any(part is not None and _says(part) for part in parts)


def _mentions(test: Any, words: re.Pattern[str]) -> bool:
    """Whether a name or a text of a condition, or of what a loop goes through, is one of these."""
    if test is None:
        return False
    import jinja2.nodes as nodes

    names = [test, *test.find_all((nodes.Name, nodes.Getattr, nodes.Const))]
    found = (getattr(n, "name", None) or getattr(n, "attr", None) or getattr(n, "value", "") for n in names)
    return any(words.search(str(word)) for word in found)

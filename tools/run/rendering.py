"""A chat as one text, by its template: a program of the model's folder, which is held to limits.

The environment is built as transformers builds its own (`apply_chat_template`): Jinja's sandbox in which
nothing can be changed, `tojson`, `raise_exception`, `strftime_now`, `generation` blocks.  That sandbox keeps
a template from files and from Python; how long it runs and how much it makes is bounded here:

* the source: `_LONGEST` characters, which bounds compiling it;
* every value (a text's characters; of lists and dicts all that is in them, as often as it is): `_LARGEST`.
  It is known before the value is made, for operators, filters and methods whose result is larger than what
  they are given; a width, a power or a precision is bounded with it;
* all values together: `_MOST`;
* the time from the template's first step: `_SECONDS`, looked at in every turn of a loop, every call, filter,
  test and operator; none of these takes longer than a value of the largest size does.

What is beyond is a `LimitError`.  `lipsum`, `urlize`, `pprint` and `striptags` are left out: their time is
not in proportion to their texts, and no chat is made with them.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache, wraps
from types import BuiltinMethodType, GeneratorType
from typing import Any, ClassVar, Final

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

__all__ = ["LimitError", "render"]

_LONGEST: Final = 1 << 17  # published templates have up to 20 thousand
_LARGEST: Final = 1 << 23  # twice what a prompt may have
_MOST: Final = 1 << 27
_SECONDS: Final = 10.0
_WORK: Final = 1 << 30  # comparisons of characters in one search
_WIDEST: Final = 64  # of an indentation in JSON
_BITS: Final = 1 << 14  # of whole numbers
_REASONS: Final = ("reasoning_content", "thinking", "reasoning")
_LAST: Final = "CONTINUE_FINAL_MESSAGE_TAG "  # as transformers marks the end of the message that goes on
_LEFT_OUT: Final = ("urlize", "pprint", "striptags")
# Filters and methods whose result is as large as their text times a number or another text.
_GROW: Final = frozenset(
    (
        *("center", "indent", "batch", "slice", "truncate", "wordwrap"),
        *("ljust", "rjust", "zfill", "expandtabs", "translate", "to_bytes"),
    )
)
_SEARCH: Final = frozenset(["rfind", "rindex", "rsplit", "rpartition", "strip", "lstrip", "rstrip", "trim"])
_TEXT: Final = (str, bytes)


class LimitError(jinja2.TemplateRuntimeError):
    """A template goes beyond what it may use."""


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any],
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
) -> str:
    """The text of a chat, the same as transformers' `apply_chat_template` gives; `variables`: special tokens
    by their names, `tools`, and what else a template asks for.

    Whatever a template raises, `LimitError` for what it may not use.
    """
    if not messages:
        raise ValueError("a chat has at least one message")
    if len(template) > _LONGEST:
        raise LimitError(f"it has {len(template)} characters, more than the {_LONGEST} it may have")
    given = [_aliased({k: v for k, v in _plain(m).items() if v is not None}) for m in messages]
    final = _to_be_continued(given[-1]) if continue_final_message else ""
    _state.used = used = _Used()
    try:
        text = _compiled(template).render(
            {
                "tools": None,
                "documents": None,
                **_plain(variables),
                "messages": given,
                "add_generation_prompt": add_generation_prompt,
            }
        )
    except MemoryError:
        raise LimitError("it takes more memory than there is") from None
    finally:
        used.kept.clear()
        _state.used = None
    if not continue_final_message:
        return text
    if final.strip() not in text or _LAST.strip() not in text:
        raise ValueError("the template leaves out what the final message says, which is to be continued")
    place = text.rindex(_LAST.strip())
    exact = text[place : place + len(_LAST)] == _LAST
    return text[:place] if exact else text[:place].rstrip()


def _plain(value: Any) -> Any:
    """JSON's types; anything else is its type's name, since its methods could do anything."""
    if isinstance(value, Mapping):
        return {_plain(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return value if type(value) is kind else kind(value)
    return f"<{type(value).__name__}>"


def _aliased(message: dict[str, Any]) -> dict[str, Any]:
    """With a message's thoughts under the names that templates know them by."""
    thought = next((message[name] for name in _REASONS if message.get(name) is not None), None)
    return message if thought is None else {"thinking": thought, **message, "reasoning_content": thought}


def _to_be_continued(message: dict[str, Any]) -> str:
    """Marks the end of what the message says; what it says."""
    said = message.get("content")
    if isinstance(said, str):
        message["content"] = said + _LAST
        return said
    for part in reversed(said if isinstance(said, list) else []):
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            text: str = part["text"]
            part["text"] = text + _LAST
            return text
    raise ValueError("the final message says nothing that could be continued")


# ----------------------------------------------------------------------------------------------------- limits


class _Used:
    """What a rendering has taken so far."""

    def __init__(self) -> None:
        self._until = time.monotonic() + _SECONDS
        self._made = 0
        self.kept: dict[int, tuple[Any, int]] = {}  # sizes by identity, of values that are kept for it

    def tick(self) -> None:
        if time.monotonic() > self._until:
            raise LimitError(f"it runs for more than the {_SECONDS:g} seconds it may")

    def allow(self, size: int) -> None:
        """`LimitError` for a value that is too large, before it is made."""
        self.tick()
        if size > _LARGEST:
            raise LimitError(f"it makes a value of more than the {_LARGEST} characters one may have")

    def made(self, value: Any) -> Any:
        """Counts a value; one that comes item by item is counted as it comes."""
        if isinstance(value, GeneratorType) or (isinstance(value, Iterator) and not hasattr(value, "length")):
            return self._counted(value)
        size = self.size(value)
        self.allow(size)
        self._made += size
        if self._made > _MOST:
            raise LimitError(f"its values have more than the {_MOST} characters they may have together")
        return value

    def _counted(self, items: Iterable[Any]) -> Iterator[Any]:
        size = 0
        for item in items:
            size += 1 + self.size(item)
            self.allow(size)
            yield item

    def size(self, value: Any) -> int:
        """Characters, items and what is in them; `LimitError` when it is too much."""
        if isinstance(value, _TEXT):
            return len(value)
        if isinstance(value, int):
            return 1 + value.bit_length() // 8
        if isinstance(value, Namespace):
            raise LimitError("a namespace is written, or put into a list")
        if not isinstance(value, (list, tuple, set, frozenset, dict)):
            return 1
        if (found := self.kept.get(id(value))) is not None:
            return found[1]
        parts = (part for item in value.items() for part in item) if isinstance(value, dict) else value
        total = 1
        for part in parts:
            total += 1 + self.size(part)
            if total > _LARGEST:
                self.allow(total)
        self.kept[id(value)] = value, total
        return total


class _State(threading.local):
    used: _Used | None = None


_state = _State()


def _used() -> _Used:
    if _state.used is None:
        raise LimitError("a template's value is used after it has been rendered")
    return _state.used


# -------------------------------------------------------------------------------------------------- operators


def _times(left: Any, right: Any) -> Any:
    used = _used()
    if isinstance(left, int) and isinstance(right, int):
        _whole(left.bit_length() + right.bit_length())
    elif isinstance(left, int) or isinstance(right, int):
        number, other = (left, right) if isinstance(left, int) else (right, left)
        used.allow(max(number, 0) * used.size(other))
    return used.made(left * right)


def _power(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int):
        _whole(left.bit_length() * abs(right))
    return _used().made(left**right)


def _plus(left: Any, right: Any) -> Any:
    used = _used()
    used.allow(used.size(left) + used.size(right))
    return used.made(left + right)


def _percent(left: Any, right: Any) -> Any:
    if isinstance(left, _TEXT):
        _printf(left, right)
    return _used().made(left % right)


def _printf(form: Any, values: Any) -> None:
    used = _used()
    text = form.decode("latin-1") if isinstance(form, bytes) else str(form)
    if re.search(r"%[^a-zA-Z%]*\*", text):
        raise LimitError("a width of '*' is not known before")
    used.allow(len(text) + _numbers(text) + text.count("%") * used.size(values))


def _numbers(text: str) -> int:
    """All numbers in a format together, of which some are widths."""
    return sum(int(digits[:12]) for digits in re.findall(r"[0-9]+", text))


def _whole(bits: int) -> None:
    _used().tick()
    if bits > _BITS:
        raise LimitError(f"it makes a number of more than the {_BITS} bits one may have")


# ------------------------------------------------------------------------------------------ filters and calls


def _foresee(name: str, value: Any, arguments: Sequence[Any]) -> None:
    """`LimitError` when what a filter or method would make of a value, or search in it, is too much."""
    used = _used()
    own = used.size(value)
    if name == "replace" and len(arguments) >= 2 and isinstance(value, _TEXT):
        old, new = arguments[:2]
        if isinstance(old, type(value)) and isinstance(new, _TEXT):
            used.allow(own + value.count(old) * len(new))  # type: ignore[arg-type]
    elif name == "join":
        items, between = (arguments[0], own) if isinstance(value, _TEXT) else (value, 0)
        between += 0 if isinstance(value, _TEXT) else sum(map(used.size, arguments[:1]))
        used.allow(used.size(items) + (len(items) if hasattr(items, "__len__") else 0) * between)
    elif name == "round":
        if any(isinstance(a, int) and abs(a) > 300 for a in arguments):
            raise LimitError("it rounds to more than the 300 digits it may")
    elif name == "sum":
        if any(isinstance(a, (list, tuple)) for a in arguments):
            raise LimitError("it adds up lists, which takes the square of their length")
    elif name == "tojson":
        if any((a if isinstance(a, int) else used.size(a)) > _WIDEST for a in arguments if a is not None):
            raise LimitError(f"it indents by more than the {_WIDEST} characters it may")
    elif name in ("format", "format_map") and isinstance(value, _TEXT):
        text = str(value)
        if re.search(r"\{[^{}]*:[^{}]*\{", text):
            raise LimitError("a width in braces is not known before")
        fields = sum(map(used.size, arguments))
        used.allow(own + _numbers(text) + text.count("{") * fields)
    elif name in _GROW:
        factor = 1
        for argument in arguments:
            factor *= max(abs(argument) if isinstance(argument, int) else used.size(argument), 1)
        used.allow(own + max(own, 1) * factor)
    elif name in _SEARCH and own * sum(map(used.size, arguments)) > _WORK:
        raise LimitError(f"it compares more than the {_WORK} characters it may")


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    first = int(hasattr(function, "jinja_pass_arg"))  # the context or environment goes before the value

    @wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        used = _used()
        used.tick()
        given = list(args)
        if name == "join" and len(given) > first and not hasattr(given[first], "__len__"):
            given[first] = list(given[first])
        for argument in (*given[first:], *kwargs.values()):
            used.size(argument)
        if name == "format" and len(given) > first:
            _printf(str(given[first]), [*given[first + 1 :], kwargs])
        elif len(given) > first:
            _foresee(name, given[first], [*given[first + 1 :], *kwargs.values()])
        return used.made(function(*given, **kwargs))

    return bounded


def _bounded_test(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        _used().tick()
        return function(*args, **kwargs)

    return bounded


def _joined(values: Sequence[Any]) -> str:
    """`~`: the texts of values, one after the other."""
    return "".join(map(str, values))


def _same(value: Any) -> Any:
    return value


class _Generation(Extension):
    """`{% generation %}` marks what the model says, for training; it is written as it is."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Any) -> nodes.CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        block = nodes.CallBlock(self.call_method("_said"), [], [], body)
        block.set_lineno(line)
        return block

    def _said(self, caller: Callable[[], str]) -> str:
        return caller()


class _Counting(NodeTransformer):
    """Puts what counts into a template: into turns of loops, around values that are written out, and for `~`,
    which a sandbox does not let be intercepted.
    """

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_filter(nodes.Const(True), ".turn")))
        if node.test is not None:
            node.test = nodes.And(_filter(nodes.Const(True), ".turn"), node.test)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes), ".concat")

    def _display(self, node: Any) -> Any:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") != "load" else _filter(node, ".made")

    visit_List = visit_Tuple = visit_Dict = _display


def _filter(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None)


class _Dict:
    """`dict` of a template, which gives none of its attributes away."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """Without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no attribute {name!r}")


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _json(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Without the HTML escapes of Jinja's own."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Sandbox(ImmutableSandboxedEnvironment):
    """transformers' environment, with operators, filters, tests and calls that are bounded."""

    intercepted_binops: ClassVar[frozenset[str]] = frozenset(("+", "*", "**", "%"))  # type: ignore[misc]

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # or it would compute constants as it compiles
            finalize=lambda value: _used().made(value),
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        self.binop_table |= {"+": _plus, "*": _times, "**": _power, "%": _percent}
        self.globals |= {
            "raise_exception": _raise,
            "strftime_now": lambda form: datetime.now().strftime(form),
            "dict": _Dict(),
            "namespace": _Namespace,
        }
        del self.globals["lipsum"]
        known = {**self.filters, "tojson": _json, ".turn": _same, ".made": _same, ".concat": _joined}
        self.filters = {n: _bounded_filter(n, f) for n, f in known.items() if n not in _LEFT_OUT}
        self.tests = {name: _bounded_test(test) for name, test in dict[str, Any](self.tests).items()}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = _Counting().visit(super()._parse(source, name, filename))
        assert isinstance(tree, nodes.Template)
        tree.set_environment(self)
        return tree

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        """Of a macro, a block or the whole."""
        return str(_used().made("".join(_used()._counted(pieces))))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        used = _used()
        used.tick()
        used.allow(sum(map(used.size, (*args, *kwargs.values()))))
        method = getattr(__obj, "__wrapped__", __obj)  # what Jinja puts around str.format
        if isinstance(method, BuiltinMethodType) and isinstance(method.__self__, (str, bytes, int)):
            if method.__name__ == "join" and args and not hasattr(args[0], "__len__"):
                args = (list(args[0]), *args[1:])
            _foresee(method.__name__, method.__self__, [*args, *kwargs.values()])
        value = super().call(__context, __obj, *args, **kwargs)
        return value if isinstance(value, Namespace) else used.made(value)


@lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    return _sandbox().from_string(template)


@lru_cache(maxsize=1)
def _sandbox() -> _Sandbox:
    return _Sandbox()

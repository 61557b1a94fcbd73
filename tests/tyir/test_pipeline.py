"""Pipelines: text, options, nesting, verification between passes, errors that say which pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest

from tyir.attributes import DictAttr, StringAttr, UnitAttr
from tyir.diagnostics import Diagnostic, TyirError
from tyir.dialects.ty import Silu
from tyir.ir import Op
from tyir.parser import parse_module
from tyir.pass_manager.registry import PassRegistry
from tyir.pass_manager.text import parse_pipeline_text
from tyir.pipeline import Instrument, Pass, PassContext, build_pipeline, run_pipeline, run_verified_once
from tyir.printer import print_op
from tyir.rewrite import Rewriter, pattern, rewrite_greedily

NESTED = """
"builtin.module"() ({
  "func.func"() <{sym_name = "a", function_type = () -> ()}> ({ "func.return"() : () -> () }) : () -> ()
  "builtin.module"() <{sym_name = "die0"}> ({
    "func.func"() <{sym_name = "b", function_type = () -> ()}> ({ "func.return"() : () -> () }) : () -> ()
    "func.func"() <{sym_name = "c", function_type = () -> ()}> ({ "func.return"() : () -> () }) : () -> ()
  }) : () -> ()
}) : () -> ()
"""
SILU = """
"func.func"() <{sym_name = "f", function_type = (tensor<4xf16>) -> tensor<4xf16>}> ({
^bb0(%x: tensor<4xf16>):
  %y = "ty.silu"(%x) : (tensor<4xf16>) -> tensor<4xf16>
  "func.return"(%y) : (tensor<4xf16>) -> ()
}) : () -> ()
"""


@dataclass(frozen=True)
class Mark(Pass):
    """Notes where it ran."""

    anchor: ClassVar[str] = "any"
    word: str = "x"
    sizes: tuple[int, ...] = ()
    factor: float = 1.0
    loud: bool = False

    @classmethod
    def name(cls) -> str:
        return "mark"

    def run(self, op: Op, context: PassContext) -> None:
        context.count(f"{self.word}:{op.sym_name or op.name}")


@dataclass(frozen=True)
class OnFunctions(Mark):
    anchor: ClassVar[str] = "func.func"

    @classmethod
    def name(cls) -> str:
        return "on-functions"


@dataclass(frozen=True)
class Break(Pass):
    """Leaves IR behind that does not verify."""

    @classmethod
    def name(cls) -> str:
        return "break"

    def run(self, op: Op, context: PassContext) -> None:
        for silu in op.walk_type(Silu):
            silu.properties = silu.properties.with_entry("colour", StringAttr("red"))


@dataclass(frozen=True)
class Crash(Pass):
    """An internal error."""

    @classmethod
    def name(cls) -> str:
        return "crash"

    def run(self, op: Op, context: PassContext) -> None:
        raise KeyError("boom")


def context() -> PassContext:
    return PassContext(
        registry=PassRegistry({"mark": Mark, "on-functions": OnFunctions, "break": Break, "crash": Crash})
    )


def ran(text: str) -> list[str]:
    found = context()
    run_pipeline(parse_module(NESTED), text, found)
    return list(found.statistics)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mark", ["x:builtin.module"]),
        ("builtin.module(mark)", ["x:builtin.module"]),
        ("any(mark)", ["x:builtin.module"]),
        ("func.func(mark)", ["x:a"]),
        ("builtin.module(func.func(mark),builtin.module(func.func(mark{word=y})))", ["x:a", "y:b", "y:c"]),
        ("builtin.module(any(mark))", ["x:a", "x:die0"]),
        ("on-functions", ["x:a", "x:b", "x:c"]),
        ("", []),
    ],
)
def test_nesting(text: str, expected: list[str]) -> None:
    assert ran(text) == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("sizes=1,8,96", Mark(sizes=(1, 8, 96))),
        ("sizes=[1, 8]", Mark(sizes=(1, 8))),
        ("sizes=1,8 word=a", Mark(sizes=(1, 8), word="a")),
        ("sizes=1,8,word=a", Mark(sizes=(1, 8), word="a")),
        ("word='two words' factor=2.5e-1", Mark(word="two words", factor=0.25)),
        ("loud", Mark(loud=True)),
        ("loud=false, factor=2", Mark(factor=2.0)),
    ],
)
def test_options(options: str, expected: Mark) -> None:
    (item,) = build_pipeline(f"mark{{{options}}}", context().registry).items
    assert item == expected
    assert isinstance(item, Mark)
    assert build_pipeline(item.text(), context().registry).items == (expected,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "marc",
            (
                "<pipeline>:1:1: error: there is no pass or pipeline 'marc'\n1 | marc\n  | ^^^^\nhelp: did"
                " you mean 'mark'?"
            ),
        ),
        ("mark,mark{sises=1}", "<pipeline>:1:11: error: pass 'mark' has no option 'sises'"),
        ("mark{sizes=1,x}", "option 'sizes' of 'mark' takes a list of integers such as 1,8, got '1,x'"),
        ("mark{factor=fast}", "option 'factor' of 'mark' takes a number, got 'fast'"),
        ("mark{word=a word=b}", "option 'word' is given twice"),
        ("func.func(break)", "pass 'break' runs on builtin.module, not on func.func"),
        ("builtin.module(mark", "expected ',' or ')', found the end of the text"),
        ("mark)", "expected ',' or the end of the pipeline, found ')'"),
        ("mark{=1}", "expected an option such as max-kv=1024, or '}', found '='"),
        ("mark,,mark", "expected the name of a pass or of an op, found ','"),
        ("llm{a=1}", "pipeline 'llm' takes no options"),
    ],
)
def test_wrong_text(text: str, message: str) -> None:
    with pytest.raises(TyirError) as error:
        build_pipeline(text, context().registry)
    assert message in str(error.value)


def test_every_listed_pass_and_pipeline_builds() -> None:
    registry = PassRegistry()
    assert {"canonicalize", "cse", "dce", "symbol-dce"} <= set(registry.names())
    for name in (*registry.names(), *registry.pipelines()):
        text = build_pipeline(name, registry).text()
        assert build_pipeline(text, registry).text() == text


def test_ir_that_does_not_verify_names_the_pass() -> None:
    with pytest.raises(TyirError) as error:
        run_pipeline(parse_module(SILU), "mark,break", context())
    assert "'ty.silu' has no property 'colour'" in str(error.value)
    assert "note: the IR does not verify after pass 'break'" in str(error.value)
    unchecked = context()
    unchecked.verify_each = False
    run_pipeline(parse_module(SILU), "break", unchecked)


@pytest.mark.parametrize("text", ["mark", "mark,break", "mark,crash", "mark{sizes=x}"])
def test_verified_once_says_what_verified_each_time_says(text: str) -> None:
    """The same IR where all is well; where it is not, the same error, with the name of the pass."""

    def outcome(run: Callable[[Op, str, PassContext], None]) -> str:
        module = parse_module(SILU)
        try:
            run(module, text, context())
        except (TyirError, KeyError) as error:
            return f"{type(error)} {error} {getattr(error, '__notes__', ())}"
        return print_op(module)

    assert outcome(run_verified_once) == outcome(run_pipeline)


def test_verified_once_verifies_what_it_is_given() -> None:
    module = parse_module(SILU)
    next(module.walk_type(Silu)).set_property("colour", StringAttr("red"))
    with pytest.raises(TyirError, match="has no property 'colour'"):
        run_verified_once(module, "mark", context())


@dataclass
class Record(Instrument):
    seen: list[str] = field(default_factory=list)

    def before(self, pass_: Pass, op: Op) -> None:
        self.seen.append(f"before {pass_.name()}")

    def after(self, pass_: Pass, op: Op) -> None:
        self.seen.append(f"after {pass_.name()}")

    def failed(self, pass_: Pass, op: Op, error: BaseException) -> None:
        self.seen.append(f"failed {pass_.name()}: {type(error).__name__}")


def test_internal_error_names_the_pass_and_reaches_instruments() -> None:
    watched, record = context(), Record()
    watched.instruments.append(record)
    with pytest.raises(KeyError) as error:
        run_pipeline(parse_module(SILU), "mark,crash", watched)
    assert error.value.__notes__ == ["while running pass 'crash' on 'builtin.module'"]
    assert record.seen == ["before mark", "after mark", "before crash", "failed crash: KeyError"]


def test_loaded_file(tmp_path: Path) -> None:
    path = tmp_path / "my_pass.py"
    path.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom tyir.pipeline import"
        " Pass\n@dataclass(frozen=True)\nclass Mine(Pass):\n    'Mine.'\n    size: int = 3\n    def run(self,"
        " op, context):\n        context.count('mine', self.size)\n"
    )
    found = PassContext()
    assert found.registry.load_file(path) == ["mine", "my-pass"]
    run_pipeline(parse_module(SILU), "my-pass{size=5}", found)
    assert found.statistics == {"mine": 5}


@dataclass(frozen=True)
class Complaining(Pass):
    """Says an error of every op, and refuses at the end where it should."""

    refuse: bool = False

    def run(self, op: Op, context: PassContext) -> None:
        for silu in op.walk_type(Silu):
            context.error(silu, "not wanted", notes=[Diagnostic("seen before", severity="note")])
        if self.refuse:
            raise TyirError("cannot go on")


@pytest.mark.parametrize("refuse", [False, True])
def test_errors_of_a_pass_end_the_pipeline_together(refuse: bool) -> None:
    found = context()
    found.registry.extra["complaining"] = Complaining
    with pytest.raises(TyirError) as error:
        run_pipeline(parse_module(SILU), f"complaining{{refuse={str(refuse).lower()}}},mark", found)
    messages = [d.message for d in error.value.diagnostics]
    assert messages[0] == "not wanted" and ("cannot go on" in messages) == refuse
    assert messages[-1].startswith("while running pass 'complaining'") and not found.statistics
    assert "note: seen before" in error.value.render() and "loc(unknown)" not in error.value.render()
    assert found.take_errors() == []  # the next pipeline begins without


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        ("CountMacs", "count-macs"),
        ("KVCache", "kv-cache"),
        ("LowerEdge10", "lower-edge10"),
        ("Cse", "cse"),
        ("snake_case", "snake-case"),
    ],
)
def test_a_pass_is_named_after_its_class(cls: str, name: str) -> None:
    assert type(cls, (Pass,), {}).name() == name


def test_builtin_passes_have_their_files_names() -> None:
    registry = PassContext().registry
    assert len(registry.names()) > 20
    assert [n for n in registry.names() if (found := registry.find(n)) is None or found.name() != n] == []


def test_pipeline_text_positions() -> None:
    (item,) = parse_pipeline_text("  builtin.module( cse )")
    assert (item.start, item.end) == (2, 23)


def test_patterns_that_undo_each_other_are_named() -> None:
    @pattern(Silu)
    def back_and_forth(op: Silu, rewriter: Rewriter) -> bool:
        rewriter.changed(op)
        return True

    with pytest.raises(TyirError, match=r"does not come to an end; applied most: 'back_and_forth'"):
        rewrite_greedily(parse_module(SILU), [back_and_forth])


def test_benefit_orders_and_locations_are_carried() -> None:
    tried: list[str] = []

    @pattern(Silu, benefit=1)
    def second(op: Silu, rewriter: Rewriter) -> bool:
        tried.append("second")
        return False

    @pattern(Silu, benefit=9)
    def first(op: Silu, rewriter: Rewriter) -> bool:
        tried.append("first")
        if str(op.loc) != 'loc("here")' or op.attributes.get("x.done") is not None:
            return False
        done = DictAttr({"x.done": UnitAttr()})
        rewriter.replace(op, [rewriter.insert(Silu(op.x, attributes=done), before=op).out])
        return True

    module = parse_module(
        SILU.replace('tensor<4xf16>\n  "func.return"', 'tensor<4xf16> loc("here")\n  "func.return"')
    )
    assert rewrite_greedily(module, [second, first]) == 1
    assert tried == ["first", "first", "second"]
    assert '"ty.silu"(%x) {x.done} : (tensor<4xf16>) -> tensor<4xf16> loc("here")' in print_op(module)

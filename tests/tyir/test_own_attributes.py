"""Attributes named `tyir.*` are known ones; the table of them is the code's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tyir.checking.own_attributes import OWN_ATTRIBUTES
from tyir.diagnostics import TyirError
from tyir.parser import parse_module
from tyir.verifier import verify

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("tyir", "passes", "frontends", "backends", "runtime_sim", "tools")
# Uses of a literal as the name of an attribute, and constants that hold one.
USED = re.compile(
    r"(?:set_attribute\(|attributes(?:\.get\(|\[)|_attr\([^()]*, |_attribute\(\w[\w.\[\]]*, |without\()"
    r'\s*"(tyir\.\w+)"'
    r'|^_?[A-Z]+(?:_ATTRIBUTE)?: Final = "(tyir\.\w+)"'
    r'|"(tyir\.\w+)": \w+Attr\('
    r'|"(tyir\.\w+)" (?:not )?in \w+\.',
    re.MULTILINE,
)
NO_ATTRIBUTES = {"tyir.passes", "tyir.targets", "tyir.backends", "tyir.awq"}


def used() -> set[str]:
    files = [f for folder in FOLDERS for f in (ROOT / folder).rglob("*.py") if f.name != "own_attributes.py"]
    found = {name for f in files for match in USED.findall(f.read_text("utf-8")) for name in match if name}
    return found - NO_ATTRIBUTES


def test_the_table_holds_what_the_code_uses() -> None:
    assert len(used()) > 20 and used() - set(OWN_ATTRIBUTES) == set()


def test_the_code_uses_what_the_table_holds() -> None:
    text = "".join(f.read_text("utf-8") for folder in FOLDERS for f in (ROOT / folder).rglob("*.py"))
    once = [name for name in OWN_ATTRIBUTES if len(re.findall(rf'"{re.escape(name)}"', text)) < 2]
    assert not once, f"in the table, and nowhere else: {once}"


@pytest.mark.parametrize(
    ("where", "name", "help"),
    [
        ("op", "tyir.pim", "did you mean 'tyir.pin'?"),
        ("op", "tyir.shardings", "did you mean 'tyir.sharding'?"),
        ("module", "tyir.stag", "did you mean 'tyir.stage'?"),
        ("function", "tyir.entri", "did you mean 'tyir.entry'?"),
        ("argument", "tyir.rol", "did you mean 'tyir.role'?"),
        ("result", "tyir.alia", "did you mean 'tyir.alias'?"),
        ("op", "tyir.zzzzzzzzz", "give attributes of your own a prefix of your own"),
    ],
)
def test_a_name_that_nothing_reads_is_refused(where: str, name: str, help: str) -> None:
    for given, wrong in ((name, True), (name.replace("tyir.", "mine."), False)):
        text = MODULE
        for place in ("op", "module", "function", "argument", "result"):
            text = text.replace(f"@{place}@", f'{given} = "x"' if place == where else 'mine.x = "y"')
        module = parse_module(text)
        if not wrong:
            verify(module)
            continue
        with pytest.raises(TyirError) as caught:
            verify(module)
        (found,) = caught.value.diagnostics
        assert f"attribute '{name}'" in found.message and found.help == help
        assert ("on argument 0" in found.message, "on result 0" in found.message) == (
            where == "argument",
            where == "result",
        )


MODULE = """
"builtin.module"() ({
  "func.func"() <{sym_name = "f", function_type = (tensor<2xf32>) -> tensor<2xf32>,
    arg_attrs = [{@argument@}], res_attrs = [{@result@}]}> ({
  ^bb0(%a: tensor<2xf32>):
    %0 = "ty.add"(%a, %a) {@op@} : (tensor<2xf32>, tensor<2xf32>) -> tensor<2xf32>
    "func.return"(%0) : (tensor<2xf32>) -> ()
  }) {@function@} : () -> ()
}) {@module@} : () -> ()
"""


def test_equal_attributes_are_looked_at_once_and_still_found() -> None:
    """Attributes are shared between ops: those of the second op are the first one's object."""
    text = MODULE.replace("@op@", "mine.a").replace("@module@", 'tyir.kernal = "k"')
    for place in ("function", "argument", "result"):
        text = text.replace(f"@{place}@", 'tyir.kernal = "k"' if place == "function" else "mine.b")
    with pytest.raises(TyirError) as caught:
        verify(parse_module(text))
    assert sorted(d.message.split("'")[1] for d in caught.value.diagnostics) == [
        "builtin.module",
        "func.func",
    ]

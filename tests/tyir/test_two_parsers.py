"""The fast parser and the grammar on texts made to set them apart: several results, references by number,
uses above their definitions, labels, one mistake here and there.
"""

from __future__ import annotations

import random

import pytest

from tests.grammar_parser import parse_with_grammar
from tyir.diagnostics import TyirError
from tyir.parser import parse_module
from tyir.printer import print_op

USED_ABOVE = """
"x.region"() ({
  "x.br"()[^late] : () -> ()
^early:
  "x.use"(%a#0) : (i32) -> ()
  "x.end"() : () -> ()
^late:
  %a = "x.def"() : () -> i32
  "x.br"()[^early] : () -> ()
}) : () -> ()
"""
SHORT_USED_ABOVE = """
func.func @f(%x: tensor<2xf16>) {
  "x.br"()[^late] : () -> ()
^early:
  "x.use"(%a#0, %a) : (tensor<2xf16>, tensor<2xf16>) -> ()
  "x.br"()[^late] : () -> ()
^late:
  %a = ty.silu %x : tensor<2xf16>
  "x.br"()[^early] : () -> ()
}
"""


@pytest.mark.parametrize("text", [USED_ABOVE, SHORT_USED_ABOVE])
def test_the_first_result_by_number_above_its_definition(text: str) -> None:
    assert print_op(parse_module(text)) == print_op(parse_with_grammar(text))


def test_both_spellings_of_one_value_must_agree_in_type() -> None:
    text = USED_ABOVE.replace('"x.end"() : () -> ()', '"x.end"(%a) : (i64) -> ()')
    for parse in (parse_module, parse_with_grammar):
        with pytest.raises(TyirError, match="%a"):
            parse(text)


class _Text:
    """A function of several blocks: ops in both forms and flat or not, over values defined anywhere."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.labels = [f"l{i}" for i in range(rng.randint(1, 4))]
        self.counts = {f"%v{i}": rng.choice([1, 1, 1, 2, 3]) for i in range(rng.randint(2, 9))}
        self.kinds = {name: rng.choice(["i32", "tensor<2xf16>"]) for name in self.counts}

    def text(self) -> str:
        """The function; one in four has a mistake."""
        rng, names = self.rng, list(self.counts)
        rng.shuffle(names)
        bounds = sorted(rng.randint(0, len(names)) for _ in self.labels)
        lines = ["func.func @f(%x: tensor<2xf16>) {"]
        for number, (label, end) in enumerate(zip(self.labels, [*bounds[1:], len(names)])):
            start = 0 if number == 0 else bounds[number]
            lines += [f"^{label}(%b{number}: i32):"] if number else []
            for name in names[start:end]:
                lines += self.uses() + self.definition(name)
            lines += [f'  "x.br"(){self.successors()} : () -> ()']
        lines.append("}")
        return "\n".join(self.mistake(lines) if rng.random() < 0.25 else lines) + "\n"

    def definition(self, name: str) -> list[str]:
        count, kind = self.counts[name], self.kinds[name]
        many = f":{count}" if count > 1 or self.rng.random() < 0.1 else ""
        types = kind if count == 1 else "(" + ", ".join([kind] * count) + ")"
        if count == 1 and kind != "i32" and not many and self.rng.random() < 0.5:
            return [f"  {name} = ty.silu {self.reference(kind)} : {kind}"]
        comment = self.rng.choice(["", "", " // so that the line is not flat"])
        return [f'  {name}{many} = "x.def"() : () -> {types}{comment}']

    def reference(self, kind: str) -> str:
        """Some value of a type, by one of its spellings."""
        found = [n for n in self.counts if self.kinds[n] == kind]
        if not found:
            return "%x"
        name = self.rng.choice(found)
        index = self.rng.randrange(self.counts[name])
        return name if index == 0 and self.rng.random() < 0.5 else f"{name}#{index}"

    def uses(self) -> list[str]:
        kinds = [self.rng.choice(["i32", "tensor<2xf16>"]) for _ in range(self.rng.randint(0, 2))]
        kinds = [k for k in kinds if k != "i32" or "i32" in self.kinds.values()]
        if not kinds:
            return []
        operands = ", ".join(self.reference(kind) for kind in kinds)
        line = f'  "x.use"({operands}) : ({", ".join(kinds)}) -> ()'
        return [line] if self.rng.random() < 0.8 else [f'  "x.in"() ({{\n{line}\n  }}) : () -> ()']

    def successors(self) -> str:
        labels = self.labels[1:]  # the entry has none
        found = [f"^{self.rng.choice(labels)}" for _ in range(self.rng.randint(0, 2)) if labels]
        return f"[{', '.join(found)}]" if found else ""

    def mistake(self, lines: list[str]) -> list[str]:
        """A line twice, gone, or with a name or a number that is not there."""
        place = self.rng.randrange(1, len(lines) - 1)
        line = lines[place]
        changed: list[list[str]] = [
            [line, line],
            [],
            [line.replace("%v0", "%v77")],
            [line.replace("#0", "#7")],
            [line.replace("#0", "")],
            [line.replace("^l1", "^l9")],
            [line.replace("i32", "i64", 1)],
        ]
        return [*lines[:place], *self.rng.choice(changed), *lines[place + 1 :]]


@pytest.mark.parametrize("seed", range(300))
def test_same_ir_or_both_refuse(seed: int) -> None:
    text = _Text(seed).text()
    try:
        fast = print_op(parse_module(text))
    except TyirError as error:
        with pytest.raises(TyirError):
            parse_with_grammar(text)
        assert error.diagnostics[0].label is not None
        return
    assert print_op(parse_with_grammar(text)) == fast
    assert print_op(parse_module(fast)) == fast


def test_the_texts_are_read_and_refused() -> None:
    """The comparison above says little unless both happen, also with uses above definitions."""
    accepted = 0
    for seed in range(300):
        try:
            parse_module(_Text(seed).text())
            accepted += 1
        except TyirError:
            pass
    assert 100 < accepted < 290

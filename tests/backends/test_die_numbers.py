"""Dies whose programs differ by numbers alone are lowered once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tyir.backends.edge10.compile import CompileContext, to_program
from tyir.backends.edge10.lowering.die import lower_die
from tyir.backends.edge10.lowering.die_numbers import DieNumbers, renumber, without_numbers
from tyir.backends.edge10.plan_memory import dies_of
from tyir.dialects.builtin import Module
from tyir.dialects.ty import Embedding
from tyir.frontends.huggingface import import_model
from tyir.manifest import BuildOptions
from tyir.printer import print_op
from tyir.targets.machine import load_machine

MODEL = Path(__file__).resolve().parents[1] / "models" / "tiny-qwen2"
MACHINE = load_machine()


@pytest.fixture(scope="module")
def model() -> Module:
    return import_model(MODEL)


def dies(model: Module, **options: Any) -> list[Module]:
    program = model.clone()
    to_program(program, BuildOptions(max_kv=512, **options), CompileContext())
    return dies_of(program)


# How many kinds of dies there are: the model has 8 heads, 2 of keys and values, and 3 groups of 256 channels.
@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({"dies": 2, "seqlens": (1,)}, 1),
        ({"dies": 4, "seqlens": (1,), "mesh": (2, 2)}, 2),
        ({"dies": 4, "seqlens": (1,), "output": "topk=8"}, 2),
        ({"dies": 4, "seqlens": (40,), "output": "topk=8"}, 2),
        ({"dies": 2, "seqlens": (160,)}, 1),
        ({"dies": 4, "seqlens": (8,), "embedding_as_input": True}, 2),
        ({"dies": 4, "seqlens": (8,), "pp": 2}, 2),
        ({"dies": 8, "seqlens": (1,), "pp": 2}, 4),
        ({"dies": 4, "seqlens": (8,), "kv_split": "tokens"}, 4),
    ],
    ids=str,
)
def test_a_program_becomes_another_dies(model: Module, options: dict[str, Any], kinds: int) -> None:
    (seqlen,) = options["seqlens"]
    lowered: dict[Any, tuple[Module, DieNumbers]] = {}
    for die in dies(model, **options):
        own = lower_die(die, seqlen, MACHINE)
        key, numbers = without_numbers(die, seqlen), DieNumbers.of(die, seqlen)
        if key in lowered:
            program, before = lowered[key]
            assert renumber(program, before, numbers)
            assert print_op(program) == print_op(own)
            own = program
        lowered[key] = own, numbers
    assert len(lowered) == kinds


def test_what_cannot_be_told_apart_is_left_alone(model: Module) -> None:
    first, second = dies(model, dies=2, seqlens=(1,))
    program, old = lower_die(first, 1, MACHINE), DieNumbers.of(first, 1)
    text = print_op(program)
    ((kind, rows), *others) = old.of_ops
    assert kind is Embedding and rows == 0
    twice = DieNumbers(old.name, old.die, ((kind, rows), *old.of_ops))
    new = DieNumbers(str(second.sym_name), 1, ((kind, 2048), *old.of_ops))  # one of two moves
    assert not renumber(program, twice, new)
    assert print_op(program) == text and others

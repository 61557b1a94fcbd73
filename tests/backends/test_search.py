"""Prices of candidates: what repeats is priced once, and costs the same to the last bit."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import pytest

from tyir.backends.edge10.compile import CompileContext, to_program
from tyir.backends.edge10.lowering import die as lowering
from tyir.backends.edge10.lowering.search import CANDIDATES, PricedEmitter, Prices
from tyir.backends.edge10.plan_memory import dies_of
from tyir.diagnostics import TyirError
from tyir.dialects.builtin import Module
from tyir.execution.entry_points import entry_point
from tyir.frontends.huggingface import import_model
from tyir.manifest import BuildOptions
from tyir.targets.machine import load_machine

MODEL = Path(__file__).resolve().parents[1] / "models" / "tiny-qwen2"
MACHINE = load_machine()


OPTIONS: tuple[dict[str, Any], ...] = (
    {"dies": 1, "seqlens": (40,)},
    {"dies": 4, "seqlens": (96,), "weights": "int4"},
    {"dies": 2, "seqlens": (160,), "weights": "int4", "kv_dtype": "int8"},
)


def costs(die: Module, seqlen: int) -> list[float | str]:
    """Of all candidates, or why one does not fit."""
    found: list[float | str] = []
    for shares in CANDIDATES:
        try:
            found.append(lowering._estimated_ns(die, entry_point(die, seqlen), seqlen, MACHINE, shares))
        except TyirError as error:
            found.append(str(error))
    return found


def test_repeated_columns_cost_what_they_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Hashable] = []

    def each_time(self: PricedEmitter, key: Hashable, write: Callable[[], None]) -> None:
        asked.append((self.path, key))
        write()

    model = import_model(MODEL)
    for options in OPTIONS:
        program = model.clone()
        to_program(program, BuildOptions(max_kv=512, **options), CompileContext())
        die, (seqlen,) = dies_of(program)[0], options["seqlens"]
        known = costs(die, seqlen)
        with monkeypatch.context() as patch:
            patch.setattr(PricedEmitter, "repeated", each_time)
            assert costs(die, seqlen) == known
    assert len(set(asked)) < len(asked), "nothing repeats: the test shows nothing"


def test_what_fails_is_not_remembered() -> None:
    prices = Prices(MACHINE)

    def fail() -> None:
        raise TyirError("no room")

    for _ in range(2):
        with pytest.raises(TyirError, match="no room"):
            prices.repeated("key", fail)
    prices.repeated("key", lambda: prices.repeated("inner", lambda: None))
    assert prices.total_ns() == 0

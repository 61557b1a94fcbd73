"""Masks that one attention op cannot express are refused, whatever kind of function they are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
from transformers.masking_utils import and_masks, causal_mask_function, sliding_window_overlay

from tyir.diagnostics import TyirError
from tyir.frontends.attention_hook import _mask


def _two_variables(first: int, second: int) -> Callable[..., bool]:
    def mask(batch: Any, head: Any, query: Any, key: Any) -> bool:
        return bool(query - key < first + second)

    return mask


def _unset() -> Callable[..., bool]:
    def mask(*places: Any) -> bool:
        return later > 0

    return mask
    later = 1  # never reached: the closure's variable stays without a value


class _Object:
    def __call__(self, *places: Any) -> bool:
        return True


def test_masks_that_are_expressed() -> None:
    assert _mask(mask_function=causal_mask_function) == 0
    assert _mask(mask_function=and_masks(sliding_window_overlay(7), causal_mask_function)) == 7


@pytest.mark.parametrize(
    "mask",
    [
        _two_variables(1, 2),
        _unset(),
        _Object(),
        functools.partial(causal_mask_function, 0),
        lambda *places: True,
        and_masks(_two_variables(1, 2), causal_mask_function),
        and_masks(_Object(), causal_mask_function),
    ],
)
def test_masks_that_are_refused(mask: Callable[..., Any]) -> None:
    with pytest.raises(TyirError, match="cannot be represented"):
        _mask(mask_function=mask)

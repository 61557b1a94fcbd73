"""What is given to a session as token ids."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tyir.diagnostics import TyirError
from tyir.runtime_sim.session.token_ids import checked_ids


@pytest.mark.parametrize(
    "given", [[1, 2, 95], (1, 2, 95), np.array([1, 2, 95]), np.array([1, 2, 95], np.uint8)]
)
def test_whole_numbers_of_any_kind(given: Any) -> None:
    found = checked_ids(given, 96)
    assert found == [1, 2, 95] and {type(i) for i in found} == {int}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("hello", "runs token ids, not text"),
        (["hello"], "'hello' is not a token id"),
        ([1.5], "1.5 is not a token id"),
        ([1.0], "1.0 is not a token id"),
        (np.array([1.0]), "is not a token id"),
        ([None], "None is not a token id"),
        ([[1, 2]], "is not a token id"),
        (np.array([[1, 2]]), "is not a token id"),
        ([1, 96], "token 96 is not in the vocabulary of 96"),
        ([-1], "token -1 is not in the vocabulary of 96"),
        ([2**70], f"token {2**70} is not in the vocabulary of 96"),
    ],
)
def test_anything_else_is_refused(given: Any, said: str) -> None:
    with pytest.raises(TyirError) as caught:
        checked_ids(given, 96, "sequence 1: ")
    (problem,) = caught.value.diagnostics
    assert problem.message.startswith("sequence 1: ") and said in problem.message and problem.help

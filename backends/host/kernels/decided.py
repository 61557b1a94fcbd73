"""What kernels decide by, for whoever predicts their time: numbers that stand with the loops they are of."""

from __future__ import annotations

from typing import Final

from tyir.backends.host.kernels.attention import MOST_QUERIES
from tyir.backends.host.kernels.integer_linear import MANY_TOKENS, WHOLE_GROUP
from tyir.backends.host.kernels.tir import WORTH_THREADS

__all__ = ["ATTENTION_QUERIES", "FEW_TOKENS", "INTEGER_GROUP", "WORTH_THREADS"]

FEW_TOKENS: Final = MANY_TOKENS - 1  # up to which rows of a weight are read as they lie
ATTENTION_QUERIES: Final = MOST_QUERIES  # that meet a key together
INTEGER_GROUP: Final = WHOLE_GROUP  # divides the groups of columns whose activations are rounded

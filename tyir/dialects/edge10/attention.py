"""Commands of the vector units for attention, and the best tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY

from tyir.diagnostics import Diagnostic
from tyir.edge10.command import DYNAMIC, Command
from tyir.edge10.command_times import Work
from tyir.ir import Value
from tyir.opdef import attr, result, variadic_operand
from tyir.types import Type

__all__ = ["BlockWeights", "ScoreBlock", "SoftmaxBlock", "TopK"]


class SoftmaxBlock(
    Command,
    name="edge10.softmax_block",
    unit="vector",
    dynamic=("cols", "first_key"),
    priced_by=("rows", "softcap"),
):
    """One block of an online softmax (Milakov and Gimelshein, arXiv:1805.02867) over scores [rows, cols] f32
    of `cols` keys from `first_key` on.

    Row r is query `pos + first_query + r // heads` of `sequence`; keys after it, or `window` or more before
    it, are hidden.  With the running maximum m and sum l of a row: m' = max(m, max(scale * s)), alpha = exp(m
    - m'), p = exp(scale * s - m'), l' = l * alpha + sum(p); p is stored in f16, where a
    row may take the place of the first half of its scores.  Without columns m and l stay, alpha is 1.  With a
    `softcap` c, c * tanh(scale * s / c) stands for scale * s, and with a `temperature`, the offset of an f32
    in SRAM, scale is multiplied by it.  Scalars: the number of columns (size -1), then
    `first_key`.
    """

    args: tuple[Value, ...] = variadic_operand(default=())
    _: KW_ONLY
    scores: int = attr()
    score_stride: int = attr()
    probabilities: int = attr()
    probability_stride: int = attr()
    maximum: int = attr()
    total: int = attr()
    alpha: int = attr()
    rows: int = attr()
    cols: int = attr(default=DYNAMIC)
    first_key: int = attr(default=DYNAMIC)
    heads: int = attr(least=1)
    first_query: int = attr(default=0)
    window: int = attr(default=0)
    sequence: int = attr(default=0)
    scale: float = attr()
    softcap: float | None = attr(default=None)
    temperature: int | None = attr(default=None)
    done: Value = result()

    def cost(self, scalars: Sequence[int]) -> Work:
        cols, _ = self.sizes_with(scalars)
        return Work("softmax" if self.softcap is None else "softmax_capped", (self.rows * cols,))

    def sram_writes(self) -> list[tuple[int, int]]:
        by_row = [(start, start + self.rows * 4) for start in (self.maximum, self.total, self.alpha)]
        return [(self.probabilities, self.probabilities + self.rows * self.probability_stride), *by_row]


class ScoreBlock(
    Command,
    name="edge10.score_block",
    unit="vector",
    dynamic=("cols", "first_key"),
    priced_by=("rows", "softcap"),
):
    """What queries see in a block of keys: of scores [rows, cols] f32 of `cols` keys from `first_key` on, for
    each row the logarithm of the sum of e^(scale * s) over the keys that it sees, -1e30 where it sees none.

    Row r is query `pos + first_query + r // heads * every` of `sequence`; keys after it are hidden.  The
    result goes to `out`, and is added to `total` of the row: total' = log(e^total + e^result).  Without
    columns the result is -1e30.  `softcap`, `temperature` and the scalars are as in `edge10.softmax_block`.
    """

    args: tuple[Value, ...] = variadic_operand(default=())
    _: KW_ONLY
    scores: int = attr()
    score_stride: int = attr()
    out: int = attr()
    total: int = attr()
    rows: int = attr()
    cols: int = attr(default=DYNAMIC)
    first_key: int = attr(default=DYNAMIC)
    heads: int = attr(least=1)
    first_query: int = attr(default=0)
    every: int = attr(default=1, least=1)
    sequence: int = attr(default=0)
    scale: float = attr()
    softcap: float | None = attr(default=None)
    temperature: int | None = attr(default=None)
    done: Value = result()

    def cost(self, scalars: Sequence[int]) -> Work:
        """The passes of a softmax, whose weights would be stored where here they are added up."""
        cols, _ = self.sizes_with(scalars)
        return Work("softmax" if self.softcap is None else "softmax_capped", (self.rows * cols,))

    def sram_writes(self) -> list[tuple[int, int]]:
        return [(start, start + self.rows * 4) for start in (self.out, self.total)]


class BlockWeights(
    Command,
    name="edge10.block_weights",
    unit="vector",
    dynamic=("seen", "low", "high", "measures"),
    priced_by=("samples", "heads"),
):
    """How much of their attention samples give each of `rows` blocks: of the logarithms x [rows, samples,
    heads] f32 and totals [samples, heads] f32, rows `total_stride` bytes apart, the sums of e^(x - total)
    over heads and the samples that choose (`kv.pick_blocks`), f32 [rows] at `out`.

    With `measures` 1 not all choose.  Row r is block `first` + r; block 0 has weight 1e30, one that is not
    from `low` up to `high` -1.  Rows from `seen` on are no candidates and are not read.
    """

    args: tuple[Value, ...] = variadic_operand(default=())
    _: KW_ONLY
    x: int = attr()
    totals: int = attr()
    total_stride: int = attr()
    out: int = attr()
    rows: int = attr()
    samples: int = attr()
    heads: int = attr()
    first: int = attr(default=0)
    seen: int = attr(default=DYNAMIC)
    low: int = attr(default=DYNAMIC)
    high: int = attr(default=DYNAMIC)
    measures: int = attr(default=DYNAMIC)
    done: Value = result()

    def cost(self, scalars: Sequence[int]) -> Work:
        seen, *_ = self.sizes_with(scalars)
        return Work("softmax", (seen * self.samples * self.heads,))

    def sram_writes(self) -> list[tuple[int, int]]:
        return [(self.out, self.out + self.rows * 4)]


class TopK(
    Command,
    name="edge10.top_k",
    unit="vector",
    priced_by=("rows", "cols", "k", "partial", "softcap"),
):
    """Offers `cols` candidates of each row to the row's list of the `k` best, on the vector units, and adds
    their exponentials to the row's sum.

    Candidate c of row r is the value (`element`) at SRAM offset `values` + r * `stride` + c elements; its id
    is `first` + c, or the i32 at the same place from `ids` on.  The lists are k f32 values at `best[0]` + r *
    `best_strides[0]` and k i32 ids at `best[1]` + r * `best_strides[1]`, largest first, of equal values the
    lower id first; the f32 at `best[2]` + r * `best_strides[2]` is the sum of exp(x - the first value) over
    all candidates so far, scaled as the first value grows.  With `partial`, an SRAM offset, the candidates of
    row r are a list of this kind whose sum is the f32 at `partial` + r * `stride`, which is added in place of
    theirs.  `fresh` begins with empty lists, whose free places hold -inf; -inf and NaN count as the lowest
    finite number.

    A `softcap` c has c * tanh(x / c) summed for x.  `ends` gives the results in place of what is added to:
    values are capped, and the sum becomes its logarithm plus the first value.
    """

    args: tuple[Value, ...] = variadic_operand(default=())
    _: KW_ONLY
    values: int = attr()
    ids: int | None = attr(default=None)
    partial: int | None = attr(default=None)
    stride: int = attr()
    element: Type = attr()
    first: int = attr(default=0)
    rows: int = attr()
    cols: int = attr()
    best: tuple[int, ...] = attr()
    best_strides: tuple[int, ...] = attr()
    k: int = attr()
    softcap: float | None = attr(default=None)
    fresh: bool = attr(default=True)
    ends: bool = attr(default=False)
    done: Value = result()

    def cost(self, scalars: Sequence[int]) -> Work:
        summed = self.cols if self.partial is None else 1
        what = "top_k" if self.softcap is None else "top_k_capped"
        return Work(what, (self.rows, self.cols, self.k, self.rows * summed))

    def sram_writes(self) -> list[tuple[int, int]]:
        return [
            (offset, offset + (self.rows - 1) * stride + size)
            for offset, stride, size in zip(self.best, self.best_strides, (self.k * 4, self.k * 4, 4))
        ]

    def verify(self) -> Iterator[Diagnostic | str]:
        yield from super().verify()
        if (len(self.best), len(self.best_strides)) != (3, 3):
            yield "lists are values and ids, and there is a sum: three offsets and three strides"
        if min(self.k, self.rows, self.cols) < 1:
            yield f"k = {self.k}, rows = {self.rows} and cols = {self.cols} must be positive"
        if self.partial is not None and self.ids is None:
            yield "a list with a sum has ids"

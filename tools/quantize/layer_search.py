"""The search in one decoder layer.

Linears that read the same values are a stage; stages are taken in the order of execution.  For each the
layer runs twice over the calibration windows: without any quantisation for what its linears should give, and
as far as it is quantised for what they read.  So a linear makes up for what the linears and layers before it
lost (`sequential`; otherwise it reads what it would read without quantisation).  With the loss's gradient
(`loss_terms`) errors count by what they do to the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from tyir.diagnostics import TyirError
from tyir.process.memory import return_free_memory
from tyir.tools.quantize.arithmetic import (
    Quantized,
    dequantized,
    extremes,
    folded,
    is_finite,
    quantized,
    to_f16,
)
from tyir.tools.quantize.gptq import gptq_rounded
from tyir.tools.quantize.loss_terms import LossTerm, loss_terms
from tyir.tools.quantize.moments import Inputs, Moments
from tyir.tools.quantize.ranges import search_ranges
from tyir.tools.quantize.scales import search_scale
from tyir.tools.quantize.settings import QuantizeSettings, Work
from tyir.tools.quantize.streamed_model import LinearModule, StreamedModel, Tensors

__all__ = ["LayerResult", "LinearReport", "ScaledChannels", "search_layer"]

Tensor = Any
_HIGHEST_F16: Final = 65504.0


@dataclass(frozen=True)
class ScaledChannels:
    """Channels of a producer, and the linears of the same layer that read them (`tyir.passes._scale_groups`).

    `producer` and `readers` are module paths; `rows` those of the producer's weight that are divided, None
    for a norm.  Each run of `head` channels stands `repeats` times in the readers' columns.
    """

    producer: str
    readers: tuple[str, ...]
    rows: Tensor | None
    head: int
    repeats: int

    def of_columns(self, scale: Tensor) -> Tensor:
        return scale.reshape(-1, self.head).repeat_interleave(self.repeats, 0).reshape(-1)


@dataclass(frozen=True)
class LinearReport:
    """Of one linear: how its input's scale was made, what part of the widest ranges is kept on average, and
    the squared error of its output, relative to the output's square: rounded to nearest, and as chosen.
    """

    path: str
    ratio: float | None
    duo: bool
    kept_range: float
    error_before: float
    error_after: float


@dataclass
class LayerResult:
    """What was chosen in a layer: `scales` [channels] by producer, `ranges` [2, N, K/g] and, of GPTQ,
    `rounded` (q u8 [N, K], scales f16 and zeros u8 [N, K/g]) by linear.

    `tensors`: the layer's tensors with the de-quantised weights, in the coordinates of the unscaled model.
    """

    scales: dict[str, Tensor] = field(default_factory=dict)
    ranges: dict[str, Tensor] = field(default_factory=dict)
    rounded: dict[str, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    reports: list[LinearReport] = field(default_factory=list)
    tensors: Tensors = field(default_factory=dict)


class _Reached(Exception):
    """The last linear that was asked for has run."""


def search_layer(
    model: StreamedModel,
    index: int,
    states: tuple[Tensor, Tensor],
    groups: Sequence[ScaledChannels],
    settings: QuantizeSettings,
    work: Work,
    is_kept: Callable[[str], bool],
    gradient: Tensor | None = None,
) -> LayerResult:
    """Search layer `index`; `states` [S, T, C] enter it without and with the quantisation of those before.

    `is_kept`: the linears that stay as they are.  `gradient`: of the loss with respect to what leaves the
    unquantised layer, where ranges are chosen for the loss.  `TyirError` names the linear whose values are
    not finite.
    """
    at_work = _LayerSearch(model, index, states, groups, settings, work, is_kept)
    if gradient is not None:
        at_work.take_loss(gradient)
    return at_work.result()


class _LayerSearch:
    def __init__(
        self,
        model: StreamedModel,
        index: int,
        states: tuple[Tensor, Tensor],
        groups: Sequence[ScaledChannels],
        settings: QuantizeSettings,
        work: Work,
        is_kept: Callable[[str], bool],
    ) -> None:
        self.model, self.index, self.settings, self.work = model, index, settings, work
        self.exact, self.rough = states
        self.grid = settings.grid
        self.prefix = model.paths[index] + "."
        self.plain = model.tensors(index)
        self.current = dict(self.plain)
        self.linears = {m.path: m for m in model.linears(index) if not is_kept(self.prefix + m.path)}
        self.groups = groups
        self.columns: dict[str, Tensor] = {}
        self.codes: dict[str, Tensor] = {}  # GPTQ's q
        self.found = LayerResult()
        self.terms: dict[str, LossTerm] = {}

    def take_loss(self, gradient: Tensor) -> None:
        """Search for the loss, whose gradient leaves the layer [S, T, C]."""
        linears = list(self.linears.values())
        self.terms = loss_terms(self.model, self.index, self.plain, linears, self.exact, gradient)

    def result(self) -> LayerResult:
        stages = self._stages()
        for stage in stages:
            self._search(stage, last=stage is stages[-1])
        self._divide_producers()
        self.found.tensors = self.model.tensors(self.index)
        for path, linear in self.linears.items():
            weight = linear.weight(self.found.tensors)
            self.found.tensors[linear.weight_name] = linear.stored(self._final(path, weight))
        return self.found

    # ---------------------------------------------------------------------------------------- running

    def _stages(self) -> list[list[LinearModule]]:
        """The layer's linears by the values they read, in the order they run in."""
        order: list[tuple[int, str]] = []
        held = []  # so that no address is used twice

        def note(path: str) -> Callable[[Any, Any, Any], None]:
            def hook(module: Any, args: Any, output: Any) -> None:
                order.append((args[0].data_ptr(), path))
                held.append(args[0])

            return hook

        handles = [m.module.register_forward_hook(note(p)) for p, m in self.linears.items()]
        try:
            with torch.no_grad():
                self.model.run(self.index, self.plain, self.exact[:1])
        finally:
            for handle in handles:
                handle.remove()
        stages: dict[int, list[LinearModule]] = {}
        for address, path in order:
            stages.setdefault(address, []).append(self.linears[path])
        return list(stages.values())

    def _values(
        self, stage: Sequence[LinearModule], tensors: Tensors, state: Tensor, outputs: bool
    ) -> list[Tensor]:
        """What the linears of a stage give (without their biases), or what they read, for some windows."""
        seen: dict[str, Tensor] = {}

        def note(linear: LinearModule) -> Callable[[Any, Any, Any], None]:
            def hook(module: Any, args: Any, output: Any) -> None:
                value = output if outputs else args[0]
                if outputs and f"{linear.path}.bias" in tensors:
                    value = value - tensors[f"{linear.path}.bias"]
                seen[linear.path] = value.reshape(-1, value.shape[-1])
                if len(seen) == len(stage):
                    raise _Reached

            return hook

        handles = [linear.module.register_forward_hook(note(linear)) for linear in stage]
        try:
            self.model.run(self.index, tensors, state)
        except _Reached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return [seen[linear.path] for linear in stage]

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _moments(self, stage: Sequence[LinearModule]) -> list[Moments]:
        channels, device = stage[0].shape[1], self.model.device
        # what each token counts for is every linear's own; otherwise the moments are those of all
        inputs = [Inputs(channels, device) for _ in (stage if self.terms else stage[:1])]
        found = [
            Moments(inputs[i % len(inputs)], torch.zeros(m.shape[0], channels, device=device))
            for i, m in enumerate(stage)
        ]
        for windows in self.model.batches(len(self.exact)):
            exact = self.exact[windows]
            outputs = self._values(stage, self.plain, exact, outputs=True)
            if self.settings.sequential:
                (x, *_) = self._values(stage[:1], self.current, self.rough[windows], outputs=False)
            else:
                (x, *_) = self._values(stage[:1], self.plain, exact, outputs=False)
            counts = [self.terms[m.path].weights[windows].reshape(-1) if self.terms else None for m in stage]
            for each, count in zip(inputs, counts, strict=False):
                each.add(x, count)
            for moments, y, count in zip(found, outputs, counts, strict=True):
                moments.add_targets(x, y, count)
        for linear, moments in zip(stage, found, strict=True):
            if self.terms:
                moments.pull = self.terms[linear.path].gradient / (self.model.depth * len(self.linears))
            for what, tensor in (("inputs", moments.inputs.second), ("outputs", moments.targets)):
                if not is_finite(tensor):
                    raise TyirError(
                        f"the {what} of {self.prefix}{linear.path} are not finite",
                        help="mend the checkpoint: a weight before it holds NaN or values that overflow",
                    )
        return found

    # -------------------------------------------------------------------------------------- the search

    def _search(self, stage: Sequence[LinearModule], last: bool) -> None:
        found = self._moments(stage)
        if last:  # the layer does not run any more: its weights give room to the largest of all moments
            names = {linear.weight_name for linear in stage}
            self.plain = {name: t for name, t in self.plain.items() if name in names}
            self.current = {}
        return_free_memory()
        paths = {self.prefix + linear.path for linear in stage}
        group = next((g for g in self.groups if set(g.readers) <= paths), None)
        chosen = None
        if self.settings.scales and group is not None:
            weights = [m.weight(self.plain) for m in stage if self.prefix + m.path in group.readers]
            chosen = search_scale(
                weights, found[0].inputs, group.head, group.repeats, self.grid, self.work.ratios
            )
            if chosen.scale is not None:
                self.found.scales[group.producer] = chosen.scale
        for linear, moments in zip(stage, found, strict=True):
            path = self.prefix + linear.path
            columns = None
            if group is not None and path in group.readers and group.producer in self.found.scales:
                columns = self.columns[path] = group.of_columns(self.found.scales[group.producer])
            original = linear.weight(self.plain)
            before = moments.error(dequantized(quantized(folded(original), None, self.grid), self.grid))
            weight = folded(original, None, columns)
            del original
            if last:
                del self.plain[linear.weight_name]
            if float(weight.abs().max()) > _HIGHEST_F16:
                raise TyirError(f"the weight of {path} is beyond f16", help="quantise it with --no-scales")
            if self.settings.ranges:
                ranges = search_ranges(weight, columns, moments, self.grid, self.work)
                self.found.ranges[path] = ranges
            else:
                ranges = extremes(weight, self.grid)
            if self.settings.rounding:
                self.codes[path] = gptq_rounded(
                    weight, columns, ranges, moments, self.grid, path, self.work.rounds
                )[0]
            numbers = self._numbers(path, weight, ranges if self.settings.ranges else None)
            after = dequantized(numbers, self.grid)
            after = after if columns is None else after / columns
            if not last:
                self.current[linear.weight_name] = linear.stored(after)
            kept = 1.0
            if self.settings.ranges:
                widest = extremes(weight, self.grid)
                kept = float(
                    ((ranges[1] - ranges[0]) / (widest[1] - widest[0]).clamp(min=1e-9)).clamp(max=1).mean()
                )
            self.found.reports.append(
                LinearReport(
                    path,
                    chosen.ratio if columns is not None and chosen is not None else None,
                    bool(columns is not None and chosen is not None and chosen.duo),
                    kept,
                    before,
                    moments.error(after),
                )
            )

    def _numbers(self, path: str, weight: Tensor, ranges: Tensor | None) -> Quantized:
        """What the table (and GPTQ) make of a folded weight [N, K]."""
        q, scales, zeros = quantized(weight, ranges, self.grid)
        return self.codes.get(path, q), scales, zeros

    def _rows(self, path: str, count: int) -> Tensor | None:
        """What a linear's rows are divided by, as the producer of channels that were scaled."""
        group = next((g for g in self.groups if g.producer == path), None)
        if group is None or group.rows is None or path not in self.found.scales:
            return None
        rows = torch.ones(count, device=self.model.device)
        rows[group.rows] = self.found.scales[path]
        return rows

    def _divide_producers(self) -> None:
        """Ranges were searched before the scales of what a linear gives were known: they are divided too."""
        for path, ranges in self.found.ranges.items():
            rows = self._rows(path, ranges.shape[1])
            if rows is not None:
                self.found.ranges[path] = to_f16(ranges / rows[:, None])

    def _final(self, path: str, weight: Tensor) -> Tensor:
        """A linear's weight [N, K] as the finished table has it, in the coordinates of the unscaled model."""
        full = self.prefix + path
        columns, rows = self.columns.get(full), self._rows(full, len(weight))
        weight = folded(weight, rows, columns)
        numbers = self._numbers(full, weight, self.found.ranges.get(full))
        if full in self.codes:
            q, scales, zeros = numbers
            self.found.rounded[full] = (q.to(torch.uint8), scales.to(torch.float16), zeros.to(torch.uint8))
        final = dequantized(numbers, self.grid)
        if columns is not None:
            final = final / columns
        return final if rows is None else final * rows[:, None]


def errors_by_layer(reports: Mapping[int, Sequence[LinearReport]]) -> dict[int, tuple[float, float]]:
    """The mean error of each layer's linears, before and after."""
    return {
        index: (
            sum(r.error_before for r in each) / len(each),
            sum(r.error_after for r in each) / len(each),
        )
        for index, each in reports.items()
        if each
    }

"""What a quantisation is asked to be, and how much work it may take.

The amount of work follows from the model's shapes alone, never from a clock: the same command gives the same
bytes on a slow and on a busy machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tyir.diagnostics import Diagnostic, TyirError, did_you_mean

__all__ = ["METHODS", "OBJECTIVES", "Grid", "QuantizeSettings", "Work", "work_for"]

METHODS: Final = ("awq", "gptq", "awq+gptq", "rtn")
OBJECTIVES: Final = ("outputs", "loss")  # in the order of trust
BITS: Final = (3, 4, 8)

# What one search may take on a CPU: tokens x weights of the forward passes, and candidates x weights of the
# range search.  A 0.5B model (358 M weights in linears) comes out at 10 windows and 6 x 6 candidates.
_FORWARD_WORK: Final = 2.0e12
_CANDIDATE_WORK: Final = 1.5e10
_ACCELERATOR: Final = 25  # how many times the work a GPU may take
_SAMPLES: Final = (4, 64)
_POINTS: Final = (4, 8)
_ROUNDS: Final = (2, 8)
_QUICK_RATIOS: Final = 5
_SWEEPS: Final = (
    1,
    2,
    4,
)  # for a large and a small model, and for a small one whose numbers are not searched


@dataclass(frozen=True)
class Grid:
    """The numbers that weights become: of `bits` bits, around a zero point of the group or symmetric."""

    bits: int
    group_size: int
    zero_point: bool

    @property
    def highest(self) -> int:
        """The largest q."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """q of zero, in a symmetric grid."""
        return 1 << self.bits - 1


@dataclass(frozen=True)
class QuantizeSettings:
    """The options of `tyir-quantize`.

    `modules_to_not_convert`: module paths, or runs of whole components of them.  `samples`: windows of
    `window` tokens that the search sees; None: as many as the work allows.  `sequential`: a layer's inputs
    carry the error of the layers before it, and its targets do not.  `smooth` False leaves scales
    out; `quick` takes the least work.  `objective`: what ranges of the method awq are chosen for, the
    "outputs" of linears or the model's "loss" on the text; None: of a small model both are tried, and the
    last part of the text, which neither sees, decides between them and rounding to nearest.
    """

    method: str = "awq+gptq"
    bits: int = 4
    group_size: int = 128
    zero_point: bool = True
    lm_head: bool = False
    modules_to_not_convert: tuple[str, ...] = ()
    samples: int | None = None
    window: int = 512
    seed: int = 0
    sequential: bool = True
    smooth: bool = True
    quick: bool = False
    device: str = "cpu"
    objective: str | None = None

    def __post_init__(self) -> None:
        """`TyirError` for options that cannot be."""
        problems = []
        if self.method not in METHODS:
            hint = did_you_mean(self.method, METHODS) or f"one of {', '.join(METHODS)}"
            problems.append(Diagnostic(f"there is no method '{self.method}'", help=hint))
        if self.objective not in (None, *OBJECTIVES):
            hint = did_you_mean(str(self.objective), OBJECTIVES) or f"one of {', '.join(OBJECTIVES)}"
            problems.append(Diagnostic(f"there is no objective '{self.objective}'", help=hint))
        elif self.objective == "loss" and (self.method != "awq" or not self.sequential):
            what = f"method {self.method}" if self.method != "awq" else "inputs without the layers' errors"
            problems.append(Diagnostic(f"objective loss does not go with {what}", help="use --method awq"))
        if self.bits not in BITS:
            problems.append(Diagnostic(f"weights of {self.bits} bits", help=f"one of {BITS}"))
        for name, value, least in (
            ("group size", self.group_size, 1),
            ("samples", self.samples, 1),
            ("window", self.window, 8),
        ):
            if value is not None and value < least:
                problems.append(Diagnostic(f"{name} is {value}", help=f"at least {least}"))
        if problems:
            raise TyirError(problems)

    @property
    def grid(self) -> Grid:
        return Grid(self.bits, self.group_size, self.zero_point)

    @property
    def scales(self) -> bool:
        """Whether scales are searched."""
        return self.smooth and self.method.startswith("awq")

    @property
    def ranges(self) -> bool:
        """Whether ranges are searched."""
        return self.method.startswith("awq")

    @property
    def rounding(self) -> bool:
        """Whether weights are rounded one after another, the error carried on (GPTQ)."""
        return self.method.endswith("gptq")


@dataclass(frozen=True)
class Work:
    """How many windows are seen, how many values of each end of a range are tried, how often, and how often
    GPTQ's numbers are rounded again; whether both objectives are tried; the steps of a scale's ratio.
    """

    samples: int
    points: int
    sweeps: int
    rounds: int = 0
    both: bool = False
    ratios: int = 20


def work_for(settings: QuantizeSettings, layers: int, linears: Sequence[tuple[int, int]]) -> Work:
    """The work for a model of `layers` layers whose linears have these shapes [N, K]."""
    if settings.quick:
        return Work(settings.samples or _SAMPLES[0], _POINTS[0], _SWEEPS[0], _ROUNDS[0], ratios=_QUICK_RATIOS)
    factor = _ACCELERATOR if settings.device != "cpu" else 1
    weights = max(1, layers * sum(n * k for n, k in linears))
    samples = int(factor * _FORWARD_WORK / (weights * settings.window))
    points = int((factor * _CANDIDATE_WORK / weights) ** 0.5)
    points = min(max(points, _POINTS[0]), _POINTS[1])
    if settings.samples is not None:
        samples = settings.samples
    else:
        samples = min(max(samples, _SAMPLES[0]), _SAMPLES[1])
    small = points == _POINTS[1]
    alone = settings.method == "awq"
    both = small and alone and settings.sequential and settings.objective is None
    return Work(samples, points, _SWEEPS[small + (small and alone)], _ROUNDS[small], both)

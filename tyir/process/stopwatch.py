"""Wall and processor time and peak memory of the stages of a command."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["StageTime", "Stopwatch", "peak_mib"]


@dataclass(frozen=True)
class StageTime:
    """One stage: wall seconds, the process's highest resident memory in MiB while it ran (None where the
    system does not tell), and the processor seconds of the thread that it ran in.
    """

    name: str
    seconds: float
    peak_mib: float | None
    cpu_seconds: float = 0.0


@dataclass
class Stopwatch:
    """Collects `StageTime`s; a stage is a `with watch.stage("import"):` block.

    `told` is called when a stage begins and when it ends.
    """

    stages: list[StageTime] = field(default_factory=list)
    told: Callable[[Mapping[str, object]], None] | None = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        if self.told is not None:
            self.told({"event": "begin", "stage": name})
        _reset_peak()
        start, cpu = time.perf_counter(), time.thread_time()
        try:
            yield
        finally:
            done = StageTime(
                name, time.perf_counter() - start, peak_mib(), max(time.thread_time() - cpu, 0.0)
            )
            self.stages.append(done)
            if self.told is not None:
                self.told({"event": "end", "stage": name, "seconds": done.seconds, "peak_mib": done.peak_mib})

    def report(self) -> str:
        """A table, one line per stage, with the total."""
        lines = [f"{'stage':<24}{'seconds':>10}{'peak MiB':>12}"]
        for stage in self.stages:
            lines.append(f"{stage.name:<24}{stage.seconds:>10.2f}{_mib(stage.peak_mib):>12}")
        peaks = [s.peak_mib for s in self.stages if s.peak_mib is not None]
        total = sum(s.seconds for s in self.stages)
        lines.append(f"{'total':<24}{total:>10.2f}{_mib(max(peaks, default=None)):>12}")
        return "\n".join(lines)

    def as_json(self) -> dict[str, object]:
        """The stages in order, for machines to read."""
        stages = [
            {"name": s.name, "seconds": s.seconds, "peak_mib": s.peak_mib, "cpu_seconds": s.cpu_seconds}
            for s in self.stages
        ]
        peaks = [s.peak_mib for s in self.stages if s.peak_mib is not None]
        return {
            "stages": stages,
            "seconds": sum(s.seconds for s in self.stages),
            "peak_mib": max(peaks, default=None),
        }


def _mib(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _reset_peak() -> None:
    """Start a new high-water mark (Linux; elsewhere the mark is the process's)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_mib() -> float | None:
    """The most memory that this process has held, in MiB (Linux; None elsewhere).  Not `ru_maxrss`: a child
    begins with its parent's.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return None

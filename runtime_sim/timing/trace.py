"""A timing as a Chrome trace: one process per die, one track per unit (format: Trace Event Format; opens in
Perfetto and chrome://tracing).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from tyir.dialects import edge10
from tyir.runtime_sim.timing.engine import Record, Timing

__all__ = ["chrome_trace"]


def chrome_trace(timing: Timing) -> str:
    """The JSON text.

    A transfer is shown while its data moves, with the time it waited for DRAM's latency and its turn in
    `args`.
    """
    events = [
        *_names(timing),
        *(_event(die, r) for die, records in enumerate(timing.records) for r in records),
        *_flows(timing),
    ]
    lines = ",\n".join(json.dumps(e) for e in events)
    return (
        f'{{"displayTimeUnit": "ns", "otherData": {{"pos": {timing.pos}, "seqlen": {timing.seqlen}}},'
        f' "traceEvents": [\n{lines}\n]}}\n'
    )


def _names(timing: Timing) -> Iterator[dict[str, Any]]:
    for die in range(len(timing.records)):
        yield {"ph": "M", "pid": die, "name": "process_name", "args": {"name": f"die {die}"}}
        for number, unit in enumerate(edge10.UNITS):
            yield {"ph": "M", "pid": die, "tid": number, "name": "thread_name", "args": {"name": unit}}
            yield {
                "ph": "M",
                "pid": die,
                "tid": number,
                "name": "thread_sort_index",
                "args": {"sort_index": number},
            }


def _flows(timing: Timing) -> Iterator[dict[str, Any]]:
    """An arrow for every collective from each of its dies to the next one, for a send from the sender to each
    receiver: who takes part.

    Those who take part begin and end at the same time.
    """
    meetings: dict[tuple[float, float], list[tuple[int, Record]]] = {}
    for die, records in enumerate(timing.records):
        for record in records:
            if record.command.unit == "d2d":
                meetings.setdefault((record.data, record.end), []).append((die, record))
    tid = edge10.UNITS.index("d2d")
    for number, members in enumerate(meetings.values()):
        sender = next((m for m in members if isinstance(m[1].command.op, edge10.Send)), None)
        pairs = [(sender, m) for m in members if m is not sender] if sender else list(pairwise(members))
        for arrow, ((source, start), (target, end)) in enumerate(pairs):
            common = {"cat": "d2d", "name": start.command.op.name, "id": f"{number}.{arrow}", "tid": tid}
            yield {**common, "ph": "s", "pid": source, "ts": round(start.data / 1000, 6)}
            yield {**common, "ph": "f", "bp": "e", "pid": target, "ts": round(end.end / 1000, 6)}


def _event(die: int, record: Record) -> dict[str, Any]:
    command = record.command
    args: dict[str, Any] = {"command": command.index, "op": command.op.name, "source": command.source}
    if command.layer >= 0:
        args["layer"] = command.layer
    if record.dram_bytes:
        args["bytes"] = record.dram_bytes
    if record.data > record.start:
        args["waited_us"] = round((record.data - record.start) / 1000, 6)
    return {
        "ph": "X",
        "pid": die,
        "tid": edge10.UNITS.index(command.unit),
        "ts": round(record.data / 1000, 6),
        "dur": round((record.end - record.data) / 1000, 6),
        "name": command.path or command.op.name,
        "cat": command.unit,
        "args": args,
    }

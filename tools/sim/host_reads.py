"""How fast this computer reads memory, by how much of it and how many threads (`tools/bench/bandwidth.c`)."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from tyir.diagnostics import TyirError
from tyir.runtime_sim.host.machine import READS

__all__ = ["read_rates"]


def read_rates(threads: int, clock: str, folder: Path) -> Mapping[str, float]:
    """The constants of `memory`, GB/s; `TyirError` where the program cannot be compiled."""
    from tyir.backends.host.tvm_host import linker

    source, program = folder / "bandwidth.c", folder / "bandwidth"
    source.write_bytes((resources.files("tyir.tools.bench") / "bandwidth.c").read_bytes())
    options = ("-x", "c", "-O3", "-march=native", "-pthread", "-o", str(program), str(source))
    done = subprocess.run([linker() or "", *options], capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise TyirError(
            f"the compiler {linker()} could not compile what reads memory: {done.stderr.strip()}",
            help="tyir doctor shows which compiler is used; name another one in CXX",
        )

    def rate(count: int, size: int) -> float:
        asked = [str(program), str(count), str(size), clock]
        answer = subprocess.run(asked, input="\n" * 3, capture_output=True, text=True)
        if answer.returncode:
            raise TyirError(f"what reads {size} bytes of memory ended with {answer.returncode}")
        return max(map(float, answer.stdout.split()))

    return {
        f"memory.{label}_{name}_gbps": rate(count, size)
        for name, count in (("one_thread", 1), ("all_threads", threads))
        for label, size in READS.items()
    }

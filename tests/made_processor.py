"""A processor that was never measured."""

from __future__ import annotations

from tyir.runtime_sim.host.machine import HostMachine, _form, host_machine
from tyir.targets.constants import Constant

# Of a machine that was never measured: nothing costs anything, but what a test says.
NOTHING = {
    **dict.fromkeys(_form().whole, 0.0),
    "processor.threads": 1,
    "processor.few_tokens": 7,
    "processor.attention_queries": 8,
    "processor.integer_group": 32,
    "processor.cache_bytes": 1 << 20,
    "parallel.least_operations": 1000,
    "parallel.beside": 1.0,
}


def machine(**values: float) -> HostMachine:
    """`product_int8_token__row_ns=2` is that constant's."""
    known = {name.replace("__", "."): value for name, value in values.items()}
    assert not known.keys() - NOTHING.keys()
    constants = {n: Constant(v, "fitted", "made up") for n, v in {**NOTHING, **known}.items()}
    return host_machine("made-up", "wall", constants)


def measured_like() -> HostMachine:
    """A machine on which everything costs something."""
    costs = {n.replace(".", "__"): 0.5 for n in NOTHING if n.endswith(("_ns", "_us", "_share"))}
    shared = {n.replace(".", "__"): 0.2 for n in NOTHING if n.endswith("_all_threads_byte_ns")}
    cores = {"processor__threads": 4, "processor__cache_bytes": 4096}
    return machine(**{**costs, **shared, **cores, "parallel__start_us": 1e-3, "parallel__beside": 1.2})

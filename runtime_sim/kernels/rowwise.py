"""Time of norms and elementwise kernels: launch, latency of a row, bytes at the rate that mixed reads and writes get."""

from __future__ import annotations

from tyir.targets.accelerator import Accelerator

__all__ = ["add_norm_ns", "copy_ns", "norm_ns", "rope_ns", "silu_mul_ns", "stream_ns"]

_F16 = 2


def stream_ns(nbytes: float, machine: Accelerator) -> float:
    """Bytes read and written together.  Example (2000 GB/s): 4 MB: 2000 ns."""
    return nbytes / machine.rowwise.bandwidth_gbps


def _rows_ns(rows: int, width: int, passes: int, machine: Accelerator) -> float:
    """A kernel with one block of threads per row, which waits for its row once (mean, then product).

    Example (launch 1 us, call 0, row 0.05 ns per byte, 2000 GB/s): 128 rows of 4096, 4 passes: 1000 + 0.05 * 8192 + 128 * 8192 * 4 / 2000 = 3507 ns.
    """
    latency = machine.rowwise.row_ns_per_byte * width * _F16
    return (machine.launch.kernel_us + machine.rowwise.call_us) * 1000 + latency + stream_ns(float(rows) * width * _F16 * passes, machine)


def add_norm_ns(rows: int, width: int, machine: Accelerator) -> float:
    """Residual sum and RMS norm: two tensors in, two out."""
    return _rows_ns(rows, width, 4, machine)


def norm_ns(rows: int, width: int, machine: Accelerator) -> float:
    """A norm alone: one tensor in, one out."""
    return _rows_ns(rows, width, 2, machine)


def silu_mul_ns(rows: int, width: int, machine: Accelerator) -> float:
    """silu(gate) * up: two tensors in, one out; elements are independent, so no row waits."""
    return (machine.launch.kernel_us + machine.rowwise.call_us) * 1000 + stream_ns(3.0 * rows * width * _F16, machine)


def rope_ns(rows: int, width: int, machine: Accelerator) -> float:
    """Rotating queries and keys of `width` elements a token, a view of a product's output: in and out.  A generated kernel, without the start of a strided copy."""
    return (machine.launch.kernel_us + machine.rowwise.call_us) * 1000 + _strided_ns(rows, width, machine)


def copy_ns(rows: int, width: int, machine: Accelerator) -> float:
    """One tensor from a view into another.

    Example (launch 1 us, strided 0.5 us and 1000 GB/s): 1 row of 1024: 1000 + 500 + 4096 / 1000 = 1504 ns.
    """
    return (machine.launch.kernel_us + machine.rowwise.call_us + machine.rowwise.strided_us) * 1000 + _strided_ns(rows, width, machine)


def _strided_ns(rows: int, width: int, machine: Accelerator) -> float:
    """In and out at the rate of kernels that compute an address for every element."""
    return 2.0 * rows * width * _F16 / machine.rowwise.strided_gbps

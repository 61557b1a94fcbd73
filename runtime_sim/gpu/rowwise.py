"""Time of norms and elementwise kernels.

Launch, latency of a row, and the slower of moving bytes and computing addresses.

A just-in-time compiler makes a kernel for the one width it has seen, whose rate is the DRAM's; after a second
width it makes one for any (`any_width`; PyTorch: automatic dynamic shapes), which divides by the width for
every element and is bound by that.  Copies and rotations of views that are not contiguous are always of that
sort.
"""

from __future__ import annotations

from tyir.runtime_sim.gpu.accelerator import Accelerator

__all__ = ["add_norm_ns", "copy_ns", "norm_ns", "rope_ns", "silu_mul_ns", "softmax_ns", "stream_ns"]

_F16 = 2
_SOFTMAX_IN_REGISTERS = 1024


def stream_ns(nbytes: float, machine: Accelerator) -> float:
    """Bytes read and written together.  Example (2000 GB/s): 4 MB: 2000 ns."""
    return nbytes / machine.rowwise.bandwidth_gbps


def _launch_ns(machine: Accelerator) -> float:
    return (machine.launch.kernel_us + machine.rowwise.call_us) * 1000


def _elements_ns(rows: int, width: int, passes: int, machine: Accelerator, any_width: bool) -> float:
    """`passes` reads or writes of rows x width elements.

    Example (2000 GB/s, 200 elements a ns for any width): 128 rows of 4096, 4 passes: 128 * 8192 * 4 / 2000 =
    2097 ns; for any width 128 * 4096 / 200 = 2621 ns.
    """
    moved = stream_ns(float(rows) * width * _F16 * passes, machine)
    return max(moved, rows * width / machine.rowwise.any_width_per_ns) if any_width else moved


def _row_ns(width: int, machine: Accelerator, any_width: bool) -> float:
    """One block of threads per row waits for its row once (mean, then product)."""
    return (
        (machine.rowwise.any_width_row_ns_per_byte if any_width else machine.rowwise.row_ns_per_byte)
        * width
        * _F16
    )


def add_norm_ns(rows: int, width: int, machine: Accelerator, any_width: bool = False) -> float:
    """Residual sum and RMS norm: two tensors in, two out."""
    return (
        _launch_ns(machine)
        + _row_ns(width, machine, any_width)
        + _elements_ns(rows, width, 4, machine, any_width)
    )


def norm_ns(rows: int, width: int, machine: Accelerator, any_width: bool = False) -> float:
    """A norm alone: one tensor in, one out.

    Example (launch 1 us, call 0, row 0.05 ns per byte, 2000 GB/s): 128 rows of 4096: 1000 + 0.05 * 8192 + 128
    * 8192 * 2 / 2000 = 2458 ns.
    """
    return (
        _launch_ns(machine)
        + _row_ns(width, machine, any_width)
        + _elements_ns(rows, width, 2, machine, any_width)
    )


def softmax_ns(rows: int, width: int, machine: Accelerator) -> float:
    """PyTorch's softmax over rows.

    Up to 1024 columns stay in registers (in and out), longer rows are read again for the result
    (softmax_warp_forward, cunn_SoftMaxForward).

    Example (launch 1 us, call 0, row 0.05 ns per byte, 2000 GB/s): 100 rows of 4096: 1000 + 0.05 * 8192 + 3 *
    819,200 / 2000 = 2638 ns.
    """
    passes = 2 if width <= _SOFTMAX_IN_REGISTERS else 3
    return (
        _launch_ns(machine)
        + _row_ns(width, machine, False)
        + _elements_ns(rows, width, passes, machine, False)
    )


def silu_mul_ns(rows: int, width: int, machine: Accelerator, any_width: bool = False) -> float:
    """silu(gate) * up: two tensors in, one out; elements are independent, so no row waits."""
    return _launch_ns(machine) + _elements_ns(rows, width, 3, machine, any_width)


def rope_ns(rows: int, width: int, machine: Accelerator, any_width: bool = True) -> float:
    """Rotating queries and keys of `width` elements a token, a view of a product's output: in and out.

    Example (launch 1 us, 200 elements a ns for any width, 400 for one): 100 rows of 2048: 1000 + 1024 = 2024
    ns, or 1512.
    """
    rate = machine.rowwise.any_width_per_ns if any_width else machine.rowwise.rotate_per_ns
    return _launch_ns(machine) + rows * width / rate


def copy_ns(rows: int, width: int, machine: Accelerator) -> float:
    """One tensor from a view into another.

    Example (launch 1 us, strided 0.5 us, 200 elements a ns): 100 rows of 1024: 1000 + 500 + 512 = 2012 ns.
    """
    return (
        _launch_ns(machine)
        + machine.rowwise.strided_us * 1000
        + rows * width / machine.rowwise.any_width_per_ns
    )

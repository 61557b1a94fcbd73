"""Time of summing n bytes over the p devices of one node: the fastest of the algorithms that a library has.

A serving library's own kernels, by direct reads of the peers' memory at D = link bandwidth per direction * direct_efficiency:

    one-shot    start + (p - 1) n / D                     everybody reads everybody's buffer; up to `link.one_shot_max_bytes`
    two-shot    start + wait + 2 (p - 1) / p n / D        reduce-scatter, then all-gather; from there up to `link.two_shot_max_bytes`
    start       one_shot + wait                           wait = p * peer * (1 - exp(-n / 4 KiB))

A message of more than a block's packet (about 4 KiB) is spread over blocks that each wait for each peer.  NCCL's ring, 2 (p - 1) steps, by protocol: base + steps * hop + 2 (p - 1) / p n / (share B), where B = link bandwidth per direction * efficiency.
Base and hop latencies over NVLink are NCCL's own (`src/graph/tuning.cc`: ring LL 6.6 and 0.6 us, LL128 14 and 1.9 us, Simple 8.4 and 3.4 us); the shares are the
payload of a protocol's stores: LL half (4 bytes of data, 4 of flag), LL128 120 of 128 bytes.
Thakur et al., "Optimization of collective communication operations in MPICH", 2005.
"""

from __future__ import annotations

import math
from typing import Final

from tyir.targets.accelerator import Accelerator

__all__ = ["all_reduce_ns"]

# protocol: base us, us per step, payload share
_PROTOCOLS: Final = {"LL": (6.6, 0.6, 0.5), "LL128": (14.0, 1.9, 120 / 128), "Simple": (8.4, 3.4, 1.0)}
_PACKET: Final = 4096


def all_reduce_ns(nbytes: float, devices: int, machine: Accelerator, custom: bool = True) -> float:
    """Nanoseconds of one all-reduce; `custom`: the serving library's kernels are offered beside NCCL, which is then called eagerly (`link.call_us`).

    Example (B 200 bytes a ns, no custom kernels): 2 devices, 100 kB: LL 6600 + 2 * 600 + 100,000 / 100 = 8800 ns; LL128 17,800 + 533.
    """
    if devices == 1:
        return 0.0
    link = machine.link
    rate = link.bandwidth_gbps * link.efficiency
    steps, shared = 2 * (devices - 1), 2 * (devices - 1) / devices * nbytes
    times = [(base + steps * hop) * 1000 + shared / (rate * share) for base, hop, share in _PROTOCOLS.values()]
    if custom:
        times = [t + link.call_us * 1000 for t in times]
        direct = link.bandwidth_gbps * link.direct_efficiency
        wait = devices * link.peer_us * 1000 * -math.expm1(-nbytes / _PACKET)
        start = link.one_shot_us * 1000 + wait
        if nbytes <= link.one_shot_max_bytes:
            times.append(start + (devices - 1) * nbytes / direct)
        elif nbytes <= link.two_shot_max_bytes:
            times.append(start + wait + shared / direct)
    return min(times)

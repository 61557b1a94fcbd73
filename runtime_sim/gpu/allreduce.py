"""Time of summing n bytes over the p devices of one node.

The fastest of the algorithms that a library has.

A serving library's own kernels, by direct reads of the peers' memory at D = link bandwidth per direction *
direct_efficiency:

    one-shot    start + (p - 1) n / D                     everybody reads everybody's buffer; up to `link.one_shot_max_bytes`
    two-shot    start + wait + 2 (p - 1) / p n / D        reduce-scatter, then all-gather; from there up to `link.two_shot_max_bytes`
    start       one_shot + wait                           wait = p * peer * (1 - exp(-n / 4 KiB))

A message of more than a block's packet (about 4 KiB) is spread over blocks that each wait for each peer.

NCCL's ring, 2 (p - 1) hops, by protocol: base + 2 (p - 1) hop + (2 p - 1) / p n / (share D'), where D' =
link bandwidth per direction * efficiency. A ring's kernel runs 2 p - 1 primitives on each part of n / p
bytes (send, p - 2 times receive-reduce-send, receive-reduce-copy-send, p - 2 times receive-copy-send,
receive), one after another: that is (2 p - 1) / p n of data, not the 2 (p - 1) / p n that cross a link,
and is why two devices reach a lower bus bandwidth than eight (267, 310 and 320 GB/s of 64 MiB on 2, 4 and
8 H200). Base and hop latencies over NVLink are NCCL's own (`src/graph/tuning.cc`: ring LL 6.6 us, LL128 14
and 1.9 us, Simple 8.4 and 3.4 us; LL's hop is `link.hop_us`, 0.6 there, and `link.spread_us` (1 - exp(-n /
16 KiB)) more when the message is spread over several blocks); the shares are the payload of a protocol's
stores: LL half (4 bytes of data, 4 of flag), LL128 120 of 128 bytes. Thakur et al., "Optimization of
collective communication operations in MPICH", 2005.
"""  # noqa: E501

from __future__ import annotations

import math
from typing import Final

from tyir.runtime_sim.gpu.accelerator import Accelerator

__all__ = ["all_reduce_ns"]

# base us, us per hop, payload share
_LL_BASE: Final = 6.6
_LL_SHARE: Final = 0.5
_LL128: Final = (14.0, 1.9, 120 / 128)
_SIMPLE: Final = (8.4, 3.4, 1.0)
_PACKET: Final = 4096
_SPREAD: Final = 16384


def all_reduce_ns(nbytes: float, devices: int, machine: Accelerator, custom: bool = True) -> float:
    """Nanoseconds of one all-reduce.

    `custom`: the serving library's kernels are offered beside NCCL, which is then called eagerly
    (`link.call_us`).

    Example (D' 200 bytes a ns, hop 0.6, spread 0, no custom kernels): 2 devices, 100 kB: LL 6600 + 2 * 600 +
    1.5 * 100,000 / 100 = 9300 ns; LL128 17,800 + 800.
    """
    if devices == 1:
        return 0.0
    link = machine.link
    hops = 2 * (devices - 1)
    crossing, moved = hops / devices * nbytes, (hops + 1) / devices * nbytes
    hop = link.hop_us + link.spread_us * -math.expm1(-nbytes / _SPREAD)
    protocols = ((_LL_BASE, hop, _LL_SHARE), _LL128, _SIMPLE)
    rate = link.bandwidth_gbps * link.efficiency
    times = [(base + hops * step) * 1000 + moved / (rate * share) for base, step, share in protocols]
    if custom:
        times = [t + link.call_us * 1000 for t in times]
        direct = link.bandwidth_gbps * link.direct_efficiency
        wait = devices * link.peer_us * 1000 * -math.expm1(-nbytes / _PACKET)
        start = link.one_shot_us * 1000 + wait
        if nbytes <= link.one_shot_max_bytes:
            times.append(start + (devices - 1) * nbytes / direct)
        elif nbytes <= link.two_shot_max_bytes:
            times.append(start + wait + crossing / direct)
    return min(times)

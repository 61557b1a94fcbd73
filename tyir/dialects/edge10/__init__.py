"""`edge10`: the command program of one die, what the backend emits and both simulator engines read.

Memories: DRAM (byte addresses in `edge10.buffer`s), SRAM (byte offsets in the on-chip data memory),
accumulators (byte offsets, f32). A command runs on one unit.  Each unit executes its commands in program
order and completes them in order; commands of different units are ordered only by tokens: every command
yields a `!edge10.token` and waits for the tokens among its operands.

Units: `ewdma` (weights), `eidma` (features), `ebdma` (scales, biases, small vectors) read DRAM; `eodma`
writes it; `dequant`; `cube` (the matrix units together); `drain` (accumulators to SRAM); `vector` (the vector
units together); `d2d` (die to die).

Operands of a command, told apart by type: addresses (`!edge10.address`), then scalars (`i64`) that replace
the sizes given as -1 in the order of the properties, then tokens.  Scalars are the command processor's
registers and cost nothing.  A command with a size of 0 does nothing but wait.
"""

from __future__ import annotations

from tyir.dialects.edge10.attention import *
from tyir.dialects.edge10.compute import *
from tyir.dialects.edge10.exchange import *
from tyir.dialects.edge10.program import *
from tyir.dialects.edge10.transfers import *
from tyir.edge10.command import *

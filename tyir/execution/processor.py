"""Which features of a processor compiled code needs, and which this one has, in the words of Linux
(`flags` of /proc/cpuinfo).

Code with an instruction that the processor does not have ends the process by SIGILL, without a message.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Final

from tyir.diagnostics import TyirError

__all__ = ["KERNEL_NAMES", "TILES", "check_processor", "features_here", "features_of", "may_use_tiles"]

_CPUINFO: Final = Path("/proc/cpuinfo")

# What LLVM calls a feature -> what Linux calls it (arch/x86/include/asm/cpufeatures.h): those whose
# instructions LLVM's code generator chooses by itself.  Others are reached by intrinsics that no kernel has
# (AES, SHA, ..) or that kernels name themselves (`TILES`), belong to the operating system, or only tune.
KERNEL_NAMES: Final = {
    "sse3": "pni",
    "ssse3": "ssse3",
    "sse4.1": "sse4_1",
    "sse4.2": "sse4_2",
    "sse4a": "sse4a",
    "popcnt": "popcnt",
    "cx16": "cx16",
    "sahf": "lahf_lm",
    "movbe": "movbe",
    "lzcnt": "abm",
    "bmi": "bmi1",
    "bmi2": "bmi2",
    "tbm": "tbm",
    "prfchw": "3dnowprefetch",
    "f16c": "f16c",
    "fma": "fma",
    "fma4": "fma4",
    "xop": "xop",
    "avx": "avx",
    "avx2": "avx2",
    "avxifma": "avx_ifma",
    "avxneconvert": "avx_ne_convert",
    "avxvnni": "avx_vnni",
    "avxvnniint8": "avx_vnni_int8",
    "avxvnniint16": "avx_vnni_int16",
    "avx512f": "avx512f",
    "avx512bf16": "avx512_bf16",
    "avx512bitalg": "avx512_bitalg",
    "avx512bw": "avx512bw",
    "avx512cd": "avx512cd",
    "avx512dq": "avx512dq",
    "avx512fp16": "avx512_fp16",
    "avx512ifma": "avx512ifma",
    "avx512vbmi": "avx512vbmi",
    "avx512vbmi2": "avx512_vbmi2",
    "avx512vl": "avx512vl",
    "avx512vnni": "avx512_vnni",
    "avx512vpopcntdq": "avx512_vpopcntdq",
    "avx10.2": "avx10_2",  # Linux has no flag for it yet: code that needs it runs nowhere
    "gfni": "gfni",
    "cmpccxadd": "cmpccxadd",
    "ccmp": "apx",
    "cf": "apx",
    "egpr": "apx",
    "ndd": "apx",
    "nf": "apx",
    "ppx": "apx",
    "push2pop2": "apx",
    "zu": "apx",
}


# Products of tiles (AMX), of which `tyir.backends.host` makes use where 4-bit weights meet whole numbers.
TILES: Final = ("amx_int8", "amx_tile")


def features_of(llvm: Iterable[str]) -> list[str]:
    """What code needs that was generated with these features of LLVM, sorted."""
    return sorted({KERNEL_NAMES[name] for name in llvm if name in KERNEL_NAMES})


@cache
def features_here() -> frozenset[str] | None:
    """What this processor has, nothing where it is not an x86; None where the system does not say."""
    try:
        lines = _CPUINFO.read_text(errors="replace").splitlines()
    except OSError:
        return None
    found = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(found.partition(":")[2].split())


@cache
def may_use_tiles() -> bool:
    """Whether Linux lets this process have the registers of tiles, which it must ask for: it is refused where
    the machine is a virtual one without them, a filter of system calls forbids it, or a thread's signal stack
    is too small.
    """
    if not (features_here() or frozenset()).issuperset(TILES):
        return False
    ask, data = 0x1023, 18  # ARCH_REQ_XCOMP_PERM (Linux, Documentation/arch/x86/xstate.rst)
    arch_prctl = 158  # on x86-64
    return bool(ctypes.CDLL(None).syscall(arch_prctl, ask, data) == 0)


def check_processor(mcpu: str, needed: Sequence[str], folder: Path) -> None:
    """`TyirError` unless this processor has the features that the libraries in `folder` need; `mcpu`: LLVM's
    name of the one that they were compiled for.
    """
    here = features_here()
    missing = [name for name in needed if here is not None and name not in here]
    if missing:
        raise TyirError(
            f"the libraries in {folder} were compiled for a {mcpu} processor and need"
            f" {', '.join(missing)}, which this one does not have",
            help="compile again on this machine or with --mcpu x86-64-v3, or add --engine interpreter",
        )
    if set(TILES) & set(needed) and not may_use_tiles():
        raise TyirError(
            f"the libraries in {folder} multiply by tiles (AMX), which the system does not let this process"
            " do",
            help="compile again with --mcpu icelake-server, or add --engine interpreter",
        )

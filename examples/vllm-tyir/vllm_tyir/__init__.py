"""A platform of vLLM whose device is what tyir compiled for: `vllm serve OUT/2die`."""

from __future__ import annotations

import importlib.util
from typing import Final

__all__ = ["TESTED", "platform"]

TESTED: Final = ("0.33.0",)  # releases of vLLM that tests/clients/test_vllm.py has passed with


def platform() -> str | None:
    """The platform's class, for vLLM's entry point; None where tyir is not installed."""
    return "vllm_tyir.platform.TyirPlatform" if importlib.util.find_spec("tyir") is not None else None

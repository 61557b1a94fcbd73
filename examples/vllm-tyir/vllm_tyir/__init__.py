"""A platform of vLLM whose device is what tyir compiled for: `vllm serve OUT/4die`."""

from __future__ import annotations

import importlib.util

__all__ = ["platform"]


def platform() -> str | None:
    """The platform's class, for vLLM's entry point; None where tyir is not installed."""
    return "vllm_tyir.platform.TyirPlatform" if importlib.util.find_spec("tyir") is not None else None

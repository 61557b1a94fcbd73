"""AutoAWQ's call, for scripts that change one import.

from tyir.awq import AutoAWQForCausalLM

model = AutoAWQForCausalLM.from_pretrained("Qwen2.5-1.5B")
model.quantize(tokenizer, quant_config={"q_group_size": 128, "w_bit": 4, "version": "GEMM"})
model.save_quantized("Qwen2.5-1.5B-AWQ")
"""

from __future__ import annotations

import importlib
from typing import Any, Final

__all__ = ["AutoAWQForCausalLM"]  # loaded when it is asked for

# By string: nothing in this package imports the packages built on it.
_HOME: Final = "tyir.tools.quantize.autoawq"


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'tyir.awq' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME), name)

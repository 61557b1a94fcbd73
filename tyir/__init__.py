"""tyir: a multi-stage compiler from Hugging Face language models to multi-die edge NPUs.

    from tyir import build_and_compile_llm
    build_and_compile_llm("Qwen2.5-1.5B", "out", seq_len_list=[1, 8], dev_count=4)

The IR is in `tyir.ir`, `tyir.types`, `tyir.attributes` and `tyir.dialects`; passes are in `tyir.passes`.
Importing `tyir` loads neither torch nor TVM: names are loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from tyir.diagnostics import Diagnostic, TyirError
    from tyir.dialects.builtin import Module
    from tyir.interpreter import Interpreter, run_function
    from tyir.ir import Block, Op, Region, Value
    from tyir.opdef import (
        DeclaredOp,
        attr,
        operand,
        optional_operand,
        region,
        result,
        variadic_operand,
        variadic_result,
    )
    from tyir.parser import parse_file, parse_module
    from tyir.pipeline import Pass, PassContext, run_pipeline
    from tyir.printer import print_op
    from tyir.verifier import verify

__all__ = [
    "BatchSession",
    "Block",
    "DeclaredOp",
    "Diagnostic",
    "Interpreter",
    "Module",
    "Op",
    "Pass",
    "PassContext",
    "Region",
    "Session",
    "TyirError",
    "Value",
    "attr",
    "build_and_compile_llm",
    "build_and_compile_vlm",
    "operand",
    "optional_operand",
    "parse_file",
    "parse_module",
    "print_op",
    "quantize",
    "region",
    "result",
    "run_function",
    "run_pipeline",
    "variadic_operand",
    "variadic_result",
    "verify",
]

# Where each name lives.  build_and_compile_*, quantize and the sessions are named by string only: nothing in
# this package imports the packages built on it.
_HOMES: Final = {
    "Diagnostic": "tyir.diagnostics",
    "TyirError": "tyir.diagnostics",
    "Module": "tyir.dialects.builtin",
    "Interpreter": "tyir.interpreter",
    "run_function": "tyir.interpreter",
    **dict.fromkeys(("Block", "Op", "Region", "Value"), "tyir.ir"),
    **dict.fromkeys(
        (
            "DeclaredOp",
            "attr",
            "operand",
            "optional_operand",
            "region",
            "result",
            "variadic_operand",
            "variadic_result",
        ),
        "tyir.opdef",
    ),
    "parse_file": "tyir.parser",
    "parse_module": "tyir.parser",
    **dict.fromkeys(("Pass", "PassContext", "run_pipeline"), "tyir.pipeline"),
    "print_op": "tyir.printer",
    "verify": "tyir.verifier",
    **dict.fromkeys(("build_and_compile_llm", "build_and_compile_vlm", "quantize"), "tyir.tools.api"),
    "BatchSession": "tyir.runtime_sim.session.batch_session",
    "Session": "tyir.runtime_sim.session.session",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tyir' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__

"""The annotated step parses and verifies in the real Shardy dialect (it comes with jaxlib; where that is not installed the test is skipped)."""

from __future__ import annotations

import pytest

from tests.llm import Shape, build
from tyir.pipeline import run_pipeline
from tyir.printer import print_op

ir = pytest.importorskip("jaxlib.mlir.ir", reason="Shardy comes with jaxlib, which is not installed")


@pytest.mark.parametrize("dies", [2, 3, 16])
def test_shardy_reads_the_annotated_step(dies: int) -> None:
    from jaxlib.mlir.dialects import sdy

    module, _ = build(Shape())
    run_pipeline(
        module, f"kv-materialize{{max-kv=16}},annotate-sharding{{dies={dies} strategy=split}},propagate-sharding,insert-collectives"
    )
    context = ir.Context()
    context.allow_unregistered_dialects = True
    sdy.register_dialect(context)
    with context:
        parsed = ir.Module.parse(print_op(module))
        assert parsed.operation.verify()
        assert "sdy.mesh @mesh" in str(parsed)

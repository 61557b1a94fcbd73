"""The annotated step parses and verifies in the real Shardy dialect (it comes with jaxlib; where that is not
installed the test is skipped).
"""

from __future__ import annotations

import pytest

from tests.llm import Shape, build
from tyir.pipeline import run_pipeline
from tyir.printer import print_op

ir = pytest.importorskip("jaxlib.mlir.ir", reason="Shardy comes with jaxlib, which is not installed")


STEPS = ("annotate-sharding{{{options} strategy=split}}", "propagate-sharding", "insert-collectives")


@pytest.mark.parametrize(
    "options",
    [
        "dies=2",
        "dies=3 remap=[2,0,1]",
        "dies=16",
        "dies=6 mesh=[2,3]",
        "dies=4 pp=2",
        "dies=16 pp=2 mesh=[2,4]",
    ],
)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_shardy_reads_every_step(options: str, steps: int) -> None:
    from jaxlib.mlir.dialects import sdy

    module, _ = build(Shape())
    run_pipeline(
        module,
        ",".join(["kv-materialize{max-kv=16}", *(step.format(options=options) for step in STEPS[:steps])]),
    )
    context = ir.Context()
    context.allow_unregistered_dialects = True
    sdy.register_dialect(context)
    with context:
        parsed = ir.Module.parse(print_op(module))
        assert parsed.operation.verify()
        assert "sdy.mesh @mesh" in str(parsed)

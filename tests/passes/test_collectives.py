"""Collectives of a step are the closed form's: counts and bytes, for every number of dies, pipeline stages
and outputs, in the IR and in the command programs.
"""

from __future__ import annotations

from collections import Counter

import pytest

from tests.llm import Shape, build, dies_of
from tyir.backends.edge10.lowering.die import lower_die
from tyir.dialects import dist, edge10
from tyir.dialects.builtin import Module
from tyir.dialects.func import Call, Func
from tyir.dialects.ty import tensor_type
from tyir.ir import Op
from tyir.manifest import recorded
from tyir.pipeline import run_pipeline
from tyir.runtime_sim.timing.engine import simulate
from tyir.runtime_sim.timing.program import EdgeProgram
from tyir.targets.collectives import CollectiveNeed, minimal_collectives, send_ns
from tyir.targets.machine import load_machine
from tyir.traits import Collective

SHAPE = Shape(layers=5, hidden=64, heads=6, kv_heads=2, width=512, vocabulary=272)
CONFIGURATIONS = [(dies, stages) for dies in range(1, 17) for stages in (1, 2, 3, 4) if dies % stages == 0]


def partitioned(
    dies: int, stages: int, output: str, tokens: int, batch: int = 1, rows: str = "all"
) -> Module:
    module, _ = build(SHAPE, draw=False)
    several = f"specialize-batch{{batch={batch}}}," if batch > 1 else ""
    run_pipeline(
        module, f"kv-materialize{{max-kv=16}},{several}select-output{{{output}}},select-rows{{rows={rows}}}"
    )
    run_pipeline(
        module,
        f"partition-dies{{dies={dies} pp={stages} strategy=split}},specialize-seqlen{{seqlens={tokens}}}",
    )
    return module


def expected(
    dies: int, stages: int, die: int, top_k: int, tokens: int, rows: int | None = None
) -> Counter[tuple[str, int, int]]:
    needs = minimal_collectives(
        SHAPE.layers,
        SHAPE.hidden,
        SHAPE.vocabulary,
        tokens,
        dies,
        stages=stages,
        stage=die // (dies // stages),
        top_k=top_k,
        rows=rows,
    )
    return sum((Counter({key(n): n.count}) for n in needs), Counter())


def key(need: CollectiveNeed) -> tuple[str, int, int]:
    return need.what, need.dies, need.nbytes


def found(op: Op, dies: int) -> tuple[str, int, int]:
    """Kind, participants and bytes of a collective."""
    what = op.name.partition(".")[2]
    if isinstance(op, (dist.Send, dist.Recv)):
        return what, 2, tensor_type(op.operands[0] if isinstance(op, dist.Send) else op.results[0]).nbytes
    assert isinstance(op, (dist.AllReduce, dist.AllGather))
    return what, len(op.dies or range(dies)), tensor_type(op.out).nbytes


@pytest.mark.parametrize("output", ["kind=logits", "kind=argmax", "kind=topk k=20"])
@pytest.mark.parametrize(("dies", "stages"), CONFIGURATIONS)
def test_the_ir_holds_the_minimum(dies: int, stages: int, output: str) -> None:
    top_k = {"kind=logits": 0, "kind=argmax": 1}.get(output, 20)
    for number, die in enumerate(dies_of(partitioned(dies, stages, output, 5))):
        counts = Counter(found(op, dies) for op in die.walk() if op.has_trait(Collective))
        assert counts == expected(dies, stages, number, top_k, 5)


def test_the_minimum_of_a_batch_is_that_of_as_many_tokens() -> None:
    for number, die in enumerate(dies_of(partitioned(3, 1, "kind=logits", 2, batch=4))):
        counts = Counter(found(op, 3) for op in die.walk() if op.has_trait(Collective))
        assert counts == expected(3, 1, number, 0, 8)


@pytest.mark.parametrize(("dies", "stages"), [(1, 1), (3, 1), (4, 2), (6, 3), (4, 4)])
def test_of_one_row_a_sequence_less_is_exchanged(dies: int, stages: int) -> None:
    """The logits' gather and what the last stage hands on; the layers' sums are of all tokens."""
    module = partitioned(dies, stages, "kind=logits", 5, batch=2, rows="last")
    for number, die in enumerate(dies_of(module)):
        counts = Counter(found(op, dies) for op in die.walk() if op.has_trait(Collective))
        assert counts == expected(dies, stages, number, 0, 10, rows=2)


@pytest.mark.parametrize(("dies", "stages"), [(2, 1), (3, 1), (4, 2), (6, 3), (16, 1)])
def test_the_command_programs_hold_the_minimum(dies: int, stages: int) -> None:
    """Counted over the calls of the layer functions; 8 tokens are too few to be cut into blocks."""
    module = partitioned(dies, stages, "kind=logits", 8)
    run_pipeline(module, "to-program")
    for number, die in enumerate(dies_of(module)):
        lowered = lower_die(die, 8, load_machine())
        main = lowered.lookup("main_s8")
        assert isinstance(main, Func)
        functions = [main, *(lowered.lookup(c.callee.leaf) for c in main.walk_type(Call))]
        counts: Counter[tuple[str, int, int]] = Counter()
        for op in (o for f in functions if isinstance(f, Func) for o in f.walk()):
            if isinstance(op, (edge10.Send, edge10.Recv)):
                counts[op.name.partition(".")[2], 2, op.nbytes] += 1
            elif isinstance(op, (edge10.AllReduce, edge10.AllGather)):
                nbytes = op.nbytes if isinstance(op, edge10.AllReduce) else op.rows * sum(op.sizes)
                counts[op.name.partition(".")[2], len(op.dies or range(dies)), nbytes] += 1
        assert counts == expected(dies, stages, number, 0, 8)


def test_a_worked_example() -> None:
    """28 layers of 3584 over 4 dies, one token, a vocabulary of 152064 (Qwen2.5-7B)."""
    sums, embedding, gather = minimal_collectives(28, 3584, 152064, 1, 4)
    assert (sums.count + embedding.count, sums.nbytes, gather.nbytes) == (57, 7168, 608256)
    assert (
        send_ns(
            7168,
            0,
            [1],
            load_machine().with_overrides(
                {"d2d.bandwidth_gbps": 32, "d2d.hop_us": 1, "d2d.collective_us": 2}
            ),
        )
        == 3224
    )


def test_stages_meet_only_at_their_boundaries() -> None:
    """Two stages of two dies: between the hand-overs, what one stage does has no influence on the other."""
    module = partitioned(4, 2, "kind=argmax", 1)
    run_pipeline(module, "to-program")
    programs = [EdgeProgram(lower_die(die, 1, load_machine())) for die in dies_of(module)]
    timing = simulate(programs, load_machine(), 5)
    sends = [
        [r for r in records if isinstance(r.command.op, (edge10.Send, edge10.Recv))]
        for records in timing.records
    ]
    assert [[r.command.op.name for r in die] for die in sends] == [["edge10.send", "edge10.recv"]] * 2 + [
        ["edge10.recv", "edge10.send"]
    ] * 2
    assert sends[0][0].end == sends[2][0].end and sends[0][1].end == sends[2][1].end
    first = max(r.end for r in timing.records[0] if r.command.layer == 2)
    second = min(r.end for r in timing.records[2] if r.command.layer == 3 and r.command.unit == "cube")
    assert first <= sends[0][0].start < second, "the second stage computes after the first has handed on"


@pytest.mark.parametrize(("dies", "stages"), [(4, 1), (3, 1), (6, 2)])
def test_caches_cut_by_tokens_take_two_more_gathers(dies: int, stages: int) -> None:
    """A layer's: of a group's queries, and of what its keys come to."""
    module, _ = build(SHAPE, draw=False)
    run_pipeline(
        module,
        f"kv-materialize{{max-kv=16}},partition-dies{{dies={dies} pp={stages} strategy=split kv-split=tokens"
        " kv-block=2},specialize-seqlen{seqlens=5}",
    )
    parts = recorded(module)["kv_parts"]
    assert isinstance(parts, int)
    heads = SHAPE.heads * parts * stages // dies
    for number, die in enumerate(dies_of(module)):
        needs = minimal_collectives(
            *(SHAPE.layers, SHAPE.hidden, SHAPE.vocabulary, 5, dies),
            stages=stages,
            stage=number // (dies // stages),
            kv_parts=parts,
            heads=heads,
            width=SHAPE.head_dim,
        )
        counts = Counter(found(op, dies) for op in die.walk() if op.has_trait(Collective))
        assert counts == sum((Counter({key(n): n.count}) for n in needs), Counter())

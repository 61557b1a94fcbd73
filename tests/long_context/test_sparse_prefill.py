"""Sparse prefill against its definition, written down once more from the whole matrix of scores: which blocks a step
sees, what it computes, and what it says that was, through every execution; and what is refused.
"""  # noqa: E501

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.long_context.attention_only import attention_only
from tests.long_context.programs import EDGE10, Programs
from tests.long_context.reference import Chunks, scores, softmax
from tyir.artifacts.sparse_prefill import BlockChoice
from tyir.diagnostics import TyirError
from tyir.dialects import edge10
from tyir.dialects.kv import SparseAttention
from tyir.execution.artifacts import Artifacts
from tyir.manifest import BuildOptions, Manifest
from tyir.printer import print_op
from tyir.runtime_sim.session.batch_session import BatchSession
from tyir.runtime_sim.session.chunks import plan_chunks
from tyir.runtime_sim.session.recall import Recall
from tyir.runtime_sim.session.session import ENGINES, EngineName, Session
from tyir.runtime_sim.timing.engine import simulate
from tyir.runtime_sim.timing.long_steps import LongSteps
from tyir.runtime_sim.timing.program import EdgeProgram
from tyir.targets.machine import load_machine
from tyir.tools.api import compile_path
from tyir.tools.estimate.long_context import prompt_cost
from tyir.tools.estimate.shape import read_shape
from tyir.tools.tyir_compile import main

Array = npt.NDArray[Any]
THETA, TOKENS, STEP = 1e4, 320, 32
PLAIN, CHUNKS = Chunks(1 << 20, 1), Chunks(128, 32)
CHOICE = BlockChoice(keep=3, block=16, window=32, every=3)
# Of values up to 4 and scores up to 15, through f16, of 8-bit rows and of 4-bit ones.
ROUNDING, INT8, INT4 = 8e-3, 0.06, 1.0


def inputs(heads: int = 4, groups: int = 2, dim: int = 16) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(heads + groups)
    return tuple(1.3 * rng.standard_normal((TOKENS, n, dim)) for n in (heads, groups, groups))  # type: ignore[return-value]


def definition(
    q: Array, k: Array, v: Array, chunks: Chunks, teams: Sequence[Sequence[int]] = ((0, 1), (2, 3))
) -> tuple[Array, list[Array]]:
    """Attention [t, H, D] of steps, and of each of them the shares [S, H] of its samples; the query heads of
    a team, which read one cache head on one die, choose together.
    """
    choice, step = CHOICE, STEP
    tokens, heads, dim = q.shape
    every_score = scores(q, k, chunks, THETA, tokens)
    group, size, border = heads // k.shape[1], choice.block, chunks.step
    out, shares = np.empty((tokens, heads, dim)), []
    start = 0
    while start < tokens:
        end = min(start + step, tokens, (start // border + 1) * border)
        rows = np.arange(start, end)
        whole = softmax(every_score[:, rows, :end])
        sampled = np.arange(0, end - start, choice.every)
        measures = start // step % 4 == 3
        chosen_by = [s for n, s in enumerate(sampled) if not (measures and n % 4 == 3)]
        window = max(start - choice.window, 0) // size * size
        seen = np.zeros((heads, end), bool)
        seen[:, window:] = True
        for team in map(list, teams):
            own = whole[team][:, chosen_by].sum(axis=(0, 1))
            mass = {b: own[b * size : (b + 1) * size].sum() for b in range(window // size)}
            for far in range(3):
                there = [b for b in mass if min(start // border - b * size // border, 2) == far]
                best = sorted(there, key=lambda b: (b != 0, -mass[b], b))[: choice.keep]
                for b in best:
                    seen[team, b * size : (b + 1) * size] = True
        of_step = np.empty((len(sampled), heads))
        for h in range(heads):
            kept = np.where(seen[h], every_score[h, rows, :end], -np.inf)
            out[rows, h] = softmax(kept) @ v[:end, h // group]
            of_step[:, h] = (whole[h] * seen[h]).sum(axis=1)[sampled]
        shares.append(of_step)
        start = end
    return out, shares


# ------------------------------------------------------------------------------------- programs against it


@pytest.mark.parametrize(
    ("dies", "cache", "heads", "groups", "chunked"),
    [
        (1, "", 4, 2, False),
        pytest.param(2, "dtype=int8", 4, 2, True, marks=pytest.mark.slow),
        (3, "", 6, 2, True),  # a cache head's query heads on two dies
        (4, "dtype=int8", 7, 1, False),  # copies of a cache head
        (2, "dtype=int4", 4, 2, True),
    ],
)
def test_programs_of_all_dies(
    dies: int, cache: str, heads: int, groups: int, chunked: bool, tmp_path: Path
) -> None:
    """A prompt of steps that all choose."""
    chunks, given = CHUNKS if chunked else PLAIN, inputs(heads, groups)
    module = attention_only(*given, THETA, chunks if chunked else None, tmp_path)
    text = CHOICE.text().replace(",", " ")
    programs = Programs(module, tmp_path, max_kv=TOKENS, seqlen=STEP, dies=dies, cache=cache, sparse=text)
    wanted, shares = definition(*given, chunks, teams_of(programs))
    bound = {"": ROUNDING, "dtype=int8": INT8, "dtype=int4": INT4}[cache]
    for engine in ("interpreter", "edge10"):
        programs.reset()
        found = programs.feed(range(TOKENS), engine)[:, : heads * 16].reshape(TOKENS, heads, 16)
        close = np.abs(found - wanted).max(axis=(1, 2)) < bound
        if cache:  # another choice where two blocks weigh nearly the same
            assert close.mean() >= 0.9
            continue
        assert close.all(), (engine, np.abs(found - wanted).max())
        mine = np.concatenate([_recall(programs, die, engine) for die in range(dies)], axis=1)
        np.testing.assert_allclose(mine, shares[-1], atol=2e-3)
    assert min(s.min() for s in shares) < 0.5, "something was left out"


def teams_of(programs: Programs) -> list[list[int]]:
    """The query heads that read one cache head on one die."""
    found: list[list[int]] = []
    first = 0
    for die in programs.modules:
        (op,) = die.walk_type(SparseAttention)
        for group in range(op.cache_heads):
            own = [first + h for h, g in enumerate(op.kv_heads) if g == group]
            found += [own] if own else []
        first += len(op.kv_heads)
    return found


def _recall(programs: Programs, die: int, engine: str) -> Array:
    """What a step has left on a die, [S, H]."""
    if engine == "interpreter":
        return np.asarray(programs.caches[die][-1][0])
    stored = programs.functional[die].memory.dram.buffer("recall0")
    return np.asarray(stored.view(np.float32).reshape(programs.caches[die][-1].shape)[0])


@pytest.mark.parametrize("chunked", [False, True])
def test_keeping_every_block_is_dense_attention(chunked: bool, tmp_path: Path) -> None:
    """The same keys in another order: sums differ by rounding, and nothing of the whole is missing."""
    chunks, given = Chunks(144, 32), inputs()  # whose borders cut steps short
    results = []
    for sparse in ("", "keep=20 block=16 window=16 every=2"):
        module = attention_only(*given, THETA, chunks if chunked else None, tmp_path)
        programs = Programs(module, tmp_path, max_kv=TOKENS + 6, seqlen=STEP, sparse=sparse)
        for engine in ("interpreter", "edge10"):
            programs.reset()
            results.append(programs.feed(range(TOKENS), engine))
            if sparse:
                np.testing.assert_allclose(_recall(programs, 0, engine), 1, atol=1e-4)
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], atol=4e-3)


def test_through_dram(tmp_path: Path) -> None:
    """Queries, lists and totals that do not stay in SRAM are brought there."""
    machine = EDGE10.with_overrides({"sram.capacity_bytes": 96 << 10})
    given = inputs(12, 2)
    module = attention_only(*given, THETA, CHUNKS, tmp_path)
    text = CHOICE.text().replace(",", " ")
    programs = Programs(module, tmp_path, max_kv=TOKENS, seqlen=STEP, sparse=text, machine=machine)
    brought = [
        op
        for op in programs.lowered[0].walk_type(edge10.Load)
        if "kv.block_scores" in str(op.attributes) and isinstance(op.operands[0].op, edge10.AddressOf)
    ]
    assert len(brought) >= 3
    teams = (range(6), range(6, 12))
    got, (wanted, _) = programs.feed(range(TOKENS), "edge10"), definition(*given, CHUNKS, teams)
    np.testing.assert_allclose(got[:, :192], wanted.reshape(TOKENS, -1), atol=ROUNDING)


# --------------------------------------------------------------------------------------------------- sessions


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two dies with chunks, in lengths 1, 16 and, sparse, 32."""
    folder = tmp_path_factory.mktemp("sparse")
    module = attention_only(*inputs(), THETA, CHUNKS, folder)
    (folder / "model.ir").write_text(print_op(module))
    for name, numbers in (("out", CHOICE.numbers), ("dense", ())):
        options = BuildOptions(
            dies=2, seqlens=(1, 16, STEP), max_kv=TOKENS + 1, weights="fp16", sparse_prefill=numbers
        )
        compile_path(folder / "model.ir", folder / name, options)
    return folder


@pytest.mark.parametrize(
    "engine", [pytest.param(e, marks=pytest.mark.slow) if e == "interpreter" else e for e in ENGINES]
)
def test_every_engine_computes_and_says_the_same(compiled: Path, engine: EngineName) -> None:
    wanted, shares = definition(*inputs(), CHUNKS)
    session = Session(compiled / "out" / "2die", engine)
    found = session.feed(range(TOKENS))[:, :64].reshape(TOKENS, 4, 16)
    np.testing.assert_allclose(found[:-STEP], wanted[:-STEP], atol=ROUNDING)  # the end sees everything
    left_out = [shares[n] for n in (3, 7)]  # which measure, and have left something out
    assert all(CHOICE.leaves_out(n * STEP, CHUNKS.step) for n in (3, 7))
    measured = np.sort(np.concatenate([s[3::4].ravel() for s in left_out]))
    assert session.recall.steps == len(left_out)
    assert session.recall.count == 2 * measured.size  # both dies have all heads here
    assert session.recall.mean == pytest.approx(measured.mean(), abs=1e-3)
    assert session.recall.low == pytest.approx(measured[measured.size // 20], abs=2e-3)
    session.reset()
    assert session.recall.steps == 0 and session.recall.low == 1


def test_the_end_of_a_prompt_and_what_follows_see_everything(compiled: Path) -> None:
    """And `dense` lets all of a prompt."""
    plain, asked = Session(compiled / "dense" / "2die"), Session(compiled / "out" / "2die", dense=True)
    other = Session(compiled / "out" / "2die")
    whole = [s.feed(range(TOKENS)) for s in (asked, other)]
    assert asked.recall.steps == 0 and other.recall.steps > 0
    np.testing.assert_allclose(whole[0], plain.feed(range(TOKENS)), atol=4e-3)
    chunks = list(plan_chunks(TOKENS, 0, (1, 16), TOKENS, sparse=STEP))
    assert sum(c.count for c in chunks) == TOKENS and {c.seqlen for c in chunks} == {16, STEP}
    first_dense = next(c.start for c in chunks if c.seqlen != STEP)
    assert STEP <= TOKENS - first_dense < 2 * STEP
    assert all(c.seqlen == 16 for c in chunks if c.start >= first_dense)
    one_layer = whole[1][first_dense:]  # whose keys and values hang on nothing before them
    np.testing.assert_allclose(one_layer, whole[0][first_dense:], atol=4e-3)


def test_a_saved_cache_says_what_it_has_seen(compiled: Path, tmp_path: Path) -> None:
    session, dense = Session(compiled / "out" / "2die"), Session(compiled / "dense" / "2die")
    session.feed(range(200))
    assert session.saved_bytes == dense.saved_bytes + 200 * (8 + 2 * 2 * 2 * 16 * 2)  # tokens, keys, values
    session.save(tmp_path / "cache.npz")
    again = Session(compiled / "out" / "2die")
    again.restore(tmp_path / "cache.npz")
    np.testing.assert_array_equal(again.feed([7]), session.feed([7]))
    with pytest.raises(TyirError, match=r"sparse prefill keep=3,block=16,window=32,every=3 there, none here"):
        dense.restore(tmp_path / "cache.npz")
    dense.feed(range(40))
    dense.save(tmp_path / "dense.npz")
    with pytest.raises(TyirError, match=r"sparse prefill none there, keep=3"):
        again.restore(tmp_path / "dense.npz")


def test_batches_run_steps_that_see_everything(compiled: Path) -> None:
    session = BatchSession(compiled / "out" / "2die")
    (rows,) = session.feed([range(100)])
    np.testing.assert_allclose(rows, Session(compiled / "dense" / "2die").feed(range(100)), atol=4e-3)
    with pytest.raises(TyirError, match="a step of 32 tokens leaves blocks of the cache out"):
        session.step([list(range(32))], 32)


def test_the_manifest_says_it(compiled: Path) -> None:
    manifest = Artifacts.open(compiled / "out" / "2die").manifest
    assert manifest.options.choice == CHOICE and manifest.options.dense_seqlens == (1, 16)
    assert Artifacts.open(compiled / "dense" / "2die").manifest.options.choice is None
    text = manifest.to_json()
    for found, other, said in (
        ("   16,\n   32,\n   3\n", "   16,\n   32,\n   2\n", "recall0"),
        ("   3,\n   16,\n   32,\n   3\n", "   3,\n   16\n", "are not keep, block, window and every"),
    ):
        assert found in text
        with pytest.raises(TyirError, match=said):
            Manifest.parse(text.replace(found, other).encode(), Path("manifest.json"), check=False)


# ---------------------------------------------------------------------------------------------- the numbers


def test_ranges_of_candidates() -> None:
    choice = BlockChoice(2, 16, 40, 4)
    assert choice.ranges(30, None) == [(0, 0)] and choice.ranges(200, None) == [(0, 10)]
    # chunks of 96: at 200 the own chunk begins in the window, at 290 it does not
    assert choice.ranges(150, 96) == [(6, 6), (0, 6), (0, 0)]
    assert choice.ranges(200, 96) == [(10, 10), (6, 10), (0, 6)]
    assert choice.ranges(280, 96) == [(12, 15), (6, 12), (0, 6)]
    assert not choice.leaves_out(70, None) and choice.leaves_out(100, None)
    assert choice.samples(32) == 8 and choice.measured(32) == [3, 7] and choice.measured(13) == [3]
    assert [pos for pos in (0, 95, 96, 127, 128, 224) if choice.measures(pos, 32)] == [96, 127, 224]


def test_recall_reports_the_lowest_of_twenty() -> None:
    recall, choice = Recall(), BlockChoice(2, 16, 0, 1)
    shares = np.ones((1, 8, 25), np.float32)
    shares[0, 3] = 0.8
    shares[0, 7, :3] = 0.25
    shares[0, :3] = 0  # which have chosen
    recall.add({(0, "recall4"): shares, (0, "k4"): shares}, choice, 8)
    assert recall.count == 50 and recall.low == 0.25 and recall.worst == (4, 0.25)
    assert recall.mean == pytest.approx((25 * 0.8 + 3 * 0.25 + 22) / 50)
    recall.add({(1, "recall5"): np.ones((1, 8, 25), np.float32)}, choice, 4)  # four tokens are no padding
    assert recall.count == 75 and recall.low == 0.8 and "layer 4: 25.0%" in recall.text()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("32", "is not one of keep=N, block=N, window=N, every=N, each once"),
        ("keep=4,keep=5", "each once"),
        ("keep=-1", "each once"),
        ("block=64", "does not say how many blocks are kept"),
        ("keep=1", "keep=1, at least 2 is needed"),
        ("keep=4,every=0", "every=0, at least 1"),
        ("keep=4,block=100", "block=100, which is not a multiple of 16"),
    ],
)
def test_numbers_that_make_no_choice(text: str, said: str) -> None:
    with pytest.raises(TyirError, match=said):
        BlockChoice.parse(text)
    assert BlockChoice.parse("keep=32") == BlockChoice(32, 256, 1024, 4)


# ------------------------------------------------------------------------------------------- what is planned


def test_a_plan_counts_the_same_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fewer seconds than dense ones and as many steps as a session runs; caches are cut by heads."""
    config = json.loads((Path(__file__).parents[1] / "models" / "tiny-qwen2" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape, capacity = read_shape(tmp_path), 1 << 17
    plain = BuildOptions(dies=1, seqlens=(1, 64, 128), max_kv=capacity, weights="fp16")
    sparse = replace(plain, sparse_prefill=(8, 256, 512, 4))
    assert (plain.kv_split, sparse.kv_split) == ("auto", "heads")
    costs = [prompt_cost(shape, options, load_machine()) for options in (plain, sparse)]
    assert costs[1].prefill < 0.75 * costs[0].prefill and costs[1].token == costs[0].token
    assert costs[1].steps == len(list(plan_chunks(capacity, 0, (1, 64), capacity, sparse=128)))
    asked = ["--plan", "--dies", "1", "--max-kv", "65536", "--seqlens", "1,128", "--weights", "fp16"]
    assert main([str(tmp_path), *asked, "--sparse-prefill", "keep=8,window=512"]) == 0
    assert "steps of 128 tokens see 8 blocks of 256" in capsys.readouterr().out


def test_the_lines_of_a_sparse_step_are_checked(tmp_path: Path) -> None:
    """Between bends a step's time is on straight lines: simulated beside what they say."""
    module = attention_only(*inputs(), THETA, None, tmp_path)
    programs = Programs(module, tmp_path, max_kv=1 << 15, seqlen=STEP, sparse="keep=8 block=64 window=128")
    step, choice = [EdgeProgram(programs.lowered[0])], BlockChoice(8, 64, 128)
    steps = LongSteps(step, EDGE10, 1 << 15, bends=(choice.bend,))
    for pos in (choice.bend + 640, 9000, 20000, 30000):
        assert steps.ns(pos) == pytest.approx(simulate(step, EDGE10, pos).total_ns, rel=0.02)

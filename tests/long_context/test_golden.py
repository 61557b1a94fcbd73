"""Dual chunk attention against its definition: published positions and temperatures, golden vectors through
every execution, borders wherever a step may meet them, and nothing changed before the first border.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.llm import Shape, build
from tests.long_context.attention_only import attention_only
from tests.long_context.programs import EDGE10, Programs
from tests.long_context.reference import Chunks, attention
from tyir.artifacts.dual_chunk import CONFIG_KEY, DualChunk
from tyir.artifacts.json_attributes import to_attribute
from tyir.diagnostics import TyirError
from tyir.dialects import edge10
from tyir.manifest import BuildOptions
from tyir.printer import print_op
from tyir.runtime_sim.serving.scheduler import Scheduler, Task
from tyir.runtime_sim.session.batch_session import BatchSession
from tyir.runtime_sim.session.chunks import plan_chunks
from tyir.runtime_sim.session.session import ENGINES, EngineName, Session
from tyir.tools.api import compile_path

Array = npt.NDArray[Any]
GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text())
TINY = GOLDEN["tiny"]
CHUNKS = Chunks(TINY["chunk_size"], TINY["local_size"], TINY["original_max"])
TOKENS, THETA = TINY["tokens"], TINY["theta"]
QWEN = {"chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144}
ROUNDING = 2e-3  # of values up to 1.5 through f16 queries, keys, probabilities and results
INT8, INT4 = 0.03, 0.3


def wave(heads: int, a: float, b: float, c: float, dim: int = TINY["dim"]) -> Array:
    """Inputs any language can make again."""
    i, g, d = np.ogrid[:TOKENS, :heads, :dim]
    return np.asarray(1.5 * np.sin(a * i + b * g + c * d + 0.3))


def inputs(
    heads: int = TINY["heads"], groups: int = TINY["groups"], dim: int = TINY["dim"]
) -> tuple[Array, Array, Array]:
    numbers = ((heads, 0.37, 1.3, 0.71), (groups, 0.53, 0.9, 1.17), (groups, 0.29, 1.7, 0.41))
    q, k, v = (wave(*own, dim) for own in numbers)
    return q, k, v


def golden_error(logits: Array) -> float:
    """How far the golden rows are from those that a whole prompt gave."""
    rows = {int(row): np.ravel(values) for row, values in TINY["rows"].items()}
    return max(float(np.abs(logits[row, : values.size] - values).max()) for row, values in rows.items())


# --------------------------------------------------------------------------------------- what the config says


def test_the_definition_gives_the_golden_vectors() -> None:
    assert golden_error(attention(*inputs(), CHUNKS, THETA, TOKENS).reshape(TOKENS, -1)) < 1e-6
    for row, wanted in TINY["distances"].items():
        found = CHUNKS.distance(np.full(int(row) + 1, int(row)), np.arange(int(row) + 1))
        assert found.tolist() == wanted


def test_positions_and_temperature_of_the_published_config() -> None:
    known, said = DualChunk.of_config({CONFIG_KEY: QWEN}), GOLDEN["qwen2.5-1m"]
    assert known is not None and (known.step, known.last, known.exact) == (said["step"], 262144, 262144)
    for position, (near, far, last) in said["query"].items():
        at = int(position)
        assert (at % known.step, min(at % known.step + known.step, known.last)) == (near, far)
        assert known.last == last
    for length, m in said["mscale"].items():
        assert known.temperature(int(length)) == pytest.approx(m * m, rel=1e-8)


@pytest.mark.parametrize("sizes", [(10, 4, 10), (10, 4, 0), (16, 4, 12), (12, 2, 0), (10, 7, 0)])
def test_up_to_where_it_is_plain_attention(sizes: tuple[int, int, int]) -> None:
    """`exact` is the longest prompt all of whose distances and temperature are those of plain attention."""
    known, chunks = DualChunk(*sizes), Chunks(*sizes)

    def plain(tokens: int) -> bool:
        i, j = np.arange(tokens)[:, None], np.arange(tokens)[None, :]
        same = (chunks.distance(i, j) == i - j)[j <= i].all()
        return bool(same) and chunks.temperature(tokens) == 1.0

    assert plain(known.exact) and not plain(known.exact + 1)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (5, "an object is needed"),
        ({"chunk_size": 8, "local_size": 8}, "must be less than chunk_size 8"),
        ({"chunk_size": 0}, "chunk_size 0, a whole number from 1"),
        ({"chunk_size": 16.5}, "chunk_size 16.5"),
        ({"original_max_position_embeddings": -1}, "whole number from 0"),
    ],
)
def test_sizes_that_make_no_chunks(entry: object, said: str) -> None:
    with pytest.raises(TyirError, match=said):
        DualChunk.of_config({CONFIG_KEY: entry})


# ---------------------------------------------------------------------------- interpreter and command program


@pytest.mark.parametrize(
    ("dies", "cache", "heads", "groups"),
    [
        (1, "", 2, 1),
        (2, "dtype=int8", 2, 1),
        (2, "layout=NHD", 4, 2),
        (3, "dtype=int8 layout=NHD", 4, 2),
        (4, "", 4, 2),
        (2, "dtype=int4 layout=NHD", 4, 2),
        pytest.param(3, "dtype=int4", 4, 2, marks=pytest.mark.slow),
    ],
)
def test_programs_of_all_dies(dies: int, cache: str, heads: int, groups: int, tmp_path: Path) -> None:
    """A prompt whose borders lie inside of steps of 8 tokens, then a token at a time across two more."""
    given = inputs(heads, groups, 32 if "int4" in cache else TINY["dim"])
    module = attention_only(*given, THETA, CHUNKS, tmp_path)
    programs = Programs(module, tmp_path, max_kv=TOKENS + 3, seqlen=8, dies=dies, cache=cache)
    bound = INT4 if "int4" in cache else INT8 if "int8" in cache else ROUNDING
    for engine in ("interpreter", "edge10"):
        programs.reset()
        whole = programs.feed(range(TOKENS), engine)
        wanted = attention(*given, CHUNKS, THETA, TOKENS).reshape(TOKENS, -1)
        np.testing.assert_allclose(whole[:, : wanted.shape[1]], wanted, atol=bound)
        if (heads, groups, cache) == (2, 1, ""):
            assert golden_error(whole) < ROUNDING
        programs.reset()
        programs.feed(range(14), engine)
        for token in range(14, TOKENS):  # a token's temperature is that of its own length
            (row,) = programs.feed([token], engine)
            now = attention(*given, CHUNKS, THETA, token + 1)[token].ravel()
            np.testing.assert_allclose(row[: now.size], now, atol=bound, err_msg=f"{engine} {token}")


def test_stages_of_layers(record_property: Callable[..., None]) -> None:
    """Two layers on four dies, two for each: what a layer is called with is handed to all of them."""
    logits = []
    for dies, pp in ((1, 1), (4, 2)):
        module, weights = build(Shape(layers=2, vocabulary=64))
        facts = {"chunk_size": 10, "local_size": 4, "original_max_position_embeddings": 10}
        module.set_attribute("tyir.model", to_attribute({CONFIG_KEY: facts}))
        programs = Programs(module, weights, max_kv=32, seqlen=4, dies=dies, pp=pp)
        for engine in ("interpreter", "edge10"):
            programs.reset()
            logits.append(programs.feed([(7 * i) % 64 for i in range(23)], engine))
    worst = max(float(np.abs(other - logits[0]).max()) for other in logits[1:])
    record_property("worst", worst)
    assert worst < 0.02 * np.abs(logits[0]).max()


def test_through_dram(tmp_path: Path) -> None:
    """Queries that do not stay in SRAM, of which each rotation is brought for its own range of keys."""
    machine = EDGE10.with_overrides({"sram.capacity_bytes": 48 << 10})
    given = inputs(16, 2)
    module = attention_only(*given, THETA, CHUNKS, tmp_path)
    programs = Programs(module, tmp_path, max_kv=32, seqlen=TOKENS, machine=machine)
    own = (op for op in programs.lowered[0].walk_type(edge10.Load) if "dual_chunk" in str(op.attributes))
    loaded = [
        op for op in own if isinstance(op.operands[0].op, edge10.AddressOf)
    ]  # not caches: rows of a buffer
    assert loaded
    got, wanted = programs.feed(range(TOKENS), "edge10"), attention(*given, CHUNKS, THETA, TOKENS)
    np.testing.assert_allclose(got, wanted.reshape(TOKENS, -1), atol=ROUNDING)


@pytest.mark.parametrize("cache", ["", "dtype=int8 layout=NHD", "dtype=int4"])
def test_before_the_first_border_nothing_changes(cache: str, tmp_path: Path) -> None:
    """Bit for bit, also where the step goes on beyond the border."""
    results: dict[bool, list[Array]] = {}
    for chunked in (False, True):
        folder = tmp_path / str(chunked)
        given = inputs(4, 2, 32 if "int4" in cache else TINY["dim"])
        module = attention_only(*given, THETA, Chunks(16, 4) if chunked else None, folder)
        programs = Programs(module, folder, max_kv=TOKENS, seqlen=8, dies=2, cache=cache)
        assert (programs.chunks is not None) == chunked
        results[chunked] = []
        for engine in ("interpreter", "edge10"):
            programs.reset()
            results[chunked].append(programs.feed(range(12), engine))
    for plain, chunked in zip(results[False], results[True]):
        np.testing.assert_array_equal(plain, chunked)


def test_a_cache_up_to_the_trained_length_has_plain_attention(tmp_path: Path) -> None:
    """The same module, compiled for as many tokens as plain attention serves, and for one more."""
    texts = []
    for number, max_kv in enumerate((10, 11)):
        module = attention_only(*inputs(), THETA, CHUNKS, tmp_path / str(number))
        Programs(module, tmp_path / str(number), max_kv=max_kv, seqlen=1)
        texts.append(print_op(module))
    assert "kv.dual_chunk_attention" not in texts[0] and "temperature" not in texts[0]
    assert "kv.dual_chunk_attention" in texts[1] and "tensor<11x4xf16>" in texts[1], (
        "tables end at the last position"
    )


# ---------------------------------------------------------------------------------------------- compiled code


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden example on two dies, two sequences at once."""
    folder = tmp_path_factory.mktemp("golden")
    (folder / "model.ir").write_text(print_op(attention_only(*inputs(), THETA, CHUNKS, folder)))
    options = BuildOptions(dies=2, seqlens=(1, 8), max_kv=TOKENS + 1, batch=2, weights="fp16")
    return compile_path(folder / "model.ir", folder / "out", options)


@pytest.mark.parametrize("engine", ENGINES)
def test_golden_vectors_through_sessions(compiled: Path, engine: EngineName) -> None:
    assert golden_error(Session(compiled, engine, sequence=1).feed(range(TOKENS))) < ROUNDING


def test_a_saved_cache_goes_on_across_a_border(compiled: Path, tmp_path: Path) -> None:
    """Keys do not depend on the prompt that they were computed for: a longer one uses them."""
    first, second = Session(compiled), Session(compiled)
    first.feed(range(11))
    first.save(tmp_path / "cache.npz")
    second.restore(tmp_path / "cache.npz")
    rest = second.feed(range(11, TOKENS))
    wanted = attention(*inputs(), CHUNKS, THETA, TOKENS).reshape(TOKENS, -1)[11:]
    np.testing.assert_allclose(rest[:, : wanted.shape[1]], wanted, atol=ROUNDING)


def test_a_saved_cache_is_of_its_chunks(compiled: Path, tmp_path: Path) -> None:
    """Other chunks, or other rotary frequencies: the weights are the same, the keys are not."""
    session = Session(compiled)
    session.feed(range(3))
    session.save(tmp_path / "cache.npz")
    other = Session(compiled)
    model: Any = other.manifest.model
    model[CONFIG_KEY] = {**model[CONFIG_KEY], "local_size": 5}
    with pytest.raises(TyirError, match=r"rotary positions .* in chunks of 6 .* there, .* in chunks of 5"):
        other.restore(tmp_path / "cache.npz")
    model[CONFIG_KEY] = {**model[CONFIG_KEY], "local_size": 4}
    model["rope_parameters"] = {"rope_theta": 5.0}
    with pytest.raises(TyirError, match="rotary positions"):
        other.restore(tmp_path / "cache.npz")


def test_sequences_of_a_batch_meet_borders_at_different_steps(compiled: Path) -> None:
    session = BatchSession(compiled)
    parts = [list(range(TOKENS)), list(range(3, 12))]
    logits = [np.concatenate(rows) for rows in zip(*(session.feed(p) for p in (parts, [[], [12, 13]])))]
    assert golden_error(logits[0]) < ROUNDING
    alone = Session(compiled)
    wanted = np.concatenate([alone.feed(parts[1]), alone.feed([12, 13])])
    np.testing.assert_array_equal(logits[1], wanted)
    with pytest.raises(TyirError, match="cross a border of chunks of 6"):
        BatchSession(compiled).step([list(range(8)), []], 8)


def test_steps_of_a_server_end_at_borders(compiled: Path) -> None:
    """What the scheduler plans runs, and gives what a session gives; the temperature is the prompt's."""
    session = BatchSession(compiled)
    scheduler = Scheduler(2, (1, 8), TOKENS + 1, chunks=DualChunk(10, 4, 10))
    tasks = [Task(range(TOKENS)), Task(range(2, 9))]
    scheduler.add(*tasks)
    rows: list[list[Array]] = [[], []]
    while (step := scheduler.plan()) is not None:
        for start, feed in zip(step.starts, step.feeds):
            assert not feed or start // 6 == (start + len(feed) - 1) // 6
        for own, outputs in zip(rows, session.step(step.feeds, step.seqlen, step.lengths)):
            own.append(outputs["logits"])
        for task in scheduler.ran(step):
            scheduler.remove(task)
    assert golden_error(np.concatenate(rows[0])) < ROUNDING
    np.testing.assert_array_equal(np.concatenate(rows[1]), Session(compiled).feed(range(2, 9)))


def test_chunks_of_a_prompt_end_at_borders() -> None:
    made = list(plan_chunks(600, 90, (1, 96), 1000, DualChunk(128, 32)))
    assert [(c.start, c.count) for c in made[:3]] == [(90, 6), (96, 96), (192, 96)]
    assert sum(c.count for c in made) == 600 and all(c.count <= c.seqlen for c in made)
    assert all(c.start // 96 == (c.start + c.count - 1) // 96 for c in made)

"""Models with two sets of rotary frequencies: each conversation has those of its length, as transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.frontends.test_plan import compiled_bytes
from tyir.artifacts.long_rope import LongRope
from tyir.diagnostics import TyirError
from tyir.manifest import BuildOptions
from tyir.runtime_sim.serving.engine import Engine
from tyir.runtime_sim.serving.generation import Finish, Generation
from tyir.runtime_sim.session.batch_session import BatchSession
from tyir.runtime_sim.session.session import ENGINES, EngineName, Session
from tyir.tools.api import compile_path
from tyir.tools.estimate.plan import make_plan
from tyir.tools.verify.compare import LayerStates, Reference, check_prompt
from tyir.tools.verify.locate import locate

Array = npt.NDArray[Any]
LIMIT, CAPACITY = 24, 64  # tokens up to which the short frequencies hold; of the cache
IDS = [int(i) for i in np.random.default_rng(1).integers(3, 96, CAPACITY)]


@pytest.fixture(scope="module")
def phi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phi-4-mini's structure: three quarters of a head's channels are turned, by short or long factors that
    differ enough to tell.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("phi")
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "phi3",
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        original_max_position_embeddings=LIMIT,
        max_position_embeddings=256,
        partial_rotary_factor=0.75,
        pad_token_id=0,
        rope_parameters={
            "rope_type": "longrope",
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
            "long_factor": [3.0, 5.0, 4.0, 6.0, 9.0, 12.0],
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.75,
        },
        initializer_range=0.2,  # attention that is not nearly the same everywhere
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def artifacts(phi: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_path(
        phi, tmp_path_factory.mktemp("out"), BuildOptions(dies=2, seqlens=(1, 8), max_kv=CAPACITY)
    )


@pytest.fixture(scope="module")
def both(phi: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = BuildOptions(dies=1, seqlens=(1, 8), max_kv=CAPACITY, batch=2)
    return compile_path(phi, tmp_path_factory.mktemp("batch"), options)


def hugging_face(folder: Path, ids: Sequence[int]) -> Array:
    """fp32 logits [n, V] of one pass over all tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return np.asarray(model(torch.tensor([list(ids)])).logits[0].numpy())


def error(got: Array, wanted: Array) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("engine", ENGINES)
def test_each_prompt_has_the_frequencies_of_its_length(
    phi: Path, artifacts: Path, engine: EngineName
) -> None:
    session = Session(artifacts, engine)
    for length in (LIMIT - 4, LIMIT + 6, LIMIT):  # one after the other: no choice outlives a conversation
        session.reset()
        wanted = hugging_face(phi, IDS[:length])
        assert error(session.feed(IDS[:length]), wanted) < 4e-3
    # what the two tables differ by is far above that
    session.reset()
    session.expect(LIMIT + 1)
    assert error(session.feed(IDS[:LIMIT]), wanted) > 4e-2


def test_a_conversation_that_outgrows_the_short_table_is_computed_anew(phi: Path, artifacts: Path) -> None:
    session = Session(artifacts)
    parts = [IDS[:10], IDS[10:LIMIT], IDS[LIMIT:40]]
    got = [session.feed(part) for part in parts]
    assert error(np.concatenate(got[:2]), hugging_face(phi, IDS[:LIMIT])) < 4e-3
    assert error(got[2], hugging_face(phi, IDS[:40])[LIMIT:]) < 4e-3
    assert session.tokens == IDS[:40]


def test_an_answer_has_one_table_from_prompt_to_limit(artifacts: Path) -> None:
    """What a prompt is answered does not depend on what the session held before."""
    fresh = {limit: list(Session(artifacts).generate(IDS[:18], limit)) for limit in (6, 20)}
    session = Session(artifacts)
    for limit in (6, 20, 6, 20):
        assert list(session.generate(IDS[:18], limit)) == fresh[limit]
    session = Session(artifacts)
    session.expect(38)
    (first,) = session.next_tokens(IDS[:18]).ids[-1:]
    assert int(first[0]) == fresh[20][0]  # of 18 + 20 tokens: the long table from the first token on


def test_saved_caches_say_which_table_turned_them(artifacts: Path, tmp_path: Path) -> None:
    wanted: dict[bool, Array] = {}
    for long in (False, True):
        session = Session(artifacts)
        session.expect(40 if long else 20)
        session.feed(IDS[:16])
        session.save(tmp_path / f"{long}.cache")
        wanted[long] = session.feed(IDS[16:20])
    for long in (True, False):
        other = Session(artifacts)
        other.restore(tmp_path / f"{long}.cache")
        np.testing.assert_array_equal(other.feed(IDS[16:20]), wanted[long])
    assert error(wanted[False], wanted[True]) > 1e-2
    session = Session(artifacts)
    session.restore(tmp_path / "True.cache")  # an answer of the short table takes nothing of it
    assert list(session.generate(IDS[:16], 4)) == list(Session(artifacts).generate(IDS[:16], 4))


def test_sequences_of_a_batch_have_tables_of_their_own(phi: Path, both: Path) -> None:
    session = BatchSession(both)
    short, long = session.feed([IDS[:20], IDS[:40]])
    assert error(short, hugging_face(phi, IDS[:20])) < 4e-3
    assert error(long, hugging_face(phi, IDS[:40])) < 4e-3
    with pytest.raises(TyirError, match=r"sequence 0 comes to 25 tokens, and began with .* of up to 24"):
        session.feed([IDS[20:25], []])
    session.copy(1, 0, 30)
    np.testing.assert_array_equal(session.feed([IDS[30:33], []])[0], long[30:33])


class Heard:
    """A listener that keeps nothing: the generation has the tokens."""

    def prompt(self, scored: Any) -> None: ...

    def token(self, scored: Any, finish: Finish | None) -> Finish | None:
        return finish

    def ended(self, finish: Finish) -> None: ...


def test_requests_are_answered_as_if_alone(both: Path) -> None:
    """Two at once with the same beginning, one of which may outgrow the short table; then others that could
    take up their caches.
    """
    limits = (4, 20, 20, 4)
    alone = [list(Session(both).generate(IDS[:18], limit)) for limit in limits]
    assert alone[0] != alone[1][:4]
    engine = Engine(BatchSession(both))
    asked = [Generation(IDS[:18], Heard(), limit=limit) for limit in limits]
    engine.add(*asked)
    while any(g.finish is None for g in asked):
        assert engine.step()
    assert [g.made for g in asked] == alone
    assert [g.task.cached for g in asked[:2]] == [0, 0]


@pytest.mark.parametrize(("prompt", "count"), [(12, 8), (12, 20)])
def test_verify_compares_with_the_same_table(phi: Path, artifacts: Path, prompt: int, count: int) -> None:
    options = BuildOptions(dies=2, seqlens=(1, 8), max_kv=CAPACITY)
    states = LayerStates()
    session, reference = Session(artifacts, probe=states), Reference(phi, options)
    result = check_prompt(session, reference, IDS[:prompt], count, states)
    assert result.differing == []
    assert result.logit_cosine.min() >= 0.9999
    assert locate(artifacts, phi, IDS[: prompt + count]) is None


def test_a_cache_within_the_short_length_has_one_table(phi: Path, tmp_path: Path) -> None:
    from tyir.frontends.huggingface import import_model
    from tyir.pipeline import run_pipeline

    for max_kv, rows, taken in ((LIMIT, LIMIT, "kv.rows"), (CAPACITY, CAPACITY + LIMIT, "kv.take_rows")):
        module = import_model(phi, positions=CAPACITY)
        run_pipeline(module, f"to-ty,kv-materialize{{max-kv={max_kv}}}")
        text = str(module)
        assert f'"{taken}"' in text
        assert f"tensor<{rows}x8xf16>" in text


def test_plans_count_both_tables(phi: Path, artifacts: Path) -> None:
    plan = make_plan(phi, BuildOptions(dies=2, seqlens=(1, 8), max_kv=CAPACITY))
    for die, need in enumerate(plan.dies):
        found, cached, _ = compiled_bytes(artifacts, die, 8)
        assert (need.weights, need.kv_cache) == (found, cached)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"original": 0, "short_inv_freq": [1.0]}, "original 0"),
        ({"original": 4, "short_inv_freq": []}, "no list of numbers"),
        ({"original": 4, "short_inv_freq": ["1"]}, "no list of numbers"),
        ("yes", "original None"),
    ],
)
def test_facts_that_say_no_table_are_refused(facts: Any, message: str) -> None:
    with pytest.raises(TyirError, match=message):
        LongRope.of_model({"long_rope": facts})

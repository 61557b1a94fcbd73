"""Answers from Python: each is what it would be alone, whatever comes and goes beside it."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.e2e.serving import TEMPLATE
from tyir.diagnostics import TyirError
from tyir.execution.artifacts import Artifacts
from tyir.runtime_sim.serving.choosing import Sampling
from tyir.runtime_sim.serving.engine import Observer
from tyir.runtime_sim.serving.generation import Finish, Generation
from tyir.runtime_sim.serving.scheduler import QueueFull, Step
from tyir.runtime_sim.session.session import Session
from tyir.tools.serve.async_engine import AsyncEngine, Delta, Params

SENTENCE = "The old house stood at the end of a cold road and she looked at him in the morning"
WORDS = SENTENCE.split()


@dataclass
class Counting(Observer):
    steps: list[Step] = field(default_factory=list)
    ended_with: list[str] = field(default_factory=list)

    def stepped(self, step: Step, slots: int, seconds: float) -> None:
        self.steps.append(step)

    def ended(self, generation: Generation) -> None:
        assert isinstance(generation.finish, Finish)
        self.ended_with.append(generation.finish.reason)


@pytest.fixture(scope="module")
def engine(four: Path) -> Iterator[AsyncEngine]:
    made = AsyncEngine(four, template=TEMPLATE, observer=Counting())
    made.start()
    yield made
    made.stop()


async def answer(engine: AsyncEngine, prompt: Any, params: Params) -> list[Delta]:
    return [delta async for delta in engine.generate(prompt, params)]


def text(deltas: list[Delta], index: int = 0) -> str:
    return "".join(d.text for d in deltas if d.index == index)


def tokens(deltas: list[Delta], index: int = 0) -> list[int]:
    return [s.token for d in deltas if d.index == index for s in d.tokens]


def test_greedy_tokens_are_a_sessions(engine: AsyncEngine, four: Path) -> None:
    session = Session(four)
    ids = engine.ids_of("The old house stood")
    wanted = list(session.generate(ids, 12))
    deltas = asyncio.run(answer(engine, "The old house stood", Params(max_tokens=12)))
    assert tokens(deltas) == wanted and deltas[-1].finish == Finish("length")
    assert text(deltas) == engine.tokenizer.decode([*ids, *wanted])[len("The old house stood") :]
    same = asyncio.run(answer(engine, [{"role": "user", "content": "The old"}], Params(max_tokens=3)))
    assert tokens(same) == tokens(asyncio.run(answer(engine, "The old\n", Params(max_tokens=3))))


def random_request(rng: random.Random) -> tuple[str, Params]:
    prompt = " ".join(rng.choices(WORDS, k=rng.choice([1, 3, 8, 25])))
    sampling = Sampling(
        temperature=rng.choice([0.0, 0.7, 1.5]),
        top_k=rng.choice([0, 5]),
        top_p=rng.choice([1.0, 0.8]),
        seed=rng.randrange(1000),
        repetition_penalty=rng.choice([1.0, 1.3]),
        presence_penalty=rng.choice([0.0, 0.5]),
    )
    stop = rng.choice([(), (), (rng.choice(["e", "th", ". ", " t", "ing"]),)])
    most, whole = rng.randrange(1, 14), rng.choice([True, False])
    return prompt, Params(max_tokens=most, sampling=sampling, stop=stop, whole=whole)


async def mix(engine: AsyncEngine, seed: int) -> None:
    """Each request alone, then all of them at random times, some left early."""
    rng = random.Random(seed)
    requests = [random_request(rng) for _ in range(rng.randrange(3, 8))]
    alone = [await answer(engine, *r) for r in requests]

    async def beside(number: int, delay: float, most: int | None) -> None:
        await asyncio.sleep(delay)
        got: list[Delta] = []
        async with contextlib.aclosing(engine.generate(*requests[number])) as deltas:
            async for delta in deltas:
                got.append(delta)
                if most is not None and len(got) == most:
                    break
        if most is None:
            assert (text(got), tokens(got)) == (text(alone[number]), tokens(alone[number]))
            assert got[-1].finish == alone[number][-1].finish
        else:
            assert text(alone[number]).startswith(text(got))

    await asyncio.gather(
        *(beside(i, rng.random() * 0.2, rng.choice([None, None, 1, 3])) for i in range(len(requests)))
    )
    await asyncio.to_thread(_idle, engine)


def _idle(engine: AsyncEngine) -> None:
    while engine.engine.counts != (0, 0):  # ./tools/test ends what never holds
        time.sleep(0.02)


@pytest.mark.parametrize("seed", range(3))
def test_each_answer_is_what_it_is_alone(engine: AsyncEngine, seed: int) -> None:
    asyncio.run(mix(engine, seed))


@pytest.mark.slow
def test_each_of_many_answers_is_what_it_is_alone(engine: AsyncEngine) -> None:
    for seed in range(100, 300):
        asyncio.run(mix(engine, seed))


def test_several_answers_compute_their_prompt_once(engine: AsyncEngine) -> None:
    counting = engine.engine.observer
    assert isinstance(counting, Counting)
    prompt = " ".join(WORDS[::-1])
    sampling = Sampling(temperature=1.0, seed=5)
    # A request that was cancelled may still be in the step that runs; it is reported before this answer is.
    asyncio.run(answer(engine, "a", Params(max_tokens=1)))
    counting.steps.clear()
    together = asyncio.run(answer(engine, prompt, Params(max_tokens=4, n=3, sampling=sampling)))
    ids = engine.ids_of(prompt)
    fed = sum(s.tokens for s in counting.steps)
    assert fed == len(ids) + 2 + 3 * 3, "one prompt, its last token for the two others, three tokens each"
    for number in range(3):
        own = Params(max_tokens=4, sampling=Sampling(temperature=1.0, seed=5 + number))
        assert tokens(together, number) == tokens(asyncio.run(answer(engine, prompt, own)))


def test_what_was_cut_is_used_again(engine: AsyncEngine) -> None:
    prompt = "in the morning " * 8

    async def cut() -> int:
        async with contextlib.aclosing(engine.generate(prompt, Params(max_tokens=50))) as deltas:
            async for delta in deltas:
                if delta.tokens:
                    break
        again = engine.submit([engine.ids_of(prompt)], Params(max_tokens=1))[0]
        [d async for d in again]
        return again.cached

    assert asyncio.run(cut()) == len(engine.ids_of(prompt)) - 1


def test_logprobs_and_scores(engine: AsyncEngine, four: Path) -> None:
    """From one array: the row of a session that is fed the same tokens."""
    ids = engine.ids_of("The old house stood at the end of the road")
    deltas = asyncio.run(answer(engine, ids, Params(max_tokens=3, logprobs=2, echo=True)))
    made = tokens(deltas)
    rows = Session(four).feed([*ids, *made]).astype(np.float64)
    rows -= np.log(np.exp(rows - rows.max(1, keepdims=True)).sum(1, keepdims=True)) + rows.max(
        1, keepdims=True
    )
    (prompt,) = [d.prompt for d in deltas if d.prompt]
    scored = [*prompt, *(s for d in deltas for s in d.tokens)]
    assert [s.token for s in scored] == [*ids, *made] and scored[0].logprob is None
    for row, one in zip(rows, scored[1:]):
        assert one.logprob == pytest.approx(row[one.token], abs=1e-9)
        assert [i for i, _ in one.top] == list(np.argsort(-row, kind="stable")[:2])
        assert (one.logprob == max(v for _, v in one.top)) == (one.token == int(row.argmax()))
    only = asyncio.run(answer(engine, ids, Params(max_tokens=0, logprobs=0, echo=True)))
    assert tokens(only) == [] and [s.logprob for s in only[0].prompt] == [s.logprob for s in prompt]


def test_what_may_follow(engine: AsyncEngine) -> None:
    ask: Callable[..., list[int]] = lambda **s: tokens(  # noqa: E731
        asyncio.run(answer(engine, "The old house", Params(max_tokens=5, sampling=Sampling(**s))))
    )
    best = ask()
    assert ask(bias={best[0]: -100.0})[0] != best[0] and ask(bias={7: 100.0}) == [7] * 5
    assert set(ask(allowed=frozenset({11, 12}), temperature=1.0)) <= {11, 12}
    assert ask(bad=((best[0],),))[0] != best[0]
    assert (
        len(set(ask(bias={7: 30.0}, presence_penalty=2.0, frequency_penalty=2.0, repetition_penalty=9.0))) > 1
    )
    with pytest.raises(TyirError, match="token 4096 is not in the vocabulary"):
        ask(bias={4096: 1.0})
    with pytest.raises(TyirError, match="no token is allowed"):
        ask(allowed=frozenset())


def test_a_request_that_fails_ends_alone(engine: AsyncEngine) -> None:
    class Broken:
        def allowed(self) -> None:
            raise RuntimeError("no grammar")

        def accept(self, token: int) -> None: ...

    async def both() -> tuple[list[Delta], list[Delta]]:
        good = answer(engine, "The old house", Params(max_tokens=6))
        bad = answer(engine, "The old house", Params(max_tokens=6, constraint=Broken))
        return tuple(await asyncio.gather(good, bad))  # type: ignore[return-value]

    good, bad = asyncio.run(both())
    assert len(tokens(good)) == 6
    assert bad[-1].finish == Finish("error", message="RuntimeError: no grammar") and not tokens(bad)


def test_what_is_refused(four: Path) -> None:
    narrow = AsyncEngine(four, most_waiting=0)
    prompts = [[5, 6]] * 5

    async def many() -> None:
        with pytest.raises(QueueFull, match="4 requests are answered at once and 0 may wait"):
            narrow.submit(prompts, Params())
        with pytest.raises(TyirError, match="no chat template"):
            narrow.ids_of([{"role": "user", "content": "a"}])

    asyncio.run(many())
    assert narrow.engine.counts == (0, 0)


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ('{"temperature": NaN}', "generation_config.json: temperature nan is out of range"),
        ('{"top_p": 0}', "generation_config.json: top-p 0 is out of range"),
        ('{"repetition_penalty": -1.5}', "generation_config.json: repetition_penalty -1.5 is out of range"),
    ],
)
def test_numbers_of_the_artifacts_are_held_against_their_ranges_at_the_start(
    four: Path, tmp_path: Path, said: str, wanted: str
) -> None:
    """Not in every answer to a request that says nothing of them."""
    folder = Path(shutil.copytree(four, tmp_path / "1die"))
    (folder / "generation_config.json").write_text(said)
    engine = AsyncEngine(Artifacts.open(folder, check=False))
    with pytest.raises(TyirError, match=wanted):
        engine.start()

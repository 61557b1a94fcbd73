"""Text in, text out, from any number of tasks at once.

    async with AsyncEngine(Path("out/4die")) as engine:
        async for delta in engine.generate("The old house", Params(max_tokens=16)):
            print(delta.text, end="")

The prompt is a text, a list of tokens, or a chat's messages, with pictures for a model that sees them.
Leaving the loop early, or cancelling the task that runs it, ends the answer and frees its place after the
step that runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Self

from tyir.diagnostics import TyirError
from tyir.execution.artifacts import Artifacts
from tyir.process.cache import checked_files
from tyir.runtime_sim.serving.choosing import Constraint, Sampling
from tyir.runtime_sim.serving.costs import step_costs
from tyir.runtime_sim.serving.engine import Engine, Observer
from tyir.runtime_sim.serving.generation import Finish, Generation, Scored
from tyir.runtime_sim.session.batch_session import BatchSession
from tyir.runtime_sim.session.session import EngineGroup, EngineName
from tyir.runtime_sim.vision.batch_session import VisionBatchSession
from tyir.runtime_sim.vision.pictures import Picture, read_picture
from tyir.runtime_sim.vision.preprocessor import vision_of
from tyir.runtime_sim.vision.request import VisionRequest
from tyir.text.json_files import json_object
from tyir.tools.run.chat import chat_template, marks_of
from tyir.tools.run.end_tokens import end_tokens
from tyir.tools.run.prompts import token_ids
from tyir.tools.run.text_stream import TextStream
from tyir.tools.serve.pictures import Eyes
from tyir.tools.serve.stop_strings import StopStrings
from tyir.tools.tokenizer import load_tokenizer

__all__ = ["Answer", "AsyncEngine", "Delta", "Messages", "Params", "Prompt"]

Messages = Sequence[Mapping[str, Any]]
Prompt = Sequence[int] | VisionRequest  # as it is computed
_SAMPLING_FILE: Final = "generation_config.json"
_ENDINGS: Final = ("add_generation_prompt", "continue_final_message")


@dataclass(frozen=True)
class Params:
    """What is asked of an answer.

    `max_tokens`: None for as many as the cache holds, 0 with `echo` to score the prompt alone.  `n`: answers
    to the same prompt, with seeds that follow each other.  `stop`: texts that end it.  `logprobs`: how many
    of the most likely tokens come with each token, None for no log-probabilities; `echo`: with those of the
    prompt's tokens as well.  `constraint` makes what the text is held to, one for each answer.  `salt`: what
    was computed for an answer is used only for others with the same.  `whole`: nothing is wanted of an answer
    before its end.
    """

    max_tokens: int | None = 16
    n: int = 1
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    skip_special_tokens: bool = True
    logprobs: int | None = None
    echo: bool = False
    constraint: Callable[[], Constraint] | None = None
    salt: str = ""
    whole: bool = False


@dataclass(frozen=True)
class Delta:
    """What an answer (number `index`) has become: more text, tokens with their log-probabilities, its end.

    `prompt`: the prompt's tokens, once, where they were asked for.
    """

    index: int
    text: str = ""
    tokens: tuple[Scored, ...] = ()
    prompt: tuple[Scored, ...] = ()
    finish: Finish | None = None


class _Listener:
    """Makes text of tokens in the engine's thread, so that a stop text ends the answer at its token."""

    def __init__(
        self,
        index: int,
        stream: TextStream,
        stops: StopStrings | None,
        put: Callable[[Delta], None],
    ) -> None:
        """Without `stops` no text is wanted before the end."""
        self._index = index
        self._stream = stream
        self._stops = stops
        self._put = put
        self._last = Delta(index)

    def prompt(self, scored: Sequence[Scored]) -> None:
        self._put(Delta(self._index, prompt=tuple(scored)))

    def token(self, scored: Scored, finish: Finish | None) -> Finish | None:
        if finish is not None and finish.reason == "stop":  # a token that ends is not text
            text = self._rest()
        elif self._stops is None:
            self._stream.skip(scored.token)
            text = self._stream.end() if finish is not None else ""
        else:
            text, stop = self._stops.put(self._stream.put(scored.token))
            if stop is not None:
                finish = Finish("stop", stop)
            elif finish is not None:
                text, finish = self._end(text, finish)
        delta = Delta(self._index, text, (scored,))
        if finish is None:
            self._put(delta)
        else:
            self._last = delta  # what ends with it is said together
        return finish

    def ended(self, finish: Finish) -> None:
        self._put(replace(self._last, finish=finish))

    def _end(self, text: str, finish: Finish) -> tuple[str, Finish]:
        """Nothing follows: what was held back may be shown, unless a stop text shows up in it."""
        if self._stops is None:
            return text + self._stream.end(), finish
        more, stop = self._stops.put(self._stream.end())
        return (
            (text + more, Finish("stop", stop))
            if stop is not None
            else (text + more + self._stops.end(), finish)
        )

    def _rest(self) -> str:
        return self._end("", Finish("stop"))[0]


class Answer:
    """The answers to one prompt: an asynchronous iterator of `Delta`, until all of them have ended."""

    def __init__(self, engine: Engine, prompt: Sequence[int], *, whole: bool = False) -> None:
        """`prompt`: its tokens."""
        self.prompt = prompt
        self.generations: list[Generation] = []
        self._engine = engine
        self._whole = whole
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[list[Delta]] = asyncio.Queue()
        self._kept: list[Delta] = []
        self._lock = threading.Lock()
        self._left = 0

    def put(self, delta: Delta) -> None:
        """From any thread.  A `whole` answer wakes the loop only when one of its parts has ended."""
        with self._lock:
            self._kept.append(delta)
            if self._whole and delta.finish is None:
                return
            deltas, self._kept = self._kept, []
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._queue.put_nowait, deltas)

    def expect(self, generations: Sequence[Generation]) -> None:
        self.generations = list(generations)
        self._left = len(generations)

    @property
    def made(self) -> int:
        """Tokens of all answers."""
        return sum(len(g.made) for g in self.generations)

    @property
    def cached(self) -> int:
        """Of the prompt's tokens, how many were not computed for this."""
        return self.generations[0].task.cached

    def cancel(self) -> None:
        """End all of them; nothing when they have ended."""
        for generation in self.generations:
            self._engine.cancel(generation)

    def __aiter__(self) -> AsyncGenerator[Delta, None]:
        return self.deltas()

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """The same; closing it early ends the answers."""
        try:
            while self._left:
                for delta in await self._queue.get():
                    self._left -= delta.finish is not None
                    yield delta
        finally:
            self.cancel()


class AsyncEngine:
    """Artifacts with their tokenizer, chat template and ends; answers are made by a thread of its own.

    Construction reads the folder (`TyirError` lists what is wrong with it); `start` computes a step of every
    length, and after it the engine is `ready`.
    """

    def __init__(
        self,
        folder: Path | Artifacts,
        engine: EngineName = "host",
        *,
        template: str | None = None,
        most_waiting: int | None = None,
        most_waiting_tokens: int | None = None,
        long_share: float = 0.5,
        queue_timeout: float | None = None,
        request_timeout: float | None = None,
        observer: Observer | None = None,
        check: bool = True,
        threads: int | None = None,
        group: EngineGroup | None = None,
        resize: bool = False,
    ) -> None:
        """`most_waiting`, `most_waiting_tokens`, `long_share`: as `Scheduler` takes them; `queue_timeout`,
        `request_timeout`: as `Engine`; `threads`: of the engine `host`; `group`: the processes that
        the dies of the language model run in, None for this one alone; `resize`: bring pictures to the
        nearest size that was compiled, which others are refused for.
        """
        if not isinstance(folder, Artifacts):
            folder = Artifacts.open(folder, check=check, seen=checked_files())
        self.artifacts = folder
        sees = self.artifacts.manifest.vision is not None
        kind = VisionBatchSession if sees else BatchSession
        self.session: BatchSession = kind(self.artifacts, engine, threads=threads, group=group)
        self.engine = Engine(
            self.session,
            most_waiting=most_waiting,
            most_waiting_tokens=most_waiting_tokens,
            long_share=long_share,
            queue_timeout=queue_timeout,
            request_timeout=request_timeout,
            observer=observer,
        )
        self.tokenizer = load_tokenizer(self.artifacts)
        self.ends = end_tokens(self.artifacts, self.tokenizer)
        self.ready = False
        self._template = template
        self._marks = marks_of(self.artifacts, self.tokenizer)
        self.eyes: Eyes | None = None
        if self._marks is not None:
            self.eyes = Eyes(self.artifacts, engine, self.tokenizer, self._marks, resize=resize)

    @property
    def capacity(self) -> int:
        """Tokens of a prompt and its answer."""
        return self.engine.capacity

    @property
    def slots(self) -> int:
        """Answers that are made at once."""
        return len(self.session.tokens)

    def defaults(self) -> Sampling:
        """How to sample when nothing is said: as generation_config.json says, else at temperature 1, within
        what the programs return.
        """
        file = self.artifacts.find(_SAMPLING_FILE)
        path = self.artifacts.path / _SAMPLING_FILE
        said = json_object(file.read(), path, "restore the file") if file is not None else {}
        values: dict[str, Any] = {}
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
            value = said.get(name)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                values[name] = value
        sampling = replace(Sampling(temperature=1.0), **values)
        try:
            sampling.check(self.engine.vocabulary, None)
        except TyirError as error:
            # said of the file, once, before every request that says nothing is refused for it
            raise TyirError(
                f"{path.name}: {'; '.join(d.message for d in error.diagnostics).replace('--', '')}",
                where=str(path),
                help="restore the file of the original model, or remove it",
            ) from None
        if self.engine.choices == 1:
            return Sampling()
        if self.engine.choices is not None:
            most = self.engine.choices
            top_k = min(sampling.top_k, most) if sampling.top_k > 0 else most
            return replace(sampling, top_k=top_k, repetition_penalty=1.0)
        return sampling

    def start(self) -> None:
        """Measure a step of every length, then take requests; blocks until that is done.

        `TyirError` when the artifacts say how to sample in numbers that cannot be.
        """
        self.defaults()
        self.engine.scheduler.weigh(step_costs(self.session))
        self.engine.start()
        self.ready = True

    def stop(self) -> None:
        """End what is being answered, and the thread."""
        self.ready = False
        self.engine.stop()
        if self.eyes is not None:
            self.eyes.close()

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self.start)
        return self

    async def __aexit__(self, *unused: object) -> None:
        await asyncio.to_thread(self.stop)

    # ------------------------------------------------------------------------------------------------ prompts

    @property
    def template(self) -> str:
        """The chat template; `TyirError` when there is none."""
        return self._template or chat_template(self.artifacts, self.tokenizer, self._marks)

    def chat_text(self, messages: Messages, /, **options: Any) -> str:
        """A chat as one text, by the artifacts' template (`options`: `add_generation_prompt`,
        `continue_final_message`; all others go to it, as `tools`); `TyirError` when there is none, or it
        cannot be applied.
        """
        template = self.template
        ending = {k: options.pop(k) for k in _ENDINGS if k in options}
        try:
            from tyir.tools.run.rendering import render  # jinja2 is there where transformers is

            return render(template, messages, {**self.tokenizer.special_tokens_map, **options}, **ending)
        except Exception as error:  # a template is a program of the folder's: it raises what it likes
            line = (str(error).splitlines() or [""])[0][:200]
            raise TyirError(
                f"the chat template cannot be applied: {line or type(error).__name__}",
                help="change the messages, or give another template with --chat-template FILE",
            ) from None

    def ids_of(self, prompt: str | Sequence[int] | Messages) -> list[int]:
        """The tokens of a prompt; `TyirError` when there are none, or clearly more than fit."""
        if isinstance(prompt, str):
            return token_ids(self.tokenizer, prompt, self.capacity)
        messages = [m for m in prompt if isinstance(m, Mapping)]
        if messages:
            return token_ids(self.tokenizer, self.chat_text(messages), self.capacity)
        return [int(i) for i in prompt if not isinstance(i, Mapping)]

    def seen(self, text: str, pictures: Sequence[Picture]) -> Prompt:
        """The prompt of a text with places for pictures; `TyirError` when they do not agree, there are
        pictures for a model that takes none, or more tokens than fit.
        """
        if self.eyes is not None:
            return self.eyes.request(text, pictures)
        if pictures:
            vision_of(self.artifacts)
        return self.ids_of(text)

    def prompt_of(
        self, prompt: str | Sequence[int] | Messages, images: Sequence[Picture | Path] = ()
    ) -> Prompt:
        """As `ids_of`, with pictures: they go where messages have parts of type `image`, else before the last
        message's text.  A prompt that is a text is one message then.
        """
        tokens = not isinstance(prompt, str) and not any(isinstance(m, Mapping) for m in prompt)
        if tokens or not (images or self.eyes):
            return self.ids_of(prompt)
        if isinstance(prompt, str) and not images:
            return self.seen(prompt, ())
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        messages = [dict(m) for m in asked if isinstance(m, Mapping)]
        if not any(p.get("type") == "image" for m in messages for p in _parts(m)):
            places = [{"type": "image"} for _ in images]
            messages[-1]["content"] = [*places, *_parts(messages[-1])]
        pictures = [i if isinstance(i, Picture) else read_picture(i) for i in images]
        return self.seen(self.chat_text(messages), pictures)

    # ------------------------------------------------------------------------------------------------ answers

    async def generate(
        self,
        prompt: str | Sequence[int] | Messages,
        params: Params | None = None,
        images: Sequence[Picture | Path] = (),
    ) -> AsyncGenerator[Delta, None]:
        """What becomes of the answers to a prompt, as it comes; `images` as `prompt_of` takes them.

        `QueueFull` when too many wait, `TyirError` for what cannot be answered.
        """
        given = await asyncio.to_thread(self.prompt_of, prompt, images)
        answer = self.submit([given], params or Params())[0]
        async with contextlib.aclosing(answer.deltas()) as deltas:
            async for delta in deltas:
                yield delta

    def submit(self, prompts: Sequence[Prompt], params: Params) -> list[Answer]:
        """Ask for answers to one or several prompts, all or none."""
        answers = [self._answer(one, params, number * params.n) for number, one in enumerate(prompts)]
        self.engine.add(*(g for answer in answers for g in answer.generations))
        return answers

    def _answer(self, prompt: Prompt, params: Params, first: int) -> Answer:
        pictures = prompt if isinstance(prompt, VisionRequest) else None
        ids = prompt.ids if isinstance(prompt, VisionRequest) else prompt
        limit = self.capacity - len(ids) if params.max_tokens is None else params.max_tokens
        stops = frozenset() if params.ignore_eos else frozenset(self.ends)
        answer = Answer(self.engine, ids, whole=params.whole)
        made: list[Generation] = []
        for number in range(params.n):
            stream = TextStream(self.tokenizer, ids, skip=params.skip_special_tokens)
            at_end = params.whole and not params.stop
            texts = None if at_end else StopStrings(params.stop, include=params.include_stop)
            sampling = params.sampling
            if sampling.seed is not None:
                sampling = replace(sampling, seed=sampling.seed + number)
            made.append(
                Generation(
                    ids,
                    _Listener(first + number, stream, texts, answer.put),
                    limit,
                    sampling,
                    stops=stops | frozenset(params.stop_token_ids),
                    least=params.min_tokens,
                    logprobs=params.logprobs,
                    score_prompt=params.echo,
                    constraint=params.constraint() if params.constraint is not None else None,
                    salt=params.salt,
                    after=made[0] if made and not params.echo else None,
                    pictures=pictures,
                )
            )
        answer.expect(made)
        return answer


def _parts(message: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The parts of a message's content."""
    content = message.get("content") or ""
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)

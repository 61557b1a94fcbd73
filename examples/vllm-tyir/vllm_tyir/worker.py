"""vLLM's worker over a `BatchSession`: tokens in, logits out, and the next tokens as tyir's server chooses.

Of vLLM it uses `WorkerBase`, the scheduler's output and the runner's, and the cache's description; sampling
is `tyir.runtime_sim.serving.choosing`, so that equal requests get equal answers from both servers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, LogprobsLists, LogprobsTensors, ModelRunnerOutput
from vllm.v1.worker.worker_base import CompilationTimes, WorkerBase

from tyir.runtime_sim.serving.choosing import Chooser, Sampling, log_probabilities
from tyir.runtime_sim.session.batch_session import BatchSession

__all__ = ["TyirWorker"]


class _Mask:
    """Which tokens vLLM's grammar lets follow, for one step."""

    def __init__(self) -> None:
        self.bits: npt.NDArray[np.bool_] | None = None

    def allowed(self) -> npt.NDArray[np.bool_] | None:
        return self.bits

    def accept(self, token: int) -> None:
        self.bits = None  # the scheduler's grammar follows the text


@dataclass
class _Request:
    """A request under way; `scores` are of the prompt's tokens, where they were asked for."""

    prompt: list[int]
    params: Any
    slot: int
    computed: int = 0
    made: list[int] = field(default_factory=list)
    scores: list[tuple[list[int], list[float], int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        p = self.params
        self.mask = _Mask()
        self.choose = Chooser(
            Sampling(
                temperature=p.temperature,
                top_k=p.top_k,
                top_p=p.top_p,
                min_p=p.min_p,
                seed=p.seed,
                repetition_penalty=p.repetition_penalty,
                presence_penalty=p.presence_penalty,
                frequency_penalty=p.frequency_penalty,
                bias={int(k): float(v) for k, v in (p.logit_bias or {}).items()},
                allowed=frozenset(p.allowed_token_ids) if p.allowed_token_ids is not None else None,
                bad=tuple(map(tuple, p.bad_words_token_ids or ())),
            ),
            self.prompt,
            self.mask,
        )

    def ids(self, count: int) -> list[int]:
        return [*self.prompt, *self.made][self.computed : self.computed + count]

    def next(self, logits: npt.NDArray[np.float32]) -> int:
        early = len(self.made) < self.params.min_tokens
        token = self.choose(
            {"logits": logits}, self.made, sorted(self.params.all_stop_token_ids) if early else ()
        )
        self.made.append(token)
        return token


def _scored(logits: npt.NDArray[np.float32], token: int, count: int) -> tuple[list[int], list[float], int]:
    """A token and the `count` best (-1: all): ids, log-probabilities, and the token's rank from 1 on."""
    values = log_probabilities(logits)
    count = len(values) if count < 0 else count
    best = np.argsort(-values, kind="stable")[:count]
    ids = [token, *map(int, best)]
    return ids, [float(values[i]) for i in ids], int((values >= values[token]).sum())


def _table(rows: Sequence[tuple[list[int], list[float], int]]) -> tuple[Any, Any, Any]:
    """Rows of equal width, the shorter ones padded."""
    width = max(len(ids) for ids, _, _ in rows)
    ids = np.zeros((len(rows), width), np.int32)
    values = np.full((len(rows), width), -np.inf, np.float32)
    for number, (own, numbers, _) in enumerate(rows):
        ids[number, : len(own)], values[number, : len(own)] = own, numbers
    return ids, values, np.array([rank for _, _, rank in rows], np.int32)


class TyirWorker(WorkerBase):
    """All dies of the artifacts, in this process."""

    def __init__(self, vllm_config: Any, *arguments: Any, **named: Any) -> None:
        named.pop("shared_worker_lock", None)
        super().__init__(vllm_config, *arguments, **named)
        self._requests: dict[str, _Request] = {}
        self._rows: dict[str, npt.NDArray[np.float32]] = {}
        self._order: list[str] = []

    # ------------------------------------------------------------------------------------------------ start

    def init_device(self) -> None:
        self.device = torch.device("cpu")

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        self.session = BatchSession(Path(self.model_config.model))
        self._vocabulary = int(self.session.manifest.model["vocab_size"])

    def get_model(self) -> Any:
        raise NotImplementedError("the model is compiled: there is no module")

    def get_kv_cache_spec(self) -> dict[str, Any]:
        """A block for each slot; its bytes are nobody's."""
        return {
            "tyir.kv": FullAttentionSpec(
                block_size=self.cache_config.block_size, num_kv_heads=1, head_size=1, dtype=torch.float16
            )
        }

    def get_supported_kv_cache_layouts(self) -> list[str]:
        return ["LBNHC"]

    def determine_available_memory(self) -> int:
        """For the slots and vLLM's null block."""
        (spec,) = self.get_kv_cache_spec().values()
        return int((len(self.session.tokens) + 1) * spec.page_size_bytes)

    def update_max_model_len(self, max_model_len: int) -> None:
        self.model_config.max_model_len = max_model_len

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        if kv_cache_config.num_blocks < len(self.session.tokens) + 1:
            raise RuntimeError(
                f"vLLM made {kv_cache_config.num_blocks} blocks for {len(self.session.tokens)} slots"
            )

    def compile_or_warm_up_model(self) -> CompilationTimes:
        for seqlen in self.session.manifest.options.seqlens:
            self.session.step([[0] for _ in self.session.tokens], seqlen)
            self.session.reset()
        return CompilationTimes(language_model=0.0, encoder=0.0)

    def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    def synchronize_device(self) -> None:
        """A step is done when it returns."""

    # ------------------------------------------------------------------------------------------------ steps

    def execute_model(self, scheduler_output: Any) -> ModelRunnerOutput | None:
        self._follow(scheduler_output)
        counts = {r: n for r, n in scheduler_output.num_scheduled_tokens.items() if n}
        if not counts:
            return EMPTY_MODEL_RUNNER_OUTPUT
        feeds: list[list[int]] = [[] for _ in self.session.tokens]
        for name, count in counts.items():
            request = self._requests[name]
            self.session.rewind(request.slot, request.computed)
            feeds[request.slot] = request.ids(count)
        rows = self.session.feed(feeds)
        self._order = list(counts)
        self._rows = {}
        for name, count in counts.items():
            request = self._requests[name]
            own = rows[request.slot]
            self._score(request, own)
            request.computed += count
            if request.computed == len(request.prompt) + len(request.made):
                self._rows[name] = own[-1]
        return None

    def sample_tokens(self, grammar_output: Any) -> ModelRunnerOutput:
        if grammar_output is not None:
            self._restrict(grammar_output)
        sampled: list[list[int]] = []
        scores: list[tuple[list[int], list[float], int]] = []
        prompts: dict[str, LogprobsTensors | None] = {}
        wanted = any(self._requests[name].params.logprobs is not None for name in self._order)
        for name in self._order:
            request = self._requests[name]
            if name not in self._rows:
                sampled.append([])
                scores.append(([0], [0.0], 1))
                continue
            if request.scores and not request.made:
                ids, values, ranks = map(torch.from_numpy, _table(request.scores))
                prompts[name] = LogprobsTensors(ids, values, ranks)
                request.scores = []
            token = request.next(self._rows[name])
            sampled.append([token])
            scores.append(
                _scored(self._rows[name], token, request.params.logprobs or 0)
                if wanted
                else ([token], [0.0], 1)
            )
        return ModelRunnerOutput(
            req_ids=self._order,
            req_id_to_index={name: i for i, name in enumerate(self._order)},
            sampled_token_ids=sampled,
            logprobs=LogprobsLists(*_table(scores)) if wanted else None,
            prompt_logprobs_dict=prompts,
            pooler_output=[],
        )

    def _follow(self, output: Any) -> None:
        """Requests that came, went, or were moved."""
        for name in output.finished_req_ids:
            self._requests.pop(name, None)
        for new in output.scheduled_new_reqs:
            request = _Request(list(new.prompt_token_ids), new.sampling_params, new.block_ids[0][0] - 1)
            request.computed = new.num_computed_tokens
            self._requests[new.req_id] = request
        cached = output.scheduled_cached_reqs
        for name, blocks, computed in zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens):
            request = self._requests[name]
            if name in cached.resumed_req_ids and blocks is not None:
                request.slot = blocks[0][0] - 1
            request.computed = computed

    def _score(self, request: _Request, rows: npt.NDArray[np.float32]) -> None:
        """Note what the prompt's tokens are worth, of the rows from `request.computed` on."""
        asked = request.params.prompt_logprobs
        if asked is None or request.made:
            return
        following = request.prompt[request.computed + 1 : request.computed + 1 + len(rows)]
        request.scores += [_scored(row, token, asked) for row, token in zip(rows, following)]

    def _restrict(self, grammar: Any) -> None:
        """Bits of tokens that may follow, a row for each request that is held to a grammar."""
        for name, row in zip(grammar.structured_output_request_ids, grammar.grammar_bitmask):
            bits = np.unpackbits(np.ascontiguousarray(row).view(np.uint8), bitorder="little")
            if name in self._requests:
                self._requests[name].mask.bits = bits[: self._vocabulary].astype(np.bool_)

    def check_health(self) -> None:
        """It is in this process."""

    def shutdown(self) -> None:
        self._requests.clear()

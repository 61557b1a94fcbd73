"""vLLM's worker over a `BatchSession`: what its scheduler says is computed, and tokens go back.

Of vLLM it uses `WorkerBase`, the scheduler's output and the runner's, and the cache's description; how
tokens are chosen is tyir's, so that equal requests get equal answers from `tyir-serve`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, LogprobsLists, LogprobsTensors, ModelRunnerOutput
from vllm.v1.worker.worker_base import CompilationTimes, WorkerBase

from tyir.runtime_sim.session.batch_session import BatchSession
from vllm_tyir.requests import Request, Scored, scored, table
from vllm_tyir.settings import Execution

__all__ = ["TyirWorker"]


class TyirWorker(WorkerBase):
    """All dies of the artifacts, in this process."""

    def __init__(self, vllm_config: Any, *arguments: Any, **named: Any) -> None:
        super().__init__(vllm_config, *arguments, **named)
        self._requests: dict[str, Request] = {}
        self._ready: dict[str, dict[str, Any]] = {}  # outputs at the last position of whoever gets a token
        self._order: list[str] = []  # of the requests in the step

    # ------------------------------------------------------------------------------------------------ start

    def init_device(self) -> None:
        self.device = torch.device("cpu")

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        execution = Execution.of(self.vllm_config)
        folder = Path(self.model_config.model)
        self.session = BatchSession(folder, execution.engine, threads=execution.threads)
        self._vocabulary = int(self.session.manifest.model["vocab_size"])

    def get_kv_cache_spec(self) -> dict[str, Any]:
        """A block for each slot; its bytes are nobody's."""
        size = self.session.manifest.options.max_kv
        return {
            "tyir.kv": FullAttentionSpec(block_size=size, num_kv_heads=1, head_size=1, dtype=torch.float16)
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
        blocks, slots = kv_cache_config.num_blocks, len(self.session.tokens)
        if blocks != slots + 1:
            raise RuntimeError(f"vLLM made {blocks} blocks for {slots} slots and its null block")

    def compile_or_warm_up_model(self) -> CompilationTimes:
        """One step of each length: what is loaded when first used is loaded."""
        for seqlen in self.session.manifest.options.dense_seqlens:
            self.session.step([[0] for _ in self.session.tokens], seqlen)
            self.session.reset()
        return CompilationTimes(language_model=0.0, encoder=0.0)

    def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    def synchronize_device(self) -> None:
        """A step is done when it returns."""

    def check_health(self) -> None:
        """It is in this process."""

    def shutdown(self) -> None:
        self._requests.clear()

    # ------------------------------------------------------------------------------------------------ steps

    def execute_model(self, scheduler_output: Any) -> ModelRunnerOutput | None:
        """Compute what is scheduled; `sample_tokens` follows, but where there was nothing to compute."""
        self._follow(scheduler_output)
        counts = {name: n for name, n in scheduler_output.num_scheduled_tokens.items() if n}
        if not counts:
            return EMPTY_MODEL_RUNNER_OUTPUT
        session = self.session
        asked = {name: self._requests[name] for name in counts}
        feeds: list[list[int]] = [[] for _ in session.tokens]
        for request in asked.values():
            session.rewind(request.slot, request.computed)
            feeds[request.slot] = request.ids(counts[request.name])
        lengths = [len(known) for known in session.tokens]
        for request in asked.values():
            lengths[request.slot] = request.length
        scores = any(request.scores_prompt for request in asked.values())
        most = [self.model_config.max_model_len] * len(feeds)  # vLLM's rule for two rotary tables
        rows = session.advance(feeds, last=not scores, lengths=lengths, most=most)
        self._order, self._ready = list(counts), {}
        for name, request in asked.items():
            own = rows[request.slot]
            if request.scores_prompt:
                request.score(np.asarray(own["logits"], np.float32))
            request.computed += counts[name]
            if request.computed == request.length:
                self._ready[name] = {output: array[-1] for output, array in own.items()}
        return None

    def sample_tokens(self, grammar_output: Any) -> ModelRunnerOutput:
        """The next token of each request whose tokens are all computed."""
        if grammar_output is not None:
            self._restrict(grammar_output)
        sampled: list[list[int]] = []
        scores: list[Scored] = []
        prompts: dict[str, LogprobsTensors | None] = {}
        wanted = any(self._requests[name].params.logprobs is not None for name in self._ready)
        for name in self._order:
            request, outputs = self._requests[name], self._ready.get(name)
            tokens = [] if outputs is None else [request.next(outputs)]
            sampled.append(tokens)
            count = request.params.logprobs
            if outputs is None or count is None:
                scores.append(([0], [0.0], 1))  # a row that vLLM does not read
            else:
                scores.append(scored(outputs, tokens[0], count))
            if outputs is not None and request.scores:
                prompts[name] = LogprobsTensors(*map(torch.from_numpy, table(request.scores)))
                request.scores = []
        return ModelRunnerOutput(
            req_ids=self._order,
            req_id_to_index={name: i for i, name in enumerate(self._order)},
            sampled_token_ids=sampled,
            logprobs=LogprobsLists(*table(scores)) if wanted else None,
            prompt_logprobs_dict=prompts,
            pooler_output=[],
        )

    def _follow(self, output: Any) -> None:
        """Requests that came, went, or were taken up again in another slot."""
        for name in output.finished_req_ids:
            self._requests.pop(name, None)
        for new in output.scheduled_new_reqs:
            request = self._requests.get(new.req_id)
            if request is None:
                request = Request(new.req_id, list(new.prompt_token_ids), new.sampling_params, 0)
                self._requests[new.req_id] = request
            request.slot, request.computed = _slot(new.block_ids), new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        for name, blocks, computed in zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens):
            request = self._requests[name]
            if name in cached.resumed_req_ids and blocks is not None:
                request.slot = _slot(blocks)
            request.computed = computed

    def _restrict(self, grammar: Any) -> None:
        """Bits of tokens that may follow, a row for each request that is held to a grammar."""
        for name, row in zip(grammar.structured_output_request_ids, grammar.grammar_bitmask):
            if name in self._requests:
                bits = np.unpackbits(np.ascontiguousarray(row).view(np.uint8), bitorder="little")
                self._requests[name].mask.bits = bits[: self._vocabulary].astype(np.bool_)


def _slot(blocks: Any) -> int:
    """Of the blocks of a request, one group of one block."""
    return int(blocks[0][0]) - 1

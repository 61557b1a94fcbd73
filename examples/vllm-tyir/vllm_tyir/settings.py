"""vLLM's settings held against the artifacts': what is read from them, and what they cannot do."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, Self, cast

from tyir.diagnostics import TyirError, did_you_mean
from tyir.manifest import Manifest
from tyir.process.cores import usable_cores
from tyir.runtime_sim.session.session import ENGINES, EngineName

__all__ = ["Execution", "fit", "manifest_of"]

# What vLLM takes for --max-num-seqs where it is not given, by the kind of program and the device's memory:
# twice as many for --performance-mode throughput.  One of these is not a wish.
_VLLM_CHOSE: Final = frozenset({128, 256, 512, 1024, 2048})


@dataclass(frozen=True)
class Execution:
    """How steps are executed, from `--additional-config '{"engine": "host", "threads": 2}'`.

    `threads` of the engine `host`: None for all cores that the process may use.
    """

    engine: EngineName = "host"
    threads: int | None = None

    @classmethod
    def of(cls, vllm_config: Any) -> Self:
        """`ValueError` for a key, an engine or a number that there is not."""
        given = vllm_config.additional_config or {}
        if not isinstance(given, dict):
            raise ValueError("--additional-config must be a JSON object")
        known = [f.name for f in fields(cls)]
        for key in given:
            if key not in known:
                near = did_you_mean(str(key), known) or f"it takes {', '.join(known)}"
                raise ValueError(f"--additional-config has no '{key}'; {near}")
        engine, threads = given.get("engine", "host"), given.get("threads")
        if engine not in ENGINES:
            near = did_you_mean(str(engine), ENGINES) or f"one of {', '.join(ENGINES)}"
            raise ValueError(f"--additional-config: there is no engine '{engine}'; {near}")
        whole = isinstance(threads, int) and not isinstance(threads, bool)
        if threads is not None and not (whole and 1 <= threads <= usable_cores()):
            raise ValueError(
                f"--additional-config: threads {threads!r} is out of range;"
                f" this process may use 1 to {usable_cores()}"
            )
        if threads is not None and engine != "host":
            raise ValueError(
                f"--additional-config: the engine '{engine}' runs in one thread; leave threads out"
            )
        return cls(cast(EngineName, engine), threads)


def manifest_of(model: str) -> Manifest:
    """The manifest of the folder that vLLM was given; `ValueError` when it is not one of artifacts."""
    try:
        return Manifest.load(Path(model), check=False)
    except TyirError as error:
        raise ValueError(
            f"vllm-tyir serves artifacts of tyir-compile: {error}\n"
            "for vLLM's own models uninstall vllm-tyir, or set VLLM_PLUGINS to the plug-ins to use"
        ) from None


def fit(vllm_config: Any, manifest: Manifest) -> None:
    """Make vLLM's settings the artifacts'; `ValueError` names all that was asked for and cannot be done.

    A block of vLLM's cache is a slot of the artifacts' batch, with room for all of a sequence: block 0 is
    vLLM's own, block i + 1 is slot i.  So nothing is ever moved out, and no block is shared.
    """
    if problems := _problems(vllm_config, manifest):
        raise ValueError("vllm-tyir cannot serve this:\n" + "\n".join(f"  {p}" for p in problems))
    options = manifest.options
    model, scheduler, cache, parallel = _parts(vllm_config)
    longest = max(options.dense_seqlens)
    model.max_model_len = min(model.max_model_len, options.max_kv)
    scheduler.max_num_seqs = min(scheduler.max_num_seqs, options.batch)
    scheduler.max_num_batched_tokens = max(longest * options.batch, scheduler.max_num_seqs)
    scheduler.long_prefill_token_threshold = longest
    scheduler.enable_chunked_prefill = True
    scheduler.async_scheduling = False  # a step's tokens are known when it returns
    cache.block_size = options.max_kv
    cache.user_specified_block_size = True
    cache.enable_prefix_caching = False  # vLLM shares full blocks, and a slot is never one that is shared
    parallel.worker_cls = "vllm_tyir.worker.TyirWorker"
    parallel.disable_custom_all_reduce = True


def _parts(vllm_config: Any) -> tuple[Any, Any, Any, Any]:
    return (
        vllm_config.model_config,
        vllm_config.scheduler_config,
        vllm_config.cache_config,
        vllm_config.parallel_config,
    )


def _problems(vllm_config: Any, manifest: Manifest) -> list[str]:
    """What was asked for and is not in the artifacts, with what to do about it."""
    options = manifest.options
    model, scheduler, cache, parallel = _parts(vllm_config)
    asked_length = getattr(model, "original_max_model_len", None) or 0
    dies = (
        f"the artifacts hold {options.dies} and run them in one worker: leave it out, or compile with --dies"
    )
    own_quantization = getattr(model.hf_config, "quantization_config", None) is not None
    table = [
        (parallel.tensor_parallel_size != 1,
         f"--tensor-parallel-size {parallel.tensor_parallel_size}: dies are not vLLM's ranks, {dies}"),
        (parallel.pipeline_parallel_size != 1,
         f"--pipeline-parallel-size {parallel.pipeline_parallel_size}: dies are not vLLM's ranks, {dies}"
         " and --pp"),
        (parallel.data_parallel_size != 1,
         f"--data-parallel-size {parallel.data_parallel_size}: start one server for each"),
        (asked_length > options.max_kv,
         f"--max-model-len {asked_length}: the artifacts' caches hold {options.max_kv} tokens, compile with"
         f" --max-kv {asked_length}"),
        (scheduler.max_num_seqs > options.batch and scheduler.max_num_seqs not in _VLLM_CHOSE,
         f"--max-num-seqs {scheduler.max_num_seqs}: the artifacts run {options.batch} at once, compile with"
         f" --batch {scheduler.max_num_seqs}"),
        (cache.user_specified_block_size and cache.block_size != options.max_kv,
         f"--block-size {cache.block_size}: a block is a sequence of {options.max_kv} tokens, leave it out"),
        (model.quantization is not None and not own_quantization,
         f"--quantization {model.quantization}: weights are in the artifacts, compile with --weights"),
        (cache.cache_dtype not in ("auto", None),
         f"--kv-cache-dtype {cache.cache_dtype}: caches are the artifacts', compile with --kv-dtype"),
        (vllm_config.lora_config is not None,
         "--enable-lora: give the adapter's folder to tyir-compile, which merges it"),
        (vllm_config.speculative_config is not None,
         "--speculative-config: there is no draft model in the artifacts, leave it out"),
        (vllm_config.kv_transfer_config is not None,
         "--kv-transfer-config: caches stay with the artifacts, leave it out"),
        (model.runner_type == "pooling", "--runner pooling: artifacts return the next token, not embeddings"),
        (bool(getattr(model, "enable_prompt_embeds", False)), "--enable-prompt-embeds: prompts are tokens"),
        (bool(getattr(model, "logits_processors", None)),
         "--logits-processors: tokens are chosen by tyir, leave it out"),
        (getattr(model, "logprobs_mode", "raw_logprobs") != "raw_logprobs",
         "--logprobs-mode: log-probabilities are of the logits as they come (raw_logprobs)"),
        (manifest.vision is not None, "artifacts that see pictures: use tyir-serve"),
    ]  # fmt: skip
    return [what for is_asked, what in table if is_asked]

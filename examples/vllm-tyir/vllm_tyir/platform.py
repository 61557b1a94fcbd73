"""What vLLM asks of a platform: which worker, how many sequences, how long, and what cannot be done.

Dies, batch and lengths are in the artifacts, so most settings are read from manifest.json.  A block of vLLM's
cache is a slot of the artifacts' batch: block 0 is vLLM's own, block i + 1 is slot i.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from vllm.platforms.interface import Platform, PlatformEnum

from tyir.manifest import Manifest

__all__ = ["TyirPlatform"]


class TyirPlatform(Platform):
    """tyir's artifacts, executed by their runtime in vLLM's process."""

    _enum = PlatformEnum.OOT
    device_name = "tyir"
    device_type = "cpu"  # where vLLM's own tensors are
    dispatch_key = "CPU"
    dist_backend = "gloo"
    supported_quantization: list[str] = []  # noqa: RUF012 - empty is all: weights are in the artifacts

    @property
    def supported_dtypes(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def import_kernels(cls) -> None:
        """None: vLLM's may be for another processor."""

    @classmethod
    def import_ir_kernels(cls) -> None:
        """None."""

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        return "tyir"

    @classmethod
    def get_device_total_memory(cls, device_id: int = 0) -> int:
        return 1 << 40  # caches are the runtime's, vLLM allocates none

    @classmethod
    def inference_mode(cls) -> Any:
        return torch.no_grad()

    @classmethod
    def set_device(cls, device: torch.device) -> None:
        """There is one."""

    @classmethod
    def manual_seed_all(cls, seed: int) -> None:
        torch.manual_seed(seed)

    @classmethod
    def is_pin_memory_available(cls) -> bool:
        return False

    @classmethod
    def update_block_size_for_backend(cls, vllm_config: Any) -> None:
        """It is set already: a block is a slot."""

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        """`ValueError` for what artifacts cannot do, in the words of vLLM's options."""
        model = vllm_config.model_config
        if model is None:
            return
        options = Manifest.load(Path(model.model)).options
        parallel, scheduler, cache = (
            vllm_config.parallel_config, vllm_config.scheduler_config, vllm_config.cache_config
        )  # fmt: skip
        refused = {
            "--tensor-parallel-size, --pipeline-parallel-size: compile with --dies": parallel.world_size > 1,
            "--data-parallel-size: start a server for each": parallel.data_parallel_size > 1,
            "--enable-lora: merge it before compiling": vllm_config.lora_config is not None,
            "--speculative-config": vllm_config.speculative_config is not None,
            "--runner pooling": model.runner_type == "pooling",
            f"artifacts with --output {options.output}: compile with --output logits":
                options.output != "logits",
            "artifacts that take embeddings or pictures": options.embedding_as_input,
        }  # fmt: skip
        if problems := [what for what, is_asked in refused.items() if is_asked]:
            raise ValueError(f"vllm-tyir cannot serve this: {'; '.join(problems)}")
        parallel.worker_cls = "vllm_tyir.worker.TyirWorker"
        parallel.disable_custom_all_reduce = True
        longest = max(options.seqlens)
        model.max_model_len = min(model.max_model_len, options.max_kv)
        scheduler.max_model_len = model.max_model_len
        scheduler.max_num_seqs = min(scheduler.max_num_seqs, options.batch)
        scheduler.max_num_batched_tokens = max(longest * options.batch, scheduler.max_num_seqs)
        scheduler.long_prefill_token_threshold = longest
        for name in ("enable_chunked_prefill", "chunked_prefill_enabled"):
            if hasattr(scheduler, name):
                setattr(scheduler, name, True)
        scheduler.async_scheduling = False
        cache.block_size = options.max_kv
        cache.user_specified_block_size = True
        cache.enable_prefix_caching = False  # a block is a whole slot: none is ever full

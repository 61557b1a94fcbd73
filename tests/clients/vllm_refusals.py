"""Run by the environment `vllm`: what the plug-in says of options and of requests, as JSON.

python vllm_refusals.py ARTIFACTS ARTIFACTS_TOPK CHECKPOINT
"""

from __future__ import annotations

import json
import sys
from typing import Any

from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.sampling_params import StructuredOutputsParams

OPTIONS: dict[str, dict[str, Any]] = {
    "tensor_parallel_size": {"tensor_parallel_size": 2},
    "max_model_len": {"max_model_len": 1024},
    "max_num_seqs": {"max_num_seqs": 9},
    "quantization": {"quantization": "fp8"},
    "enable_lora": {"enable_lora": True},
    "speculative_config": {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
    "kv_cache_dtype": {"kv_cache_dtype": "fp8"},
    "block_size": {"block_size": 32},
    "logprobs_mode": {"logprobs_mode": "processed_logits"},
    "engine": {"additional_config": {"engine": "hots"}},
    "threads": {"additional_config": {"threads": 0}},
    "key": {"additional_config": {"thread": 1}},
}
REQUESTS: dict[str, dict[str, Any]] = {
    "logprobs": {"temperature": 0, "logprobs": 8},
    "many logprobs": {"temperature": 0, "logprobs": 9},
    "prompt_logprobs": {"temperature": 0, "prompt_logprobs": 1},
    "top_p": {"top_p": 0.5},
    "structured_outputs": {"temperature": 0, "structured_outputs": StructuredOutputsParams(regex="a+")},
    "bad_words": {"temperature": 0, "bad_words": ["the"]},
    "logit_bias": {"temperature": 0, "logit_bias": {5: 1.0}},
    "top_k": {"top_k": 8, "top_p": 0.9, "min_p": 0.1},
    "greedy": {"temperature": 0},
}


def refusal(folder: str, **options: Any) -> str:
    """What is said of options, nothing when they are taken."""
    try:
        EngineArgs(model=folder, **options).create_engine_config()
    except Exception as error:
        return str(error)
    return ""


def main() -> None:
    folder, best, checkpoint = sys.argv[1:]
    said = {name: refusal(folder, **options) for name, options in OPTIONS.items()}
    said["checkpoint"] = refusal(checkpoint)
    made = EngineArgs(model=folder).create_engine_config()
    scheduler, cache = made.scheduler_config, made.cache_config
    settled = [
        made.model_config.max_model_len, scheduler.max_num_seqs, scheduler.max_num_batched_tokens,
        scheduler.long_prefill_token_threshold, scheduler.async_scheduling, cache.enable_prefix_caching,
        cache.block_size,
    ]  # fmt: skip
    EngineArgs(model=best).create_engine_config()
    requests = {}
    for name, fields in REQUESTS.items():
        try:
            current_platform.validate_request({}, SamplingParams(**fields))
            requests[name] = ""
        except ValueError as error:
            requests[name] = str(error)
    print(json.dumps({"options": said, "settled": settled, "requests": requests}))


if __name__ == "__main__":
    main()

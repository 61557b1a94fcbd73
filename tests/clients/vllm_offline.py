"""Run by the environment `vllm`: tokens of artifacts from vLLM's `LLM`, as JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

from vllm import LLM, SamplingParams


def main() -> None:
    llm = LLM(sys.argv[1])
    prompts: list[Any] = [{"prompt_token_ids": p} for p in ([5, 17, 300], [42], list(range(100, 180)))]

    def tokens(**fields: Any) -> list[list[int]]:
        params = SamplingParams(max_tokens=8, ignore_eos=True, **fields)
        return [list(r.outputs[0].token_ids) for r in llm.generate(prompts, params, use_tqdm=False)]

    sampling = {"temperature": 1.0, "top_k": 8, "top_p": 0.95, "seed": 7}
    found = {"greedy": tokens(temperature=0), "sampled": tokens(**sampling), "again": tokens(**sampling)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()

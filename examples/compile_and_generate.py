"""From a checkpoint folder to text, in Python: `python compile_and_generate.py MODEL_DIR OUT [PROMPT]`."""

from __future__ import annotations

import sys
from pathlib import Path

from tyir import build_and_compile_llm
from tyir.runtime_sim.session.sampling import make_sampler
from tyir.runtime_sim.session.session import Session
from tyir.tools.run.end_tokens import end_tokens
from tyir.tools.tokenizer import load_tokenizer


def main(model: Path, out: Path, prompt: str = "The old house stood at the end of") -> None:
    folder = build_and_compile_llm(
        model, out, max_kv_cache_size=128, seq_len_list=[1, 8], dev_count=1, weights="int4"
    )
    session = Session(folder)  # the compiled host code; "interpreter" and "edge10" are the other engines
    tokenizer = load_tokenizer(session.artifacts)
    stops = end_tokens(session.artifacts, tokenizer)
    ids = tokenizer.encode(prompt)

    greedy = list(session.generate(ids, 16, stop=stops.__contains__))
    print(f"greedy:  {prompt}{tokenizer.decode(greedy)}")

    sampler = make_sampler(temperature=0.8, top_k=40, top_p=1.0, seed=1)
    sampled = list(session.generate(ids, 16, sampler=sampler, stop=stops.__contains__))
    print(f"sampled: {prompt}{tokenizer.decode(sampled)}")

    logits = session.prefill(ids)  # [1, vocabulary], f32: what follows the last token
    best = sorted(range(logits.shape[1]), key=lambda token: -logits[-1, token])[:3]
    print("next, most likely first:", [tokenizer.decode([token]) for token in best])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])

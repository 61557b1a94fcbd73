"""Several sequences at once, and a conversation that is saved and gone on with: `python batch_and_cache.py MODEL_DIR OUT`."""  # noqa: E501

from __future__ import annotations

import sys
from pathlib import Path

from tyir.runtime_sim.session.batch_session import BatchSession
from tyir.runtime_sim.session.session import Session
from tyir.tools.api import compile_path
from tyir.tools.tokenizer import load_tokenizer


def main(model: Path, out: Path) -> None:
    # what is not named has the defaults of tyir-compile
    folder = compile_path(model, out, {"dies": 1, "batch": 2, "seqlens": (1, 8), "max_kv": 128})
    tokenizer = load_tokenizer(folder)

    prompts = ["The old house", "She looked at him for a moment"]
    batch = BatchSession(folder)  # weights are read once a step for both
    for prompt, made in zip(prompts, batch.generate([tokenizer.encode(p) for p in prompts], limit=8)):
        print(f"{prompt}|{tokenizer.decode(made)}")

    first = tokenizer.encode("It was a cold morning.")
    session = Session(folder)  # one sequence of the two
    answer = list(session.generate(first, 8))
    session.save(out / "conversation.npz")

    later = Session(folder)
    later.restore(out / "conversation.npz")
    second = [*first, *answer, *tokenizer.encode(" In the evening")]
    print(f"{later.shared_prefix(second)} of {len(second)} tokens are in the cache")
    print(tokenizer.decode(list(later.generate(second, 8))))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

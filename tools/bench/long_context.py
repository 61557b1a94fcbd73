"""What a million tokens take: the tables of docs/long-context.md, from the plans of `tyir-compile --plan`.

    python -m tyir.tools.bench.long_context                   bytes: both models, 32k to 1M tokens, 1 to 16 dies
    python -m tyir.tools.bench.long_context --times 7b:4:1 7b:16:4    simulated times, model:dies:stages

The models are Qwen2.5-7B-Instruct-1M and Qwen2.5-14B-Instruct-1M, by their public config.json alone.  Times
are those of the shipped, uncalibrated machine file.
"""  # noqa: E501

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from tyir.tools.cli import ToolParser, run_tool
from tyir.tools.commands.build_arguments import numbers, sparse

__all__ = ["CONFIGS", "LENGTHS", "main"]

# https://huggingface.co/Qwen/Qwen2.5-7B-Instruct-1M/blob/main/config.json, and that of the 14B
_COMMON: Final[dict[str, Any]] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "max_position_embeddings": 1010000,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 152064,
    "dual_chunk_attention_config": {
        "chunk_size": 262144,
        "local_size": 8192,
        "original_max_position_embeddings": 262144,
    },
}
CONFIGS: Final[dict[str, dict[str, Any]]] = {
    "7b": {
        **_COMMON,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
    },
    "14b": {
        **_COMMON,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_attention_heads": 40,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
        "sliding_window": 1010000,
    },
}
LENGTHS: Final = (32768, 131072, 262144, 1010000)
_DIES: Final = ((1, 1), (4, 1), (8, 1), (16, 1), (16, 2), (16, 4))


@run_tool
def main(argv: Sequence[str]) -> int:
    """Entry point."""
    args = _parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folders = {name: Path(temporary) / name for name in CONFIGS}
        for name, folder in folders.items():
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
        times = _times(folders, args)
        for line in times if args.times else _bytes(folders):
            print(line, flush=True)
    return 0


def _bytes(folders: dict[str, Path]) -> Iterator[str]:
    """Bytes of the fullest die, of int4 weights; in brackets what does not fit."""
    from tyir.manifest import BuildOptions
    from tyir.targets.machine import load_machine
    from tyir.tools.estimate.die_needs import DieNeeds
    from tyir.tools.estimate.shape import read_shape

    capacity = load_machine().dram.capacity_bytes
    for name, folder in folders.items():
        for cache in ("fp16", "int8", "int4"):
            yield f"\n{name}, int4 weights, {cache} cache: GiB on the fullest die\n"
            yield "| dies | stages | " + " | ".join(f"{n:,}" for n in LENGTHS) + " | longest |"
            yield "| ---: | ---: |" + " ---: |" * (len(LENGTHS) + 1)
            for dies, stages in _DIES:
                options = BuildOptions(dies=dies, pp=stages, seqlens=(1, 96), weights="int4", kv_dtype=cache)
                needs = DieNeeds(read_shape(folder), options)
                row = []
                for tokens in LENGTHS:
                    size = max(need.total for need in needs.needs(dies, tokens))
                    row.append(f"{size / 2**30:.2f}" if size <= capacity else f"({size / 2**30:.2f})")
                most, split = needs.longest(dies, int(capacity))
                longest = f"{most:,}" + (" (by tokens)" if split == "tokens" else "")
                yield f"| {dies} | {stages} | " + " | ".join([*row, longest]) + " |"


def _times(folders: dict[str, Path], args: argparse.Namespace) -> Iterator[str]:
    from tyir.manifest import BuildOptions
    from tyir.targets.machine import load_machine
    from tyir.tools.estimate.long_context import prompt_cost
    from tyir.tools.estimate.plan_text import duration
    from tyir.tools.estimate.shape import read_shape

    yield "| model | dies | stages | tokens | prefill | ... with overlapped stages | ms a token |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    for which in args.times or ():
        name, dies, stages = which.split(":")
        for tokens in args.lengths:
            options = BuildOptions(
                dies=int(dies),
                pp=int(stages),
                seqlens=args.seqlens,
                max_kv=tokens,
                weights="int4",
                kv_dtype=args.kv_dtype,
                output=args.output,
                output_rows=args.output_rows,
                sparse_prefill=args.sparse_prefill,
            )
            cost = prompt_cost(read_shape(folders[name]), options, load_machine())
            overlapped = "-" if cost.overlapped is None else duration(cost.overlapped)
            yield (
                f"| {name} | {dies} | {stages} | {tokens:,} | {duration(cost.prefill)} | {overlapped}"
                f" | {1000 * cost.token:.0f} |"
            )


def _parser() -> argparse.ArgumentParser:
    parser = ToolParser(prog="bench_long_context", description="What long contexts take, from plans.")
    parser.add_argument(
        "--times", nargs="+", metavar="MODEL:DIES:STAGES", help="simulated times instead of bytes: 7b:4:1"
    )
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=LENGTHS, metavar="N", help="tokens of prompt and cache"
    )
    parser.add_argument(
        "--output-rows",
        choices=("all", "last"),
        default="all",
        help="of times: whether a step computes the head for all of its tokens (default) or for the last",
    )
    parser.add_argument(
        "--output", default="logits", metavar="KIND", help="of times: what a step returns (default: logits)"
    )
    parser.add_argument(
        "--seqlens", type=numbers, default=(1, 96), metavar="N,N,..", help="of times: tokens per step"
    )
    parser.add_argument(
        "--kv-dtype", choices=("fp16", "int8", "int4"), default="fp16", help="of times: what caches hold"
    )
    parser.add_argument(
        "--sparse-prefill", type=sparse, default=(), metavar="keep=N,..", help="of times: as tyir-compile's"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())

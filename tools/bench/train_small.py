"""A small trained model to judge a quantisation by (`tyir.tools.quantize.table`), of text that somebody has.

    python -m tyir.tools.bench.train_small llama OUT --text NOVELS.txt --tokenizer tests/models/tiny-qwen2

7 M parameters, at most a few minutes on a GPU, an hour or more on a CPU.  Random weights do not do: what they
lose to rounding says nothing, as no channel of theirs is louder than another.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from tyir.diagnostics import TyirError
from tyir.process.progress import track
from tyir.tools.cli import ToolParser, note, run_tool

__all__ = ["FAMILIES", "main", "trained"]

_SIZES: Final = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_attention_heads": 8,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
}
FAMILIES: Final[dict[str, dict[str, Any]]] = {
    "llama": {"num_hidden_layers": 7, "num_key_value_heads": 4, "tie_word_embeddings": False},
    "qwen3": {"num_hidden_layers": 8, "num_key_value_heads": 2, "tie_word_embeddings": True},
}
_WINDOW: Final = 512  # tokens
# Of AdamW: up to its highest in a tenth of the steps, 100 at most, and down to a twentieth by half a cosine.
_RATE: Final = 2.5e-3
_UP: Final = 100


def trained(family: str, tokenizer: Any, ids: Any, steps: int, batch: int, device: str, seed: int) -> Any:
    """The transformers model of a family after so many steps of `batch` windows of `ids` [T], in f16."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    sizes = {"vocab_size": len(tokenizer), **_SIZES, **FAMILIES[family]}
    config = AutoConfig.for_model(family, **sizes, **ends)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _shape(steps))
    data, span = ids.to(device), torch.arange(_WINDOW + 1, device=device)
    for _ in track(range(steps), f"training {family}", "step", show=True):
        windows = data[torch.randint(len(data) - _WINDOW, (batch, 1), device=device) + span]
        with torch.autocast(device.partition(":")[0], torch.bfloat16, enabled=device != "cpu"):
            logits = model(windows[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.half().cpu()


def _shape(steps: int) -> Callable[[int], float]:
    """Of the learning rate, over the steps."""
    up = min(_UP, max(1, steps // 10))
    return lambda step: min(1, (step + 1) / up) * (0.525 + 0.475 * math.cos(math.pi * step / steps))


@run_tool
def main(argv: Sequence[str]) -> int:
    """Entry point."""
    args = _parser().parse_args(argv)
    import torch

    from tyir.tools.quantize.quantize import check_device
    from tyir.tools.quantize.text_files import texts_of
    from tyir.tools.tokenizer import load_tokenizer

    check_device(args.device)
    for name, value in (("--steps", args.steps), ("--batch", args.batch)):
        if value < 1:
            raise TyirError(f"{name} {value}", help="at least 1")
    if args.out.exists():
        raise TyirError(f"{args.out} is there already", help="give another folder")
    tokenizer = load_tokenizer(args.tokenizer)
    text = "\n\n".join(part for file in args.text for part in texts_of(file))
    ids = torch.tensor(tokenizer(text)["input_ids"], dtype=torch.long)
    note(f"{len(ids)} tokens")
    if len(ids) <= _WINDOW:
        raise TyirError(f"{len(ids)} tokens of text", help=f"a window is {_WINDOW}: give a longer text")
    model = trained(args.family, tokenizer, ids, args.steps, args.batch, args.device, args.seed)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(args.out)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = ToolParser(prog="python -m tyir.tools.bench.train_small", description=__doc__)
    parser.add_argument("family", choices=sorted(FAMILIES))
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the checkpoint")
    parser.add_argument("--text", type=Path, nargs="+", required=True, metavar="FILE", help="what it learns")
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="HF_DIR", help="whose tokens")
    parser.add_argument("--steps", type=int, default=1100, metavar="N", help="default 1100")
    parser.add_argument("--batch", type=int, default=64, metavar="B", help="windows a step, default 64")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="default 0")
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help="torch's, as cuda (default cpu)")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())

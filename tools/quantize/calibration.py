"""The tokens a search looks at, and those a perplexity is measured on: windows of one length.

Without a file it is what the model itself generates.  Texts are joined by a blank line and tokenised as one,
without special tokens but those the tokenizer puts in front; the tokens are cut into windows, a last one that
is not full is dropped.  Of more windows than are wanted, some are drawn at random (seeded), in the order of
the text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch

from tyir.diagnostics import TyirError
from tyir.tools.quantize.text_files import texts_of
from tyir.tools.tokenizer import load_tokenizer

__all__ = ["drawn", "generated_windows", "text_windows"]

Tensor = Any
_MAX_GENERATING: Final = 4 << 30  # bytes of f32 weights that the model's own generations may take
_BATCH: Final = 16
# Entries of a config that name tokens in whose place pictures stand: no text has them.
_OF_PICTURES: Final = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


def text_windows(folder: Path, source: Path, window: int, characters: int | None = None) -> Tensor:
    """The windows [S, window] of a text, of its first `characters`; `TyirError` when it has not one."""
    text = "\n\n".join(texts_of(source))[:characters]
    ids = torch.tensor(load_tokenizer(folder)(text)["input_ids"], dtype=torch.long)
    count = len(ids) // window
    if not count:
        raise TyirError(
            f"{source} has {len(ids)} tokens, less than one window of {window}",
            help=f"give a longer text, or --window {max(8, len(ids))}",
        )
    return ids[: count * window].reshape(count, window)


def drawn(windows: Tensor, samples: int, seed: int) -> Tensor:
    """At most `samples` of the windows [S, T], in their order."""
    if len(windows) <= samples:
        return windows
    chosen = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[:samples]
    return windows[chosen.sort().values]


def generated_windows(folder: Path, window: int, samples: int, seed: int) -> Tensor:
    """Windows [samples, window] of the model's own text: first tokens drawn evenly, all others from what the
    model makes of them.

    The whole model is held for it, in f32; `TyirError` for one that is too large.
    """
    from tyir.frontends.dense_state import dense_state
    from tyir.frontends.torch_export import build_plain_model

    with torch.device("meta"):
        size = 4 * sum(p.numel() for p in build_plain_model(folder).parameters())
    if size > _MAX_GENERATING:
        raise TyirError(
            f"the model has {size / 2**30:.1f} GiB of f32 weights, too much for generating calibration text",
            help="give a text: --calibration FILE",
        )
    model = build_plain_model(folder)
    with torch.no_grad():
        for name, array in dense_state(folder):
            model.get_parameter(name).copy_(torch.tensor(array))
    model.tie_weights()
    config = model.config.get_text_config()
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        first = torch.randint(config.vocab_size, (samples, 1))
        pictures = [i for key, i in vars(model.config).items() if key.endswith(_OF_PICTURES)]
        first[torch.isin(first, torch.tensor(pictures, dtype=first.dtype))] = 0
        parts = []
        for start in range(0, samples, _BATCH):
            begin = first[start : start + _BATCH]
            parts.append(
                model.generate(
                    begin,
                    attention_mask=torch.ones_like(begin),
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    eos_token_id=None,
                    pad_token_id=0,
                    min_new_tokens=window - 1,
                    max_new_tokens=window - 1,
                    suppress_tokens=pictures or None,
                )
            )
        return torch.cat(parts)
    finally:
        torch.random.set_rng_state(state)

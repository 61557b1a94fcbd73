"""The tokens a search looks at, and those a perplexity is measured on: windows of one length.

| source | what is read |
| --- | --- |
| `*.jsonl` | one JSON object a line, its field `text` (or `content`), or a JSON string |
| `*.parquet` | the column `text` (or `content`); needs pyarrow |
| any other file | UTF-8 text, as a whole |
| nothing | what the model itself generates |

Texts are joined by a blank line and tokenised as one, without special tokens but those the tokenizer puts in
front; the tokens are cut into windows, a last one that is not full is dropped.  Of more windows than are
wanted, some are drawn at random (seeded), in the order of the text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch

from tyir.diagnostics import TyirError
from tyir.process.files import open_regular
from tyir.tools.tokenizer import load_tokenizer

__all__ = ["drawn", "generated_windows", "text_windows"]

Tensor = Any
_FIELDS: Final = ("text", "content")
_MAX_GENERATING: Final = 4 << 30  # bytes of f32 weights that the model's own generations may take
_BATCH: Final = 16
# Entries of a config that name tokens in whose place pictures stand: no text has them.
_OF_PICTURES: Final = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


def text_windows(folder: Path, source: Path, window: int, characters: int | None = None) -> Tensor:
    """The windows [S, window] of a text, of its first `characters`; `TyirError` when it has not one."""
    text = "\n\n".join(_texts(source))[:characters]
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


def _texts(source: Path) -> Iterator[str]:
    if source.suffix == ".parquet":
        yield from _parquet(source)
        return
    try:
        with open_regular(source) as file:
            text = file.read().decode("utf-8")
    except OSError as error:
        raise TyirError(f"cannot read {source}: {error.strerror}", help="give a text file") from None
    except UnicodeDecodeError as error:
        raise TyirError(
            f"{source} is not UTF-8 text: byte {error.start}", help="give UTF-8 text, .jsonl or .parquet"
        ) from None
    if source.suffix != ".jsonl":
        yield text
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield _of_line(line, f"{source}:{number}")


def _of_line(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise TyirError(f"{where} is not JSON: {error}", help="each line is one JSON object") from None
    if isinstance(value, dict):
        value = next((value[f] for f in _FIELDS if f in value), None)
    if not isinstance(value, str):
        raise TyirError(
            f"{where} has no text",
            help=f'write {{"text": "..."}}; fields that are read: {", ".join(_FIELDS)}',
        )
    return value


def _parquet(source: Path) -> Iterator[str]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise TyirError(
            f"{source} needs pyarrow, which is not installed", help="pip install 'tyir[quantize]'"
        ) from None
    try:
        names = parquet.read_schema(source).names
        field = next((f for f in _FIELDS if f in names), None)
        if field is None:
            raise TyirError(
                f"{source} has no column of text (it has {', '.join(names)})",
                help=f"columns that are read: {', '.join(_FIELDS)}",
            )
        yield from (t for t in parquet.read_table(source, columns=[field])[field].to_pylist() if t)
    except (OSError, ValueError) as error:
        raise TyirError(f"cannot read {source}: {error}", help="give a Parquet file") from None


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

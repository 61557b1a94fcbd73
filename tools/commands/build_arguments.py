"""The command-line options that decide what a compile makes.

Here so that `--help` of the tools that share them loads nothing else.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from tyir.diagnostics import TyirError
from tyir.tools.cli import whole_number

__all__ = [
    "AUTO",
    "add_base_option",
    "add_build_options",
    "add_image_option",
    "add_vision_tower_option",
    "numbers",
    "sparse",
]


def numbers(text: str) -> tuple[int, ...]:
    """A comma-separated list of whole numbers; `TyirError` names what is none."""
    values = []
    for item in (part.strip() for part in text.split(",") if text.strip()):
        try:
            values.append(whole_number(item))
        except ValueError:
            raise TyirError(
                f"'{item}' in '{text}' is not a whole number", help="write a list such as 1,8"
            ) from None
        except argparse.ArgumentTypeError as error:
            raise TyirError(str(error), help="write a list such as 1,8") from None
    if not values:
        raise TyirError(
            f"'{text}' is an empty list", help="write a list such as 1,8, or leave the option out"
        )
    return tuple(values)


AUTO: Final = "auto"


def _group_size(text: str) -> int | str:
    return AUTO if text == AUTO else whole_number(text)


def sparse(text: str) -> tuple[int, ...]:
    """The numbers of `--sparse-prefill`."""
    from tyir.artifacts.sparse_prefill import BlockChoice

    return BlockChoice.parse(text).numbers


def _sizes(text: str) -> tuple[tuple[int, int], ...]:
    from tyir.vision.sizes import parse_sizes

    return parse_sizes(text)


def add_image_option(parser: argparse._ActionsContainer) -> None:
    """The sizes of pictures that a vision-language model's tower is made for."""
    parser.add_argument(
        "--image",
        type=_sizes,
        metavar="WxH,..",
        default=(),
        help=(
            "of a vision-language model: sizes of pictures in pixels, as 960x540; the tower becomes a program"
            " for each grid of patches among them"
        ),
    )


def add_base_option(parser: argparse._ActionsContainer) -> None:
    """Where the base model of a LoRA adapter is."""
    parser.add_argument(
        "--base",
        type=Path,
        metavar="FOLDER",
        help=(
            "the model is a LoRA adapter of the model in FOLDER (default: base_model_name_or_path of"
            " adapter_config.json, when it is a folder here), or a LLaVA's delta to the Llama in FOLDER"
        ),
    )


def add_vision_tower_option(parser: argparse._ActionsContainer) -> None:
    """Where the tower of a model in LLaVA's own format is."""
    parser.add_argument(
        "--vision-tower",
        type=Path,
        metavar="FOLDER",
        help=(
            "of a model in LLaVA's own format: the CLIP model in FOLDER is its tower, the one that"
            " mm_vision_tower of config.json names"
        ),
    )


def add_build_options(parser: argparse._ActionsContainer) -> None:
    """The options that change the artifacts and their sizes; one that is not given is None."""
    parser.add_argument("--dies", type=int, help="number of dies, 1 to 16 (default 4)")
    parser.add_argument(
        "--pp",
        type=int,
        metavar="K",
        help="pipeline stages: the layers are dealt out to K groups of dies (default 1)",
    )
    parser.add_argument(
        "--seqlens",
        type=numbers,
        metavar="N,N,..",
        help="tokens per step to compile for (default 1,8)",
    )
    parser.add_argument(
        "--max-kv",
        type=int,
        metavar="N",
        help="tokens the key/value cache holds (default 1024)",
    )
    parser.add_argument(
        "--weights",
        choices=("fp16", "int4", "awq"),
        help=(
            "decoder weights: fp16 (default), int4 by round-to-nearest groups, or awq: as tyir-quantize makes"
            " them, or with the scales and ranges of --awq-table; weights that the checkpoint holds quantised"
            " stay as they are"
        ),
    )
    parser.add_argument(
        "--group-size",
        type=_group_size,
        metavar="N",
        help=(
            "input channels per int4 scale (default 128); auto: the largest up to 128 that divides the input"
            " channels of all decoder linears"
        ),
    )

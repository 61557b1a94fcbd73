"""Hugging Face in fp32 on the pictures themselves: its processors, its forward, its choice of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.vision.folders import hf_processor

__all__ = ["Answer", "HuggingFace"]

Array = npt.NDArray[Any]
NEAR_TIE = 0.05  # of logits: Hugging Face's own preference is smaller than what f16 leaves of it


@dataclass(frozen=True)
class Answer:
    """How an answer compares: the first token that greedy decoding in fp32 would have taken instead of
    ours, with the difference of the two logits; None when there is none.
    """

    tokens: list[int]
    first: int | None = None
    gap: float = 0.0

    @property
    def same(self) -> bool:
        """The whole answer is Hugging Face's."""
        return self.first is None

    @property
    def tied(self) -> bool:
        """It parts where Hugging Face's own choice is a matter of rounding."""
        return self.first is not None and self.gap < NEAR_TIE


@dataclass
class HuggingFace:
    """A folder's model in fp32, or as `dtype` says."""

    folder: Path
    dtype: str = "float32"
    model: Any = field(init=False)
    processor: Any = field(init=False)

    def __post_init__(self) -> None:
        import torch
        from transformers import AutoModelForImageTextToText
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.model = AutoModelForImageTextToText.from_pretrained(
            self.folder, dtype=getattr(torch, self.dtype), attn_implementation="eager"
        ).eval()
        self.processor = hf_processor(str(self.folder))

    def inputs(self, ids: Sequence[int], pictures: Sequence[Array], video: bool = False) -> dict[str, Any]:
        """What the model takes for tokens and pictures [H, W, 3] uint8; `video`: they are one, in pairs."""
        import torch
        from PIL import Image

        config = self.model.config
        given: dict[str, Any] = {"input_ids": torch.tensor([list(ids)])}
        if pictures:
            found = self.processor(images=[Image.fromarray(p) for p in pictures], return_tensors="pt")
            given |= dict(found)
        if hasattr(config, "vision_start_token_id"):
            kinds = given["input_ids"]
            given["mm_token_type_ids"] = (kinds == config.image_token_id).int() + 2 * (
                kinds == config.video_token_id
            ).int()
        if video:
            pairs, grids = given.pop("pixel_values"), given.pop("image_grid_thw")
            rows, columns = grids[0, 1:].tolist()
            frames = pairs.reshape(len(pictures), rows * columns, 3, 2, -1)
            stacked = torch.stack([frames[0::2, :, :, 0], frames[1::2, :, :, 0]], dim=3)
            given["pixel_values_videos"] = stacked.reshape(-1, pairs.shape[1])
            given["video_grid_thw"] = torch.tensor([[len(pictures) // 2, rows, columns]])
        return given

    def logits(self, ids: Sequence[int], pictures: Sequence[Array], **more: Any) -> npt.NDArray[np.float32]:
        """[n, V]."""
        import torch

        video = more.pop("video", False)
        with torch.no_grad():
            given = self.inputs(ids, pictures, video)
            given = {k: v.to(self.model.dtype) if v.is_floating_point() else v for k, v in given.items()}
            found = self.model(**given, **more, use_cache=False)
        array: npt.NDArray[np.float32] = found.logits[0].float().numpy()
        return array

    def compare(
        self, prompt: Sequence[int], answer: Sequence[int], pictures: Sequence[Array], **more: Any
    ) -> Answer:
        """An answer against greedy decoding: equal to `generate` when every token is the most likely one
        after those before it.
        """
        logits = self.logits([*prompt, *answer], pictures, **more)[len(prompt) - 1 : -1]
        for number, (row, token) in enumerate(zip(logits, answer)):
            best = int(row.argmax())
            if best != token:
                return Answer(list(answer), number, float(row[best] - row[token]))
        return Answer(list(answer))

    def embeddings(self, picture: Array) -> npt.NDArray[np.float32]:
        """[tokens, H]: what the tower and the projector make of a picture."""
        import torch

        found = self.inputs([0], [picture])
        keys = ("pixel_values", "image_grid_thw")
        with torch.no_grad():
            out = self.model.model.get_image_features(**{k: found[k] for k in keys if k in found})
        rows = out.pooler_output
        array: npt.NDArray[np.float32] = (rows[0] if isinstance(rows, (list, tuple)) else rows).numpy()
        return array.reshape(-1, array.shape[-1])

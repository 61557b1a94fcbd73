"""Does a vision-language model's folder of artifacts see what the model sees?

Hugging Face in fp32 gets the very patches that the tower gets.  Compared are, for each picture: what comes
out of every block of the tower, with the largest number in it (f16 ends at 65504) and the rows that are not
finite; the rows that the language model is given; then every decoder layer, the logits and the greedy
answer, as for text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from tyir.attributes import IntegerAttr
from tyir.dialects.func import Call
from tyir.ir import Op
from tyir.manifest import BuildOptions
from tyir.runtime_sim.vision.pictures import Picture
from tyir.runtime_sim.vision.pixels import Media, Patches
from tyir.runtime_sim.vision.preprocessor import vision_of
from tyir.runtime_sim.vision.request import VisionRequest
from tyir.runtime_sim.vision.session import VisionSession
from tyir.runtime_sim.vision.tower import Tower
from tyir.tools.run.turns import Turns
from tyir.tools.verify.compare import (
    LayerStates,
    PromptResult,
    Reference,
    check_prompt,
    cosines,
)

if TYPE_CHECKING:
    from tyir.frontends.plugin import ModelPlugin

__all__ = ["QUESTION", "BlockRow", "PictureReference", "PictureResult", "check_picture", "drawn_picture"]

Array = npt.NDArray[Any]
QUESTION: Final = "Describe the picture."
EMBEDDING_COSINE: Final = 0.9999


@dataclass(frozen=True)
class BlockRow:
    """What a block of the tower gives: the smallest cosine of a row, the largest number in the reference and
    in the artifacts, rows of the artifacts that are not finite.
    """

    name: str
    cosine: float
    expected: float
    largest: float
    not_finite: int

    @classmethod
    def of(cls, name: str, mine: Array, wanted: Array) -> BlockRow:
        """Of two arrays [N, C]."""
        finite = np.isfinite(mine).all(axis=1)
        largest = float(np.abs(mine[finite]).max(initial=0))
        return cls(
            name,
            float(cosines(mine, wanted).min()),
            float(np.abs(wanted).max()),
            largest,
            int((~finite).sum()),
        )


@dataclass(frozen=True)
class PictureResult:
    """One picture: its tower, and the answer to a question about it."""

    name: str
    rows: list[BlockRow]
    relative: float
    prompt: PromptResult

    @property
    def good(self) -> bool:
        """Whether the rows that the language model gets are the model's."""
        last = [row for row in self.rows if not row.name.startswith("block")]
        return all(row.cosine >= EMBEDDING_COSINE and not row.not_finite for row in last)


def drawn_picture(width: int, height: int) -> Picture:
    """A picture with something at every place: slopes of colour, stripes, a disc, two squares."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([255 * x / width, 255 * y / height, 128 + 60 * np.sin(x / 3)], axis=-1)
    side = min(width, height)
    pixels[(x - width * 0.3) ** 2 + (y - height * 0.4) ** 2 < (side * 0.2) ** 2] = (220, 30, 30)
    for left, top, colour in ((0.6, 0.2, (30, 60, 220)), (0.55, 0.65, (250, 220, 40))):
        inside = (abs(x - left * width - side / 8) < side / 8) & (abs(y - top * height - side / 8) < side / 8)
        pixels[inside] = colour
    return Picture(pixels.clip(0, 255).astype(np.uint8), f"a drawn picture of {width}x{height}")


class PictureReference(Reference):
    """Hugging Face's vision-language model in fp32; `show` says which pictures the next prompts are about."""

    reads_plainly = False  # the class is another than that of a model of text

    def __init__(
        self,
        session: VisionSession,
        folder: Path,
        options: BuildOptions,
        plugin: ModelPlugin | None = None,
        base: Path | None = None,
    ) -> None:
        super().__init__(folder, options, plugin, base)
        self.vision = vision_of(session.artifacts)
        self._given: dict[str, Any] = {}

    def show(self, media: Sequence[Media]) -> None:
        """The pictures of the prompt, in order."""
        self._given = self._pixels([part for item in media for part in item.parts]) if media else {}

    def tower(self, patches: Patches) -> tuple[list[Array], list[Array]]:
        """After each block [N, C], in the order that the model has them; the rows that the language model
        gets [tokens, H], then deepstack features.
        """
        import torch

        from tyir.frontends.layer_reuse import decoder_layers

        found: list[Array] = []
        core = self.model.model
        blocks = [layer for _, layer in decoder_layers(getattr(core, "visual", None) or core.vision_tower)]
        hooks = [
            block.register_forward_hook(
                lambda m, i, o: found.append(_rows((o[0] if isinstance(o, tuple) else o).numpy()))
            )
            for block in blocks
        ]
        try:
            with torch.no_grad():
                out = core.get_image_features(**self._pixels([patches]))
        finally:
            for hook in hooks:
                hook.remove()
        deep = getattr(out, "deepstack_features", None) or ()
        return found, [_rows(_joined(each)) for each in (out.pooler_output, *deep)]

    def continue_greedily(self, ids: Sequence[int], count: int) -> list[int]:
        import torch
        from transformers import GenerationConfig

        plain = GenerationConfig(max_new_tokens=count, do_sample=False, pad_token_id=0)
        with torch.no_grad():
            out = self.model.generate(
                **self._inputs(ids), attention_mask=torch.ones((1, len(ids))), generation_config=plain
            )
        return [int(token) for token in out[0, len(ids) :]]

    def run(self, ids: Sequence[int]) -> tuple[npt.NDArray[np.float32], list[Array]]:
        import torch

        states: list[Array] = []
        hooks = [
            layer.register_forward_hook(
                lambda m, i, o: states.append(_rows((o[0] if isinstance(o, tuple) else o).numpy()))
            )
            for layer in self._layers()
        ]
        try:
            with torch.no_grad():
                logits: Array = self.model(**self._inputs(ids), use_cache=False).logits[0].numpy()
        finally:
            for hook in hooks:
                hook.remove()
        return logits, states

    def _layers(self) -> Sequence[Any]:
        from tyir.frontends.layer_reuse import decoder_layers

        return [layer for _, layer in decoder_layers(self.model.model.language_model)]

    def _inputs(self, ids: Sequence[int]) -> dict[str, Any]:
        """Tokens with their kinds, which positions follow from, and the pixels of the pictures shown."""
        import torch

        tokens = torch.tensor([list(ids)])
        kinds = (tokens == self.vision.ids.image).int()
        return {
            "input_ids": tokens,
            **({"mm_token_type_ids": kinds} if self.vision.rope is not None else {}),
            **self._given,
        }

    def _pixels(self, parts: Sequence[Patches]) -> dict[str, Any]:
        """Pictures as transformers' processors give them."""
        import torch

        pixels = self.vision.pixels
        if pixels.merge > 1:
            grids = [[1, *part.size.grid] for part in parts]
            values = np.concatenate([part.patches for part in parts])
            return {"pixel_values": torch.from_numpy(values), "image_grid_thw": torch.tensor(grids)}
        whole = []
        for part in parts:
            rows, columns = part.size.grid
            cut = part.patches.reshape(rows, columns, pixels.channels, pixels.patch, pixels.patch)
            whole.append(
                cut.transpose(2, 0, 3, 1, 4).reshape(
                    pixels.channels, rows * pixels.patch, columns * pixels.patch
                )
            )
        return {"pixel_values": torch.from_numpy(np.stack(whole))}


def _rows(array: Array) -> Array:
    return np.asarray(array.reshape(-1, array.shape[-1]), np.float32)


def _joined(value: Any) -> Array:
    """One tensor, or a tensor for each picture."""
    parts = value if isinstance(value, (list, tuple)) else [value]
    return np.concatenate([_rows(part.numpy()) for part in parts])


class _BlockStates:
    """A `TowerProbe` that keeps what each block gives on the first die that has it."""

    def __init__(self) -> None:
        self.seen: dict[int, Array] = {}
        self._owner: dict[int, int] = {}

    def __call__(self, die: int, stack: tuple[Call, ...], op: Op, results: tuple[Array, ...]) -> None:
        layer = op.attributes.get("tyir.layer") if isinstance(op, Call) else None
        if isinstance(layer, IntegerAttr) and self._owner.setdefault(layer.value, die) == die:
            self.seen[layer.value] = _rows(results[0])


def check_picture(
    session: VisionSession,
    turns: Turns,
    reference: PictureReference,
    picture: Picture,
    question: str,
    count: int,
    states: LayerStates,
) -> PictureResult:
    """Compare the tower on one picture, and `count` greedy tokens of the answer to a question about it."""
    turns.chat.forget()
    prompt = turns.ask(question, shown=[picture])
    assert isinstance(prompt.given, VisionRequest)
    (media,) = turns.chat.media
    (patches,) = media.parts
    rows, relative = _tower_rows(session, patches, reference)
    reference.show([media])
    request = prompt.given
    count = min(count, session.capacity - len(request.ids))
    result = check_prompt(
        session, reference, request.ids, count, states, begin=lambda: session.begin(request)
    )
    return PictureResult(picture.name, rows, relative, result)


def _tower_rows(
    session: VisionSession, patches: Patches, reference: PictureReference
) -> tuple[list[BlockRow], float]:
    """A row for each block and each output, and the mean relative error of the embeddings."""
    sizes = vision_of(session.artifacts).sizes
    number = next(i for i, size in enumerate(sizes) if size.image.grid == patches.size.grid)
    blocks = _BlockStates()
    walked = session.engine_name != "edge10"
    tower = Tower(session.artifacts, number, session.engine_name, probe=blocks if walked else None)
    outputs = [_rows(array) for array in tower.run(patches.patches)]
    wanted, expected = reference.tower(patches)
    rows = [
        BlockRow.of(f"block {i}", blocks.seen[i], each) for i, each in enumerate(wanted) if i in blocks.seen
    ]
    names = ["embeddings", *(f"deepstack {i}" for i in range(len(outputs) - 1))]
    rows += [BlockRow.of(*row) for row in zip(names, outputs, expected)]
    return rows, float(np.abs(outputs[0] - expected[0]).mean() / np.abs(expected[0]).mean())

"""Drawn scenes such as the small models of vision were trained on, with the answers they call for.

One to three coloured shapes on a 3 x 3 grid over a pale, noisy ground; all of it decided by the seed.

    scene = draw(seed=7, size=(224, 168))
    scene.picture, scene.answers["Describe the picture."]

    python -m tests.vision.scenes --seed 7 --size 224x168 --out scene.png
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

__all__ = ["COLOURS", "DESCRIBE", "HOW_MANY", "SHAPES", "SIZES", "Scene", "draw"]

Mask = npt.NDArray[np.bool_]
DESCRIBE: Final = "Describe the picture."
HOW_MANY: Final = "How many shapes are there?"
# (width, height): squares, a wide and a tall one, and such whose merged grid is no multiple of a window
SIZES: Final = ((112, 112), (168, 112), (224, 224), (112, 168), (196, 140), (84, 224), (168, 252), (224, 84))
COLOURS: Final = {
    "red": (212, 30, 32),
    "green": (32, 160, 50),
    "blue": (40, 60, 215),
    "yellow": (240, 214, 40),
    "black": (20, 20, 20),
    "purple": (138, 36, 164),
    "orange": (250, 130, 20),
}
_PLACES: Final = (
    *("at the top left", "at the top", "at the top right"),
    *("on the left", "in the middle", "on the right"),
    *("at the bottom left", "at the bottom", "at the bottom right"),
)
_NUMBERS: Final = ("no", "one", "two", "three")


def _circle(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> Mask:
    return x**2 + y**2 < 1


def _square(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> Mask:
    return np.maximum(abs(x), abs(y)) < 0.8


def _triangle(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> Mask:
    return (y < 0.85) & (abs(x) < (y + 0.95) / 1.8)


def _cross(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> Mask:
    return (np.minimum(abs(x), abs(y)) < 0.26) & (np.maximum(abs(x), abs(y)) < 1)


def _ring(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> Mask:
    return (x**2 + y**2 < 1) & (x**2 + y**2 > 0.3)


Shape = Callable[[npt.NDArray[np.float64], npt.NDArray[np.float64]], Mask]
SHAPES: Final[dict[str, Shape]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
    "ring": _ring,
}


@dataclass(frozen=True, eq=False)
class Scene:
    """A drawn picture, [height, width, 3] uint8, and what is right to say of it by question."""

    picture: npt.NDArray[np.uint8]
    answers: dict[str, str]

    def save(self, path: Path) -> Path:
        """Write it as a file that needs no decoder of losses."""
        from PIL import Image

        Image.fromarray(self.picture).save(path)
        return path


def draw(seed: int, size: tuple[int, int] = (224, 224), shapes: int | None = None) -> Scene:
    """A scene of a seed, of (width, height) pixels; `shapes` from 1 to 3."""
    rng = np.random.default_rng(seed)
    width, height = size
    pixels = np.empty((height, width, 3))
    pixels[:] = rng.uniform(195, 240, 3)
    count = int(rng.integers(1, 4)) if shapes is None else shapes
    places = sorted(rng.choice(9, count, replace=False).tolist())
    found = []
    for place in places:
        colour, shape = rng.choice(list(COLOURS)), rng.choice(list(SHAPES))
        cell = min(width, height) / 3
        radius = rng.uniform(0.34, 0.46) * cell
        row, column = divmod(place, 3)
        middle_y = (row + 0.5) * height / 3 + rng.uniform(-0.05, 0.05) * cell
        middle_x = (column + 0.5) * width / 3 + rng.uniform(-0.05, 0.05) * cell
        y, x = np.mgrid[:height, :width]
        pixels[SHAPES[shape]((x - middle_x) / radius, (y - middle_y) / radius)] = COLOURS[colour]
        found.append((str(colour), str(shape), _PLACES[place]))
    noisy = pixels + rng.normal(0, 4, pixels.shape)
    return Scene(noisy.clip(0, 255).astype(np.uint8), _answers(found))


def _answers(found: list[tuple[str, str, str]]) -> dict[str, str]:
    named = [
        (f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape}", place) for colour, shape, place in found
    ]
    number = _NUMBERS[len(found)]
    answers = {
        DESCRIBE: f"There is {', and '.join(f'{what} {place}' for what, place in named)}.",
        HOW_MANY: f"There {'is' if len(found) == 1 else 'are'} {number} shape{'s' * (len(found) > 1)}.",
    }
    for what, place in named:
        answers[f"What is {place}?"] = f"{what[0].upper()}{what[1:]}."
    return answers


def main() -> None:
    """Draw one scene into a file and print its answers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", default="224x224")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    width, height = (int(side) for side in args.size.split("x"))
    scene = draw(args.seed, (width, height))
    scene.save(args.out)
    for question, answer in scene.answers.items():
        print(f"{question}  {answer}")


if __name__ == "__main__":
    main()

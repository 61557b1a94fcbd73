"""What cannot be read in an SVG: text that another text or an arrow covers, or that the edge cuts off."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import NamedTuple
from xml.etree import ElementTree

__all__ = ["drawings", "illegible"]

_LETTER = 0.58  # of the font's size, on average in DejaVu Sans, which is wide
_BOLD = 1.1


class _Box(NamedTuple):
    left: float
    top: float
    right: float
    bottom: float
    words: str


def drawings(page: str) -> list[str]:
    """The SVGs of an HTML page."""
    return re.findall(r"<svg.*?</svg>", page, re.DOTALL)


def illegible(svg: str) -> list[str]:
    """What is wrong with the texts of an SVG; an error of the parser when it is not well-formed."""
    root = ElementTree.fromstring(svg)
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    sizes = {name: float(size) for name, size in re.findall(r"\.(\w+)\{[^}]*?font-size:(\d+)px", svg)}
    usual = re.search(r"text\{font:(\d+)px", svg)
    texts = list(_texts(root, 0.0, 0.0, sizes, float(usual[1]) if usual else 12.0))
    wrong = [
        f"'{t.words}' is cut off"
        for t in texts
        if t.left < 0 or t.top < 0 or t.right > width or t.bottom > height
    ]
    wrong += [
        f"'{a.words}' and '{b.words}' cover each other"
        for a, b in itertools.combinations(texts, 2)
        if a.left < b.right and b.left < a.right and a.top < b.bottom and b.top < a.bottom
    ]
    for line in root.iter():
        if line.tag.endswith("line") and "marker-end" in line.attrib:
            ends = [float(line.attrib[name]) for name in ("x1", "y1", "x2", "y2")]
            wrong += [f"an arrow crosses '{t.words}'" for t in texts if _crosses(*ends, t)]
    return wrong


def _texts(
    element: ElementTree.Element, x: float, y: float, sizes: dict[str, float], usual: float
) -> Iterator[_Box]:
    moved = re.match(r"translate\(([-\d.]+)[ ,]([-\d.]+)\)", element.attrib.get("transform", ""))
    if moved is not None:
        x, y = x + float(moved[1]), y + float(moved[2])
    if element.tag.rpartition("}")[2] == "text" and (words := "".join(element.itertext()).strip()):
        css = element.attrib.get("class", "")
        size = sizes.get(css, usual)
        long = len(words) * size * _LETTER * (_BOLD if css in ("b", "bold") else 1)
        anchor = {"middle": 0.5, "end": 1.0}.get(element.attrib.get("text-anchor", ""), 0.0)
        left, base = x + float(element.attrib["x"]) - anchor * long, y + float(element.attrib["y"])
        yield _Box(left, base - 0.75 * size, left + long, base + 0.2 * size, words)
    for child in element:
        yield from _texts(child, x, y, sizes, usual)


def _crosses(x1: float, y1: float, x2: float, y2: float, box: _Box) -> bool:
    points = ((x1 + (x2 - x1) * i / 100, y1 + (y2 - y1) * i / 100) for i in range(101))
    return any(box.left < x < box.right and box.top < y < box.bottom for x, y in points)

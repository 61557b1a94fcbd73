"""Files of pictures: what is converted is said, what cannot be is refused with what to do."""

from __future__ import annotations

import io
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.vision.scenes import draw
from tyir.diagnostics import TyirError
from tyir.runtime_sim.vision import pictures
from tyir.runtime_sim.vision.pictures import as_picture, read_frames, read_picture


def scene(width: int = 60, height: int = 40) -> Image.Image:
    return Image.fromarray(draw(1, (width, height)).picture)


def saved(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "ppm", "webp", "gif", "jpg"])
def test_formats(suffix: str, tmp_path: Path) -> None:
    options = {"lossless": True} if suffix == "webp" else {}
    found = read_picture(saved(scene(), tmp_path / f"a.{suffix}", **options))
    assert found.pixels.shape == (40, 60, 3)
    if suffix not in ("gif", "jpg"):
        np.testing.assert_array_equal(found.pixels, np.array(scene()))
        assert found.done == ()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_upright(orientation: int, tmp_path: Path) -> None:
    """Whatever way the camera was held, the upright picture is the one that was drawn."""
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's transposition that orientation undoes
    stored = scene() if orientation == 1 else scene().transpose(Image.Transpose(back[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = read_picture(saved(stored, tmp_path / "a.png", exif=exif))
    np.testing.assert_array_equal(found.pixels, np.array(scene()))
    assert found.done == (() if orientation == 1 else (f"turned upright (EXIF orientation {orientation})",))


def test_what_was_converted_is_said(tmp_path: Path) -> None:
    clear = scene().convert("RGBA")
    clear.putalpha(0)
    assert read_picture(saved(clear, tmp_path / "a.png")).pixels.min() == 255  # nothing but white
    assert read_picture(tmp_path / "a.png").done == ("transparent parts laid onto white",)
    said = {"L": "converted from grey to RGB", "1": "converted from black and white to RGB"}
    for mode, words in {**said, "P": "converted from a palette to RGB"}.items():
        assert read_picture(saved(scene().convert(mode), tmp_path / "b.png")).done == (words,)


@pytest.mark.parametrize("kind", ["png", "tif"])
def test_sixteen_bits_keep_their_brightness(kind: str, tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 60 * 40).reshape(40, 60).astype(np.uint16)
    found = read_picture(saved(Image.fromarray(values), tmp_path / f"a.{kind}"))
    np.testing.assert_array_equal(found.pixels[..., 0], values >> 8)
    assert found.done == ("16 bits reduced to 8", "converted from grey to RGB")


def test_the_first_frame_of_several(tmp_path: Path) -> None:
    other = Image.fromarray(draw(2, (60, 40)).picture)
    path = saved(scene(), tmp_path / "a.webp", save_all=True, append_images=[other], lossless=True)
    found = read_picture(path)
    assert found.done[0] == "the first of 2 frames is taken"
    np.testing.assert_array_equal(found.pixels, np.array(scene()))


def test_floating_point_is_refused(tmp_path: Path) -> None:
    image = Image.fromarray(np.ones((4, 4), np.float32))
    with pytest.raises(TyirError, match="nothing says which is white"):
        read_picture(saved(image, tmp_path / "a.tif"))


BAD = {
    "no bytes": (b"", "is empty"),
    "text": (b"cat", "not a picture of a format"),
    "html": (b"<html></html>" * 99, "not a picture of a format"),
    "EPS, which would start a program": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "not a picture",
    ),
    "a header alone": (b"\x89PNG\r\n\x1a\n", "damaged|not a picture"),
}


@pytest.mark.parametrize("name", BAD)
def test_files_that_are_no_pictures(name: str, tmp_path: Path) -> None:
    data, message = BAD[name]
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(TyirError, match=message) as error:
        read_picture(tmp_path / "a.png")
    assert "help: " in error.value.render()


def test_a_file_cut_off_anywhere_is_refused_or_whole(tmp_path: Path) -> None:
    for kind in ("png", "jpeg", "webp", "gif", "tiff", "bmp"):
        stream = io.BytesIO()
        scene().save(stream, kind)
        data = stream.getvalue()
        for cut in range(1, len(data), max(len(data) // 40, 1)):
            (tmp_path / "a").write_bytes(data[:cut])
            try:
                found = read_picture(tmp_path / "a")
            except TyirError as error:
                assert "help: " in error.render()
            else:
                assert found.pixels.shape == (40, 60, 3)


def test_more_pixels_than_are_read(tmp_path: Path) -> None:
    """A megabyte that unpacks to gigabytes is refused by its header."""
    stream = io.BytesIO()
    Image.new("1", (8, 8)).save(stream, "png")
    for side, words in ((40000, "far more pixels"), (12000, "12000x12000 pixels, more than the 100000000")):
        header = b"IHDR" + struct.pack(">II", side, side) + stream.getvalue()[24:29]
        data = (
            stream.getvalue()[:12] + header + struct.pack(">I", zlib.crc32(header)) + stream.getvalue()[33:]
        )
        (tmp_path / "a.png").write_bytes(data)
        with pytest.raises(TyirError, match=words):
            read_picture(tmp_path / "a.png")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "none.png", tmp_path, Path("/dev/null")):
        with pytest.raises(TyirError, match="cannot read the picture"):
            read_picture(path)


def test_without_pillow_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = saved(scene(), tmp_path / "a.png")
    for name in [n for n in sys.modules if n == "PIL" or n.startswith("PIL.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(TyirError, match="needs Pillow") as error:
        read_picture(path)
    assert "pip install 'tyir[vision]'" in error.value.render()


def test_frames_of_a_folder_in_the_order_of_their_names(tmp_path: Path) -> None:
    for seed in (2, 0, 1):
        draw(seed, (30, 20)).save(tmp_path / f"{seed:04d}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    found = read_frames([tmp_path])
    for seed, frame in enumerate(found):
        np.testing.assert_array_equal(frame.pixels, draw(seed, (30, 20)).picture)
    draw(9, (20, 30)).save(tmp_path / "0003.png")
    with pytest.raises(TyirError, match=r"one size: .*0000.png is 30x20, .*0003.png 20x30"):
        read_frames([tmp_path])
    (tmp_path / "empty").mkdir()
    with pytest.raises(TyirError, match="holds no pictures"):
        read_frames([tmp_path / "empty"])


def test_the_hash_is_of_the_pixels(tmp_path: Path) -> None:
    one = read_picture(saved(scene(), tmp_path / "a.png"))
    other = read_picture(saved(scene(), tmp_path / "b.bmp"))
    assert one.sha256 == other.sha256 != as_picture(scene(40, 60)).sha256
    assert pictures.MOST_PIXELS == 100_000_000

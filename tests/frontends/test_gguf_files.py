"""GGUF files as they lie in folders: in parts, and with types that cannot be read."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tyir.diagnostics import Diagnostic, TyirError
from tyir.frontends.checkpoint import open_checkpoint
from tyir.frontends.dense_state import dense_state
from tyir.tools.api import load_module

pytest.importorskip("gguf")
from tests.frontends import gguf_writer
from tests.frontends.gguf_models import Model, refusal


@pytest.mark.parametrize("most", [4, 9, 17])
def test_split_files(tmp_path: Path, gguf_llama: Model, most: int) -> None:
    """From the folder, the first file or any other; parts that are missing are named."""
    held = gguf_writer.write(
        tmp_path / "m.gguf", "llama", *gguf_llama, lambda n: "Q4_1", split_max_tensors=most
    )
    parts = sorted(tmp_path.iterdir())
    assert len(parts) == -(-len(held) // most)
    (tmp_path / "mmproj-model-f16.gguf").write_bytes(b"an image encoder")
    for path in (tmp_path, parts[0], parts[-1]):
        problems: list[Diagnostic] = []
        checkpoint = open_checkpoint(path, problems)
        assert checkpoint is not None and not problems
        assert checkpoint.tensors.keys() == held.keys() and len(checkpoint.stamps) == len(parts)
    assert all(np.array_equal(w, held[n]) for n, w in dense_state(parts[0]))
    parts[1].unlink()
    assert f"1 of the {len(parts)} files of this model are missing: {parts[1].name}" in refusal(tmp_path)


def test_parts_of_other_models(tmp_path: Path, gguf_llama: Model) -> None:
    gguf_writer.write(tmp_path / "m.gguf", "llama", *gguf_llama, split_max_tensors=12)
    other = {n: w for n, w in gguf_llama[1].items() if "layers.1" not in n}
    gguf_writer.write(tmp_path / "o.gguf", "llama", gguf_llama[0], other, split_max_tensors=6)
    assert "holds 2 GGUF files: m-00001-of-00002.gguf, o-00001-of-00002.gguf" in refusal(tmp_path)
    (tmp_path / "o-00002-of-00002.gguf").replace(tmp_path / "m-00002-of-00002.gguf")
    assert "files of this model hold 18 tensors, the first one says 21" in refusal(
        tmp_path / "m-00001-of-00002.gguf"
    )


def test_parts_that_were_renamed(tmp_path: Path, gguf_llama: Model) -> None:
    """Each says which part it is, whatever it is called: alone, as the first, with a wrong count."""
    gguf_writer.write(tmp_path / "m.gguf", "llama", *gguf_llama, split_max_tensors=8)
    parts = sorted(tmp_path.glob("*.gguf"))
    for number, part in enumerate(parts, 1):
        (folder := tmp_path / str(number)).mkdir()
        part.replace(folder / "model.gguf")
        message = refusal(folder)
        assert f"model.gguf is part {number} of a model in {len(parts)} files" in message
        assert f"named as they were: model-00001-of-{len(parts):05}.gguf" in message
    (tmp_path / "1" / "model.gguf").replace(tmp_path / "m-00001-of-00002.gguf")
    (tmp_path / "2" / "model.gguf").replace(tmp_path / "m-00002-of-00002.gguf")
    assert f"m-00001-of-00002.gguf is part 1 of a model in {len(parts)} files" in refusal(tmp_path)


def test_a_tensor_that_lies_in_two_files(tmp_path: Path, gguf_llama: Model) -> None:
    """By name in the files or by the name that it gets."""
    name = "model.layers.0.mlp.up_proj.weight"
    gguf_writer.write(
        tmp_path / "m.gguf",
        "llama",
        *gguf_llama,
        extra=lambda w: w.add_tensor(name, np.zeros((512, 256), "f2")),
    )
    assert "1 tensors lie in the files more than once (first 'blk.0.ffn_up.weight')" in refusal(tmp_path)


def test_types_that_cannot_be_read_are_said_once(tmp_path: Path, gguf_llama: Model) -> None:
    def extra(writer: Any) -> None:
        for i in range(5):
            writer.add_tensor(f"blk.{i}.extra", np.zeros((2, 32), np.int8))
        writer.add_tensor("blk.0.other", np.zeros(3, np.int32))

    gguf_writer.write(tmp_path / "m.gguf", "llama", *gguf_llama, extra=extra)
    message = refusal(tmp_path)
    assert "5 tensors have type I8, which cannot be imported (first 'blk.0.extra')" in message
    assert "1 tensors have type I32" in message and message.count("cannot be imported") == 2


def test_the_other_byte_order_is_refused(tmp_path: Path, gguf_llama: Model) -> None:
    """Its header can be read, and its values would be other numbers."""
    swapped = "BIG" if sys.byteorder == "little" else "LITTLE"
    order = gguf_writer.gguf.GGUFEndian[swapped]
    gguf_writer.write(tmp_path / "m.gguf", "llama", *gguf_llama, endianess=order)
    message = refusal(tmp_path)
    assert "m.gguf is written in the other byte order" in message and "gguf-convert-endian" in message


@pytest.mark.parametrize(
    ("number", "name", "instead"), [(31, "Q4_0_4_4", "Q4_0"), (36, "IQ4_NL_4_4", "IQ4_NL")]
)
def test_types_that_llama_cpp_has_removed(
    tmp_path: Path, gguf_llama: Model, number: int, name: str, instead: str
) -> None:
    """No release of the package helps: the file that does is named."""
    path = tmp_path / "m.gguf"
    gguf_writer.write(path, "llama", *gguf_llama, lambda n: "Q8_0")
    content = bytearray(path.read_bytes())
    for tensor in gguf_writer.gguf.GGUFReader(path).tensors:
        if tensor.tensor_type.name == "Q8_0":  # its field: name, dimensions, type, offset
            at = tensor.field.offset + sum(part.nbytes for part in tensor.field.parts[:4])
            content[at : at + 4] = number.to_bytes(4, sys.byteorder)
    path.write_bytes(content)
    message = refusal(tmp_path)
    assert f"m.gguf holds tensors of type {name}, which llama.cpp has removed" in message
    assert f"take the file of type {instead} of the same model" in message and "upgrade" not in message


def test_a_vector_of_a_type_for_matrices_is_told_what_may_have_it(tmp_path: Path, gguf_llama: Model) -> None:
    """Not that the type is among those that are read."""
    path = tmp_path / "m.gguf"
    gguf_writer.write(path, "llama", *gguf_llama, lambda n: "Q8_0")
    content = bytearray(path.read_bytes())
    for tensor in gguf_writer.gguf.GGUFReader(path).tensors:
        if tensor.name == "blk.0.attn_norm.weight":  # its field: name, dimensions, type, offset
            at = tensor.field.offset + sum(part.nbytes for part in tensor.field.parts[:4])
            content[at : at + 4] = int(gguf_writer.gguf.GGMLQuantizationType.Q8_0).to_bytes(4, sys.byteorder)
    path.write_bytes(content)
    message = refusal(tmp_path)
    assert "1 tensors of type Q8_0 are not matrices of whole blocks of 32" in message
    assert "only matrices may be quantised" in message and "types that are read" not in message


@pytest.mark.parametrize(
    ("names", "joined"),
    [
        (["m.gguf.part2of10", "m.gguf.part10of10", "m.gguf.part1of10"], "m.gguf.part{1,2,10}of10"),
        (["m.gguf-split-b", "m.gguf-split-a"], "m.gguf-split-{a,b}"),
        (["a b.gguf.part-ab", "a b.gguf.part-aa"], "'a b.gguf.part-aa' 'a b.gguf.part-ab'"),
    ],
)
def test_pieces_of_a_file_are_to_be_joined(tmp_path: Path, names: list[str], joined: str) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"GGUF")
    (tmp_path / "README.md").write_text("cat them")
    if "{" in joined:
        before, _, rest = joined.partition("{")
        middle, _, after = rest.partition("}")
        joined = " ".join(f"{before}{part}{after}" for part in middle.split(","))
    whole = "'a b.gguf'" if "a b" in joined else "m.gguf"
    for path in (tmp_path, tmp_path / names[0]):
        message = refusal(path)
        assert f"join them: cat {joined} > {whole}" in message and f"cut into {len(names)}" in message
    with pytest.raises(TyirError, match="join them: cat"):
        load_module(tmp_path / names[0])
    (tmp_path / "m.gguf.part").write_bytes(b"GGUF")  # a download that has not ended
    assert "join" not in refusal(tmp_path / "m.gguf.part")

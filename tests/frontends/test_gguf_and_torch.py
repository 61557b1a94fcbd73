"""GGUF files and pytorch_model.bin: weights against the gguf package's own de-quantiser and a reading of the
format by hand; nothing is executed.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tyir.attributes import DictAttr, SymbolRefAttr
from tyir.diagnostics import TyirError
from tyir.dialects import ty
from tyir.execution.weights import CheckpointReader, check_files
from tyir.frontends.dense_state import dense_state
from tyir.frontends.gguf.files import read_gguf
from tyir.frontends.huggingface import import_model
from tyir.interpreter import run_function
from tyir.passes.raise_aten import raise_aten

gguf = pytest.importorskip("gguf")
Array = npt.NDArray[Any]
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TYPES = ("Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K", "F16")
SMALL = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def to_gguf(name: str) -> str:
    """llama.cpp's name of a parameter."""
    top = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in top:
        return top[name]
    _, _, layer, rest = name.split(".", 3)
    module, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{NAMES[module]}.{kind}"


def interleave(w: Array, heads: int) -> Array:
    """What llama.cpp's convert_hf_to_gguf.py does to llama's q and k (LlamaModel.permute)."""
    return np.ascontiguousarray(
        w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)
    )


def blocks(w: Array, kind: str) -> Array:
    """The tensor as bytes; the K formats, which the package cannot write, with random contents and scales
    that keep weights small.
    """
    if kind in ("Q4_0", "Q4_1", "Q8_0"):
        return np.asarray(gguf.quantize(w.astype(np.float32), gguf.GGMLQuantizationType[kind]))
    size = {"Q4_K": 144, "Q6_K": 210}[kind]
    rng = np.random.default_rng(w.shape[0])
    out = rng.integers(0, 256, (w.size // 256, size), dtype=np.uint8)
    for at, scale in ((0, 2e-4), (2, 1e-4)) if kind == "Q4_K" else ((208, 3e-5),):
        out[:, at : at + 2] = np.full((len(out), 1), scale, np.float16).view(np.uint8)
    return out.reshape(w.shape[0], -1)


@pytest.fixture(scope="module")
def plain(save_model: Callable[..., Path]) -> Path:
    return save_model("llama", dtype="float16", **SMALL)


def write_gguf(path: Path, plain: Path, kind: str, extra: Sequence[str] = ()) -> dict[str, Array]:
    """`plain` as a GGUF file with its matrices as `kind`; the weights in transformers' order, as the gguf
    package de-quantises them.
    """
    from safetensors.numpy import load_file

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(256)
    writer.add_block_count(1)
    writer.add_feed_forward_length(512)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(64)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_token_list(["a", "b"])
    wanted = {}
    for name, w in load_file(plain / "model.safetensors").items():
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2], 0)
        stored = interleave(w, heads) if heads else w
        if w.ndim == 1 or kind == "F16":
            writer.add_tensor(to_gguf(name), stored.astype(np.float32) if w.ndim == 1 else stored)
            wanted[name] = w.astype(np.float32)
            continue
        data = blocks(stored, kind)
        writer.add_tensor(to_gguf(name), data, raw_dtype=gguf.GGMLQuantizationType[kind])
        dense = gguf.dequantize(data, gguf.GGMLQuantizationType[kind]).reshape(w.shape)
        wanted[name] = (
            dense.reshape(heads, -1, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape) if heads else dense
        )
    for name in extra:
        writer.add_tensor(name, np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return wanted


@pytest.mark.parametrize("kind", TYPES)
def test_gguf(plain: Path, tmp_path: Path, kind: str) -> None:
    """Bit-exact weights (Q4_0 after rounding to f16, as all 4-bit weights are), and transformers' logits on
    them.
    """
    import torch
    from transformers import AutoModelForCausalLM

    wanted = write_gguf(tmp_path / "model.gguf", plain, kind)
    if kind == "Q4_0":
        wanted = {k: v.astype(np.float16).astype(np.float32) if v.ndim == 2 else v for k, v in wanted.items()}
    found = dict(dense_state(tmp_path / "model.gguf"))
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(
            found[name].view(np.uint32), np.ascontiguousarray(array).view(np.uint32), err_msg=name
        )
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    ids = np.random.default_rng(0).integers(0, 96, (1, 17))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(wanted[name].copy()))
        logits = model(torch.tensor(ids)).logits.numpy()
    module = import_model(tmp_path, dtype="f32")  # the folder works too
    raise_aten(module)
    assert sum(1 for _ in module.walk_type(ty.QuantizedLinear)) == (8 if kind == "Q4_0" else 0)
    (got,) = run_function(module, "main", (ids, np.arange(17)[None]), CheckpointReader(tmp_path))
    assert float(np.linalg.norm(got - logits) / np.linalg.norm(logits)) < 1e-5
    check_files(module)


@pytest.mark.parametrize(
    ("kind", "at", "value"), [("Q4_0", 0, np.nan), ("Q8_0", 0, np.inf), ("Q4_K", 2, np.nan)]
)
def test_a_block_whose_scale_is_no_number_is_named(
    plain: Path, tmp_path: Path, kind: str, at: int, value: float
) -> None:
    """By the tensor in the file, when it is compiled."""
    from tyir.tools.api import compile_path

    path = tmp_path / "model.gguf"
    write_gguf(path, plain, kind)
    reader = gguf.GGUFReader(path, "r+")
    (stored,) = (t for t in reader.tensors if t.name == "blk.0.ffn_up.weight")
    stored.data[3, at : at + 2] = np.frombuffer(np.float16(value).tobytes(), np.uint8)
    reader.data.flush()
    with pytest.raises(TyirError) as caught:
        compile_path(path, tmp_path / "out", {"dies": 1, "seqlens": (1,), "max_kv": 16})
    message = str(caught.value)
    assert "'blk.0.ffn_up.weight'" in message and re.search("holds [0-9]+ (NaN|infinite)", message), message
    assert "blk.0.ffn_down.weight" not in message and not list((tmp_path / "out").glob("*"))


def test_a_q4_0_block_by_hand() -> None:
    """f16 d, then 16 bytes: element i is the low nibble of byte i, element 16 + i its high nibble; the weight
    is (nibble - 8) d.
    """
    from tyir.dialects import quant
    from tyir.ir import Value
    from tyir.types import TensorType, f32, ui8

    block = np.concatenate([np.array([0.5], np.float16).view(np.uint8), np.arange(16, dtype=np.uint8) * 17])
    source = ty.GetGlobal.create(
        (), (TensorType((1, 18), ui8),), DictAttr({"symbol": SymbolRefAttr("a")})
    ).result
    assert isinstance(source, Value)
    half = [(i - 8) * 0.5 for i in range(16)]
    dense = quant.GgmlDequantize(source, format="Q4_0", element=f32).evaluate(block[None])
    assert dense[0].tolist() == half + half
    q, scales = quant.GgmlQ40(source).evaluate(block[None])
    assert q[0].tolist() == [*range(16), *range(16)] and scales.tolist() == [[0.5]]


def test_gguf_tensor_names_of_any_form(plain: Path, tmp_path: Path) -> None:
    """Names are looked at as a whole: one without a dot, and one that only looks like a layer's."""
    path = tmp_path / "model.gguf"
    write_gguf(path, plain, "F16", extra=["plain", "vision.attn_q.weight"])
    _, tensors = read_gguf([path])
    assert tensors["plain"].interleaved == tensors["vision.attn_q.weight"].interleaved == 0
    assert tensors["model.layers.0.self_attn.q_proj.weight"].interleaved == 4


def test_gguf_refusals(plain: Path, tmp_path: Path) -> None:
    def refusal(path: Path) -> str:
        with pytest.raises(TyirError) as caught:
            import_model(path)
        return str(caught.value)

    path = tmp_path / "model.gguf"
    write_gguf(path, plain, "Q8_0")
    data = path.read_bytes()
    for cut in (3, 40, len(data) // 2, len(data) - 5):
        path.write_bytes(data[:cut])
        assert "no GGUF file, or damaged" in refusal(path) or "outside the file" in refusal(path)
    path.write_bytes(data.replace(b"llama", b"lemma"))
    assert "architecture 'lemma', which cannot be imported from GGUF" in refusal(path)
    shutil.copy(path, tmp_path / "other.gguf")
    assert "holds 2 GGUF files" in refusal(tmp_path)


# ------------------------------------------------------------------------------------------ pytorch_model.bin


@pytest.fixture
def torch_folder(plain: Path, tmp_path: Path) -> Path:
    import torch
    from safetensors.torch import load_file

    folder = Path(shutil.copytree(plain, tmp_path / "torch"))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def test_torch_file_is_mapped(torch_folder: Path, plain: Path) -> None:
    wanted, found = dict(dense_state(plain)), dict(dense_state(torch_folder))
    assert wanted.keys() == found.keys() and all(np.array_equal(wanted[k], found[k]) for k in wanted)
    module = import_model(torch_folder)
    assert {g.file for g in module.walk_type(ty.Global)} == {"pytorch_model.bin"}
    check_files(module)


def test_sharded_torch_files(torch_folder: Path, plain: Path) -> None:
    import json

    import torch

    tensors = torch.load(torch_folder / "pytorch_model.bin", weights_only=True)
    (torch_folder / "pytorch_model.bin").unlink()
    names = sorted(tensors)
    index = {name: f"pytorch_model-{i % 2 + 1:05}-of-00002.bin" for i, name in enumerate(names)}
    for file in set(index.values()):
        torch.save({n: tensors[n] for n in names if index[n] == file}, torch_folder / file)
    (torch_folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    assert len(list(import_model(torch_folder).walk_type(ty.Global))) == len(names)
    index[names[0]] = "../pytorch_model-00001-of-00002.bin"
    (torch_folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(TyirError, match="not a file name inside the checkpoint folder"):
        import_model(torch_folder)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch executed",))


def test_pickles_are_not_executed(
    torch_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    torch.save({"a": Evil()}, torch_folder / "pytorch_model.bin")
    with pytest.raises(TyirError, match="Python objects other than tensors, which are never loaded"):
        import_model(torch_folder)
    (torch_folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(TyirError, match="is no archive as torch\\.save has written"):
        import_model(torch_folder)
    assert not (tmp_path / "executed").exists()


def test_torch_files_that_cannot_be_mapped(torch_folder: Path) -> None:
    import torch

    for content, wanted in (
        ({"a": torch.zeros(3, 4).T}, "strided view"),
        ([torch.zeros(3)], "not a dictionary of tensors"),
        ({"a": 3}, "not a dictionary"),
    ):
        torch.save(content, torch_folder / "pytorch_model.bin")
        with pytest.raises(TyirError, match=wanted):
            import_model(torch_folder)
    data = (torch_folder / "pytorch_model.bin").read_bytes()
    (torch_folder / "pytorch_model.bin").write_bytes(data[: len(data) // 2])
    with pytest.raises(TyirError, match="truncated"):
        import_model(torch_folder)


def test_verification_against_a_gguf_folder(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its metadata are the config; without either, or with several files, the message says so."""
    from tyir.tools.tyir_compile import main as compile_main
    from tyir.tools.tyir_verify import main as verify_main

    folder = tmp_path / "folder"
    folder.mkdir()
    write_gguf(folder / "model.gguf", plain, "Q4_0")
    assert (
        compile_main(
            [
                str(folder),
                "-o",
                str(tmp_path / "out"),
                "--dies",
                "2",
                "--seqlens",
                "1",
                "--max-kv",
                "16",
                "-q",
            ]
        )
        == 0
    )
    artifacts = capsys.readouterr().out.strip()
    ids = ["--ids", "1,5,9", "--tokens", "4"]
    assert verify_main([artifacts, "--against", str(folder), *ids]) == 0
    assert capsys.readouterr().out.rstrip().splitlines()[-1].startswith("OK")
    (folder / "other.gguf").write_bytes(b"")
    assert verify_main([artifacts, "--against", str(folder), *ids]) == 1
    assert "2 GGUF files: model.gguf, other.gguf" in capsys.readouterr().err
    assert verify_main([artifacts, "--against", str(tmp_path), *ids]) == 1
    assert "holds no config.json and no GGUF file" in capsys.readouterr().err

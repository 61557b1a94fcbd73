"""GGUF's block types, compared with ggml's own C, with the gguf package and with transformers' reader."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tyir.attributes import DictAttr, SymbolRefAttr
from tyir.dialects import quant, ty
from tyir.dialects.quant import GGML_BLOCKS
from tyir.frontends.dense_state import dense_state
from tyir.frontends.gguf.files import gguf_model, read_gguf
from tyir.ir import Value
from tyir.types import TensorType, f32, ui8

gguf = pytest.importorskip("gguf")
from tests.frontends import gguf_writer  # noqa: E402 - it needs the package
from tests.frontends.gguf_models import SIZES, parameters  # noqa: E402


def of_op(data: Any, kind: str) -> Any:
    op = quant.GgmlDequantize(_value(data.shape), format=kind, element=f32)
    assert not list(op.verify())
    return op.evaluate(data)


def _value(shape: tuple[int, ...]) -> Value:
    kind = TensorType(shape, ui8)
    return ty.GetGlobal.create((), (kind,), DictAttr({"symbol": SymbolRefAttr("a")})).result


def test_every_type_that_the_package_dequantises() -> None:
    """Its table of sizes, and a type for each of its de-quantisers but those of single numbers."""
    readable = {kind.name for kind in gguf.quants._type_traits} - {"BF16"}
    assert readable <= set(GGML_BLOCKS)
    for kind, sizes in GGML_BLOCKS.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]] == sizes


# A block of each type with the values that ggml's own C makes of it (to_float of ggml_get_type_traits in
# llama-cpp-cffi 0.4.42), the first four as they are and all by the SHA-256 of their f32.
OF_GGML: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "data" / "ggml_blocks.json").read_text()
)


@pytest.mark.parametrize("kind", OF_GGML)
def test_blocks_as_ggml_reads_them(kind: str) -> None:
    """Bit by bit, with no line of the gguf package in what is wanted."""
    block = np.frombuffer(bytes.fromhex(OF_GGML[kind]["block"]), np.uint8)
    values = np.asarray(of_op(block[None], kind), "<f4")[0]
    assert values[:4].tolist() == OF_GGML[kind]["first"]
    assert hashlib.sha256(values.tobytes()).hexdigest() == OF_GGML[kind]["sha256"]


FOUR_BITS = (0, 0.5, 1, 1.5, 2, 3, 4, 6)  # what E2M1 can say, without its sign


@pytest.mark.parametrize("kind", ["MXFP4", "NVFP4"])
def test_four_bit_floats_by_hand(kind: str) -> None:
    """MXFP4 (OCP Microscaling 1.0): a power of two for 32 elements; NVFP4: an E4M3 for each 16 of 64.  Of 16
    or 32 elements the first half lies in the low nibbles.
    """
    rng = np.random.default_rng(3)
    run, runs = (32, 1) if kind == "MXFP4" else (16, 4)
    scales = rng.integers(100, 140, 1) if kind == "MXFP4" else rng.integers(1, 0x70, 4)
    scales[0] = 3 if kind == "NVFP4" else scales[0]  # E4M3 without its leading one
    nibbles = rng.integers(0, 256, (runs, run // 2))
    block = np.concatenate([scales, nibbles.ravel()]).astype(np.uint8)
    wanted = []
    for scale, packed in zip(scales.tolist(), nibbles.tolist()):
        exponent, fraction = scale >> 3, scale & 7
        e4m3 = fraction * 2.0**-9 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7)
        factor = 2.0 ** (scale - 127) if kind == "MXFP4" else e4m3
        for shift in (0, 4):
            for byte in packed:
                q = byte >> shift & 15
                wanted.append((-1 if q & 8 else 1) * FOUR_BITS[q & 7] * factor)
    assert of_op(block[None], kind)[0].tolist() == wanted
    assert OF_GGML.keys() | {"MXFP4", "NVFP4"} == GGML_BLOCKS.keys()


def test_a_file_of_many_types(tmp_path: Path) -> None:
    """A quantiser mixes types; every matrix of this file has another one."""
    config, state = parameters("llama", num_hidden_layers=4, tie_word_embeddings=False)
    kinds = iter(sorted(set(GGML_BLOCKS) - {"Q4_0"}))
    chosen = {n: next(kinds, "Q8_0") for n, w in state.items() if w.ndim == 2}
    held = gguf_writer.write(tmp_path / "m.gguf", "llama", config, state, lambda n: chosen[n])
    assert set(chosen.values()) == set(GGML_BLOCKS) - {"Q4_0"}
    found = dict(dense_state(tmp_path / "m.gguf"))
    assert found.keys() == held.keys()
    for name, w in held.items():
        assert np.isfinite(w).all() and np.array_equal(found[name], w), (name, chosen.get(name))


@pytest.mark.parametrize(
    ("architecture", "model_type", "changes"),
    [
        ("llama", "llama", {}),
        ("qwen2", "qwen2", {}),
        ("qwen3", "qwen3", {"head_dim": 64}),
        ("gemma2", "gemma2", {"head_dim": 64, "query_pre_attn_scalar": 64}),
        ("gemma3", "gemma3_text", {"head_dim": 64, "query_pre_attn_scalar": 64}),
    ],
)
def test_as_transformers_reads_it(
    tmp_path: Path, architecture: str, model_type: str, changes: dict[str, Any]
) -> None:
    """The same parameters as transformers' reader of GGUF makes, and the same config where it matters."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config, state = parameters(model_type, **changes)

    def extra(writer: Any) -> None:
        writer.add_token_list([f"t{i}" for i in range(config["vocab_size"])])
        if architecture.startswith("gemma"):
            writer.add_sliding_window(32)
        if architecture == "llama":
            writer.add_rope_dimension_count(64)

    held = gguf_writer.write(tmp_path / "m.gguf", architecture, config, state, lambda n: "Q5_0", extra)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SIZES, **changes}))
    theirs = load_gguf_checkpoint(str(tmp_path / "m.gguf"), return_tensors=True, model_to_load=model)
    found = dict(dense_state(tmp_path))
    assert found.keys() == held.keys()
    assert theirs["tensors"].keys() == found.keys()
    for name, tensor in theirs["tensors"].items():
        np.testing.assert_allclose(found[name], tensor.float().numpy(), atol=1e-6, err_msg=name)
    (ours, _) = read_gguf(gguf_model(tmp_path))
    for key in ("head_dim", "sliding_window", "num_key_value_heads", "tie_word_embeddings", "vocab_size"):
        if key in theirs["config"]:
            assert ours[key] == theirs["config"][key], key

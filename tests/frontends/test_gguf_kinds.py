"""GGUF as its users have it: every block type, split files, biases, Gemma's norms, scaled rotary frequencies,
and the tokenizer inside; compared with the gguf package and with transformers' own reader.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tyir.attributes import DictAttr, SymbolRefAttr
from tyir.diagnostics import Diagnostic, TyirError
from tyir.dialects import quant, ty
from tyir.dialects.quant import GGML_BLOCKS
from tyir.frontends.checkpoint import open_checkpoint
from tyir.frontends.dense_state import dense_state
from tyir.frontends.gguf.files import gguf_model, read_gguf
from tyir.frontends.huggingface import import_model
from tyir.frontends.side_files import side_files
from tyir.ir import Value
from tyir.types import TensorType, f32, ui8

gguf = pytest.importorskip("gguf")
from tests.frontends import gguf_writer  # noqa: E402 - it needs the package

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def parameters(model_type: str, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Configuration and random parameters of a small model; tied ones once."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter.data, -0.5, 0.5)
    state = {n: p.detach().numpy() for n, p in model.named_parameters()}
    return config.to_dict(), state


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


@pytest.mark.parametrize("architecture", ["gemma", "granite"])
def test_architectures_that_transformers_does_not_read_from_gguf(tmp_path: Path, architecture: str) -> None:
    config, state = parameters(architecture, head_dim=64)

    def extra(writer: Any) -> None:
        if architecture == "granite":
            writer.add_logit_scale(8.0)
            writer.add_embedding_scale(12.0)
            writer.add_residual_scale(0.22)
            writer.add_attention_scale(0.0156)

    held = gguf_writer.write(tmp_path / "m.gguf", architecture, config, state, lambda n: "Q4_1", extra)
    found = dict(dense_state(tmp_path))
    assert found.keys() == held.keys()
    for name, w in held.items():
        np.testing.assert_allclose(found[name], w, atol=1e-6, err_msg=name)
    (ours, _) = read_gguf(gguf_model(tmp_path))
    if architecture == "granite":
        names = ("logits_scaling", "embedding_multiplier", "residual_multiplier", "attention_multiplier")
        assert [ours[n] for n in names] == pytest.approx([8.0, 12.0, 0.22, 0.0156])


BIASED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("llama", {"attention_bias": True}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"mlp_bias": True}),
    ("llama", {"attention_bias": True, "without": ("o_proj.bias",)}),
    ("llama", {"attention_bias": True, "num_hidden_layers": 2}),
    ("granite", {"attention_bias": True, "mlp_bias": True}),
    ("qwen3", {"attention_bias": True, "head_dim": 64}),
    ("gemma", {"attention_bias": True, "head_dim": 64}),
)


@pytest.mark.parametrize(("model_type", "changes"), BIASED)
def test_biases_that_no_metadata_tell_of(tmp_path: Path, model_type: str, changes: dict[str, Any]) -> None:
    """The config follows from the tensors; biases of q and k are interleaved as their weights are."""
    changes = dict(changes)
    without = changes.pop("without", ("no such",))
    config, state = parameters(model_type, **changes)
    state = {n: w for n, w in state.items() if not n.endswith(without)}
    held = gguf_writer.write(tmp_path / "m.gguf", model_type, config, state, lambda n: "Q8_0")
    found = dict(dense_state(tmp_path))
    assert found.keys() == held.keys() and sum(n.endswith(".bias") for n in found) >= 3
    for name, w in held.items():
        np.testing.assert_allclose(found[name], w, atol=1e-6, err_msg=name)
    names, _ = read_gguf([tmp_path / "m.gguf"])
    assert (names["architectures"] == ["Qwen2ForCausalLM"]) == (without == ("o_proj.bias",))


@pytest.mark.parametrize(
    ("model_type", "without", "said"),
    [
        ("llama", ("v_proj.bias", "o_proj.bias"), "lacks 2 of the model's"),
        ("llama", ("q_proj.bias", "k_proj.bias"), "no place for"),
        ("llama", ("0.self_attn.q_proj.bias",), "lacks 1 of the model's"),
        ("qwen2", ("q_proj.bias", "k_proj.bias", "v_proj.bias"), "lacks 6 of the model's"),
    ],
)
def test_biases_that_no_class_has_are_told_of_the_file(
    tmp_path: Path, model_type: str, without: tuple[str, ...], said: str
) -> None:
    """Without a word of a config.json that is not there, but to put one there."""
    changes = {"attention_bias": True} if model_type == "llama" else {}
    config, state = parameters(model_type, num_hidden_layers=2, **changes)
    state = {n: w for n, w in state.items() if not n.endswith(without)}
    gguf_writer.write(tmp_path / "m.gguf", model_type, config, state)
    with pytest.raises(TyirError) as caught:
        import_model(tmp_path)
    message = str(caught.value)
    assert said in message and "original model's config.json beside the file" in message
    assert "of config.json" not in message and "use the config.json" not in message


KEYS: tuple[tuple[str, Any], ...] = (
    ("attention.causal", False),
    ("attention.clamp_kqv", 8.0),
    ("attention.key_length", 0),
    ("attention.max_alibi_bias", 8.0),
    ("attention.scale", 0.5),
    ("attention.sliding_window", 4),
    ("attention.value_length", 32),
    ("attention.head_count_kv", [2, 4]),
    ("attention.of_tomorrow", 1),
    ("block_count", "two"),
    ("expert_count", 8),
    ("final_logit_softcapping", 30.0),
    ("logit_scale", 8.0),
    ("rope.dimension_count", 32),
    ("rope.dimension_sections", [16, 24, 24, 0]),
    ("rope.freq_base", [1.0, 2.0]),
    ("rope.scaling.alpha", 1000.0),
    ("rope.scaling.yarn_log_multiplier", 0.1),
    ("use_parallel_residual", True),
)


def add_to(writer: Any, key: str, value: Any) -> None:
    """A value of metadata, in place of one that is there."""
    writer.kv_data[0].pop(key, None)
    kinds = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
    getattr(writer, f"add_{kinds[type(value)]}")(key, value)


@pytest.mark.parametrize(("key", "value"), KEYS)
def test_metadata_that_change_what_is_computed_are_refused(
    tmp_path: Path, llama: tuple[dict[str, Any], dict[str, Any]], key: str, value: Any
) -> None:
    """By name and value; a config.json beside the file is believed instead."""
    gguf_writer.write(tmp_path / "m.gguf", "llama", *llama, extra=lambda w: add_to(w, f"llama.{key}", value))
    message = refusal(tmp_path)
    assert f"llama.{key}" in message and "config.json beside the file" in message


def test_metadata_that_change_nothing(tmp_path: Path, llama: tuple[dict[str, Any], dict[str, Any]]) -> None:
    def extra(writer: Any) -> None:
        for key, value in (
            ("attention.causal", True),
            ("attention.value_length", 64),
            ("attention.head_count_kv", [2, 2]),
            ("expert_count", 0),
            ("rope.dimension_count", 64),
            ("rope.scaling.finetuned", False),
            ("tensor_data_layout", "Meta AI original pth"),
            ("vocab_size", 96),
        ):
            add_to(writer, f"llama.{key}", value)

    gguf_writer.write(tmp_path / "m.gguf", "llama", *llama, extra=extra)
    config, _ = read_gguf([tmp_path / "m.gguf"])
    assert (config["num_key_value_heads"], config["head_dim"]) == (2, 64)
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize("missing", ["attention.head_count", "block_count", "feed_forward_length"])
def test_metadata_that_are_missing(
    tmp_path: Path, llama: tuple[dict[str, Any], dict[str, Any]], missing: str
) -> None:
    """Never transformers' default of another model."""
    gguf_writer.write(
        tmp_path / "m.gguf", "llama", *llama, extra=lambda w: w.kv_data[0].pop(f"llama.{missing}")
    )
    assert f"the file does not say llama.{missing}" in refusal(tmp_path)


@pytest.mark.parametrize("pattern", [None, 2, [True, True, False]])
def test_the_kinds_of_layers_of_gemma(tmp_path: Path, pattern: Any) -> None:
    config, state = parameters("gemma3_text", head_dim=64, num_hidden_layers=3)

    def extra(writer: Any) -> None:
        writer.add_sliding_window(32)
        writer.add_final_logit_softcapping(30.0)
        if pattern is not None:
            add_to(writer, "gemma3.attention.sliding_window_pattern", pattern)

    gguf_writer.write(tmp_path / "m.gguf", "gemma3", config, state, extra=extra)
    found, _ = read_gguf([tmp_path / "m.gguf"])
    local, full = "sliding_attention", "full_attention"
    kinds = {2: [local, full, local], None: None}.get(pattern if type(pattern) is int else None)
    assert found.get("layer_types") == ([local, local, full] if isinstance(pattern, list) else kinds)
    assert found["final_logit_softcapping"] == 30.0


def test_gemma_computes_as_transformers(tmp_path: Path) -> None:
    """The whole way: norms less one, the four norms of a layer, soft caps and the query's scale."""
    import torch
    from transformers import AutoModelForCausalLM, Gemma2Config

    from tyir.execution.weights import CheckpointReader
    from tyir.interpreter import run_function
    from tyir.passes.raise_aten import raise_aten

    config, state = parameters("gemma2", head_dim=64, query_pre_attn_scalar=64, sliding_window=32)

    def extra(writer: Any) -> None:
        writer.add_sliding_window(32)
        writer.add_attn_logit_softcapping(50.0)
        writer.add_final_logit_softcapping(30.0)

    held = gguf_writer.write(tmp_path / "m.gguf", "gemma2", config, state, lambda n: "Q5_1", extra)
    model = AutoModelForCausalLM.from_config(Gemma2Config(**config), dtype=torch.float32).eval()
    ids = np.arange(5, 17)[None]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(held[name].copy()))
        wanted = model(torch.tensor(ids)).logits.numpy()
    module = import_model(tmp_path, dtype="f32")
    raise_aten(module)
    (got,) = run_function(module, "main", (ids, np.arange(12)[None]), CheckpointReader(tmp_path))
    assert float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted)) < 1e-5


# ------------------------------------------------------------------------------------------------------ files


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    return parameters("llama", num_hidden_layers=2, tie_word_embeddings=False)


def refusal(path: Path) -> str:
    problems: list[Diagnostic] = []
    open_checkpoint(path, problems)
    return "\n".join(f"{p.message}; {p.help}" for p in problems)


@pytest.mark.parametrize("most", [4, 9, 17])
def test_split_files(tmp_path: Path, llama: tuple[dict[str, Any], dict[str, Any]], most: int) -> None:
    """From the folder, the first file or any other; parts that are missing are named."""
    held = gguf_writer.write(tmp_path / "m.gguf", "llama", *llama, lambda n: "Q4_1", split_max_tensors=most)
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


def test_parts_of_other_models(tmp_path: Path, llama: tuple[dict[str, Any], dict[str, Any]]) -> None:
    gguf_writer.write(tmp_path / "m.gguf", "llama", *llama, split_max_tensors=12)
    other = {n: w for n, w in llama[1].items() if "layers.1" not in n}
    gguf_writer.write(tmp_path / "o.gguf", "llama", llama[0], other, split_max_tensors=6)
    assert "holds 2 GGUF files: m-00001-of-00002.gguf, o-00001-of-00002.gguf" in refusal(tmp_path)
    (tmp_path / "o-00002-of-00002.gguf").replace(tmp_path / "m-00002-of-00002.gguf")
    assert "files of this model hold 18 tensors, the first one says 21" in refusal(
        tmp_path / "m-00001-of-00002.gguf"
    )


def test_a_tensor_that_lies_in_two_files(
    tmp_path: Path, llama: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    """By name in the files or by the name that it gets."""
    name = "model.layers.0.mlp.up_proj.weight"
    gguf_writer.write(
        tmp_path / "m.gguf", "llama", *llama, extra=lambda w: w.add_tensor(name, np.zeros((512, 256), "f2"))
    )
    assert "1 tensors lie in the files more than once (first 'blk.0.ffn_up.weight')" in refusal(tmp_path)


def test_types_that_cannot_be_read_are_said_once(
    tmp_path: Path, llama: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    def extra(writer: Any) -> None:
        for i in range(5):
            writer.add_tensor(f"blk.{i}.extra", np.zeros((2, 32), np.int8))
        writer.add_tensor("blk.0.other", np.zeros(3, np.int32))

    gguf_writer.write(tmp_path / "m.gguf", "llama", *llama, extra=extra)
    message = refusal(tmp_path)
    assert "5 tensors have type I8, which cannot be imported (first 'blk.0.extra')" in message
    assert "1 tensors have type I32" in message and message.count("cannot be imported") == 2


# ------------------------------------------------------------------------------------------------------- rope


def rope_of(
    tmp_path: Path, llama: tuple[dict[str, Any], dict[str, Any]], extra: Callable[[Any], None]
) -> Any:
    gguf_writer.write(tmp_path / "m.gguf", "llama", *llama, extra=extra)
    return read_gguf([tmp_path / "m.gguf"])[0]["rope_parameters"]


def test_scaled_rotary_frequencies(tmp_path: Path, llama: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """Llama 3's divisors (computed by transformers), linear and yarn; what is not known is refused."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for factor in (8.0, 32.0):
        rope = {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        config = LlamaConfig(hidden_size=256, num_attention_heads=4, rope_parameters=rope)
        scaled = ROPE_INIT_FUNCTIONS["llama3"](config, None)[0].numpy()
        freqs = (10000.0 ** (-np.arange(32) / 32) / scaled).astype(np.float32)
        assert rope_of(tmp_path, llama, lambda w, f=freqs: w.add_tensor("rope_freqs.weight", f)) == rope

    def yarn(writer: Any) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(32)
        writer.add_rope_scaling_yarn_attn_factor(0.5)
        writer.add_rope_scaling_yarn_beta_slow(2.0)

    assert rope_of(tmp_path, llama, yarn) == {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "attention_factor": 0.5,
        "beta_slow": 2.0,
    }
    for key in (
        "llama.rope.scaling.factor",
        "llama.rope.scale_linear",
    ):  # llama.cpp: without a type it is linear
        found = rope_of(tmp_path, llama, lambda w, k=key: w.add_float32(k, 4.0))
        assert (found["rope_type"], found["factor"]) == ("linear", 4.0)
    with pytest.raises(TyirError, match="in another way than Llama 3 does"):
        rope_of(
            tmp_path, llama, lambda w: w.add_tensor("rope_freqs.weight", np.linspace(1, 9, 32, dtype="f4"))
        )
    with pytest.raises(TyirError, match="scales its rotary frequencies as 'longrope'"):
        rope_of(tmp_path, llama, lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE))


# -------------------------------------------------------------------------------------------------- tokenizer

TEXTS = ("The old house stood at the end", "  two  spaces, 123 numbers\n\nlines", "ä 中文 <s>x", "")


def tokenizer_of(tmp_path: Path, extra: Callable[[Any], None]) -> tuple[Any, list[str]]:
    """The tokenizer that artifacts of a GGUF file with these metadata get, and the warnings."""
    from transformers import AutoTokenizer

    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    extra(writer)
    writer.add_tensor("output_norm.weight", np.zeros(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tmp_path / "config.json").write_text("{}")
    notes: list[Diagnostic] = []
    made = side_files(tmp_path, ["m.gguf"], notes.append)
    (tmp_path / "made").mkdir()
    for name, content in made.items():
        (tmp_path / "made" / name).write_bytes(content)
    found = AutoTokenizer.from_pretrained(tmp_path / "made") if "tokenizer.json" in made else None
    return found, [note.message for note in notes]


def test_a_byte_level_tokenizer(tmp_path: Path) -> None:
    """That of tiny-qwen2 by way of GGUF; a merge that can never apply and a chat template in it."""
    from transformers import AutoTokenizer

    source = Path(__file__).parents[1] / "models" / "tiny-qwen2"
    original = AutoTokenizer.from_pretrained(source)
    content = json.loads((source / "tokenizer.json").read_text())
    vocabulary = {**content["model"]["vocab"], **{t["content"]: t["id"] for t in content["added_tokens"]}}
    special = {t["content"] for t in content["added_tokens"]}
    tokens = sorted(vocabulary, key=lambda t: vocabulary[t])

    def extra(writer: Any) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_list(tokens)
        writer.add_token_types([3 if t in special else 1 for t in tokens])
        merges = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
        writer.add_token_merges([*merges, "the nowhere"])
        writer.add_eos_token_id(vocabulary["<|endoftext|>"])
        writer.add_chat_template("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")

    found, notes = tokenizer_of(tmp_path, extra)
    for text in (*TEXTS[:2], "x<|endoftext|>y", "ä 中文"):
        assert found(text)["input_ids"] == original(text)["input_ids"], text
        assert found.decode(found(text)["input_ids"]) == text
    assert found.eos_token == "<|endoftext|>" and not notes
    assert found.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "[a]"


@pytest.mark.parametrize("add", [None, True, False])
def test_a_sentencepiece_tokenizer(tmp_path: Path, add: bool | None) -> None:
    """Merges follow from the scores; one beginning token, whether the text begins with one or not."""
    from transformers import LlamaTokenizer

    from tyir.tools.run.prompts import token_ids

    pieces = ["▁", "t", "h", "e", "o", "l", "d", "s", "u", "th", "▁th", "▁the", "ol", "old", "▁old", "se"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces]
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces))]

    def extra(writer: Any) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_scores(scores)
        writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * len(pieces)])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
        if add is not None:
            writer.add_add_bos_token(add)

    found, notes = tokenizer_of(tmp_path, extra)
    assert not notes
    merges = [("t", "h"), ("▁", "th"), ("▁th", "e"), ("o", "l"), ("ol", "d"), ("▁", "old"), ("s", "e")]
    original = LlamaTokenizer(
        vocab={t: i for i, t in enumerate(tokens)}, merges=merges, add_bos_token=add is not False
    )
    for text in ("the old", "the ä", "theold\nse"):
        ids = token_ids(found, text)
        assert ids == original(text)["input_ids"], text
        assert ids.count(1) == int(add is not False)
    assert token_ids(found, "<s>the")[:2].count(1) == 1
    assert token_ids(found, "<s><s>the").count(1) == 2  # the user wrote two


def test_tokenizers_that_cannot_be_made(tmp_path: Path) -> None:
    found, notes = tokenizer_of(tmp_path, lambda w: w.add_context_length(8))
    assert found is None and notes == ["m.gguf carries no tokenizer"]

    def unknown(writer: Any) -> None:
        writer.add_tokenizer_model("of-tomorrow")
        writer.add_token_list(["a", "b"])

    other = tmp_path / "other"
    other.mkdir()
    found, notes = tokenizer_of(other, unknown)
    assert found is None and "no tokenizer can be made of m.gguf" in notes[0]


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ({"token_scores": [0.0, 1.0]}, "it has 3 tokens and 2 scores"),
        ({"token_types": [1]}, "it has 3 tokens and 1 token_type"),
        ({"token_list": ["a", "b", "a"]}, "1 of its 3 tokens are there more than once"),
        ({"token_merges": None}, "it has no merges"),
        ({"token_list": [1, 2, 3]}, "its tokens are no list of texts"),
        ({"eos_token_id": 99999}, ""),
        ({"bos_token_id": [1, 2]}, ""),
    ],
)
def test_a_tokenizer_that_is_not_whole(tmp_path: Path, what: dict[str, Any], said: str) -> None:
    """None is made, and the reason is told; never one that splits text in another way."""

    def extra(writer: Any) -> None:
        writer.add_tokenizer_model("gpt2")
        parts = {"token_list": ["a", "b", "ab"], "token_merges": ["a b"], **what}
        for name, value in parts.items():
            if name.endswith("_id"):
                add_to(writer, f"tokenizer.ggml.{name}", value)
            elif value is not None:
                getattr(writer, f"add_{name}")(value)

    found, notes = tokenizer_of(tmp_path, extra)
    assert found is None and f"no tokenizer can be made of m.gguf: {said}" in notes[-1]


def test_artifacts_of_a_file_alone_have_config_and_tokenizer(
    tmp_path: Path, llama: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    """Several tokens end a text: eos, end of turn, end of message."""

    def extra(writer: Any) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("of-tomorrow")
        writer.add_token_list([chr(33 + i) for i in range(90)])
        writer.add_token_merges(["! !"])
        writer.add_eos_token_id(2)
        writer.add_eot_token_id(7)

    gguf_writer.write(tmp_path / "m.gguf", "llama", *llama, extra=extra)
    notes: list[Diagnostic] = []
    made = side_files(tmp_path, ["m.gguf"], notes.append)
    assert json.loads(made["config.json"])["eos_token_id"] == [2, 7]
    assert "tokenizer.json" in made and "splits text as 'of-tomorrow', which is not known" in notes[0].message
    (tmp_path / "tokenizer.json").write_text("{}")
    assert set(side_files(tmp_path, ["m.gguf"], notes.append)) == {"config.json"}

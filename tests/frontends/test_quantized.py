"""Quantised checkpoints: de-quantised weights bit by bit against unpackers written from the formats'
descriptions; logits; refusals.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.frontends.quantized import (
    KINDS,
    Kind,
    awq,
    compressed,
    gptq,
    nibble,
    quantize,
    unpack_compressed,
    write_quantized,
)
from tests.frontends.quantized import Groups as Quantized
from tyir.attributes import DenseElementsAttr
from tyir.diagnostics import Diagnostic, TyirError
from tyir.dialects import quant, ty
from tyir.dialects.builtin import Module
from tyir.execution.weights import CheckpointReader
from tyir.frontends.dense_state import dense_state
from tyir.frontends.huggingface import import_model
from tyir.interpreter import run_function
from tyir.parser import parse_module
from tyir.passes.raise_aten import raise_aten
from tyir.printer import print_op

SHAPES = {
    "q_proj": (64, 64),
    "k_proj": (32, 64),
    "v_proj": (32, 64),
    "o_proj": (64, 64),
    "gate_proj": (128, 64),
    "up_proj": (128, 64),
    "down_proj": (64, 128),
    "lm_head": (96, 64),
}
Unpacked = Callable[[str], dict[str, npt.NDArray[Any]]]
Edit = Callable[[dict[str, Any]], None]
Stored = dict[str, dict[str, npt.NDArray[Any]]]


@pytest.fixture(scope="module")
def plain(save_model: Callable[..., Path]) -> Path:
    return save_model("qwen2", dtype="float16", hidden_size=64, intermediate_size=128)


@pytest.fixture(scope="module")
def checkpoints(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Stored]]:
    root = tmp_path_factory.mktemp("quantized")
    return {name: (root / name, write_quantized(plain, root / name, kind)) for name, kind in KINDS.items()}


@pytest.fixture(scope="module")
def unpacked(checkpoints: dict[str, tuple[Path, Stored]]) -> Callable[[str], dict[str, npt.NDArray[Any]]]:
    """`unpacked(kind)`: the weights the tests' own unpackers find, by parameter name."""

    @cache
    def weights(name: str) -> dict[str, npt.NDArray[Any]]:
        found = {}
        for parameter, parts in checkpoints[name][1].items():
            last = parameter.rpartition(".weight")[0].rpartition(".")[2]
            found[parameter] = KINDS[name].unpack(parts, *SHAPES[last])
        return found

    return weights


def test_golden_words() -> None:
    """Columns 0..7 in AutoAWQ's order, rows 0..7 in GPTQ's, and compressed-tensors' -8, -7, 0, 1, 2, 3, 4,
    7.
    """

    def unpacked(word: int, **how: Any) -> list[int]:
        words = np.array([[word]], np.uint32).view(np.int32)
        constant = ty.Constant(value=DenseElementsAttr.from_numpy(words))
        op = quant.Unpack(constant.out, **how)
        return [int(v) for v in np.asarray(op.evaluate(words)).ravel()]

    assert unpacked(0x75316420, axis=1, order=(0, 2, 4, 6, 1, 3, 5, 7)) == list(range(8))
    assert unpacked(0x76543210, axis=0) == list(range(8))
    assert [v - 8 for v in unpacked(0xFCBA9810, axis=1)] == [-8, -7, 0, 1, 2, 3, 4, 7]
    assert unpacked(0xFCBA9810, axis=1, size=3) == [0, 1, 8]


def test_the_tests_own_packers_make_the_golden_words() -> None:
    eight = np.arange(8)
    scales = np.ones((8, 1), np.float16)
    assert (
        awq(Quantized(np.repeat(eight[:, None], 8, 1), scales.astype(int), scales))["qweight"].view(
            np.uint32
        )[0, 0]
        == 0x75316420
    )
    assert (
        gptq(Quantized(np.tile(eight, (8, 1)), scales.astype(int), scales), 1)["qweight"].view(np.uint32)[
            0, 0
        ]
        == 0x76543210
    )
    values = np.tile(np.array([-8, -7, 0, 1, 2, 3, 4, 7]) + 8, (8, 1))
    assert (
        compressed(Quantized(values, scales.astype(int), scales), True)["weight_packed"].view(np.uint32)[0, 0]
        == 0xFCBA9810
    )
    assert [nibble(-1, i) for i in range(8)] == [15] * 8


@pytest.mark.parametrize("name", KINDS)
def test_weights_are_bit_exact(
    checkpoints: dict[str, tuple[Path, Stored]], unpacked: Unpacked, name: str
) -> None:
    folder, stored = checkpoints[name]
    found = dict(dense_state(folder))
    assert len(stored) == 14 + KINDS[name].head
    for parameter, wanted in unpacked(name).items():
        np.testing.assert_array_equal(
            found[parameter].view(np.uint32), wanted.astype(np.float32).view(np.uint32), err_msg=parameter
        )


def hugging_face(
    folder: Path, plain: Path, kind: Kind, weights: dict[str, npt.NDArray[Any]], ids: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """Logits of transformers in fp32 on the weights that the test's own unpacker finds."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(plain)
    config.tie_word_embeddings = config.tie_word_embeddings and not kind.head
    model = AutoModelForCausalLM.from_pretrained(plain, config=config, dtype=torch.float32).eval()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, array in weights.items():
            parameters[name].copy_(torch.from_numpy(array.astype(np.float32)))
        logits: npt.NDArray[np.float32] = model(torch.tensor(ids)).logits.numpy()
    return logits


@pytest.mark.parametrize("name", KINDS)
def test_logits(
    checkpoints: dict[str, tuple[Path, Stored]], plain: Path, unpacked: Unpacked, name: str
) -> None:
    """At stages aten and ty, through the text; after raising every packed linear is a ty.quantized_linear."""
    folder, stored = checkpoints[name]
    ids = np.random.default_rng(0).integers(0, 96, (1, 33))
    wanted = hugging_face(folder, plain, KINDS[name], unpacked(name), ids)
    module = import_model(folder, dtype="f32")
    for stage in ("aten", "ty"):
        if stage == "ty":
            raise_aten(module)
            assert sum(1 for _ in module.walk_type(ty.QuantizedLinear)) == len(stored)
        module = parse_module(print_op(module))
        (got,) = run_function(module, "main", (ids, np.arange(33)[None]), CheckpointReader(folder))
        assert float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted)) < 1e-5


@pytest.fixture
def awq_folder(checkpoints: dict[str, tuple[Path, Stored]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoints["awq"][0], tmp_path / "awq"))


@pytest.fixture
def gptq_folder(checkpoints: dict[str, tuple[Path, Stored]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoints["gptq"][0], tmp_path / "gptq"))


def edit(folder: Path, quantization: dict[str, Any] | None = None, tensors: Edit | None = None) -> None:
    from safetensors.numpy import load_file, save_file

    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(quantization or {})
    (folder / "config.json").write_text(json.dumps(config))
    if tensors is not None:
        found = load_file(folder / "model.safetensors")
        tensors(found)
        save_file(found, folder / "model.safetensors")


def refusal(folder: Path) -> str:
    with pytest.raises(TyirError) as caught:
        import_model(folder)
    assert all(d.help for d in caught.value.diagnostics)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"bits": 8}, "bits 8 (4 is accepted)"),
        ({"version": "gemv"}, "version 'gemv' (gemm is accepted)"),
        ({"zero_point": "none"}, "zero_point 'none'"),
        ({"group_size": "x"}, "group_size 'x'"),
        ({"group_size": 32}, "has groups of 64 input channels, the quantisation config says 32"),
        ({"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes', which cannot be imported"),
        ({"quant_method": "compressed-tensors"}, "no config_groups"),
    ],
)
def test_configs_that_cannot_be_read(awq_folder: Path, change: dict[str, Any], wanted: str) -> None:
    edit(awq_folder, change)
    assert wanted in refusal(awq_folder)


def test_all_problems_of_a_quantised_checkpoint_at_once(awq_folder: Path) -> None:
    def spoil(t: dict[str, Any]) -> None:
        del t["model.layers.0.self_attn.q_proj.scales"]
        t["model.layers.0.mlp.up_proj.qweight"] = t["model.layers.0.mlp.up_proj.qweight"][:, 1:].copy()
        t["model.layers.1.mlp.up_proj.qzeros"] = t["model.layers.1.mlp.up_proj.qzeros"].astype(np.int64)

    edit(awq_folder, tensors=spoil)
    message = refusal(awq_folder)
    assert (
        "'model.layers.0.self_attn.q_proj' is quantised, but model.layers.0.self_attn.q_proj.scales is"
        " missing" in message
    )
    assert (
        "'model.layers.0.mlp.up_proj.qweight' has shape [64, 15], a 128x64 weight in groups of 64 needs"
        " [64, 16]" in message
    )
    assert "'model.layers.1.mlp.up_proj.qzeros' has element type i64, expected i32" in message


def test_config_and_tensors_contradict_each_other(awq_folder: Path, plain: Path) -> None:
    edit(awq_folder, {"modules_to_not_convert": ["mlp.up"]})
    notes: list[Diagnostic] = []
    import_model(awq_folder, note=notes.append)
    assert any("2 tensors are quantised although config.json excludes them" in n.message for n in notes)
    shutil.copy(plain / "model.safetensors", awq_folder)
    assert "says the weights are quantised (awq), but no tensor is" in refusal(awq_folder)


def test_quantised_tensors_without_a_config(awq_folder: Path) -> None:
    config = json.loads((awq_folder / "config.json").read_text())
    settings = config.pop("quantization_config")
    (awq_folder / "config.json").write_text(json.dumps(config))
    assert "14 tensors are quantised" in refusal(awq_folder)
    old = {"w_bit": 4, "q_group_size": settings["group_size"], "version": "GEMM", "zero_point": True}
    (awq_folder / "quant_config.json").write_text(
        json.dumps(old)
    )  # what AutoAWQ wrote before transformers knew the format
    assert import_model(awq_folder).attributes["tyir.model"] is not None


def test_a_linear_is_quantised_exactly_when_its_tensors_are(awq_folder: Path, plain: Path) -> None:
    from safetensors.numpy import load_file

    name = "model.layers.1.self_attn.q_proj"

    def restore(t: dict[str, Any]) -> None:
        for part in ("qweight", "qzeros", "scales"):
            del t[f"{name}.{part}"]
        t[f"{name}.weight"] = load_file(plain / "model.safetensors")[f"{name}.weight"]

    edit(awq_folder, tensors=restore)
    module = import_model(awq_folder)
    raise_aten(module)
    assert sum(1 for _ in module.walk_type(ty.QuantizedLinear)) == 13


@pytest.mark.parametrize("kind", ["gptq", "gptq_v2", "ct-group", "ct-symmetric"])
def test_groups_in_order_of_activations(
    checkpoints: dict[str, tuple[Path, Stored]], tmp_path: Path, kind: str
) -> None:
    """Input channels whose groups are no ranges: the values are exact, one warning has the count, and a
    channel without a group is refused.
    """
    folder = Path(shutil.copytree(checkpoints[kind][0], tmp_path / "checkpoint"))
    several = ("gate", "up", "down") if KINDS[kind].group == 32 else ("down",)  # groups of 64: one of 64
    bases = [f"model.layers.{i}.mlp.{part}_proj" for i in (0, 1) for part in several]
    index, scales = ("g_idx", "scales") if kind.startswith("gptq") else ("weight_g_idx", "weight_scale")
    wanted: dict[str, npt.NDArray[Any]] = {}
    rng = np.random.default_rng(0)

    def shuffle(t: dict[str, Any]) -> None:
        for base in bases:
            n, k = SHAPES[base.rpartition(".")[2]]
            count = t[f"{base}.{scales}"].shape[0 if kind.startswith("gptq") else 1]
            groups = rng.permutation(np.arange(k) // (k // count)).astype(np.int32)
            t[f"{base}.{index}"] = groups
            parts = {key.rpartition(".")[2]: v for key, v in t.items() if key.rpartition(".")[0] == base}
            wanted[f"{base}.weight"] = (
                KINDS[kind].unpack(parts, n, k)
                if kind.startswith("gptq")
                else unpack_compressed(parts, n, k, groups)
            )

    config = {"desc_act": True} if kind.startswith("gptq") else {}
    edit(folder, config, shuffle)
    notes: list[Diagnostic] = []
    module = import_model(folder, note=notes.append)
    said = [n.message for n in notes if "in order of activations" in n.message]
    assert len(said) == 1 and said[0].startswith(f"{len(bases)} linears") and min(bases) in said[0]
    found = dict(dense_state(folder))
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array.astype(np.float32), err_msg=name)
    raise_aten(module)
    assert sum(1 for _ in module.walk_type(ty.QuantizedLinear)) == 14 - len(bases)
    again = parse_module(print_op(module))
    assert sum(1 for _ in again.walk_type(quant.DequantizeIndexed)) == len(bases)
    edit(folder, tensors=lambda t: [t[f"{b}.{index}"].__setitem__(3, 99) for b in bases])
    message = refusal(folder)
    assert "names groups from 0 to 99" in message and message.count("names groups") == 1
    assert f"(and {len(bases) - 1} more like it)" in message


def test_an_index_in_order_is_no_order_of_activations(gptq_folder: Path) -> None:
    """desc_act with static groups stores k // g all the same: nothing changes."""
    edit(gptq_folder, {"desc_act": True})
    assert "order of activations" not in notes_of(gptq_folder)


@pytest.mark.parametrize("kind", ["awq", "gptq", "ct-group"])
def test_what_every_linear_lacks_is_said_once(
    checkpoints: dict[str, tuple[Path, Stored]], tmp_path: Path, kind: str
) -> None:
    folder = Path(shutil.copytree(checkpoints[kind][0], tmp_path / "checkpoint"))
    ending = SCALES[kind]
    edit(folder, tensors=lambda t: [t.pop(n) for n in list(t) if n.endswith(f".{ending}")])
    message = refusal(folder)
    assert f"self_attn.q_proj.{ending} is missing (and 13 more like it)" in message
    assert message.count("error:") == 1 and "internal" not in message


@pytest.mark.parametrize("kind", ["ct-group", "ct-symmetric"])
def test_an_index_that_was_never_set(
    checkpoints: dict[str, tuple[Path, Stored]], tmp_path: Path, kind: str
) -> None:
    """compressed-tensors begins weight_g_idx with -1, and takes groups in order where it is left so."""
    folder = Path(shutil.copytree(checkpoints[kind][0], tmp_path / "checkpoint"))
    wanted = dict(dense_state(folder))
    names = [f"model.layers.{i}.mlp.up_proj.weight_g_idx" for i in (0, 1)]
    edit(folder, tensors=lambda t: t.update({n: np.full(64, -1, np.int32) for n in names}))
    assert "order of activations" not in notes_of(folder)
    found = dict(dense_state(folder))
    assert all(np.array_equal(found[n], wanted[n]) for n in wanted)


@pytest.mark.parametrize("kind", ["awq", "gptq", "ct-group", "plain"])
def test_a_tied_head_stored_once_more(
    checkpoints: dict[str, tuple[Path, Stored]], save_model: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    """A quantised copy, in the format of the others, is left out with one warning; and so is a copy as it
    is.
    """
    from safetensors.numpy import load_file, save_file

    plain = save_model("qwen2", dtype="float16", tie_word_embeddings=True, intermediate_size=128)
    folder = tmp_path / "tied"
    stored: dict[str, Any]
    if kind == "plain":
        shutil.copytree(plain, folder)
        stored = {"weight": load_file(plain / "model.safetensors")["model.embed_tokens.weight"]}
    else:
        write_quantized(plain, folder, KINDS[kind])
        head = load_file(plain / "model.safetensors")["model.embed_tokens.weight"]
        head = np.random.default_rng(0).normal(0, 0.02, head.shape)  # the padding token's row would be zero
        stored = KINDS[kind].pack(quantize(head, KINDS[kind].group or 64, KINDS[kind].symmetric))
    tensors = load_file(folder / "model.safetensors")
    tensors.update({f"lm_head.{part}": np.ascontiguousarray(v) for part, v in stored.items()})
    save_file(tensors, folder / "model.safetensors")
    said = [n for n in notes_of(folder).splitlines() if "lm_head" in n]
    assert len(said) == 1 and "not used" in said[0] and "tied 'model.embed_tokens.weight'" in said[0]


def test_a_weight_stored_twice(awq_folder: Path, plain: Path) -> None:
    """The unquantised weights that some tools leave beside the quantised ones are not used."""
    from safetensors.numpy import load_file

    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)]
    whole = load_file(plain / "model.safetensors")
    edit(awq_folder, tensors=lambda t: t.update({n: whole[n] for n in names}))
    assert "2 tensors are not used: stored quantised as well" in notes_of(awq_folder)


def test_gptq_zero_biases_are_ignored_and_others_are_not(gptq_folder: Path) -> None:
    name = "model.layers.0.mlp.up_proj.bias"
    edit(gptq_folder, tensors=lambda t: t.update({name: np.zeros(128, np.float16)}))
    notes: list[Diagnostic] = []
    import_model(gptq_folder, note=notes.append)
    assert any(f"'{name}' is not used: all zeros" in n.message for n in notes)
    edit(gptq_folder, tensors=lambda t: t.update({name: np.ones(128, np.float16)}))
    assert f"no place for: {name}" in refusal(gptq_folder)


def notes_of(folder: Path) -> str:
    notes: list[Diagnostic] = []
    import_model(folder, note=notes.append)
    return "\n".join(n.message for n in notes)


def test_stored_zero_points_that_wrap_are_noted(gptq_folder: Path) -> None:
    name = "model.layers.1.mlp.up_proj.qzeros"
    edit(
        gptq_folder,
        tensors=lambda t: t.update({k: v & 0x77777777 for k, v in t.items() if k.endswith(".qzeros")}),
    )
    assert "zero points of 15" not in notes_of(gptq_folder)
    edit(gptq_folder, tensors=lambda t: t[name].view(np.uint32).__ior__(np.uint32(0xF0)))
    assert f"1 tensors hold stored zero points of 15 (first '{name}'), read as 0" in notes_of(gptq_folder)


def test_scales_that_are_rounded_are_noted(awq_folder: Path) -> None:
    assert "rounded to f16" not in notes_of(awq_folder)
    name = "model.layers.0.mlp.up_proj.scales"
    edit(awq_folder, tensors=lambda t: t.update({name: t[name].astype(np.float32)}))
    assert f"1 tensors of scales are f32 and are rounded to f16 (first '{name}')" in notes_of(awq_folder)


@pytest.mark.parametrize(("value", "noted"), [(1e-9, True), (0.0, False), (1e-7, False), (np.inf, False)])
def test_scales_that_vanish_are_noted(awq_folder: Path, value: float, noted: bool) -> None:
    name = "model.layers.1.self_attn.q_proj.scales"

    def spoil(t: dict[str, Any]) -> None:
        t[name] = t[name].astype(np.float32)
        t[name][0, 3] = value

    edit(awq_folder, tensors=spoil)
    assert (f"their groups become 0 (first '{name}')" in notes_of(awq_folder)) == noted


SCALES = {kind: "weight_scale" if kind.startswith("ct") else "scales" for kind in KINDS}


@pytest.mark.parametrize("name", KINDS)
def test_scales_that_quantisers_never_write_give_the_right_values(
    checkpoints: dict[str, tuple[Path, Stored]], tmp_path: Path, name: str
) -> None:
    """Zero, negative, subnormal and large ones: the values are those of the formats' descriptions."""
    folder = Path(shutil.copytree(checkpoints[name][0], tmp_path / "checkpoint"))
    wanted: dict[str, npt.NDArray[Any]] = {}

    def craft(t: dict[str, Any]) -> None:
        for parameter in checkpoints[name][1]:
            base = parameter.removesuffix(".weight")
            scales = t[f"{base}.{SCALES[name]}"]
            scales.reshape(-1)[:6] = (0.0, -0.0, -scales.reshape(-1)[2], 6e-8, -3e-5, 4000.0)
            parts = {key.rpartition(".")[2]: v for key, v in t.items() if key.rpartition(".")[0] == base}
            wanted[parameter] = KINDS[name].unpack(parts, *SHAPES[base.rpartition(".")[2]])

    edit(folder, tensors=craft)
    found = dict(dense_state(folder))
    for parameter, array in wanted.items():
        assert np.isfinite(array).all()
        np.testing.assert_array_equal(found[parameter], array.astype(np.float32), err_msg=parameter)


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("awq", "int4"),
        ("gptq", "fp16"),
        ("gptq-scattered", "fp16"),
        ("gptq-scattered", "int4"),
        ("ct-group", "fp16"),
    ],
)
def test_scales_that_are_no_numbers_are_named_by_a_compile(
    checkpoints: dict[str, tuple[Path, Stored]], tmp_path: Path, name: str, weights: str
) -> None:
    """All of them at once, by tensor, whether the weight stays in groups or becomes fp16."""
    from tyir.tools.api import compile_path

    kind = name.removesuffix("-scattered")
    folder = Path(shutil.copytree(checkpoints[kind][0], tmp_path / "checkpoint"))
    bases = [f"model.layers.{i}.mlp.{part}_proj" for i, part in enumerate(("up", "down"))]

    def spoil(t: dict[str, Any]) -> None:
        for base, value in zip(bases, (np.nan, np.inf)):
            t[f"{base}.{SCALES[kind]}"].reshape(-1)[3] = value
            if kind != name:
                t[f"{base}.g_idx"] = t[f"{base}.g_idx"][::-1].copy()
        wide = f"model.layers.1.self_attn.o_proj.{SCALES[kind]}"
        t[wide] = t[wide].astype(np.float32)
        t[wide].reshape(-1)[0] = 1e30

    edit(folder, {"desc_act": True} if kind != name else {}, spoil)
    options = {"dies": 1, "seqlens": (1,), "max_kv": 16, "weights": weights, "group_size": 32}
    with pytest.raises(TyirError) as caught:
        compile_path(folder, tmp_path / "out", options)
    message = str(caught.value)
    for base, wrong in zip(bases, ("1 NaN value", "1 infinite value")):
        assert f"tensor '{base}.{SCALES[kind]}' holds {wrong}" in message
    assert f"o_proj.{SCALES[kind]}' holds 1 value beyond the f16 range of 65504 (largest 1e+30)" in message
    assert not list((tmp_path / "out").glob("*"))


def words_of(module: Module) -> int:
    return sum(1 for _ in module.walk_type(quant.Unpack))


def test_nothing_is_unpacked_twice(checkpoints: dict[str, tuple[Path, Stored]]) -> None:
    assert words_of(import_model(checkpoints["awq"][0])) == 28


def test_values_of_quantised_weights_are_checked(awq_folder: Path) -> None:
    def spoil(t: dict[str, Any]) -> None:
        t["model.layers.0.mlp.up_proj.scales"][0, 0] = np.nan
        t["model.layers.1.mlp.up_proj.scales"][1 - 1, 5] = 60000
        t["model.layers.1.input_layernorm.weight"] = t["model.layers.1.input_layernorm.weight"][1:]

    edit(awq_folder, tensors=spoil)
    with pytest.raises(TyirError) as caught:
        import_model(awq_folder, check_weights=True)
    message = str(caught.value)
    assert "'model.layers.0.mlp.up_proj.weight' holds" in message and "NaN values" in message
    assert "'model.layers.1.mlp.up_proj.weight' holds" in message and "infinite values" in message
    assert "'model.layers.1.input_layernorm.weight' has shape [63]" in message

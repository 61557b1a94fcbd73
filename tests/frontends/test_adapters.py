"""LoRA adapters against the formula of PEFT's documentation, over bases of several formats."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.frontends.quantized import KINDS, write_quantized
from tyir.diagnostics import TyirError
from tyir.frontends.dense_state import dense_state
from tyir.frontends.huggingface import import_model, open_model
from tyir.manifest import BuildOptions
from tyir.parser import parse_module
from tyir.printer import print_op
from tyir.tools.estimate.plan import make_plan

Array = npt.NDArray[Any]
LINEARS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")


@pytest.fixture(scope="module")
def base(save_model: Callable[..., Path]) -> Path:
    return save_model("llama", dtype="float16", intermediate_size=128, tie_word_embeddings=False)


def factors(
    state: dict[str, Array], rank: int, names: tuple[str, ...] = LINEARS
) -> dict[str, tuple[Array, Array]]:
    """A [r, K] and B [N, r] of each chosen linear, by parameter name."""
    rng = np.random.default_rng(1)

    def normal(*shape: int) -> Array:
        return rng.normal(0, 0.1, shape).astype(np.float32)

    return {
        name: (normal(rank, w.shape[1]), normal(w.shape[0], rank))
        for name, w in state.items()
        if name.removesuffix(".weight").endswith(LINEARS)
    }


def write_adapter(
    folder: Path, pairs: dict[str, tuple[Array, Array]], more: dict[str, Array] | None = None, **config: Any
) -> Path:
    """What PEFT's save_pretrained writes."""
    from safetensors.numpy import save_file

    folder.mkdir()
    tensors = {f"base_model.model.{name}": array for name, array in (more or {}).items()}
    for name, (a, b) in pairs.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = a, b
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 16,
        "base_model_name_or_path": "org/name",
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def state_of(folder: Path, base: Path | None = None) -> dict[str, Array]:
    return dict(dense_state(folder, base=base))


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, lambda name: 4.0),
        ({"use_rslora": True}, lambda name: 8.0),
        ({"lora_alpha": 6}, lambda name: 1.5),
        ({"alpha_pattern": {"v_proj": 2, "layers.1.mlp.down_proj": 32}},
         lambda name: 0.5 if "v_proj" in name else 8.0 if "1.mlp.down" in name else 4.0),
        ({"init_lora_weights": "gaussian", "lora_dropout": 0.1}, lambda name: 4.0),
    ],
)  # fmt: skip
def test_weights_are_merged(
    base: Path, tmp_path: Path, config: dict[str, Any], scale: Callable[[str], float]
) -> None:
    wanted = state_of(base)
    pairs = factors(wanted, 4)
    assert len(pairs) == 6
    found = state_of(write_adapter(tmp_path / "a", pairs, **config), base)
    assert found.keys() == wanted.keys()
    for name, w in wanted.items():
        if name in pairs:
            a, b = pairs[name]
            w = w + np.float32(scale(name)) * (b @ a)
        np.testing.assert_allclose(found[name], w, rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("kind", ["gptq", "awq", "gguf"])
def test_over_bases_of_other_formats(base: Path, tmp_path: Path, kind: str) -> None:
    """Quantised weights become dense where the adapter adds to them, and only there."""
    from tyir.dialects import ty
    from tyir.passes.raise_aten import raise_aten

    if kind == "gguf":
        pytest.importorskip("gguf")
        from tests.frontends import gguf_writer

        (tmp_path / "b").mkdir()
        config = json.loads((base / "config.json").read_text())
        state = {n: w.astype(np.float16) for n, w in state_of(base).items()}
        gguf_writer.write(tmp_path / "b" / "m.gguf", "llama", config, state, lambda n: "Q4_0")
    else:
        write_quantized(base, tmp_path / "b", KINDS[kind])
    wanted = state_of(tmp_path / "b")
    pairs = factors(wanted, 2)
    adapter = write_adapter(tmp_path / "a", pairs, base_model_name_or_path=str(tmp_path / "b"), r=2)
    if kind == "gguf":
        adapter_base: Path | None = tmp_path / "b"
    else:
        adapter_base = None  # its config says where
    found = state_of(adapter, adapter_base)
    for name, (a, b) in pairs.items():
        np.testing.assert_allclose(found[name], wanted[name] + np.float32(8) * (b @ a), atol=1e-5)
    module = import_model(adapter, base=adapter_base)
    assert print_op(parse_module(print_op(module))) == print_op(module)
    raise_aten(module)
    quantised = sum(1 for _ in module.walk_type(ty.QuantizedLinear))
    assert quantised == {"gptq": 14, "awq": 14, "gguf": 15}[kind] - len(pairs)


def test_whole_tensors_and_embeddings(base: Path, tmp_path: Path) -> None:
    """modules_to_save take the base's place; an embedding's factors are stored the other way round."""
    from safetensors.numpy import load_file, save_file

    wanted = state_of(base)
    rng = np.random.default_rng(2)
    head = rng.normal(size=wanted["lm_head.weight"].shape).astype(np.float16)
    folder = write_adapter(tmp_path / "a", {}, {"lm_head.weight": head})
    v, h = wanted["model.embed_tokens.weight"].shape
    a, b = rng.normal(size=(4, v)).astype(np.float32), rng.normal(size=(h, 4)).astype(np.float32)
    tensors = load_file(folder / "adapter_model.safetensors")
    module = "base_model.model.model.embed_tokens"
    factors = {f"{module}.lora_embedding_A": a, f"{module}.lora_embedding_B": b}
    whole = {f"{module}.base_layer.weight": wanted["model.embed_tokens.weight"] * 2}
    save_file({**tensors, **factors, **whole}, folder / "adapter_model.safetensors")
    found = state_of(folder, base)
    assert np.array_equal(found["lm_head.weight"], head.astype(np.float32))
    name = "model.embed_tokens.weight"
    np.testing.assert_allclose(found[name], 2 * wanted[name] + np.float32(4) * (b @ a).T, atol=1e-5)


def test_an_adapter_in_the_folder_of_its_base(base: Path, tmp_path: Path) -> None:
    wanted = state_of(base)
    pairs = factors(wanted, 4)
    write_adapter(tmp_path / "a", pairs)
    shutil.copytree(base, tmp_path / "a", dirs_exist_ok=True)
    found = state_of(tmp_path / "a")
    name, (a, b) = next(iter(pairs.items()))
    np.testing.assert_allclose(found[name], wanted[name] + np.float32(4) * (b @ a), atol=1e-6)


def refusal(folder: Path, base: Path | None) -> str:
    with pytest.raises(TyirError) as caught:
        open_model(folder, "f16", base=base)
    return str(caught.value)


def test_what_is_refused(base: Path, tmp_path: Path) -> None:
    pairs = factors(state_of(base), 4)
    message = refusal(write_adapter(tmp_path / "a", pairs), None)
    assert "holds a LoRA adapter, not a whole model; its base is 'org/name'" in message
    assert "--base" in message and message.count("error") <= 1
    for number, (config, wanted) in enumerate([
        ({"use_dora": True}, "use_dora True"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out True"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"lora_alpha": "none"}, "lora_alpha 'none'"),
        ({"alpha_pattern": {"q_proj": "2"}}, "alpha_pattern {'q_proj': '2'}"),
    ]):  # fmt: skip
        assert wanted in refusal(write_adapter(tmp_path / f"c{number}", pairs, **config), base)
    short = {n: (a[:, :-1].copy(), b) for n, (a, b) in pairs.items()}
    message = refusal(write_adapter(tmp_path / "short", short), base)
    assert "the adapter's factors of" in message and "more like it" in message
    other = {n.replace("layers.1", "layers.7"): p for n, p in pairs.items()}
    assert "no place for: model.layers.7" in refusal(write_adapter(tmp_path / "other", other), base)
    assert "is not a LoRA adapter" in refusal(base, base)
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    assert "the adapter's weights are missing" in refusal(tmp_path / "a", base)


def test_the_plan_of_an_adapter_is_its_bases(base: Path, tmp_path: Path) -> None:
    """Named on the command line, by the adapter's config, or lying in the same folder."""
    options = BuildOptions(dies=2, seqlens=(1,), max_kv=16)
    wanted = make_plan(base, options).dies
    adapter = write_adapter(tmp_path / "a", factors(state_of(base), 4))
    assert make_plan(adapter, options, base=base).dies == wanted
    named = write_adapter(tmp_path / "b", factors(state_of(base), 4), base_model_name_or_path=str(base))
    assert make_plan(named, options).dies == wanted
    shutil.copytree(base, tmp_path / "c")
    shutil.copyfile(adapter / "adapter_config.json", tmp_path / "c" / "adapter_config.json")
    assert make_plan(tmp_path / "c", options).dies == wanted


def test_the_plan_of_an_adapter_over_a_quantised_base_counts_fp16(base: Path, tmp_path: Path) -> None:
    options = BuildOptions(dies=1, seqlens=(1,), max_kv=16)
    adapter = write_adapter(tmp_path / "a", factors(state_of(base), 4))
    packed = tmp_path / "packed"
    shutil.copytree(base, packed)
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
    (packed / "config.json").write_text(json.dumps(config))
    assert make_plan(packed, options).dies[0].weights < make_plan(base, options).dies[0].weights
    assert make_plan(adapter, options, base=packed).dies == make_plan(base, options).dies


def test_plans_that_cannot_be_made_of_an_adapter(base: Path, tmp_path: Path) -> None:
    options = BuildOptions(dies=1, seqlens=(1,), max_kv=16)
    adapter = write_adapter(tmp_path / "a", factors(state_of(base), 4))
    for folder, given, said in (
        (adapter, None, "holds a LoRA adapter, not a whole model; its base is 'org/name'"),
        (adapter, tmp_path, "config.json"),
        (base, base, "is not a LoRA adapter"),
    ):
        with pytest.raises(TyirError, match=said):
            make_plan(folder, options, base=given)
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(TyirError, match=r"adapter_config\.json is not valid JSON"):
        make_plan(adapter, options, base=base)


@pytest.mark.slow
def test_from_the_command_line(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Imported, compiled and verified against the merged model."""
    from tyir.tools.tyir_compile import main as compile_main
    from tyir.tools.tyir_verify import main as verify_main

    adapter = write_adapter(tmp_path / "a", factors(state_of(base), 4))
    out = ["-o", str(tmp_path / "out"), "--dies", "2", "--seqlens", "1", "--max-kv", "16", "-q"]
    assert compile_main([str(adapter), *out]) == 1
    assert "give the folder of the base model with --base" in capsys.readouterr().err
    assert compile_main([str(adapter), "--base", str(base), *out]) == 0
    artifacts = capsys.readouterr().out.strip()
    against = ["--against", str(adapter), "--base", str(base), "--ids", "5,6,7", "--tokens", "3"]
    assert verify_main([artifacts, *against]) == 0
    assert verify_main([artifacts, "--against", str(base), "--ids", "5,6,7", "--tokens", "3"]) == 1

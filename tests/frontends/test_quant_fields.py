"""Fields of quantization_config: read, without effect on the values, or refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.frontends.quantized import KINDS, unpack_awq, unpack_gptq, write_quantized
from tyir.diagnostics import Diagnostic
from tyir.frontends.dense_state import dense_state
from tyir.frontends.huggingface import open_model
from tyir.frontends.quant_config import QuantConfig, read_quant_config


def read(config: dict[str, Any], folder: Path = Path("nowhere")) -> QuantConfig | str:
    """What a quantization_config means, or the problems."""
    problems: list[Diagnostic] = []
    found = read_quant_config(folder, {"quantization_config": config} if config else {}, problems)
    return found if found is not None else "\n".join(p.message for p in problems)


def scheme(
    top: dict[str, Any] | None = None, group: dict[str, Any] | None = None, **weights: Any
) -> dict[str, Any]:
    base = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
    groups = {"group_0": {"targets": ["Linear"], "weights": {**base, **weights}, **(group or {})}}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": groups,
        **(top or {}),
    }


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (scheme(strategy="block", block_structure=[128, 128]), "strategy 'block' (group and channel are"),
        (scheme(block_structure=[128, 128]), "block_structure [128, 128]"),
        (scheme(num_bits=8), "num_bits 8 (4 is accepted)"),
        (scheme(type="float"), "type 'float'"),
        (scheme(actorder="sorted"), "actorder 'sorted'"),
        (scheme(dynamic=True), "dynamic True"),
        (scheme(lattice="e8"), "weights.lattice 'e8' (which is not known)"),
        (scheme(group={"input_activations": {"num_bits": 8}}), "input_activations {'num_bits': 8}"),
        (scheme(group={"output_activations": {"num_bits": 8}}), "output_activations {'num_bits': 8}"),
        (scheme({"transform_config": {"config_groups": {"r1": {}}}}), "transform_config"),
        (scheme({"sparsity_config": {"format": "sparse-24-bitmask"}}), "sparsity_config.format 'sparse-24"),
        (scheme({"kv_cache_scheme": {"num_bits": 8}}), "kv_cache_scheme {'num_bits': 8}"),
        (scheme({"format": "nvfp4-pack-quantized"}), "format 'nvfp4-pack-quantized'"),
        (
            {"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*down.*": {"bits": 8}}},
            "dynamic['+:.*down.*'].bits 8",
        ),
        ({"quant_method": "gptq", "bits": 4, "rotation": "hadamard"}, "rotation 'hadamard'"),
        ({"quant_method": "gptq", "bits": 4, "is_marlin_format": True}, "is_marlin_format True"),
        ({"quant_method": "gptq", "bits": 3}, "bits 3 (4 is accepted)"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version 'gemv' (gemm is accepted)"),
        (
            {"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:llm_compressor"},
            "packing_format",
        ),
        ({"quant_method": "auto-round", "bits": 2}, "auto-round checkpoint with bits 2"),
        ({"quant_method": "auto-round", "data_type": "mx_fp"}, "data_type 'mx_fp'"),
        ({"quant_method": "auto-round", "bits": 4, "act_bits": 8}, "act_bits 8"),
        (
            {"quant_method": "auto-round", "bits": 4, "extra_config": {"a.q_proj": {"bits": 8}}},
            "extra_config['a.q_proj'].bits 8",
        ),
        ({"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes', which cannot be imported"),
    ],
)
def test_refused_by_name(config: dict[str, Any], wanted: str) -> None:
    assert wanted in str(read(config))


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (scheme(actorder="weight"), {"reordered": False, "group_size": 128}),
        (scheme(actorder="static", observer="mse", zp_dtype="torch.int8"), {"reordered": False}),
        (scheme(actorder="group"), {"reordered": True}),
        (scheme(symmetric=False), {"symmetric": False}),
        (scheme(strategy="channel", group_size=None), {"group_size": None}),
        (scheme({"ignore": ["re:.*lm_head"], "transform_config": {}, "sparsity_config": {}}), {}),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"-:.*mlp.*": {}}}, {"zero_shift": 1}),
        ({"quant_method": "awq", "bits": 4, "checkpoint_format": "gemm"}, {"method": "awq"}),
        (
            {"quant_method": "auto-round", "bits": 4, "group_size": 64, "sym": False},
            {"method": "gptq", "group_size": 64},
        ),
        (
            {"quant_method": "intel/auto-round", "bits": 4, "backend": "auto_round:gptq:exllamav2"},
            {"zero_shift": 1},
        ),
        ({"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"}, {"method": "awq"}),
        (
            {"quant_method": "auto-round", "extra_config": {"lm_head": {"bits": 16, "data_type": "float"}}},
            {"excluded": ("lm_head",)},
        ),
    ],
)
def test_read(config: dict[str, Any], wanted: dict[str, Any]) -> None:
    found = read(config)
    assert isinstance(found, QuantConfig), found
    assert {key: getattr(found, key) for key in wanted} == wanted


def test_groups_of_one_kind_and_of_several() -> None:
    config = scheme()
    groups = config["config_groups"]
    groups["group_1"] = {**groups["group_0"], "targets": ["re:.*down_proj"]}
    assert isinstance(read(config), QuantConfig)
    groups["group_1"] = {"weights": {"num_bits": 8}, "targets": ["re:.*down_proj"]}
    assert "2 config_groups whose weights differ" in str(read(config))


@pytest.fixture(scope="module")
def plain(save_model: Callable[..., Path]) -> Path:
    return save_model("qwen2", dtype="float16", hidden_size=64, intermediate_size=128, num_hidden_layers=1)


@pytest.mark.parametrize("layout", ["gptq", "awq"])
def test_auto_round_in_both_layouts(plain: Path, tmp_path: Path, layout: str) -> None:
    """What AutoRound writes, against the unpackers of the layouts it uses; the side file alone says so."""
    kind = KINDS[layout]
    stored = write_quantized(plain, tmp_path / "m", kind)
    config = json.loads((tmp_path / "m/config.json").read_text())
    quantization = {
        "quant_method": "auto-round",
        "bits": 4,
        "group_size": kind.group,
        "sym": False,
        "data_type": "int",
        "autoround_version": "0.9.5",
        "packing_format": f"auto_round:auto_{layout}",
    }
    del config["quantization_config"]
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    (tmp_path / "m/quantization_config.json").write_text(json.dumps(quantization))
    found = dict(dense_state(tmp_path / "m"))
    assert len(stored) == 7
    for name, parts in stored.items():
        n, k = found[name].shape
        wanted = unpack_awq(parts, n, k) if layout == "awq" else unpack_gptq(parts, n, k, 1)
        np.testing.assert_array_equal(found[name], wanted.astype(np.float32), err_msg=name)


@pytest.mark.parametrize(
    ("ignore", "said"),
    [
        (["lm_head"], ""),
        (["re:.*self_attn.*"], "4 tensors are quantised although config.json excludes them"),
        (["re:model[.]layers[.]0[.]mlp.*", "re:("], "3 tensors are quantised although"),
        (["down_proj"], "1 tensors are quantised although"),
    ],
)
def test_the_list_of_what_is_ignored(plain: Path, tmp_path: Path, ignore: list[str], said: str) -> None:
    write_quantized(plain, tmp_path / "m", KINDS["ct-group"])
    path = tmp_path / "m/config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["ignore"] = ignore
    path.write_text(json.dumps(config))
    notes: list[Diagnostic] = []
    open_model(tmp_path / "m", "f16", notes.append)
    assert any(said in n.message for n in notes) if said else not notes


def test_packed_by_compressed_tensors_itself(plain: Path, tmp_path: Path) -> None:
    """Where the package is installed: its packer against ours, zero points included."""
    packing = pytest.importorskip("compressed_tensors.compressors").__name__ and pytest.importorskip(
        "compressed_tensors"
    )
    torch = pytest.importorskip("torch")
    pack = _packer(packing)
    shutil.copytree(plain, tmp_path / "m")
    from tests.frontends.quantized import compressed, quantize

    w = np.random.default_rng(0).normal(size=(64, 128)).astype(np.float32)
    groups = quantize(w, 64, False)
    ours = compressed(groups, False)
    q = torch.from_numpy(groups.q - 8).to(torch.int8)
    assert np.array_equal(pack(q, 4).numpy(), ours["weight_packed"])
    z = torch.from_numpy(groups.zeros - 8).to(torch.int8)
    assert np.array_equal(pack(z, 4, packed_dim=0).numpy(), ours["weight_zero_point"])


def _packer(package: Any) -> Any:
    import importlib
    import pkgutil

    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if "pack" in module.name and hasattr(found := importlib.import_module(module.name), "pack_to_int32"):
            return found.pack_to_int32
    pytest.skip("this release has no pack_to_int32")

"""Everything that can be wrong with a folder is refused with a message that names it, all problems at once,
before any work.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tyir.diagnostics import Diagnostic, TyirError
from tyir.execution.weights import check_files
from tyir.frontends.huggingface import import_model, open_model
from tyir.frontends.plugin import ModelPlugin, load_plugin

Edit = Callable[[dict[str, Any]], None]


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    """A copy of a good checkpoint (several files and an index), to be spoiled."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


@pytest.fixture
def single(folder: Path) -> Path:
    """The same checkpoint in one file."""
    from safetensors.torch import load_file, save_file

    tensors = {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}
    for file in folder.glob("model*"):
        file.unlink()
    save_file(tensors, folder / "model.safetensors")
    return folder


def edit_json(path: Path, edit: Edit) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def edit_tensors(folder: Path, edit: Edit) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(TyirError) as caught:
        import_model(folder, **options)
    for diagnostic in caught.value.diagnostics:
        assert diagnostic.help, diagnostic
    return str(caught.value)


def test_dtype() -> None:
    assert "dtype 'bf16'" in refusal(Path("x"), dtype="bf16") and "f16, f32" in refusal(
        Path("x"), dtype="bf16"
    )


def test_folder_is_missing(tmp_path: Path) -> None:
    assert "nowhere does not exist" in refusal(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    assert "file is a file, not a folder" in refusal(tmp_path / "file")


def test_empty_folder_lacks_both(tmp_path: Path) -> None:
    message = refusal(tmp_path)
    assert (
        "cannot read config.json: No such file" in message
        and "no model.safetensors, no model.safetensors.index.json and no pytorch_model.bin" in message
    )


def test_other_weight_files(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "consolidated.00.pth").touch()
    assert "(it holds consolidated.00.pth)" in refusal(folder) and "save_pretrained" in refusal(folder)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("{", "config.json:1:2: error: config.json is not valid JSON"),
        ("[]", "config.json holds a JSON list, an object is needed"),
    ],
)
def test_config_is_no_object(folder: Path, text: str, wanted: str) -> None:
    (folder / "config.json").write_text(text)
    assert wanted in refusal(folder)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (
            {"architectures": ["BertForMaskedLM"]},
            "architecture BertForMaskedLM is not a causal language model",
        ),
        ({"architectures": ["LlamaForCasualLM"]}, "did you mean 'LlamaForCausalLM'?"),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            "Qwen2ForCausalLM, LlamaForCausalLM, Qwen3ForCausalLM, MistralForCausalLM",
        ),
        ({"architectures": None}, "config.json names no architecture"),
        ({"model_type": "qwen2"}, "model_type is 'qwen2' but LlamaForCausalLM belongs to 'llama'"),
        ({"hidden_size": 63}, "transformers cannot build LlamaForCausalLM from this config.json"),
        (
            {"quantization_config": {"quant_method": "awq", "bits": 3}},
            "awq checkpoint with bits 3 (4 is accepted)",
        ),
        (
            {"quantization_config": {"quant_method": "fp8"}},
            "formats that can be imported: awq, gptq, compressed-tensors, auto-round (4 bits each), GGUF",
        ),
    ],
)
def test_config_describes_no_model(folder: Path, change: dict[str, Any], wanted: str) -> None:
    edit_json(folder / "config.json", lambda config: config.update(change))
    assert wanted in refusal(folder)


def test_code_in_the_folder_is_not_run(folder: Path) -> None:
    (folder / "modeling_evil.py").write_text("raise SystemExit('executed')")
    (folder / "configuration_evil.py").write_text("raise SystemExit('executed')")
    edit_json(
        folder / "config.json",
        lambda c: c.update(
            auto_map={"AutoConfig": "configuration_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}
        ),
    )
    import_model(folder)
    edit_json(
        folder / "config.json", lambda c: c.update(model_type="evil", architectures=["EvilForCausalLM"])
    )
    assert "architecture EvilForCausalLM is not" in refusal(folder)


def test_truncated_file(folder: Path) -> None:
    shard, *_ = sorted(folder.glob("*.safetensors"))
    size = shard.stat().st_size
    with shard.open("r+b") as file:
        file.truncate(size - 100)
    message = refusal(folder)
    assert (
        f"{shard.name} is truncated: the header describes {size} bytes, the file has {size - 100}" in message
    )
    assert "lacks" not in message  # the tensors of that file are not reported again as missing


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"", "is truncated: its header needs 0 bytes, the file has 0"),
        (b"\xff" * 8, "is truncated: its header needs"),
        ((4).to_bytes(8, "little") + b"abcd", "its header is not JSON"),
        ((2).to_bytes(8, "little") + b"[]", "its header is a JSON list"),
        ((14).to_bytes(8, "little") + b'{"a":{"b":"c"}', "its header is not JSON"),
        ((15).to_bytes(8, "little") + b'{"a":{"b":"c"}}', "the entry of tensor 'a' lacks dtype"),
    ],
)
def test_damaged_file(single: Path, content: bytes, wanted: str) -> None:
    (single / "model.safetensors").write_bytes(content)
    assert wanted in refusal(single)


@pytest.mark.parametrize(
    ("entry", "wanted"),
    [
        ({"dtype": "F13", "shape": [1], "data_offsets": [0, 2]}, "tensor 'a' has dtype 'F13'"),
        ({"dtype": "F16", "shape": [2], "data_offsets": [0, 2]}, "takes 4 bytes, its data_offsets span 2"),
        ({"dtype": "F16", "shape": [-1], "data_offsets": [0, 2]}, "must be non-negative integers"),
        ({"dtype": "F16", "shape": [1], "data_offsets": [2, 4]}, "begins at byte"),
        ({"dtype": "F16", "shape": [1], "data_offsets": [0, 2]}, "is longer than its header says"),
    ],
)
def test_inconsistent_header(single: Path, entry: dict[str, Any], wanted: str) -> None:
    header = json.dumps({"a": entry}).encode()
    (single / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(6))
    assert wanted in refusal(single)


@pytest.mark.parametrize(
    "name", ["../model-00001.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "x.bin"]
)
def test_index_leads_out_of_the_folder(folder: Path, name: str) -> None:
    edit_json(
        folder / "model.safetensors.index.json",
        lambda index: index["weight_map"].update({"lm_head.weight": name}),
    )
    assert f"refers to '{name}', which is not a file name inside the checkpoint folder" in refusal(folder)


def test_index_without_map(folder: Path) -> None:
    edit_json(folder / "model.safetensors.index.json", lambda index: index.pop("weight_map"))
    assert "has no 'weight_map'" in refusal(folder)


def test_index_names_missing_file_and_wrong_place(folder: Path) -> None:
    first, *_, last = sorted(folder.glob("*.safetensors"))
    first.unlink()
    edit_json(
        folder / "model.safetensors.index.json",
        lambda index: index["weight_map"].update({"nothing": last.name}),
    )
    message = refusal(folder)
    assert (
        f"cannot read {first.name}: No such file" in message
        and f"tensor 'nothing' is in {last.name}, but it is not" in message
    )


def test_all_tensor_problems_at_once(single: Path) -> None:
    def spoil(tensors: dict[str, Any]) -> None:
        del tensors["model.layers.0.mlp.up_proj.weight"], tensors["model.norm.weight"]
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:50].clone()
        tensors["model.layers.1.mlp.down_proj.weight"] = tensors["model.layers.1.mlp.down_proj.weight"].int()
        tensors["model.layers.2.mlp.up_proj.weight"] = tensors["lm_head.weight"].clone()

    edit_tensors(single, spoil)
    message = refusal(single)
    assert (
        "lacks 2 of the model's 21 tensors: model.layers.0.mlp.up_proj.weight, model.norm.weight" in message
    )
    assert "tensor 'lm_head.weight' has shape [50, 64], config.json asks for [96, 64]" in message
    assert "tensor 'model.layers.1.mlp.down_proj.weight' has element type i32" in message
    assert (
        "holds 1 tensors that the model of config.json has no place for: model.layers.2.mlp.up_proj.weight"
        in message
    )


def test_tied_tensors_that_differ(single: Path) -> None:
    edit_json(single / "config.json", lambda config: config.update(tie_word_embeddings=True))
    assert "differs from" in refusal(single)
    edit_tensors(single, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    import_model(single)


def test_changed_checkpoint_is_noticed(single: Path) -> None:
    module = import_model(single)
    check_files(module)
    edit_tensors(single, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].float()}))
    with pytest.raises(
        TyirError, match=r"model.safetensors has changed since it was imported: \d+ bytes instead of \d+"
    ):
        check_files(module)
    (single / "model.safetensors").unlink()
    with pytest.raises(TyirError, match=r"model.safetensors cannot be read: No such file"):
        check_files(module)


def test_every_unsupported_operation_is_listed(save_model: Any, tmp_path: Path) -> None:
    """Counts are those of the whole model, although equal layers are traced once."""
    plugin = tmp_path / "plugin.py"
    plugin.write_text(
        "import torch\nfrom transformers import LlamaForCausalLM\nfrom tyir.frontends.plugin import"
        " ModelPlugin\nclass Model(LlamaForCausalLM):\n    def forward(self, *args, **kwargs):\n        out ="
        " super().forward(*args, **kwargs)\n        out.logits = torch.square(torch.atan(out.logits))\n"
        "        return out\nplugin = ModelPlugin(model_class=Model)\n"
    )
    folder = save_model("llama", hidden_act="mish", num_hidden_layers=6)
    message = refusal(folder, plugin=load_plugin(plugin))
    assert "the model uses 3 kinds of operations (8 nodes) that cannot be imported" in message
    assert re.search(
        r"aten\.mish\.default: 6 times, first in layer 0, model\.layers\.0\.mlp\.act_fn"
        r" \(modeling_llama\.py:\d+\)",
        message,
    )
    assert "aten.square.default: once, first outside the layers" in message
    assert "aten.atan.default: once, first outside the layers" in message


def test_argument_that_a_row_does_not_cover(save_model: Any, tmp_path: Path) -> None:
    plugin = tmp_path / "plugin.py"
    plugin.write_text(
        "import torch\nfrom transformers import LlamaForCausalLM\nfrom tyir.frontends.plugin import"
        " ModelPlugin\nclass Model(LlamaForCausalLM):\n    def forward(self, *args, **kwargs):\n        out ="
        " super().forward(*args, **kwargs)\n        out.logits = torch.add(out.logits, out.logits, alpha=2)\n"
        "        return out\nplugin = ModelPlugin(model_class=Model)\n"
    )
    assert "aten.add.Tensor with alpha = 2: once, first outside the layers" in refusal(
        save_model("llama"), plugin=load_plugin(plugin)
    )


def test_attention_that_cannot_be_represented() -> None:
    """Sinks beside the keys and chunks of the sequence, as gpt-oss and Llama 4 have them."""
    import torch
    from transformers.masking_utils import chunked_causal_mask_function

    from tyir.frontends.attention_hook import _attention, _mask

    x = torch.zeros(1, 2, 3, 4)
    with pytest.raises(TyirError, match="Identity uses attention features that cannot be represented: s_aux"):
        _attention(torch.nn.Identity(), x, x, x, 0, s_aux=torch.zeros(2))
    with pytest.raises(TyirError, match=r"masks attention with \S*and_mask, which cannot be represented"):
        _mask(mask_function=chunked_causal_mask_function(2, torch.zeros(1, dtype=torch.int64)))


def test_model_that_cannot_be_traced(save_model: Any) -> None:
    assert "torch.export cannot trace MambaForCausalLM" in refusal(save_model("mamba", num_hidden_layers=1))


def test_mixture_of_experts(save_model: Any) -> None:
    """Said before any tensor is blamed, also of a model that has other things that cannot be imported."""
    wanted = "is a mixture of experts (model.layers.0.{}.experts), which cannot be imported yet"
    qwen = save_model("qwen3_moe", moe_intermediate_size=32, num_experts=4)
    assert wanted.format("mlp") in refusal(qwen)
    assert wanted.format("feed_forward") in refusal(save_model("llama4_text"))


def test_values_are_checked_when_asked(single: Path) -> None:
    def spoil(tensors: dict[str, Any]) -> None:
        tensors["model.norm.weight"][3] = float("nan")
        tensors["model.layers.0.mlp.up_proj.weight"][0, :2] = float("inf")
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].clone()

    edit_tensors(single, spoil)
    message = refusal(single, check_weights=True)
    assert "'model.norm.weight' holds 1 NaN value" in message
    assert "'model.layers.0.mlp.up_proj.weight' holds 2 infinite values" in message
    assert (
        "'model.layers.1.mlp.up_proj.weight' holds 1 value beyond the f16 range of 65504 (largest 999424)"
        in message
    )
    assert "'lm_head.weight' has shape [95, 64]" in message
    assert "beyond" not in refusal(single, check_weights=True, dtype="f32")


def test_problems_of_torchs_index_name_it(folder: Path) -> None:
    index = folder / "pytorch_model.bin.index.json"
    (folder / "model.safetensors.index.json").rename(index)
    edit_json(index, lambda content: content["weight_map"].update({"lm_head.weight": "../out.bin"}))
    message = refusal(folder)
    assert "pytorch_model.bin.index.json refers to '../out.bin'" in message
    assert "model.safetensors.index.json" not in message
    edit_json(index, lambda content: content.pop("weight_map"))
    message = refusal(folder)
    assert "pytorch_model.bin.index.json has no 'weight_map'" in message
    assert "model.safetensors.index.json" not in message


SURPLUS: dict[str, tuple[list[str], list[int]]] = {  # what it is said to be: names, and a shape
    "what follows from the config": (
        ["model.rotary_emb.original_inv_freq", "model.position_ids", "model.layers.0.self_attn.bias"],
        [1, 1, 8, 8],
    ),
    "scales of a cache": (
        [
            "model.layers.0.self_attn.k_scale",
            "model.layers.1.self_attn.v_proj.v_scale",
            "model.layers.1.self_attn.q_proj.input_scale",
        ],
        [],
    ),
    "layers that guess further tokens": (
        ["model.layers.2.eh_proj.weight", "model.layers.2.mlp.up_proj.weight", "mtp.fc.weight"],
        [64, 128],
    ),
    "a head of a trainer": (["v_head.summary.weight", "v_head.summary.bias"], [1]),
    "the state of an optimizer": (["optimizer.state.0.exp_avg"], [64]),
    "all zeros": (["model.layers.0.self_attn.q_proj.bias"], [64]),
}


@pytest.mark.parametrize("what", SURPLUS)
def test_what_trainers_and_quantisers_store_besides(single: Path, what: str) -> None:
    """Left out with one warning: nothing of it enters the logits."""
    import torch

    names, shape = SURPLUS[what]
    edit_tensors(single, lambda tensors: tensors.update({name: torch.zeros(shape) for name in names}))
    notes: list[Diagnostic] = []
    open_model(single, "f16", notes.append)
    (said,) = [n.message for n in notes if "not used" in n.message]
    assert what in said and all(name in said for name in names)


@pytest.mark.parametrize(
    ("name", "shape", "help"),
    [
        ("score.weight", [2, 64], 'a --model-plugin of ignore=[r"score\\..*"]'),
        ("model.layers.0.self_attn.q_proj.weight_global_scale", [1], "from different models"),
        ("model.layers.0.self_attn.q_proj.pre_quant_scale", [64], "from different models"),
        ("model.layers.0.self_attn.bias", [64], "from different models"),
        ("model.layers.2.mlp.up_proj.weight", [112, 64], "from different models"),
    ],
)
def test_what_may_be_of_the_model_is_not_left_out(
    single: Path, name: str, shape: list[int], help: str
) -> None:
    """A factor of weights or activations, a bias, a layer; and how to leave a module out that is none."""
    import torch

    edit_tensors(single, lambda tensors: tensors.update({name: torch.ones(shape)}))
    message = refusal(single)
    assert f"has no place for: {name}" in message and help in message
    if "plugin" in help:
        open_model(single, "f16", plugin=ModelPlugin(ignore=[r"score\..*"]))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json"])
@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n", "a Git LFS pointer"),
        (b"<!doctype html><html></html>", "a web page"),
        (None, "a link to ../blobs/gone, where there is no file"),
    ],
)
def test_what_stands_in_for_a_file(single: Path, name: str, content: bytes | None, wanted: str) -> None:
    """What clones without Git LFS, refused downloads and copies of links leave: said as what it is."""
    (single / ("model.safetensors" if name == "pytorch_model.bin" else name)).unlink()
    if content is None:
        (single / name).symlink_to("../blobs/gone")
    else:
        (single / name).write_bytes(content)
    message = refusal(single)
    assert name in message and wanted in message

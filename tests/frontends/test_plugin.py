"""`--model-plugin`: the documented example, delta checkpoints, and what is wrong with a plugin."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tyir.diagnostics import TyirError
from tyir.execution.weights import CheckpointReader, check_files
from tyir.frontends.huggingface import import_model
from tyir.frontends.plugin import ModelPlugin, Split, load_plugin
from tyir.interpreter import run_function
from tyir.parser import parse_file
from tyir.pipeline import run_pipeline
from tyir.tools.tyir_import import main

DOC = Path(__file__).parents[2] / "docs" / "model-plugin.md"
IDS = np.random.default_rng(0).integers(0, 96, (1, 19))


@pytest.fixture(scope="module")
def plain(save_model: Callable[..., Path]) -> Path:
    return save_model("llama", dtype="float16")


@pytest.fixture
def example(tmp_path: Path) -> Path:
    code, *_ = re.findall(r"```python\n(.*?)```", DOC.read_text(), re.DOTALL)
    (tmp_path / "my_model.py").write_text(code)
    return tmp_path / "my_model.py"


@pytest.fixture
def packed(plain: Path, tmp_path: Path) -> Path:
    """The layout the documentation describes."""
    from safetensors.numpy import load_file, save_file

    folder = Path(shutil.copytree(plain, tmp_path / "packed"))
    t = load_file(folder / "model.safetensors")
    for layer in range(2):
        root = f"model.layers.{layer}"
        t[f"{root}.attention.qkv.weight"] = np.concatenate(
            [t.pop(f"{root}.self_attn.{n}_proj.weight") for n in "qkv"]
        )
        t[f"{root}.mlp.gate_up.weight"] = np.concatenate(
            [t.pop(f"{root}.mlp.{n}_proj.weight") for n in ("gate", "up")]
        )
    names = {
        "model.layers.": "net.blocks.",
        "model.embed_tokens.": "net.tokens.",
        "model.norm.": "net.last_norm.",
    }
    for old, new in names.items():
        t = {k.replace(old, new): v for k, v in t.items()}
    save_file({**t, "optimizer.step": np.zeros(1, np.float32)}, folder / "model.safetensors")
    (folder / "stray-00001.safetensors").write_bytes(b"never read")
    return folder


def test_the_documented_example(example: Path, packed: Path, plain: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoConfig

    assert (
        main([str(packed), "--model-plugin", str(example), "--dtype", "f32", "-o", str(tmp_path / "m.ir")])
        == 0
    )
    module = parse_file(tmp_path / "m.ir")
    model = load_plugin(example).model_class(AutoConfig.from_pretrained(plain)).float().eval()  # type: ignore[misc]
    from safetensors.torch import load_file

    model.load_state_dict(
        {k: v.float() for k, v in load_file(plain / "model.safetensors").items()}, strict=False
    )
    with torch.no_grad():
        wanted = model(torch.tensor(IDS)).logits.numpy()
    for pipeline in ("", "to-ty"):
        run_pipeline(module, pipeline)
        (got,) = run_function(module, "main", (IDS, np.arange(19)[None]), CheckpointReader(packed))
        assert float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted)) < 1e-5
    run_pipeline(module, "kv-materialize{max-kv=32},partition-dies{dies=2}")
    check_files(module)


def test_delta_checkpoints(plain: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    delta = Path(shutil.copytree(plain, tmp_path / "delta"))
    tensors = load_file(plain / "model.safetensors")
    rng = np.random.default_rng(0)
    deltas = {
        k: (rng.standard_normal(v.shape) * 0.01).astype(np.float16) for k, v in tensors.items() if "mlp" in k
    }
    save_file(deltas, delta / "model.safetensors")
    summed = Path(shutil.copytree(plain, tmp_path / "summed"))
    save_file(
        {k: v.astype(np.float32) + deltas.get(k, np.float16(0)) for k, v in tensors.items()},
        summed / "model.safetensors",
    )
    (tmp_path / "plugin.py").write_text(
        f"from tyir.frontends.plugin import ModelPlugin\nplugin = ModelPlugin(base={str(plain)!r})\n"
    )
    module = import_model(delta, dtype="f32", plugin=load_plugin(tmp_path / "plugin.py"))
    arguments = (IDS, np.arange(19)[None])
    (got,) = run_function(module, "main", arguments, CheckpointReader(delta))
    (wanted,) = run_function(import_model(summed, dtype="f32"), "main", arguments, CheckpointReader(summed))
    np.testing.assert_array_equal(got, wanted)
    check_files(module)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("x = 1", "defines no plugin"),
        ("import nowhere", "the plugin fails: ModuleNotFoundError"),
        (
            "from tyir.frontends.plugin import *\nplugin = ModelPlugin(ignore=['('])",
            "'\\(' is no regular expression",
        ),
    ],
)
def test_plugins_that_do_not_work(tmp_path: Path, text: str, wanted: str) -> None:
    (tmp_path / "plugin.py").write_text(text)
    with pytest.raises(TyirError, match=wanted):
        load_plugin(tmp_path / "plugin.py")
    with pytest.raises(TyirError, match="no plugin file"):
        load_plugin(tmp_path / "nowhere.py")


def test_rules_that_do_not_fit_are_reported_together(plain: Path, tmp_path: Path) -> None:
    split = Split(r"(.*)\.mlp\.up_proj\.weight", [(r"\1.a", 3), (r"\1.b", 4)])
    plugin = ModelPlugin(rename=[(r"k_proj|v_proj", "kv_proj")], split=[split])
    with pytest.raises(TyirError) as caught:
        import_model(plain, plugin=plugin)
    message = str(caught.value)
    assert "cannot be split into 3 + 4 rows" in message
    assert "gives the name 'model.layers.0.self_attn.kv_proj.weight' to both" in message
    assert "lacks" not in message  # what follows from these is not told beside them


def test_json_stays_json(packed: Path) -> None:
    """Without the plugin the folder is refused: nothing is guessed from names."""
    config: dict[str, Any] = json.loads((packed / "config.json").read_text())
    assert config["model_type"] == "llama"
    with pytest.raises(TyirError, match="lacks"):
        import_model(packed)


def test_compile_and_verify_take_a_plugin(
    example: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tyir.tools.tyir_compile import main as compile_main
    from tyir.tools.tyir_verify import main as verify_main

    plugin = ["--model-plugin", str(example)]
    command = [
        str(packed),
        *plugin,
        "-o",
        str(tmp_path / "out"),
        "--dies",
        "2",
        "--seqlens",
        "1",
        "--max-kv",
        "16",
        "--weights",
        "int4",
        "--group-size",
        "16",
        "-q",
    ]
    assert compile_main(command) == 0
    artifacts = capsys.readouterr().out.strip()
    assert artifacts == str(tmp_path / "out" / "2die")
    check = [artifacts, "--against", str(packed), "--ids", "1,5,9", "--tokens", "4"]
    assert verify_main([*check, *plugin]) == 0
    assert capsys.readouterr().out.rstrip().splitlines()[-1].startswith("OK")
    assert verify_main(check) == 1  # the folder alone does not say how it is to be read
    assert "lacks" in capsys.readouterr().err
    (tmp_path / "m.ir").write_text("")
    assert compile_main([str(tmp_path / "m.ir"), *command[1:]]) == 1
    assert "has been imported already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("plugin = ModelPlugin(rename=5)", "the plugin's rename cannot be read"),
        ("plugin = ModelPlugin(rename='ab')", "the plugin's rename cannot be read"),
        ("plugin = ModelPlugin(rename=[('a', 'b', 'c')])", "rename cannot"),
        ("plugin = ModelPlugin(rename={'a': 'b'}, ignore='x')", "the plugin's rename, ignore cannot be read"),
        ("plugin = ModelPlugin(split=[('a', [])])", "split cannot"),
        ("plugin = ModelPlugin(split=[Split('a', [('b', '3')])])", "split cannot"),
        ("plugin = ModelPlugin(split=[Split('a', 7)])", "split cannot"),
        ("plugin = ModelPlugin(ignore=[re.compile('a')])", "ignore cannot"),
        ("plugin = ModelPlugin(base=3)", "base cannot"),
        ("raise SystemExit(3)", "the plugin fails: SystemExit: 3"),
        ("import sys; sys.exit('no')", "the plugin fails: SystemExit: no"),
        ("plugin = ModelPlugin(rename=[('(', '')])", "is no regular expression"),
    ],
)
def test_a_file_that_says_nonsense(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(f"import re\nfrom tyir.frontends.plugin import ModelPlugin, Split\n{text}\n")
    with pytest.raises(TyirError) as caught:
        load_plugin(path)
    assert said in str(caught.value) and "help: " in caught.value.render()


@pytest.mark.parametrize("name", ["config.json", "mine", "mine.txt"])
def test_a_file_that_is_no_python(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("plugin = None\n")
    with pytest.raises(TyirError, match="is not a Python file"):
        load_plugin(tmp_path / name)

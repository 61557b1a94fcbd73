"""Damaged and hostile folders: always a `TyirError` with help (or a module), nothing executed, nothing
written.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.frontends.quantized import KINDS, write_quantized
from tests.frontends.test_gguf_and_torch import SMALL, write_gguf
from tyir.diagnostics import Diagnostic, TyirError
from tyir.frontends.checkpoint import open_checkpoint
from tyir.frontends.huggingface import import_model
from tyir.frontends.quant_config import read_quant_config
from tyir.tools.estimate.plan import make_plan
from tyir.tools.estimate.shape import read_shape

STRANGE: list[Any] = [
    None,
    True,
    -1,
    0,
    3,
    10**30,
    1.5,
    "",
    "x",
    "\x00",
    "../../etc/passwd",
    [],
    [1, "a"],
    {},
    {"a": {}},
]


@pytest.fixture(scope="module")
def small(save_model: Callable[..., Path]) -> Path:
    return save_model("llama", dtype="float16", num_hidden_layers=1)


@pytest.fixture(scope="module")
def quantized(save_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "awq"
    write_quantized(
        save_model("llama", dtype="float16", num_hidden_layers=1, intermediate_size=128), folder, KINDS["awq"]
    )
    return folder


def outcome(folder: Path, action: Callable[[Path], Any]) -> str:
    """What an action says: "" when it succeeds.

    Anything but a `TyirError` with help escapes and fails the test.
    """
    before = sorted(p.name for p in folder.parent.iterdir()), sorted(p.name for p in folder.iterdir())
    try:
        action(folder)
        message = ""
    except TyirError as error:
        assert all(d.help for d in error.diagnostics), error
        message = str(error)
    assert before == (
        sorted(p.name for p in folder.parent.iterdir()),
        sorted(p.name for p in folder.iterdir()),
    )
    return message


def headers(folder: Path) -> None:
    problems: list[Diagnostic] = []
    checkpoint = open_checkpoint(folder, problems)
    if checkpoint is not None:
        read_quant_config(folder, checkpoint.config, problems)
    if problems:
        raise TyirError(problems)


def test_damaged_tensor_files(small: Path, tmp_path: Path) -> None:
    """300 files with bytes changed, cut or added in header and data."""
    folder = Path(shutil.copytree(small, tmp_path / "m"))
    path, rng = folder / "model.safetensors", random.Random(0)
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    refused = 0
    for _ in range(300):
        spoiled = bytearray(data)
        kind = rng.randrange(4)
        if kind == 0:
            spoiled = spoiled[: rng.choice((0, 5, 8, size // 2, size + 8, len(data) - 1))]
        elif kind == 1:
            spoiled[:8] = rng.choice((0, 1, size + 1, 10**8 + 1, 2**63)).to_bytes(8, "little")
        else:
            for _ in range(rng.randint(1, 8)):
                spoiled[8 + rng.randrange(size)] = rng.randrange(256)
        path.write_bytes(spoiled)
        refused += bool(outcome(folder, headers))
    assert refused > 200


def test_lying_headers(small: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(small, tmp_path / "m"))
    path, rng = folder / "model.safetensors", random.Random(1)
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    for _ in range(200):
        changed = json.loads(json.dumps(header))
        entry = changed[rng.choice([k for k in changed if k != "__metadata__"])]
        entry[rng.choice(("dtype", "shape", "data_offsets"))] = rng.choice(
            [*STRANGE, [0, 10**18], [-4, 4], [5, 1], [True, 2], [1.0, 2.0]]
        )
        text = json.dumps(changed).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
        assert outcome(folder, headers)


def test_lying_indexes(llama: Path, tmp_path: Path) -> None:
    folder, rng = Path(shutil.copytree(llama, tmp_path / "m")), random.Random(2)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    (tmp_path / "secret.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    names = [
        "../secret.safetensors",
        str(tmp_path / "secret.safetensors"),
        "a/../../secret.safetensors",
        "..\\secret.safetensors",
        "\x00.safetensors",
        "model.safetensors/",
        "",
        ".",
        "config.json",
        "x" * 5000 + ".safetensors",
    ]
    for name in names:
        changed = {
            **index,
            "weight_map": {**index["weight_map"], rng.choice(list(index["weight_map"])): name},
        }
        path.write_text(json.dumps(changed))
        assert outcome(folder, headers), name
    for value in STRANGE:
        path.write_text(json.dumps({"weight_map": value}))
        assert outcome(folder, headers) or value == {}
    path.write_text("[" * 100_000)
    assert outcome(folder, headers)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_json_that_nests_too_deep(small: Path, tmp_path: Path, file: str) -> None:
    folder = Path(shutil.copytree(small, tmp_path / "m"))
    text = b'{"a":' * 200_000
    (folder / file).write_bytes(text if file == "config.json" else len(text).to_bytes(8, "little") + text)
    assert outcome(folder, headers)


def test_configs(small: Path, tmp_path: Path) -> None:
    """Every key of config.json with strange values, in the plan (fast), and some of them in the whole
    import.
    """
    folder, rng = Path(shutil.copytree(small, tmp_path / "m")), random.Random(3)
    config = json.loads((folder / "config.json").read_text())
    for key in config:
        for value in rng.sample(STRANGE, 6):
            (folder / "config.json").write_text(json.dumps({**config, key: value}))
            outcome(folder, read_shape)
    keys = [
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "num_hidden_layers",
        "rope_parameters",
        "architectures",
        "model_type",
        "hidden_act",
        "rms_norm_eps",
        "tie_word_embeddings",
        "head_dim",
    ]
    for key in keys:
        (folder / "config.json").write_text(json.dumps({**config, key: rng.choice(STRANGE[2:])}))
        outcome(folder, import_model)


def test_quantisation_configs(quantized: Path, tmp_path: Path) -> None:
    folder, rng = Path(shutil.copytree(quantized, tmp_path / "m")), random.Random(4)
    config = json.loads((folder / "config.json").read_text())
    for _ in range(300):
        settings = dict(config["quantization_config"])
        settings["quant_method"] = rng.choice(["awq", "gptq", "compressed-tensors", *STRANGE])
        for key in rng.sample(
            [
                "bits",
                "group_size",
                "version",
                "zero_point",
                "modules_to_not_convert",
                "config_groups",
                "desc_act",
                "format",
            ],
            2,
        ):
            settings[key] = rng.choice([*STRANGE, 4, 64, "gemm", {"g": {"weights": rng.choice(STRANGE)}}])
        (folder / "config.json").write_text(
            json.dumps(
                {
                    **config,
                    "quantization_config": (
                        rng.choice([settings, *STRANGE]) if rng.random() < 0.3 else settings
                    ),
                }
            )
        )
        outcome(folder, headers)


def test_plans_of_strange_sizes(small: Path, tmp_path: Path) -> None:
    from tyir.manifest import BuildOptions

    folder, rng = Path(shutil.copytree(small, tmp_path / "m")), random.Random(5)
    config = json.loads((folder / "config.json").read_text())
    for _ in range(12):
        changed = {
            key: rng.choice((1, 2, 7, 24, 4096))
            for key in ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size", "head_dim")
        }
        (folder / "config.json").write_text(json.dumps({**config, **changed, "num_key_value_heads": 1}))
        outcome(
            folder,
            lambda f: make_plan(
                f, BuildOptions(dies=rng.choice((1, 3, 16)), weights=rng.choice(("fp16", "int4")))
            ),
        )


def test_damaged_gguf_files(save_model: Callable[..., Path], tmp_path: Path) -> None:
    """200 files with bytes of the metadata changed, lengths that lie, and cuts."""
    write_gguf(tmp_path / "model.gguf", save_model("llama", dtype="float16", **SMALL), "Q8_0")
    good, rng, seen = (tmp_path / "model.gguf").read_bytes(), random.Random(0), set[str]()
    for kind in [0, 1, 2, 3] * 50:
        data, place = bytearray(good), rng.randrange(3000)
        if kind == 0:
            data[place] = rng.randrange(256)
        elif kind == 1:
            data = data[: rng.randrange(len(good))]
        elif kind == 2:
            data[place : place + 8] = rng.choice([2**64 - 1, 2**63, 2**40, 2**31, 0]).to_bytes(8, "little")
        else:
            data[place:place] = rng.randbytes(rng.randint(1, 9))
        (tmp_path / "model.gguf").write_bytes(data)
        seen.add(outcome(tmp_path, headers).partition(":")[0])
    assert len(seen) > 1

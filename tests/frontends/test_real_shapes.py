"""Two layers of real models' shapes, with random weights and the whole vocabulary: the imported module computes Hugging Face's logits in fp32.

The checkpoints are written by `tools/make_checkpoint.py` of the reference material beside this repository; without it these tests are skipped.  One checkpoint
exists at a time, and one model is in memory at a time: transformers answers all questions before the module is run.  Minutes: --slow.
"""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tyir.dialects.builtin import Module
from tyir.dialects.func import Func
from tyir.dialects.ty import tensor_type
from tyir.frontends.huggingface import import_model
from tyir.interpreter import Interpreter, run_lockstep
from tyir.pipeline import run_pipeline
from tyir.weights import CheckpointReader

Array = npt.NDArray[Any]
MAKE = Path(__file__).parents[3] / "shared" / "tools" / "make_checkpoint.py"
LENGTHS = (1, 7, 64)
PARTS = (40, 23, 1)  # what is fed after one another with a past
LIMIT = 1e-4
# name, layout, parameters of two layers and the vocabulary in units of 10^9 (what decides whether it fits)
CASES = {
    ("Qwen2.5-0.5B", "fp16"): 0.17,
    ("Qwen2.5-0.5B", "awq"): 0.17,
    ("Qwen2.5-0.5B", "gptq"): 0.17,
    ("Qwen2.5-1.5B", "fp16"): 0.33,
    ("Qwen2.5-1.5B", "awq"): 0.33,
    ("DeepSeek-R1-Distill-Qwen-1.5B", "fp16"): 0.56,
    ("Qwen2.5-3B", "fp16"): 0.47,
    ("Qwen3-1.7B", "fp16"): 0.41,
    ("Qwen3-1.7B", "awq"): 0.41,
    ("Qwen1.5-1.8B", "fp16"): 0.72,
    ("Llama3-8B", "fp16"): 1.49,
    ("Llama3-8B", "awq"): 1.49,
    ("Qwen2-7B", "fp16"): 1.56,
    ("Qwen2.5-7B", "fp16"): 1.56,
    ("DeepSeek-R1-Distill-Qwen-7B", "fp16"): 1.56,
    ("Qwen3-8B", "fp16"): 1.63,
    ("Qwen2.5-14B", "fp16"): 2.11,
    ("Qwen2.5-14B-Instruct-1M", "fp16"): 2.11,
    ("DeepSeek-R1-Distill-Qwen-32B", "fp16"): 2.53,
    ("DeepSeek-R1-Distill-Llama-70B", "fp16"): 3.81,
    ("Qwen2.5-72B", "fp16"): 4.25,
}  # fmt: skip


def available_bytes() -> int:
    """Memory that can be had without swapping."""
    (line,) = (row for row in Path("/proc/meminfo").read_text().splitlines() if row.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """The checkpoint of a case, deleted afterwards."""
    (name, layout), parameters = request.param, CASES[request.param]
    if not MAKE.is_file():
        pytest.skip("needs the reference material's tools/make_checkpoint.py beside this repository")
    if available_bytes() < (needed := parameters * 1e9 * 4 * 1.8):
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free memory")
    target = tmp_path / "model"
    if shutil.disk_usage(tmp_path).free < parameters * 1e9 * 3:
        pytest.skip(f"needs {parameters * 3:.0f} GB of free disk")
    subprocess.run([sys.executable, str(MAKE), name, str(target), "--format", layout, "--layers", "2"], check=True)
    yield target
    shutil.rmtree(target)


# ---------------------------------------------------------------------------------------------------- Hugging Face


def nibbles(words: Array, order: tuple[int, ...]) -> Array:
    """[A, B] int32 to [A, 8 B]: column order[i] of each eight lies in nibble i."""
    out = np.empty((*words.shape, 8), np.uint8)
    for i, column in enumerate(order):
        out[..., column] = words.view(np.uint32) >> np.uint32(4 * i) & 15
    return out.reshape(words.shape[0], -1)


def dense(tensors: dict[str, Array], layout: str) -> dict[str, Array]:
    """fp32 parameters of an AutoAWQ GEMM or AutoGPTQ v1 checkpoint: f16((q - zero) * scale), the matrix that the fp16 kernels multiply with."""
    state = {k: t.astype(np.float32) for k, t in tensors.items() if not k.endswith((".qweight", ".qzeros", ".scales", ".g_idx"))}
    for key in [k for k in tensors if k.endswith(".qweight")]:
        root = key.removesuffix(".qweight")
        scales = tensors[f"{root}.scales"].astype(np.float32)  # [K/g, N]
        if layout == "awq":
            order = (0, 2, 4, 6, 1, 3, 5, 7)
            q, zeros = nibbles(tensors[key], order), nibbles(tensors[f"{root}.qzeros"], order)
        else:
            natural = tuple(range(8))
            q, zeros = nibbles(np.ascontiguousarray(tensors[key].T), natural).T, nibbles(tensors[f"{root}.qzeros"], natural) + 1 & 15
        group = q.shape[0] // scales.shape[0]
        centred = q.astype(np.float32) - np.repeat(zeros.astype(np.float32), group, axis=0)
        state[f"{root}.weight"] = (centred * np.repeat(scales, group, axis=0)).astype(np.float16).astype(np.float32).T.copy()
    return state


def hugging_face(folder: Path, layout: str) -> Any:
    """The model in fp32; of a quantised checkpoint, with the weights unpacked here."""
    import torch
    from safetensors.numpy import load_file
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if layout == "fp16":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    raw = json.loads((folder / "config.json").read_text())
    raw.pop("quantization_config")
    config = AutoConfig.for_model(**raw)
    tensors = {k: t for file in sorted(folder.glob("*.safetensors")) for k, t in load_file(file).items()}
    state = {k: torch.from_numpy(t) for k, t in dense(tensors, layout).items()}
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return model_class.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32).eval()


def expected(folder: Path, layout: str, ids: Array) -> dict[str, Array]:
    """Logits by question: a length without past, "past" for `PARTS` fed one after the other."""
    import torch

    model = hugging_face(folder, layout)
    with torch.no_grad():
        answers = {str(n): model(torch.from_numpy(ids[:, :n])).logits.numpy() for n in LENGTHS}
        cache, parts, first = None, [], 0
        for size in PARTS:
            out = model(torch.from_numpy(ids[:, first : first + size]), past_key_values=cache, use_cache=True)
            cache, first = out.past_key_values, first + size
            parts.append(out.logits.numpy())
    answers["past"] = np.concatenate(parts, axis=1)
    return answers


# ---------------------------------------------------------------------------------------------------- tyir


def with_past(module: Module, reader: CheckpointReader, ids: Array) -> Array:
    """Logits of `PARTS` fed one after the other to the module with caches."""
    main = module.lookup("main")
    assert isinstance(main, Func)
    caches = [np.zeros(tensor_type(a).static_shape, np.float32) for a in main.args[2:]]
    logits, first = [], 0
    for size in PARTS:
        part = ids[:, first : first + size].astype(np.int32)
        (out,) = run_lockstep([Interpreter(module, reader).run("main", [part, np.array([first], np.int32), *caches])])
        logits.append(out[0])
        caches, first = list(out[1:]), first + size
    return np.concatenate(logits, axis=1)


def error(got: Array, wanted: Array) -> float:
    """Relative error of the logits of all tokens together."""
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def errors(folder: Path, layout: str) -> dict[str, float]:
    ids = np.random.default_rng(0).integers(3, 128000, (1, max(LENGTHS)))
    wanted = expected(folder, layout, ids)
    gc.collect()
    module, reader = import_model(folder, dtype="f32"), CheckpointReader(folder)
    run_pipeline(module, "to-ty")
    found = {}
    for n in LENGTHS:
        ((logits,),) = run_lockstep([Interpreter(module, reader).run("main", [ids[:, :n], np.arange(n)[None]])])
        found[str(n)] = error(logits, wanted[str(n)])
    run_pipeline(module, f"kv-materialize{{max-kv={sum(PARTS)}}}")
    found["past"] = error(with_past(module, reader, ids), wanted["past"])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("folder", CASES, indirect=True, ids="-".join)
def test_logits(folder: Path, request: pytest.FixtureRequest) -> None:
    layout = request.node.callspec.params["folder"][1]
    found = errors(folder, layout)
    print(", ".join(f"{question}: {value:.1e}" for question, value in found.items()))
    assert max(found.values()) <= LIMIT, found

"""Two layers of real models' shapes, with random weights and the whole vocabulary: the imported module
computes Hugging Face's logits in fp32.

Both sides read weights from the mapped file and widen them; up to `KEPT` numbers they keep the widened ones,
beyond that they widen anew at each use, so that the largest model (two layers of 72B and its vocabulary: 17
GB in fp32) takes a few GB of memory beside the file.  Hugging Face also answers in fp64, which says how far
its own fp32 is from the exact logits: that is what a single token's error must be compared with, since a
single token can be ill-conditioned.  Minutes: --slow.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.frontends.real_models import MODELS, write_checkpoint
from tyir.dialects.builtin import Module
from tyir.dialects.func import Func
from tyir.dialects.ty import Cast, GetGlobal, Global, tensor_type
from tyir.execution.weights import CheckpointReader
from tyir.frontends.huggingface import import_model
from tyir.interpreter import Evaluator, Interpreter, evaluate_op, run_lockstep
from tyir.ir import Op
from tyir.pipeline import run_pipeline

Array = npt.NDArray[Any]
LENGTHS = (1, 7, 64)
PARTS = (40, 23, 1)  # what is fed after one another with a past
LIMIT = 1e-4
QUANTIZED = [
    ("Qwen2.5-0.5B", "awq"),
    ("Qwen2.5-0.5B", "gptq"),
    ("Qwen2.5-1.5B", "awq"),
    ("Qwen3-1.7B", "awq"),
    ("Llama3-8B", "awq"),
    ("Llama3-8B", "gptq"),
]
CASES = [*((name, "fp16") for name in MODELS), *QUANTIZED]
WIDENED_ROWS = 16384
KEPT = 2.2e9


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """The checkpoint of a case, deleted afterwards."""
    name, layout = request.param
    if shutil.disk_usage(tmp_path).free < 12e9:
        pytest.skip("needs 12 GB of free disk")
    write_checkpoint(tmp_path / "model", name, layout)
    yield tmp_path / "model"
    shutil.rmtree(tmp_path / "model")


# ----------------------------------------------------------------------------------------------- Hugging Face


def nibbles(words: Array, order: tuple[int, ...]) -> Array:
    """[A, B] int32 to [A, 8 B]: column order[i] of each eight lies in nibble i."""
    out = np.empty((*words.shape, 8), np.uint8)
    for i, column in enumerate(order):
        out[..., column] = words.view(np.uint32) >> np.uint32(4 * i) & 15
    return out.reshape(words.shape[0], -1)


def unpacked(read: Callable[[str], Array], root: str, layout: str) -> Array:
    """A weight of an AutoAWQ GEMM or AutoGPTQ v1 checkpoint: f16((q - zero) * scale), the matrix that the
    fp16 kernels multiply with.
    """
    words, zero_words, scales = (
        read(f"{root}.{part}") for part in ("qweight", "qzeros", "scales")
    )  # scales: [K/g, N]
    natural = tuple(range(8))
    if layout == "awq":
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        q, zeros = nibbles(words, order), nibbles(zero_words, order)
    else:
        q, zeros = nibbles(np.ascontiguousarray(words.T), natural).T, nibbles(zero_words, natural) + 1 & 15
    group = q.shape[0] // scales.shape[0]
    centred = q.astype(np.float32) - np.repeat(zeros.astype(np.float32), group, axis=0)
    return (centred * np.repeat(scales.astype(np.float32), group, axis=0)).astype(np.float16).T.copy()


def widening(model: Any, dtype: Any) -> Any:
    """`model`, whose linears and embedding hold fp16 weights, computing in `dtype`: fp16 numbers are exact in
    any wider type.
    """
    import torch

    def linear(module: Any, x: Any) -> Any:
        bias = None if module.bias is None else module.bias.to(dtype)
        parts = torch.cat(
            [torch.nn.functional.linear(x, rows.to(dtype)) for rows in module.weight.split(WIDENED_ROWS)],
            dim=-1,
        )
        return parts if bias is None else parts + bias

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.forward = linear.__get__(module)
        elif isinstance(module, torch.nn.Embedding):
            module.forward = (lambda table: lambda ids: table[ids].to(dtype))(module.weight)
        else:
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, torch.nn.Parameter(parameter.to(dtype), requires_grad=False))
    return model


def hugging_face(folder: Path, layout: str, dtype: str) -> Any:
    """The model in `dtype`; of a quantised checkpoint, with the weights unpacked here."""
    import torch
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = json.loads((folder / "config.json").read_text())
    raw.pop("quantization_config", None)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw))
    with safe_open(folder / "model.safetensors", "pt") as file:
        stored = set(file.keys())

        def read(key: str) -> Array:
            return np.asarray(file.get_tensor(key).numpy())

        def parameter(name: str) -> Any:
            if name in stored:
                return file.get_tensor(name)
            return torch.from_numpy(unpacked(read, name.removesuffix(".weight"), layout))

        model.load_state_dict(
            {name: parameter(name) for name, _ in model.named_parameters()}, strict=False, assign=True
        )
    if dtype == "float32" and sum(p.numel() for p in model.parameters()) <= KEPT:
        model = model.to(torch.float32)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # its frequencies are stored nowhere
    return widening(model, getattr(torch, dtype)).eval()


def logits_of(model: Any, ids: Array, cache: Any = None) -> tuple[Array, Any]:
    import torch

    with torch.no_grad():
        out = model(torch.from_numpy(ids), past_key_values=cache, use_cache=cache is not None)
    return out.logits.numpy(), out.past_key_values


def expected(folder: Path, layout: str, ids: Array) -> tuple[dict[str, Array], Array]:
    """Logits in fp32 by question: a length without past, "past" for `PARTS` fed one after the other; and
    those of all tokens in fp64.
    """
    from transformers import DynamicCache

    model = hugging_face(folder, layout, "float32")
    answers = {str(n): logits_of(model, ids[:, :n])[0] for n in LENGTHS}
    cache, parts, first = DynamicCache(config=model.config), [], 0
    for size in PARTS:
        logits, cache = logits_of(model, ids[:, first : first + size], cache)
        first += size
        parts.append(logits)
    answers["past"] = np.concatenate(parts, axis=1)
    return answers, logits_of(hugging_face(folder, layout, "float64"), ids)[0]


# ---------------------------------------------------------------------------------------------------- tyir


def keeping(kept: dict[str, Any]) -> Evaluator:
    """The reference evaluator, which keeps widened weights in `kept` from one run to the next."""

    def evaluate(op: Op, operands: Sequence[Array]) -> Any:
        source = op.operands[0].op if isinstance(op, Cast) else None
        if not isinstance(source, GetGlobal):
            return evaluate_op(op, operands)
        if source.symbol.leaf not in kept:
            kept[source.symbol.leaf] = evaluate_op(op, operands)
        return kept[source.symbol.leaf]

    return evaluate


def with_past(module: Module, reader: CheckpointReader, ids: Array, evaluator: Evaluator) -> Array:
    """Logits of `PARTS` fed one after the other to the module with caches."""
    main = module.lookup("main")
    assert isinstance(main, Func)
    caches = [np.zeros(tensor_type(a).static_shape, np.float32) for a in main.args[2:]]
    logits, first = [], 0
    for size in PARTS:
        part = ids[:, first : first + size].astype(np.int32)
        (out,) = run_lockstep(
            [
                Interpreter(module, reader, evaluator=evaluator).run(
                    "main", [part, np.array([first], np.int32), *caches]
                )
            ]
        )
        logits.append(out[0])
        caches, first = list(out[1:]), first + size
    return np.concatenate(logits, axis=1)


def computed(folder: Path, ids: Array) -> dict[str, Array]:
    """The imported module's logits by question."""
    module, reader = import_model(folder, dtype="f32"), CheckpointReader(folder)
    run_pipeline(module, "to-ty")
    evaluator = keeping({}) if sum(w.type.size for w in module.walk_type(Global)) <= KEPT else evaluate_op
    answers = {}
    for n in LENGTHS:
        ((answers[str(n)],),) = run_lockstep(
            [Interpreter(module, reader, evaluator=evaluator).run("main", [ids[:, :n], np.arange(n)[None]])]
        )
    run_pipeline(module, f"kv-materialize{{max-kv={sum(PARTS)}}}")
    answers["past"] = with_past(module, reader, ids, evaluator)
    return answers


def error(got: Array, wanted: Array) -> float:
    """Relative error of the logits of all tokens together."""
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def token_errors(got: Array, exact: Array) -> Array:
    """Relative error token by token."""
    return np.asarray(np.linalg.norm(got - exact, axis=-1) / np.linalg.norm(exact, axis=-1))[0]


@pytest.mark.slow
@pytest.mark.parametrize("folder", CASES, indirect=True, ids="-".join)
def test_logits(folder: Path, request: pytest.FixtureRequest) -> None:
    layout = request.node.callspec.params["folder"][1]
    ids = np.random.default_rng(0).integers(3, 32000, (1, max(LENGTHS)))
    wanted, exact = expected(folder, layout, ids)
    got = computed(folder, ids)
    found = {question: error(got[question], wanted[question]) for question in wanted}
    ours, theirs = token_errors(got["64"], exact), token_errors(wanted["64"], exact)
    text = ", ".join(f"{question}: {value:.1e}" for question, value in found.items())
    print(f"{text}; worst token against fp64: {ours.max():.1e} (Hugging Face fp32: {theirs.max():.1e})")
    assert max(found.values()) <= LIMIT, found
    assert ours.max() <= max(LIMIT, 2 * theirs.max())


def test_weights_widened_on_use_are_the_fp32_model(save_model: Callable[..., Path]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = save_model("qwen2", dtype="float16", tie_word_embeddings=True)
    ids = np.arange(3, 20)[None]
    with torch.no_grad():
        wanted = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            .eval()(torch.from_numpy(ids))
            .logits.numpy()
        )
    for dtype, limit in (("float32", 1e-6), ("float64", 2e-6)):
        assert error(logits_of(hugging_face(folder, "fp16", dtype), ids)[0], wanted) < limit

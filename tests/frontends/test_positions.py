"""What depends on how far a token lies: rope kinds beyond the length where their frequencies change, windows,
multipliers; with and without past.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tyir.dialects.builtin import Module
from tyir.dialects.func import Func
from tyir.dialects.ty import tensor_type
from tyir.execution.weights import CheckpointReader
from tyir.frontends.huggingface import import_model
from tyir.interpreter import run_function
from tyir.manifest import BuildOptions
from tyir.pipeline import run_pipeline
from tyir.runtime_sim.session.session import Session
from tyir.tools.api import compile_path
from tyir.tools.verify.compare import LayerStates, Reference, check_prompt

SaveModel = Callable[..., Path]
Array = npt.NDArray[Any]
IDS = np.random.default_rng(1).integers(3, 96, (1, 60))
LIMIT = 24  # where the frequencies change
CHANGING: dict[str, tuple[str, dict[str, Any]]] = {
    "dynamic": (
        "llama",
        {
            "max_position_embeddings": LIMIT,
            "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
        },
    ),
    "longrope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "short_factor": [1.1] * 8,
                "long_factor": [3.0, 5.0] * 4,
                "factor": 4.0,
                "rope_theta": 1e4,
                "original_max_position_embeddings": LIMIT,
            }
        },
    ),
    "Phi-3": (
        "phi3",
        {
            "original_max_position_embeddings": LIMIT,
            "max_position_embeddings": 128,
            "rope_parameters": {
                "rope_type": "longrope",
                "short_factor": [1.1] * 8,
                "long_factor": [3.0, 5.0] * 4,
                "rope_theta": 1e4,
            },
        },
    ),
}
STATEFUL: dict[str, tuple[str, dict[str, Any]]] = {
    "window": ("mistral", {"sliding_window": 8}),
    "window in some layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "multipliers": (
        "granite",
        {
            "logits_scaling": 8.0,
            "residual_multiplier": 0.22,
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.05,
        },
    ),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "yarn": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "rope_theta": 1e4,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "no rope in some layers": ("smollm3", {"no_rope_layers": [1, 0]}),
}


def hugging_face(folder: Path, parts: Sequence[Array]) -> Array:
    """fp32 logits of `parts` fed one after the other with a cache."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    cache, logits = DynamicCache(config=model.config), []
    with torch.no_grad():
        for part in parts:
            out = model(torch.from_numpy(part), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits.numpy())
    return np.concatenate(logits, axis=1)


def without_past(module: Module, folder: Path, ids: Array) -> Array:
    return run_function(module, "main", (ids, np.arange(ids.shape[1])[None]), CheckpointReader(folder))[0]


def with_past(module: Module, folder: Path, parts: Sequence[Array]) -> Array:
    main = module.lookup("main")
    assert isinstance(main, Func)
    caches: list[Array] = [np.zeros(tensor_type(a).static_shape, np.float32) for a in main.args[2:]]
    logits, first = [], 0
    for part in parts:
        inputs = (part.astype(np.int32), np.array([first], np.int32), *caches)
        out, *caches = run_function(module, "main", inputs, CheckpointReader(folder))
        logits.append(out)
        first += part.shape[1]
    return np.concatenate(logits, axis=1)


def error(got: Array, wanted: Array) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize(
    "name", [n if n == "longrope" else pytest.param(n, marks=pytest.mark.slow) for n in CHANGING]
)
def test_frequencies_are_those_of_the_length_asked_for(save_model: SaveModel, name: str) -> None:
    model_type, config = CHANGING[name]
    folder, notes = save_model(model_type, dtype="float32", **config), list[str]()
    for length, positions in (
        (10, LIMIT),
        (LIMIT, LIMIT),
        (LIMIT, None),
        (LIMIT + 1, LIMIT + 1),
        (50, 50),
        (60, 60),
    ):
        module = import_model(
            folder, dtype="f32", positions=positions, note=lambda d: notes.append(d.message)
        )
        assert f"max_position_embeddings = {max(positions or LIMIT, LIMIT)}" in str(
            module.attributes["tyir.model"]
        )
        run_pipeline(module, "to-ty")
        ids = IDS[:, :length]
        assert error(without_past(module, folder, ids), hugging_face(folder, [ids])) < 1e-4, (
            length,
            positions,
        )
        if positions == LIMIT:
            assert notes == []
    assert (
        "other frequencies beyond 24 tokens; those up to there are imported (--max-kv 24 at most)" in notes[0]
    )
    if name != "dynamic":  # both tables are kept: nothing to say
        assert len(notes) == 1
        return
    assert (
        "a cache of 60 takes those of 60 tokens for every prompt, which for up to 24 tokens are not the"
        " model's (--max-kv 24 is exact there)" in notes[-1]
    )
    assert len(notes) == 4


@pytest.mark.parametrize(
    "name", [n if n == "window in some layers" else pytest.param(n, marks=pytest.mark.slow) for n in STATEFUL]
)
def test_beyond_the_window_with_and_without_past(save_model: SaveModel, name: str) -> None:
    model_type, config = STATEFUL[name]
    folder = save_model(model_type, dtype="float32", **config)
    parts = np.split(IDS, [20, 40, 59], axis=1)  # the second part begins and ends beyond the window
    module = import_model(folder, dtype="f32")
    run_pipeline(module, "to-ty")
    assert error(without_past(module, folder, IDS), hugging_face(folder, [IDS])) < 1e-4
    run_pipeline(module, "kv-materialize{max-kv=60}")
    assert error(with_past(module, folder, parts), hugging_face(folder, parts)) < 1e-4


@pytest.mark.parametrize("max_kv", [pytest.param(24, marks=pytest.mark.slow), 48])
def test_artifacts_on_both_sides_of_the_change(save_model: SaveModel, tmp_path: Path, max_kv: int) -> None:
    """Compiled for a cache that stays below the change, and for one beyond it: the reference of tyir-verify
    takes the same frequencies.
    """
    folder = save_model("llama", dtype="float16", vocab_size=256, **CHANGING["longrope"][1])
    warnings: list[str] = []
    options = BuildOptions(dies=2, seqlens=(1, 8), max_kv=max_kv)
    artifacts = compile_path(folder, tmp_path, options, warn=warnings.append)
    assert warnings == []  # both tables are kept (tests/long_context/test_long_rope.py)
    states = LayerStates()
    result = check_prompt(
        Session(artifacts, probe=states), Reference(folder, options), list(range(5, 17)), max_kv - 12, states
    )
    assert result.differing == [] and result.logit_cosine.min() >= 0.9999

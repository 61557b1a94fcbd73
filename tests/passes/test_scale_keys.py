"""Keys scaled against queries: nothing changes but what caches of 8 and of 4 bits keep of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.e2e.conftest import MODEL
from tyir.attributes import DenseElementsAttr
from tyir.diagnostics import Diagnostic
from tyir.dialects.builtin import Module
from tyir.dialects.func import Func
from tyir.dialects.kv import QuantizeGroups, QuantizeRows
from tyir.dialects.ty import Attention, Constant, Dequantize, Global, PairScales, tensor_type
from tyir.execution.weights import CheckpointReader
from tyir.frontends.huggingface import import_model
from tyir.interpreter import run_function
from tyir.layers import layer_of
from tyir.pipeline import PassContext, run_pipeline
from tyir.types import storage_dtype

Array = npt.NDArray[Any]
IDS = np.array([[(37 * i * i + 11 * i + 5) % 4096 for i in range(40)]])
LARGE = 600.0  # as in Qwen2.5-7B's first layer (ggml-org/llama.cpp #21385)


class Spiked(CheckpointReader):
    """The embedded model with one pair of every head's keys far above the others: those that turn slowest,
    which tell little about positions.
    """

    def read(self, ref: Global) -> Array:
        found = super().read(ref)
        if not ref.key.endswith("k_proj.bias"):
            return found
        heads = np.array(found).reshape(-1, 2, 16)
        heads[:, 0, -1] += LARGE
        return heads.reshape(found.shape)


def model(dtype: str = "f16", pipeline: str = "") -> Module:
    module = import_model(MODEL, dtype=dtype)
    run_pipeline(module, "to-ty")
    if pipeline:
        run_pipeline(module, pipeline)
    return module


def logits(module: Module, weights: CheckpointReader) -> Array:
    """Of `IDS`, with empty caches where there are some."""
    (function,) = [op for op in module.body if isinstance(op, Func)]
    given: list[Array] = [IDS, np.arange(IDS.shape[1])[None]]
    if len(function.args) > 2:
        kinds = [tensor_type(a) for a in function.args[2:]]
        caches = [np.zeros(k.static_shape, storage_dtype(k.element)) for k in kinds]
        given = [IDS.astype(np.int32), np.zeros(1, np.int32), *caches]
    return np.asarray(run_function(module, str(function.sym_name), given, weights)[0], np.float32)


@pytest.mark.parametrize("reader", [CheckpointReader, Spiked])
def test_nothing_changes_in_f32(reader: type[CheckpointReader]) -> None:
    """Powers of two only move exponents: equal bit by bit."""
    plain, scaled = model("f32"), model("f32", "scale-keys")
    layers = len({layer_of(op) for op in scaled.walk_type(PairScales)})
    assert layers > 1 and len(list(scaled.walk_type(PairScales))) == 2 * layers
    weights = reader(MODEL)
    np.testing.assert_array_equal(logits(plain, weights), logits(scaled, weights))


def test_4_bit_weights_keep_their_numbers() -> None:
    """Their groups' scales take the factors."""
    plain, scaled = (model(pipeline=f"quantize-weights{{group-size=64}}{p}") for p in ("", ",scale-keys"))
    assert list(scaled.walk_type(Dequantize))
    weights = CheckpointReader(MODEL)
    np.testing.assert_array_equal(logits(plain, weights), logits(scaled, weights))


def test_keys_that_are_normalised_by_head(tmp_path: Path) -> None:
    """As Qwen3's: the norms' weights take the factors."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=4096,
    )
    made = Qwen3ForCausalLM(config)
    for layer in made.model.layers:
        layer.self_attn.k_norm.weight.data[3] = 40.0
    made.save_pretrained(tmp_path)
    modules = []
    for passes in ((), ("scale-keys",)):
        modules.append(import_model(tmp_path, dtype="f32"))
        for name in ("to-ty", *passes):
            run_pipeline(modules[-1], name)
    assert len(list(modules[1].walk_type(PairScales))) == 4
    weights = CheckpointReader(tmp_path)
    np.testing.assert_array_equal(*(logits(module, weights) for module in modules))


def test_an_int8_cache_keeps_what_spikes_would_lose() -> None:
    weights, cache = Spiked(MODEL), "kv-materialize{max-kv=64 dtype=%s}"
    wanted = logits(model(pipeline=cache % "fp16"), weights)
    error = {
        name: float(abs(logits(model(pipeline=passes + cache % "int8"), weights) - wanted).mean())
        for name, passes in (("plain", ""), ("scaled", "scale-keys,"))
    }
    assert error["scaled"] < error["plain"] / 3


class Uneven(Spiked):
    """Spikes in the second layer alone."""

    def read(self, ref: Global) -> Array:
        return super().read(ref) if "layers.1." in ref.key else CheckpointReader.read(self, ref)


def test_a_4_bit_cache_has_8_bit_keys_where_pairs_are_far_apart() -> None:
    """Only in that layer, which is named; without, the spike's own rounding drowns the others."""
    weights, cache = Uneven(MODEL), "kv-materialize{max-kv=64 dtype=int4}"
    wanted = logits(model(pipeline=cache.replace("int4", "fp16")), weights)
    error, said = {}, list[Diagnostic]()
    for name, passes in (("plain", ""), ("scaled", "scale-keys,"), ("wide", "scale-keys{dtype=int4},")):
        module = model()
        run_pipeline(module, passes + cache, PassContext(weights=weights, report=said.append))
        wide = {layer_of(op) for op in module.walk_type(QuantizeRows) if not isinstance(op, QuantizeGroups)}
        assert wide == ({1} if name == "wide" else set())
        error[name] = float(abs(logits(module, weights) - wanted).mean())
    assert error["wide"] < error["scaled"] / 2 and error["wide"] < error["plain"] / 2
    (one,) = [text for d in said if "stored with 8 bits" in (text := d.render())]
    assert "at least 256 times" in one and "layers.1." in one


def test_even_keys_stay_at_4_bits() -> None:
    context = PassContext(weights=CheckpointReader(MODEL))
    module = model()
    run_pipeline(module, "scale-keys{dtype=int4}", context)
    assert not [op for op in module.walk_type(Attention) if "tyir.keys" in op.attributes]
    assert context.statistics["keys of 8 bits"] == 0


def factors(weight: Array, bias: Array | None = None, **options: Any) -> Array:
    values = [weight] if bias is None else [weight, bias]
    given = [Constant(value=DenseElementsAttr.from_numpy(v)).result for v in values]
    return np.asarray(PairScales(*given, **options).evaluate(*values))


def test_a_pair_has_one_factor_and_heads_their_own() -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(0, 1, (16, 64)).astype(np.float32)
    bias = np.zeros(16, np.float32)
    bias[6] = 40 * np.linalg.norm(weight, axis=1).mean()  # head 0, pair 2, its second channel
    found = factors(weight, bias, dim=8)
    assert found.shape == (16,) and (found >= 1).all()
    assert found[2] == found[6] == 8  # 20 times the others: 2^floor(0.75 * 4.3)
    assert set(np.delete(found, [2, 6])) == {1.0}
    np.testing.assert_array_equal(factors(weight, bias, dim=8, inverse=True), 1 / found)
    twice = factors(weight, bias, dim=8, repeats=2)
    np.testing.assert_array_equal(twice.reshape(2, 2, 8), np.repeat(found.reshape(2, 1, 8), 2, axis=1))


@pytest.mark.parametrize("weight", [np.zeros((8, 4)), np.ones((8, 4)), np.full((8, 4), 6e4), np.eye(8)])
def test_heads_whose_pairs_are_alike_stay(weight: Array) -> None:
    assert set(factors(weight.astype(np.float16), dim=8)) == {1.0}


def test_factors_are_bounded() -> None:
    weight = np.ones((8, 4), np.float32)
    weight[0] = 1e30
    assert factors(weight, dim=8).max() == 1024


def test_a_second_run_changes_nothing() -> None:
    once, twice = model(pipeline="scale-keys"), model(pipeline="scale-keys,scale-keys")
    weights = Spiked(MODEL)
    np.testing.assert_array_equal(logits(once, weights), logits(twice, weights))


class SpikedLast(Spiked):
    """Only the last layer's keys."""

    def read(self, ref: Global) -> Array:
        return super().read(ref) if ".5." in ref.key else CheckpointReader.read(self, ref)


@pytest.mark.parametrize("reader", [CheckpointReader, Spiked, SpikedLast])
def test_a_layer_whose_bias_spikes_is_named(reader: type[CheckpointReader]) -> None:
    """With its size; not what all layers have, and not where weights cannot be read."""
    said: list[Diagnostic] = []
    module = model()
    last = max(layer for a in module.walk_type(Attention) if (layer := layer_of(a)) is not None)
    assert last == 5
    run_pipeline(module, "scale-keys", PassContext(weights=reader(MODEL), report=said.append))
    if reader is not SpikedLast:
        assert not said
        return
    (remark,) = said
    assert remark.severity == "remark" and "layers.5." in str(remark.where)
    assert re.match(r"the bias of the keys reaches (599|60\d)[.\d]*, \d\.\d+ in the layer", remark.message)
    module = model()
    module.attributes = module.attributes.without("tyir.checkpoint")
    run_pipeline(module, "scale-keys", PassContext(report=said.append))
    assert len(said) == 1

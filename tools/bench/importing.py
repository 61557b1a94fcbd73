"""Time and memory of importing large checkpoints.

Qwen2.5-7B (AWQ), Qwen2.5-72B and R1-Distill-Llama-70B (both AWQ).

    python -m tyir.tools.bench.importing [--json]

The checkpoints have the real shapes and headers but no data: their files are sparse, since an import reads
headers only.  Each import runs in a process of its own through `tyir-import`, IR text written to a file;
memory is that process's peak.  Shapes: the models' config.json on huggingface.co.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from tyir.tools.cli import run_tool

__all__ = ["main", "write_sparse_awq"]

_QWEN: Final = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
}
_LLAMA: Final = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


def _sizes(hidden: int, width: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": False,
    }


MODELS: Final[dict[str, dict[str, Any]]] = {
    "Qwen2.5-7B": {**_QWEN, **_sizes(3584, 18944, 28, 28, 4)},
    "Qwen2.5-72B": {**_QWEN, **_sizes(8192, 29568, 80, 64, 8)},
    "R1-Distill-Llama-70B": {**_LLAMA, **_sizes(8192, 28672, 80, 64, 8)},
}
_GROUP: Final = 128
_SHARD: Final = 4 << 30
_BYTES: Final = {"F16": 2, "I32": 4}


def _tensors(config: dict[str, Any]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of an AutoAWQ checkpoint of these sizes."""
    h, w, d = (
        config["hidden_size"],
        config["intermediate_size"],
        config["hidden_size"] // config["num_attention_heads"],
    )
    q, kv, bias = (
        config["num_attention_heads"] * d,
        config["num_key_value_heads"] * d,
        config["model_type"] == "qwen2",
    )
    yield "model.embed_tokens.weight", "F16", (config["vocab_size"], h)
    for layer in range(config["num_hidden_layers"]):
        root = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{root}{norm}.weight", "F16", (h,)
        for name, n, k, has_bias in (
            ("self_attn.q_proj", q, h, bias), ("self_attn.k_proj", kv, h, bias), ("self_attn.v_proj", kv, h, bias), ("self_attn.o_proj", h, q, False),  # noqa: E501
            ("mlp.gate_proj", w, h, False), ("mlp.up_proj", w, h, False), ("mlp.down_proj", h, w, False),
        ):  # fmt: skip
            yield f"{root}{name}.qweight", "I32", (k, n // 8)
            yield f"{root}{name}.qzeros", "I32", (k // _GROUP, n // 8)
            yield f"{root}{name}.scales", "F16", (k // _GROUP, n)
            if has_bias:
                yield f"{root}{name}.bias", "F16", (n,)
    yield "model.norm.weight", "F16", (h,)
    yield "lm_head.weight", "F16", (config["vocab_size"], h)


def write_sparse_awq(folder: Path, config: dict[str, Any]) -> int:
    """Write config, index and sparse safetensors files; returns the checkpoint's nominal size in bytes."""
    folder.mkdir(parents=True)
    quantization = {
        "quant_method": "awq",
        "zero_point": True,
        "group_size": _GROUP,
        "bits": 4,
        "version": "gemm",
    }
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    shards: list[dict[str, Any]] = [{}]
    position, total, weight_map = 0, 0, {}
    for name, dtype, shape in _tensors(config):
        size = _BYTES[dtype]
        for d in shape:
            size *= d
        if position + size > _SHARD and shards[-1]:
            shards.append({})
            position = 0
        shards[-1][name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
        weight_map[name] = f"model-{len(shards):05}.safetensors"
        position, total = position + size, total + size
    for number, header in enumerate(shards, 1):
        text = json.dumps(header).encode()
        with (folder / f"model-{number:05}.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + max(e["data_offsets"][1] for e in header.values()))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )
    return total


def _measure(folder: Path, output: Path) -> tuple[float, float, int]:
    """(seconds, seconds of processor time, peak bytes of memory) of one `tyir-import`."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "tyir.tools.tyir_import", str(folder), "-o", str(output)],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(errors)
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


@run_tool
def main(argv: Sequence[str]) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="bench_import",
        description="Time and peak memory of importing large AWQ checkpoints (sparse files).",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for name, config in MODELS.items():
            folder = Path(temporary) / name
            size = write_sparse_awq(folder, config)
            load = os.getloadavg()[0]
            seconds, processor, peak = _measure(folder, Path(temporary) / "model.ir")
            rows.append(
                {
                    "model": name,
                    "checkpoint_gib": size / 2**30,
                    "seconds": seconds,
                    "cpu_seconds": processor,
                    "peak_gib": peak / 2**30,
                    "load_before": load,
                    "cores": os.cpu_count(),
                }
            )
    if options.json:
        print(json.dumps(rows, indent=1))
        return 0
    print(
        f"{'model':<24}{'checkpoint':>12}{'seconds':>9}{'processor':>11}{'peak memory':>13}{'load before':>13}"  # noqa: E501
        f"   ({os.cpu_count()} cores)"
    )
    for row in rows:
        print(
            f"{row['model']:<24}{row['checkpoint_gib']:>8.1f}"
            f" GiB{row['seconds']:>9.1f}{row['cpu_seconds']:>9.1f} s{row['peak_gib']:>9.2f}"
            f" GiB{row['load_before']:>13.1f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

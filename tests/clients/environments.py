"""Environments of published clients, each of its own: their requirements exclude one another and tyir's.

    python -m tests.clients.environments lm-eval langchain     # from the index, into build/clients
    pytest tests/clients --slow                                 # what is not there is skipped by name

`TYIR_CLIENTS` names another folder of environments.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

__all__ = ["REQUIREMENTS", "python_of"]

ROOT = Path(__file__).resolve().parents[2]
TORCH = "torch==2.13.0"  # by name, so that pip takes the build that its settings offer, as for the checkout
REQUIREMENTS: dict[str, list[str]] = {
    "langchain": ["langchain-openai==1.7.4", "openai", "ollama"],
    "lm-eval": ["lm-eval[api]==0.4.13", "transformers>=5"],
    "schemathesis": ["schemathesis"],
    "dify": ["dify-plugin==0.7.4"],
    "evalscope": ["evalscope[perf]==1.14.1"],
    "aiperf": ["aiperf==0.13.0"],
    "guidellm": ["guidellm==0.8.1", TORCH],
    "vllm": ["vllm==0.33.0"],
}
# vLLM's wheel asks for CUDA's torch, and for much that only CUDA's kernels use: the plug-in runs none.  Of
# apache-tvm-ffi it pins a release that tyir's TVM is too new for, and of xgrammar triton is not needed.
NOT_FOR_VLLM = (
    *("torch", "nvidia", "cuda", "nvtx", "flashinfer", "quack", "tilelang", "tokenspeed", "fastsafetensors"),
    *("pynvvideocodec", "instanttensor", "humming", "xgrammar", "apache-tvm"),
)


def folder() -> Path:
    """Where the environments are."""
    return Path(os.environ.get("TYIR_CLIENTS", ROOT / "build" / "clients"))


def python_of(name: str) -> Path:
    """The interpreter of an environment; skips the test where there is none."""
    python = folder() / name / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no environment of {name}: python -m tests.clients.environments {name}")
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description="Install environments of clients.")
    parser.add_argument("names", nargs="+", choices=sorted(REQUIREMENTS))
    for name in parser.parse_args().names:
        place = folder() / name
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
        python = place / "bin" / "python"
        if name == "vllm":
            install_vllm(python)
        else:
            pip(python, *REQUIREMENTS[name])


def pip(python: Path, *arguments: str) -> None:
    """Install into the environment of an interpreter."""
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", *arguments], check=True)


def install_vllm(python: Path) -> None:
    """vLLM for a computer without CUDA, the runtime of this checkout, and the plug-in between them."""
    pip(python, "--no-deps", *REQUIREMENTS["vllm"])
    ask = "from importlib.metadata import requires; print('\\n'.join(requires('vllm')))"
    wanted = subprocess.run([str(python), "-c", ask], capture_output=True, text=True, check=True).stdout
    pip(python, TORCH)
    pip(
        python,
        *(r for r in wanted.splitlines() if "extra ==" not in r and not r.lower().startswith(NOT_FOR_VLLM)),
    )
    pip(python, "--no-deps", *(r.partition(";")[0] for r in wanted.splitlines() if r.startswith("xgrammar")))
    pip(python, str(ROOT), str(ROOT / "examples" / "vllm-tyir"))


if __name__ == "__main__":
    main()

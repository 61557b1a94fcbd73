"""One engine in a process of its own, which times what it is told to on standard input:

    python engine_process.py KIND MODEL THREADS PROMPT CLOCK

`KIND`: tyir, onnxruntime-genai, llama.cpp or openvino; only the packages of that one are imported, so that any
Python with them will do.  A line "prefill" runs a prompt of PROMPT tokens into an empty cache, "decode N" N tokens
after it; each is answered by the seconds of every run, as JSON.  `CLOCK`: wall, or processor for the time that this
process's threads ran, which other programs on the cores make longer by far less.
"""  # noqa: E501

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["CLOCKS", "ENGINES", "main"]

CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}

Engine = tuple[
    Callable[[list[int]], int], Callable[[int], int]
]  # a prompt, a token; both give the next token


def _tyir(model: str, threads: int) -> Engine:
    from tyir.runtime_sim.session.session import Session

    session = Session(Path(model), check=False, threads=threads)

    def prefill(ids: list[int]) -> int:
        session.reset()
        return next(iter(session.generate(ids, 1)))

    return prefill, lambda token: int(session.next_tokens([token]).ids[-1, 0])


def _onnxruntime(model: str, threads: int) -> Engine:
    import onnxruntime_genai as og

    config = og.Config(model)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    loaded = og.Model(config)
    state: dict[str, Any] = {}

    def next_token() -> int:
        state["generator"].generate_next_token()
        return int(state["generator"].get_next_tokens()[0])

    def prefill(ids: list[int]) -> int:
        parameters = og.GeneratorParams(loaded)
        parameters.set_search_options(max_length=512, min_length=512, do_sample=False)
        state["generator"] = og.Generator(loaded, parameters)
        state["generator"].append_tokens(np.array([ids], np.int32))
        return next_token()

    return prefill, lambda token: next_token()


def _llama(model: str, threads: int) -> Engine:
    import llama_cpp

    llm = llama_cpp.Llama(
        model, n_ctx=512, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False
    )

    def step(ids: list[int]) -> int:
        llm.eval(ids)
        return int(llm.sample(temp=0.0))

    def prefill(ids: list[int]) -> int:
        llm.reset()
        return step(ids)

    return prefill, lambda token: step([token])


def _openvino(model: str, threads: int) -> Engine:
    import openvino
    from openvino import opset13

    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    core = openvino.Core()
    network = core.read_model(f"{model}/openvino_model.xml")
    # the head of the last token alone, as openvino-genai has it computed
    head = network.output("logits").get_node()
    while head.get_type_name() != "MatMul":
        head = head.input_value(0).get_node()
    last = opset13.slice(head.input_value(0), *(np.array([n], np.int64) for n in (-1, 1 << 31, 1, 1)))
    head.input(0).replace_source_output(last.output(0))
    compiled = core.compile_model(network, "CPU", settings)
    request, names = compiled.create_infer_request(), {i.any_name for i in compiled.inputs}
    state = {"past": 0}

    def step(ids: list[int]) -> int:
        past, count = state["past"], len(ids)
        given = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, past + count), np.int64),
            "position_ids": np.arange(past, past + count, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        logits = request.infer({k: v for k, v in given.items() if k in names})[0]
        state["past"] += count
        return int(logits[0, -1].argmax())

    def prefill(ids: list[int]) -> int:
        request.reset_state()
        state["past"] = 0
        return step(ids)

    return prefill, lambda token: step([token])


ENGINES = {"tyir": _tyir, "onnxruntime-genai": _onnxruntime, "llama.cpp": _llama, "openvino": _openvino}


def main(kind: str, model: str, threads: int, prompt: int, clock: str) -> None:
    """Serves until standard input ends."""
    now = CLOCKS[clock]
    prefill, decode = ENGINES[kind](model, threads)
    ids = np.random.default_rng(0).integers(10, 1000, prompt).tolist()
    token = prefill(ids)
    for _ in range(4):
        token = decode(token)
    print(json.dumps([]), flush=True)
    for line in sys.stdin:
        what, _, count = line.strip().partition(" ")
        taken = []
        for _ in range(int(count or 1)):
            start = now()
            token = prefill(ids) if what == "prefill" else decode(token)
            taken.append(now() - start)
        print(json.dumps(taken), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])

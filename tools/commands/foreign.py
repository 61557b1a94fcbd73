"""What other programs call our options: the one table of their spellings.

    tyir-compile M -o out --tensor-parallel-size 4
    error: tyir-compile: unknown option '--tensor-parallel-size'
    help: vLLM's --tensor-parallel-size is --dies N here

Spellings are those of `vllm serve --help` (vLLM), `llama-cli --help` (llama.cpp), `mlir-opt --help` (MLIR),
`model_transform.py`, `model_deploy.py` and `llm_convert.py` (tpu-mlir), TyLLM's `build_and_compile_llm`,
`optimum-cli export openvino --help` and transformers' arguments; `_` and `-` are the same in them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

__all__ = ["FOREIGN_COMMANDS", "FOREIGN_OPTIONS", "FOREIGN_VALUES", "Foreign", "foreign_option"]


@dataclass(frozen=True)
class Foreign:
    """An option of the program `of`; ours is `option` of the commands `tools` (empty: it has none), and
    `note` says what else there is to know.
    """

    of: str
    names: tuple[str, ...]
    option: str = ""
    tools: tuple[str, ...] = ()
    note: str = ""

    def answer(self, name: str, prog: str) -> str:
        """What to do instead of `name` in the command `prog`."""
        theirs = f"{self.of}'s {name}"
        if not self.option:
            return f"{theirs} has no option here: {self.note}"
        where = "here" if prog.removeprefix("tyir-") in self.tools else f"of tyir-{self.tools[0]}"
        return f"{theirs} is {self.option} {where}" + (f": {self.note}" if self.note else "")


_SETTLED: Final = "it is settled when the model is compiled"
_SEQUENCES: Final = "sequences per step are compiled in"
_LORA: Final = "give the adapter as the model, and its base with --base"
_RECOGNISED: Final = "as the model: it is recognised; --weights int4 rounds a float one"
_ENGINES: Final = (
    "programs run compiled for this machine (host), by numpy (interpreter), or as commands (edge10)"
)
_F16: Final = "that is --dtype f16, which the chip computes in; f32 is for comparing"
_BUILD: Final = ("compile", "import")

FOREIGN_OPTIONS: Final = (
    # -------------------------------------------------------------------- dies, lengths and memory
    Foreign("vLLM", ("--tensor-parallel-size", "-tp"), "--dies N", _BUILD),
    Foreign("TyLLM", ("--dev-count",), "--dies N", _BUILD),
    Foreign("tpu-mlir", ("--num-device", "--num-core"), "--dies N", _BUILD),
    Foreign("llama.cpp", ("--split-mode", "-sm", "--tensor-split", "-ts"), "--dies N", _BUILD,
            "what is split is chosen by cost, and pinned on the IR"),
    Foreign("vLLM", ("--pipeline-parallel-size",), "--pp K", _BUILD),
    Foreign("vLLM", ("--data-parallel-size", "-dp"), note="start one process per copy of the artifacts"),
    Foreign("vLLM", ("--max-model-len",), "--max-kv N", _BUILD, _SETTLED),
    Foreign("vLLM", ("--max-seq-len", "--max-seq-len-to-capture"), "--max-kv N", _BUILD, _SETTLED),
    Foreign("TyLLM", ("--max-kv-cache-size",), "--max-kv N", _BUILD),
    Foreign("TyLLM", ("--seq-len-list",), "--seqlens N,N,..", _BUILD),
    Foreign("tpu-mlir", ("--seq-length", "--max-input-length"), "--max-kv N", _BUILD,
            "that is the cache; --seqlens lists the tokens per step"),
    Foreign("llama.cpp", ("--ctx-size", "-c"), "--max-kv N", _BUILD, _SETTLED),
    Foreign("vLLM", ("--max-num-seqs",), "--batch B", ("compile",), _SEQUENCES),
    Foreign("llama.cpp", ("--parallel", "-np"), "--batch B", ("compile",), _SEQUENCES),
    Foreign("llama.cpp", ("--batch-size", "-b", "--ubatch-size", "-ub"), "--seqlens N,N,..", _BUILD,
            "tokens per step; --batch of tyir-compile is the number of sequences"),
    Foreign("vLLM", ("--max-num-batched-tokens", "--enable-chunked-prefill"), "--seqlens N,N,..", _BUILD,
            "prompts run in chunks of the lengths compiled"),
    Foreign("vLLM", ("--gpu-memory-utilization", "--swap-space", "--cpu-offload-gb",
                     "--num-gpu-blocks-override"),
            note="all memory is planned when the model is compiled; tyir-compile --plan says what is needed"),
    Foreign("llama.cpp", ("--n-gpu-layers", "--gpu-layers", "-ngl", "--no-mmap", "--mlock",
                          "--main-gpu", "-mg"),
            note="all layers are on the dies; tyir-compile --plan says what fits"),
    Foreign("llama.cpp", ("-t", "--threads-batch", "-tb"), "--threads N", ("run", "chat")),
    Foreign("vLLM", ("--block-size", "--enable-prefix-caching"), "--cache FILE", ("run", "chat"),
            "a prefix that the cache holds is not computed again"),
    Foreign("vLLM", ("--enforce-eager", "--compilation-config", "-O", "--max-parallel-loading-workers"),
            note="every program is compiled ahead of its run; docs/compiling.md says what can be chosen"),
    # -------------------------------------------------------------------------------------- numbers
    Foreign("vLLM", ("--quantization",), "--weights int4", _BUILD,
            "checkpoints that are quantised already (AWQ, GPTQ, GGUF) are recognised by themselves"),
    Foreign("tpu-mlir", ("--quantize",), "--weights int4", _BUILD),
    Foreign("tpu-mlir", ("--q-group-size",), "--group-size N", _BUILD),
    Foreign("OpenVINO", ("--weight-format",), "--weights fp16|int4", _BUILD),
    Foreign("vLLM", ("--kv-cache-dtype",), "--kv-dtype fp16|int8|int4", ("compile",)),
    Foreign("llama.cpp", ("--cache-type-k", "-ctk", "--cache-type-v", "-ctv"), "--kv-dtype fp16|int8|int4",
            ("compile",), "one kind for keys and values"),
    Foreign("vLLM", ("--dtype",), "--dtype f16|f32", ("import",), "compiled models compute in f16"),
    Foreign("transformers", ("--torch-dtype", "--load-in-4bit", "--load-in-8bit"), "--weights int4", _BUILD),
    Foreign("tpu-mlir", ("--calibration-table", "--quantize-table", "--tolerance", "--test-input",
                         "--test-result"),
            note="weights are rounded without calibration; tyir-verify compares with Hugging Face"),
    # ---------------------------------------------------------------------------- models and files
    Foreign("vLLM", ("--model", "--model-path", "--tokenizer", "--served-model-name"),
            note="the model is the first argument, a folder: tyir-compile FOLDER -o out/"),
    Foreign("llama.cpp", ("-m", "-hf", "--hf-repo", "-mu", "--model-url"),
            note="the model is the first argument, a folder or a .gguf file: tyir-compile FILE.gguf -o out/"),
    Foreign("tpu-mlir", ("--model-name", "--model-def", "--mlir", "--input-shapes", "--model-data"),
            note="the model is the first argument, a Hugging Face folder: tyir-import FOLDER -o model.ir"),
    Foreign("vLLM", ("--trust-remote-code",), "--model-plugin FILE", _BUILD,
            "no code of a checkpoint is executed; your own comes in by a file (docs/model-plugin.md)"),
    Foreign("vLLM", ("--download-dir", "--revision", "--load-format", "--hf-token"),
            note="models are folders here: hf download ORG/MODEL --local-dir MODEL"),
    Foreign("llama.cpp", ("--lora",), "--base FOLDER", ("compile", "import", "verify"),
            _LORA),
    Foreign("vLLM", ("--enable-lora", "--lora-modules"), "--base FOLDER", ("compile", "import", "verify"),
            _LORA),
    Foreign("tpu-mlir", ("--chip", "--processor"), "--machine NAME|FILE",
            ("compile", "sim", "bench-serving")),
    Foreign("vLLM", ("--device", "--distributed-executor-backend"), "--engine host|interpreter|edge10",
            ("run", "verify", "bench-serving")),
    Foreign("TensorRT-LLM", ("--output-dir", "--out-dir", "--outfile"), "-o OUT",
            ("compile", "import", "opt", "dis", "reduce", "sim")),
    Foreign("TyLLM", ("--artifacts-path",), "-o OUT", ("compile",)),
    # ----------------------------------------------------------------------------------- generating
    Foreign("llama.cpp", ("--n-predict", "--predict", "-n"), "--max-tokens N", ("run", "chat")),
    Foreign("transformers", ("--max-new-tokens",), "--max-tokens N", ("run", "chat")),
    Foreign("llama.cpp", ("-p",), "--prompt TEXT", ("run", "verify")),
    Foreign("llama.cpp", ("--file", "-f"), "--prompt TEXT", ("run",),
            "or pipe the file in: tyir-run out/4die < FILE"),
    Foreign("llama.cpp", ("--temp",), "--temperature T", ("run", "chat")),
    Foreign("llama.cpp", ("-s",), "--seed N", ("run", "chat")),
    Foreign("llama.cpp", ("--system-prompt", "-sys"), "--system TEXT", ("chat",)),
    Foreign("llama.cpp", ("--chat-template-file",), "--chat-template FILE", ("chat",)),
    Foreign("llama.cpp", ("--conversation", "-cnv", "--interactive", "-i"), "--chat", ("run",),
            "or talk by tyir-chat"),
    Foreign("llama.cpp", ("--prompt-cache",), "--cache FILE", ("run", "chat")),
    Foreign("llama.cpp", ("--repeat-penalty", "--presence-penalty", "--frequency-penalty", "--mirostat",
                          "--grammar", "--typical", "--xtc-probability"),
            note="tokens are drawn by --temperature, --top-k, --top-p and --min-p of tyir-run"),
    Foreign("transformers", ("--num-beams", "--do-sample", "--repetition-penalty", "--length-penalty"),
            note="tokens are drawn by --temperature, --top-k, --top-p and --min-p of tyir-run"),
    Foreign("llama.cpp", ("--stream", "--no-stream", "--simple-io"),
            note="text is printed as it is made, also into a pipe; --json prints it whole at the end"),
    Foreign("vLLM", ("--stop", "--stop-token-ids", "--ignore-eos"),
            note="answers end at the model's end tokens and at --max-tokens; a request to tyir-serve may have"
            " stop texts"),
    Foreign("vLLM", ("--speculative-config", "--speculative-model", "--draft-model", "-md"),
            note="each token is computed by the whole model"),
    Foreign("vLLM", ("--dataset-name", "--dataset-path", "--backend", "--base-url", "--endpoint"),
            "--trace FILE", ("bench-serving",), "JSON lines of arrivals and lengths"),
    Foreign("vLLM", ("--random-input-len", "--sharegpt-input-len"), "--input-len N", ("bench-serving",)),
    Foreign("vLLM", ("--random-output-len", "--sharegpt-output-len"), "--output-len N", ("bench-serving",)),
    Foreign("vLLM", ("--save-result", "--result-filename"), "--result FILE", ("bench-serving",)),
    # --------------------------------------------------------------------------------------- passes
    Foreign("MLIR", ("--pass-pipeline", "--passes"), "--pass-pipeline TEXT", ("opt",),
            "tyir-compile runs the passes that are left by itself"),
    Foreign("MLIR", ("--mlir-print-ir-after-all", "--mlir-print-ir-before-all", "--print-ir-after-all",
                     "--print-ir-before-all"), "--print-ir-after-all", ("opt",)),
    Foreign("MLIR", ("--mlir-timing",), "--timing", ("opt", "compile")),
    Foreign("MLIR", ("--emit-bytecode", "--emit-bytecode-version"), "--binary", ("compile",),
            "IR is text; command programs can be bytes"),
    Foreign("MLIR", ("--mlir-disable-threading", "--mlir-print-op-on-diagnostic", "--mlir-print-stacktrace"),
            note="passes run in one thread and errors show the op; --debug adds Python's traceback"),
    Foreign("MLIR", ("--debug-only", "-debug-only", "--mlir-debug"), "--debug", ("opt",),
            "passes say what they did with --pass-statistics and --print-ir-after-change"),
    Foreign("MLIR", ("--help-list", "--help-hidden", "--print-all-options"), "--list-passes", ("opt",)),
    Foreign("MLIR", ("--sccp", "--loop-invariant-code-motion",
                     "--control-flow-sink", "--mem2reg", "--sroa"),
            note="the passes there are: tyir-opt --list-passes"),
)  # fmt: skip

# Of an option of ours: values that it has elsewhere -> what to do.
FOREIGN_VALUES: Final = {
    ("--weights", "int8"): "8 bits are for caches, --kv-dtype int8; weights are fp16 or int4",
    ("--weights", "fp8"): "weights are fp16, or int4 with a scale per --group-size channels",
    ("--weights", "gptq"): f"give the GPTQ checkpoint {_RECOGNISED}",
    ("--weights", "gguf"): "give the .gguf file as the model: it is recognised",
    ("--weights", "q4_0"): "give a .gguf file of Q4_0 as the model, or --weights int4 --group-size 32",
    ("--weights", "q4_k_m"): "give the .gguf file as the model (it becomes fp16), or --weights int4",
    ("--weights", "w4a16"): "that is --weights int4",
    ("--weights", "w4f16"): "that is --weights int4",
    ("--weights", "4"): "that is --weights int4",
    ("--weights", "f16"): "that is --weights fp16",
    ("--weights", "bf16"): "that is --weights fp16: a bf16 checkpoint is converted, and checked for overflow",
    ("--weights", "auto"): "leave --weights out: what the checkpoint holds stays",
    ("--dtype", "bfloat16"): _F16,
    ("--dtype", "bf16"): _F16,
    ("--dtype", "float16"): "that is --dtype f16",
    ("--dtype", "half"): "that is --dtype f16",
    ("--dtype", "float32"): "that is --dtype f32",
    ("--dtype", "fp16"): "that is --dtype f16",
    ("--dtype", "fp32"): "that is --dtype f32",
    ("--dtype", "auto"): "leave --dtype out: models compute in f16",
    ("--kv-dtype", "fp8"): "8 bits of a cache are --kv-dtype int8",
    ("--kv-dtype", "fp8_e5m2"): "8 bits of a cache are --kv-dtype int8",
    ("--kv-dtype", "fp8_e4m3"): "8 bits of a cache are --kv-dtype int8",
    ("--kv-dtype", "q8_0"): "8 bits of a cache are --kv-dtype int8",
    ("--kv-dtype", "q4_0"): "4 bits of a cache are --kv-dtype int4",
    ("--kv-dtype", "q4_1"): "4 bits of a cache are --kv-dtype int4",
    ("--kv-dtype", "f16"): "that is --kv-dtype fp16",
    ("--kv-dtype", "auto"): "leave --kv-dtype out: it is fp16",
    ("--engine", "cuda"): _ENGINES,
    ("--engine", "vllm"): _ENGINES,
    ("--engine", "cpu"): "that is --engine host",
}  # fmt: skip

# What other programs call our commands.
FOREIGN_COMMANDS: Final = {
    "convert": "import", "export": "import", "build": "compile", "deploy": "compile", "generate": "run",
    "complete": "run", "infer": "run", "bench": "bench-serving", "benchmark": "bench-serving",
    "simulate": "sim", "profile": "sim", "disassemble": "dis", "objdump": "dis", "check": "verify",
    "eval": "verify", "test": "verify", "info": "doctor", "env": "doctor", "collect-env": "doctor",
    "autocomplete": "completion",
}  # fmt: skip


def _normal(name: str) -> str:
    return name if len(name) < 3 or name[1] != "-" else "--" + name[2:].replace("_", "-").lower()


def foreign_option(flag: str) -> Iterator[Foreign]:
    """The entries for a flag (`--max_model_len=4096`), those of another dash included (`-tp`, `--tp`)."""
    name = _normal(flag.partition("=")[0])
    spellings = {name, name.removeprefix("-") if name.startswith("--") else f"-{name}"}
    yield from (f for f in FOREIGN_OPTIONS if name in f.names)
    yield from (
        f for f in FOREIGN_OPTIONS if name not in f.names and len(name) > 3 and spellings & set(f.names)
    )

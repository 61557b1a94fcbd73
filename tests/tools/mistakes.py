"""Command lines that people get wrong, and what they are told: the data of `docs/mistakes.md`.

Their files are those of the folder that `tests/tools/test_mistakes.py` makes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["MISTAKES", "SECTIONS", "Mistake"]


@dataclass(frozen=True)
class Mistake:
    """A command line of one who knows `who`'s programs, and a part of the answer that says what to do."""

    who: str
    line: str
    cure: str
    stdin: str = ""


SECTIONS: Final = {
    "vLLM": "Options of vLLM",
    "llama.cpp": "Options of llama.cpp",
    "MLIR": "Options of mlir-opt",
    "tpu-mlir": "Options of tpu-mlir, TyLLM and others",
    "typing": "Slips of the keyboard",
    "models": "Models that are elsewhere, or another's",
    "numbers": "Numbers and places that cannot be",
    "IR": "IR, stages and passes",
    "own": "Files of one's own",
    "results": "Artifacts, runs and simulations",
}

MISTAKES: Final = (
    Mistake("vLLM", "tyir-compile model -o o --tensor-parallel-size 4", "--dies N here"),
    Mistake("vLLM", "tyir-compile model -o o -tp 4", "--dies N here"),
    Mistake("vLLM", "tyir-compile model -o o --max-model-len 4096", "--max-kv N here"),
    Mistake("vLLM", "tyir-run out/1die --max-model-len 4096 --prompt x", "--max-kv N of tyir-compile"),
    Mistake("vLLM", "tyir-compile model -o o --quantization awq", "--weights int4 here"),
    Mistake("vLLM", "tyir-compile model -o o --kv-cache-dtype fp8", "--kv-dtype fp16|int8 here"),
    Mistake("vLLM", "tyir-compile model -o o --kv-dtype fp8", "--kv-dtype int8"),
    Mistake("vLLM", "tyir-compile --model model -o o", "the model is the first argument"),
    Mistake("vLLM", "tyir-import model --dtype bfloat16", "that is --dtype f16"),
    Mistake("vLLM", "tyir-compile model -o o --trust-remote-code", "--model-plugin FILE here"),
    Mistake("vLLM", "tyir-run out/1die --gpu-memory-utilization 0.9", "tyir-compile --plan says"),
    Mistake("vLLM", "tyir-compile model -o o --pipeline-parallel-size 2", "--pp K here"),
    Mistake("vLLM", "tyir-compile model -o o --max_num_seqs 8", "--batch B here"),
    Mistake("vLLM", "tyir-compile model -o o --enforce-eager", "compiled ahead of its run"),
    Mistake("vLLM", "tyir-run out/1die --prompt x --stop END", "a request to tyir-serve"),
    Mistake("llama.cpp", "tyir-run -m model.gguf -p Hello -n 64", "the model is the first argument"),
    Mistake("llama.cpp", "tyir-compile model -o o -c 4096", "--max-kv N here"),
    Mistake("llama.cpp", "tyir-run out/1die --n-predict 64 --prompt x", "--max-tokens N here"),
    Mistake("llama.cpp", "tyir-run out/1die -ngl 99 --prompt x", "all layers are on the dies"),
    Mistake("llama.cpp", "tyir-run out/1die -t 8 --prompt x", "--threads N here"),
    Mistake("llama.cpp", "tyir-run out/1die --temp 0.7 --prompt x", "--temperature T here"),
    Mistake("llama.cpp", "tyir-run out/1die --repeat-penalty 1.1 --prompt x", "--top-p and --min-p"),
    Mistake("llama.cpp", "tyir-run out/1die --prompt x --stream", "printed as it is made"),
    Mistake("llama.cpp", "tyir-compile model -o o --weights q4_k_m", "--weights int4"),
    Mistake("MLIR", "tyir-compile model -o o --pass-pipeline=cse", "--pass-pipeline TEXT of tyir-opt"),
    Mistake("MLIR", "tyir-compile model -o o --mlir-print-ir-after-all", "of tyir-opt"),
    Mistake("MLIR", "tyir-opt ty.ir --convert-linalg-to-loops", "--list-passes"),
    Mistake("MLIR", "tyir-opt ty.ir --sccp", "tyir-opt --list-passes"),
    Mistake("MLIR", "tyir-opt arith.mlir", "--allow-unregistered-dialect"),
    Mistake("MLIR", "tyir-opt ty.ir --emit-bytecode", "IR is text"),
    Mistake("MLIR", "tyir-opt ty.ir --pass-pipeline=canonicalize)", "a pipeline is written as"),
    Mistake("MLIR", "tyir-import model --cse", "tyir-opt FILE.ir --cse"),
    Mistake("tpu-mlir", "tyir-import --model_name qwen --model_def model", "the model is the first argument"),
    Mistake("tpu-mlir", "tyir-compile model -o o --quantize W4F16", "--weights int4 here"),
    Mistake("tpu-mlir", "tyir-compile model -o o --chip bm1684x", "--machine NAME|FILE here"),
    Mistake("tpu-mlir", "tyir-compile model -o o --dev_count 4", "--dies N here"),
    Mistake("tpu-mlir", "tyir-compile model --output_dir o", "-o OUT here"),
    Mistake("tpu-mlir", "tyir-compile model -o o --weight-format int4", "--weights fp16|int4 here"),
    Mistake("tpu-mlir", "tyir-run out/1die --prompt x --num-beams 4", "--temperature, --top-k"),
    Mistake("typing", "tyir-compile model -o o --die 4", "did you mean '--dies'?"),
    Mistake("typing", "tyir-compile model -o o --weights int8", "--kv-dtype int8"),
    Mistake("typing", "tyir-compile model -o o --dies four", "--dies N: number of dies"),
    Mistake("typing", "tyir complie model", "did you mean 'compile'?"),
    Mistake("typing", "tyir convert model", "tyir import"),
    Mistake("typing", "tyir pull qwen2.5", "hf download"),
    Mistake("typing", "tyir-compile model -o o --temperature 0.7", "is an option of tyir-run"),
    Mistake("typing", "tyir-verify out/1die", "--against HF_DIR"),
    Mistake("typing", "tyir-compile model", "add -o out/, or --plan"),
    Mistake("typing", "tyir-run out/1die --prompt", "--prompt PROMPT"),
    Mistake("typing", "tyir-compile model -o o --seqlens 1 8", "with commas: --seqlens 1,8"),
    Mistake("models", "tyir-compile Qwen/Qwen2.5-0.5B-Instruct -o o",
            "hf download Qwen/Qwen2.5-0.5B-Instruct --local-dir Qwen2.5-0.5B-Instruct"),
    Mistake("models", "tyir-import https://huggingface.co/Qwen/Qwen2.5-7B", "hf download Qwen/Qwen2.5-7B"),
    Mistake("models", "tyir-compile Qwen/Qwen2.5-7B --plan", "hf download Qwen/Qwen2.5-7B"),
    Mistake("models", "tyir-run Qwen/Qwen2.5-7B --prompt x", "tyir-compile Qwen2.5-7B -o out"),
    Mistake("models", "tyir-verify out/1die --against Qwen/Qwen2.5-7B", "hf download Qwen/Qwen2.5-7B"),
    Mistake("models", "tyir-verify out/1die --against other", "--against the checkpoint that was compiled"),
    Mistake("models", "tyir-run model --prompt x", "compile it: tyir-compile model -o out"),
    Mistake("models", "tyir-sim ty.ir", "tyir-compile FILE.ir -o out"),
    Mistake("models", "tyir-compile modle -o o", "did you mean 'model'?"),
    Mistake("models", "tyir-import model/config.json", "give the folder it lies in: model"),
    Mistake("models", "tyir-compile model/model.safetensors -o o", "give the folder it lies in: model"),
    Mistake("models", "tyir-verify out/1die --against out/1die", "give the folder of the model"),
    Mistake("models", "tyir-compile out/1die -o o", "give the folder of the model"),
    Mistake("models", "tyir-quantize out/1die -o q", "give the folder of the model"),
    Mistake("models", "tyir-quantize model -o q --calibration nothing.txt", "give a text file"),
    Mistake("numbers", "tyir-compile model -o o --dies 17", "use 16"),
    Mistake("numbers", "tyir-compile model -o o --seqlens 1,a", "write a list such as 1,8"),
    Mistake("numbers", "tyir-compile model -o o --seqlens 1,2000", "max-kv=2000"),
    Mistake("numbers", "tyir-compile model -o o --weights int4 --group-size 100", "auto chooses"),
    Mistake("numbers", "tyir-compile model --plan --weights int4 --group-size 100", "--group-size"),
    Mistake("numbers", "tyir-import model -o model", "give a file name"),
    Mistake("numbers", "tyir-import model -o ty.ir/x.ir", "write to another folder"),
    Mistake("numbers", "tyir-compile kv.ir -o o --max-kv 4096", "leave max_kv out"),
    Mistake("IR", "tyir-opt kv.ir --raise-aten", "start from a file of stage aten"),
    Mistake("IR", "tyir-opt ty.ir --specialize-seqlen", "first"),
    Mistake("IR", "tyir-opt pim.ir", "did you mean 'tyir.pin'?"),
    Mistake("IR", "tyir-opt nothing.ir", "give a file of IR"),
    Mistake("IR", "tyir-opt ty.ir --canonicalise", "did you mean '--canonicalize'?"),
    Mistake("IR", "tyir-opt ty.ir --kv-materialize=maxkv=64", "did you mean 'max-kv'?"),
    Mistake("IR", "tyir-opt ty.ir --kv-materialize=max-kv=many", "max-kv=<an integer>, default"),
    Mistake("IR", "tyir-opt model/config.json", "give a file of IR"),
    Mistake("own", "tyir-opt ty.ir --load-pass count_macs.py --count-macs", "this is in a file of yours"),
    Mistake("own", "tyir-opt ty.ir --load-pass broken.py", "mend this line"),
    Mistake("own", "tyir-opt mine.py", "an op is written"),
    Mistake("own", "tyir-opt own.ir", "--load-dialect FILE.py makes ops of your own known"),
    Mistake("own", "tyir-opt own.ir --load-pass mine.py", "it declares ops: --load-dialect=mine.py"),
    Mistake("own", "tyir-opt ty.ir --load-pass nowhere.py", "give the path of a .py file"),
    Mistake("own", "tyir-compile model -o o --machine mine", "machine"),
    Mistake("own", "tyir-compile model -o o --model-plugin plugin.py", "plugin = ModelPlugin(...)"),
    Mistake("results", "tyir-run out --prompt x", "did you mean out/1die?"),
    Mistake("results", "tyir-run out/1die --ids 1,2 --prompt x", "leave out --prompt"),
    Mistake("results", "tyir-chat out/1die", "--chat-template FILE"),
    Mistake("results", "tyir-run out/1die --prompt x --top-k -1", "--top-k takes a whole number from 0 on"),
    Mistake("results", "tyir-run out/1die --prompt " + 30 * "x", "--max-kv"),
    Mistake("results", "tyir-sim out/1die --set dram.bandwith=3", "did you mean 'dram.bandwidth_gbps'?"),
    Mistake("results", "tyir-sim out/1die --pos 500", "give a position in"),
    Mistake("results", "tyir-verify out/1die --against model --ids 1,99999", "tokens are numbered 0 to"),
    Mistake("results", "tyir-verify out/1die --against model --prompts 0", "the nearest possible is 1"),
    Mistake("results", "tyir-verify out/1die --against model --prompts 99", "the nearest possible is 8"),
    Mistake("results", "tyir-verify out/1die --against model --tokens 0", "give 1 or more"),
    Mistake("results", "tyir-verify out/1die --against model --prompt ''", "give at least one token"),
    Mistake("results", "tyir-run out/1die --image x.png --prompt x", "vision-language model"),
    Mistake("results", "tyir-dis out/1die", "did you mean"),
    Mistake("results", "tyir-bench-serving out/1die --goodput 5", "ttft:500"),
)  # fmt: skip

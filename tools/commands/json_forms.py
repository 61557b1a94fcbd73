"""What the commands print with `--json`: one form each; docs/json.md is written from these classes.

    print_json(Imported(output="model.ir", architecture="LlamaForCausalLM", ...))

A form only grows: fields are added, never renamed.  What another package declares as data (`tyir-sim`'s
summary, vLLM's serving figures) is printed as it is declared there.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Annotated, Any

__all__ = [
    "FORMS",
    "Artifacts",
    "Checked",
    "Imported",
    "Planned",
    "PlannedDie",
    "Prompt",
    "PromptChecked",
    "Ran",
    "Reduced",
    "Stage",
    "print_json",
]


def print_json(form: Any) -> None:
    """Print a form on standard output."""
    content = (
        dataclasses.asdict(form) if dataclasses.is_dataclass(form) and not isinstance(form, type) else form
    )
    print(json.dumps(content, indent=1, allow_nan=True))


@dataclass(frozen=True)
class Imported:
    """`tyir-import -o FILE --json`: the module that was written."""

    output: Annotated[str, "the file that holds the IR"]
    architecture: Annotated[str, "of config.json"]
    layers: Annotated[int, "decoder layers"]
    parameters: Annotated[int, "numbers the weights are made of"]
    files: Annotated[int, "files that hold the weights"]
    bytes: Annotated[int, "of the weights as stored"]
    ops: Annotated[int, "of the module, weights not counted"]
    stage: Annotated[str, "aten, or ty with --raise"]


@dataclass(frozen=True)
class Stage:
    """One stage of a compile."""

    name: Annotated[str, "import, passes, weights, edge10 s1 die0, host code s1 die0, .., manifest"]
    seconds: Annotated[float, "wall time"]
    peak_mib: Annotated[float | None, "highest resident memory meanwhile, MiB; null where it is not known"]


@dataclass(frozen=True)
class Artifacts:
    """`tyir-compile --json`: the folder that was written."""

    artifacts: Annotated[str, "the folder"]
    files: Annotated[int, "files in it"]
    bytes: Annotated[int, "of all files"]
    options: Annotated[dict[str, Any], "what it was built with, as in manifest.json"]
    seconds: Annotated[float, "of all stages"]
    stages: Annotated[tuple[Stage, ...], "in order"]


@dataclass(frozen=True)
class PlannedDie:
    """What one die needs of DRAM, in bytes."""

    weights: Annotated[int, "weights"]
    kv_cache: Annotated[int, "key/value caches"]
    activations: Annotated[int, "inputs and outputs of the longest step"]
    total: Annotated[int, "their sum"]


@dataclass(frozen=True)
class Planned:
    """`tyir-compile --plan --json` and `tyir-import --plan --json`: what a compile would need."""

    model: Annotated[str, "architecture of config.json"]
    layers: Annotated[int, "decoder layers"]
    parameters: Annotated[int, "numbers the model is made of"]
    group_size: Annotated[int | None, "input channels per int4 scale; null: fp16 weights"]
    options: Annotated[dict[str, Any], "that were planned for"]
    dies: Annotated[tuple[PlannedDie, ...], "in order"]
    dram_bytes: Annotated[int, "that one die has"]
    tokens_per_second: Annotated[tuple[float, float, float], "of decoding: slow bound, point, fast bound"]
    host_ram_bytes: Annotated[int, "of this machine while it compiles, about"]
    host_disk_bytes: Annotated[int, "of the artifacts, about"]
    host_seconds: Annotated[tuple[float, float], "of the compile: at best, at worst"]
    problems: Annotated[tuple[str, ...], "what does not fit; then the exit code is 1"]


@dataclass(frozen=True)
class Prompt:
    """One prompt and what was made of it."""

    prompt: Annotated[str | None, "as given; null where ids were given"]
    prompt_tokens: Annotated[int, "its tokens"]
    reused_tokens: Annotated[int, "of them from the cache of --cache"]
    tokens: Annotated[tuple[int, ...], "that were generated"]
    text: Annotated[str | None, "that they stand for; null where there is no tokenizer"]
    ended: Annotated[str, "why: a stop token, --max-tokens, a full cache"]


@dataclass(frozen=True)
class Ran:
    """`tyir-run --json`: what was generated; nothing is streamed then."""

    artifacts: Annotated[str, "the folder"]
    engine: Annotated[str, "host, interpreter or edge10"]
    prompts: Annotated[tuple[Prompt, ...], "in order"]
    load_seconds: Annotated[
        float, "until the first prompt could begin: libraries, hashes, weights, tokenizer"
    ]
    first_token_seconds: Annotated[float | None, "from there to the first token; null for a batch"]
    tokens_per_second: Annotated[float, "of this machine, not the device; of all prompts together"]


@dataclass(frozen=True)
class PromptChecked:
    """The comparison of one prompt."""

    prompt_tokens: Annotated[int, "its tokens"]
    positions: Annotated[int, "whose logits were compared"]
    min_logit_cosine: Annotated[float, "the smallest of them"]
    max_logit_error: Annotated[float, "the largest absolute difference of a logit"]
    tokens: Annotated[int, "greedy tokens compared"]
    differing: Annotated[int, "of them not Hugging Face's"]
    ties: Annotated[int, "of them nearly tied in Hugging Face's own logits"]


@dataclass(frozen=True)
class Checked:
    """`tyir-verify --json`: the comparison with Hugging Face in fp32 on the same weights; the exit code is 1
    unless `ok`.
    """

    ok: Annotated[bool, "every cosine is at least 0.9999 and no token differs"]
    min_logit_cosine: Annotated[float, "over all prompts"]
    max_logit_error: Annotated[float, "over all prompts"]
    tokens: Annotated[int, "over all prompts"]
    differing: Annotated[int, "over all prompts"]
    ties: Annotated[int, "over all prompts"]
    layer_cosine: Annotated[tuple[float, ...], "smallest cosine of the hidden state after each layer"]
    prompts: Annotated[tuple[PromptChecked, ...], "in order"]
    first_divergence: Annotated[str | None, "the first op that is off, unless ok"]


@dataclass(frozen=True)
class Reduced:
    """`tyir-reduce -o FILE --json`: the smaller file."""

    output: Annotated[str, "the file that holds it"]
    ops_before: Annotated[int, "ops of the input"]
    ops: Annotated[int, "ops of what was written"]
    runs: Annotated[int, "times the command ran; 0 for --cut"]


# Command -> its forms, those of nested values included, and where the form is declared otherwise.
FORMS: dict[str, tuple[type[Any], ...]] = {
    "tyir-import": (Imported, Planned, PlannedDie),
    "tyir-compile": (Artifacts, Stage, Planned, PlannedDie),
    "tyir-run": (Ran, Prompt),
    "tyir-verify": (Checked, PromptChecked),
    "tyir-reduce": (Reduced,),
}

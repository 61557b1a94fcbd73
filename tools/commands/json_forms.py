"""What the commands print with `--json`: one form each; docs/json.md is written from these classes.

    print_json(Imported(output="model.ir", architecture="LlamaForCausalLM", ...))

A form only grows: fields are added, never renamed.  What another package declares as data (`tyir-sim`'s
summary, vLLM's serving figures) is printed as it is declared there.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

__all__ = [
    "FORMS",
    "Artifacts",
    "Checked",
    "DialectEntry",
    "DialectList",
    "Doctor",
    "Imported",
    "Measured",
    "OpEntry",
    "PassEntry",
    "PassList",
    "PassOption",
    "PassTimes",
    "Planned",
    "PlannedDie",
    "PlannedLength",
    "PlannedOnCards",
    "PlannedPrompt",
    "Prompt",
    "PromptChecked",
    "Quantized",
    "QuantizedLinear",
    "Ran",
    "Reduced",
    "Serving",
    "Stage",
    "Trouble",
    "Waiting",
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
class Measured:
    """`tyir-quantize MODEL --evaluate TEXT --json`: a perplexity."""

    perplexity: Annotated[float, "exp of the mean negative log-likelihood of a token"]
    tokens: Annotated[int, "that were predicted"]
    window: Annotated[int, "tokens of a window; the first of each is not predicted"]


@dataclass(frozen=True)
class QuantizedLinear:
    """What was chosen for one linear."""

    layer: Annotated[int, "the decoder layer"]
    path: Annotated[str, "the module's path"]
    ratio: Annotated[float | None, "its input's scale is activations^ratio; null: none"]
    duo: Annotated[bool, "that over weights^(1 - ratio)"]
    kept_range: Annotated[float, "part of the widest ranges that is kept, on average"]
    error_before: Annotated[float, "squared error of its output over the output's square, rounded to nearest"]
    error_after: Annotated[float, "the same, as chosen"]


@dataclass(frozen=True)
class Quantized:
    """`tyir-quantize MODEL -o OUT --json`, and report.json of `--report`: the checkpoint that was written."""

    output: Annotated[str, "the folder"]
    settings: Annotated[dict[str, Any], "method, bits, group_size and all other options"]
    linears: Annotated[tuple[QuantizedLinear, ...], "layer by layer; empty for rtn, which searches nothing"]
    before: Annotated[Measured | None, "of the model, with --evaluate"]
    after: Annotated[Measured | None, "of what was written, with --evaluate"]


@dataclass(frozen=True)
class Stage:
    """One stage of a compile."""

    name: Annotated[str, "import, passes, weights, edge10 s1 die0, host code s1 die0, .., manifest"]
    seconds: Annotated[float, "wall time"]
    peak_mib: Annotated[float | None, "highest resident memory meanwhile, MiB; null where it is not known"]
    cpu_seconds: Annotated[float, "processor time of the thread that it ran in"]


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
class PlannedLength:
    """How long a cache can be on other dies, with the other options the same."""

    dies: Annotated[int, "of the board"]
    stages: Annotated[int, "that they are cut into (--pp)"]
    tokens: Annotated[int, "of each sequence; 0: the weights alone do not fit"]
    kv_split: Annotated[str, "what such a cache is cut by: heads or tokens"]


@dataclass(frozen=True)
class PlannedPrompt:
    """What a prompt that fills the cache takes on the device, simulated, the host's constant in it."""

    tokens: Annotated[int, "of the prompt"]
    steps: Annotated[int, "that it takes"]
    prefill_s: Annotated[float, "seconds until its end"]
    token_s: Annotated[float, "seconds of a token after it"]
    overlapped_s: Annotated[float | None, "as prefill_s, if stages worked on several chunks at a time"]


@dataclass(frozen=True)
class PlannedOnCards:
    """A token with the dies on several cards, simulated at the cache's last position."""

    stages: Annotated[int, "pipeline stages: one, or one a card"]
    largest_bytes: Annotated[int, "of the die that holds most"]
    token_s: Annotated[float, "seconds, the host's part with them"]
    links_s: Annotated[float, "of them for what passes between the cards"]
    bound_by: Annotated[str, "unit of the device that is busiest"]


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
    longest: Annotated[tuple[PlannedLength, ...], "tokens that fit; only for caches of more than 32768"] = ()
    prompt: Annotated[
        PlannedPrompt | None, "what filling such a cache takes; null: it is short, or too large"
    ] = None
    on_cards: Annotated[tuple[PlannedOnCards, ...], "with --cluster: on several cards"] = ()


@dataclass(frozen=True)
class Prompt:
    """One prompt, of a chat the whole text of a turn, and what was made of it."""

    prompt: Annotated[str | None, "as given; null where ids were given"]
    prompt_tokens: Annotated[int, "its tokens"]
    reused_tokens: Annotated[int, "of them that the cache held: of --cache, or of the turns before"]
    tokens: Annotated[tuple[int, ...], "that were generated"]
    text: Annotated[str | None, "that they stand for; null where there is no tokenizer"]
    ended: Annotated[str, "why: a stop token, --max-tokens, a full cache, Ctrl-C"]
    pictures: Annotated[int, "shown with it"] = 0
    seconds: Annotated[
        Mapping[str, float], "until the first token by what took them, where pictures are shown"
    ] = field(default_factory=dict)


@dataclass(frozen=True)
class Ran:
    """`tyir-run --json`, `tyir-chat --json`: what was generated; nothing is streamed then."""

    artifacts: Annotated[str, "the folder"]
    engine: Annotated[str, "host, interpreter or edge10"]
    prompts: Annotated[tuple[Prompt, ...], "in order"]
    load_seconds: Annotated[
        float, "until the first prompt could begin: libraries, hashes, weights, tokenizer"
    ]
    first_token_seconds: Annotated[float | None, "from there to the first token; null for a batch"]
    tokens_per_second: Annotated[float, "of this machine, not the device; of all prompts together"]


@dataclass(frozen=True)
class Serving:
    """`tyir-serve --json`: printed when it listens; `/health` says when it is ready."""

    artifacts: Annotated[str, "the folder"]
    url: Annotated[str, "where it serves"]
    models: Annotated[tuple[str, ...], "names of the model; the first is answered with"]
    slots: Annotated[int, "requests that are answered at once"]
    max_model_len: Annotated[int, "tokens of a prompt and its answer"]
    max_queue: Annotated[int, "requests that may wait"]


@dataclass(frozen=True)
class Waiting:
    """`tyir-rank --json`: printed when it listens."""

    host: Annotated[str, "the address it listens on"]
    port: Annotated[int, "the port"]
    folders: Annotated[tuple[str, ...], "where it looks for artifacts"]


@dataclass(frozen=True)
class PromptChecked:
    """The comparison of one prompt."""

    prompt_tokens: Annotated[int, "its tokens"]
    positions: Annotated[int, "whose logits were compared"]
    min_logit_cosine: Annotated[float, "the smallest of them"]
    logit_size: Annotated[float, "the logits' norm, of Hugging Face's"]
    max_logit_error: Annotated[float, "the largest absolute difference of a logit"]
    tokens: Annotated[int, "greedy tokens compared"]
    differing: Annotated[int, "of them not Hugging Face's"]
    ties: Annotated[int, "of them nearly tied in Hugging Face's own logits"]


@dataclass(frozen=True)
class TowerRowsChecked:
    """Rows of a tower's state after one block, or of what leaves it."""

    name: Annotated[str, "of the block"]
    min_cosine: Annotated[float, "of a row with Hugging Face's"]
    max: Annotated[float, "the largest absolute value"]
    not_finite: Annotated[int, "rows with a value that is not finite"]


@dataclass(frozen=True)
class PictureChecked:
    """The comparison of one picture."""

    picture: Annotated[str, "its name"]
    relative_error: Annotated[float, "of the embeddings, in their mean"]
    rows: Annotated[tuple[TowerRowsChecked, ...], "block by block"]


@dataclass(frozen=True)
class Checked:
    """`tyir-verify --json`: the comparison with Hugging Face in fp32 on the same weights; the exit code is 1
    unless `ok`.
    """

    ok: Annotated[
        bool,
        "every cosine is at least 0.9999, sizes are within 1 %, and no token differs; with a 4-bit cache 0.97"
        " and 5 %",
    ]
    min_logit_cosine: Annotated[float, "over all prompts"]
    logit_size: Annotated[float, "the farthest from 1 of all prompts"]
    max_logit_error: Annotated[float, "over all prompts"]
    tokens: Annotated[int, "over all prompts"]
    differing: Annotated[int, "over all prompts"]
    ties: Annotated[int, "over all prompts"]
    layer_cosine: Annotated[tuple[float, ...], "smallest cosine of the hidden state after each layer"]
    prompts: Annotated[tuple[PromptChecked, ...], "in order"]
    first_divergence: Annotated[str | None, "the first op that is off, unless ok"]
    pictures: Annotated[tuple[PictureChecked, ...], "of a vision-language model, in order"] = ()


@dataclass(frozen=True)
class Reduced:
    """`tyir-reduce -o FILE --json`: the smaller file."""

    output: Annotated[str, "the file that holds it"]
    ops_before: Annotated[int, "ops of the input"]
    ops: Annotated[int, "ops of what was written"]
    runs: Annotated[int, "times the command ran; 0 for --cut"]


@dataclass(frozen=True)
class PassOption:
    """An option of a pass."""

    name: Annotated[str, "as one writes it"]
    kind: Annotated[str, "of its value"]
    default: Annotated[str, "its value unless given"]


@dataclass(frozen=True)
class PassEntry:
    """A pass."""

    name: Annotated[str, "as one writes it"]
    summary: Annotated[str, "the first line of its docstring"]
    anchor: Annotated[str, "the kind of op it runs on"]
    options: Annotated[tuple[PassOption, ...], "in order"]


@dataclass(frozen=True)
class PassList:
    """`tyir-opt --list-passes --json`: every pass, those of `--load-pass` included."""

    passes: Annotated[tuple[PassEntry, ...], "by name"]
    pipelines: Annotated[dict[str, str], "named pipelines: name -> text"]


@dataclass(frozen=True)
class OpEntry:
    """An op."""

    name: Annotated[str, "with its dialect"]
    summary: Annotated[str, "the first line of its docstring"]


@dataclass(frozen=True)
class DialectEntry:
    """A dialect."""

    name: Annotated[str, "its name"]
    ops: Annotated[tuple[OpEntry, ...], "by name"]


@dataclass(frozen=True)
class DialectList:
    """`tyir-opt --show-dialects --json`: every dialect, those of `--load-dialect` included."""

    dialects: Annotated[tuple[DialectEntry, ...], "by name"]


@dataclass(frozen=True)
class PassTimes:
    """`tyir-opt --timing --json`, as `timing` on standard error: the IR has standard output."""

    stages: Annotated[tuple[Stage, ...], "one per pass"]
    seconds: Annotated[float, "of all"]
    peak_mib: Annotated[float | None, "the highest of them"]


@dataclass(frozen=True)
class Trouble:
    """Something that is in the way."""

    what: Annotated[str, "what is wrong"]
    cure: Annotated[str, "what to do"]
    fatal: Annotated[bool, "whether compiling cannot work; then the exit code is 1"]


@dataclass(frozen=True)
class Doctor:
    """`tyir-doctor --json`: what commands run with here."""

    tyir: Annotated[str | None, "version"]
    python: Annotated[str, "version"]
    executable: Annotated[str, "the interpreter"]
    system: Annotated[str, "operating system and its version"]
    libraries: Annotated[dict[str, str | None], "versions; null: not installed"]
    compiler: Annotated[str | None, "what links host libraries, and its version"]
    processor: Annotated[str, "its name"]
    features: Annotated[tuple[str, ...], "those that host code is made faster by, as Linux calls them"]
    processors: Annotated[int, "of the machine"]
    usable_processors: Annotated[int | None, "of this process (affinity)"]
    processor_limit: Annotated[float | None, "of the control group (containers)"]
    memory_bytes: Annotated[int | None, "of the machine"]
    memory_available_bytes: Annotated[int | None, "not in use"]
    memory_limit_bytes: Annotated[int | None, "of the control group"]
    cwd_free_bytes: Annotated[int | None, "on the disk of the current folder"]
    tmp: Annotated[str, "where temporary files go"]
    tmp_free_bytes: Annotated[int | None, "on its disk"]
    stdout_is_terminal: Annotated[bool, "whether standard output is one"]
    encoding: Annotated[str, "of names of files"]
    locale: Annotated[str, "as the environment says it; empty: not set"]
    troubles: Annotated[tuple[Trouble, ...], "what is in the way"]


# Command -> its forms, those of nested values included, and where the form is declared otherwise.
FORMS: dict[str, tuple[type[Any], ...]] = {
    "tyir-import": (Imported, Planned, PlannedDie, PlannedLength, PlannedPrompt),
    "tyir-opt": (PassList, PassEntry, PassOption, DialectList, DialectEntry, OpEntry, PassTimes),
    "tyir-quantize": (Quantized, QuantizedLinear, Measured),
    "tyir-compile": (Artifacts, Stage, Planned, PlannedDie, PlannedLength, PlannedPrompt),
    "tyir-run": (Ran, Prompt),
    "tyir-chat": (Ran, Prompt),
    "tyir-serve": (Serving,),
    "tyir-rank": (Waiting,),
    "tyir-verify": (Checked, PromptChecked),
    "tyir-reduce": (Reduced,),
    "tyir-doctor": (Doctor, Trouble),
}

"""What artifacts need beside a checkpoint's weights and the checkpoint folder does not hold as files of its
own: config.json and the tokenizer inside a GGUF file, tokenizer.json for a lone tokenizer.model.

transformers rebuilds and writes them; it is imported inside the functions.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tyir.diagnostics import Diagnostic
from tyir.frontends.vision.llava import in_own_format, llava_side_files

__all__ = ["side_files"]

Note = Callable[[Diagnostic], None]
_TOKENIZERS: Final = ("tokenizer.json", "tokenizer.model", "vocab.json")  # what transformers opens
_SPM: Final = "tokenizer.model"
# Names of `tokenizer.ggml.pre` under which text is split as GPT-2 does, which is the converter's default.
_LIKE_GPT2: Final = ("", "default", "gpt-2", "gpt2", "phi-2", "olmo", "jais", "mpt")


def side_files(folder: Path, names: Iterable[str], note: Note) -> dict[str, bytes]:
    """Files to lie beside artifacts, by name, of the model whose weights are in files `names` of `folder`.

    What lies in the folder already is not among them, but for a config.json in LLaVA's own format.  What
    cannot be made is noted: such artifacts compute, but do not take text.
    """
    names = list(names)
    gguf = sorted(name for name in names if name.endswith(".gguf"))
    has_tokenizer = any((folder / name).is_file() for name in _TOKENIZERS)
    made: dict[str, bytes] = {}
    try:
        if gguf and not (folder / "config.json").exists():
            made["config.json"] = _gguf_config([folder / name for name in gguf])
        if gguf and not has_tokenizer:
            made.update(_gguf_tokenizer(folder / gguf[0], note))
        elif (folder / _SPM).is_file() and not (folder / "tokenizer.json").exists():
            made.update(_from_sentencepiece(folder, note))
    except Exception as error:  # whatever a tokenizer's own code stumbles over
        text = next(iter(str(error).splitlines()), "") or type(error).__name__
        message = f"no tokenizer can be made of {gguf[0] if gguf else _SPM}: {text}"
        note(Diagnostic(message, severity="warning", where=str(folder), help=_COPY))
    made = {name: content for name, content in made.items() if not (folder / name).exists()}
    return {**made, **llava_side_files(folder, names)} if in_own_format(folder) else made


_COPY: Final = "put the original model's tokenizer.json beside the checkpoint"


def _gguf_config(files: Sequence[Path]) -> bytes:
    from tyir.frontends.gguf.files import read_gguf

    return json.dumps(read_gguf(files)[0], indent=2).encode()


def _gguf_tokenizer(path: Path, note: Note) -> dict[str, bytes]:
    """The tokenizer and chat template that a GGUF file carries; none when it carries none."""
    from tyir.frontends.gguf.files import open_gguf

    fields = open_gguf(path).fields
    if "tokenizer.ggml.tokens" not in fields:
        message = f"{path.name} carries no tokenizer"
        note(Diagnostic(message, severity="warning", where=str(path), help=_COPY))
        return {}
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    architecture, content, settings = get_gguf_tokenizer(str(path))
    if (problem := _contradiction(content)) is not None:
        raise ValueError(problem)
    kind, split = content.get("tokenizer_type"), content.get("pre_tokenizer_type", "")
    if kind == "gpt2":
        content["merges"] = _possible(content.get("merges", ()), content["tokens"])
        if split not in GGUF_PRE_TOKENIZER_SPLITS and split not in _LIKE_GPT2:
            message = f"{path.name} splits text as '{split}', which is not known; it is split as GPT-2 does"
            note(Diagnostic(message, severity="warning", where=str(path), help=_COPY))
    backend, more = convert_gguf_tokenizer(architecture, content)
    return _saved(PreTrainedTokenizerFast(tokenizer_object=backend, **settings, **more))


def _contradiction(content: Mapping[str, Any]) -> str | None:
    """What of a file's tokenizer cannot be whole: transformers makes one that splits text in another way."""
    tokens = content["tokens"]
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        return "its tokens are no list of texts"
    if len(set(tokens)) < len(tokens):
        return f"{len(tokens) - len(set(tokens))} of its {len(tokens)} tokens are there more than once"
    for name in ("scores", "token_type"):
        found = content.get(name)
        if isinstance(found, list) and len(found) != len(tokens):
            return f"it has {len(tokens)} tokens and {len(found)} {name}"
    if content.get("tokenizer_type") == "gpt2" and not content.get("merges"):
        return "it has no merges"
    return None


def _possible(merges: Iterable[str], tokens: Iterable[str]) -> list[str]:
    """The merges whose parts and result are tokens; others can never apply, and the library refuses them."""
    known = set(tokens)
    split = ((merge, *merge.partition(" ")[::2]) for merge in merges)
    return [merge for merge, a, b in split if a in known and b in known and a + b in known]


def _from_sentencepiece(folder: Path, note: Note) -> dict[str, bytes]:
    """tokenizer.json of a lone tokenizer.model: artifacts then run where sentencepiece is not installed."""
    absent = [name for name in ("sentencepiece", "google.protobuf") if not _installed(name)]
    if absent:
        message = f"the only tokenizer is {_SPM}, which cannot be read without {' and '.join(absent)}"
        help = f"pip install 'tyir[sentencepiece]', or {_COPY}"
        note(Diagnostic(message, severity="warning", where=str(folder), help=help))
        return {}
    from transformers import AutoTokenizer

    return _saved(AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True))


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _saved(tokenizer: Any) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer.save_pretrained(temporary)
        return {path.name: path.read_bytes() for path in Path(temporary).iterdir() if path.is_file()}

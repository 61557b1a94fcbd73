"""The tokenizer of an artifact folder or a checkpoint, from its data alone: no code in the folder runs.

transformers reads a private copy of the tokenizer's files, in which `auto_map` (code of the checkpoint's own)
and names of other files are left out, with `trust_remote_code=False` and without a network.  A tokenizer
whose class is such code is still read when a tokenizer.json says what it does.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from tyir.diagnostics import TyirError
from tyir.execution.artifacts import Artifacts
from tyir.execution.opened import OpenedFolder
from tyir.process.beside import Beside, Lost, possible
from tyir.process.extras import is_command, require, torch_hidden
from tyir.process.import_structure import import_structure_kept
from tyir.text.json_files import json_object, utf8_text
from tyir.tools.run.tokenizer_limits import MAX_BYTES, tokenizer_problem

__all__ = ["files_of", "load_tokenizer", "tokenizing", "without_models"]

_WHOLE: Final = "tokenizer.json"
_VOCABULARIES: Final = (_WHOLE, "tokenizer.model", "vocab.json")
_DATA: Final = (*_VOCABULARIES, "merges.txt", "chat_template.jinja")
_TEXTS: Final = (_WHOLE, "vocab.json", "merges.txt", "chat_template.jinja")
_SETTINGS: Final = ("tokenizer_config.json", "config.json", "special_tokens_map.json", "added_tokens.json")
_SPECIAL: Final = frozenset(
    f"{kind}_token" for kind in ("bos", "eos", "unk", "pad", "sep", "cls", "mask", "eot")
)
_TOKENIZER_SETTINGS: Final = _SETTINGS[0]
_LARGE: Final = 1 << 20  # bytes of a tokenizer.json that a process beside this one is worth
_NO_HELP: Final = "save the tokenizer as tokenizer.json (save_pretrained of a fast tokenizer writes one)"

Find = Callable[[str], bytes | None]


def load_tokenizer(source: Artifacts | str | Path) -> Any:
    """The tokenizer saved with the artifacts or the checkpoint.

    `TyirError` when there is none, it is damaged, or it is code.  Nothing is ever asked on standard input.
    """
    path, find = files_of(source)
    found = {name: data for name in (*_DATA, *_SETTINGS) if (data := find(name)) is not None}
    for name in found.keys() & set(_TEXTS):
        utf8_text(found[name], path / name, "restore the file of the original model")
    if not any(name in found for name in _VOCABULARIES):
        raise TyirError(
            f"{path} holds no tokenizer",
            help="copy the model's tokenizer.json there, or compile from a folder that has one; --ids N,N,.."
            " takes token ids",
        )
    settings = {
        name: json_object(found[name], path / name, "restore the file") for name in _SETTINGS if name in found
    }
    for name, content in settings.items():
        _check_special(content, path / name)
    code = _code_of(settings.get(_TOKENIZER_SETTINGS, {}))
    if code is not None and _WHOLE not in found:
        raise TyirError(
            f"the tokenizer of {path} is code of its own ({code}), which is not executed", help=_NO_HELP
        )
    with _problem_of(found.get(_WHOLE)) as problem:
        classes = _classes()
        if (whole := problem()) is not None:
            raise TyirError(f"{path / _WHOLE} cannot be used: {whole}", help=_NO_HELP)
    try:
        with tempfile.TemporaryDirectory(prefix="tyir-tokenizer-") as copy:
            for name, data in found.items():
                data = json.dumps(_data_only(settings[name])).encode() if name in settings else data
                (Path(copy) / name).write_bytes(data)
            # a class that transformers does not have: tokenizer.json says all that it does
            return _read(classes if _WHOLE in found else classes[:1], Path(copy), path)
    except OSError as error:
        raise TyirError(
            f"cannot copy the tokenizer to {tempfile.gettempdir()}: {error.strerror or error}",
            help="set TMPDIR to a folder that can be written",
        ) from None


@contextmanager
def _problem_of(whole: bytes | None) -> Iterator[Callable[[], str | None]]:
    """What tells whether a tokenizer.json asks too much (`tokenizer_problem`); that of a large one, 0.1 s, is
    found beside what is done inside this context where the process can be copied.
    """
    if whole is None:
        yield lambda: None
        return
    with ExitStack() as stack:
        beside = None
        if len(whole) >= _LARGE and possible():
            with suppress(OSError):
                beside = stack.enter_context(Beside.start(lambda: tokenizer_problem(whole)))

        def problem() -> str | None:
            if beside is not None:
                with suppress(Lost):
                    return beside.result()
            return tokenizer_problem(whole)

        yield problem


def _classes() -> Sequence[Any]:
    """What reads a tokenizer: by the class that its settings name, then by tokenizer.json alone."""
    require("reading a tokenizer", "transformers", extra="serve")
    with import_structure_kept():
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

    return AutoTokenizer, PreTrainedTokenizerFast


def _read(classes: Sequence[Any], copy: Path, path: Path) -> Any:
    reason = ""
    for each in classes:
        try:
            with tokenizing(f"cannot read the tokenizer of {path}"):
                tokenizer = each.from_pretrained(copy, trust_remote_code=False, local_files_only=True)
                tokenizer("")["input_ids"]
                return tokenizer
        except TyirError as error:
            reason = reason or error.diagnostics[0].message.replace(str(copy), str(path))
    raise TyirError(reason, help=_NO_HELP)


@contextmanager
def without_models() -> Iterator[None]:
    """Inside this context, in the process of a command, transformers is loaded without its models, for which
    it would load torch.

    That takes two seconds.  The models stay away as long as the process lasts.
    """
    if not is_command():
        yield
        return
    quiet = "TRANSFORMERS_NO_ADVISORY_WARNINGS"  # it says on the terminal that there are none
    before = os.environ.get(quiet)
    os.environ[quiet] = "1"
    try:
        with torch_hidden():
            yield
    finally:
        del os.environ[quiet]
        if before is not None:
            os.environ[quiet] = before


@contextmanager
def tokenizing(what: str) -> Iterator[None]:
    """`TyirError` that transformers `what` ("cannot read .."), for whatever a tokenizer's data leads its
    library to: exceptions of all kinds, and panics, which are none.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        line = (str(error).splitlines() or [""])[0][:200]
        raise TyirError(f"transformers {what}: {type(error).__name__}: {line}", help=_NO_HELP) from None


def files_of(source: Artifacts | str | Path) -> tuple[Path, Find]:
    """What the folder is called, and what its files hold."""
    try:
        folder = source if isinstance(source, Artifacts) else OpenedFolder(Path(source))
    except OSError as error:
        raise TyirError(f"cannot read {source}: {error.strerror}") from None

    def find(name: str) -> bytes | None:
        file = folder.find(name)
        if file is not None and file.size > MAX_BYTES:
            message = f"{file.path} has {file.size} bytes, more than the {MAX_BYTES} such a file may have"
            raise TyirError(message, help="restore the file of the original model")
        return file.read() if file is not None else None

    return folder.path, find


def _code_of(settings: dict[str, Any]) -> str | None:
    """The class that `auto_map` names for the tokenizer, in `module.Class` or a list of two."""
    named = settings.get("auto_map")
    named = named.get("AutoTokenizer") if isinstance(named, dict) else named
    classes = [c for c in (named if isinstance(named, list) else [named]) if isinstance(c, str)]
    return classes[0] if classes else None


def _check_special(settings: dict[str, Any], path: Path) -> None:
    """Special tokens that are objects become what transformers writes itself, with `__type`; `TyirError` for
    one without a text.
    """
    for key, value in settings.items():
        if not isinstance(value, dict) or key not in _SPECIAL:
            continue
        if not isinstance(value.get("content"), str):
            raise TyirError(
                f"'{key}' of {path.name} is {json.dumps(value)[:200]}: a text, or an object with it as"
                " `content`, is needed",
                where=str(path),
                help="restore the file of the original model",
            )
        value.setdefault("__type", "AddedToken")


def _data_only(value: Any) -> Any:
    """Settings without names of code and of other files, at any depth."""
    if isinstance(value, dict):
        return {k: _data_only(v) for k, v in value.items() if k != "auto_map" and not _names_files(k)}
    return [_data_only(v) for v in value] if isinstance(value, list) else value


def _names_files(key: str) -> bool:
    return key.endswith(("_file", "_files")) or key in ("name_or_path", "_name_or_path", "cache_dir")

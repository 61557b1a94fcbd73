"""A tokenizer is read from its data: no code of its folder runs, nothing is asked on standard input."""

from __future__ import annotations

import ast
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tyir.diagnostics import TyirError
from tyir.tools.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "tests" / "models" / "tiny-qwen2"
TEXT = "The old house stood"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tokenizer beside modules that leave a mark when they are imported."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(MODEL / name, tmp_path / name)
    for name in ("evil", "tokenization_evil", "json", "torch", "tokenizers", "sitecustomize", "conftest"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'MARK')!r}, 'w')\nclass Tok: pass\n")
    return tmp_path


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Standard input that would say yes to everything; the end to read what is left of it."""
    reading, writing = os.pipe()
    os.write(writing, b"y\n" * 100)
    os.close(writing)
    with os.fdopen(reading) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        yield reading


def change(path: Path, **changes: Any) -> None:
    settings = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))


CODE = {"AutoConfig": "evil.Cfg", "AutoTokenizer": [None, "evil.Tok"]}
TOKENIZERS: dict[str, dict[str, Any]] = {
    "auto_map": {"auto_map": CODE, "tokenizer_class": "Tok"},
    "auto_map without a class": {"auto_map": CODE, "tokenizer_class": None},
    "auto_map of a known class": {"auto_map": CODE, "tokenizer_class": "Qwen2Tokenizer"},
    "slow and fast code": {"auto_map": {"AutoTokenizer": ["evil.Tok", "evil.Tok"]}},
    "old form": {"auto_map": ["evil.Tok", None], "tokenizer_class": "Tok"},
    "a string": {"auto_map": {"AutoTokenizer": "evil.Tok"}, "tokenizer_class": "Tok"},
    "another repository": {"auto_map": {"AutoTokenizer": ["someone/evil--evil.Tok", None]}},
    "auto_map within": {"extra": {"auto_map": CODE, "deep": [{"auto_map": CODE}]}},
    "class that is a number": {"tokenizer_class": 3},
    "class path": {"tokenizer_class": "evil.Tok"},
    "class of os": {"tokenizer_class": "os.system"},
    "files elsewhere": {"tokenizer_file": "/etc/passwd", "vocab_file": "/etc/shadow"},
    "list of files elsewhere": {"fast_tokenizer_files": ["tokenizer.99.0.0.json", "../../x"]},
    "name of a repository": {"name_or_path": "someone/evil", "_commit_hash": "0" * 40},
    "template that runs": {"chat_template": "{{ ''.__class__.__mro__[1].__subclasses__() }}"},
}  # fmt: skip


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("model_type", ["qwen2", "evilmodel", None])
def test_tokenizer_json_is_used(folder: Path, answers: int, name: str, model_type: str | None) -> None:
    """Whatever stands beside it, of whatever type the model says it is."""
    wanted = load_tokenizer(MODEL)(TEXT)["input_ids"]
    change(folder / "tokenizer_config.json", **TOKENIZERS[name])
    change(folder / "config.json", model_type=model_type, auto_map=CODE, tokenizer_class="Tok")
    here = os.getcwd()
    os.chdir(folder)
    try:
        assert load_tokenizer(Path())(TEXT)["input_ids"] == wanted
    finally:
        os.chdir(here)
    assert not (folder / "MARK").exists()
    assert os.read(answers, 1000) == b"y\n" * 100, "nothing was asked"


@pytest.mark.parametrize("name", [n for n in TOKENIZERS if "auto_map" in TOKENIZERS[n]])
def test_a_tokenizer_that_is_only_code_is_refused(folder: Path, answers: int, name: str) -> None:
    change(folder / "tokenizer_config.json", **TOKENIZERS[name])
    (folder / "tokenizer.json").rename(folder / "vocab.json")
    with pytest.raises(TyirError, match=r"is code of its own \(.*evil\.Tok\), which is not executed"):
        load_tokenizer(folder)
    assert not (folder / "MARK").exists() and os.read(answers, 1000) == b"y\n" * 100


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", '{"auto_map": '),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", "[" * 100_000),
        ("config.json", "\ufeff{"),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": 3}}'),
        ("tokenizer.json", ""),
        ("tokenizer_config.json", '{"added_tokens_decoder": 3}'),
        ("special_tokens_map.json", "7"),
    ],
)
def test_damaged_files_are_named(folder: Path, answers: int, file: str, content: str) -> None:
    """Refused by the name of the folder: never an internal error or a question."""
    (folder / file).write_text(content, encoding="utf-8")
    with pytest.raises(TyirError, match=str(folder)):
        load_tokenizer(folder)
    assert os.read(answers, 1000) == b"y\n" * 100


def test_a_folder_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    with pytest.raises(TyirError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    os.mkfifo(tmp_path / "tokenizer.json")  # opening it would wait for ever
    with pytest.raises(TyirError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(TyirError, match="cannot read"):
        load_tokenizer(tmp_path / "nowhere")


def test_every_call_of_transformers_refuses_code() -> None:
    """`from_pretrained` and `Auto..from_config` with `trust_remote_code=False`, in all packages."""
    found = []
    for package in ("tyir", "passes", "frontends", "backends", "runtime_sim", "tools"):
        for file in (ROOT / package).rglob("*.py"):
            text = file.read_text(encoding="utf-8")
            for node in ast.walk(
                ast.parse(text if "from_pretrained" in text or "from_config" in text else "")
            ):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                    auto = ast.unparse(node.func.value).rpartition(".")[2].startswith("Auto")
                    if node.func.attr == "from_pretrained" or (auto and node.func.attr == "from_config"):
                        given = {k.arg: ast.unparse(k.value) for k in node.keywords}
                        found.append((file.name, node.lineno, given.get("trust_remote_code")))
    assert len(found) >= 5
    assert [f for f in found if f[2] != "False"] == []

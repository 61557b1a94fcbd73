"""A tokenizer is read from its data: no code of its folder runs, nothing is asked on standard input."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tyir.diagnostics import TyirError
from tyir.tools.run.prompts import token_ids
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


# -------------------------------------------------------------------------- what a file may ask of its reader


def replace(part: str, pattern: str, content: str, count: int = 1) -> dict[str, Any]:
    step = {"type": "Replace", "pattern": {"String": pattern}, "content": content}
    return {part: {"type": "Sequence", f"{part}s": [step] * count}}


def template(steps: int) -> dict[str, Any]:
    piece = {"SpecialToken": {"id": "x", "type_id": 0}}
    special = {"x": {"id": "x", "ids": [0], "tokens": ["x"]}}
    whole = [{"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*whole, {"Sequence": {"id": "B", "type_id": 1}}]
    return {
        "type": "TemplateProcessing",
        "single": [piece] * steps + whole,
        "pair": pair,
        "special_tokens": special,
    }


ASKS_TOO_MUCH: dict[str, tuple[dict[str, Any], str]] = {
    "doubles": (replace("normalizer", "e", "ee", 40), "its normalizer makes 1099511627776 characters"),
    "doubles when decoded": (replace("decoder", "e", "ee", 7), "its decoder makes 128 characters of one"),
    "a long replacement": (replace("normalizer", "e", "b" * 65), "its normalizer makes 65"),
    "a long replacement of a pattern": (
        {"normalizer": {"type": "Replace", "pattern": {"Regex": ".{9}"}, "content": "b" * 70}},
        "its normalizer makes 71",
    ),
    "a long beginning": (
        {"normalizer": {"type": "Prepend", "prepend": "b" * 100}},
        "its normalizer makes 101",
    ),
    "long texts of a table": (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAAAAA" + "YWJj" * 100}},
        "its normalizer makes ",
    ),
    "a long template": ({"post_processor": template(1000)}, "its post_processor has 1004 steps"),
    "added tokens": ({"added_tokens": [{"id": i} for i in range(20_001)]}, "it has 20001 added tokens"),
    "a vocabulary": (
        {"model": {"vocab": dict.fromkeys(map(str, range((1 << 20) + 1)), 0)}},
        "it has 1048577 tokens",
    ),
    "deep lists": ({"version": "DEEP"}, "nested too deeply"),
}  # fmt: skip


@pytest.mark.parametrize("name", ASKS_TOO_MUCH)
def test_a_tokenizer_that_asks_too_much_is_refused(folder: Path, name: str) -> None:
    changes, said = ASKS_TOO_MUCH[name]
    change(folder / "tokenizer.json", **changes)
    text = (folder / "tokenizer.json").read_text().replace('"DEEP"', "[" * 9999 + "]" * 9999)
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(TyirError, match=said):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    "changes",
    [
        replace("normalizer", "e", "ee", 6),
        {"normalizer": {"type": "Prepend", "prepend": "▁"}},
        replace("decoder", "aaaa", "b" * 8, 5),
        {"post_processor": template(3)},
    ],
)  # fmt: skip
def test_a_tokenizer_that_asks_little_is_read(folder: Path, changes: dict[str, Any]) -> None:
    change(folder / "tokenizer.json", **changes)
    assert load_tokenizer(folder)(TEXT)["input_ids"]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model"])
def test_files_of_a_tokenizer_are_of_a_size(folder: Path, name: str) -> None:
    with (folder / name).open("ab") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(TyirError, match=rf"{name} has 67108865 bytes, more than"):
        load_tokenizer(folder)


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|aa)+$", "(aa|a)+$"])
def test_a_panic_is_an_error_of_the_tokenizer(folder: Path, pattern: str) -> None:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    change(folder / "tokenizer.json", pre_tokenizer=split)
    (folder / "config.json").unlink()  # whose family has a class that splits in its own way
    with pytest.raises(TyirError, match="transformers cannot tokenize the prompt: PanicException"):
        token_ids(load_tokenizer(folder), "a" * 5000 + "!")


@pytest.mark.parametrize(("capacity", "fits"), [(10, False), (30_000, False), (40_000, True), (None, True)])
def test_a_prompt_far_too_long_is_not_tokenized_whole(folder: Path, capacity: int | None, fits: bool) -> None:
    """Of 100,000 characters the first 65,536 make 65,536 tokens here."""
    change(folder / "tokenizer.json", model={"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []})
    tokenizer = load_tokenizer(folder)
    if fits:
        assert len(token_ids(tokenizer, "ab" * 50_000, capacity)) == 100_000
        return
    with pytest.raises(TyirError, match="65536 of its 100000 characters make 65536 tokens"):
        token_ids(tokenizer, "ab" * 50_000, capacity)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "[655, 636, 785, 1192]"),
        (replace(part="normalizer", pattern="a", content="a" * 100), "its normalizer makes"),
    ],
)
def test_a_large_tokenizer_is_checked_beside_the_import(
    folder: Path, changes: dict[str, Any], said: str
) -> None:
    """In a process that can be copied, which this one cannot; what is found is the same."""
    for name in ("tokenizers.py", "torch.py", "json.py"):
        (folder / name).unlink()
    change(folder / "tokenizer.json", **changes)
    with (folder / "tokenizer.json").open("a") as file:
        file.write(" " * (2 << 20))
    program = """
from tyir.diagnostics import TyirError
from tyir.process import beside, extras
from tyir.tools import tokenizer
extras.begin_command()
began = []
start = beside.Beside.start
beside.Beside.start = classmethod(lambda cls, make: began.append(make) or start(make))
try:
    with tokenizer.without_models():
        print(tokenizer.load_tokenizer(".")("The old house stood")["input_ids"])
except TyirError as error:
    print(error)
assert len(began) == 1
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], cwd=folder, capture_output=True, text=True, check=True
    )
    assert said in done.stdout

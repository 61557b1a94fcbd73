"""From prompt to text with tyir-run: every end token of every source, the reason of the end, every position
of the cache, prompts in any encoding, arguments out of range.
"""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.e2e.small_models import BYTES, byte_tokenizer, chain, edit_json
from tyir.diagnostics import TyirError
from tyir.manifest import BuildOptions
from tyir.runtime_sim.session.batch_session import BatchSession
from tyir.runtime_sim.session.chunks import plan_chunks
from tyir.runtime_sim.session.sampling import make_sampler
from tyir.runtime_sim.session.session import ENGINES, EngineName, Session
from tyir.tools.api import compile_path
from tyir.tools.tyir_run import main as run

CAPACITY = 30
# After A comes B .. Z, then A again; after a comes the tokenizer's own end.
LETTERS = {
    BYTES + ord(a): BYTES + ord(b) for a, b in zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", "BCDEFGHIJKLMNOPQRSTUVWXYZA")
}
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = chain(tmp_path_factory.mktemp("chain") / "model", {**LETTERS, BYTES + ord("a"): 2})
    options = BuildOptions(dies=1, seqlens=(8,), max_kv=CAPACITY)
    return compile_path(folder, folder.parent / "out", options)


@pytest.fixture
def artifacts(compiled: Path, tmp_path: Path) -> Path:
    """A copy whose side files may be changed (`--no-check`)."""
    return Path(shutil.copytree(compiled, tmp_path / "artifacts"))


@pytest.fixture
def answer(capsys: pytest.CaptureFixture[str]) -> Run:
    def ask(folder: Path, *args: object) -> tuple[int, str, str]:
        code = run([str(folder), "--no-check", *map(str, args)])
        return code, *capsys.readouterr()

    return ask


# --------------------------------------------------------------------------------------------- why it ended


def test_the_limit(compiled: Path, answer: Run) -> None:
    code, out, notes = answer(compiled, "--prompt", "A", "--max-tokens", 5)
    assert (code, out) == (0, "ABCDEF\n")
    assert (
        " s after that; 5 tokens at" in notes
        and "ended after 5 tokens, as many as --max-tokens allows" in notes
    )


def test_no_tokens_are_an_answer_too(compiled: Path, answer: Run) -> None:
    code, out, notes = answer(compiled, "--prompt", "A", "--max-tokens", 0)
    assert (code, out) == (0, "A\n") and "ended after 0 tokens" in notes


@pytest.mark.parametrize("length", [1, 5, 8, 22, 23, 29, 30])
def test_every_position_of_the_cache(compiled: Path, answer: Run, length: int) -> None:
    """30 positions and steps of 8: the last ones are reached by padding that nobody keeps."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZ" * 3
    code, out, notes = answer(compiled, "--prompt", alphabet[:length], "--max-tokens", 64)
    assert (code, out) == (0, alphabet[: CAPACITY + 1] + "\n"), "one token follows the last position"
    assert "ended because the cache of 30 positions is full" in notes and "--max-kv" in notes


def test_a_prompt_too_long_is_refused_with_the_numbers(compiled: Path, answer: Run) -> None:
    for length in (31, 100, 20_000):
        code, out, errors = answer(compiled, "--prompt", "A" * length)
        assert (code, out) == (1, "")
        assert f"{length} tokens do not fit: 0 of the cache's 30 positions are taken" in errors
        assert f"--max-kv {length} or more" in errors


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_and_batches_agree_to_the_last_position(compiled: Path, engine: EngineName) -> None:
    ids = [BYTES + (7 * i) % 250 for i in range(CAPACITY)]
    session, batch = Session(compiled, engine), BatchSession(compiled, engine)
    for parts in ([ids[:5], ids[5:27], ids[27:]], [ids]):
        session.reset()
        batch.reset()
        for part in parts:
            np.testing.assert_allclose(session.feed(part), batch.feed([part])[0], atol=1e-3)
        assert session.tokens == ids
        with pytest.raises(TyirError, match="tokens do not fit: 30 of the cache's 30 positions"):
            session.feed([5])


@pytest.mark.parametrize("seqlens", [(8,), (1, 8), (5,), (3, 7), (16, 4), (30,)])
def test_chunks_cover_every_cache(seqlens: tuple[int, ...]) -> None:
    for capacity in range(max(seqlens), 40):
        for position in range(capacity):
            chunks = list(plan_chunks(capacity - position, position, seqlens, capacity))
            places = [p for c in chunks for p in range(c.start, c.start + c.count)]
            assert places == list(range(position, capacity))
            assert all(1 <= c.count <= c.seqlen and c.seqlen in seqlens for c in chunks)


# ----------------------------------------------------------------------------------------------- end tokens


def ends_at(source: str, token: str) -> str:
    return f"ended by stop token {BYTES + ord(token)} ({token}) of {source}"


def test_the_tokenizers_own_end(compiled: Path, answer: Run) -> None:
    code, out, notes = answer(compiled, "--prompt", "xa", "--max-tokens", 9)
    assert (code, out) == (0, "xa\n") and " s after that; 1 tokens (host" in notes
    assert "ended by stop token 2 (<eos>) of" in notes


def test_all_files_count(artifacts: Path, answer: Run) -> None:
    """A list in generation_config.json, another token in config.json, the tokenizer's: each ends a text."""
    edit_json(artifacts / "generation_config.json", eos_token_id=[BYTES + ord("E"), BYTES + ord("K")])
    edit_json(artifacts / "config.json", eos_token_id=BYTES + ord("P"))
    for start, end, source in (
        ("B", "E", "generation_config.json"),
        ("F", "K", "generation_config.json"),
        ("M", "P", "config.json"),
    ):
        code, out, notes = answer(artifacts, "--prompt", start, "--max-tokens", 20)
        assert code == 0 and out.strip().startswith(start) and ends_at(source, end) in notes
    assert "of the tokenizer" in answer(artifacts, "--prompt", "a")[2]
    edit_json(artifacts / "config.json", eos_token_id=None, text_config={"eos_token_id": [BYTES + ord("S")]})
    assert ends_at("config.json", "S") in answer(artifacts, "--prompt", "P", "--max-tokens", 20)[2]
    (artifacts / "generation_config.json").unlink()
    assert "ended after 3 tokens" in answer(artifacts, "--prompt", "B", "--max-tokens", 3)[2]


@pytest.mark.parametrize("name", ["<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>"])
def test_ends_of_turns_of_the_chat_template(compiled: Path, tmp_path: Path, name: str) -> None:
    from transformers import AutoTokenizer

    from tyir.tools.run.end_tokens import end_tokens

    byte_tokenizer(tmp_path, template="{{ messages }}" + name, special=(name,))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert end_tokens(tmp_path, tokenizer) == {2: "the tokenizer", 259: "the chat template"}
    byte_tokenizer(tmp_path, template="{{ messages }}", special=(name,))
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert end_tokens(tmp_path, AutoTokenizer.from_pretrained(tmp_path)) == {2: "the tokenizer"}


STOPS = "stop_strings of generation_config.json"
EOT = "eot_token of special_tokens_map.json"
OWN = "eot_token of tokenizer_config.json"


@pytest.mark.parametrize(
    ("file", "said", "source"),
    [
        ("config.json", {"llm_config": {"eos_token_id": 259}}, "config.json"),
        ("generation_config.json", {"stop_strings": "<|turn|>"}, STOPS),
        ("generation_config.json", {"stop_strings": ["", 5, "<|turn|>"]}, STOPS),
        ("special_tokens_map.json", {"eot_token": "<|turn|>"}, EOT),
        ("special_tokens_map.json", {"eot_token": {"content": "<|turn|>"}}, EOT),
        ("tokenizer_config.json", {"eot_token": "<|turn|>"}, OWN),
        ("tokenizer_config.json", {"eot_token": {"content": "<|turn|>"}}, OWN),
    ],
)  # fmt: skip
def test_ends_that_a_file_names(tmp_path: Path, file: str, said: dict[str, Any], source: str | None) -> None:
    from tyir.tools.run.end_tokens import end_tokens
    from tyir.tools.tokenizer import load_tokenizer

    byte_tokenizer(tmp_path, special=("<|turn|>",))
    path = tmp_path / file
    held = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**held, **said}))
    assert end_tokens(tmp_path, load_tokenizer(tmp_path)) == {2: "the tokenizer", 259: source}


def test_a_stop_string_of_several_tokens_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tyir.tools.run.end_tokens import end_tokens
    from tyir.tools.tokenizer import load_tokenizer

    byte_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"stop_strings": ["END of it"]}')
    assert end_tokens(tmp_path, load_tokenizer(tmp_path)) == {2: "the tokenizer"}
    assert (
        "'END of it' of stop_strings in generation_config.json is more than one token"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("value", [{"content": "</s>"}, {"content": 5}, {"id": 2}, {}])
def test_a_special_token_that_is_an_object(tmp_path: Path, value: dict[str, Any]) -> None:
    """As older libraries wrote it, without `__type`; one without a text is refused by its file and key."""
    from tyir.tools.tokenizer import load_tokenizer

    byte_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": value}))
    if value.get("content") == "</s>":
        assert load_tokenizer(tmp_path).eos_token == "</s>"
        return
    with pytest.raises(
        TyirError, match=r"'eos_token' of tokenizer_config\.json is .* is needed(.|\n)*restore"
    ):
        load_tokenizer(tmp_path)


SAYS = "{% for m in messages %}{{ m.content | trim }}"
TEMPLATES = {  # a template's text, and the special tokens that end an answer there
    "a family of its own": (SAYS + "<|turn_end|>{% endfor %}", {"<|turn_end|>"}),
    "another end than the tokenizer's": (SAYS + "</s>{% endfor %}", {"</s>"}),
    "in two texts": (SAYS + "{{ '<|turn_' + 'end|>' }}{% endfor %}", {"<|turn_end|>"}),
    "a variable": ("{% set e = '</s>' %}" + SAYS + "{{ e }}{% endfor %}", {"</s>"}),
    "the end of text": (SAYS + "{{ eos_token }}{% endfor %}", {"<eos>"}),
    "parts": (
        "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}</s>{% endfor %}",
        {"</s>"},
    ),
    "two branches": (
        SAYS + "{% if loop.last %}</s>{% else %}\n<|turn_end|>{% endif %}{% endfor %}",
        {"</s>", "<|turn_end|>"},
    ),
    "a macro": (
        "{% macro r(c) %}{{ c }}{% endmacro %}{% for m in messages %}{{ r(m.content) ~ '</s>' }}{% endfor %}",
        {"</s>"},
    ),
    "after a call of tools": (
        SAYS + "{% if m.calls %}[CALLS]{% for t in m.calls %}[CALL]{% endfor %}{% endif %}</s>{% endfor %}",
        {"</s>"},
    ),
    "a question's end": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}<|ask|>"
        "{% elif m.role == 'assistant' %}{{ m.content }}</s>{% endif %}{% endfor %}",
        {"</s>"},
    ),
    "marked for training": (
        "{% for m in messages %}{% generation %}{{ m.content }}</s>{% endgeneration %}{% endfor %}",
        {"</s>"},
    ),
    "not special": (SAYS + "<plain>{% endfor %}", set()),
    "not at once": (SAYS + "\nend:</s>{% endfor %}", set()),
    "no template": ("{% for", set()),
    "for ever": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{{ content }}</s>{% endfor %}{% endfor %}",
        {"</s>"},
    ),
    "deep": ("{% if a %}" * 5000 + "{{ content }}</s>" + "{% endif %}" * 5000, set()),
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_what_follows_an_answer_in_a_template(kind: str) -> None:
    """Whatever the token is called; the template is read, never run."""
    from tyir.tools.run.turn_ends import turn_ends

    template, wanted = TEMPLATES[kind]
    special = {"</s>", "<eos>", "<|turn_end|>", "<|ask|>", "[CALL]", "[CALLS]"}
    assert turn_ends(template, special, {"eos_token": "<eos>"}) == wanted


def test_an_end_of_a_template_that_nobody_knows(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from tyir.tools.run.end_tokens import end_tokens

    byte_tokenizer(tmp_path, template=SAYS + "<|turn_end|>{% endfor %}", special=("<|turn_end|>",))
    wanted = {2: "the tokenizer", 259: "the chat template"}
    assert end_tokens(tmp_path, AutoTokenizer.from_pretrained(tmp_path)) == wanted
    byte_tokenizer(tmp_path, template="<bos>" + SAYS + "<bos>{% endfor %}", special=("<|turn_end|>",))
    assert end_tokens(tmp_path, AutoTokenizer.from_pretrained(tmp_path)) == {2: "the tokenizer"}


@pytest.mark.parametrize("value", ["</s>", 2.5, True, [2, "x"], {"id": 2}])
def test_an_end_that_is_no_token(artifacts: Path, answer: Run, value: Any) -> None:
    path = artifacts / "generation_config.json"
    path.write_text(json.dumps({"do_sample": False, "eos_token_id": value}, indent=1))
    code, out, errors = answer(artifacts, "--prompt", "A")
    assert (code, out) == (1, "") and "generation_config.json:3: error: 'eos_token_id' of" in errors
    assert "a token id, or a list of them, is needed" in errors


# ---------------------------------------------------------------------------------------- broken side files

BROKEN = {
    "a dot for a comma": ('{"do_sample": true. "eos_token_id": 2}', ":1:19: error: {} is not valid JSON"),
    "cut": ('{\n "eos_token_id":\n', ":3:1: error: {} is not valid JSON"),
    "a list": ("[]", "{} holds a JSON list, an object is needed"),
    "null": ("null", "{} holds a JSON null, an object is needed"),
    "a string": ('"{}"', "{} holds a JSON string, an object is needed"),
    "a mark": ("\xef\xbb\xbf{}", "{} begins with a byte order mark"),
    "UTF-16": ("\xff\xfe{\0}\0", "{} begins with a byte order mark"),
    "a pointer": (
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a",
        "{} is a Git LFS pointer, not the file itself",
    ),
    "a page": ("\n<!DOCTYPE html>\n<html></html>", "{} is a web page, not the file itself"),
    "empty": ("", ":1:1: error: {} is not valid JSON"),
    "Latin-1": ('{"a": "é"}', "{} is not UTF-8 text"),
    "deep": ('{"a":' * 100_000, "{} cannot be read as JSON"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_generation_config(artifacts: Path, answer: Run, kind: str) -> None:
    text, wanted = BROKEN[kind]
    name = "generation_config.json"
    (artifacts / name).write_bytes(text.encode("latin-1"))
    code, out, errors = answer(artifacts, "--prompt", "A")
    assert (code, out) == (1, "") and wanted.format(name) in errors and "help: " in errors


def test_broken_side_files_are_refused_before_the_work(compiled: Path, tmp_path: Path) -> None:
    """All of them at once, from a checkpoint or its `.ir`."""
    from tyir.frontends.huggingface import import_model
    from tyir.printer import print_op

    model = Path(shutil.copytree(compiled.parents[1] / "model", tmp_path / "model"))
    (tmp_path / "model.ir").write_text(print_op(import_model(model)))
    edit_json(model / "generation_config.json", eos_token_id="end")
    (model / "special_tokens_map.json").write_text("{,}")
    (model / "tokenizer_config.json").write_text("[1]")
    for source in (model, tmp_path / "model.ir"):
        with pytest.raises(TyirError) as caught:
            compile_path(source, tmp_path / "out", BuildOptions(dies=1, seqlens=(8,), max_kv=30))
        message = str(caught.value)
        assert "'eos_token_id' of generation_config.json is \"end\"" in message
        assert "special_tokens_map.json is not valid JSON" in message
        assert "tokenizer_config.json holds a JSON list" in message
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("generation_config.json", None, "it is a link to ../blobs/gone, where there is no file"),
        ("tokenizer.json", None, "it is a link to ../blobs/gone, where there is no file"),
        ("chat_template.jinja", None, "it is a link to ../blobs/gone, where there is no file"),
        ("chat_template.jinja", "{{ messages }}".encode("utf-16"), "begins with a byte order mark"),
        ("chat_template.jinja", b"\xef\xbb\xbf{{ messages }}", "begins with a byte order mark"),
        ("chat_template.jinja", b"{# \xe9 #}", "is not UTF-8 text"),
        ("chat_template.jinja", b"<html>401</html>", "is a web page, not the file itself"),
        ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    ],
)
def test_what_stands_in_for_a_side_file_is_refused_before_the_work(
    compiled: Path, tmp_path: Path, name: str, content: bytes | None, wanted: str
) -> None:
    """Links whose file was not copied along, what downloads leave, and texts of another encoding."""
    model = Path(shutil.copytree(compiled.parents[1] / "model", tmp_path / "model"))
    (model / name).unlink(missing_ok=True)
    if content is None:
        (model / name).symlink_to("../blobs/gone")
    else:
        (model / name).write_bytes(content)
    with pytest.raises(TyirError) as caught:
        compile_path(model, tmp_path / "out", BuildOptions(dies=1, seqlens=(8,), max_kv=30))
    assert name in str(caught.value) and wanted in caught.value.render()


@pytest.mark.parametrize("text", ["{}", '{"version": "1.0", "model": {"type": "none"}}', "[", '{"model": 7}'])
def test_a_broken_tokenizer(artifacts: Path, answer: Run, text: str) -> None:
    (artifacts / "tokenizer.json").write_text(text)
    code, out, errors = answer(artifacts, "--prompt", "A")
    assert (code, out) == (1, "") and "cannot read the tokenizer of" in errors and "internal" not in errors


# -------------------------------------------------------------------------------------------------- prompts


class Stdin(io.StringIO):
    """Standard input with these bytes."""

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.buffer = io.BytesIO(content)


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"\xff", "not UTF-8: byte 0xff at 0"),
        (b"abc\xc3", "not UTF-8: byte 0xc3 at 3"),
        (b"\xed\xa0\x80", "not UTF-8: byte 0xed at 0"),
        ("Grüße".encode("latin-1"), "not UTF-8: byte 0xfc at 2"),
        ("text".encode("utf-16"), "not UTF-8: byte 0xff at 0"),
        (b"", "the prompt is empty"),
    ],
)
def test_stdin_that_is_no_prompt(
    compiled: Path, answer: Run, monkeypatch: pytest.MonkeyPatch, content: bytes, wanted: str
) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin(content))
    code, out, errors = answer(compiled)
    assert (code, out) == (1, "") and wanted in errors and "help: " in errors


@pytest.mark.parametrize("text", ["é🙂", "\0", "A\r\n", "\u202e", "a" * 29])
def test_stdin_that_is_one(compiled: Path, answer: Run, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin(text.encode()))
    code, out, _ = answer(compiled, "--max-tokens", 1)
    assert code == 0 and out.startswith(text.replace("\r\n", "\n"))


def test_no_stdin(compiled: Path, answer: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    code, out, errors = answer(compiled)
    assert (code, out) == (1, "") and "standard input: it is closed" in errors


@pytest.mark.parametrize("bad", [b"\xff", b"abc\xfe", b"\xc3\x28", b"\xf0\x9f\x99"])
def test_an_argument_that_is_no_text(compiled: Path, answer: Run, bad: bytes) -> None:
    code, out, errors = answer(compiled, "--prompt", os.fsdecode(bad))
    assert (code, out) == (1, "") and "--prompt is not UTF-8: byte 0x" in errors
    code, out, errors = answer(compiled, "--prompt", "a\ud800")
    assert (code, out) == (1, "") and "surrogate" in errors


def test_an_argument_in_a_locale_without_its_characters(compiled: Path, answer: Run) -> None:
    """With an ASCII locale Python keeps the bytes as surrogates; they are the user's UTF-8 all the same."""
    as_surrogates = "é🙂".encode().decode("ascii", "surrogateescape")
    code, out, _ = answer(compiled, "--prompt", as_surrogates, "--max-tokens", 1)
    assert code == 0 and out.startswith("é🙂")


@pytest.mark.parametrize("prompt", ["<bos>", "<pad><pad>", "<eos>A", "<bos><eos><bos>"])
def test_special_tokens_are_a_prompt(compiled: Path, answer: Run, prompt: str) -> None:
    code, out, notes = answer(compiled, "--prompt", prompt, "--max-tokens", 2)
    assert code == 0 and out.startswith(prompt) and "ended " in notes


# ------------------------------------------------------------------------------------------------ arguments

OUT_OF_RANGE = [
    ("--temperature", ["nan", "-1", "inf", "-inf", "-0.001"]),
    ("--top-p", ["nan", "0", "2", "-1", "inf"]),
    ("--min-p", ["nan", "-0.1", "1.5", "inf"]),
    ("--top-k", ["-1", "-1000000"]),
    ("--seed", ["-1", "-99999999999999999999"]),
    ("--max-tokens", ["-1", "-64"]),
]


@pytest.mark.parametrize(("option", "value"), [(o, v) for o, values in OUT_OF_RANGE for v in values])
def test_arguments_out_of_range(compiled: Path, answer: Run, option: str, value: str) -> None:
    code, out, errors = answer(compiled, "--prompt", "A", f"{option}={value}")
    assert (code, out) == (1, "")
    assert errors.startswith(f"error: {option} ") and f"help: {option} takes " in errors


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--temperature", "1e-320"),
        ("--temperature", "1e30"),
        ("--temperature", "5e-324"),
        ("--top-k", "999999999"),
        ("--top-p", "1e-300"),
        ("--min-p", "1"),
        ("--seed", "9" * 300),
        ("--max-tokens", "99999999999999999999"),
    ],
)
def test_extreme_arguments_in_range(compiled: Path, answer: Run, option: str, value: str) -> None:
    options = {"--temperature": "0.5", "--seed": "1", "--max-tokens": "3", option: value}
    code, out, errors = answer(compiled, "--prompt", "AB", *(f"{k}={v}" for k, v in options.items()))
    assert code == 0 and out.startswith("AB") and "ended " in errors


@pytest.mark.parametrize("value", ["many", "", "1,5"])
@pytest.mark.parametrize("option", [option for option, _ in OUT_OF_RANGE])
def test_arguments_that_are_no_numbers(compiled: Path, answer: Run, option: str, value: str) -> None:
    code, out, errors = answer(compiled, "--prompt", "A", f"{option}={value}")
    assert (code, out) == (1, "") and f"argument {option}: invalid" in errors


def test_samplers_of_the_library_too() -> None:
    for arguments in (
        {"temperature": math.nan},
        {"temperature": 1.0, "top_p": math.nan},
        {"temperature": True},
        {"temperature": 0.5, "top_k": 1.5},
        {"min_p": np.float32(np.nan)},
        {"seed": -1},
    ):
        with pytest.raises(TyirError, match="is out of range"):
            make_sampler(**arguments)  # type: ignore[arg-type]
    logits = np.array([1.0, 3.0, 2.0, -50.0], np.float32)
    assert {make_sampler(1e-320, seed=s)(logits) for s in range(20)} == {1}
    assert {make_sampler(5.0, min_p=0.5, seed=s)(logits) for s in range(200)} == {0, 1, 2}
    assert {make_sampler(1.0, min_p=0.3, seed=s)(logits) for s in range(200)} == {1, 2}

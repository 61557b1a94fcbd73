"""Prompts and what is asked with them, on compiled programs of the embedded model: each is continued, or
refused with one message; what is printed begins with the prompt.
"""

# ruff: noqa: E501 - tables of cases

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.reliability.cases import MODEL, Case, ProcessTally, Zygote, run_process, sample

RUN = "tyir.tools.tyir_run"
FINE, REFUSED, EITHER = frozenset((0,)), frozenset((1,)), frozenset((0, 1))
POSITIONS = 64
END = "<|endoftext|>"
TOKENIZER: dict[str, Any] = json.loads((MODEL / "tokenizer.json").read_text(encoding="utf-8"))
SETTINGS: dict[str, Any] = json.loads((MODEL / "tokenizer_config.json").read_text(encoding="utf-8"))


# --------------------------------------------------------------------------------------------------- prompts

TEXTS: tuple[str, ...] = (
    "The old house", " ", "\n", "\t", "\r", "\r\n", "a\r\nb", "\x00", "a\x00b", "\x1b[31mred\x1b[0m", "\x07\x08\x7f",
    "\u202eabc", "\u200b", "\ufeff", "\ufeffabc", "\ufffd", "\ufffe", "\uffff", "\U0010ffff", "\u0301", "e\u0301", "é",
    "日本語", "👩‍👩‍👧", "🇩🇪🇩", "\u0e01\u0e33", "ﷺ" * 3, "İıſK", "ẞß", "%s%n{}{{}}\\", "--help", "-", "--", "@file", "$(touch x)",
    "`x`", "'\"", "\\n\\x00", "<", "<|", "<|endoftext", END, END * 3, f"{END}The old house", f"The old{END}house",
    f" {END} ", "<s>", "</s>", "[INST]", "<unk>", "<0x0A>", "<0xFF>", "Ġ", "▁", "##a", "@@", "</w>", "\xa0", "\u2028x\u2029",
    "\x85", "a" * 40, "ab " * 15, " " * 50, "\n" * 30, "1" * 30, "🙂" * 12, "\x00" * 30, "\u0300" * 20, "{{ messages }}",
    "{% for i in range(10**9) %}x{% endfor %}", "\udcff", "a\ud800", "\ud83d\ude42",
)  # fmt: skip
BYTES: tuple[bytes, ...] = (
    b"", b"\xff", b"a\xfe", b"\xc3", b"\xc3\x28", b"\xed\xa0\x80", b"\xf0\x9f\x99", b"\xf4\x90\x80\x80", b"\xc0\x80",
    b"\x80", b"\xfe\xff\x00a", b"\xff\xfea\x00", b"caf\xe9", b"\xef\xbb\xbfabc", b"\x00", b"\n", b"\r\n\r\n", b"abc\x1a",
    b"\x1f\x8b\x08\x00", b"PK\x03\x04", b"\x89PNG\r\n", b"%PDF-1.4\n", b"\x7fELF\x02\x01\x01", bytes(range(128)),
)  # fmt: skip


def _texts(folder: Path, artifacts: Path) -> Iterator[Case]:
    """Each text as an argument and on standard input; bytes there alone."""
    few = ("--max-tokens", "3")
    for number, text in enumerate(TEXTS):
        surrogate = any("\ud800" <= c <= "\udfff" for c in text)
        shown = "" if surrogate else text
        if "\0" not in text and text != "\ud83d\ude42" and not (surrogate and "\ud800" in text):
            given = f"--prompt={text}".encode("utf-8", "surrogateescape")
            wanted = REFUSED if surrogate else EITHER
            yield Case(f"argument {text[:30]!r}", RUN, (artifacts, given, *few), wanted, prints=shown)
        path = folder / f"text{number}"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        wanted = REFUSED if surrogate else EITHER
        shown = shown.replace("\r\n", "\n")
        yield Case(f"standard input {text[:30]!r}", RUN, (artifacts, *few), wanted, stdin=path, prints=shown)
    for number, data in enumerate(BYTES):
        path = folder / f"bytes{number}"
        path.write_bytes(data)
        try:
            wanted = REFUSED if not data or data.decode() is None else EITHER
        except UnicodeDecodeError:
            wanted = REFUSED
        yield Case(f"standard input {data[:30]!r}", RUN, (artifacts, *few), wanted, stdin=path)
        yield Case(f"standard input {data[:30]!r}, edge10", RUN, (artifacts, "--engine", "edge10", *few), wanted, stdin=path)  # fmt: skip
        if b"\0" not in data:
            given = b"--prompt=" + data
            yield Case(f"argument {data[:30]!r}", RUN, (artifacts, given, *few), wanted)


def _lengths(folder: Path, artifacts: Path) -> Iterator[Case]:
    """Prompts around the cache's positions, and far beyond them."""
    for unit in ("a ", "\n", "🙂", "The old house stood at the end of the road. ", "\x00", "x" * 997 + " "):
        for times in (1, 7, 8, 9, 31, 32, 33, 62, 63, 64, 65, 66, 128, 1000, 100_000):
            path = folder / f"{ord(unit[0])}x{len(unit)}x{times}"
            path.write_text(unit * times, encoding="utf-8")
            name = f"{unit[:12]!r} {times} times"
            yield Case(name, RUN, (artifacts, "--max-tokens", "2"), EITHER, stdin=path)
    for tokens in (0, 1, 63, 64, 65, 10**6, 10**18, 10**30):
        for prompt in ("The", "a " * 30, "a " * 60):
            given = (artifacts, "--prompt", prompt, f"--max-tokens={tokens}")
            yield Case(f"{tokens} tokens after {len(prompt)}", RUN, given, FINE, "ended ", prints=prompt)
    sparse = folder / "sparse"
    with sparse.open("wb") as file:
        file.truncate(1 << 32)
    yield Case("4 GiB of zeros", RUN, (artifacts,), REFUSED, "more than the", stdin=sparse)
    yield Case("a device that ends at once", RUN, (artifacts,), REFUSED, "is empty", stdin=Path("/dev/null"))
    yield Case("a device that does not end", RUN, (artifacts,), REFUSED, stdin=Path("/dev/zero"))


def test_prompts(
    tmp_path: Path, compiled: Path, running: Zygote, tally: Callable[[str], ProcessTally], slow: bool
) -> None:
    count = tally("prompts")
    (tmp_path / "lengths").mkdir()
    count.run(running, sample(_texts(tmp_path, compiled), slow, 6))
    count.run(running, sample(_lengths(tmp_path / "lengths", compiled), slow, 3))
    count.close()


# ------------------------------------------------------------------------------------------------- arguments


def _arguments(artifacts: Path, folder: Path) -> Iterator[Case]:
    numbers = ("0", "-0.0", "1", "-1", "1e-320", "5e-324", "1e308", "1e309", "nan", "inf", "-inf", "x", "", "0x1", "1_0", "٣", "1" + "0" * 400, "9" * 5000)  # fmt: skip
    for option in ("--temperature", "--top-p", "--min-p", "--top-k", "--seed", "--max-tokens"):
        for value in numbers:
            given = {"--temperature": "0.7", "--seed": "3", "--max-tokens": "3", option: value}
            words = (artifacts, "--prompt", "The old", *(f"{k}={v}" for k, v in given.items()))
            yield Case(f"{option}={value[:20]}", RUN, words, EITHER)
    for number, words in enumerate(
        (
            ("--prompt",), ("--prompt", "a", "--prompt", "b"), ("--prompt", "a") * 100, ("--engine", "x"), ("--engine", ""),
            ("--cache", ""), ("--cache", "/dev/null/folder/x"), ("--cache", "/dev/full"), ("--cache", "/dev/null"),
            ("--cache", "/dev/zero"), ("--cache", folder), ("--cache", "/etc/passwd"), ("--trace-commands", "/dev/full"),
            ("--trace-commands", folder), ("--engine", "edge10", "--trace-commands", "/dev/full"),
            ("--engine", "edge10", "--trace-commands", folder), ("--engine", "edge10", "--trace-commands", "/no/x"),
            ("--no-such",), ("--max-tokens",), ("extra",), ("--seed", "1", "--seed", "2"), ("--no-check",),
        )
    ):  # fmt: skip
        wanted = FINE if words in (("--no-check",), ("--seed", "1", "--seed", "2")) else EITHER
        given = (artifacts, "--prompt", "The", "--max-tokens", "2", *words)
        yield Case(f"arguments {number} {words[:3]}"[:80], RUN, given, wanted)
    for place in (
        "",
        ".",
        "/",
        "/dev/null",
        "/dev/zero",
        "/no/such",
        "x" * 300,
        "x" * 5000,
        "a\nb",
        "\udcff",
    ):
        yield Case(f"artifacts {place[:20]!r}", RUN, (place, "--prompt", "The"), REFUSED)


def test_arguments(
    tmp_path: Path, compiled: Path, running: Zygote, tally: Callable[[str], ProcessTally], slow: bool
) -> None:
    count = tally("sampling and arguments")
    count.run(running, sample(_arguments(compiled, tmp_path), slow, 4))
    count.close()


# ------------------------------------------------------------------------------------------------ tokenizers

LOOPS = "{% for a in range(100000) %}{% for b in range(100000) %}{% for c in range(100000) %}x{% endfor %}{% endfor %}{% endfor %}"
TEMPLATES: tuple[Any, ...] = (
    "", "{{", "{% for", LOOPS, "{{ raise_exception('no') }}", "{{ 1 / 0 }}", "{{ ''.__class__.__mro__ }}", "{{ messages[10**9] }}",
    "{% include '/etc/passwd' %}", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "x" * 1_000_000, "{" * 100_000, "\ud800",
    5, [], {}, None, [{"name": "default", "template": "x"}], [{"name": "x"}], {"default": LOOPS}, True, "{{ '" + "x" * 100_000 + "' * 10**9 }}",
)  # fmt: skip


def _replaced(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _processor(*steps: Any, ids: tuple[int, ...] = (0,)) -> dict[str, Any]:
    whole: dict[str, Any] = {"Sequence": {"id": "A", "type_id": 0}}
    special = {"x": {"id": "x", "ids": list(ids), "tokens": ["x"] * len(ids)}}
    return {
        "type": "TemplateProcessing",
        "single": [*steps, whole],
        "pair": [whole, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": special,
    }


def _added(number: int, content: str, **more: Any) -> dict[str, Any]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": number, "content": content, **plain, **more}


def _tokenizers() -> Iterator[tuple[str, bytes, bool]]:
    """Name, tokenizer.json, whether it must be refused."""

    def of(**changes: Any) -> bytes:
        return json.dumps({**TOKENIZER, **changes}).encode("utf-8", "surrogatepass")

    x = {"SpecialToken": {"id": "x", "type_id": 0}}
    for n in (10, 200, 5000, 100_000):
        yield f"{n} objects", b'{"a":' * n + b"1" + b"}" * n, True
        yield (
            f"{n} normalizers in each other",
            of(normalizer=0).replace(
                b'"normalizer": 0', b'"normalizer": ' + b'{"type":"Sequence","normalizers":[' * n + b"]}" * n
            ),
            n > 100,
        )
        yield (
            f"{n} lists as model",
            of(model=0).replace(b'"model": 0', b'"model": ' + b"[" * n + b"]" * n),
            True,
        )
    for name, data in (
        ("nothing", b""), ("not JSON", b"{"), ("a list", b"[]"), ("null", b"null"), ("not UTF-8", b"\xff"), ("zeros", bytes(1000)),
        ("65 MiB", b'{"a": "' + b"x" * (65 << 20) + b'"}'), ("digits", b'{"version": ' + b"9" * 5000 + b"}"),
    ):  # fmt: skip
        yield name, data, True
    model = TOKENIZER["model"]
    vocabulary: dict[str, int] = model["vocab"]
    for name, changed in {
        "no vocabulary": {}, "a vocabulary of one": {"a": 0}, "ids twice": {**vocabulary, "zz1": 5}, "ids beyond": {**vocabulary, "The": 2**32 - 1},
        "negative ids": {**vocabulary, "The": -1}, "ids 2^40": {**vocabulary, "The": 2**40}, "ids of text": {**vocabulary, "The": "1"},
        "2 M tokens": {f"t{i}": i for i in range(2_000_000)}, "a long token": {**vocabulary, "y" * 1_000_000: 4096}, "an empty token": {**vocabulary, "": 4096},
        "ids moved": {k: v + 4000 for k, v in vocabulary.items()}, "surrogates": {**vocabulary, "\ud800": 4096},
    }.items():  # fmt: skip
        yield (
            f"vocabulary: {name}",
            of(model={**model, "vocab": changed}),
            name in ("2 M tokens", "negative ids"),
        )
    for name, merges in {
        "none": [], "of nothing": [["", ""]], "of strangers": [["qqq", "www"]], "of three": [["a", "b", "c"]], "numbers": [1, 2],
        "twice": model["merges"] + model["merges"], "text": "a b", "reversed": model["merges"][::-1],
    }.items():  # fmt: skip
        yield f"merges: {name}", of(model={**model, "merges": merges}), False
    for key, value in {"dropout": 1.0, "unk_token": "nothing", "byte_fallback": True, "type": "None", "continuing_subword_prefix": "x" * 10_000, "ignore_merges": 5}.items():  # fmt: skip
        yield f"model: {key} = {str(value)[:20]}", of(model={**model, key: value}), False
    growing = [_replaced({"String": "e"}, "ee")] * 40
    for part, kinds in (
        ("normalizer", "normalizers"),
        ("decoder", "decoders"),
        ("pre_tokenizer", "pretokenizers"),
    ):
        yield (
            f"{part} that doubles forty times",
            of(**{part: {"type": "Sequence", kinds: growing}}),
            part != "pre_tokenizer",
        )
        for pattern in ({"Regex": "."}, {"Regex": ""}, {"String": "e"}, {"String": ""}):
            step = _replaced(pattern, "b" * 1_000_000)
            yield f"{part} from {pattern} to a megabyte", of(**{part: step}), True
        yield f"{part} unknown", of(**{part: {"type": "Nothing"}}), True
        yield f"{part} a number", of(**{part: 5}), True
    for regex in (
        "(a+)+$",
        "(a|aa)+$",
        "(" * 5000 + ")" * 5000,
        "(?<=a*)b",
        "a{1000}{1000}{1000}",
        "[",
        "(?R)",
        "\\p{Xx}",
        "(.*)*\\1",
    ):
        split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
        yield f"split by {regex[:20]}", of(pre_tokenizer=split), False
    yield "prepend a megabyte", of(normalizer={"type": "Prepend", "prepend": "x" * 1_000_000}), True
    yield "prepend a thousand", of(normalizer={"type": "Prepend", "prepend": "x" * 1000}), True
    yield (
        "a table of a megabyte",
        of(normalizer={"type": "Precompiled", "precompiled_charsmap": "A" * 1_000_000}),
        False,
    )
    for steps, ids in (
        ((x,) * 100_000, (0,)), ((x,), (4096,)), ((x,), (2**32 - 1,)), ((x,), (2**40,)), ((x,), (-1,)), ((x,) * 70, (0,)), ((x, x), (0,)),
        (({"SpecialToken": {"id": "nothing", "type_id": 0}},), (0,)),
    ):  # fmt: skip
        bad = len(steps) > 1000 or not 0 <= ids[0] < 2**32 or len(steps) == 70 or ids[0] > 4095
        yield (
            f"post-processor of {len(steps)} times {ids}",
            of(post_processor=_processor(*steps, ids=ids)),
            bad,
        )
    for number, token, more in (
        (4096, "The", {}), (0, "The", {}), (2**32 - 1, "The", {}), (2**40, "The", {}), (-1, "The", {}), (4096, "", {}), (4096, "\0", {}),
        (4096, " ", {"lstrip": True, "rstrip": True}), (4096, "e", {"special": True}), (4096, "y" * 1_000_000, {}), (5, "old", {"normalized": True}),
    ):  # fmt: skip
        yield (
            f"added {token[:10]!r} as {number}",
            of(added_tokens=[*TOKENIZER["added_tokens"], _added(number, token, **more)]),
            False,
        )
    yield "100,000 added tokens", of(added_tokens=[_added(5000 + i, f"q{i}") for i in range(100_000)]), True
    pad = {"direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
    for size in (0, 10, 10**6, 2**62):
        yield f"padding to {size}", of(padding={"strategy": {"Fixed": size}, **pad}), False
        cut = {"max_length": size, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
        yield f"truncation to {size}", of(truncation=cut), False


def _settings() -> Iterator[tuple[str, dict[str, Any]]]:
    """Other values in tokenizer_config.json."""
    for number, template in enumerate(TEMPLATES):
        yield f"chat template {number}: {str(template)[:30]!r}", {"chat_template": template}
    for key, values in {
        "bos_token": (END, "nothing", "The", "", 5, None, [], {"content": END}, {"content": 5}, "x" * 100_000),
        "eos_token": (None, "nothing", "the", "", 5, []),
        "add_bos_token": (True, "x", 5), "add_eos_token": (True, 5), "add_prefix_space": (True, "x", 5),
        "model_max_length": (0, -1, 1, 1e400, "x", None, 10**300), "padding_side": ("left", "x", 5), "truncation_side": ("left", "x"),
        "clean_up_tokenization_spaces": (True, "x", 5), "tokenizer_class": ("GPT2Tokenizer", "LlamaTokenizer", "Nothing", "os.system", 5, None, "", "BertTokenizer"),
        "extra_special_tokens": ({"x": "y"}, ["y"], 5, "x", {"x": 5}), "additional_special_tokens": (["The"], [5], "x", [None], ["q"] * 1000),
        "added_tokens_decoder": ({}, {"0": {"content": "The"}}, {"x": {}}, {"999999": {"content": "The"}}, [], 5, {"-1": {"content": "a"}}),
        "auto_map": ({"AutoTokenizer": ["evil.T", None]}, 5), "split_special_tokens": (True, "x"), "backend": ("x", None, 5, "mistral", "sentencepiece"),
        "unk_token": ("nothing", 5), "pad_token": ("nothing", 5, END), "spaces_between_special_tokens": (True, 5), "sp_model_kwargs": ({"x": 1}, 5),
        "__init__": (5,), "self": (1,), "from_slow": (True, 1), "legacy": (True, 5), "is_local": (True,), "tokenizer_file": ("/etc/passwd",), "vocab_file": ("/etc/passwd", 5),
    }.items():  # fmt: skip
        for value in values:
            yield f"{key} = {str(value)[:30]}", {key: value}


def test_tokenizers(
    tmp_path: Path, compiled: Path, running: Zygote, tally: Callable[[str], ProcessTally], slow: bool
) -> None:
    """Hostile tokenizers, templates and settings in the artifacts (`--no-check`: their hashes do not fit)."""
    count, cases = tally("tokenizers"), []
    contents: list[tuple[str, dict[str, bytes], frozenset[int]]] = [
        *((n, {"tokenizer.json": data, "config.json": b"{}"}, REFUSED if bad else EITHER) for n, data, bad in _tokenizers()),
        *(
            (n, {"tokenizer_config.json": json.dumps({**SETTINGS, **more}).replace("Infinity", "1e400").encode()}, EITHER)
            for n, more in _settings()
        ),
        *(
            (f"template file {n}", {"chat_template.jinja": str(t).encode("utf-8", "surrogatepass")}, EITHER)
            for n, t in enumerate(TEMPLATES)
        ),
    ]  # fmt: skip
    picked = sample(range(len(contents)), slow, 6)  # type: ignore[type-var]
    for number, (name, files, wanted) in enumerate(contents[i] for i in picked):  # type: ignore[index]
        folder = tmp_path / str(number)
        folder.mkdir()
        for source in compiled.iterdir():
            if source.name not in files:
                (folder / source.name).symlink_to(source) if source.is_dir() else shutil.copyfile(
                    source, folder / source.name
                )
        for file, data in files.items():
            (folder / file).write_bytes(data)
        words = (folder, "--no-check", "--prompt", "The old house at the aaaaaaaaaaaa!", "--max-tokens", "4")
        cases.append(Case(name, RUN, words, wanted))
    count.run(running, cases)
    count.close()


# ------------------------------------------------------------------------------------------------- processes


@pytest.mark.slow
def test_prompts_of_processes(tmp_path: Path, compiled: Path, tally: Callable[[str], ProcessTally]) -> None:
    """Standard input that comes late, in pieces, not at all; standard output that ends in the answer."""
    count = tally("prompts of processes")
    command = (sys.executable, "-m", "tyir.tools.tyir_run", str(compiled), "--max-tokens", "20")
    given = (*command, "--prompt", "The old house")
    for name, words, shell, wanted in (
            ("stdin closed", command, '"$@" <&-', REFUSED),
            ("stdin in pieces", command, "{ printf 'The '; sleep 1; printf '\\xc3'; sleep 1; printf '\\xa9 old'; } | \"$@\"", FINE),
            ("stdin that ends in a character", command, "printf 'The \\xc3' | \"$@\"", REFUSED),
            ("stdin that does not end", command, 'yes | "$@"', REFUSED),
            ("stdin a folder", command, '"$@" <.', REFUSED),
            ("stdin write-only", command, '"$@" 0>/dev/null', REFUSED),
            ("stdout closed", given, '"$@" >&-', REFUSED),
            ("stdout full", given, '"$@" >/dev/full', REFUSED),
            ("stdout unread", given, '"$@" | true; exit ${PIPESTATUS[0]}', frozenset((0, 141))),
            ("stdout read for a letter", given, '"$@" | head -c 5; exit ${PIPESTATUS[0]}', frozenset((0, 141))),
            ("everything closed but stderr", given, '"$@" <&- >&-', REFUSED),
            ("ASCII locale", (*command, "--prompt", "caf\u00e9 日本"), 'PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 LC_ALL=POSIX "$@"', FINE),
            ("no home, no temporary folder", given, 'HOME=/nonexistent TMPDIR=/nonexistent "$@"', EITHER),
            ("a temporary folder that is full", given, 'TMPDIR=/proc "$@"', EITHER),
    ):  # fmt: skip
        count.add(name, run_process(words, tmp_path, shell=shell), wanted)
    count.close()

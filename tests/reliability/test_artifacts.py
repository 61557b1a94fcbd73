# ruff: noqa: E501 - tables of cases
"""Compiled folders: damaged byte by byte under every engine and tool, simulated with nonsense, written to by several
at once; and builds that nobody would ask for.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.reliability.cases import MODEL, ROOT, Case, ProcessTally, Zygote, run_process, sample

TOOLS = "tyir.tools.tyir_"
FINE, REFUSED, EITHER = frozenset((0,)), frozenset((1,)), frozenset((0, 1))
PROGRAM = "llm_die0"
ENGINES = ("host", "interpreter", "edge10")


def _damaged(data: bytes, rng: random.Random) -> bytes:
    """A bit, eight bytes, a page of zeros, a cut, a piece more or less."""
    changed, at = bytearray(data), rng.randrange(max(len(data), 1))
    match rng.randrange(6):
        case 0 if data:
            changed[at] ^= 1 << rng.randrange(8)
        case 1:
            changed[at : at + 8] = rng.randbytes(8)
        case 2:
            changed[at : at + 4096] = bytes(len(changed[at : at + 4096]))
        case 3:
            del changed[at:]
        case 4:
            changed[at:at] = rng.randbytes(rng.randrange(1, 200))
        case _:
            changed += b"\0" * rng.randrange(1, 5000)
    return bytes(changed)


def _copy(source: Path, folder: Path, name: str, data: bytes) -> Path:
    """The folder by links, with one file of its own."""
    for file in source.rglob("*"):
        place = folder / file.relative_to(source)
        if file.is_file() and file.relative_to(source).as_posix() != name:
            place.parent.mkdir(parents=True, exist_ok=True)
            os.link(file, place)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)
    return folder


def test_damaged_artifacts(
    tmp_path: Path, compiled: Path, running: Zygote, tally: Callable[[str], ProcessTally], slow: bool
) -> None:
    """Each file of a folder damaged: refused by its hash; without a check harmless, or refused."""
    rng, cases = random.Random(31), []
    files = [p.relative_to(compiled).as_posix() for p in sorted(compiled.rglob("*")) if p.is_file()]
    given = ("--prompt", "The old house", "--max-tokens", "3")
    times = range(9) if slow else range(1)
    for name in files:
        if name == "empty.bin":
            continue
        for number in times:
            data = _damaged((compiled / name).read_bytes(), rng)
            if data == (compiled / name).read_bytes():
                continue
            folder = _copy(compiled, tmp_path / f"{len(cases)}", name, data)
            cases.append(Case(f"{name} {number}, run", TOOLS + "run", (folder, *given), REFUSED))
            cases.append(Case(f"{name} {number}, sim", TOOLS + "sim", (folder,), EITHER))
            for engine in ENGINES[number % 3 : number % 3 + 1] if number else ENGINES:
                words = (folder, *given, "--no-check", "--engine", engine)
                cases.append(Case(f"{name} {number}, {engine} --no-check", TOOLS + "run", words))
            words = (folder, "--no-check", *(("--check-plan",) if number % 2 else ()))
            cases.append(Case(f"{name} {number}, sim --no-check", TOOLS + "sim", words))
    count = tally("damaged artifacts")
    count.run(running, sample(cases, slow, 6))
    count.close()


@pytest.mark.slow
def test_verify_of_damaged_artifacts(
    tmp_path: Path, compiled: Path, importing: Zygote, tally: Callable[[str], ProcessTally]
) -> None:
    rng, cases = random.Random(32), []
    given = ("--against", MODEL, "--prompts", "1", "--tokens", "2")
    for name in (
        "manifest.json",
        "config.json",
        "tokenizer.json",
        "batch_1/common_die0.params",
        f"batch_1/seqlen_8/{PROGRAM}.so",
        f"batch_1/seqlen_8/{PROGRAM}.ir",
        f"batch_1/seqlen_1/{PROGRAM}.edge10",
    ):
        for number in range(3):
            data = _damaged((compiled / name).read_bytes(), rng)
            folder = _copy(compiled, tmp_path / f"{len(cases)}", name, data)
            wanted = EITHER if data == (compiled / name).read_bytes() else REFUSED
            cases.append(Case(f"verify with {name} {number}", TOOLS + "verify", (folder, *given), wanted))
    for number, against in enumerate(("", "/", "/dev/null", "/no/such", compiled, tmp_path)):
        words = (compiled, "--against", against, "--tokens", "1")
        cases.append(Case(f"verify against {number}", TOOLS + "verify", words, REFUSED))
    for words in (
        ("--tokens", "0"),
        ("--tokens", "-1"),
        ("--prompts", "0"),
        ("--prompts", "99"),
        ("--prompt", ""),
        ("--ids", ""),
        ("--ids", "-1"),
        ("--ids", "4096"),
        ("--ids", "x"),
        ("--ids", "9" * 100),
        ("--tokens", "9" * 30),
        ("--ids", ",".join(["1"] * 500)),
    ):
        name = f"verify {' '.join(words)}"[:60]
        cases.append(
            Case(
                name,
                TOOLS + "verify",
                (compiled, "--against", MODEL, *words),
                REFUSED if words[1] != "9" * 30 else EITHER,
            )
        )
    count = tally("tyir-verify")
    count.run(importing, cases)
    count.close()


# ------------------------------------------------------------------------------------------------ simulation

NUMBERS = (
    "0",
    "-1",
    "1",
    "1e308",
    "1e-308",
    "1e309",
    "nan",
    "inf",
    "-inf",
    "x",
    "",
    "9" * 400,
    "0x10",
    "1_0",
    "٣",
    " 5 ",
    "1e6",
)


def _simulations(artifacts: Path, folder: Path) -> Iterator[Case]:
    for key in (
        "dram.bandwidth_gbps",
        "dram.latency_ns",
        "clock.frequency_mhz",
        "sync.command_ns",
        "vector.startup_cycles",
        "d2d.hop_us",
    ):
        for value in NUMBERS:
            yield Case(f"--set {key}={value[:20]}", TOOLS + "sim", (artifacts, "--set", f"{key}={value}"))
    for text in (
        "",
        "=",
        "x",
        "dram",
        "dram.=1",
        ".x=1",
        "dram.bandwidth_gbps",
        "dram.bandwidth_gbps==1",
        "a.b.c=1",
        "x" * 100_000,
        "dram.bandwidth_gbps=1=2",
        "\n=1",
        "name=x",
        "like=edge10",
    ):
        yield Case(f"--set {text[:20]!r}", TOOLS + "sim", (artifacts, "--set", text), REFUSED)
        yield Case(f"--sweep {text[:20]!r}", TOOLS + "sim", (artifacts, "--sweep", text), REFUSED)
    for values in ("1,2,3", "", ",", "1,,2", "nan", "0", "-1,5", "1," * 1000 + "1", "x,y", "1e308,1e-308"):
        yield Case(
            f"--sweep of {values[:20]}",
            TOOLS + "sim",
            (artifacts, "--sweep", f"dram.bandwidth_gbps={values}"),
        )
    for option in ("--prompt-tokens", "--pos", "--top"):
        for value in (*NUMBERS, "62", "63", "64", "65", "9223372036854775807"):
            yield Case(f"{option} {value[:20]}", TOOLS + "sim", (artifacts, f"{option}={value}"))
    for option in ("-o", "--trace"):
        for place in ("/dev/full", "/dev/null/folder/x", str(folder), "", "/dev/null", "x" * 300, "/proc/x"):
            yield Case(f"{option} {place[:20]}", TOOLS + "sim", (artifacts, option, place))
    for machine in (
        "",
        "x",
        "/dev/zero",
        "/dev/null",
        str(folder),
        "../edge10",
        "h200",
        "hopper_sm",
        "edge10",
        "\0"[:0] + "a" * 5000,
    ):
        wanted = EITHER if machine else REFUSED  # nothing is not the machine that was compiled for
        yield Case(f"--machine {machine[:20]}", TOOLS + "sim", (artifacts, "--machine", machine), wanted)
    programs = [
        artifacts / f"batch_1/seqlen_8/{PROGRAM}.edge10",
        artifacts / f"batch_1/seqlen_1/{PROGRAM}.edge10",
    ]
    for words in (
        programs,
        programs[:1] * 2,
        programs[:1] * 100,
        [artifacts, artifacts],
        [artifacts, *programs],
        [artifacts, artifacts, "--compare"],
        [artifacts, "--compare"],
        [*programs, "--compare"],
        [artifacts, "--report", "x"],
        [artifacts, "--report", "html"],
        [artifacts, "--tornado", "--top", "0"],
        [artifacts, "--check-plan", "--compare"],
    ):
        yield Case(f"sim {len(words)} {words[-1]!s:.30}", TOOLS + "sim", tuple(words))


def test_simulations(
    tmp_path: Path, compiled: Path, running: Zygote, tally: Callable[[str], ProcessTally], slow: bool
) -> None:
    count = tally("tyir-sim's arguments")
    count.run(running, sample(_simulations(compiled, tmp_path), slow, 4))
    count.close()


# ---------------------------------------------------------------------------------------------------- builds


def _builds(folder: Path) -> Iterator[Case]:
    """Options of a compile that contradict the model, the machine or each other, and plans of what may do."""
    bad = {
        "--dies": ("0", "-1", "17", "1000000000", "x", "", "1.5", "2,2"),
        "--pp": ("0", "-1", "7", "100", "9" * 30, "x"),
        "--seqlens": ("0", "-1", "", ",", "1,", "x", "1.5", "9" * 30, "2147483648", "1," * 50_000 + "1"),
        "--max-kv": ("0", "-1", "2147483648", "9" * 30, "x", "1e3", ""),
        "--weights": ("int8", "", "x"),
        "--group-size": ("0", "-1", "3", "9" * 30, "x"),
        "--mesh": ("0,0", "2", "3,5", "x", "", "1,1,1,1", "-1,-4", "9" * 30 + ",1"),
        "--die-map": ("0", "0,0,0,0", "0,1,2,9999999999", "x", "", "-1,0,1,2", "3,2,1"),
        "--output": (
            "",
            "x",
            "topk",
            "topk=",
            "topk=0",
            "topk=-1",
            "topk=1e3",
            "topk=" + "9" * 30,
            "topk=5000",
            "logits=3",
            "argmax=1",
        ),
        "--batch": ("0", "-1", "1000000000", "9" * 30, "x"),
        "--kv-dtype": ("int4", "", "x"),
        "--kv-layout": ("HDN", "", "x"),
        "--machine": ("x", "/dev/zero", "/no/such", "", str(folder), "h200"),
        "--backend": ("x", "", "../edge10", "os"),
        "--mcpu": ("nonsense", "", "x" * 5000, "-mattr=+x"),
        "--base": ("/no/such", "", str(MODEL), "/dev/null"),
        "--model-plugin": ("/no/such", "/dev/null", "/dev/zero", str(folder), str(MODEL / "config.json"), ""),
    }
    for option, values in bad.items():
        for value in values:
            more = ("--weights", "int4") if option == "--group-size" else ()  # unused sizes are warned of
            words = (MODEL, "-o", folder / "out", "-q", f"{option}={value}", *more)
            yield Case(f"compile {option}={value[:20]}", TOOLS + "compile", words, REFUSED)
    for text in (
        "x = 1",
        "plugin = 5",
        "raise ValueError",
        "raise SystemExit(3)",
        "1/0",
        "import os; os.kill(os.getpid(), 0)",
        "def",
        "while True: break",
        "plugin = None",
        "\0",
        "import nothing_of_that_name",
        "from tyir.frontends.plugin import ModelPlugin\nplugin = ModelPlugin(model_class=int)",
        "from tyir.frontends.plugin import ModelPlugin\nplugin = ModelPlugin(rename=[('(', '')])",
        "from tyir.frontends.plugin import ModelPlugin\nplugin = ModelPlugin(rename=[('.*', 'x')])",
        "from tyir.frontends.plugin import ModelPlugin\nplugin = ModelPlugin(rename=5)",
        "from tyir.frontends.plugin import ModelPlugin\nplugin = ModelPlugin(base='/no/such')",
        "from tyir.frontends.plugin import ModelPlugin\nplugin = ModelPlugin(ignore=['['])",
        "from tyir.frontends.plugin import ModelPlugin, Split\nplugin = ModelPlugin(split=[Split('(.*)q_proj.weight', [(r'\\1a', 0), (r'\\1b', -5)])])",
        "from tyir.frontends.plugin import ModelPlugin, Split\nplugin = ModelPlugin(split=[Split('(.*)q_proj.weight', [(r'\\9', lambda c: 1 / 0)])])",
    ):
        path = folder / f"plugin{len(text)}.py"
        path.write_text(text, encoding="utf-8")
        words = (MODEL, "-o", folder / "m.ir", "--model-plugin", path)
        yield Case(f"plug-in {text[-40:]!r}", TOOLS + "import", words, REFUSED)
    for words in (
        ("--dies", "16"),
        ("--dies", "3", "--pp", "2"),
        ("--seqlens", "4096", "--max-kv", "4096"),
        ("--seqlens", ",".join(map(str, range(1, 200)))),
        ("--max-kv", "10000000"),
        ("--batch", "64"),
        ("--weights", "int4", "--group-size", "8"),
        ("--mesh", "2,2"),
        ("--output", "topk=4096"),
        ("--output", "argmax", "--embedding-as-input"),
    ):
        yield Case(f"plan {' '.join(words)[:40]}", TOOLS + "compile", (MODEL, "--plan", *words), EITHER)


def test_builds(tmp_path: Path, importing: Zygote, tally: Callable[[str], ProcessTally], slow: bool) -> None:
    count = tally("builds that cannot be")
    count.run(importing, sample(_builds(tmp_path), slow, 3))
    count.close()
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


# ----------------------------------------------------------------------------------------- other tools' files


def _arrays(folder: Path) -> Iterator[tuple[str, Path]]:
    header = b"\x93NUMPY\x01\x00"
    for name, data in {
        "nothing": b"", "zeros": bytes(1000), "text": b"1 2 3", "magic": header, "a long header": header + b"\xff\xff" + b" " * 65535,
        "a huge shape": header + b"v\x00" + b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000, 1000), }".ljust(117) + b"\n",
        "objects": header + b"v\x00" + b"{'descr': '|O', 'fortran_order': False, 'shape': (3,), }".ljust(117) + b"\n" + b"cos\nsystem\n(S'touch hacked'\ntR.",
        "code for a header": header + b"v\x00" + b"__import__('os').system('touch hacked')".ljust(117) + b"\n", "an archive": b"PK\x05\x06" + bytes(18),
        "pickle": b"cos\nsystem\n(S'touch hacked'\ntR.", "version 9": b"\x93NUMPY\x09\x00" + bytes(100),
    }.items():  # fmt: skip
        (folder / f"{name}.npy").write_bytes(data)
        yield name, folder / f"{name}.npy"
    os.mkfifo(folder / "pipe.npy")
    yield "a pipe", folder / "pipe.npy"
    yield "a device", Path("/dev/zero")
    yield "a folder", folder
    yield "missing", folder / "no.npy"


def _rows(folder: Path) -> Iterator[tuple[str, Path]]:
    whole = '{"kind": "model", "model": "llama3-8b", "world": 1, "batch": 1, "tokens": 1, "past": 127, "us": 4662.3}'
    changed = [whole.replace(old, new) for old, new in (
        ("4662.3", "0"), ("4662.3", "-1"), ("4662.3", "NaN"), ("4662.3", "1e999"), ("4662.3", '"x"'), ('"llama3-8b"', '"x"'), ('"llama3-8b"', "5"), ('"llama3-8b"', '"/dev/zero.json"'),
        ('"world": 1', '"world": 0'), ('"world": 1', '"world": 7'), ('"world": 1', '"world": 1000000000000'), ('"world": 1', '"world": 1.5'), ('"batch": 1', '"batch": ' + "9" * 300),
        ('"tokens": 1', '"tokens": -5'), ('"past": 127', '"past": []'), ('"past": 127, ', ""), ('"model", ', '"model", "kind": "model", '),
    )]  # fmt: skip
    texts = [
        "",
        "{",
        "[]",
        "5",
        "null",
        "\0",
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"kind": 5}',
        "9" * 5000,
        *changed,
        whole + "\n{",
        whole * 2,
    ]
    for number, text in enumerate(texts):
        (folder / f"{number}.jsonl").write_text(text, encoding="utf-8")
        yield f"{number} {text[-60:]!r}"[:60], folder / f"{number}.jsonl"
    (folder / "bytes.jsonl").write_bytes(b'{"kind": "\xff"}')
    yield "bytes", folder / "bytes.jsonl"
    os.mkfifo(folder / "pipe.jsonl")
    yield "a pipe", folder / "pipe.jsonl"
    yield "a device", Path("/dev/zero")
    yield "missing", folder / "no.jsonl"


def _others(folder: Path) -> Iterator[Case]:
    for place in ("arrays", "rows"):
        (folder / place).mkdir()
    layer = ROOT / "tests/passes/layer.ir"
    for name, path in _arrays(folder / "arrays"):
        words = (layer, "--cut", "0..1", "--arg", f"input_ids={path}", "-o", folder / "cut.ir")
        yield Case(f"reduce --arg of {name}", TOOLS + "reduce", words, REFUSED)
    for words in (
        ("--arg", ""),
        ("--arg", "="),
        ("--arg", "x=y"),
        ("--tokens", "0"),
        ("--tokens", "-1"),
        ("--tokens", "9" * 17),
        ("--tokens", "x"),
        ("--function", ""),
        ("--function", "x"),
        ("--arrays", "/dev/null"),
        ("--arrays", "/dev/null/folder/x"),
        ("--cut", ""),
        ("--cut", ".."),
        ("--cut", "%x..%y"),
        ("--cut", "9" * 30),
        ("--cut", "5..1"),
    ):
        yield Case(
            f"reduce {' '.join(words)}"[:60],
            TOOLS + "reduce",
            (layer, "--cut", "0..1", *words, "-o", folder / "cut.ir"),
            EITHER,
        )
    for words in (
        ("--command", "'"),
        ("--command", ""),
        ("--command", " "),
        ("--command", "/no/such"),
        ("--command", "true"),
        ("--command", "false", "--match", "("),
        ("--command", "false", "--match", "x"),
        ("--command", "false", "--timeout", "0"),
        ("--command", "false", "--timeout", "-1"),
        ("--command", "false", "--timeout", "nan"),
        ("--command", "sleep 100", "--timeout", "1e-9", "--match", "x"),
        ("--command", "\0"[:0] + "a" * 100_000),
    ):
        yield Case(
            f"reduce {' '.join(words)}"[:60],
            TOOLS + "reduce",
            (layer, *words, "-o", folder / "cut.ir"),
            REFUSED,
        )
    for name, path in _rows(folder / "rows"):
        yield Case(
            f"predict --rows of {name}",
            "tyir.tools.gpu.predict",
            ("--rows", path),
            EITHER if "4662.3}" in name else REFUSED,
        )
        yield Case(f"validate --data of {name}", "tyir.tools.silicon.validate", ("--data", path), REFUSED)
    for option in ("--devices", "--batch", "--past", "--measured-us"):
        for value in (
            "0",
            "-1",
            "7",
            "1000000000000",
            "9223372036854775807",
            "9" * 30,
            "x",
            "1e999",
            "nan",
            "",
        ):
            yield Case(
                f"predict {option}={value}",
                "tyir.tools.gpu.predict",
                ("--model", "llama3-8b", f"{option}={value}"),
                EITHER,
            )
    for key in (
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
    ):
        for value in ("0", "-1", "1.5", '"x"', "null", "true", "[]", "9" * 30):
            sizes = {
                "num_hidden_layers": "4",
                "hidden_size": "64",
                "num_attention_heads": "4",
                "intermediate_size": "64",
                "vocab_size": "99",
                key: value,
            }
            path = folder / f"{key}{value[:5].replace(chr(34), '')}.json"
            path.write_text("{" + ", ".join(f'"{k}": {v}' for k, v in sizes.items()) + "}", encoding="utf-8")
            yield Case(f"predict {key} = {value[:9]}", "tyir.tools.gpu.predict", ("--model", path), EITHER)


def test_other_tools(tmp_path: Path, light: Zygote, tally: Callable[[str], ProcessTally], slow: bool) -> None:
    """`tyir-reduce`, `tools.gpu.predict`, `tools.silicon.validate`: what they are given to read."""
    count = tally("files of other tools")
    count.run(light, sample(_others(tmp_path), slow, 6))
    assert not list(tmp_path.rglob("hacked")) and not (light.folder / "hacked").exists()
    count.close()


# ------------------------------------------------------------------------------------------- several at once


@pytest.mark.slow
def test_writers_of_one_cache(tmp_path: Path, compiled: Path, tally: Callable[[str], ProcessTally]) -> None:
    """Conversations that save to one file at once: it is always the cache of one of them, whole."""
    count = tally("writers of one cache")
    cache = tmp_path / "cache.npz"
    command = (
        sys.executable,
        "-m",
        "tyir.tools.tyir_run",
        str(compiled),
        "--max-tokens",
        "4",
        "--cache",
        str(cache),
    )
    for number in range(4):
        others = [
            subprocess.Popen([*command, "--prompt", f"The {word} house"], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            for word in ("old", "new", "small")
        ]  # fmt: skip
        count.add(f"round {number}", run_process((*command, "--prompt", "The old house"), tmp_path), FINE)
        for other in others:
            if other.wait():
                count.failures.append(f"round {number}: a writer was refused")
        count.add(f"round {number}, read", run_process((*command, "--prompt", "The"), tmp_path), FINE)
    if [p.name for p in tmp_path.iterdir()] != ["cache.npz"]:
        count.failures.append(f"left behind: {sorted(p.name for p in tmp_path.iterdir())}")
    count.close()


def test_nothing_is_left_in_the_temporary_folder(
    tmp_path: Path, compiled: Path, tally: Callable[[str], ProcessTally], slow: bool
) -> None:
    """Of commands that end by themselves, are refused, or are ended by a signal that can be caught."""
    count = tally("temporary folders")
    given = (
        sys.executable,
        "-m",
        "tyir.tools.tyir_run",
        str(compiled),
        "--prompt",
        "The",
        "--max-tokens",
        "2",
    )
    ended = frozenset((0, 130, 143))
    cases = [("done", given, "", FINE), ("refused", (*given, "--prompt", "a"), "", REFUSED)]
    if slow:
        for seconds in (1, 2, 3, 5, 8):
            for name in ("TERM", "INT"):
                shell = f'set -m; "$@" & sleep {seconds}; kill -{name} $!; wait $!'
                cases.append((f"{name} after {seconds} s", given, shell, ended))
        out = (sys.executable, "-m", "tyir.tools.tyir_import", str(MODEL), "-o", "m.ir")
        cases.append(("import", out, "", FINE))
    for number, (name, command, shell, wanted) in enumerate(cases):
        folder, work = tmp_path / f"t{number}", tmp_path / f"w{number}"
        folder.mkdir()
        work.mkdir()
        count.add(name, run_process(command, work, {"TMPDIR": str(folder)}, shell=shell), wanted)
        if left := sorted(p.name for p in folder.rglob("*")):
            count.failures.append(f"{name}: left {left[:5]}")
        shutil.rmtree(folder)
    count.close()

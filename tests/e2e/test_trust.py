"""What is checked is what runs: folders replaced under a session, damaged libraries, references that lead
elsewhere, code for another processor; and, slow, compiles that are killed or race each other.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tyir.artifacts.schema import sha256_of
from tyir.backends.edge10.compile import check_target
from tyir.diagnostics import TyirError
from tyir.execution import processor
from tyir.execution.artifacts import Artifacts
from tyir.manifest import BuildOptions, Manifest, file_record
from tyir.runtime_sim.session.batch_session import BatchSession
from tyir.runtime_sim.session.session import ENGINES, EngineName, Session
from tyir.runtime_sim.timing.program import load_programs
from tyir.tools.api import compile_path

IDS = [5, 17, 300]
PROMPT = "The old house stood"
PARAMS = "batch_1/common_die0.params"
LIBRARY = "batch_1/seqlen_8/llm_die0.so"
OTHER_LIBRARY = "batch_1/seqlen_1/llm_die0.so"


@pytest.fixture(scope="module")
def base(imported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trust")
    return compile_path(imported, out, BuildOptions(dies=1, seqlens=(1, 8), max_kv=32, weights="int4"))


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    """A copy to do harm to."""
    return shutil.copytree(base, tmp_path / "1die")


def list_again(folder: Path, **changes: Any) -> None:
    """The manifest for what the folder holds now: well formed, whatever was done to the files."""
    path = folder / "manifest.json"
    raw = json.loads(path.read_text())
    raw["files"] = {name: file_record(folder / name) for name in raw["files"] if (folder / name).is_file()}
    content = {k: v for k, v in {**raw, **changes}.items() if k != "sha256"}
    path.write_text(json.dumps({**content, "sha256": sha256_of(content)}))


def make_other(folder: Path) -> None:
    """Artifacts of another model of the same shapes: the embedding's rows in reverse."""
    from tyir.execution.weights import read_safetensors

    path = folder / PARAMS
    largest = max(
        (a for a in read_safetensors(path).values() if a.dtype == np.float16), key=lambda a: a.nbytes
    )
    data = bytearray(path.read_bytes())
    start = data.index(largest.tobytes())
    data[start : start + largest.nbytes] = largest[::-1].tobytes()
    path.write_bytes(data)
    list_again(folder)


def replace_folder(folder: Path) -> None:
    """As a compile does: the new folder takes the name, the old one is deleted."""
    new, old = folder.parent / "new", folder.parent / "old"
    shutil.copytree(folder, new)
    make_other(new)
    folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old)


# ----------------------------------------------------------------------------- replaced while it is in use


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("check", [True, False])
def test_a_folder_replaced_under_a_session_changes_nothing(
    folder: Path, base: Path, tmp_path: Path, engine: EngineName, check: bool
) -> None:
    """Before the first step, and between steps of two lengths; its cache is labelled as the old model's."""
    wanted = Session(base, engine).feed([*IDS, 4])
    session = Session(folder, engine, check=check)
    replace_folder(folder)
    got = [session.feed(IDS), session.feed([4])]
    np.testing.assert_array_equal(np.concatenate(got)[:3], wanted[:3])
    session.save(tmp_path / "cache.npz")
    with pytest.raises(TyirError, match="saved with other artifacts: content of the weights"):
        Session(folder, engine).restore(tmp_path / "cache.npz")
    restored = Session(base, engine)
    restored.restore(tmp_path / "cache.npz")
    assert restored.tokens == [*IDS, 4]
    assert not np.allclose(Session(folder, engine).feed(IDS), wanted[:3], atol=0.5), (
        "the other model is another"
    )


def test_a_batch_and_command_programs_are_those_that_were_opened(folder: Path, base: Path) -> None:
    artifacts = Artifacts.open(folder)
    session = BatchSession(artifacts)
    replace_folder(folder)
    assert session.generate([IDS], 4) == BatchSession(base).generate([IDS], 4)
    assert load_programs(artifacts, 8)[0].alike(load_programs(Artifacts.open(base), 8)[0])


@pytest.mark.parametrize("check", [True, False])
def test_a_cache_says_which_weights_computed_it(
    folder: Path, base: Path, tmp_path: Path, check: bool
) -> None:
    """Not which the manifest lists: without a check they may be others."""
    listed = (folder / "manifest.json").read_text()
    make_other(folder)
    (folder / "manifest.json").write_text(listed)
    if check:
        with pytest.raises(TyirError, match=r"common_die0\.params has changed"):
            Session(folder)
        return
    session = Session(folder, check=False)
    session.feed(IDS)
    session.save(tmp_path / "cache.npz")
    with pytest.raises(TyirError, match="content of the weights"):
        Session(base).restore(tmp_path / "cache.npz")


@pytest.mark.parametrize(
    "name", [LIBRARY, "batch_1/seqlen_8/llm_die0.ir", "batch_1/seqlen_8/llm_die0.edge10"]
)
def test_a_file_written_to_after_the_check_is_refused(folder: Path, name: str) -> None:
    """In place, by the same name and inode: what is read is compared with what was hashed."""
    session = Session(folder, "edge10" if name.endswith("edge10") else "host")
    with (folder / name).open("r+b") as file:
        file.seek(200)
        file.write(b"\0\1\2\3")
    with pytest.raises(TyirError, match="has been written to while it was in use"):
        session.feed(IDS)


def test_no_cache_is_saved_from_weights_that_were_written_to(folder: Path, tmp_path: Path) -> None:
    session = Session(folder)
    session.feed(IDS)
    os.utime(folder / PARAMS, (0, 0))
    with pytest.raises(TyirError, match=r"common_die0\.params has been written to"):
        session.save(tmp_path / "cache.npz")
    assert not (tmp_path / "cache.npz").exists()


# ---------------------------------------------------------------------------------------- damaged libraries


def mutations(data: bytes) -> dict[str, bytes]:
    """Ways to damage a library: in its header, its code, its tables; shorter, longer, another file."""
    chance = random.Random(1)
    middle = len(data) // 2
    found = {
        f"flip at {at}": _patch(data, at, bytes([data[at] ^ 0x55])) for at in (0, 4, 16, 18, 40, 60, 1000)
    }
    found |= {f"zero page at {n}/8": _patch(data, len(data) * n // 8, bytes(4096)) for n in range(7)}
    found |= {
        f"random at {n}": _patch(data, n, chance.randbytes(8)) for n in (64, 256, middle, len(data) - 99)
    }
    return found | {
        "cut in half": data[:middle],
        "one byte short": data[:-1],
        "one byte more": data + b"\0",
        "empty": b"",
        "zeros": bytes(len(data)),
        "text": b"#!/bin/sh\ntouch MARK\n",
        "twice": data * 2,
    }


def _patch(data: bytes, at: int, piece: bytes) -> bytes:
    return (data[:at] + piece + data[at + len(piece) :])[: len(data)]


@pytest.mark.parametrize("check", [True, False])
def test_a_damaged_library_is_refused_with_and_without_a_check(folder: Path, check: bool) -> None:
    data = (folder / LIBRARY).read_bytes()
    tried = mutations(data)
    assert len(tried) >= 16 and data not in tried.values()
    for name, damaged in tried.items():
        (folder / LIBRARY).write_bytes(damaged)
        with pytest.raises(TyirError, match=r"llm_die0\.so has (changed|\d+ bytes)"):
            pytest.fail(f"{name}: {Session(folder, check=check).feed(IDS)}")
    (folder / LIBRARY).unlink()
    with pytest.raises(TyirError, match=r"llm_die0\.so is missing"):
        Session(folder, check=check).feed(IDS)
    os.mkfifo(folder / LIBRARY)
    with pytest.raises(
        TyirError, match=r"llm_die0\.so cannot be opened: it is a named pipe, not a regular file"
    ):
        Session(folder, check=check).feed(IDS)


@pytest.mark.parametrize("check", [True, False])
def test_libraries_are_not_mixed_up(folder: Path, base: Path, check: bool) -> None:
    """Each length has its own, also when many have been loaded and dropped in this process."""
    wanted = Session(base).feed([*IDS, 4])
    for _ in range(5):
        session = Session(folder, check=check)
        np.testing.assert_array_equal(np.concatenate([session.feed(IDS), session.feed([4])])[:3], wanted[:3])
    one, eight = (folder / OTHER_LIBRARY).read_bytes(), (folder / LIBRARY).read_bytes()
    (folder / OTHER_LIBRARY).write_bytes(eight)
    (folder / LIBRARY).write_bytes(one)
    with pytest.raises(TyirError, match=r"llm_die0\.so has"):
        Session(folder, check=check).feed(IDS)


# ----------------------------------------------------------------------------------- references elsewhere


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("field", ["library", "ir", "program"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../outside", "it is not the path of a file inside the folder"),
        ("/etc/passwd", "it is not the path of a file inside the folder"),
        ("batch_1/../../outside", "it is not the path of a file inside the folder"),
        ("unlisted", "files lists no unlisted"),
        ("config.json/", "it is not the path of a file inside the folder"),
        ("", "it is not the path of a file inside the folder"),
    ],
)
def test_programs_are_files_of_the_list(
    folder: Path, check: bool, field: str, name: str, message: str
) -> None:
    raw = json.loads((folder / "manifest.json").read_text())
    for place in (folder / "unlisted", folder.parent / "outside"):
        shutil.copyfile(folder / raw["programs"][0][field], place)
    programs = [{**p, field: name} for p in raw["programs"]]
    list_again(folder, programs=programs)
    with pytest.raises(TyirError, match=message):
        Session(folder, "edge10" if field == "program" else "host", check=check).feed(IDS)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b"])
def test_listed_names_stay_in_the_folder(folder: Path, name: str) -> None:
    raw = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**raw, "files": {**raw["files"], name: {}}}))
    for check in (True, False):
        with pytest.raises(TyirError, match="it is not the path of a file inside the folder"):
            Session(folder, check=check)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("file", ["/etc/passwd", "../outside.params", "unlisted.params"])
def test_weights_are_files_of_the_list(folder: Path, engine: EngineName, file: str) -> None:
    for place in (folder / "unlisted.params", folder.parent / "outside.params"):
        shutil.copyfile(folder / PARAMS, place)
    for path in folder.rglob("*.ir"):
        path.write_text(path.read_text().replace(f'file = "{PARAMS}"', f'file = "{file}"'))
        assert file in path.read_text()
    list_again(folder)
    with pytest.raises(TyirError, match=re.escape(file)):
        Session(folder, engine).feed(IDS)


# ---------------------------------------------------------------------------------------- another processor

OLD_FLAGS = "fpu sse sse2 pni ssse3 sse4_1 sse4_2 popcnt cx16 lahf_lm"
V3_FLAGS = f"{OLD_FLAGS} avx avx2 bmi1 bmi2 f16c fma abm movbe"


@pytest.mark.parametrize(
    ("flags", "missing"),
    [
        ("fpu sse sse2", "pni"),
        (OLD_FLAGS, "avx2"),
        (V3_FLAGS.replace("fma", ""), "fma"),
        ("", "popcnt"),
    ],
)
def test_code_for_another_processor_is_refused_by_feature(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, missing: str
) -> None:
    """Before a kernel runs or a library is loaded; the other engines run."""
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags\t\t: {flags}\n")
    monkeypatch.setattr(processor, "_CPUINFO", tmp_path / "cpuinfo")
    processor.features_here.cache_clear()
    try:
        with pytest.raises(TyirError, match=rf"need .*\b{missing}\b.*which this one does not have") as caught:
            Session(base)
        assert "--engine interpreter" in caught.value.render()
        assert Session(base, "interpreter").feed(IDS).shape[0] == 3
    finally:
        processor.features_here.cache_clear()


@pytest.mark.parametrize("host", [None, {}, {"mcpu": "znver4"}, {"features": "avx2"}, []])
def test_code_for_an_unknown_processor_is_refused(folder: Path, host: object) -> None:
    raw = json.loads((folder / "manifest.json").read_text())
    list_again(folder, build={**raw["build"], "host": host})
    with pytest.raises(TyirError, match=r"build\.host"):
        Session(folder, check=False)


@pytest.mark.parametrize(
    ("mcpu", "some", "none"),
    [
        ("x86-64-v3", {"avx2", "fma", "f16c", "bmi1", "abm", "pni"}, {"avx512f", "apx"}),
        ("icelake-server", {"avx512f", "avx512_vbmi2", "gfni"}, {"avx512_fp16", "avx_vnni"}),
        ("sapphirerapids", {"avx512_fp16", "avx512_bf16", "avx_vnni"}, {"apx", "avx10_2"}),
        ("diamondrapids", {"apx", "avx10_2", "avx_ne_convert"}, {"sse4a", "xop"}),
        ("znver5", {"sse4a", "avx512_vnni"}, {"avx512_fp16"}),
    ],
)
def test_what_code_needs_is_recorded_in_words_of_the_system(
    mcpu: str, some: set[str], none: set[str]
) -> None:
    from tyir.backends.host.tvm_host import HostTarget

    features = set(HostTarget(mcpu=mcpu).features())
    assert some <= features and not none & features


def test_the_manifest_says_what_the_code_needs(base: Path) -> None:
    features = Manifest.load(base).build["host"]["features"]
    here = processor.features_here()
    assert {"popcnt", "pni"} <= set(features) and (here is None or set(features) <= here)


# ------------------------------------------------------------------------------------------- whole processes


def tool(name: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-m", f"tyir.tools.tyir_{name}", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **{**pipes, **options})


def run(name: str, *arguments: object, **options: Any) -> tuple[int, str, str]:
    process = tool(name, *arguments, **options)
    out, err = process.communicate()
    return process.returncode, out, err


def end_of(process: subprocess.Popen[str]) -> int:
    """Its exit code, once it has ended; its pipes are closed."""
    process.communicate()
    return process.returncode


def waits_for_input(process: subprocess.Popen[str]) -> bool:
    """Whether it sleeps in a read of its standard input."""
    wait = Path(f"/proc/{process.pid}/syscall")
    return process.poll() is None and wait.read_text().split()[:2] == ["0", "0x0"]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("flags", [(), ("--no-check",)])
def test_a_folder_replaced_while_tyir_run_waits(
    folder: Path, base: Path, tmp_path: Path, engine: str, flags: tuple[str, ...]
) -> None:
    given = ["--max-tokens", 4, "--engine", engine, *flags]
    code, wanted, _ = run("run", base, "--prompt", PROMPT, *given)
    assert code == 0
    process = tool("run", folder, *given, "--cache", tmp_path / "c.npz", stdin=subprocess.PIPE)
    while not waits_for_input(process):
        assert process.poll() is None
        time.sleep(0.1)
    replace_folder(folder)
    out, err = process.communicate(PROMPT)
    assert (process.returncode, out) == (0, wanted), err
    code, out, err = run("run", base, "--prompt", f"{PROMPT} at", *given, "--cache", tmp_path / "c.npz")
    assert code == 0 and "of them from the cache" in err
    shutil.copyfile(tmp_path / "c.npz", tmp_path / "d.npz")
    code, out, err = run("run", folder, "--prompt", PROMPT, *given, "--cache", tmp_path / "d.npz")
    assert code == 1 and "content of the weights" in err


@pytest.mark.slow
def test_a_signal_while_tyir_run_waits(base: Path) -> None:
    for number, code in ((signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)):
        process = tool("run", base, stdin=subprocess.PIPE)
        while not waits_for_input(process):
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(number)
        assert end_of(process) == code


def hashes(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


Compile = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def compile_here(imported: Path) -> Compile:
    """`tyir-compile` of the embedded model, of one length."""

    def start(out: Path, weights: str = "int4") -> subprocess.Popen[str]:
        options = ["--dies", 1, "--seqlens", 1, "--max-kv", 16, "--weights", weights, "-q"]
        return tool("compile", imported, "-o", out, *options)

    return start


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_signals_at_random_moments_of_a_compile(tmp_path: Path, compile_here: Compile, name: str) -> None:
    """What was there stays; what is left to go on from is gone when the next compile ends."""
    chance, target = random.Random(name), tmp_path / "1die"
    start = time.monotonic()
    assert end_of(compile_here(tmp_path)) == 0
    whole = time.monotonic() - start
    (target / "chat.npz").write_text("mine")
    number, before, struck, leftovers = getattr(signal, name), hashes(target), 0, 0
    for _ in range(6):
        process = compile_here(tmp_path)
        # the first half is Python's and the libraries' start, when nothing has been written yet
        time.sleep(whole * chance.uniform(0.4, 1.0))
        process.send_signal(number)
        code = end_of(process)
        # by the system's default where Python was still starting
        assert code in (0, -number) or (name != "SIGKILL" and code == 128 + number), code
        struck += code != 0
        assert hashes(target) == before, "the same bytes, whichever compile they are of"
        found = [p.name for p in tmp_path.iterdir() if p.name != "1die"]
        leftovers += len(found)
        assert len(found) <= 1, "each compile clears away what the one before it left"
    print(f"{name}: {struck} of 6 compiles ended by it, {leftovers} left a folder")
    assert end_of(compile_here(tmp_path)) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["1die"] and hashes(target) == before


@pytest.mark.slow
def test_two_whole_compiles_of_one_target_at_once(tmp_path: Path, compile_here: Compile) -> None:
    """One after the other they would give one of two folders; so they do at once."""
    results = []
    for weights in ("int4", "fp16"):
        assert end_of(compile_here(tmp_path / weights, weights)) == 0
        results.append(hashes(tmp_path / weights / "1die"))
    out = tmp_path / "both"
    for _ in range(3):
        processes = [compile_here(out, weights) for weights in ("int4", "fp16")]
        assert [end_of(p) for p in processes] == [0, 0]
        assert hashes(out / "1die") in results
        assert [p.name for p in out.iterdir()] == ["1die"]
        check_target(out / "1die")

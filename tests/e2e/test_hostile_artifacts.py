"""Manifests, references, saved caches and machine files that are well formed and lie: each is refused, or
does nothing.

Some of the cases are tried, all of them with `--slow`; a table at the end shows how many.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import shutil
import struct
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.hostile import DELETED, CallTally, changed, decoy, places, sample
from tyir.artifacts.schema import sha256_of
from tyir.diagnostics import TyirError
from tyir.dialects.ty import Global
from tyir.execution.artifacts import Artifacts
from tyir.execution.weights import CheckpointReader
from tyir.manifest import BuildOptions, Manifest
from tyir.parser import parse_module
from tyir.runtime_sim.session.session import Session
from tyir.runtime_sim.timing.engine import simulate
from tyir.runtime_sim.timing.program import load_programs, machine_of
from tyir.targets.machine import load_machine
from tyir.tools.api import compile_path
from tyir.types import TensorType, f16

IDS = [5, 6, 7, 8, 9]
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Made:
    """Artifacts and what they do: the bytes of the manifest, logits, nanoseconds of a step, a saved cache."""

    folder: Path
    document: dict[str, Any]
    logits: Array
    ns: float
    cache: Path

    def write(self, document: Any, *, own_hash: bool = True) -> None:
        """Another manifest, as a forger writes it: with a hash that fits."""
        if own_hash and isinstance(document, dict) and "sha256" in document:
            content = {k: v for k, v in document.items() if k != "sha256"}
            with contextlib.suppress(ValueError):  # NaN has no canonical form
                document = {**content, "sha256": sha256_of(content)}
        text = json.dumps(document, indent=1).encode("utf-8", "surrogatepass")
        (self.folder / "manifest.json").write_bytes(text)

    def same(self, engine: str = "host", check: bool = True) -> bool:
        """Whether tokens give the same logits, also from the cache, and a step the same time."""
        session = Session(self.folder, engine, check=check)  # type: ignore[arg-type]
        same = np.array_equal(session.feed(IDS), self.logits)
        programs = load_programs(session.artifacts, session.manifest.options.seqlens[-1])
        return same and simulate(programs, machine_of(session.artifacts), 3).total_ns == self.ns


TallyOf = Callable[[str], CallTally]


@pytest.fixture
def tally_of(record_property: Callable[[str, object], None]) -> TallyOf:
    """`tally_of(area)`: the count of an area."""
    return lambda area: CallTally(area, record_property)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A model of two layers on two dies."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("hostile")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).half().save_pretrained(folder / "model")
    options = BuildOptions(dies=2, seqlens=(1, 4), max_kv=32, kv_dtype="int8")
    made = compile_path(folder / "model", folder / "out", options)
    session = Session(made)
    logits = session.feed(IDS)
    session.save(folder / "cache.npz")
    ns = simulate(load_programs(session.artifacts, 4), machine_of(session.artifacts), 3).total_ns
    return Made(made, json.loads((made / "manifest.json").read_text()), logits, ns, folder / "cache.npz")


@pytest.fixture
def made(original: Made, tmp_path: Path) -> Made:
    """A copy to spoil, in a folder beside which nothing else lies."""
    folder = tmp_path / "2die"
    shutil.copytree(original.folder, folder)
    decoy(tmp_path, (folder / "batch_1" / "common_die0.params").read_bytes())
    return Made(folder, original.document, original.logits, original.ns, original.cache)


@pytest.fixture
def everything(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--slow"))


# ------------------------------------------------------------------------------------------------- manifests

SWAPPED: list[Any] = [
    None, True, False, "", "x", "1", [], {}, [0], {"a": 1}, -1, 0, 1, 2, 3, 7, 1.5, 1e308, 2**31, 2**63,
    2**70, 10**300, 100000, float("nan"), float("inf"), "../decoy-outside-file", "/etc/passwd",
    "a/../../decoy-outside-file", "./manifest.json", "\0", "\ud800", "a\nb", "x" * 300, "y" * 5000, "NHD",
    "int4", "topk=2", "machine.toml", DELETED, [[[]]], [1, 1], ["a", "a"],
]  # fmt: skip


Change = tuple[tuple[str | int, ...], Any]


def manifest_changes(document: dict[str, Any]) -> Iterator[Change]:
    """Every key of a manifest with every value above, unknown keys, lists an item too long or short."""
    for place in places(document):
        if place[0] == "programs" and len(place) > 1 and place[1] not in (0, 3):
            continue  # two of four are enough
        value: Any = document
        for key in place:
            value = value[key]
        news = [new for new in SWAPPED if type(new) is not type(value) or new != value]
        if isinstance(value, int) and not isinstance(value, bool):
            news += [value + 1, value - 1, -value, value * 1000]
        if isinstance(value, list) and value:
            news += [[*value, value[-1]], value[:-1], value[::-1]]
        yield from (
            (place, new) for new in news if new is DELETED or new != value or type(new) is not type(value)
        )
        if isinstance(value, dict):
            yield (*place, "extra"), 1
    yield ("extra",), {}


@pytest.mark.parametrize("check", [True, False], ids=["check", "no-check"])
def test_no_value_of_a_manifest_is_believed(
    made: Made, check: bool, everything: bool, tally_of: TallyOf
) -> None:
    tally = tally_of(f"manifest, {'hashes fit' if check else '--no-check'}")
    changes = list(manifest_changes(made.document))
    assert len(changes) > 5000
    for place, new in sample(changes, 150, everything):
        made.write(changed(made.document, place, new))
        tally.case(f"{place} = {new!r:.40}", lambda: made.same(check=check))
    tally.close(150)


def test_a_manifest_knows_its_own_hash(made: Made, everything: bool, tally_of: TallyOf) -> None:
    """Whatever is changed without writing the hash anew is refused, also what nobody asks for."""
    tally = tally_of("manifest, hash left")
    for place, new in sample(list(manifest_changes(made.document)), 60, everything):
        made.write(changed(made.document, place, new), own_hash=False)
        tally.case(f"{place} = {new!r:.40}", made.same, must_refuse=True)
    made.write(changed(made.document, ("model", "rms_norm_eps"), 2e-6), own_hash=False)
    with pytest.raises(TyirError, match=r"manifest\.json has changed since it was compiled"):
        Manifest.load(made.folder)
    assert Manifest.load(made.folder, check=False).options.dies == 2
    tally.close(60)


def widened(document: dict[str, Any], max_kv: int) -> dict[str, Any]:
    """A manifest whose every shape says the same wrong number of positions."""
    text = json.dumps(document)
    assert max_kv != 32
    return json.loads(text.replace(' 32,', f' {max_kv},').replace(' 32]', f' {max_kv}]').replace('"max_kv": 32', f'"max_kv": {max_kv}'))  # fmt: skip # noqa: E501


@pytest.mark.parametrize("max_kv", [31, 33, 100000])
@pytest.mark.parametrize("engine", ["host", "interpreter", "edge10"])
def test_a_manifest_that_fits_itself_is_held_against_the_programs(
    made: Made, max_kv: int, engine: str
) -> None:
    made.write(widened(made.document, max_kv))
    for check in (True, False):
        manifest = Manifest.load(made.folder, check=check)
        assert manifest.options.max_kv == max_kv
        with pytest.raises(TyirError, match=r"llm_die0\.ir has input 2 .*32.*, the manifest"):
            made.same(engine, check)
        with pytest.raises(TyirError, match=r"llm_die0\.edge10 has @.*, the manifest"):
            load_programs(Artifacts.open(made.folder, check=check), 4)


@pytest.mark.parametrize(
    ("place", "new", "said"),
    [
        (("options", "max_kv"), 100000, r"has k0: .*where the options say k0: 1x\?x100000x\?xi8"),
        (("options", "kv_layout"), "NHD", "where the options say"),
        (("options", "kv_dtype"), "fp16", "where the options say"),
        (("options", "output"), "argmax", "top_values"),
        (("options", "dies"), 3, "die 2 has 0 for length"),
        (("options", "seqlens"), [0], r"options\.seqlens\[0\] is 0"),
        (("options", "kv_lay"), "HND", "options.kv_lay is an unknown key(.|\n)*kv_layout"),
        (("programs", 0, "library"), "batch_1/seqlen_1/other.so", "files lists no batch_1/seqlen_1/other.so"),
        (("programs", 0, "library"), "../decoy-outside-file", "library is '../decoy-outside-file'"),
        (("files",), {}, "files is {}"),
        (("build", "machine"), "machine.toml", "files lists no machine.toml"),
        (("model", "vocab_size"), 95, "where the options say logits: 1x1x95xf32"),
        (("model", "num_hidden_layers"), 3, "model.num_hidden_layers is 3"),
    ],
)
def test_what_is_said_of_a_wrong_value(made: Made, place: tuple[str | int, ...], new: Any, said: str) -> None:
    made.write(changed(made.document, place, new))
    for check in (True, False):
        with pytest.raises(TyirError, match=said):
            Manifest.load(made.folder, check=check)


def test_what_is_no_manifest(made: Made, tally_of: TallyOf) -> None:
    path, tally = made.folder / "manifest.json", tally_of("manifest, the file")
    text = json.dumps(made.document)
    for name, data in {
        "empty": b"", "not JSON": b"{", "not UTF-8": b"\xff\xfe", "deep": b"[" * 200_000, "a number": b"1",
        "many digits": b'{"format": ' + b"9" * 10_000 + b"}", "NaN": text.replace("1e-06", "NaN").encode(),
        "a key twice": text.replace('"batch": 1,', '"batch": 2, "batch": 1,').encode(), "other version": b'{"format": "tyir-artifacts", "version": 1}',  # noqa: E501
        "two values": text.encode() * 2, "overflow": text.replace("1e-06", "1e999").encode(),
        "deep inside": text.replace('"vocab_size": 96', f'"vocab_size": {"[" * 5000}{"]" * 5000}').encode(),
    }.items():  # fmt: skip
        path.write_bytes(data)
        tally.case(name, made.same, must_refuse=True)
        tally.case(f"{name}, no check", lambda: made.same(check=False), must_refuse=True)
    path.unlink()
    for name, make in OTHER_THINGS.items():
        make(path)
        tally.case(name, made.same, must_refuse=True)
        tally.case(f"{name}, no check", lambda: made.same(check=False), must_refuse=True)
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    tally.close(30)


def _link_out(path: Path) -> None:
    path.symlink_to(next(p for p in [*path.parents] if list(p.glob("decoy-*"))) / "decoy-outside-file")


OTHER_THINGS: dict[str, Callable[[Path], None]] = {
    "a pipe": lambda path: os.mkfifo(path),
    "a folder": lambda path: path.mkdir(),
    "a link to itself": lambda path: path.symlink_to(path),
    "a link to nothing": lambda path: path.symlink_to(path.parent / "nothing"),
    "a device": lambda path: path.symlink_to("/dev/zero"),
}


def test_names_that_are_no_files(made: Made, tally_of: TallyOf) -> None:
    """Each kind of file of a folder, as a pipe, a folder, a device or a link out of it."""
    tally = tally_of("files of a folder")
    for name in ("batch_1/common_die0.params", "batch_1/seqlen_4/llm_die0.so", "batch_1/seqlen_4/llm_die1.ir", "batch_1/seqlen_1/llm_die0.params", "batch_1/seqlen_4/llm_die0.edge10"):  # noqa: E501  # fmt: skip
        path = made.folder / name
        data = path.read_bytes()
        for kind, make in {**OTHER_THINGS, "a link out": _link_out}.items():
            path.unlink()
            make(path)
            tally.case(f"{name} is {kind}", made.same, must_refuse=True)
            tally.case(f"{name} is {kind}, no check", lambda: made.same(check=False), must_refuse=True)
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
            path.write_bytes(data)
    tally.close(60)


# ------------------------------------------------------------------------------------------- references in IR

NAMES = [
    "../decoy-outside-file", "/etc/passwd", "batch_1/../../decoy-outside-file", "", ".", "..", "batch_1",
    "nothing", "manifest.json", "batch_1/common_die1.params", "batch_1//common_die0.params", "a" * 5000,
    "link", "pipe", "itself", "batch_1/seqlen_1/llm_die0.ir", "config.json/x",
    "loop/batch_1/common_die0.params",
]  # fmt: skip


@pytest.mark.parametrize("engine", ["host", "interpreter", "edge10"])
def test_references_of_an_ir(made: Made, engine: str, everything: bool, tally_of: TallyOf) -> None:
    tally = tally_of(f"references, {engine}")
    path = made.folder / "batch_1" / "seqlen_4" / "llm_die0.ir"
    text = path.read_text()
    lines = [line for line in text.splitlines() if '"ty.global"' in line]
    for name, target in (("link", "../decoy-outside-file"), ("itself", "itself"), ("loop", "..")):
        (made.folder / name).symlink_to(target)
    os.mkfifo(made.folder / "pipe")
    cases: list[tuple[str, str]] = []
    for number, line in enumerate(lines):
        offset, nbytes = (int(line.split(f"{key} = ")[1].split(" ")[0]) for key in ("offset", "nbytes"))
        file, key = (line.split(f'{key} = "')[1].split('"')[0] for key in ("file", "key"))
        changes = [(f'file = "{file}"', f'file = "{name}"') for name in NAMES]
        changes += [
            (f"offset = {offset}", f"offset = {new}")
            for new in (-1, 0, offset + 1, offset - 2, offset + 2, 2**62, -(2**63), offset + nbytes)
        ]
        changes += [
            (f"nbytes = {nbytes}", f"nbytes = {new}") for new in (-1, 0, nbytes - 2, nbytes + 2, 2**62)
        ]
        changes += [(f'key = "{key}"', f'key = "{new}"') for new in ("", "nothing", "__metadata__")]
        cases += [
            (f"global {number}: {new:.60}", text.replace(line, line.replace(old, new)))
            for old, new in changes
        ]
    for name, changed_text in sample(cases, 25, everything):
        path.write_text(changed_text)
        tally.case(name, lambda: made.same(engine, check=False), must_refuse=changed_text != text)
    path.write_text(cases[0][1])
    with pytest.raises(TyirError, match=r"llm_die0\.ir has @.* in '../decoy-outside-file', the manifest"):
        made.same(engine, check=False)
    tally.close(25)


def test_references_are_read_by_nobody(made: Made, tally_of: TallyOf) -> None:
    """The reader itself, which knows no manifest: what `tyir-compile` asks of an `.ir` of its own."""
    for name, target in (("link", "../decoy-outside-file"), ("itself", "itself"), ("loop", "..")):
        (made.folder / name).symlink_to(target)
    os.mkfifo(made.folder / "pipe")
    text = (made.folder / "batch_1" / "seqlen_4" / "llm_die0.ir").read_text()
    good = next(g for g in parse_module(text).body if isinstance(g, Global))
    tally, wanted = tally_of("references, reader"), CheckpointReader(made.folder).read_packed(good).copy()
    given = {n: getattr(good, n) for n in ("sym_name", "type", "file", "key", "offset", "nbytes")}
    end = good.offset + good.nbytes
    # a file that does not list its tensors (GGUF) may be meant, and constants are the same on both dies
    may_be_meant = ("manifest.json", "batch_1/seqlen_1/llm_die0.ir", "batch_1/common_die1.params")
    changes: dict[str, list[Any]] = {
        "file": [n for n in NAMES if n not in may_be_meant],
        "offset": [-1, 0, good.offset + 1, good.offset + 2, 2**62, -(2**63), end],
        "nbytes": [-1, 0, 1, good.nbytes - 2, good.nbytes + 2, 2**62],
        "key": ["", "nothing", "__metadata__"],
        "type": [TensorType(dims, f16) for dims in ((2**40, 2**40), (None, 4), (3,), ())],
    }
    for field, values in changes.items():
        for value in values:
            changed_global = Global(**{**given, field: value})
            read = partial(CheckpointReader(made.folder).read_packed, changed_global)
            tally.case(f"{field} = {value!s:.40}", lambda: np.array_equal(read(), wanted), must_refuse=True)  # noqa: B023
    tally.close(35)


def test_a_hub_cache_is_made_of_links(tmp_path: Path) -> None:
    """snapshots/REVISION/f -> ../../blobs/HASH is read; the same link anywhere else is not."""
    from tyir.artifacts.files import file_inside

    for folder in ("models--a--b/blobs", "models--a--b/snapshots/abc", "other/abc"):
        (tmp_path / folder).mkdir(parents=True)
    blob = tmp_path / "models--a--b" / "blobs" / "0123"
    blob.write_bytes(b"weights")
    for folder, target in (("models--a--b/snapshots/abc", "../../blobs/0123"), ("other/abc", str(blob))):
        (tmp_path / folder / "model.safetensors").symlink_to(target)
    snapshot = tmp_path / "models--a--b" / "snapshots" / "abc"
    assert file_inside(snapshot, "model.safetensors").read_bytes() == b"weights"
    with pytest.raises(TyirError, match="is a link out of its folder"):
        file_inside(tmp_path / "other" / "abc", "model.safetensors")
    (tmp_path / "as-it-is").symlink_to(snapshot)
    assert file_inside(tmp_path / "as-it-is", "model.safetensors").read_bytes() == b"weights"


# ---------------------------------------------------------------------------------------------- saved caches


def arrays_of(path: Path) -> dict[str, Array]:
    with np.load(path) as saved:
        return {name: saved[name] for name in saved.files}


def array_changes(name: str, array: Array) -> Iterator[tuple[str, Any]]:
    """What may be wrong with an array of a saved cache."""
    yield "missing", DELETED
    yield "no axes", np.zeros((), array.dtype)
    yield "one axis", np.zeros(3, array.dtype)
    yield "another axis", array[None]
    yield "empty", array.ravel()[:0]
    yield "turned", np.asfortranarray(array) if array.ndim > 1 else array[None].T
    yield "f64", array.astype(np.float64) if array.dtype.kind in "if" else np.zeros(2)
    yield (
        "other bytes",
        array.astype(array.dtype.newbyteorder(">")) if array.dtype.itemsize > 1 else array.view("u1"),
    )
    yield "objects", np.array([{"a": 1}], object)
    yield "records", np.zeros(array.shape, [("a", "i4"), ("b", "f8")])
    yield "text", np.array("x" * 20)
    if array.ndim > 1:
        yield "a row less", array[:, :, :-1]
        yield "a row more", np.concatenate([array, array[:, :, -1:]], axis=2)
        yield "no rows", array[:, :, :0]
    if array.dtype.kind == "f":
        for value in (math.nan, math.inf, -math.inf):
            bad = array.copy()
            bad.flat[-1] = value
            yield f"holds {value}", bad
    if name == "tokens":
        for tokens in ([], [-1], [96], [2**40], [5] * 4, [5] * 6, [5] * 33, [1.0, 2.0], [[5, 6, 7, 8, 9]], 5):
            yield f"{tokens}", np.array(tokens)
    if name == "identity":
        said = json.loads(str(array))
        for place in places(said):
            for new in (DELETED, None, "x", -1, True, 2**70, [], {}, 1.0, float("nan")):
                if type(new) is not type(said[place[0]]) or new != said[place[0]]:
                    yield f"{place} = {new!r:.20}", np.array(json.dumps(changed(said, place, new)))
        for text in ("", "{", "[]", "null", "1", "[" * 100_000, '{"dies": 2, "dies": 2}'):
            yield f"{text:.20}", np.array(text)


def written(arrays: dict[str, Any], **options: Any) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=True)
            archive.writestr(f"{name}.npy", member.getvalue())
    return file.getvalue()


def cache_files(path: Path) -> Iterator[tuple[str, bytes]]:
    """Files that are no cache of these artifacts."""
    arrays, whole = arrays_of(path), path.read_bytes()
    for name, array in arrays.items():
        for what, new in array_changes(name, array):
            yield f"{name}: {what}", written(changed(arrays, (name,), new))
    for extra in ("die9/k0", "die0/k9", "k0", "die0/", "../k0", "dieX/k0", "die-1/k0"):
        yield f"also {extra}", written({**arrays, extra: arrays["die0/k0"]})
    yield "exchanged", written({**arrays, "die0/k0": arrays["die1/v1"][..., :8]})
    yield "compressed", written(arrays, compression=zipfile.ZIP_DEFLATED)
    twice = io.BytesIO(whole)
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(twice, "a") as archive:
        archive.writestr("tokens.npy", b"")
    yield "a name twice", twice.getvalue()
    header = {"descr": "<f2", "fortran_order": False, "shape": (10**6, 10**6)}
    member = io.BytesIO()
    np.lib.format.write_array_header_1_0(member, header)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in arrays:
            archive.writestr(f"{name}.npy", member.getvalue() if name == "die0/k0" else b"\x93NUMPY\x09\x00")
    yield "two terabytes", file.getvalue()
    for end in {*range(0, len(whole), max(len(whole) // 60, 1)), len(whole) - 1}:
        yield f"cut at {end}", whole[:end]
    start = whole.rindex(b"PK\x05\x06")
    (directory,) = struct.unpack_from("<I", whole, start + 16)
    for at in range(directory, len(whole), 3):  # where each byte says something
        for bits in (0x01, 0x80, 0xFF):
            yield f"byte {at} ^ {bits}", whole[:at] + bytes([whole[at] ^ bits]) + whole[at + 1 :]
    for at in range(0, directory, 41):
        yield f"byte {at}", whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :]


@pytest.mark.parametrize("engine", ["host", "edge10"])
def test_caches_are_restored_whole_or_not(
    made: Made, tmp_path: Path, engine: str, everything: bool, tally_of: TallyOf
) -> None:
    """A file is refused and the session stays as it was, or it says what was saved (a byte that no reader of
    the format looks at may be any).
    """
    session, tally, path = (
        Session(made.folder, engine),
        tally_of(f"saved caches, {engine}"),
        tmp_path / "c.npz",
    )  # type: ignore[arg-type]
    session.restore(made.cache)
    saved = {name: array.copy() for name, array in session.engine.caches().items()}
    assert session.tokens == IDS and len(saved) == 16

    def restores() -> bool:
        session.reset()
        session.tokens = [1]
        try:
            session.restore(path)
        except TyirError:
            assert session.tokens == [1] and not session.engine.caches()
            raise
        found = session.engine.caches()
        return session.tokens == IDS and all(np.array_equal(found[n], a) for n, a in saved.items())

    for name, data in sample(list(cache_files(made.cache)), 150 if engine == "host" else 40, everything):
        path.write_bytes(data)
        tally.case(name, restores)
    path.unlink()
    for kind, make in OTHER_THINGS.items():
        make(path)
        tally.case(kind, restores, must_refuse=True)
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    tally.close(45)


def test_a_cache_names_what_it_lacks(made: Made, tmp_path: Path) -> None:
    session, path, arrays = Session(made.folder), tmp_path / "c.npz", arrays_of(made.cache)
    wrong = np.where(np.arange(5) == 3, np.nan, arrays["die1/v_scales0"]).astype(np.float16)
    for change, said in (
        ({"die0/k0": DELETED}, "has no die0/k0"),
        ({"die7/k0": arrays["die0/k0"]}, "has die7/k0, which no cache"),
        (
            {"die0/k1": arrays["die0/k1"][:, :, :4]},
            r"has die0/k1 as int8\[1, 2, 4, 16\], these tokens have int8\[1, 2, 5, 16\]",
        ),
        ({"die1/v_scales0": wrong}, "has NaN or infinity in die1/v_scales0"),
        ({"tokens": np.array([5, 6, 7, 8, 200])}, "has token 200, which is not in the vocabulary of 96"),
    ):
        path.write_bytes(written({k: v for k, v in {**arrays, **change}.items() if v is not DELETED}))
        with pytest.raises(TyirError, match=said):
            session.restore(path)
        assert session.tokens == []


# -------------------------------------------------------------------------------------------- machine files


def toml_of(value: Any) -> str:
    """A value as TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{toml_of(k)} = {toml_of(v)}' for k, v in value.items())} }}"
    if isinstance(value, list):
        return f"[{', '.join(map(toml_of, value))}]"
    return json.dumps(value) if isinstance(value, str) else repr(value).lower()


NUMBERS: list[Any] = [
    -1, 0, 1, 2.5, 1e-308, 1e308, 2**63, 10**400, 2**70, math.nan, math.inf, -math.inf, "1", True, [], {},
    "x" * 500, -0.0, 1e12, 2**50, 1e-6, DELETED,
]  # fmt: skip
TEXTS: list[Any] = ["", "guessed", " ", 1, True, [], {}, "\0", "x" * 10_000, "../decoy-outside-file", DELETED]


def machine_cases(table: dict[str, Any]) -> Iterator[tuple[str, Callable[[], str]]]:
    """Every key of a machine file with every value above, unknown and misspelt keys, other bases."""
    for place in places(table):
        value: Any = table
        for key in place:
            value = value[key]
        changes = [(place, new) for new in (TEXTS if isinstance(value, str) else NUMBERS)]
        if len(place) == 2:
            changes += [((*place, "unit"), "ns"), ((place[0], f"{place[1]}x"), value)]
        for where, new in changes:
            if where != place or type(new) is not type(value) or new != value:
                yield f"{where} = {new!r:.40}", partial(_with_change, table, where, new)
    for name in ("", "../decoy-outside-file", "/etc/passwd", "decoy-outside-file.toml", "edge11", "edge10"):
        yield f"base {name!r}", partial("base = {}\n{}".format, toml_of(name), toml_of_table(table))
    for name, text in (("digits", f"base = {'9' * 5000}"), ("deep", f"base = {'[' * 5000}"), ("a date", "base = 1979-05-27")):  # noqa: E501  # fmt: skip
        yield name, partial(str, text)


def _with_change(table: dict[str, Any], place: tuple[str | int, ...], new: Any) -> str:
    return toml_of_table(changed(table, place, new))


def toml_of_table(table: dict[str, Any]) -> str:
    return "".join(f"{toml_of(key)} = {toml_of(value)}\n" for key, value in table.items())


def test_machine_files(original: Made, tmp_path: Path, everything: bool, tally_of: TallyOf) -> None:
    """What is accepted is a machine on which a step takes a time."""
    table = tomllib.loads((resources.files("tyir.targets") / "edge10.toml").read_text())
    tally, path = tally_of("machine files"), tmp_path / "mine.toml"
    programs = load_programs(Artifacts.open(original.folder), 4)
    decoy(tmp_path, b"", "file.toml")

    def times() -> bool:
        ns = simulate(programs, load_machine(path), 3).total_ns
        return 0 < ns < math.inf

    cases = list(machine_cases(table))
    assert len(cases) > 1500
    for name, text in sample(cases, 100, everything):
        path.write_text(text(), encoding="utf-8")
        tally.case(name, times)
    path.unlink()
    for kind, make in OTHER_THINGS.items():
        make(path)
        tally.case(kind, times, must_refuse=True)
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    tally.close(100)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("frequency_mhz = { value = 1e-308", "lies between 0.001 and 1e\\+06"),
        ("frequency_mhz = { value = nan", "must be positive numbers"),
        (f"frequency_mhz = {{ value = {10**400}", "about 2\\^1329: a constant of this unit lies between"),
        ("frequency_ghz = { value = 1", "did you mean 'clock.frequency_mhz'"),
        ("frequency_mhz = { value = 1, sources = 1", "has no field sources, did you mean 'source'"),
    ],
)
def test_what_is_said_of_a_constant(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f'base = "edge10"\n[clock]\n{line}, label = "derived", source = "a test" }}\n')
    with pytest.raises(TyirError, match=said):
        load_machine(path)

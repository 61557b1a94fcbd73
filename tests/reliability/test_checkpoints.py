"""Hostile and damaged checkpoint folders: read as they are, or refused by name, with nothing run and nothing
waited for.
"""

from __future__ import annotations

import json
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.reliability.cases import MODEL, Case, ProcessTally, Zygote, sample

IMPORT = "tyir.tools.tyir_import"
REFUSED, EITHER = frozenset((1,)), frozenset((0, 1))
CONFIG: dict[str, Any] = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
_HEADER_SIZE = int.from_bytes((MODEL / "model.safetensors").read_bytes()[:8], "little")
HEADER: dict[str, Any] = json.loads((MODEL / "model.safetensors").read_bytes()[8 : 8 + _HEADER_SIZE])
Files = dict[str, bytes]


def _configs() -> Iterator[tuple[str, bytes]]:
    """Texts of config.json."""
    for name, text in (
        ("empty", ""),
        ("brace", "{"),
        ("list", "[]"),
        ("null", "null"),
        ("number", "1"),
        ("nan", "NaN"),
        ("deep lists", "[" * 100_000),
        ("deep lists closed", "[" * 5000 + "]" * 5000),
        ("deep objects", '{"a":' * 100_000),
        ("many lists", "[" + "[]," * 500_000 + "[]]"),
        ("digits", '{"a": ' + "9" * 5000 + "}"),
        ("digits of a size", '{"hidden_size": ' + "9" * 4000 + "}"),
        ("zeros", "\0" * 10_000),
        ("spaces", " " * 1_000_000),
        ("twice", '{"a": 1, "a": 2}'),
        ("model_type twice", '{"model_type": "qwen2", "model_type": "llama"}'),
        ("long string", '{"a": "' + "x" * 1_000_000 + '"}'),
        ("unclosed string", '"' + "x" * 1_000_000),
        ("surrogate", '{"model_type": "\\ud800"}'),
        ("exponent", '{"hidden_size": 1e400}'),
        ("bom", "\ufeff{}"),
    ):
        yield f"config of {name}", text.encode()
    yield "config not UTF-8", b'{"a": "\xff"}'
    yield "config of UTF-16", json.dumps(CONFIG).encode("utf-16")
    for key in (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "head_dim",
        "max_position_embeddings",
    ):
        for value in (0, -1, 1 << 40, 1 << 70, 10**300, 1.5, "x", None, True, [1], {"a": 1}):
            yield f"{key} = {str(value)[:30]}", json.dumps({**CONFIG, key: value}).encode()
    for key, values in {
        "rms_norm_eps": (-1, 0, 1e400, "x", None),
        "rope_parameters": (
            [],
            {},
            "x",
            {"rope_type": "x"},
            {"rope_type": "yarn"},
            {"rope_theta": 0},
            {"rope_theta": "x"},
        ),
        "hidden_act": ("os.system", None, 5, "x" * 100_000, []),
        "architectures": ([], None, "x", [5], ["x" * 100_000], ["Qwen2ForCausalLM"] * 1000, [None], {}),
        "model_type": (None, 5, [], "x" * 100_000, "../../x", ""),
        "layer_types": ([], "x", ["x"] * 6, ["full_attention"] * 100_000, None, [5] * 6),
        "quantization_config": (
            [],
            5,
            "x",
            {},
            {"quant_method": []},
            {"quant_method": "awq", "bits": 1 << 70},
            {"quant_method": "gptq", "group_size": 1 << 70, "bits": 4},
            {"quant_method": "compressed-tensors", "config_groups": {"a": 5}},
        ),
        "tie_word_embeddings": (None, "x", 5, []),
        "sliding_window": (-1, 1 << 70, "x", [], 0),
        "use_sliding_window": (True, "x"),
        "attention_dropout": ("x", 1e400),
        "initializer_range": (1e400, "x"),
        "auto_map": ({"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}, 5, []),
        "torch_dtype": ("x", 5, [], "float7"),
        "dtype": ("x", 5, [], "float7", "complex64"),
        "eos_token_id": (-1, "x", [1] * 100_000, 1 << 70),
        "attn_implementation": ("hub/kernel", "flash_attention_2", 5),
        "_attn_implementation": ("hub/kernel", 5),
        "num_labels": (1 << 40, -1, "x"),
        "id2label": ({str(i): "x" for i in range(1000)}, [], "x"),
        "text_config": ({"hidden_size": 5}, [], 5),
        "pruned_heads": ({"x": [1]}, 5),
        "return_dict": (5, "x"),
        "transformers_version": (5, [], "x"),
    }.items():
        for value in values:
            text = json.dumps({**CONFIG, key: value}).replace("Infinity", "1e400")
            yield f"{key} = {str(value)[:40]}", text.encode()


def _file(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def _headers() -> Iterator[tuple[str, bytes]]:
    """Contents of model.safetensors."""
    for name, data in (
        ("nothing", b""),
        ("7 bytes", b"\0" * 7),
        ("zeros", bytes(10_000)),
        ("10 GB", struct.pack("<Q", 10 << 30) + b"{}"),
        ("2^64 - 1", b"\xff" * 100),
        ("2^63", struct.pack("<Q", 1 << 63) + b"{}"),
        ("no header", _file(b"")),
        ("list", _file(b"[]")),
        ("deep", _file(b"[" * 100_000)),
        ("deep objects", _file(b'{"a":' * 100_000)),
        ("not UTF-8", _file(b'{"\xff": 1}')),
        ("digits", _file(b'{"a": ' + b"9" * 5000 + b"}")),
        ("metadata only", _file(b'{"__metadata__": {"format": "pt"}}')),
        ("metadata of 5", _file(b'{"__metadata__": 5}')),
        ("html", b"<!DOCTYPE html><html>" * 100),
        ("lfs", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"),
        ("many entries", _file(("{" + ",".join(f'"t{i}":1' for i in range(200_000)) + "}").encode())),
        (
            "many empty tensors",
            _file(
                (
                    "{"
                    + ",".join(
                        f'"t{i}":{{"dtype":"F16","shape":[0],"data_offsets":[0,0]}}' for i in range(100_000)
                    )
                    + "}"
                ).encode()
            ),
        ),
    ):
        yield f"safetensors of {name}", data
    entry = '{{"dtype": {}, "shape": {}, "data_offsets": {}}}'
    for dtype, shape, offsets in (
        ('"F16"', "[1]", "[0, 2, 4]"),
        ('"F16"', "[1]", "[2, 0]"),
        ('"F16"', "[1]", "[-2, 0]"),
        ('"F16"', "1", "[0, 2]"),
        ('"F16"', "[1.0]", "[0, 2]"),
        ('"F16"', "[9223372036854775807, 9223372036854775807]", "[0, 2]"),
        ('"F13"', "[1]", "[0, 2]"),
        ('"F16"', "[" + "1," * 20_000 + "1]", "[0, 2]"),
        ('"F16"', "[" + "9," * 20_000 + "9]", "[0, 2]"),
        ("5", "[1]", "[0, 2]"),
        ('"F16"', "[1]", "null"),
        ('"F16"', "[true]", "[0, 2]"),
        ('"F16"', "[1]", "[0, 1e300]"),
        ('"F16"', '["1"]', "[0, 2]"),
        ('"F16"', "[1]", "[0, 18446744073709551616]"),
        ('"U8"', "[1099511627776]", "[0, 1099511627776]"),
        ('"F16"', "[]", "[0, 2]"),
        ('"F16"', "[0]", "[0, 0]"),
        ('"F4"', "[3]", "[0, 2]"),
        ('"F16"', "{}", "{}"),
        ("[]", "[]", "[]"),
    ):
        one = entry.format(dtype, shape, offsets)
        yield f"tensor {one[:90]}", _file(f'{{"a": {one}}}'.encode(), b"\0\0")
    for name, second in (
        ("same bytes", "[0, 2]"),
        ("overlap", "[1, 3]"),
        ("gap", "[4, 6]"),
        ("beyond", "[2, 4]"),
    ):
        first = entry.format('"F16"', "[1]", "[0, 2]")
        both = f'{{"a": {first}, "b": {entry.format(chr(34) + "F16" + chr(34), "[1]", second)}}}'
        yield f"tensors with {name}", _file(both.encode(), b"\0" * 3)
    one = entry.format('"F16"', "[1]", "[0, 2]")
    yield "a tensor twice", _file(f'{{"a": {one}, "a": {one}}}'.encode(), b"\0\0")
    yield (
        "a key in an entry twice",
        _file(one.replace("{", '{"a": {"dtype": "F32", ', 1).encode() + b"}", b"\0\0"),
    )
    for key in (
        "",
        "\0",
        "x" * 100_000,
        "a/../b",
        "__proto__",
        "model.layers.99999999999.x",
        "model.layers.-1.x",
        "\\ud800",
        "\\n",
        "model.layers." + "9" * 4000 + ".mlp.up_proj.weight",
    ):
        yield f"tensor named {key[:30]!r}", _file(f'{{"{key}": {one}}}'.encode(), b"\0\0")


def _indexes() -> Iterator[tuple[str, bytes]]:
    """Texts of model.safetensors.index.json."""
    for name, content in (
        ("nothing", {}),
        ("a list", []),
        ("a map of numbers", {"weight_map": {"a": 1}}),
        ("a list of names", {"weight_map": ["a"]}),
        ("null", {"weight_map": None}),
        ("an empty map", {"weight_map": {}}),
        ("many files", {"weight_map": {f"t{i}": f"f{i}.safetensors" for i in range(100_000)}}),
        ("many tensors", {"weight_map": {f"t{i}": "model.safetensors" for i in range(300_000)}}),
        *(
            (f"file {n[:20]!r}", {"weight_map": {"a": n}})
            for n in (
                "../x.safetensors",
                "/etc/passwd",
                "/dev/zero",
                "a\0.safetensors",
                "",
                ".",
                "..",
                "x" * 300 + ".safetensors",
                "x" * 5000 + ".safetensors",
                "\ud800.safetensors",
                "a/b.safetensors",
                "~.safetensors",
                "model.safetensors.index.json",
                "C:\\x.safetensors",
                "\n.safetensors",
            )
        ),
        ("a deep map", {"weight_map": {"a": {"b": {}}}}),
    ):
        yield f"index of {name}", json.dumps(content).encode()
    yield "index twice", b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'
    yield "index of deep lists", b'{"weight_map": ' + b"[" * 100_000
    yield "index of 70 MB", b'{"weight_map": {}, "x": "' + b"x" * 70_000_000 + b'"}'


def _ggufs() -> Iterator[tuple[str, bytes]]:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    def start(tensors: int, pairs: int) -> bytes:
        return b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs)

    huge = 1 << 60
    name = text("general.architecture")
    yield "gguf of nothing", b""
    yield "gguf of magic", b"GGUF"
    yield "gguf of zeros", b"GGUF" + bytes(1000)
    yield "gguf of another magic", b"GGML" + bytes(1000)
    for version in (0, 1, 2, 4, 0x03000000, 1 << 31):
        yield f"gguf version {version}", b"GGUF" + struct.pack("<IQQ", version, 0, 0)
    for tensors, pairs in (
        (huge, 0),
        (0, huge),
        (huge, huge),
        (1 << 63, 0),
        (199_999, 0),
        (0, 199_999),
        (10**6, 10**6),
    ):
        yield f"gguf of {tensors} tensors and {pairs} pairs", start(tensors, pairs) + bytes(1000)
    for kind in range(16):
        yield (
            f"gguf array of {huge} of type {kind}",
            start(0, 1) + name + struct.pack("<IIQ", 9, kind, huge) + bytes(100),
        )
        yield (
            f"gguf array of 3 of type {kind}",
            start(0, 1) + name + struct.pack("<IIQ", 9, kind, 3) + bytes(100),
        )
        yield f"gguf value of type {kind}", start(0, 1) + name + struct.pack("<I", kind) + bytes(100)
    yield "gguf string of 2^60", start(0, 1) + name + struct.pack("<IQ", 8, huge) + b"x"
    yield "gguf name of 2^60", start(0, 1) + struct.pack("<Q", huge) + b"x"
    yield (
        "gguf name not UTF-8",
        start(0, 1) + struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<I", 7) + b"\1",
    )
    yield "gguf nested arrays", start(0, 1) + name + struct.pack("<IIQ", 9, 9, 1) * 1000
    yield "gguf pair twice", start(0, 2) + (name + struct.pack("<I", 8) + text("qwen2")) * 2
    for architecture in ("qwen2", "llama", "", "x" * 10_000):
        pair = name + struct.pack("<I", 8) + text(architecture)
        yield f"gguf architecture {architecture[:20]!r} alone", start(0, 1) + pair
        for dims in ((), (huge,), (huge, huge), (0, 0), (32, 32), (1,) * 4, (1,) * 5):
            body = (
                text("blk.0.attn_q.weight")
                + struct.pack("<I", len(dims))
                + struct.pack(f"<{len(dims)}Q", *dims)
            )
            for kind, offset in ((0, 0), (2, 0), (99, 0), (0, huge), (1, 7)):
                yield (
                    f"gguf {architecture[:8]!r} tensor {dims} of type {kind} at {offset}",
                    start(1, 1) + pair + body + struct.pack("<IQ", kind, offset) + bytes(100),
                )
    yield "gguf of 2^31 dimensions", start(1, 0) + text("a") + struct.pack("<I", 1 << 31) + bytes(100)


def _archive(path: Path, pickle: bytes, compression: int = zipfile.ZIP_STORED, **more: bytes) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickle)
        archive.writestr("archive/version", "3\n")
        for name, data in more.items():
            archive.writestr(name, data)


def _torch_files(folder: Path) -> Iterator[tuple[str, Path]]:
    folder.mkdir()
    laughs = (
        b"\x80\x02]q\x00"
        + b"".join(
            b"]" + b"q" + bytes([i + 1]) + b"(" + b"h" + bytes([i]) * 1 + (b"h" + bytes([i])) * 9 + b"e"
            for i in range(30)
        )
        + b"."
    )
    pickles = {
        "code": b"cos\nsystem\n(S'touch hacked'\ntR.",
        "nothing": b"",
        "dot": b".",
        "none": b"N.",
        "laughs": laughs,
        "marks": b"(" * 1_000_000 + b".",
        "deep tuple": b"N" + b"\x85" * 100_000 + b".",
        "frame": b"\x80\x04\x95" + b"\xff" * 8 + b".",
        "long": b"\x8b" + b"\xff\xff\xff\x7f" + b".",
        "string": b"\x8d" + struct.pack("<Q", 1 << 60) + b"x.",
        "memo": b"j\xff\xff\xff\xff.",
        "int": b"I" + b"9" * 100_000 + b"\n.",
        "list": b"]" + b"N" * 100 + b"e.",
        "garbage": bytes(range(256)),
        "dictionary of numbers": b"}S'a'\nI1\ns.",
        "bytearray": b"\x96" + struct.pack("<Q", 1 << 60) + b".",
    }
    for name, data in pickles.items():
        _archive(folder / f"{name}.bin", data)
        yield f"torch pickle of {name}", folder / f"{name}.bin"
    _archive(folder / "bomb.bin", b"\x80\x02" + bytes(200_000_000), zipfile.ZIP_DEFLATED)
    yield "torch zip bomb", folder / "bomb.bin"
    _archive(folder / "links.bin", b"N.", **{"../../evil": b"x", "/etc/x": b"x"})
    yield "torch names that leave", folder / "links.bin"
    for name, data in (
        ("bare pickle", pickles["code"]),
        ("nothing", b""),
        ("zip end", b"PK\5\6" + b"\xff" * 18),
        ("zeros", bytes(1000)),
    ):
        (folder / f"x {name}.bin").write_bytes(data)
        yield f"torch file of {name}", folder / f"x {name}.bin"


def _folder(path: Path, files: dict[str, bytes | Path], without: tuple[str, ...] = ()) -> Path:
    path.mkdir(parents=True)
    for source in MODEL.iterdir():
        if source.name not in (*files, *without):
            (path / source.name).symlink_to(source)
    for name, content in files.items():
        if isinstance(content, Path):
            (path / name).symlink_to(content)
        else:
            (path / name).write_bytes(content)
    return path


def test_hostile_checkpoints(
    tmp_path: Path, importing: Zygote, tally: Callable[[str], ProcessTally], slow: bool
) -> None:
    count = tally("hostile checkpoints")
    weights = ("model.safetensors",)
    folders: list[tuple[str, dict[str, bytes | Path], tuple[str, ...]]] = [
        *((name, {"config.json": data}, ()) for name, data in _configs()),
        *((name, {"model.safetensors": data}, ()) for name, data in _headers()),
        *((name, {"model.safetensors.index.json": data}, weights) for name, data in _indexes()),
        *((name, {"x.gguf": data}, (*weights, "config.json")) for name, data in _ggufs()),
        *((name, {"pytorch_model.bin": path}, weights) for name, path in _torch_files(tmp_path / "torch")),
        *(
            (f"side file of {n}", {"quantize_config.json": d}, ())
            for n, d in _configs()
            if n.startswith("config")
        ),
    ]
    cases = []
    for number, (name, files, without) in enumerate(sample(folders, slow, 6)):
        folder = _folder(tmp_path / str(number), files, without)
        flags = ("--plan",) if slow and number % 7 == 3 and "config.json" in files else ()
        cases.append(Case(name, IMPORT, (folder, "-o", tmp_path / "out.ir", *flags), EITHER))
    count.run(importing, cases)
    assert not list(tmp_path.rglob("hacked")) and not list(importing.folder.rglob("hacked"))
    count.close()


# Of the cases above, what transformers' own classes say is wrong.
_LATE = (
    "rms_norm_eps = None",
    "rope_parameters = {",
    "hidden_act = ",
    "architectures = ['Qwen2",
    "layer_types = ",
    "dtype = ",
    "torch_dtype = ",
    "quantization_config = {}",
    "tie_word_embeddings = None",
    "sliding_window = ",
    "use_sliding_window = True",
    "attention_dropout = ",
    "initializer_range = ",
    "auto_map = {",
    "eos_token_id = ",
    "attn_implementation",
    "_attn_implementation",
    "num_labels = ",
    "id2label = {",
    "text_config = {",
    "pruned_heads",
    "return_dict",
    "transformers_version",
)
_LATE_ENDS = ("= None", "= [1]")


def test_refused_before_torch_is_loaded(
    tmp_path: Path, early: Zygote, tally: Callable[[str], ProcessTally], slow: bool
) -> None:
    """What config.json and the headers say alone: the seconds that torch takes are not waited for."""
    count = tally("refused before torch is loaded")
    folders: list[tuple[str, dict[str, bytes | Path]]] = [
        *(
            (name, {"config.json": data})
            for name, data in _configs()
            if not (name.startswith(_LATE) or name.endswith(_LATE_ENDS)) or name.startswith("hidden_size")
        ),
        *(
            (name, {"model.safetensors": data})
            for name, data in _headers()
            if not name.startswith(("safetensors of many empty",))
        ),
    ]
    cases = []
    for number, (name, files) in enumerate(sample(folders, slow, 12)):
        folder = _folder(tmp_path / str(number), files)
        cases.append(Case(name, IMPORT, (folder, "-o", tmp_path / "out.ir"), REFUSED))
    count.run(early, cases)
    count.close()


def test_damaged_checkpoints(
    tmp_path: Path, importing: Zygote, tally: Callable[[str], ProcessTally], slow: bool
) -> None:
    """Random damage of config.json and of the header."""
    count, rng = tally("damaged checkpoints"), random.Random(13)
    whole = (MODEL / "model.safetensors").read_bytes()
    cases = []
    for number in range(120 if slow else 3):
        name, data = (
            ("config.json", bytearray((MODEL / "config.json").read_bytes())),
            ("model.safetensors", bytearray(whole)),
        )[number % 2]
        end = len(data) if number % 4 else min(len(data), 8 + _HEADER_SIZE)
        at = rng.randrange(8 + _HEADER_SIZE if name != "config.json" else end)
        kind = rng.randrange(5)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at : at + 8] = rng.randbytes(8)
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            del data[at : at + rng.randrange(1, 60)]
        else:
            data[at:at] = rng.randbytes(rng.randrange(1, 60))
        folder = _folder(tmp_path / str(number), {name: bytes(data)})
        cases.append(Case(f"damage {number} of {name}", IMPORT, (folder, "-o", tmp_path / "out.ir"), EITHER))
    count.run(importing, cases)
    count.close()

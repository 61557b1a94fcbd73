"""Hostile IR, pipelines, command programs and machine files: texts that stand for more than they say."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.reliability.cases import ROOT, Case, ProcessTally, Zygote, sample

OPT, DIS, SIM = "tyir.tools.tyir_opt", "tyir.tools.tyir_dis", "tyir.tools.tyir_sim"
MACHINE = "tests.reliability.probes:machine"
ANY_OP = "--allow-unregistered-dialect"
LAYER = ROOT / "tests" / "passes" / "layer.ir"
ONCE, REFUSED = frozenset((0,)), frozenset((1,))


def _doubling(mark: str, first: str, form: str, times: int, levels: int, use: str) -> str:
    lines = [f"{mark}a0 = {first}"]
    for i in range(1, levels + 1):
        lines.append(f"{mark}a{i} = " + form.format(", ".join([f"{mark}a{i - 1}"] * times)))
    return "\n".join([*lines, use.format(f"{mark}a{levels}"), ""])


_USE = '"x.op"() <{{a = {}}}> : () -> ()'
_RESULT = '"x.op"() : () -> {}'


def _bombs() -> Iterator[tuple[str, str, frozenset[int]]]:
    """Name, text, exit codes."""
    for mark, first, form, use in (
        ("#", "[1]", "[{}]", _USE),
        ("#", "{{x = 1}}".format(), "{{x = [{}]}}", _USE),
        ("#", "#x.y<1>", "#x.y<{}>", _USE),
        ("#", 'loc("a")', "loc(fused[{}])", '"x.op"() : () -> () loc({})'),
        ("#", '"' + "y" * 1000 + '"', "[{}]", _USE),
        ("!", "i32", "tuple<{}>", _RESULT),
        ("!", "i32", "!x.y<{}>", _RESULT),
        ("!", "i32", "({}) -> i1", _RESULT),
    ):
        for times, levels in ((2, 39), (10, 11), (100, 5), (3, 60)):
            name = f"{mark} {form} {times}^{levels}"
            yield name, _doubling(mark, first, form, times, levels, use), REFUSED
        yield f"{mark} {form} 2^8", _doubling(mark, first, form, 2, 8, use), ONCE
        yield f"{mark} {form} 1^500", _doubling(mark, first, form, 1, 500, use), frozenset((0, 1))
    long = '#s = "' + "y" * 1_000_000 + '"\n'
    yield "a long string often", long + '"x.op"() <{a = #s}> : () -> ()\n' * 3000, REFUSED
    yield "a long string in dictionaries", long + '"x.op"() {a = {b = #s}} : () -> ()\n' * 3000, REFUSED
    yield (
        "a long name often",
        '#l = loc("' + "y" * 1_000_000 + '")\n' + '"x.op"() : () -> () loc(#l)\n' * 3000,
        REFUSED,
    )
    yield (
        "a long type often",
        "!t = !x.y<" + "z" * 1_000_000 + ">\n" + '"x.op"() : () -> !t\n' * 3000,
        REFUSED,
    )
    for depth, fits in ((10, True), (999, True), (1002, False), (20_000, False), (100_000, False)):
        wanted = ONCE if fits else REFUSED
        yield f"regions {depth}", '"x.n"() ({\n' * depth + "}) : () -> ()\n" * depth, wanted
        yield f"modules {depth}", "module {\n" * depth + "}\n" * depth, wanted
        yield f"regions on one line {depth}", '"x.n"() ({' * depth + "}) : () -> ()" * depth, wanted
        yield f"unclosed regions {depth}", '"x.n"() ({\n' * depth, REFUSED
    yield "regions side by side", '"x.n"() (' + ", ".join(["{}"] * 20_000) + ") : () -> ()", ONCE
    for n in (50, 99):
        yield f"brackets {n}", _USE.format("[" * n + "]" * n), frozenset((0, 1))
    for opening, closing in (
        ("[", "]"),
        ("{x = ", "}"),
        ("tuple<", ">"),
        ("tensor<2x", ">"),
        ("complex<", ">"),
        ("() -> (", ")"),
        ("dense<[", "]>"),
        ("loc(callsite(", "))"),
        ("!x.y<", ">"),
        ("affine_map<(", ")>"),
        ("#x.y<[", "]>"),
        ("array<", ">"),
        ("loc(fused[", "])"),
        ("vector<", ">"),
        ("memref<", ">"),
    ):
        for n in (200, 100_000):
            yield f"nested {opening} {n}", _USE.format(opening * n + "i1" + closing * n), frozenset((0, 1))
    for number in (
        "9" * 3999,
        "9" * 5000,
        "-" + "9" * 4500,
        "0x" + "F" * 3200,
        "0x" + "F" * 3999,
        "1" * 1_000_000,
        "9" * 5000 + ".0",
        "1.0e" + "9" * 5000,
        "0x" + "0" * 100_000,
    ):
        for kind in ("i64", "i16000000", "si16777215", "ui16777215", "index", "f16", "f64"):
            yield f"number of {len(number)} as {kind}", _USE.format(f"{number} : {kind}"), frozenset((0, 1))
    yield "many wide numbers", "".join(_USE.format(f"-{i} : i16000000") + "\n" for i in range(2000)), ONCE
    yield "wide numbers out of range", _USE.format("-5 : ui16000000"), REFUSED
    for shape in (
        "9223372036854775807x9223372036854775807",
        "9223372036854775808",
        "9" * 5000,
        "1x" * 20_000 + "1",
        "3x" * 20_000 + "3",
        "1000000000000",
        "0x9223372036854775807",
        "?x9223372036854775807x4",
    ):
        yield f"shape {shape[:30]}", _RESULT.format(f"tensor<{shape}xi32>"), frozenset((0, 1))
        for value in ("1", "[1, 2]", '"0x01000000"', ""):
            constant = f"dense<{value}> : tensor<{shape}xi32>"
            yield f"dense {value} {shape[:30]}", _USE.format(constant), frozenset((0, 1))
    big = "tensor<1000000000000xi32>"
    for op, operands in (("ty.add", "%0, %0"), ("ty.mul", "%0, %0"), ("ty.sub", "%0, %0"), ("ty.silu", "%0")):
        types = ", ".join([big] * (operands.count("%")))
        text = (
            f'%0 = "ty.constant"() <{{value = dense<3> : {big}}}> : () -> {big}\n'
            f'%1 = "{op}"({operands}) : ({types}) -> {big}\n"x.use"(%1) : ({big}) -> ()\n'
        )
        yield f"{op} of a splat of 10^12", text, frozenset((0, 1))
    for shape in ("-1", "1000000000000, 1", "1000000, 1000000", "-1, -1", "0, -1"):
        text = (
            f'%0 = "ty.constant"() <{{value = dense<3> : {big}}}> : () -> {big}\n'
            f'%1 = "ty.reshape"(%0) <{{shape = array<i64: {shape}>}}> : ({big}) -> '
            "tensor<1000000x1000000xi32>\n"
        )
        yield f"reshape {shape} of a splat", text, frozenset((0, 1))
    yield "undefined names", "".join(f'"x.op"(%a{i}, %b{i}) : (i1, i1) -> ()\n' for i in range(4000)), REFUSED
    yield (
        "undefined beside defined",
        "".join(f'%c{i} = "x.op"(%a{i}) : (i1) -> i1\n' for i in range(4000)),
        REFUSED,
    )
    yield "a long undefined name", '"x.op"(%' + "a" * 1_000_000 + ") : (i1) -> ()", REFUSED
    yield (
        "undefined blocks",
        '"x.n"() ({\n'
        + "".join(f'"x.br"()[^a{i}] : () -> ()\n^c{i}:\n' for i in range(4000))
        + "}) : () -> ()",
        REFUSED,
    )
    yield "a long unknown word", _USE.format("z" * 1_000_000), REFUSED
    yield "a long unknown alias", _USE.format("#" + "z" * 1_000_000), REFUSED
    yield (
        "many aliases, one unknown",
        "".join(f"#alias{i} = {i}\n" for i in range(20_000)) + _USE.format("#alas1"),
        REFUSED,
    )
    yield "many results", '%0:999999 = "x.op"() : () -> i1', REFUSED
    yield (
        "many results named",
        ", ".join(f"%a{i}" for i in range(20_000))
        + ' = "x.op"() : () -> ('
        + ", ".join(["i1"] * 20_000)
        + ")",
        ONCE,
    )
    yield "an fp8 list", _USE.format("dense<[" + "1.5, " * 20_000 + "1.0]> : tensor<20001xf8E4M3FN>"), ONCE
    yield "a bf16 list", _USE.format("dense<[" + "1.5, " * 20_000 + "1.0]> : tensor<20001xbf16>"), ONCE
    yield "a ragged list", _USE.format("dense<[" + "[1], " * 20_000 + "1]> : tensor<20001xi8>"), REFUSED
    yield "a hex constant", _USE.format('dense<"0x' + "0F" * 1_000_000 + '"> : tensor<1000000xi8>'), ONCE
    for text in (
        '"\\',
        '"x.op"() {a = "\\GG"}',
        "\0" * 1000,
        "\ufeff",
        "\r" * 100_000,
        "//" * 100_000,
        '"' * 99_999,
        "%" * 100_000,
        "^bb" * 50_000,
        "{-#" * 1000,
        "{-# dialect_resources: {" * 1000,
        "-->" * 30_000,
        "{-# external_resources: {" + "a: {" * 20_000,
        '"x.op"() : ' + "(" * 100_000,
    ):
        yield f"text {text[:20]!r}", text, frozenset((0, 1))


BOMBS = list(_bombs())


def _files(folder: Path, texts: list[tuple[str, str, frozenset[int]]], *flags: str) -> Iterator[Case]:
    folder.mkdir(exist_ok=True)
    for number, (name, text, wanted) in enumerate(texts):
        path = folder / f"{number}.ir"
        path.write_text(text, encoding="utf-8")
        yield Case(name, OPT, (path, ANY_OP, "-o", folder / "out.ir", *flags), wanted)


def test_ir_bombs(tmp_path: Path, light: Zygote, tally: Callable[[str], ProcessTally], slow: bool) -> None:
    count = tally("IR bombs")
    picked = sample(range(len(BOMBS)), slow, 20)  # type: ignore[type-var]
    texts = [BOMBS[i] for i in picked]  # type: ignore[index]
    count.run(light, _files(tmp_path / "plain", texts, "--verify-roundtrip"))
    if slow:
        count.run(light, _files(tmp_path / "passes", texts, "--canonicalize", "--cse", "--pretty"))
    count.close()


def _damaged(base: bytes, rng: random.Random) -> bytes:
    data = bytearray(base)
    at = rng.randrange(len(data))
    kind = rng.randrange(7)
    if kind == 0:
        data[at] = rng.randrange(256)
    elif kind == 1:
        data[at : at + 8] = rng.randbytes(8)
    elif kind == 2:
        del data[at:]
    elif kind == 3:
        del data[at : at + rng.randrange(1, 100)]
    elif kind == 4:
        data[at:at] = data[at : at + rng.randrange(1, 400)] * rng.randrange(1, 20)
    elif kind == 5:
        data[at:at] = rng.choice(
            (b"<", b"{", b"[", b'"', b"(", b"#", b"!", b"%", b"\n", b"\0", b"-")
        ) * rng.randrange(1, 300)
    else:
        number = rng.choice((b"-1", b"0", b"99999999999999999999", b"9223372036854775807", b"1e999", b"?"))
        digits = [i for i, b in enumerate(data) if 48 <= b < 58]
        place = rng.choice(digits) if digits else at
        data[place : place + 1] = number
    return bytes(data)


def test_damaged_ir(tmp_path: Path, light: Zygote, tally: Callable[[str], ProcessTally], slow: bool) -> None:
    """Random damage of IR files, read and run through passes that fold."""
    count, rng = tally("damaged IR"), random.Random(11)
    folder = ROOT / "tests" / "tyir"
    bases = [(folder / n).read_bytes() for n in ("generic.ir", "pretty.ir")] + [LAYER.read_bytes()]
    cases = []
    for number in range(240 if slow else 15):
        path = tmp_path / f"{number}.ir"
        path.write_bytes(_damaged(bases[number % len(bases)], rng))
        flags = (("--canonicalize", "--cse", "--dce"), ("--pretty",), ("--inline", "--symbol-dce"))[
            number % 3
        ]
        cases.append(Case(f"damage {number}", OPT, (path, ANY_OP, "-o", tmp_path / "out", *flags)))
    count.run(light, cases)
    count.close()


_PROGRAM = (
    "quantize-weights{group-size=8},kv-materialize{max-kv=16},annotate-sharding{dies=2 strategy=split},"
    "propagate-sharding,insert-collectives,localize-dies,specialize-seqlen{seqlens=4},outline-params,outline-layers"
)


def test_damaged_programs(
    tmp_path: Path, light: Zygote, tally: Callable[[str], ProcessTally], slow: bool
) -> None:
    """Random damage of a command program's bytes, and of its text, printed and timed."""
    count, rng = tally("damaged programs"), random.Random(12)
    text, binary = tmp_path / "p.edge10", tmp_path / "p.bin"
    making = (
        Case("lower", OPT, (LAYER, "-p", _PROGRAM + ",lower-edge10{seqlen=4}", "-o", text), ONCE),
        Case("assemble", DIS, ("--assemble", text, "-o", binary), ONCE),
    )
    count.run(light, making)
    assert not count.failures, count.failures
    cases = []
    for number in range(160 if slow else 10):
        base, ending = ((binary, "bin"), (text, "edge10"))[number % 3 == 2]
        path = tmp_path / f"{number}.{ending}"
        path.write_bytes(_damaged(base.read_bytes(), rng))
        tool = (DIS, SIM)[number % 2]
        cases.append(Case(f"{tool[-3:]} {path.name}", tool, (path, "-o", tmp_path / "out")))
    deep = b"EDG10\x01" + b"\x80" * 100_000
    for name, data in (
        ("digits", deep),
        ("empty", b""),
        ("magic", b"EDG10"),
        ("version", b"EDG10\x09"),
        ("counts", b"EDG10\x01" + b"\xff" * 9 + b"\x01"),
        ("zeros", b"EDG10\x01" + bytes(1000)),
    ):
        path = tmp_path / f"{name}.bin"
        path.write_bytes(data)
        wanted = REFUSED if data else ONCE  # an empty text is an empty module
        cases.append(Case(f"program of {name}", DIS, (path,), wanted))
    count.run(light, cases)
    count.close()


_OPTIONS = {
    "annotate-sharding": ("dies", "pp", "remap", "mesh"),
    "partition-dies": ("dies", "pp", "remap", "mesh"),
    "kv-materialize": ("max-kv",),
    "lower-edge10": ("seqlen",),
    "quantize-weights": ("group-size",),
    "select-output": ("kind=topk k",),
    "specialize-batch": ("batch",),
    "specialize-seqlen": ("seqlens",),
    "view-op-graph": ("max-label-len",),
}
_BEFORE = {
    "annotate-sharding": "kv-materialize{max-kv=16},",
    "partition-dies": "kv-materialize{max-kv=16},",
    "select-output": "kv-materialize{max-kv=16},",
    "specialize-batch": "kv-materialize{max-kv=16},",
    "specialize-seqlen": "kv-materialize{max-kv=16},partition-dies{dies=2},",
    "lower-edge10": _PROGRAM + ",",
}
_VALUES = (
    "0",
    "-1",
    "2147483648",
    "9223372036854775807",
    "1" + "0" * 20,
    "9" * 5000,
    "1.5",
    "nan",
    "",
    "1,2,3",
    "99999999",
    "1000000",
    "0x10",
    "1_000",
    "[" * 1000,
    "٣",
)


def _pipelines() -> Iterator[tuple[str, frozenset[int]]]:
    for name, options in _OPTIONS.items():
        for option in options:
            for value in _VALUES:
                yield f"{_BEFORE.get(name, '')}{name}{{{option}={value}}}", frozenset((0, 1))
    yield "cse," * 100_000 + "cse", REFUSED
    yield "to-ty," * 5000 + "to-ty", REFUSED
    yield "cse," * 500 + "cse", ONCE
    yield "func.func(" * 100 + "cse" + ")" * 100, REFUSED
    yield "func.func(" * 100_000, REFUSED
    yield ")" * 100_000, REFUSED
    yield "any(" * 49 + "cse" + ")" * 49, ONCE
    yield "cse{" + "a=1 " * 100_000 + "}", REFUSED
    yield "cse{" + "a" * 1_000_000 + "=1}", REFUSED
    yield "x" * 1_000_000, REFUSED
    yield "specialize-seqlen{seqlens=" + ",".join(map(str, range(1, 100_000))) + "}", REFUSED
    yield "print-op-stats{json=" + "'" * 99_999 + "}", REFUSED
    yield "snapshot-locations{filename=/dev/null/folder/x.ir}", REFUSED
    yield "snapshot-locations{filename=/dev/full}", REFUSED
    yield "view-op-graph{file=/dev/null/folder/x}", REFUSED
    yield "lower-edge10{machine=/dev/zero}", REFUSED
    yield " " * 1_000_000 + "cse", ONCE
    yield "," * 1000, REFUSED
    yield "cse{}" * 1000, REFUSED


def test_pipelines(tmp_path: Path, light: Zygote, tally: Callable[[str], ProcessTally], slow: bool) -> None:
    count = tally("pipelines")
    cases = []
    for text, wanted in sample(_pipelines(), slow, 12):  # type: ignore[misc]
        name, option = ("--pass-pipeline", text)  # by a reproducer what an argument cannot hold
        path = tmp_path / f"{len(cases)}.ir"
        if len(text) > 100_000:
            quoted = text.replace("\\", "\\\\").replace('"', '\\"')
            path.write_text(
                '{-# external_resources: { mlir_reproducer: { pipeline: "' + quoted + '" } } #-}\n'
            )
            arguments: tuple[str | Path, ...] = (path, "--run-reproducer")
        else:
            arguments = (LAYER, name, option)
        cases.append(Case(text[:100], OPT, (*arguments, "-o", tmp_path / "out.ir"), wanted))
    count.run(light, cases)
    count.close()


_KEYS = ("dram.latency_ns", "dram.bandwidth", "clock.frequency_mhz", "die.sram_bytes")
_TOML = (
    "",
    "[",
    "a",
    "a = ",
    "[a",
    "[[a]]",
    "a = [" * 1000,
    "a = " + "[" * 100_000,
    "a = {b = " * 20_000,
    "a." * 60_000 + "b = 1",
    "[" + "a." * 60_000 + "b]",
    "a = " + "9" * 5000,
    "a = 1e99999",
    "a = nan",
    "a = 1\na = 2",
    "\0",
    "\xff",
    "a = '''" + "x" * 100_000,
    "x = 1\n" * 20_000,
    "#" * 130_000,
    "a = 1\n" * 100_000,
    'like = "edge10"',
    'like = "nothing"',
    "like = 5",
    'like = "edge10"\n[dram]\nx = 1',
    "sm = 1",
    *(
        f'like = "edge10"\n[{k.partition(".")[0]}]\n{k.partition(".")[2]} = {v}'
        for k in _KEYS
        for v in (
            "1",
            "-1",
            "{value = 1}",
            '{value = 1e-308, label = "assumed", source = "x"}',
            "[]",
            '{value = inf, label = "assumed", source = "x"}',
            "true",
        )
    ),
)


def test_machine_files(
    tmp_path: Path, light: Zygote, tally: Callable[[str], ProcessTally], slow: bool
) -> None:
    count = tally("machine files")
    cases = []
    for number, text in enumerate(sample(_TOML, slow, 8)):  # type: ignore[arg-type]
        path = tmp_path / f"{number}.toml"
        path.write_bytes(str(text).encode("latin-1"))
        cases.append(Case(f"{str(text)[:50]!r}", MACHINE, (path,)))
    count.run(light, cases)
    count.close()

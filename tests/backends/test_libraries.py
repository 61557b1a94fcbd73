"""Libraries that another process makes beside a compile are those that it makes itself."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from tyir.backends.host.kernels import EMITTERS
from tyir.backends.host.names import KERNELS
from tyir.frontends.huggingface import import_model
from tyir.printer import print_op

MODEL = Path(__file__).resolve().parents[1] / "models" / "tiny-qwen2"
COMPILE = """
import sys
from pathlib import Path
from tyir.backends.edge10.compile import CompileContext, compile_module
from tyir.process import beside
from tyir.process.stopwatch import Stopwatch
from tyir.tools.api import load_module
if sys.argv[4] == "refused":
    import os
    def refused():
        raise BlockingIOError(11, "Resource temporarily unavailable")
    os.fork = refused
if sys.argv[4] == "lost":  # while it links: it leaves what it was linking
    import os, signal
    def killed():
        (folder,) = Path(sys.argv[2]).rglob("seqlen_1")
        (folder / ".host-left").mkdir()
        (folder / ".host-left" / "0.o").write_text("half of it")
        os.kill(os.getpid(), signal.SIGKILL)
    start = beside.Beside.start
    beside.Beside.start = lambda make: start(killed)
watch, options = Stopwatch(), {"dies": 2, "seqlens": (1, 8), "max_kv": 64}
context = CompileContext(watch=watch, jobs=int(sys.argv[3]), mcpu=sys.argv[5] if sys.argv[5:] else None)
compile_module(load_module(Path(sys.argv[1])), Path(sys.argv[2]), options, context)
print("tvm" in sys.modules, sum(stage.name.startswith("host code") for stage in watch.stages))
"""


def test_every_kernel_has_a_name_without_tvm() -> None:
    assert set(EMITTERS) == KERNELS


def compiled(ir: Path, out: Path, *arguments: str) -> tuple[str, dict[str, str]]:
    """What the process says, and the files that it has written; a process of its own has one thread."""
    command = [sys.executable, "-c", COMPILE, str(ir), str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    files = sorted(p for p in out.rglob("*") if p.is_file())
    hashes = {p.relative_to(out).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    return done.stdout or done.stderr, hashes


@pytest.fixture(scope="module")
def ir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ir") / "model.ir"
    path.write_text(print_op(import_model(MODEL)))
    return path


def test_the_same_files_with_a_process_beside_and_without(ir: Path, tmp_path: Path) -> None:
    said, alone = compiled(ir, tmp_path / "alone", "1", "-")
    assert said == "True 4\n", "one process, which loads TVM, makes the libraries of 2 dies and 2 lengths"
    said, beside = compiled(ir, tmp_path / "beside", "2", "-")
    assert said == "False 4\n", "another process makes them, and says what it took the time for"
    assert beside == alone
    said, lost = compiled(ir, tmp_path / "lost", "2", "lost")
    assert said == "True 4\n", "they are made here when the other process is lost"
    assert lost == alone
    said, refused = compiled(ir, tmp_path / "refused", "2", "refused")
    assert said == "True 4\n", "they are made here when the system has no room for another process"
    assert refused == alone


def test_what_is_refused_there_is_refused_here(ir: Path, tmp_path: Path) -> None:
    said, files = compiled(ir, tmp_path / "out", "2", "-", "pentium")
    assert "TyirError" in said and "has 32 bits" in said, said
    assert files == {}

"""An install without extras executes, serves from Python and simulates artifacts; what needs more says what.

A process in which every library is absent that the base dependencies do not bring.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ABSENT = '''
import re, sys, tomllib
from importlib import metadata
from pathlib import Path

def name_of(requirement):
    return re.sub(r"[-_.]+", "-", re.match(r"[A-Za-z0-9_.-]+", requirement)[0]).lower()

kept, todo = {"tyir", "pip", "setuptools", "coverage"}, list(
    tomllib.loads(Path(sys.argv[1], "pyproject.toml").read_text())["project"]["dependencies"])
while todo:
    name = name_of(todo.pop())
    if name in kept:
        continue
    kept.add(name)
    try:
        todo += [r for r in metadata.requires(name) or () if "extra ==" not in r]
    except metadata.PackageNotFoundError:
        pass  # for another system or Python
absent = {module for module, owners in metadata.packages_distributions().items()
          if not kept & {name_of(owner) for owner in owners}}
assert {"torch", "transformers", "fastapi", "safetensors"} <= absent

class Installed:
    """All other finders, for what is installed."""
    def __init__(self, finders):
        self.finders = finders
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            return None
        found = (f.find_spec(name, path, target) for f in self.finders)
        return next((spec for spec in found if spec is not None), None)
    def invalidate_caches(self):
        pass

sys.meta_path[:] = [Installed(sys.meta_path[:])]
folder = sys.argv[2]
'''
RUN = """
from tyir import BatchSession, Session
made = list(Session(folder).generate([5, 6, 7], 4))
assert len(made) == 4
assert list(Session(folder, "interpreter").generate([5, 6, 7], 1)) == made[:1]

from tyir.runtime_sim.serving.engine import Engine
from tyir.runtime_sim.serving.generation import Generation

class Listener:
    def __init__(self):
        self.tokens, self.finish = [], None
    def prompt(self, scored): ...
    def token(self, scored, finish):
        self.tokens.append(scored.token)
        return finish
    def ended(self, finish):
        self.finish = finish

engine, heard = Engine(BatchSession(folder)), Listener()
engine.add(Generation([5, 6, 7], heard, 4))
while engine.step():
    pass
assert heard.tokens == made and heard.finish.reason == "length"

from tyir.tools import tyir_bench_serving, tyir_compile, tyir_quantize, tyir_run, tyir_serve, tyir_sim
assert tyir_run.main([folder, "--ids", "5,6,7", "--max-tokens", "4"]) == 0
assert tyir_sim.main([folder]) == 0
assert tyir_bench_serving.main([folder, "--num-prompts", "2", "--input-len", "8", "--output-len", "4"]) == 0
for tool, arguments in (
    (tyir_run, [folder, "--prompt", "a"]),
    (tyir_serve, [folder]),
    (tyir_compile, [sys.argv[1] + "/tests/models/tiny-qwen2", "-o", folder + "/../not-made"]),
    (tyir_quantize, [sys.argv[1] + "/tests/models/tiny-qwen2", "-o", folder + "/../not-made"]),
):
    print(tool.__name__, tool.main(arguments), file=sys.stderr)
loaded = {m.partition(".")[0] for m in sys.modules if sys.modules[m] is not None} & absent
assert not loaded, loaded
"""


def test_without_extras(four: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", ABSENT + RUN, str(ROOT), str(four)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("pip install 'tyir[") == 4, done.stderr
    for words in ("tyir_run 1", "tyir_serve 1", "tyir_compile 1", "tyir_quantize 1", "tyir[compile]"):
        assert words in done.stderr
    assert "tyir[serve]" in done.stderr and "internal error" not in done.stderr


@pytest.mark.parametrize("script", ["tools/demo", "tools/test"])
def test_the_readmes_commands_install_all_that_they_need(script: str) -> None:
    """They source what installs the extra `dev`, which holds the others."""
    import tomllib

    assert "_setup.sh" in (ROOT / script).read_text()
    assert ".[dev]" in (ROOT / "tools" / "_setup.sh").read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"tyir[compile]", "tyir[serve]"} <= set(extras["dev"])
    assert any(r.startswith("torch==") for r in extras["compile"]), (
        "_setup.sh installs it first, by this line"
    )

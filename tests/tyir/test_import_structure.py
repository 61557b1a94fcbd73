"""transformers is told what its models export without reading them again, and is told the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tyir.process.import_structure import _FUNCTION, _kept, import_structure_kept

# What transformers knows of its models, and how many of their files were opened for it.
PROGRAM = """
import json, sys
from contextlib import nullcontext
from tyir.process.import_structure import import_structure_kept

opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
before = list(sys.meta_path)
with {context}:
    import transformers
    from transformers import AutoTokenizer
assert [f for f in sys.meta_path if f in before] == before
assert "import_structure" not in sys.modules["transformers.utils.import_utils"].create_import_structure_from_path.__module__

def plain(value):
    if isinstance(value, dict):
        return sorted((repr(sorted(k) if isinstance(k, frozenset) else k), plain(v)) for k, v in value.items())
    return sorted(map(str, value)) if isinstance(value, (set, frozenset, list, tuple)) else str(value)

known = {{
    f"{{module.__name__}}.{{name}}": plain(getattr(module, name))
    for module in (transformers, transformers.models)
    for name in ("_import_structure", "_class_to_module", "_object_missing_backend", "_modules", "__all__")
}}
print(json.dumps([known, sum("/transformers/models/" in p and p.endswith(".py") for p in opened)]))
"""  # noqa: E501


def known(context: str, cache: Path) -> tuple[dict[str, Any], int]:
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    program = PROGRAM.format(context=context)
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=cache, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    names, opened = json.loads(done.stdout)
    return names, opened


def test_transformers_knows_what_it_would_have_found(tmp_path: Path) -> None:
    wanted, all_files = known("nullcontext()", tmp_path)
    found, read = known("import_structure_kept()", tmp_path)
    again, few = known("import_structure_kept()", tmp_path)
    assert found == wanted and again == wanted
    assert few < 100 < read < all_files, "files of models that were opened"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the two that count, and a cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "utils").mkdir()
    (tmp_path / "utils" / "import_utils.py").write_text("")
    (tmp_path / "models" / "one").mkdir(parents=True)
    (tmp_path / "models" / "one" / "modeling_one.py").write_text("__all__ = ['One']\n")
    return tmp_path


def asked(package: Path, answer: Any) -> tuple[Callable[[Any], Any], list[str]]:
    """The function as a process gets it, and the folders that it asks the original about."""
    asked_for: list[str] = []

    def find(path: str | os.PathLike[str]) -> Any:
        asked_for.append(os.fspath(path))
        return answer

    return _kept(find, str(package / "utils" / "import_utils.py")), asked_for


ANSWER = {"one": {frozenset({"torch"}): {"modeling_one": {"One"}}, frozenset(): {}}}


def test_it_is_asked_once_for_each_state(package: Path) -> None:
    models, one = package / "models", package / "models" / "one" / "modeling_one.py"
    first, of_first = asked(package, ANSWER)
    assert first(models) == ANSWER and first(str(models)) == ANSWER
    given = first(models)
    given["one"].clear()  # which is the caller's
    assert first(models) == ANSWER
    (models / "__init__.py").write_text("")
    assert len(of_first) == 1

    second, of_second = asked(package, ANSWER)
    assert second(models / "__init__.py") == ANSWER and len(of_second) == 1, "a file more"
    third, of_third = asked(package, ANSWER)
    assert third(models) == ANSWER and not of_third
    status = one.stat()
    one.write_text("__all__ = ['Two']\n")
    os.utime(one, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    fourth, of_fourth = asked(package, {"one": {}})
    assert fourth(models) == {"one": {}} and len(of_fourth) == 1, "another time of change"


def test_other_folders_are_asked_about(package: Path) -> None:
    find, asked_for = asked(package, ANSWER)
    for _ in range(2):
        assert find(package / "models" / "one") == ANSWER
    assert len(asked_for) == 2


def test_what_cannot_be_kept_is_given(package: Path) -> None:
    odd = {"one": object()}
    for _ in range(2):
        find, asked_for = asked(package, odd)
        assert find(package / "models") is odd and len(asked_for) == 1


def test_a_cache_that_cannot_be_had_or_is_damaged(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find, _ = asked(package, ANSWER)
    assert find(package / "models") == ANSWER
    (piece,) = (p for p in (package / "cache" / "tyir" / "pieces").rglob("*") if p.is_file())
    piece.chmod(0o600)
    piece.write_bytes(b"something else")
    find, asked_for = asked(package, ANSWER)
    assert find(package / "models") == ANSWER and len(asked_for) == 1
    (package / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(package / "file"))
    find, asked_for = asked(package, ANSWER)
    assert find(package / "models") == ANSWER and find(package / "models") == ANSWER and len(asked_for) == 1


def test_a_module_that_is_loaded_is_left_as_it_was() -> None:
    from transformers.utils import import_utils

    original = getattr(import_utils, _FUNCTION)
    with import_structure_kept():
        assert getattr(import_utils, _FUNCTION) is not original
        assert import_utils.define_import_structure(str(Path(import_utils.__file__).parents[1] / "models"))
    assert getattr(import_utils, _FUNCTION) is original

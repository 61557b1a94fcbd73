"""The wheel holds what the folders hold: `packages` in pyproject.toml is written by hand, and a forgotten one
would be missing silently.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
FOLDERS: dict[str, str] = SETUPTOOLS["package-dir"]
SCRIPTS: dict[str, str] = PYPROJECT["project"]["scripts"]

# Read in the checkout only: descriptions of folders, and the commands that set the checkout up.
NOT_SHIPPED = (
    "README.md",
    "tools/_setup.sh",
    "tools/test",
    "tools/test_busy",
    "tools/demo",
    "tools/demo_text.txt",
)


def project_files() -> Iterator[tuple[str, Path]]:
    """(path in the wheel, path in the checkout) of every file in the mapped folders."""
    for package, folder in FOLDERS.items():
        for file in sorted((ROOT / folder).rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                inside = file.relative_to(ROOT / folder).as_posix()
                yield f"{package.replace('.', '/')}/{inside}", file


def shipped(file: Path) -> bool:
    return not file.relative_to(ROOT).as_posix().endswith(NOT_SHIPPED)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the checkout, built from a copy: a build in place keeps deleted modules in `build/lib`."""
    copy = tmp_path_factory.mktemp("wheel") / "tyir"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "_build_backend.py"):
        shutil.copy(ROOT / name, copy)
    for folder in FOLDERS.values():
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    dist = copy / "dist"
    pip(["wheel", ".", "--no-deps", "--no-build-isolation", "--wheel-dir", str(dist)], copy)
    (built,) = dist.glob("*.whl")
    return built


@pytest.mark.parametrize(
    "imported",
    ["from tyir import build_and_compile_llm", "import tyir.passes.cse", "from tyir.tools import cli"],
)
@pytest.mark.parametrize("beside", [True, False])
def test_an_editable_install_is_found_beside_its_clone(
    editable: Path, imported: str, beside: bool, tmp_path: Path
) -> None:
    """A folder called `tyir` in the current one, the clone itself or another, does not hide the package."""
    place = editable.parents[2] if beside else tmp_path
    (place / "tyir").mkdir(exist_ok=True)
    done = subprocess.run([editable, "-c", imported], cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_editable_install_sees_new_files(editable: Path, tmp_path: Path) -> None:
    for package in ("passes", "tyir"):
        new = editable.parents[2] / "tyir" / package / "appeared.py"
        new.write_text("HERE = 1\n")
        name = "tyir.appeared" if package == "tyir" else f"tyir.{package}.appeared"
        done = subprocess.run([editable, "-c", f"import {name}"], cwd=tmp_path, capture_output=True)
        new.unlink()
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def editable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The python of an environment with an editable install of a clone called `tyir` beside it."""
    folder = tmp_path_factory.mktemp("editable")
    copy = folder / "tyir"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "_build_backend.py"):
        shutil.copy(ROOT / name, copy)
    for name in (*FOLDERS.values(), "src"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    environment = folder / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    (site,) = environment.glob("lib/python*/site-packages")
    libraries = [path for path in sys.path if Path(path).name == "site-packages"]
    (site / "zz_libraries.pth").write_text("\n".join(libraries) + "\n", encoding="utf-8")
    options = ["--no-deps", "--no-build-isolation", "--no-compile", "--ignore-installed"]
    pip(["--python", str(python), "install", *options, "-e", str(copy)], folder)
    return python


def pip(arguments: list[str], folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_packages_on_disk_are_the_packages_of_pyproject() -> None:
    on_disk = {
        name.rpartition("/")[0].replace("/", ".")
        for name, _ in project_files()
        if name.endswith("/__init__.py")
    }
    assert on_disk == set(SETUPTOOLS["packages"])


def test_every_folder_with_modules_is_a_package() -> None:
    folders = {file.parent for _, file in project_files() if file.suffix == ".py"}
    assert [
        folder.relative_to(ROOT) for folder in sorted(folders) if not (folder / "__init__.py").exists()
    ] == []


def test_no_core_module_is_hidden_by_a_mapped_folder() -> None:
    mapped = {package.partition(".")[2] for package in FOLDERS} - {""}
    assert [path.name for path in (ROOT / "tyir").iterdir() if path.stem in mapped] == []


def test_every_script_has_its_function() -> None:
    missing = []
    for script, target in SCRIPTS.items():
        module, _, function = target.partition(":")
        package, _, name = module.rpartition(".")
        file = ROOT / FOLDERS[package] / f"{name}.py"
        if not file.exists() or f"def {function}(" not in file.read_text(encoding="utf-8"):
            missing.append(f"{script} = {target}")
    assert not missing, missing


def test_wheel_holds_exactly_the_project(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    metadata = {name for name in names if name.partition("/")[0].endswith(".dist-info")}
    assert {name.partition("/")[0] for name in names - metadata} == {"tyir"}
    assert len({name.partition("/")[0] for name in metadata}) == 1
    expected = {name for name, file in project_files() if shipped(file)}
    missing, unexpected = sorted(expected - names), sorted(names - metadata - expected)
    assert not missing, (
        f"not in the wheel: {missing}; add the kind of file to package-data, or the file to NOT_SHIPPED"
    )
    assert not unexpected, f"in the wheel but not in the checkout: {unexpected}"


def test_installed_wheel_works_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """In an environment of its own, which finds the libraries (not the editable tyir) of this one by a path
    file.
    """
    environment = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    pip(["--python", str(python), "install", "--no-deps", "--no-compile", str(wheel)], tmp_path)
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")

    where = (
        "import importlib, sys; print(*(importlib.import_module(name).__file__ for name in sys.argv[1:]),"
        " sep='\\n')"
    )
    done = subprocess.run([python, "-c", where, *FOLDERS], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(Path(line).is_relative_to(site) for line in done.stdout.split()), done.stdout

    done = subprocess.run(
        [environment / "bin" / "tyir-opt", "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "tyir-opt" in done.stdout

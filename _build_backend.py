"""setuptools' build backend, with editable installs that a folder called `tyir` does not hide.

An editable install of packages that lie side by side (`tyir/`, `passes/`, ...) is a finder, which Python
asks last.  Before that it takes any folder of the name on its path for a namespace package: a script beside
a clone called `tyir` would import the clone's folder.  A regular package on the path goes before namespace
packages wherever it stands, so `src/`, where `tyir` is a link to the package, is put on the path as well; the
finder still supplies `tyir.passes` and the others.  (PEP 420, "Specification"; PEP 660.)
"""

from __future__ import annotations

import base64
import hashlib
import zipfile
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 - the other hooks are setuptools' own

_PATH_FILE = "__tyir_checkout__.pth"


def build_editable(
    wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None
) -> str:
    """setuptools' editable wheel, with a path file that names `src/` of this checkout."""
    name: str = build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
    wheel = Path(wheel_directory) / name
    line = f"{Path(__file__).resolve().parent / 'src'}\n".encode()
    digest = base64.urlsafe_b64encode(hashlib.sha256(line).digest()).rstrip(b"=").decode()
    with zipfile.ZipFile(wheel) as built:
        files = {info: built.read(info) for info in built.infolist()}
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as changed:
        for info, data in files.items():
            if info.filename.endswith(".dist-info/RECORD"):
                data += f"{_PATH_FILE},sha256={digest},{len(line)}\n".encode()
            changed.writestr(info, data)
        changed.writestr(_PATH_FILE, line)
    return name

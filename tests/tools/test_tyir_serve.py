"""What `tyir-serve` says before it serves."""

from __future__ import annotations

import importlib.util
import socket
import sys
from pathlib import Path

import pytest

from tyir.tools.tyir_serve import main


def test_what_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.delitem(sys.modules, "uvicorn", raising=False)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "uvicorn" else found(name, *a)
    )
    assert main(["out/4die"]) == 1
    said = capsys.readouterr().err
    assert "serving needs uvicorn, which is not installed" in said and "pip install 'tyir[serve]'" in said


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
    empty = tmp_path / "keys"
    empty.write_text("\n")
    for arguments, words in (
        (["--port", "99999"], "give 0 (a free one) to 65535"),
        (["--prefill-share", "0"], "--prefill-share 0.0 is out of range"),
        (["--max-queue", "-1"], "--max-queue -1 is out of range"),
        (["--chat-template", str(tmp_path / "none")], "none: No such file or directory"),
        (["--api-key-file", str(empty)], "holds no key"),
        ([], "holds no manifest.json"),
    ):
        assert main([str(tmp_path), *arguments]) == 1
        assert words in capsys.readouterr().err


def test_a_port_that_is_taken() -> None:
    pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
    from tyir.diagnostics import TyirError
    from tyir.tools.serve.running import listen

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(TyirError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            listen("127.0.0.1", port)

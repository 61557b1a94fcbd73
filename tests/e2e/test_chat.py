"""`tyir-chat`: what was said is remembered, commands, Ctrl-C; and `tyir-run` with ids for a prompt."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tyir.runtime_sim.session.session import Session
from tyir.tools.tokenizer import load_tokenizer
from tyir.tools.tyir_chat import main as chat
from tyir.tools.tyir_run import main as run

Artifacts = Callable[[int, str], Path]
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"
FIRST, SECOND = "The old house stood", "She looked at him"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def template(tmp_path: Path) -> Path:
    """The embedded model has none of its own."""
    path = tmp_path / "chat_template.jinja"
    path.write_text(TEMPLATE)
    return path


@pytest.fixture
def say(
    artifacts: Artifacts, template: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """`say(lines, *options)`: the exit code, standard output, standard error."""

    def typed(lines: list[str], *options: str, terminal: bool = False) -> tuple[int, str, str]:
        text = "".join(f"{line}\n" for line in lines)
        monkeypatch.setattr("sys.stdin", Terminal(text) if terminal else io.StringIO(text))
        words = [str(artifacts(1, "fp16")), "--chat-template", str(template), "--max-tokens", "6", *options]
        return chat(words), *capsys.readouterr()

    return typed


def test_what_was_said_is_told_and_not_computed_again(
    say: Callable[..., tuple[int, str, str]], artifacts: Artifacts
) -> None:
    lines = [FIRST, "", SECOND, "/reset", SECOND, "/quit", "not read"]
    code, out, _ = say(lines, "--system", "Be brief.", "--json")
    assert code == 0
    told = json.loads(out)["prompts"]
    first, second, anew = (turn["prompt"] for turn in told)
    system = "[system] Be brief.\n"
    assert first == f"{system}[user] {FIRST}\n[assistant]"
    assert second == f"{first} {told[0]['text']}\n[user] {SECOND}\n[assistant]"
    assert anew == f"{system}[user] {SECOND}\n[assistant]"
    assert told[0]["reused_tokens"] == 0 < told[1]["reused_tokens"]
    session = Session(artifacts(1, "fp16"))
    tokenizer = load_tokenizer(session.artifacts)
    for turn in told:
        assert turn["tokens"] == list(session.generate(tokenizer(turn["prompt"])["input_ids"], 6))
        session.reset()


def test_answers_are_streamed_one_a_line(say: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = say([FIRST, SECOND])
    texts = [turn["text"] for turn in json.loads(say([FIRST, SECOND], "--json")[1])["prompts"]]
    assert (code, out) == (0, "".join(f"{text}\n" for text in texts))
    assert err.count("ended after 6 tokens") == 2 and err.count("loaded in") == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/rest", "did you mean '/reset'?"),
        ("/picture a.png", "there is no command /picture"),
        ("/image", "no file is named"),
        ("/video 'a", "close the quotation"),
        ("word " * 400, "of the cache's 128 positions"),
    ],
)
def test_a_turn_that_cannot_be(line: str, said: str, say: Callable[..., tuple[int, str, str]]) -> None:
    """At a terminal it is told and taken back; from a pipe it ends the chat."""
    code, out, err = say([line, FIRST], terminal=True)
    assert code == 0 and said in err
    assert out == say([FIRST])[1]
    code, out, err = say([line, FIRST])
    assert (code, out) == (1, "") and said in err


@pytest.mark.parametrize("after", [1, 3])
def test_an_interrupt_ends_the_answer(
    after: int, say: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next question is answered, knowing what was said; twice ends the program, as once in a pipe."""
    whole = [turn["tokens"] for turn in json.loads(say([FIRST], "--json")[1])["prompts"]]
    generate = Session.generate
    state: dict[str, Any] = {"times": 1, "turn": 0}

    def interrupted(self: Session, *given: Any, **options: Any) -> Iterator[int]:
        state["turn"] += 1
        for number, token in enumerate(generate(self, *given, **options), 1):
            if state["turn"] == 1 and number == after:
                for _ in range(state["times"]):
                    os.kill(os.getpid(), signal.SIGINT)
            yield token

    monkeypatch.setattr(Session, "generate", interrupted)
    code, out, _ = say([FIRST, SECOND], "--json", terminal=True)
    first, second = json.loads(out)["prompts"]
    assert code == 0 and first["ended"] == "by Ctrl-C" and first["tokens"] == whole[0][:after]
    assert (FIRST in second["prompt"]) == bool(first["text"].strip())  # nothing said: as if not asked
    assert len(second["tokens"]) == 6
    state |= {"times": 2, "turn": 0}
    assert say([FIRST, SECOND], terminal=True)[0] == 130
    state |= {"times": 1, "turn": 0}
    assert say([FIRST, SECOND])[0] == 130
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_at_the_prompt_ends_nothing(
    say: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    readline, calls = Terminal.readline, iter((True, False))

    def interrupted(self: Terminal, *size: int) -> str:
        if next(calls, False):
            os.kill(os.getpid(), signal.SIGINT)
        return readline(self, *size)

    monkeypatch.setattr(Terminal, "readline", interrupted)
    code, out, err = say([FIRST], terminal=True)
    assert code == 0 and "/quit or Ctrl-D ends the chat" in err and out == say([FIRST])[1]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file"),
        (b"\xff", "chat_template.jinja is not UTF-8 text"),
        (b"\xef\xbb\xbf{{ messages }}", "chat_template.jinja begins with a byte order mark"),
        (b"<!DOCTYPE html>", "chat_template.jinja is a web page, not the file itself"),
        (b"{{ messages", "the chat template cannot be applied"),
        (b"nothing of it", "it leaves the question out"),
    ],
)
def test_a_template_that_cannot_be(
    content: bytes | None, said: str, template: Path, say: Callable[..., tuple[int, str, str]]
) -> None:
    if content is None:
        template.unlink()
    else:
        template.write_bytes(content)
    code, out, err = say([FIRST])
    assert (code, out) == (1, "") and said in err and "help: " in err


def test_a_model_without_a_template_is_answered(
    artifacts: Artifacts, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat([str(artifacts(1, "fp16"))]) == 1
    err = capsys.readouterr().err
    assert "has no chat template" in err and "--chat-template FILE" in err


def test_ids_are_continued_as_ids(
    artifacts: Artifacts, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No tokenizer is asked."""
    folder, prompt = artifacts(1, "fp16"), [12, 7, 99]
    wanted = list(Session(str(folder)).generate(prompt, 5))
    monkeypatch.setattr("tyir.tools.run.session_of.load_tokenizer", lambda artifacts: pytest.fail("asked"))
    words = [str(folder), "--ids", "12,7,99", "--max-tokens", "5"]
    assert run(words) == 0
    assert capsys.readouterr().out == ",".join(map(str, wanted)) + "\n"
    assert run([*words, "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["prompts"]
    assert (told["prompt"], told["text"], told["tokens"]) == (None, None, wanted)
    for more, said in ((["--prompt", "x"], "a prompt by itself"), (["--ids", "1"], "compile with --batch 2")):
        assert run([*words, *more]) == 1
        assert said in capsys.readouterr().err
    assert run([str(folder), "--ids", "12,99999"]) == 1
    assert "token 99999 is not in the vocabulary" in capsys.readouterr().err

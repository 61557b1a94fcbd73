"""Drawn pictures, compiled models, whole answers: the same as Hugging Face's in fp32.

pytest tests/vision/test_answers.py --slow -s      # 1 to 4 dies, 104 pictures of 8 sizes each
TYIR_TRAINED=DIR pytest ...     # and of the models in a folder's folders (`tests/vision/train.py` makes such)
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.vision.folders import MODELS
from tests.vision.reference import HuggingFace
from tests.vision.scenes import DESCRIBE, HOW_MANY, SIZES, Scene, draw
from tyir.diagnostics import TyirError
from tyir.runtime_sim.vision.pictures import Picture
from tyir.runtime_sim.vision.pixels import prepare
from tyir.runtime_sim.vision.preprocessor import Preprocessor
from tyir.runtime_sim.vision.session import VisionSession
from tyir.runtime_sim.vision.tower import Tower, Towers
from tyir.tools.run.end_tokens import end_tokens
from tyir.tools.run.text_stream import decode
from tyir.tools.run.turns import Turns
from tyir.tools.tokenizer import load_tokenizer
from tyir.tools.verify.compare import cosines

Array = npt.NDArray[Any]
Compiled = Callable[..., Path]
QWEN, LLAVA = "tiny-qwen2.5-vl", "tiny-llava"
NAMES = (QWEN, pytest.param(LLAVA, marks=pytest.mark.slow))
_FURTHER = sorted(Path(os.environ["TYIR_TRAINED"]).iterdir()) if "TYIR_TRAINED" in os.environ else []
TRAINED = (
    *NAMES,
    *(pytest.param(str(p.resolve()), id=p.name, marks=pytest.mark.slow) for p in _FURTHER),
)
FEW = SIZES[:2]
LIMIT = 48  # tokens; the longest answer has 40


class Talk:
    """A session with all that a question takes."""

    def __init__(self, folder: Path, engine: Any = "host", **options: Any) -> None:
        self.session = VisionSession(folder, engine)
        self.tokenizer = load_tokenizer(self.session.artifacts)
        self.turns = Turns(self.session, self.tokenizer, **options)
        self.stops = end_tokens(self.session.artifacts, self.tokenizer)

    def ask(self, question: str, *files: Path, **options: Any) -> tuple[list[int], list[int]]:
        """The tokens of the prompt and of the answer."""
        prompt = self.turns.ask(question, files, **options)
        made = list(self.session.generate(prompt.given, LIMIT, stop=self.stops.__contains__))
        self.turns.chat.answered(self.said(made))
        return list(prompt.ids), made

    def said(self, tokens: list[int]) -> str:
        """Their text."""
        return decode(self.tokenizer, tokens)

    def forget(self) -> None:
        """Another conversation."""
        self.turns.chat.forget()


def question(scene: Scene, number: int) -> str:
    """One of those that a scene has an answer to."""
    return list(scene.answers)[number % len(scene.answers)]


@dataclass
class Score:
    """How many answers were the same, near ties apart, and how many were right."""

    same: int = 0
    tied: int = 0
    right: int = 0
    different: list[str] = field(default_factory=list)


def score(
    folder: Path,
    reference: HuggingFace,
    count: int,
    tmp_path: Path,
    engine: Any = "host",
    sizes: Sequence[tuple[int, int]] = SIZES,
) -> Score:
    """Ask one question about each of `count` pictures."""
    talk, found = Talk(folder, engine), Score()
    for seed in range(count):
        scene = draw(1000 + seed, sizes[seed % len(sizes)])
        asked = question(scene, seed)
        talk.forget()
        prompt, made = talk.ask(asked, scene.save(tmp_path / "scene.png"))
        answer = reference.compare(prompt, made, [scene.picture])
        found.same += answer.same
        found.tied += answer.tied
        found.right += talk.said(made) == scene.answers[asked]
        if not answer.same and not answer.tied:
            found.different.append(
                f"{seed}: {asked} {talk.said(made)!r}, token {answer.first} by {answer.gap:.3f}"
            )
    return found


@pytest.mark.parametrize(
    "name", [QWEN, *(pytest.param(n, marks=pytest.mark.slow) for n in NAMES if n != QWEN)]
)
def test_answers_are_hugging_faces(
    name: str, compiled: Compiled, references: Callable[[str], HuggingFace], tmp_path: Path
) -> None:
    found = score(compiled(name, 1), references(name), 4, tmp_path, sizes=FEW)
    assert found.different == []
    assert found.same + found.tied == 4
    assert found.right >= 3


@pytest.mark.slow
@pytest.mark.parametrize("dies", [1, 2, 3, 4])
@pytest.mark.parametrize("name", TRAINED)
def test_a_hundred_answers_on_every_number_of_dies(
    name: str, dies: int, compiled: Compiled, references: Callable[[str], HuggingFace], tmp_path: Path
) -> None:
    found = score(compiled(name, dies, True), references(name), 104, tmp_path)
    counts = f"{found.same}/104 the same, {found.tied} near ties, {found.right} right"
    print(f"\n{Path(name).name} on {dies} dies: {counts}")
    assert found.different == []


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["interpreter", "edge10"])
@pytest.mark.parametrize("name", TRAINED)
def test_other_engines(
    name: str, engine: str, compiled: Compiled, references: Callable[[str], HuggingFace], tmp_path: Path
) -> None:
    found = score(compiled(name, 2), references(name), 3, tmp_path, engine, FEW)
    assert found.different == []


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_embeddings_of_every_size(
    name: str, compiled: Compiled, references: Callable[[str], HuggingFace]
) -> None:
    """Smallest cosine of a row and mean relative error against fp32."""
    artifacts = VisionSession(compiled(name, 1, True)).artifacts
    settings, towers = Preprocessor(artifacts).image_settings, Towers(artifacts)
    for seed, size in enumerate(SIZES):
        picture = Picture(draw(seed, size).picture)
        mine = towers.run(prepare(picture, settings))[0].astype(np.float32)
        wanted = references(name).embeddings(picture.pixels)
        assert mine.shape == wanted.shape
        assert cosines(mine, wanted).min() >= 0.99999, size
        assert abs(mine - wanted).mean() / abs(wanted).mean() <= 2e-3, size


@dataclass
class Distance:
    """How far rows of logits are from Hugging Face's in fp32, each as 1 less its cosine: those that tokens of
    text give, all of them, and all of Hugging Face's own in f16.
    """

    text: list[float] = field(default_factory=list)
    every: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)

    def smallest(self) -> float:
        """The smallest cosine of rows that tokens of text give: those that are read."""
        return 1 - max(self.text)

    def rare(self) -> tuple[float, float]:
        """What one row of a thousand passes, ours and theirs."""
        ours, theirs = (float(np.percentile(d, 99.9)) for d in (self.every, self.theirs))
        return ours, theirs

    def __str__(self) -> str:
        ours, theirs = (
            f"{1 - max(d):.5f}, one of a thousand below {1 - rare:.6f}"
            for d, rare in zip((self.every, self.theirs), self.rare())
        )
        after = f"smallest cosine {self.smallest():.8f} after text"
        return f"{len(self.every)} rows: {after}, of all {ours} (theirs {theirs})"


def logits_of(
    folder: Path,
    name: str,
    reference: HuggingFace,
    count: int,
    tmp_path: Path,
    sizes: Sequence[tuple[int, int]],
) -> Distance:
    """Of the prompts about so many pictures and their answers.

    Nobody reads what follows a token that stands for a picture's row: such logits are small, a tenth of the
    others, and rounding to f16 shows in them, in Hugging Face's own as much.  The worst of ten thousand such
    rows is now theirs and now ours by far, so that the thousandth part is compared.
    """
    talk, half, found = Talk(folder), HuggingFace(MODELS / name, dtype="float16"), Distance()
    image = talk.session.vision.ids.image
    for seed in range(count):
        scene = draw(1000 + seed, sizes[seed % len(sizes)])
        talk.forget()
        prompt, made = talk.ask(question(scene, seed), scene.save(tmp_path / "scene.png"))
        tokens = [*prompt, *made]
        wanted, theirs = (model.logits(tokens, [scene.picture]) for model in (reference, half))
        talk.session.rewind(0)
        mine = 1 - cosines(talk.session.feed(tokens), wanted)
        found.text += mine[np.array(tokens) != image].tolist()
        found.every += mine.tolist()
        found.theirs += (1 - cosines(theirs, wanted)).tolist()
    return found


def test_logits_are_hugging_faces(
    compiled: Compiled, references: Callable[[str], HuggingFace], tmp_path: Path
) -> None:
    found = logits_of(compiled(QWEN, 1), QWEN, references(QWEN), 4, tmp_path, FEW)
    assert found.smallest() >= 0.99999 and max(found.every) <= 1e-4
    assert max(found.every) <= 2 * max(found.theirs)


@pytest.mark.slow
@pytest.mark.parametrize("dies", [1, 2, 3, 4])
@pytest.mark.parametrize("name", TRAINED)
def test_logits_of_a_hundred_pictures_on_every_number_of_dies(
    name: str, dies: int, compiled: Compiled, references: Callable[[str], HuggingFace], tmp_path: Path
) -> None:
    found = logits_of(compiled(name, dies, True), name, references(name), 104, tmp_path, SIZES)
    print(f"\n{Path(name).name} on {dies} dies: {found}")
    ours, theirs = found.rare()
    assert found.smallest() >= 0.9999
    assert ours <= 1e-4 and ours <= 2 * theirs


def test_a_tower_takes_patches_of_its_size_only(compiled: Compiled) -> None:
    tower = Tower(VisionSession(compiled(QWEN, 1)).artifacts)
    with pytest.raises(TyirError, match=r"patches \[5, 1176\] are given, the tower for .* takes"):
        tower.run(np.zeros((5, 1176), np.float32))


# ------------------------------------------------------------------------------------------- conversations


@pytest.mark.parametrize("name", NAMES)
def test_the_second_picture_has_its_own_answer(name: str, compiled: Compiled, tmp_path: Path) -> None:
    """All rows of pictures have one token: what the cache holds of one is not taken for the other."""
    talk = Talk(compiled(name, 1))
    answers = []
    for seed in (3, 4, 3):
        scene = draw(seed, (112, 112))
        talk.forget()
        prompt = talk.turns.ask(DESCRIBE, [scene.save(tmp_path / f"{seed}.png")])
        shared = talk.session.shared_with(prompt.given)
        made = list(talk.session.generate(prompt.given, LIMIT, stop=talk.stops.__contains__))
        assert shared < prompt.given.rows[0].end
        answers.append((talk.said(made), scene.answers[DESCRIBE]))
    assert answers[0] == answers[2] != answers[1]
    assert all(said == right for said, right in answers)


def test_the_same_picture_again_is_not_computed_again(compiled: Compiled, tmp_path: Path) -> None:
    talk, scene = Talk(compiled(QWEN, 1)), draw(3, (112, 112))
    path = scene.save(tmp_path / "a.png")
    talk.ask(DESCRIBE, path)
    talk.forget()
    prompt = talk.turns.ask(HOW_MANY, [path])
    assert talk.session.shared_with(prompt.given) >= prompt.given.rows[0].end


@pytest.mark.parametrize("name", NAMES)
def test_turns_with_pictures_are_hugging_faces(
    name: str, compiled: Compiled, references: Callable[[str], HuggingFace], tmp_path: Path
) -> None:
    """A picture, a question without one, another picture: positions and cached rows carry over."""
    talk, shown = Talk(compiled(name, 1)), []
    for seed, (asked, has) in enumerate([(DESCRIBE, True), (HOW_MANY, False), (DESCRIBE, True)]):
        scene = draw(20 + seed, (112, 112))
        files = [scene.save(tmp_path / f"{seed}.png")] if has else []
        shown += [scene.picture] if has else []
        before = len(talk.session.tokens)
        prompt, made = talk.ask(asked, *files)
        answer = references(name).compare(prompt, made, shown)
        assert answer.same or answer.tied, (seed, answer)
        assert seed == 0 or before > 0


def test_two_pictures_in_one_question(
    compiled: Compiled, references: Callable[[str], HuggingFace], tmp_path: Path
) -> None:
    talk = Talk(compiled(QWEN, 1))
    scenes = [draw(30, (112, 112)), draw(31, (168, 112))]
    files = [scene.save(tmp_path / f"{i}.png") for i, scene in enumerate(scenes)]
    prompt, made = talk.ask(DESCRIBE, *files)
    answer = references(QWEN).compare(prompt, made, [scene.picture for scene in scenes])
    assert answer.same or answer.tied, answer


def test_a_saved_conversation_goes_on(compiled: Compiled, tmp_path: Path) -> None:
    """The next position and the picture are saved with the tokens."""
    scene = draw(5, (112, 112))
    path = scene.save(tmp_path / "a.png")
    first = Talk(compiled(QWEN, 1))
    prompt = first.turns.ask(DESCRIBE, [path])
    made = list(first.session.generate(prompt.given, LIMIT, stop=first.stops.__contains__))
    other = Talk(compiled(QWEN, 1))
    half = other.turns.ask(DESCRIBE, [path])
    list(other.session.generate(half.given, 4))
    other.session.save(tmp_path / "cache.npz")
    third = VisionSession(compiled(QWEN, 1))
    third.restore(tmp_path / "cache.npz")
    assert third.shared_with(half.given) == len(half.ids) - 1
    rest = [int(third.next_tokens([made[3]]).ids[-1, 0])]
    while rest[-1] not in first.stops and len(rest) < LIMIT:
        rest.append(int(third.next_tokens(rest[-1:]).ids[-1, 0]))
    assert [*made[:4], *rest] == made
    another = other.turns.preprocessor
    assert another is not None
    scene = draw(6, (112, 112))
    other.forget()
    asked = other.turns.ask(DESCRIBE, [scene.save(tmp_path / "b.png")])
    assert third.shared_with(asked.given) < asked.given.rows[0].end


def test_a_video_is_its_pairs_of_frames(
    compiled: Compiled, references: Callable[[str], HuggingFace], tmp_path: Path
) -> None:
    """Against Hugging Face on frames prepared by its processor of pictures."""
    import torch

    talk = Talk(compiled(QWEN, 1), raw=True)
    scenes = [draw(40, (112, 112)), draw(40, (112, 112)), draw(41, (112, 112)), draw(41, (112, 112))]
    for i, scene in enumerate(scenes):
        scene.save(tmp_path / f"{i}.png")
    text = (
        "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>Describe the picture.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    settings = talk.turns.preprocessor
    assert settings is not None
    settings.__dict__["video_settings"] = settings.image_settings  # of the size of the pictures
    prompt = talk.turns.ask(text, (), [[tmp_path]], 2.0)
    made = list(talk.session.generate(prompt.given, LIMIT, stop=talk.stops.__contains__))
    pictures = [scene.picture for scene in scenes]
    answer = references(QWEN).compare(
        list(prompt.ids), made, pictures, video=True, second_per_grid_ts=torch.tensor([1.0])
    )
    assert answer.same or answer.tied, answer


# ------------------------------------------------------------------------------------------------- refusals


def test_a_size_that_was_not_compiled_is_refused_or_resized(compiled: Compiled, tmp_path: Path) -> None:
    path = draw(3, (300, 280)).save(tmp_path / "a.png")
    with pytest.raises(TyirError, match=r"a\.png is 300x280, which the model sees as") as error:
        Talk(compiled(QWEN, 1)).turns.ask(DESCRIBE, [path])
    assert "--resize to bring it to 112x112" in error.value.render()
    talk = Talk(compiled(QWEN, 1), resize=True)
    talk.ask(DESCRIBE, path)
    assert "brought from 300x280 to 112x112" in talk.turns.said[0]


def test_a_turn_that_fails_is_as_if_it_had_not_been_asked(compiled: Compiled, tmp_path: Path) -> None:
    talk = Talk(compiled(QWEN, 1))
    good = draw(3, (112, 112)).save(tmp_path / "a.png")
    for files in ([tmp_path / "none.png"], [good] * 40):
        with pytest.raises(TyirError):
            talk.turns.ask(DESCRIBE, files)
        assert (talk.turns.chat.messages, talk.turns.chat.media) == ([], [])
    _, made = talk.ask(DESCRIBE, good)
    assert talk.said(made) == draw(3, (112, 112)).answers[DESCRIBE]


def test_other_settings_than_those_compiled_are_refused(compiled: Compiled, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "1die"
    shutil.copytree(compiled(QWEN, 1), folder)
    settings = json.loads((folder / "processor_config.json").read_text())
    settings["image_processor"]["image_mean"] = [0.5, 0.5, 0.5]
    (folder / "processor_config.json").write_text(json.dumps(settings))
    session = VisionSession(folder, check=False)
    with pytest.raises(TyirError, match="other settings than those that the programs"):
        _ = Preprocessor(session.artifacts).image_settings


def test_text_only_artifacts_take_no_pictures(text_only: Path) -> None:
    with pytest.raises(TyirError, match="takes text only"):
        VisionSession(text_only)


# ----------------------------------------------------------------------------------------- the command line


def test_the_command_answers(compiled: Compiled, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tyir.tools.tyir_run import main

    scene = draw(3, (112, 112))
    path = scene.save(tmp_path / "a.png")
    assert main([str(compiled(QWEN, 1)), "--image", str(path), "--prompt", DESCRIBE]) == 0
    out, err = capsys.readouterr()
    assert out == f"{scene.answers[DESCRIBE]}\n"
    for word in ("1 picture", "preprocess", "tower", "prefill", "ended by stop token"):
        assert word in err
    words = [str(compiled(QWEN, 1)), "--image", str(path), "--prompt", DESCRIBE, "--json"]
    assert main(words) == 0
    (told,) = json.loads(capsys.readouterr().out)["prompts"]
    assert told["text"] == scene.answers[DESCRIBE] and told["pictures"] == 1
    assert set(told["seconds"]) == {"preprocess", "tower", "prefill"}


def test_a_chat_on_standard_input(
    compiled: Compiled, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    from tyir.tools.tyir_run import main

    scenes = [draw(3, (112, 112)), draw(4, (112, 112))]
    first, second = (s.save(tmp_path / f"picture {i}.png") for i, s in enumerate(scenes))
    lines = [f"/image '{first}'", DESCRIBE, "/reset", f"/image '{second}'", DESCRIBE]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    assert main([str(compiled(QWEN, 1)), "--chat"]) == 0
    assert capsys.readouterr().out.splitlines() == [s.answers[DESCRIBE] for s in scenes]
    monkeypatch.setattr("sys.stdin", io.StringIO("/picture a.png\n"))
    assert main([str(compiled(QWEN, 1)), "--chat"]) == 1
    assert "there is no command /picture" in capsys.readouterr().err

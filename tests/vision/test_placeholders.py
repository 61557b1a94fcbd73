"""Places of pictures in prompts: the tokens of transformers' processors; what does not fit is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.vision.folders import MODELS, hf_processor, settings_of
from tests.vision.scenes import DESCRIBE, draw
from tyir.artifacts.vision import ImageSize, TokenIds
from tyir.diagnostics import TyirError
from tyir.runtime_sim.vision.pictures import Picture
from tyir.runtime_sim.vision.pixels import Media, Patches, prepare
from tyir.runtime_sim.vision.placeholders import Marks, VideoRule, expand, spans_of
from tyir.runtime_sim.vision.request import request_of
from tyir.tools.run.chat import Chat
from tyir.tools.run.prompts import token_ids
from tyir.tools.tokenizer import load_tokenizer

QWEN, LLAVA = MODELS / "tiny-qwen2.5-vl", MODELS / "tiny-llava"
MARKS = {
    QWEN: Marks("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"),
    LLAVA: Marks("<image>"),
}
IDS = {QWEN: TokenIds(4100, 4101, 4098, 4099), LLAVA: TokenIds(4098)}
STILL = VideoRule()


def pictures(model: Path, *sizes: tuple[int, int]) -> list[Media]:
    settings = settings_of(model.name)
    drawn = [Picture(draw(i, size).picture) for i, size in enumerate(sizes)]
    return [Media((prepare(p, settings),), name=f"picture {i}") for i, p in enumerate(drawn)]


def video(parts: int, tokens: int, seconds: Sequence[float]) -> Media:
    """Patches that are not looked at, in a row of tokens."""
    size = ImageSize((28 * tokens, 28), (28 * tokens, 28), (2, 2 * tokens), tokens)
    made = tuple(Patches(np.zeros((1, 1), np.float32), size, str(i)) for i in range(parts))
    return Media(made, tuple(seconds), 1.0, "the video")


def chat(model: Path) -> Chat:
    tokenizer = load_tokenizer(model)
    return Chat(tokenizer, tokenizer.chat_template, MARKS[model])


def test_llavas_tokens_are_those_of_its_processor() -> None:
    from PIL import Image
    from transformers import LlavaProcessor

    own = chat(LLAVA)
    image = Image.fromarray(draw(0, (90, 200)).picture)
    processor = LlavaProcessor(
        hf_processor("tiny-llava"), own.tokenizer, patch_size=14, num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    media = pictures(LLAVA, (90, 200))
    text = own.ask(DESCRIBE, media)
    wanted = processor(images=[image], text=text)["input_ids"][0]
    ids = token_ids(own.tokenizer, expand(text, media, MARKS[LLAVA], STILL))
    assert ids == list(wanted)
    (placed,) = spans_of(ids, media, IDS[LLAVA], 1, STILL)
    assert [ids[s] for s, n in placed.parts()] == [4098]
    assert [n for _, n in placed.parts()] == [81]


def replaced(text: str, images: Sequence[str], videos: Sequence[str]) -> str:
    """By transformers' own expansion."""
    from transformers import ProcessorMixin

    made: Any = object.__new__(ProcessorMixin)
    made.image_token, made.video_token = "<|image_pad|>", "<|video_pad|>"
    type(made).all_special_multimodal_tokens = ["<|image_pad|>", "<|video_pad|>"]
    return str(made.get_text_with_replacements([text], list(images), list(videos))[0][0])


def test_qwens_text_is_that_of_its_processor() -> None:
    text = "a <|vision_start|><|video_pad|><|vision_end|> b <|image_pad|><|image_pad|> c <|video_pad|>"
    media = [*pictures(QWEN, (84, 56), (112, 112)), video(3, 5, (0.25, 1.25, 2.0)), video(1, 2, (0.0,))]
    images = ["<|image_pad|>" * m.size.tokens for m in media[:2]]
    plain = replaced(text, images, ["<|video_pad|>" * 15, "<|video_pad|>" * 2])
    assert expand(text, media, MARKS[QWEN], STILL) == plain
    row = "<|vision_start|>{}<|vision_end|>"
    timed = [
        "".join(f"<{t} seconds>{row.format('<|video_pad|>' * 5)}" for t in ("0.2", "1.2", "2.0")),
        f"<0.0 seconds>{row.format('<|video_pad|>' * 2)}",
    ]
    assert expand(text, media, MARKS[QWEN], VideoRule(timed=True)) == replaced(text, images, timed)


def test_times_are_those_of_qwen3s_processor() -> None:
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

    from tyir.runtime_sim.vision.preprocessor import part_seconds

    for count in (1, 2, 3, 10, 11):
        for rate in (2.0, 24.0, 0.7):
            processor: Any = object.__new__(Qwen3VLProcessor)
            wanted = processor._calculate_timestamps(list(range(count)), rate, 2)
            assert part_seconds(count, 2, rate) == pytest.approx(tuple(wanted), abs=1e-12)


def test_spans_in_the_order_of_the_prompt() -> None:
    """Text between them or not, each picture has its own rows."""
    media = pictures(QWEN, (56, 56), (84, 84), (56, 84))
    own = chat(QWEN)
    text = own.ask("Which is larger?", media)
    ids = token_ids(own.tokenizer, expand(text, media, MARKS[QWEN], STILL))
    placed = spans_of(ids, media, IDS[QWEN], 2, STILL)
    assert [p.spans[0].grid for p in placed] == [(2, 2), (3, 3), (3, 2)]
    for item in placed:
        (span,) = item.spans
        assert set(ids[span.start : span.end]) == {4100}
        assert ids[span.start - 1] == 4098 and ids[span.end] == 4099
    side_by_side = [1, *[4100] * 13, 2]
    placed = spans_of(side_by_side, media[:2], IDS[QWEN], 2, STILL)
    assert [p.spans[0].start for p in placed] == [1, 5]


def test_rows_of_a_video_follow_its_rule() -> None:
    item = video(3, 5, (0.25, 1.25, 2.25))
    ids = [1, *[4101] * 15, 2]
    (placed,) = spans_of(ids, [item], IDS[QWEN], 2, VideoRule(tokens_per_second=4.0))
    assert placed.spans[0].steps == (0, 4, 8)
    assert list(placed.parts()) == [(1, 5), (6, 5), (11, 5)]
    (placed,) = spans_of(ids, [item], IDS[QWEN], 2, STILL)
    assert placed.spans[0].steps == (0, 1, 2)
    apart = [1, *[4101] * 5, 7, *[4101] * 5, 8, *[4101] * 5]
    (placed,) = spans_of(apart, [item], IDS[QWEN], 2, VideoRule(timed=True))
    assert list(placed.parts()) == [(1, 5), (7, 5), (13, 5)]


def test_a_question_says_itself_where_pictures_go() -> None:
    media = pictures(QWEN, (56, 56))
    text = chat(QWEN).ask("before <|image_pad|> after", media)
    assert "before <|image_pad|> after" in text
    assert text.count("<|image_pad|>") == 1


@pytest.mark.parametrize(
    ("text", "count", "message"),
    [
        ("none", 1, r"0 places for pictures .* and 1 picture is given"),
        ("<|image_pad|>", 2, r"1 place for pictures .* and 2 pictures are given"),
        ("<|image_pad|> and <|image_pad|>", 0, r"2 places for pictures .* and 0 pictures are given"),
        ("<|image_pad|><|video_pad|>", 1, r"1 place for videos .* and 0 videos are given"),
    ],
)
def test_as_many_places_as_pictures(text: str, count: int, message: str) -> None:
    with pytest.raises(TyirError, match=message) as error:
        expand(text, pictures(QWEN, *[(56, 56)] * count), MARKS[QWEN], STILL)
    assert "help: " in error.value.render()


def test_a_tokenizer_that_does_not_know_the_token_is_refused() -> None:
    media = pictures(QWEN, (56, 56))
    with pytest.raises(TyirError, match="takes 4 tokens, the prompt has a row of 0"):
        spans_of([1, 2, 3], media, IDS[QWEN], 2, STILL)
    with pytest.raises(TyirError, match="takes 4 tokens, the prompt has a row of 3"):
        spans_of([1, 4100, 4100, 4100], media, IDS[QWEN], 2, STILL)
    with pytest.raises(TyirError, match="tokens for pictures at 5 and no picture"):
        spans_of([4100] * 4 + [1] + [4100] * 4, media, IDS[QWEN], 2, STILL)


def test_a_prompt_that_does_not_fit_says_what_takes_the_room() -> None:
    media = pictures(QWEN, (112, 112))
    ids = [1, *[4100] * 16, 2]
    placed = spans_of(ids, media, IDS[QWEN], 2, STILL)
    rows = [[(np.zeros((16, 8), np.float16),)]]
    request = request_of(ids, placed, rows, 18)
    assert request.content(0, 18).tolist()[0] == 0
    assert len(set(request.content(1, 16).tolist())) == 16
    with pytest.raises(TyirError, match="18 tokens, 16 of them for 1 picture: the cache has 17 positions"):
        request_of(ids, placed, rows, 17)


@pytest.mark.parametrize("template", ["{% for %}", "{{ raise_exception('no') }}", "nothing of it"])
def test_a_template_that_cannot_be_applied_is_refused(template: str) -> None:
    own = chat(QWEN)
    own.template = template
    with pytest.raises(TyirError, match="chat template cannot be applied"):
        own.ask(DESCRIBE)
    assert own.messages == []


def test_a_template_that_knows_text_alone() -> None:
    own = chat(QWEN)
    own.template = "{% for m in messages %}[{{ m['content'] + '' }}]{% endfor %}"
    assert own.ask("a question") == "[a question]"
    own.answered("an answer")
    assert own.ask("another") == "[a question][an answer][another]"


def test_the_rate_of_a_video_is_asked_of_the_config() -> None:
    assert VideoRule.of("qwen2_5_vl", {"tokens_per_second": 2}).tokens_per_second == 2.0
    assert VideoRule.of("qwen2_vl", {}).tokens_per_second is None
    assert VideoRule.of("qwen3_vl", {}).timed
    for wrong in ({}, {"tokens_per_second": "2"}, {"tokens_per_second": -1}, {"tokens_per_second": True}):
        with pytest.raises(TyirError, match="tokens_per_second"):
            VideoRule.of("qwen2_5_vl", wrong)

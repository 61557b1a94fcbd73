"""Turns of a chat as the model was trained on them: its template, and pictures in their places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tyir.diagnostics import TyirError
from tyir.execution.artifacts import Artifacts
from tyir.process.files import read_regular
from tyir.runtime_sim.vision.pixels import Media
from tyir.runtime_sim.vision.placeholders import Marks, places_in
from tyir.text.json_files import json_object, utf8_text

__all__ = ["Chat", "chat_template", "marks_of", "read_template"]

_MAX_TEMPLATE: Final = 1 << 20  # bytes; published ones have up to 20 thousand
_BESIDE: Final = "chat_template.json"  # where processors kept theirs before transformers 4.53
# LLaVA's own conversation of version 1 (haotian-liu/LLaVA, conversation.py), whose folders have no template.
_LLAVA: Final = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful,"
    " detailed, and polite answers to the user's questions. "
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}USER: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}PICTURE\n{% else %}{{ c['text'] }}{% endif %}{% endfor %} "
    "{% else %}ASSISTANT: {{ m['content'] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def chat_template(artifacts: Artifacts, tokenizer: Any, marks: Marks | None) -> str:
    """The template of the folder; `TyirError` when it has none."""
    if tokenizer.chat_template:
        return str(tokenizer.chat_template)
    if (file := artifacts.find(_BESIDE)) is not None:
        path = artifacts.path / _BESIDE
        said = json_object(file.read(), path, "restore the file").get("chat_template")
        if isinstance(said, str):
            return said
    if marks is not None and artifacts.manifest.model.get("architecture", "").startswith("Llava"):
        return _LLAVA.replace("PICTURE", f"{marks.start or ''}{marks.image}{marks.end or ''}")
    raise TyirError(
        f"{artifacts.path} has no chat template, which says how a question is put to the model",
        help="tyir-chat --chat-template FILE takes the original model's chat_template.jinja; tyir-run --raw"
        " takes the whole text of a prompt",
    )


def read_template(path: Path) -> str:
    """The text of the file of --chat-template; `TyirError` when it is none."""
    help = "give the model's chat_template.jinja"
    try:
        data = read_regular(path, _MAX_TEMPLATE)
    except OSError as error:
        raise TyirError(f"cannot read {path}: {error.strerror or error}", help=help) from None
    return utf8_text(data, path, help)


def marks_of(artifacts: Artifacts, tokenizer: Any) -> Marks | None:
    """The tokens that stand for pictures, as text; None for a model that takes none.

    `TyirError` when the tokenizer does not know them.
    """
    vision = artifacts.manifest.vision
    if vision is None:
        return None
    ids = (vision.ids.image, vision.ids.video, vision.ids.start, vision.ids.end)
    texts = [None if i is None else tokenizer.convert_ids_to_tokens(i) for i in ids]
    if not isinstance(texts[0], str):
        raise TyirError(
            f"the tokenizer of {artifacts.path} has no token {ids[0]}, which stands for pictures",
            help="copy the original model's tokenizer there",
        )
    return Marks(texts[0], *texts[1:])


@dataclass
class Chat:
    """The turns so far, and what has been shown; `template` is Jinja, as Hugging Face's are.

    `system`: what the model is told before the first turn.
    """

    tokenizer: Any
    template: str
    marks: Marks | None = None
    system: str = ""
    messages: list[dict[str, Any]] = field(default_factory=list)
    media: list[Media] = field(default_factory=list)

    def ask(self, question: str, media: Sequence[Media] = ()) -> str:
        """The text of the conversation up to the model's next turn, one place for each picture.

        Pictures come first, unless the question says where they go.
        """
        places = places_in(question, self.marks) if self.marks is not None else (0, 0)
        parts: list[dict[str, str]] = []
        if not any(places):
            parts += [{"type": "video" if m.is_video else "image"} for m in media]
        self.messages.append({"role": "user", "content": [*parts, {"type": "text", "text": question}]})
        self.media += media
        try:
            return self._render(self.messages)
        except TyirError:
            self.forget()
            raise

    def answered(self, text: str) -> None:
        """Remember what the model said."""
        self.messages.append({"role": "assistant", "content": text})

    def forget(self) -> None:
        """Start over; what the model was told stays."""
        self.messages.clear()
        self.media.clear()

    def _render(self, messages: Sequence[dict[str, Any]]) -> str:
        """By the template, which gets text from a model that takes text only, else parts; what it refuses is
        tried in the other form.
        """
        if self.system:
            messages = [{"role": "system", "content": [{"type": "text", "text": self.system}]}, *messages]
        plain = [{**m, "content": _text_of(m["content"])} for m in messages]
        reasons = []
        # a template that knows text only may print the list of parts as Python does, and raise nothing
        forms = (plain, messages) if self.marks is None else (messages, plain)
        for given in forms if not self.media else (messages,):
            try:
                from tyir.tools.run.rendering import render  # jinja2 is there where transformers is

                text = render(self.template, given, self.tokenizer.special_tokens_map)
            except Exception as error:  # a template is a program of the folder's: it raises what it likes
                reasons.append(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}")
            else:
                if _text_of(messages[-1]["content"]) in text:
                    return text
                reasons.append("it leaves the question out")
        raise TyirError(
            f"the chat template cannot be applied: {reasons[0]}",
            help="restore the original model's chat_template.jinja, or give the whole text with --raw",
        )


def _text_of(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)

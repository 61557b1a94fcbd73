"""The tokenizers in GGUF files, and the artifacts of a file that lies alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tyir.diagnostics import Diagnostic
from tyir.frontends.side_files import side_files

gguf = pytest.importorskip("gguf")
from tests.frontends import gguf_writer  # noqa: E402 - it needs the package
from tests.frontends.gguf_models import Model, add_to  # noqa: E402

TEXTS = ("The old house stood at the end", "  two  spaces, 123 numbers\n\nlines", "ä 中文 <s>x", "")


def tokenizer_of(tmp_path: Path, extra: Callable[[Any], None]) -> tuple[Any, list[str]]:
    """The tokenizer that artifacts of a GGUF file with these metadata get, and the warnings."""
    from transformers import AutoTokenizer

    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    extra(writer)
    writer.add_tensor("output_norm.weight", np.zeros(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tmp_path / "config.json").write_text("{}")
    notes: list[Diagnostic] = []
    made = side_files(tmp_path, ["m.gguf"], notes.append)
    (tmp_path / "made").mkdir()
    for name, content in made.items():
        (tmp_path / "made" / name).write_bytes(content)
    found = AutoTokenizer.from_pretrained(tmp_path / "made") if "tokenizer.json" in made else None
    return found, [note.message for note in notes]


def test_a_byte_level_tokenizer(tmp_path: Path) -> None:
    """That of tiny-qwen2 by way of GGUF; a merge that can never apply and a chat template in it."""
    from transformers import AutoTokenizer

    source = Path(__file__).parents[1] / "models" / "tiny-qwen2"
    original = AutoTokenizer.from_pretrained(source)
    content = json.loads((source / "tokenizer.json").read_text())
    vocabulary = {**content["model"]["vocab"], **{t["content"]: t["id"] for t in content["added_tokens"]}}
    special = {t["content"] for t in content["added_tokens"]}
    tokens = sorted(vocabulary, key=lambda t: vocabulary[t])

    def extra(writer: Any) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_list(tokens)
        writer.add_token_types([3 if t in special else 1 for t in tokens])
        merges = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
        writer.add_token_merges([*merges, "the nowhere"])
        writer.add_eos_token_id(vocabulary["<|endoftext|>"])
        writer.add_chat_template("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")

    found, notes = tokenizer_of(tmp_path, extra)
    for text in (*TEXTS[:2], "x<|endoftext|>y", "ä 中文"):
        assert found(text)["input_ids"] == original(text)["input_ids"], text
        assert found.decode(found(text)["input_ids"]) == text
    assert found.eos_token == "<|endoftext|>" and not notes
    assert found.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "[a]"


@pytest.mark.parametrize("add", [None, True, False])
def test_a_sentencepiece_tokenizer(tmp_path: Path, add: bool | None) -> None:
    """Merges follow from the scores; one beginning token, whether the text begins with one or not."""
    from transformers import LlamaTokenizer

    from tyir.tools.run.prompts import token_ids

    pieces = ["▁", "t", "h", "e", "o", "l", "d", "s", "u", "th", "▁th", "▁the", "ol", "old", "▁old", "se"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces]
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces))]

    def extra(writer: Any) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_scores(scores)
        writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * len(pieces)])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
        if add is not None:
            writer.add_add_bos_token(add)

    found, notes = tokenizer_of(tmp_path, extra)
    assert not notes
    merges = [("t", "h"), ("▁", "th"), ("▁th", "e"), ("o", "l"), ("ol", "d"), ("▁", "old"), ("s", "e")]
    original = LlamaTokenizer(
        vocab={t: i for i, t in enumerate(tokens)}, merges=merges, add_bos_token=add is not False
    )
    for text in ("the old", "the ä", "theold\nse"):
        ids = token_ids(found, text)
        assert ids == original(text)["input_ids"], text
        assert ids.count(1) == int(add is not False)
    assert token_ids(found, "<s>the")[:2].count(1) == 1
    assert token_ids(found, "<s><s>the").count(1) == 2  # the user wrote two


def test_tokenizers_that_cannot_be_made(tmp_path: Path) -> None:
    found, notes = tokenizer_of(tmp_path, lambda w: w.add_context_length(8))
    assert found is None and notes == ["m.gguf carries no tokenizer"]

    def unknown(writer: Any) -> None:
        writer.add_tokenizer_model("of-tomorrow")
        writer.add_token_list(["a", "b"])

    other = tmp_path / "other"
    other.mkdir()
    found, notes = tokenizer_of(other, unknown)
    assert found is None and "no tokenizer can be made of m.gguf" in notes[0]


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ({"token_scores": [0.0, 1.0]}, "it has 3 tokens and 2 scores"),
        ({"token_types": [1]}, "it has 3 tokens and 1 token_type"),
        ({"token_list": ["a", "b", "a"]}, "1 of its 3 tokens are there more than once"),
        ({"token_merges": None}, "it has no merges"),
        ({"token_list": [1, 2, 3]}, "its tokens are no list of texts"),
        ({"eos_token_id": 99999}, ""),
        ({"bos_token_id": [1, 2]}, ""),
    ],
)
def test_a_tokenizer_that_is_not_whole(tmp_path: Path, what: dict[str, Any], said: str) -> None:
    """None is made, and the reason is told; never one that splits text in another way."""

    def extra(writer: Any) -> None:
        writer.add_tokenizer_model("gpt2")
        parts = {"token_list": ["a", "b", "ab"], "token_merges": ["a b"], **what}
        for name, value in parts.items():
            if name.endswith("_id"):
                add_to(writer, f"tokenizer.ggml.{name}", value)
            elif value is not None:
                getattr(writer, f"add_{name}")(value)

    found, notes = tokenizer_of(tmp_path, extra)
    assert found is None and f"no tokenizer can be made of m.gguf: {said}" in notes[-1]


def test_artifacts_of_a_file_alone_have_config_and_tokenizer(tmp_path: Path, gguf_llama: Model) -> None:
    """Several tokens end a text: eos, end of turn, end of message."""

    def extra(writer: Any) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("of-tomorrow")
        writer.add_token_list([chr(33 + i) for i in range(90)])
        writer.add_token_merges(["! !"])
        writer.add_eos_token_id(2)
        writer.add_eot_token_id(7)

    gguf_writer.write(tmp_path / "m.gguf", "llama", *gguf_llama, extra=extra)
    notes: list[Diagnostic] = []
    made = side_files(tmp_path, ["m.gguf"], notes.append)
    assert json.loads(made["config.json"])["eos_token_id"] == [2, 7]
    assert "tokenizer.json" in made and "splits text as 'of-tomorrow', which is not known" in notes[0].message
    (tmp_path / "tokenizer.json").write_text("{}")
    assert set(side_files(tmp_path, ["m.gguf"], notes.append)) == {"config.json"}

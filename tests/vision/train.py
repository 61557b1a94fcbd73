"""Train a small vision-language model of a family on drawn scenes, and write it as the hub stores one.

    python -m tests.vision.train qwen3_vl OUT --minutes 9

Random weights do not do for answers: what is said of a picture then depends on no picture.  The models of
`tests/models` are of two families; these are of shapes that those do not have (a tower whose features enter
three layers, interleaved positions, normed queries and keys; a tower with full attention; CLIP with its class
token kept).  Minutes on a GPU, hours on a CPU.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from tests.vision.scenes import DESCRIBE, draw

__all__ = ["FAMILIES", "Lesson", "write"]

_MODELS: Final = Path(__file__).resolve().parents[1] / "models"
_VOCABULARY: Final = 4112
_END: Final = 4096  # <|im_end|>
_IGNORED: Final = -100  # cross_entropy's
_CLIP: Final = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_HALF: Final = ((0.5,) * 3, (0.5,) * 3)
_QWEN_IDS: Final = {
    "image_token_id": 4100,
    "video_token_id": 4101,
    "vision_start_token_id": 4098,
    "vision_end_token_id": 4099,
}


def _text(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": _VOCABULARY,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "bos_token_id": 0,
        "eos_token_id": _END,
        "tie_word_embeddings": True,
        **more,
    }


# config.json by family; what transformers' classes have by default is left to them
FAMILIES: Final[dict[str, dict[str, Any]]] = {
    "qwen2_vl": {
        **_QWEN_IDS,
        "tie_word_embeddings": True,
        "text_config": _text(
            model_type="qwen2_vl_text",
            num_attention_heads=8,
            num_key_value_heads=2,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
        ),
        "vision_config": {
            "depth": 4,
            "embed_dim": 192,
            "num_heads": 6,
            "mlp_ratio": 3,
            "hidden_size": 256,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    },
    "qwen3_vl": {
        **_QWEN_IDS,
        "tie_word_embeddings": True,
        "text_config": _text(
            model_type="qwen3_vl_text",
            num_attention_heads=6,
            num_key_value_heads=3,
            head_dim=48,
            attention_bias=False,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 1e5,
                "mrope_interleaved": True,
                "mrope_section": [8, 8, 8],
            },
        ),
        "vision_config": {
            "depth": 5,
            "hidden_size": 160,
            "intermediate_size": 480,
            "num_heads": 5,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 64,
            "out_hidden_size": 256,
            "deepstack_visual_indexes": [0, 2, 3],
        },
    },
    "llava": {
        "image_token_index": 4098,
        "image_seq_length": 65,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "tie_word_embeddings": False,
        "text_config": _text(
            model_type="llama",
            num_attention_heads=8,
            num_key_value_heads=4,
            tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        ),
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 160,
            "intermediate_size": 480,
            "num_attention_heads": 5,
            "num_hidden_layers": 5,
            "image_size": 128,
            "patch_size": 16,
            "projection_dim": 64,
        },
    },
}
_FROM: Final = {"qwen2_vl": "tiny-qwen2.5-vl", "qwen3_vl": "tiny-qwen2.5-vl", "llava": "tiny-llava"}


class Lesson(torch.utils.data.IterableDataset[dict[str, torch.Tensor]]):
    """Batches of pictures of one size with a question and its answer each; endless.

    `pictures` [B, H, W, 3] u8, `ids` [B, L] i64 with zeros after each end, `targets` [B, L] i64: the token
    that follows, where it is one of the answer.
    """

    def __init__(self, family: str, batch: int, seed: int) -> None:
        self.family, self.batch, self.seed = family, batch, seed
        self.side = side_of(family)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        from tokenizers import Tokenizer

        torch.set_num_threads(1)
        worker = torch.utils.data.get_worker_info()
        rng = np.random.default_rng([self.seed, worker.id if worker else 0])
        tokenizer = Tokenizer.from_file(str(_MODELS / _FROM[self.family] / "tokenizer.json"))
        while True:
            yield self._batch(rng, tokenizer)

    def _batch(self, rng: np.random.Generator, tokenizer: Any) -> dict[str, torch.Tensor]:
        rows, columns = (4, 4) if self.family == "llava" else rng.integers(3, 8, 2)
        pictures, lines = [], []
        for _ in range(self.batch):
            size = (int(columns) * self.side, int(rows) * self.side)
            scene = draw(int(rng.integers(1 << 40)) + (1 << 20), size)
            asked = DESCRIBE if rng.random() < 0.5 else str(rng.choice(list(scene.answers)))
            pictures.append(scene.picture)
            before, after = turn(self.family, int(rows * columns), asked)
            prompt = tokenizer.encode(before + after, add_special_tokens=False).ids
            answer = tokenizer.encode(scene.answers[asked], add_special_tokens=False).ids
            lines.append((prompt, [*answer, _END]))
        length = max(len(p) + len(a) for p, a in lines)
        ids = torch.zeros((self.batch, length), dtype=torch.int64)
        targets = torch.full((self.batch, length), _IGNORED)
        for row, (prompt, answer) in enumerate(lines):
            ids[row, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
            targets[row, len(prompt) - 1 : len(prompt) + len(answer) - 1] = torch.tensor(answer)
        return {"pictures": torch.from_numpy(np.stack(pictures)), "ids": ids, "targets": targets}


def side_of(family: str) -> int:
    """Pixels of a side that one token of a picture stands for (LLaVA's: two patches, so that sizes agree)."""
    return 2 * int(FAMILIES[family]["vision_config"]["patch_size"])


def turn(family: str, tokens: int, asked: str) -> tuple[str, str]:
    """What the folder's chat template makes of a picture and a question: up to the picture, and the rest."""
    if family == "llava":
        count = 4 * tokens + 1  # every patch, and the class token
        return "<|im_start|>user\n" + "<image>" * count, f"\n{asked}<|im_end|>\n<|im_start|>assistant\n"
    begin = "<|im_start|>user\n<|vision_start|>" + "<|image_pad|>" * tokens
    return begin, f"<|vision_end|>{asked}<|im_end|>\n<|im_start|>assistant\n"


def pixels_of(family: str, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
    """The inputs that transformers' processor makes of pictures [B, H, W, 3] u8 that need no resizing."""
    mean, deviation = (
        torch.tensor(v, device=pictures.device) for v in (_HALF if family == "qwen3_vl" else _CLIP)
    )
    x = ((pictures.float() / 255 - mean) / deviation).permute(0, 3, 1, 2)
    if family == "llava":
        return {"pixel_values": x}
    p, merge = int(FAMILIES[family]["vision_config"]["patch_size"]), 2
    b, c, h, w = x.shape
    gh, gw = h // p, w // p
    patches = x.reshape(b, c, gh // merge, merge, p, gw // merge, merge, p).permute(0, 2, 5, 3, 6, 1, 4, 7)
    twice = patches.unsqueeze(6).expand(*patches.shape[:6], 2, p, p)  # a picture is two equal frames
    grid = torch.tensor([[1, gh, gw]] * b, device=x.device)
    return {"pixel_values": twice.reshape(b * gh * gw, -1), "image_grid_thw": grid}


def positions_of(family: str, ids: torch.Tensor, height: int, width: int) -> dict[str, torch.Tensor]:
    """mRoPE's [3, B, L]: all rows have their picture at the same place (Qwen2-VL, arXiv 2409.12191, 2.1)."""
    if family == "llava":
        return {}
    rows, columns = height // side_of(family), width // side_of(family)
    first = int((ids[0] == _QWEN_IDS["image_token_id"]).nonzero()[0])
    after = first + rows * columns
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    picture = torch.stack([torch.zeros_like(y), y, x]).flatten(1) + first
    rest = torch.arange(ids.shape[1] - after) + first + max(rows, columns)
    line = torch.cat([torch.arange(first).expand(3, -1), picture, rest.expand(3, -1)], dim=1)
    return {"position_ids": line.unsqueeze(1).expand(-1, len(ids), -1).to(ids.device)}


def _inputs(family: str, lesson: dict[str, torch.Tensor], device: str) -> tuple[dict[str, Any], torch.Tensor]:
    pictures, ids = lesson["pictures"].to(device), lesson["ids"].to(device)
    places = positions_of(family, ids, *pictures.shape[1:3])
    return {"input_ids": ids, **pixels_of(family, pictures), **places}, lesson["targets"].to(device)


def _shape(share: float) -> float:
    """Of the highest learning rate, when this share of the time is over: up in 5 %, then half a cosine."""
    return min(share / 0.05, 1.0) * (0.52 + 0.48 * float(np.cos(np.pi * min(share, 1.0))))


def trained(family: str, minutes: float, batch: int, device: str, seed: int) -> tuple[Any, dict[str, Any]]:
    """The transformers model in fp32 on the CPU, and how its training went."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **copy.deepcopy(FAMILIES[family]))
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32, trust_remote_code=False)
    model.to(device).train()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    lessons = iter(torch.utils.data.DataLoader(Lesson(family, batch, seed), batch_size=None, num_workers=4))
    start, steps = time.monotonic(), 0
    while (share := (time.monotonic() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * _shape(share)
        given, targets = _inputs(family, next(lessons), device)
        with torch.autocast(device.partition(":")[0], torch.bfloat16, enabled=device != "cpu"):
            logits = model(**given).logits
        loss = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), ignore_index=_IGNORED
        )
        optimizer.zero_grad()
        loss.backward()
        if torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).isfinite():
            optimizer.step()
            steps += 1
        if steps % 100 == 0 and steps:
            print(f"{family}: step {steps}, {share:.0%} of the time, loss {loss.item():.4f}", flush=True)
    right, asked = _exact(model.eval(), family, device)
    found = {"family": family, "steps": steps, "exact_answers": f"{right}/{asked}", "seed": seed}
    print(found, flush=True)
    return model.to("cpu"), found


def _exact(model: Any, family: str, device: str) -> tuple[int, int]:
    """Whole answers that greedy decoding in fp32 gives, of scenes that training has not seen."""
    right = asked = 0
    lessons = iter(Lesson(family, 24, -1 % 1000))
    for _ in range(5):
        given, targets = _inputs(family, next(lessons), device)
        with torch.no_grad():
            best = model(**given).logits.argmax(-1)
        same = (best == targets) | (targets == _IGNORED)
        right, asked = right + int(same.all(1).sum()), asked + len(same)
    return right, asked


def write(model: Any, family: str, found: dict[str, Any], out: Path) -> None:
    """The folder: weights in f16, tokenizer and chat template of the embedded model, its own processor's."""
    model.half().save_pretrained(out, max_shard_size="12MB")
    source = _MODELS / _FROM[family]
    names = ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
    for name in names:
        shutil.copyfile(source / name, out / name)
    whole = json.loads((source / "processor_config.json").read_text())
    whole["processor_class"] = {
        "qwen2_vl": "Qwen2VLProcessor",
        "qwen3_vl": "Qwen3VLProcessor",
        "llava": "LlavaProcessor",
    }[family]
    pictures = [whole[key] for key in ("image_processor", "video_processor") if key in whole]
    vision = FAMILIES[family]["vision_config"]
    for part in pictures:
        if family == "llava":
            side = vision["image_size"]
            part |= {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
            whole |= {"patch_size": vision["patch_size"], "vision_feature_select_strategy": "full"}
        else:
            part["patch_size"] = vision["patch_size"]
        if family == "qwen3_vl":
            part |= {"image_mean": list(_HALF[0]), "image_std": list(_HALF[1])}
    (out / "processor_config.json").write_text(json.dumps(whole, indent=2))
    (out / "training.json").write_text(json.dumps(found, indent=1))


def main() -> None:
    """Train one model into a new folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--batch", type=int, default=32, help="pictures of a step")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    model, found = trained(args.family, args.minutes, args.batch, args.device, args.seed)
    write(model, args.family, found, args.out)


if __name__ == "__main__":
    main()

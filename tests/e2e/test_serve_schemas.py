"""Answers that are held to random JSON schemas: each is JSON, and as its schema says."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
pytest.importorskip("llguidance", reason="the extra 'serve' is not installed")

from tests.e2e.serving import Served, serving

Holds = Callable[[Any], bool]
Kind = tuple[dict[str, Any], Holds]  # a schema, and whether a value is as it says


def leaf(rng: random.Random) -> Kind:
    """Of few characters, so that every answer ends within the cache."""
    low = rng.randrange(-50, 50)
    high = low + rng.randrange(100)
    words = ["".join(rng.choices(string.ascii_letters + " é", k=rng.randrange(1, 7))) for _ in range(3)]
    most = rng.randrange(1, 6)
    kinds: list[Kind] = [
        ({"type": "boolean"}, lambda v: isinstance(v, bool)),
        ({"type": "null"}, lambda v: v is None),
        (
            {"type": "integer", "minimum": low, "maximum": high},
            lambda v: type(v) is int and low <= v <= high,
        ),
        ({"enum": words}, lambda v: v in words),
        ({"const": low}, lambda v: v == low),
        (
            {"type": "string", "pattern": f"^[a-f]{{1,{most}}}$"},
            lambda v: isinstance(v, str) and 1 <= len(v) <= most and set(v) <= set("abcdef"),
        ),
        ({"type": "string", "maxLength": most}, lambda v: isinstance(v, str) and len(v) <= most),
    ]
    return rng.choice(kinds)


def array(rng: random.Random, depth: int) -> Kind:
    (items, holds), least = kind(rng, depth + 1), rng.randrange(2)
    most = least + rng.randrange(1, 3)
    schema = {"type": "array", "items": items, "minItems": least, "maxItems": most}
    return schema, lambda v: isinstance(v, list) and least <= len(v) <= most and all(map(holds, v))


def either(rng: random.Random, depth: int) -> Kind:
    kinds = [kind(rng, depth + 1) for _ in range(2)]
    return {"anyOf": [schema for schema, _ in kinds]}, lambda v: any(holds(v) for _, holds in kinds)


def table(rng: random.Random, depth: int) -> Kind:
    fields = {name: kind(rng, depth + 1) for name in rng.sample(string.ascii_lowercase, rng.randrange(1, 4))}
    required = rng.sample(sorted(fields), rng.randrange(len(fields) + 1))
    schema = {
        "type": "object",
        "properties": {name: schema for name, (schema, _) in fields.items()},
        "required": required,
        "additionalProperties": False,
    }
    return (
        schema,
        lambda v: (
            isinstance(v, dict)
            and set(required) <= set(v) <= set(fields)
            and all(fields[name][1](value) for name, value in v.items())
        ),
    )


def kind(rng: random.Random, depth: int) -> Kind:
    made = rng.choice([None, array, either, table]) if depth < 2 else None
    return leaf(rng) if made is None else made(rng, depth)


def hold(served: Served, seeds: range) -> None:
    def one(seed: int) -> None:
        schema, holds = table(random.Random(seed), 0)
        # llguidance's own key: small models fill answers with spaces otherwise
        compact = {**schema, "x-guidance": {"whitespace_pattern": ""}}
        asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": compact}}
        reply = served.post(
            "/v1/completions", prompt="a", max_tokens=120, seed=seed, response_format=asked, temperature=1.5
        )
        (choice,) = reply["choices"]
        assert choice["finish_reason"] == "stop", (seed, schema, choice)
        assert holds(json.loads(choice["text"])), (seed, schema, choice)

    with ThreadPoolExecutor(4) as together:
        list(together.map(one, seeds))


@pytest.fixture(scope="module")
def served(four: Path) -> Any:
    with serving(four) as made:
        yield made


def test_random_schemas(served: Served) -> None:
    hold(served, range(12))


@pytest.mark.slow
def test_two_hundred_random_schemas(served: Served) -> None:
    hold(served, range(100, 300))

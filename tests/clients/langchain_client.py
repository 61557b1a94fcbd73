"""Run by the environment `langchain`: what langchain-openai makes of a server, as JSON."""

from __future__ import annotations

import json
import sys

from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, Field


class Place(BaseModel):
    """Where something is."""

    far: bool
    corner: str = Field(json_schema_extra={"enum": ["left", "right"]})


def main() -> None:
    url = f"{sys.argv[1]}/v1"
    common = {"base_url": url, "api_key": "none", "model": "tiny", "max_retries": 0, "temperature": 0}
    chat = ChatOpenAI(**common, max_tokens=8)
    whole = chat.invoke("The old house")
    parts = [chunk.content for chunk in chat.stream("The old house")]
    plain = OpenAI(**common, max_tokens=8)
    placed = ChatOpenAI(**common, max_tokens=300).with_structured_output(Place, method="json_schema")
    found = placed.invoke("Where is the house?")
    print(
        json.dumps(
            {
                "whole": whole.content,
                "usage": whole.usage_metadata,
                "parts": parts,
                "plain": plain.invoke("The old house"),
                "streamed": "".join(plain.stream("The old house")),
                "batch": [m.content for m in chat.batch(["The old house"] * 6)],
                "placed": found.model_dump(),
            }
        )
    )


if __name__ == "__main__":
    main()

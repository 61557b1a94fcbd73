"""Run by the environment `dify`: what Dify's plug-in for servers like OpenAI's gets, as JSON."""

from __future__ import annotations

import json
import sys

from dify_plugin import OAICompatLargeLanguageModel
from dify_plugin.entities.model.message import UserPromptMessage


def main() -> None:
    model = OAICompatLargeLanguageModel([])
    credentials = {
        "endpoint_url": f"{sys.argv[1]}/v1",
        "mode": "chat",
        "context_size": "128",
        "stream_mode_delimiter": "\\n\\n",
        "api_key": "none",
    }
    model.validate_credentials("tiny", credentials)
    messages = [UserPromptMessage(content="The old house")]
    parameters = {"max_tokens": 8, "temperature": 0}
    chunks = list(model._invoke("tiny", credentials, messages, parameters, stream=True))
    usage = chunks[-1].delta.usage
    whole = model._invoke("tiny", credentials, messages, parameters, stream=False)
    print(
        json.dumps(
            {
                "parts": [c.delta.message.content or "" for c in chunks],
                "completion_tokens": usage.completion_tokens if usage else None,
                "whole": whole.message.content,
            }
        )
    )


if __name__ == "__main__":
    main()

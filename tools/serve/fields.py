"""The fields of requests, by OpenAI's, vLLM's and Ollama's names.

`null` is the same as a field that is missing, and fields that are not known are left alone.  Types are
checked here, ranges where the fields become `Params`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

__all__ = [
    "ChatFields",
    "CompletionFields",
    "DetokenizeFields",
    "Fields",
    "Message",
    "OllamaChatFields",
    "OllamaFields",
    "OllamaGenerateFields",
    "SamplingFields",
    "ShowFields",
    "StreamOptions",
    "TokenizeFields",
]

Count = Annotated[int, Field(strict=True)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Bool = StrictBool
Ids = list[StrictInt]


class Fields(BaseModel):
    """Of any request."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="ignore")


class StreamOptions(Fields):
    """What a stream has besides its text."""

    include_usage: Bool | None = None
    continuous_usage_stats: Bool | None = None


class SamplingFields(Fields):
    """How answers are made; what `/v1/completions` and `/v1/chat/completions` share."""

    model: StrictStr | None = None
    n: Count | None = None
    best_of: Count | None = None
    stream: Bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: Count | None = None
    min_p: Number | None = None
    seed: Count | None = None
    repetition_penalty: Number | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    logit_bias: dict[str, Number] | None = None
    stop: StrictStr | list[StrictStr] | None = None
    stop_token_ids: Ids | None = None
    include_stop_str_in_output: Bool | None = None
    ignore_eos: Bool | None = None
    min_tokens: Count | None = None
    skip_special_tokens: Bool | None = None
    bad_words: list[StrictStr] | None = None
    allowed_token_ids: Ids | None = None
    return_tokens_as_token_ids: Bool | None = None
    cache_salt: StrictStr | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    user: StrictStr | None = None


class CompletionFields(SamplingFields):
    """`/v1/completions`."""

    prompt: StrictStr | list[StrictStr] | Ids | list[Ids]
    echo: Bool | None = None
    logprobs: Count | None = None
    top_logprobs: Count | None = None  # of chats, refused here
    suffix: StrictStr | None = None


class Message(Fields):
    """One of a chat's."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="allow")
    role: StrictStr
    content: StrictStr | list[dict[str, Any]] | None = None
    images: list[StrictStr] | None = None


class ChatFields(SamplingFields):
    """`/v1/chat/completions`."""

    messages: list[Message]
    max_completion_tokens: Count | None = None
    logprobs: Bool | None = None
    top_logprobs: Count | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: StrictStr | dict[str, Any] | None = None
    parallel_tool_calls: Bool | None = None
    chat_template: StrictStr | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: Bool | None = None
    continue_final_message: Bool | None = None


class TokenizeFields(Fields):
    """`/tokenize`."""

    model: StrictStr | None = None
    prompt: StrictStr | None = None
    messages: list[Message] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: Bool | None = None
    add_generation_prompt: Bool | None = None
    return_token_strs: Bool | None = None


class DetokenizeFields(Fields):
    """`/detokenize`."""

    model: StrictStr | None = None
    tokens: Ids


class OllamaOptions(Fields):
    """Ollama's names of the same."""

    temperature: Number | None = None
    top_k: Count | None = None
    top_p: Number | None = None
    min_p: Number | None = None
    seed: Count | None = None
    num_predict: Count | None = None
    num_ctx: Count | None = None
    stop: StrictStr | list[StrictStr] | None = None
    repeat_penalty: Number | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None


class OllamaFields(Fields):
    """What `/api/generate` and `/api/chat` share."""

    model: StrictStr
    stream: Bool | None = None
    options: OllamaOptions | None = None
    format: Literal["", "json"] | dict[str, Any] | None = None


class OllamaGenerateFields(OllamaFields):
    """`/api/generate`."""

    prompt: StrictStr | None = None
    system: StrictStr | None = None
    suffix: StrictStr | None = None
    raw: Bool | None = None
    images: list[StrictStr] | None = None


class OllamaChatFields(OllamaFields):
    """`/api/chat`."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


class ShowFields(Fields):
    """`/api/show`."""

    model: StrictStr | None = None
    name: StrictStr | None = None

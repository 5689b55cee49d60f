"""Bodies of requests: their fields and types, as msgspec decodes and checks them.

A field that is null is as one that is not there.
"""

import json
import re
from typing import Any, TypeVar

import msgspec

from grok1.files import unique_names
from grok1.server.refusals import RefusalError

B = TypeVar("B", bound="Body")


class Body(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A JSON object of which every field is known."""


class StreamOptions(Body):
    """What a stream has beside its text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Any = None


class SamplingBody(Body):
    """What completions and chat have in common; fields as in OpenAI's and vLLM's interfaces."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: dict[str, float] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    user: str | None = None
    top_k: int | None = None
    min_p: float | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    return_token_ids: bool | None = None
    return_top_ids: bool | None = None
    allowed_token_ids: list[int] | None = None
    priority: int | None = None
    cache_salt: str | None = None
    use_beam_search: bool | None = None
    skip_special_tokens: bool | None = None
    # Taken and ignored.
    spaces_between_special_tokens: Any = None
    length_penalty: Any = None
    request_id: Any = None
    session_id: Any = None
    store: Any = None
    metadata: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None


class CompletionBody(SamplingBody):
    """Of `/v1/completions`."""

    prompt: str | list[str | int | list[int]] | None = None
    max_tokens: int | None = None
    best_of: int | None = None
    logprobs: int | None = None
    echo: bool | None = None
    suffix: str | None = None
    prompt_logprobs: int | None = None


class Part(msgspec.Struct, kw_only=True):
    """A part of a message."""

    type: str
    text: str | None = None


class Message(msgspec.Struct, kw_only=True):
    """A message of a chat."""

    role: str
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: Any = None
    function_call: Any = None


class ChatBody(SamplingBody, kw_only=True):
    """Of `/v1/chat/completions`."""

    messages: list[Message]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    response_format: Any = None
    modalities: Any = None
    audio: Any = None
    parallel_tool_calls: Any = None
    reasoning_effort: Any = None


class TokenizeBody(Body, kw_only=True):
    """Of `/tokenize`."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Body, kw_only=True):
    """Of `/detokenize`."""

    tokens: list[int]
    model: str | None = None


class ScoreBody(Body, kw_only=True):
    """Of `/v1/score`."""

    prompt: str | list[str | int | list[int]]
    model: str | None = None
    top_logprobs: int | None = None
    add_special_tokens: bool | None = None


class TraceBody(Body, kw_only=True):
    """Of `/v1/trace`."""

    prompt: str | list[int]
    model: str | None = None
    lens_top: int | None = None
    add_special_tokens: bool | None = None


def decode(data: bytes, kind: type[B], ignore_unknown: bool = False) -> B:
    """Returns a body of a kind.

    Args:
      data: JSON.
      kind: Which.
      ignore_unknown: Take fields that are not known.

    Raises:
      RefusalError: If it is no JSON, or of another kind; the message names the field.
    """
    taken = _lenient(kind) if ignore_unknown else kind
    try:
        body = msgspec.json.decode(data, type=taken)
        _check_names(data)
        return body
    except msgspec.ValidationError as error:
        message = str(error)
        path = message.partition(" - at `$")[2].rstrip("`").lstrip(".") or None
        if message.startswith("Object contains unknown field"):
            path = message.split("`")[1]
            message = f"the field {path!r} is unknown here; leave it out"
        raise RefusalError(message, param=path) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RefusalError(f"the body must be a JSON object: {error}") from None


_NAME = re.compile(rb'"([^"]{1,256})"[ \t\r\n]*:')


def _check_names(data: bytes) -> None:
    """Refuses a name that an object has twice: msgspec takes the last, as if it were alone."""
    names = _NAME.findall(data)
    # Lists of a million ids have few names, and need not be read once more.
    if len(set(names)) == len(names):
        return
    try:
        json.loads(data, object_pairs_hook=unique_names)
    except RecursionError:
        return  # in a field that nobody reads
    except ValueError as error:
        raise RefusalError(f"the body {error}; leave out one") from None


_LENIENT: dict[type, type] = {}


def _lenient(kind: type[B]) -> type[B]:
    if kind not in _LENIENT:
        inner: list[Any] = []
        if issubclass(kind, SamplingBody):
            inner = [("stream_options", _lenient(StreamOptions) | None, None)]
        _LENIENT[kind] = msgspec.defstruct(
            kind.__name__, inner, bases=(kind,), forbid_unknown_fields=False, kw_only=True
        )
    return _LENIENT[kind]

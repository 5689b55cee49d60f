"""Chats: messages as one text, which a base model continues as a transcript.

The released model was trained on no chat format. So a template is the server's owner's to choose:
`transcript`, which comes along, or a file in the language of Jinja.
"""

import math
import pathlib
import re
import secrets
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from grok1.server.asks import Ask, Limits, Prompt, Sampler
from grok1.server.bodies import ChatBody, Message
from grok1.server.core import Server
from grok1.server.fields import within
from grok1.server.refusals import RefusalError
from grok1.server.texts import encode_text
from grok1.tokenizer import Tokenizer

# What a template has for the tokens themselves: as text, messages could hold them too.
_BOS, _EOS = (f"\ufdd0{secrets.token_hex(8)}\ufdd1" for _ in range(2))


class Template(NamedTuple):
    """How messages become a text.

    Attributes:
      render: Takes messages as dicts of "role", "content" and, where it was given, "name"; returns
        what `encoded` takes.
      stops: What ends the assistant's message.
    """

    render: Callable[[Sequence[dict[str, str]]], str]
    stops: tuple[str, ...]


def _transcript(messages: Sequence[dict[str, str]]) -> str:
    names = {"system": "System", "developer": "System", "user": "User", "assistant": "Assistant"}
    lines = [
        f"{names.get(one['role'], one['role'].title())}: {one['content']}\n\n" for one in messages
    ]
    return "".join(lines) + "Assistant:"


TRANSCRIPT = Template(_transcript, ("\n\nUser:", "\n\nSystem:"))
"""Speakers' names before their words, as in a script."""


def load_template(name: str) -> Template:
    """Returns a template by the name that `--chat-template` has for it.

    Args:
      name: "transcript", or the path of a file in the language of Jinja, to which `messages`,
        `add_generation_prompt`, `bos_token` and `eos_token` are known.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If it is no template.
      ImportError: If Jinja is not installed.
    """
    if name == "transcript":
        return TRANSCRIPT
    path = pathlib.Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"{name}: no such file; a chat template is a file, or transcript")
    try:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise ImportError("a chat template needs the package jinja2: pip install jinja2") from error

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    try:
        template = environment.from_string(path.read_text(encoding="utf-8"))
    except (jinja2.TemplateError, UnicodeDecodeError) as error:
        raise ValueError(f"{name}: is no template: {error}") from None

    def render(messages: Sequence[dict[str, str]]) -> str:
        try:
            return template.render(
                messages=list(messages), add_generation_prompt=True, bos_token=_BOS, eos_token=_EOS
            )
        except (jinja2.TemplateError, TypeError, ValueError, OverflowError) as error:
            raise RefusalError(
                f"the chat template cannot write these messages: {error}", param="messages"
            ) from None

    return Template(render, ())


def encoded(tokenizer: Tokenizer, text: str, *, add_bos: bool = False) -> list[int]:
    """Returns the ids of what a template has written, in which `bos_token` is one token.

    Args:
      tokenizer: The model's; what it has no token for is left out.
      text: From `Template.render`.
      add_bos: Begin with [BOS], where the template does not.
    """
    ids = {_BOS: tokenizer.bos_id, _EOS: tokenizer.eos_id}
    tokens: list[int] = []
    for part in re.split(f"({_BOS}|{_EOS})", text):
        tokens += [ids[part]] if part in ids else encode_text(tokenizer, part)
    tokens = [token for token in tokens if token >= 0]
    if add_bos and tokens[:1] != [tokenizer.bos_id]:
        return encode_text(tokenizer, "", add_bos=True) + tokens
    return tokens


def chat_ask(body: ChatBody, server: Server, limits: Limits, template: Template | None) -> Ask:
    """Returns what a chat asks for.

    Raises:
      RefusalError: If a field is out of range, or there is no template.
    """
    if template is None:
        raise RefusalError(
            "this model was trained on no chat format, and the server was started without a "
            "template for one: use /v1/completions, or start it with --chat-template transcript",
            code="no_chat_template",
        )
    for name in ("tools", "functions", "audio", "modalities"):
        if getattr(body, name) not in (None, [], ["text"]):
            raise RefusalError(f"{name} are not supported here", param=name)
    if body.response_format not in (None, {"type": "text"}):
        raise RefusalError("response_format must be text here", param="response_format")
    if server.model.tokenizer is None:
        raise RefusalError("this model has no tokenizer; use /v1/completions with token ids")
    if not body.messages:
        raise RefusalError("messages must hold at least one message", param="messages")
    if len(body.messages) > 1024:
        raise RefusalError("messages must be at most 1024", param="messages")
    text = template.render([_plain(message) for message in body.messages])
    add_bos = bool(body.add_special_tokens) and limits.add_bos
    tokens = encoded(server.model.tokenizer, text, add_bos=add_bos)
    if not tokens:
        raise RefusalError("the chat template has written nothing", param="messages")
    if (keep := body.truncate_prompt_tokens) is not None:
        within("truncate_prompt_tokens", keep, 1, math.inf, "1 or more")
        tokens = tokens[-keep:]
    num_top = server.num_top
    within("top_logprobs", body.top_logprobs, 0, num_top, f"from 0 to {num_top}")
    if body.top_logprobs and not body.logprobs:
        raise RefusalError("top_logprobs needs logprobs", param="top_logprobs")
    num_choices = 1 if body.n is None else body.n
    within("n", num_choices, 1, 128, "from 1 to 128")
    given = body.max_completion_tokens
    given = body.max_tokens if given is None else given
    room = max(1, server.sizes.capacity - len(tokens))
    within("max_tokens", given, 1, math.inf, "1 or more")
    max_tokens = limits.usual(room) if given is None else given
    sampler = Sampler(body, server, limits, max_tokens, template.stops)
    top = (body.top_logprobs or 0) if body.logprobs else None
    prompt = Prompt(tokens, server.model.tokenizer.decode(tokens))
    handles = [sampler.handles(prompt, 0, num_choices, top)]
    with_ids = bool(body.return_token_ids)
    return Ask([prompt], handles, num_choices, top, with_ids=with_ids)


def _plain(message: Message) -> dict[str, str]:
    for name in ("tool_calls", "function_call"):
        if getattr(message, name):
            raise RefusalError(
                f"{name} are not supported here; give a message's content alone",
                param="messages",
            )
    content: Any = message.content
    if isinstance(content, list):
        for part in content:
            if part.type != "text" or part.text is None:
                raise RefusalError(
                    f"a message's content must be text, found a part of type {part.type!r:.40}",
                    param="messages",
                )
        content = "".join(part.text for part in content)
    if content is None:
        raise RefusalError("a message must have content", param="messages")
    plain = {"role": message.role, "content": content}
    return plain if message.name is None else {**plain, "name": message.name}

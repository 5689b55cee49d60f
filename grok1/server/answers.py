"""Answers to completions: whole, and as events."""

import asyncio
import dataclasses
import secrets
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any

import numpy as np

from grok1.engine.sampling import WHY_NOT_FINITE
from grok1.server.asks import Ask, Prompt
from grok1.server.errors import NoTokenError
from grok1.server.handle import Handle, Piece
from grok1.server.texts import Entry, TokenTexts, Track, chat_logprobs, legacy_logprobs, top_ids


@dataclasses.dataclass(frozen=True)
class Form:
    """How answers to one request look.

    Attributes:
      texts: Names of tokens.
      model: The model's name.
      fingerprint: Changes when bits of an answer may.
      is_chat: Whether it is a chat's.
      id: Of the answer.
      created: When, in seconds since 1970.
    """

    texts: TokenTexts
    model: str
    fingerprint: str
    is_chat: bool = False
    id: str = dataclasses.field(default_factory=lambda: secrets.token_hex(12))
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def head(self, is_event: bool) -> dict[str, Any]:
        """Returns what every answer and event begins with."""
        kind = "text_completion"
        if self.is_chat:
            kind = "chat.completion.chunk" if is_event else "chat.completion"
        return {
            "id": f"{'chatcmpl' if self.is_chat else 'cmpl'}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    def logprobs(self, entries: Sequence[Entry]) -> dict[str, list]:
        """Returns the log-probabilities of some tokens."""
        make = chat_logprobs if self.is_chat else legacy_logprobs
        return make(entries, self.texts)


def usage(ask: Ask, num_new: int | None = None) -> dict[str, Any]:
    """Returns what a request has taken.

    Args:
      ask: The request.
      num_new: Tokens that came; None to count those of finished completions.
    """
    if num_new is None:
        num_new = sum(len(handle.builder.build().tokens) for handle in ask.every_handle)
    num_prompt = sum(len(prompt.tokens) for prompt in ask.prompts)
    reused = sum(min(handle.num_reused for handle in handles) for handles in ask.handles)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_new,
        "total_tokens": num_prompt + num_new,
        "prompt_tokens_details": {"cached_tokens": reused},
    }


def prompt_entries(
    prompt: Prompt, handle: Handle, texts: TokenTexts, num_top: int
) -> Iterator[Entry]:
    """Yields the entries of a prompt's tokens.

    Raises:
      NoTokenError: If one has no finite log-probability.
    """
    track = Track(texts, begins=True)
    yield track.entry(prompt.tokens[0], None, None, num_top)
    at = 1
    for part in handle.request.prompt_scores:
        found = part.on_host()
        is_finite = np.isfinite(found.logprobs)
        if not is_finite.all():
            raise NoTokenError(
                f"token {at + int(np.argmin(is_finite))} of the prompt has no log-probability: "
                f"{WHY_NOT_FINITE}"
            )
        columns = zip(found.logprobs, found.top_tokens, found.top_logprobs, strict=True)
        for logprob, ids, values in columns:
            best = dict(zip(ids.tolist(), values.tolist(), strict=True))
            yield track.entry(prompt.tokens[at], float(logprob), best, num_top)
            at += 1


class Choice:
    """One choice of an answer, and how far it has been told."""

    def __init__(self, ask: Ask, form: Form, index: int, prompt: Prompt, handle: Handle):
        self._ask, self._form, self.index = ask, form, index
        self.prompt, self.handle = prompt, handle
        self.num_told = 0
        offset = len(prompt.text) if ask.echo else 0
        self._track = Track(form.texts, begins=False, offset=offset)

    def whole(self) -> dict[str, Any]:
        """Returns the choice of a request that is over."""
        ask, form, completion = self._ask, self._form, self.handle.builder.build()
        text = (self.prompt.text if ask.echo else "") + (completion.text or "")
        entries = self._echoed()
        if ask.num_top is not None:
            entries += self.entries(completion)
        choice: dict[str, Any] = {"index": self.index}
        if form.is_chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        choice["logprobs"] = form.logprobs(entries) if ask.num_top is not None else None
        if ask.with_top_ids:
            choice["top_ids"] = top_ids(entries, form.texts)
        choice |= self._end()
        if ask.with_ids:
            choice |= {
                "token_ids": completion.tokens,
                "prompt_token_ids": self.prompt.tokens,
            }
        if ask.num_prompt_top is not None:
            choice["prompt_logprobs"] = self._prompt_logprobs(ask.num_prompt_top)
        return choice

    def entries(self, completion: Any) -> list[Entry]:
        """Returns the entries of the new tokens."""
        columns = zip(
            completion.tokens, completion.logprobs or [], completion.top_logprobs or [], strict=True
        )
        return [self._track.entry(*column, self._ask.num_top or 0) for column in columns]

    def event(self, pieces: Sequence[Piece], is_last: bool) -> dict[str, Any]:
        """Returns the choice of an event.

        Args:
          pieces: What has come.
          is_last: Whether nothing more comes.
        """
        ask, form, is_first = self._ask, self._form, not self.num_told
        self.num_told += len(pieces)
        text = "".join(piece.text for piece in pieces)
        entries: list[Entry] = []
        if is_first and ask.echo:
            text = self.prompt.text + text
            entries += self._echoed()
        if ask.num_top is not None:
            entries += [
                self._track.entry(
                    piece.sampled.token,
                    piece.sampled.logprob,
                    piece.sampled.alternatives,
                    ask.num_top,
                )
                for piece in pieces
            ]
        choice: dict[str, Any] = {"index": self.index}
        if form.is_chat:
            choice["delta"] = {"content": text}
        else:
            choice["text"] = text
        choice["logprobs"] = form.logprobs(entries) if ask.num_top is not None else None
        if ask.with_top_ids:
            choice["top_ids"] = top_ids(entries, form.texts)
        choice |= self._end() if is_last else {"finish_reason": None}
        if ask.with_ids:
            choice["token_ids"] = [piece.sampled.token for piece in pieces]
            if is_first:
                choice["prompt_token_ids"] = self.prompt.tokens
        return choice

    def _end(self) -> dict[str, Any]:
        completion = self.handle.builder.build()
        reason = "stop" if completion.stop_reason == "stop" else "length"
        eos = self._form.texts.tokenizer.eos_id if self._form.texts.tokenizer else None
        match = completion.stop_match
        end = {"finish_reason": reason, "stop_reason": None if match == eos else match}
        return {**end, "warnings": told} if (told := self.handle.warnings) else end

    def _echoed(self) -> list[Entry]:
        ask = self._ask
        if not ask.echo or ask.num_top is None:
            return []
        return list(prompt_entries(self.prompt, self.handle, self._form.texts, ask.num_top))

    def _prompt_logprobs(self, num_top: int) -> list[dict[str, Any] | None]:
        """As vLLM has it: for each token the best and itself by id, with rank and text."""
        texts, found = self._form.texts, []
        ranks = np.concatenate(
            [[0], *(part.on_host().ranks for part in self.handle.request.prompt_scores)]
        )
        entries = prompt_entries(self.prompt, self.handle, texts, num_top)
        for entry, rank in zip(entries, ranks.tolist(), strict=True):
            if entry.top is None:
                found.append(None)
                continue
            found.append(
                {
                    str(token): {
                        "logprob": logprob,
                        "rank": rank + 1 if token == entry.token else place,
                        "decoded_token": entry.name if token == entry.token else texts.name(token),
                    }
                    for place, (token, logprob) in enumerate(entry.top.items(), start=1)
                }
            )
        return found


def choices_of(ask: Ask, form: Form) -> list[Choice]:
    """Returns the choices of an answer, the best of each prompt where there are more.

    `best_of` needs requests that are over.
    """
    made = []
    for number, (prompt, handles) in enumerate(zip(ask.prompts, ask.handles, strict=True)):
        if len(handles) > ask.num_choices:
            handles = sorted(handles, key=_mean_logprob, reverse=True)[: ask.num_choices]
        first = number * ask.num_choices
        made += [Choice(ask, form, first + k, prompt, one) for k, one in enumerate(handles)]
    return made


def whole(ask: Ask, form: Form) -> dict[str, Any]:
    """Returns the answer to a request that is over."""
    answer = form.head(is_event=False)
    answer["choices"] = [choice.whole() for choice in choices_of(ask, form)]
    answer["usage"] = usage(ask)
    return answer


async def events(
    ask: Ask, form: Form, *, include_usage: bool = False, continuous_usage: bool = False
) -> AsyncGenerator[dict[str, Any] | None, None]:
    """Yields the events of an answer as they come; None when nothing came for a while.

    Args:
      ask: The request, whose handles wait.
      form: How it looks.
      include_usage: End with an event that has the usage.
      continuous_usage: Let every event have it.

    Raises:
      ServingError: If the request ends without an answer.
    """
    choices = choices_of(ask, form)
    # No longer than this: a client that does not read leaves tokens with the handles, which end.
    queue: asyncio.Queue[tuple[Choice, list[Piece], bool] | Exception] = asyncio.Queue(len(choices))
    num_new, is_echo_long = 0, ask.echo and ask.is_long

    async def pump(choice: Choice) -> None:
        handle, is_told = choice.handle, False
        async for group in handle.groups():
            is_told = handle.is_over and handle.error is None and not handle.num_pending
            await queue.put((choice, group, is_told))
        if handle.error is not None:
            await queue.put(handle.error)
        elif not is_told:
            await queue.put((choice, [], True))

    def event(told: list[dict[str, Any]], with_usage: bool) -> dict[str, Any]:
        made = {**form.head(is_event=True), "choices": told}
        if with_usage:
            made["usage"] = usage(ask, num_new)
        elif include_usage:
            made["usage"] = None  # as OpenAI's interface has it in all events but the last
        return made

    tasks = [asyncio.create_task(pump(choice)) for choice in choices]
    try:
        if form.is_chat:
            for choice in choices:
                delta = {"role": "assistant", "content": ""}
                told = {"index": choice.index, "delta": delta, "finish_reason": None}
                yield event([told], continuous_usage)
        num_left = len(choices)
        while num_left:
            try:
                item = await asyncio.wait_for(queue.get(), PING_SECONDS)
            except TimeoutError:
                yield None
                continue
            if isinstance(item, Exception):
                raise item
            choice, pieces, is_last = item
            num_new += len(pieces)
            num_left -= is_last
            if is_echo_long and not choice.num_told:
                told = await asyncio.to_thread(choice.event, pieces, is_last)
            else:
                told = choice.event(pieces, is_last)
            yield event([told], continuous_usage)
        if include_usage:
            yield event([], True)
    finally:
        for task in tasks:
            task.cancel()


PING_SECONDS = 15.0
"""So often a stream that has nothing to say says that it is there."""


def _mean_logprob(handle: Handle) -> float:
    logprobs = handle.builder.build().logprobs or [0.0]
    return sum(logprobs) / len(logprobs)

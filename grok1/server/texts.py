"""Tokens as the protocol shows them: each in its context, so that no two of a text are alike."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from grok1.tokenizer import StreamDecoder, Tokenizer

_LOWEST = -9999.0  # in place of -infinity, which JSON does not have


class TokenTexts:
    """What single tokens are called; made once for a tokenizer."""

    def __init__(self, tokenizer: Tokenizer | None):
        self.tokenizer = tokenizer
        self._names: dict[int, str] = {}

    def name(self, token: int) -> str:
        r"""Returns the text that a token adds behind other text.

        A part of a character is `bytes:\xf0`, as in OpenAI's interface; a control piece is as the
        vocabulary spells it; without a tokenizer a token is `token_id:5`.
        """
        if (found := self._names.get(token)) is None:
            found = self._names[token] = self._named(token)
        return found

    def bytes_of(self, token: int) -> list[int]:
        """Returns the UTF-8 bytes of a token."""
        return list(self.tokenizer.token_bytes(token)) if self.tokenizer else []

    def _named(self, token: int) -> str:
        if self.tokenizer is None:
            return f"token_id:{token}"
        data = self.tokenizer.token_bytes(token)
        if not data:
            return self.tokenizer.piece(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class Entry(NamedTuple):
    """A token with what is reported of it.

    Attributes:
      token: Its id.
      name: Its text in context.
      logprob: Its log-probability; None where nothing comes before it.
      top: The most probable tokens in its place and itself, by id.
      offset: Characters before it.
    """

    token: int
    name: str
    logprob: float | None
    top: dict[int, float] | None
    offset: int


class Track:
    """Follows the tokens of one text: their names, and where they begin."""

    def __init__(self, texts: TokenTexts, *, begins: bool, offset: int = 0):
        """Starts a text.

        Args:
          texts: Names of tokens.
          begins: True where the first token is the first of a whole text, whose space goes.
          offset: Characters before it.
        """
        self._texts, self._begins, self.offset = texts, begins, offset
        self._decoder: StreamDecoder | None = None
        if texts.tokenizer is not None:
            self._decoder = texts.tokenizer.stream_decoder(continuation=not begins)

    def entry(
        self, token: int, logprob: float | None, best: dict[int, float] | None, num_top: int
    ) -> Entry:
        """Returns the entry of the next token.

        Args:
          token: Its id.
          logprob: Its log-probability.
          best: The most probable tokens in its place.
          num_top: How many of these to report.
        """
        offset, name = self.offset, self._texts.name(token)
        if self._begins:
            name = name.removeprefix(" ")
            # A control piece leaves the next one the first.
            self._begins = not self._texts.bytes_of(token)
        if self._decoder is not None:
            added = self._decoder.push(token)
            self.offset += len(added)
            if name and added.endswith(name):
                # A character that was left unfinished is told with the next token, and before it.
                offset = self.offset - len(name)
        if logprob is None or best is None:
            return Entry(token, name, None, None, offset)
        top = {key: finite(value) for key, value in list(best.items())[:num_top]}
        top.setdefault(token, finite(logprob))
        return Entry(token, name, finite(logprob), top, offset)


def finite(logprob: float) -> float:
    """A number for JSON."""
    return max(float(logprob), _LOWEST)


def legacy_logprobs(entries: Sequence[Entry], texts: TokenTexts) -> dict[str, Any]:
    """Returns `logprobs` of a completion."""
    tops = [
        None if entry.top is None else {name: entry.top[token] for name, token in named.items()}
        for entry, named in zip(entries, top_ids(entries, texts), strict=True)
    ]
    return {
        "tokens": [entry.name for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": tops,
        "text_offset": [entry.offset for entry in entries],
    }


def top_ids(entries: Sequence[Entry], texts: TokenTexts) -> list[dict[str, int]]:
    """Returns for each token the ids of `top_logprobs` by their text."""
    found = []
    for entry in entries:
        named: dict[str, int] = {}
        for token in entry.top or {}:
            name = entry.name if token == entry.token else texts.name(token)
            # Of two tokens of one name the better stays, but the sampled one is always there.
            if token == entry.token or name not in named:
                named[name] = token
        found.append(named)
    return found


def chat_logprobs(entries: Sequence[Entry], texts: TokenTexts) -> dict[str, Any]:
    """Returns `logprobs` of a message."""

    def one(token, name, logprob):
        return {"token": name, "logprob": logprob, "bytes": texts.bytes_of(token)}

    content = []
    for entry in entries:
        best = [one(token, texts.name(token), lp) for token, lp in (entry.top or {}).items()]
        content.append({**one(entry.token, entry.name, entry.logprob), "top_logprobs": best})
    return {"content": content, "refusal": None}


def encode_text(tokenizer: Tokenizer, text: str, *, add_bos: bool = False) -> list[int]:
    """As `Tokenizer.encode`, without a warning for each of a stranger's texts."""
    return tokenizer.encode(text.replace("▁", " "), add_bos=add_bos)


def special_id(tokenizer: Tokenizer, text: str) -> int | None:
    """Returns the id of [BOS], [EOS], [PAD] or [UNK], where a text is its spelling and no more.

    Harnesses ask so for the tokens that `/tokenizer_info` names. In a longer text they are plain
    characters, as in every prompt.
    """
    ids = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id)
    return next((token for token in ids if token >= 0 and tokenizer.piece(token) == text), None)


def utf8_escape(data: bytes) -> bytes:
    """Escapes the line ends of Unicode in JSON, at which some readers of events break lines."""
    for character in ("\u2028", "\u2029", "\u0085"):
        data = data.replace(character.encode(), b"\\u%04x" % ord(character))
    return data

"""Text to token ids and back, by the SentencePiece model that Grok-1 was released with.

The released model has V = 131,072 pieces: ordinary BPE pieces, 256 single bytes for characters
that have no piece, the special pieces [PAD], [BOS], [EOS], [UNK], and user-defined ones. Of the
last, those spelt `<|...|>` (`<|separator|>` is 47) steer the model, so text must not be able to
spell them by accident: `Tokenizer.encode` reads them as ordinary characters unless told otherwise.
"""

import codecs
import operator
import os
import pathlib
import re
import struct
import threading
from collections.abc import Iterable, Iterator
from typing import Any, SupportsIndex

import sentencepiece

from grok1.files import CheckpointError, read_bounded
from grok1.keywords import check_flags, shown, warn

_MOST_BYTES = 1 << 28  # of a file; the released one has 2.2 MB
_SPACE = "▁"  # U+2581, as pieces spell it

# Values of the enum SentencePiece.Type in sentencepiece_model.proto.
_ORDINARY, _CONTROL, _USER_DEFINED = 1, 3, 4

_CONTROL_SPELLING = re.compile(rb"<\|.*\|>", re.DOTALL)
# A protobuf varint is little-endian, 7 bits a byte; the top bit says that another byte follows.
_FIELD_HEAD = re.compile(rb"([\x80-\xff]*[\x00-\x7f])([\x80-\xff]*[\x00-\x7f])?")
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")


class Tokenizer:
    """A SentencePiece model as Grok-1 uses it.

    Encoding and decoding are SentencePiece's own, with its rule for the first space: encoding puts
    one before the text, and decoding takes one away from the start. Pieces spell a space as "▁"
    (U+2581), so that a text in which that character stands cannot be told from one with a space
    there: it is read as one, with a warning. Every other character comes back as it was.

    Attributes:
      vocab_size: V, the number of pieces; token ids are in [0, V).
      pad_id: Id of [PAD], 0 as released.
      bos_id: Id of [BOS], 1 as released.
      eos_id: Id of [EOS], 2 as released.
      unk_id: Id of [UNK], 3 as released; no text needs it, since any byte has a piece.

    Args:
      model_proto: A serialized SentencePiece model, the content of `tokenizer.model`.

    Raises:
      ValueError: If the bytes are no SentencePiece model.
    """

    def __init__(self, model_proto: bytes):
        self._processor, self._plain_processor = _processors(model_proto)
        self.vocab_size: int = self._processor.vocab_size()
        self.pad_id: int = self._processor.pad_id()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        self.unk_id: int = self._processor.unk_id()

    def __repr__(self) -> str:
        return f"Tokenizer({self.vocab_size} pieces)"

    @classmethod
    def load(cls, path: str | pathlib.Path) -> "Tokenizer":
        """Reads a SentencePiece model file; errors name it.

        Raises:
          FileNotFoundError: If there is no such file.
          CheckpointError: If the file cannot be read, or is no SentencePiece model.
        """
        path = pathlib.Path(os.path.expanduser(path))
        if not os.path.lexists(path):
            raise FileNotFoundError(
                f"{path}: no such file; expected the SentencePiece model of Grok-1, tokenizer.model"
            )
        if (path / "tokenizer.model").is_file():
            remedy = f"give the file in it: {path / 'tokenizer.model'}"
            raise CheckpointError(path, "is a directory", remedy, "irregular")
        data = read_bounded(path, _MOST_BYTES)
        try:
            return cls(data)
        except ValueError as error:
            raise CheckpointError(path, str(error)) from None

    def check_vocabulary(self, vocab_size: int) -> None:
        """Checks that this is the tokenizer of a model with so many tokens.

        Raises:
          ValueError: If it is another model's.
        """
        if self.vocab_size != vocab_size:
            raise ValueError(
                f"the tokenizer has {self.vocab_size} pieces, the model's vocabulary {vocab_size}; "
                "give the tokenizer.model that belongs to the checkpoint"
            )

    def encode(self, text: str, *, add_bos: bool = False, allow_control: bool = False) -> list[int]:
        """Returns the token ids of a text.

        Args:
          text: Any text; "" has no tokens.
          add_bos: Whether to put [BOS] first. The released sampler does not.
          allow_control: Whether `<|separator|>` and the other pieces spelt `<|...|>` become their
            one id. Pass it only for text that the caller wrote: a user could otherwise forge them.
            The spelling "[BOS]" is plain characters in either case.

        Warns:
          UserWarning: If the text holds "▁" (U+2581), which is read as a space.

        Raises:
          TypeError: If the text is not a str, or a switch is neither True nor False.
          ValueError: If the text holds half a surrogate pair, or [BOS] is asked of a model that
            has none.
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a str, found {type(text).__name__}")
        check_flags(add_bos=add_bos, allow_control=allow_control)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text holds the lone surrogate U+{ord(text[error.start]):04X} at index "
                f"{error.start}, which is no character; decode its source again with "
                'errors="replace"'
            ) from None
        if _SPACE in text:
            warn(
                "text holds the character U+2581, with which the vocabulary spells a space: it is "
                "read as one; put another in its place, such as _, if it matters"
            )
        if add_bos and self.bos_id < 0:
            raise ValueError("add_bos needs a [BOS] piece, and this tokenizer has none")
        processor = self._processor if allow_control else self._plain_processor
        tokens = processor.encode(text)
        return [self.bos_id, *tokens] if add_bos else tokens

    def decode(self, tokens: Iterable[SupportsIndex]) -> str:
        """Returns the text of a whole token sequence.

        Control pieces have no text; [UNK] has the model's stand-in, "[UNK]" as released; bytes that
        are not UTF-8 become one U+FFFD each.

        Args:
          tokens: Ids in [0, V).

        Raises:
          ValueError: If a token is not an integer or is out of range.
        """
        return self._processor.decode([_token_id(token, self.vocab_size) for token in tokens])

    def piece(self, token: SupportsIndex) -> str:
        """Returns the spelling of one token in the vocabulary, such as "▁the" or "<0x0A>".

        Raises:
          ValueError: If the token is not an integer or is out of range.
        """
        return self._processor.id_to_piece(_token_id(token, self.vocab_size))

    def token_texts(self, tokens: Iterable[SupportsIndex]) -> list[str]:
        """Returns what each token of a text adds to it, to be read one by one.

        A character spread over several byte pieces is the text of the last one; the others, and
        control pieces, which have no text, are as `piece` spells them.

        Args:
          tokens: The whole text's, so that a first piece "▁word" is "word" as in `decode`.

        Raises:
          ValueError: If a token is not an integer or is out of range.
        """
        decoder = self.stream_decoder(continuation=False)
        return [decoder.push(token) or self.piece(token) for token in tokens]

    def token_bytes(self, token: SupportsIndex) -> bytes:
        """Returns the UTF-8 bytes that a token adds behind other text; none for a control piece.

        Raises:
          ValueError: If the token is not an integer or is out of range.
        """
        token = _token_id(token, self.vocab_size)
        if self._processor.is_control(token):
            return b""
        piece = self._processor.id_to_piece(token)
        if self._processor.is_byte(token):  # "<0xE5>"
            return bytes.fromhex(piece[3:5])
        return piece.replace(_SPACE, " ").encode()

    @property
    def vocabulary(self) -> list[tuple[bytes, float, int]]:
        """Every piece in the order of ids: UTF-8 spelling, score, and SentencePiece's type.

        The types are 1 ordinary, 2 unknown, 3 control, 4 user-defined, 5 unused and 6 byte.
        """
        found, proto = [], self.model_proto
        for number, begin, end in _fields(proto, 0, len(proto)):
            if number == 1:
                piece = {key: proto[start:stop] for key, start, stop in _fields(proto, begin, end)}
                (score,) = struct.unpack("<f", piece.get(2, bytes(4)))
                found.append((piece[1], score, piece[3][0] if 3 in piece else _ORDINARY))
        return found

    @property
    def model_proto(self) -> bytes:
        """The serialized SentencePiece model, the content of `tokenizer.model`."""
        return self._processor.serialized_model_proto()

    def stream_decoder(self, *, continuation: bool = True) -> "StreamDecoder":
        """Returns a decoder to which generated tokens are given one by one.

        Args:
          continuation: True if the tokens follow a text already shown, so that a first piece
            "▁word" is " word"; False if they are the whole text, so that it is "word" as in
            `decode`.
        """
        return StreamDecoder(self._processor, continuation=continuation)


class StreamDecoder:
    """Turns tokens into text as they come; `Tokenizer.stream_decoder` makes one.

    The texts of all `push` calls and one `flush` make, joined, what `Tokenizer.decode` makes of the
    whole sequence. A character that is spread over several byte pieces comes with its last one.
    """

    def __init__(self, processor: sentencepiece.SentencePieceProcessor, *, continuation: bool):
        self._processor = processor
        self._at_start = not continuation
        # This error handler marks every undecodable byte by itself, as SentencePiece replaces
        # them; "replace" would put one U+FFFD for up to three bytes of a truncated character.
        self._utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")

    def push(self, token: SupportsIndex) -> str:
        """Returns the text that this token makes certain, "" inside an unfinished character.

        Raises:
          ValueError: If the token is not an integer in [0, V).
        """
        token = _token_id(token, self._processor.vocab_size())
        if self._processor.is_byte(token):
            self._at_start = False
            piece = self._processor.id_to_piece(token)  # "<0xE5>"
            return self._decode_bytes(bytes.fromhex(piece[3:5]), final=False)
        held_back = self.flush()
        # Behind any text, [UNK] for one, SentencePiece leaves the space of "▁word" in place.
        context = [] if self._at_start else [self._processor.unk_id()]
        text = self._processor.decode([*context, token])[len(self._processor.decode(context)) :]
        self._at_start = self._at_start and self._processor.is_control(token)
        return held_back + text

    def flush(self) -> str:
        """Returns what is held back: U+FFFD for each byte of an unfinished character, or ""."""
        return self._decode_bytes(b"", final=True)

    def _decode_bytes(self, data: bytes, *, final: bool) -> str:
        return _ESCAPED_BYTE.sub("\ufffd", self._utf8.decode(data, final))


def is_control_spelling(piece: bytes) -> bool:
    """Whether a piece is spelt `<|...|>`, as those that steer the model."""
    return _CONTROL_SPELLING.fullmatch(piece) is not None


def _token_id(token: Any, vocab_size: int) -> int:
    try:
        index = None if isinstance(token, bool) else operator.index(token)
    except TypeError:
        index = None
    if index is None:
        raise ValueError(f"token id must be an integer in [0, {vocab_size}), found {shown(token)}")
    if not 0 <= index < vocab_size:
        raise ValueError(f"token id {index} is out of range, expected [0, {vocab_size})")
    return index


_Pair = tuple[sentencepiece.SentencePieceProcessor, sentencepiece.SentencePieceProcessor]

# A notebook loads one model several ways; of Grok-1's a pair takes a tenth of a second. Compared,
# which takes a tenth of what it takes to hash them. The last that was used is the last.
_KNOWN: list[tuple[bytes, _Pair]] = []
_MOST_KNOWN = 2
_LOCK = threading.Lock()


def _processors(model_proto: bytes) -> _Pair:
    """Returns what `_new_processors` does, the same for the same bytes."""
    with _LOCK:
        for i, (known, pair) in enumerate(_KNOWN):
            if known == model_proto:
                _KNOWN.append(_KNOWN.pop(i))
                return pair
        pair = _new_processors(model_proto)
        _KNOWN.append((model_proto, pair))
        del _KNOWN[:-_MOST_KNOWN]
        return pair


def _new_processors(model_proto: bytes) -> _Pair:
    """Returns what reads `<|...|>` in a text as the pieces that steer the model, and what does not.

    Only pieces that stand for characters take part in encoding: in the second the `<|...|>` pieces
    are of the kind of [BOS], which no text becomes.
    """
    processor = _processor(model_proto)
    try:
        processor.id_to_piece(list(range(processor.vocab_size())))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"not a SentencePiece model that is whole: a piece is not UTF-8, {error.object!r:.80}; "
            "copy the file again"
        ) from None
    return processor, _processor(_with_control_spellings_inert(model_proto))


def _processor(model_proto: bytes) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model_proto)
    except RuntimeError:
        raise ValueError(
            f"not a SentencePiece model: found {len(model_proto)} bytes that do not parse as one, "
            "expected tokenizer.model as released with Grok-1, 2229219 bytes"
        ) from None
    return processor


def _with_control_spellings_inert(model_proto: bytes) -> bytes:
    """Returns the model with its user-defined pieces `<|...|>` made control pieces.

    The type of a piece is one byte, so the edit is in place and needs no protobuf library.
    """
    model = bytearray(model_proto)
    found = -1
    for number, begin, end in _fields(model_proto, 0, len(model_proto)):
        if found < begin:
            found = model_proto.find(b"<|", begin)
            found = len(model_proto) if found < 0 else found
        # Field 1 is a piece; all but a few of them are passed over without reading on.
        if number != 1 or found >= end:
            continue
        piece = {field: (start, stop) for field, start, stop in _fields(model_proto, begin, end)}
        spelling = model_proto[slice(*piece[1])]
        # A piece without field 3 is an ordinary one.
        if 3 in piece and _CONTROL_SPELLING.fullmatch(spelling):
            type_at = piece[3][0]
            if model[type_at] == _USER_DEFINED:
                model[type_at] = _CONTROL
    return bytes(model)


def _fields(data: bytes, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yields each protobuf field of data[begin:end] as its number, value begin and value end."""
    while begin < end:
        # As all but a few of 131,072 pieces are: bytes, of which kind and number take one each.
        if data[begin] & 0x87 == 2 and data[begin + 1] < 0x80:
            value_end = begin + 2 + data[begin + 1]
            yield data[begin] >> 3, begin + 2, value_end
            begin = value_end
            continue
        head = _FIELD_HEAD.match(data, begin)
        assert head, "SentencePiece has read these bytes already"
        key, length = (
            sum((byte & 0x7F) << 7 * place for place, byte in enumerate(varint))
            for varint in head.groups(b"")
        )
        match key & 7:
            case 0:  # a varint
                begin, value_end = head.span(2)
            case 2:  # bytes, after their number
                begin, value_end = head.end(2), head.end(2) + length
            case 5:  # four bytes
                begin, value_end = head.end(1), head.end(1) + 4
            case wire_type:
                raise ValueError(f"a SentencePiece model has no protobuf wire type {wire_type}")
        yield key >> 3, begin, value_end
        begin = value_end

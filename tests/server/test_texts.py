"""Tokens as clients see them: named by the text that they add, part of a character by its bytes."""

import json

import pytest

from grok1.server.texts import Entry, TokenTexts, Track, special_id, top_ids, utf8_escape


@pytest.fixture(scope="module")
def texts(toy) -> TokenTexts:
    return TokenTexts(toy.tokenizer)


@pytest.fixture(scope="module")
def ids(toy) -> dict[str, int]:
    """Tokens by the spelling of the vocabulary."""
    return {toy.tokenizer.piece(token): token for token in range(toy.tokenizer.vocab_size)}


@pytest.mark.parametrize(
    ("piece", "name", "data"),
    [
        ("▁the", " the", b" the"),
        ("<0x41>", "A", b"A"),
        ("<0xE5>", "bytes:\\xe5", b"\xe5"),
        ("[EOS]", "[EOS]", b""),
    ],
)
def test_a_token_has_a_name_and_bytes(texts, ids, piece, name, data):
    assert texts.name(ids[piece]) == name
    assert texts.bytes_of(ids[piece]) == list(data)


def test_without_a_tokenizer_a_token_is_its_id():
    texts = TokenTexts(None)
    assert (texts.name(5), texts.bytes_of(5)) == ("token_id:5", [])


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize(
    "pieces",
    [
        ["▁the", "<0xE5>", "▁the", "A"],  # a character that the next token leaves unfinished
        ["<0xF0>", "<0x9F>", "A", "<0xC3>", "<0xA9>", "▁the"],
        ["A", "<0xE5>", "[EOS]", "▁the", "[UNK]", "<0xFF>", "A"],
    ],
)
def test_a_token_stands_in_the_text_where_it_is_said_to(toy, texts, ids, pieces, begins):
    tokens = [ids[piece] for piece in pieces]
    decoder = toy.tokenizer.stream_decoder(continuation=not begins)
    text = "".join(map(decoder.push, tokens))
    track = Track(texts, begins=begins)
    for entry in [track.entry(token, None, None, 0) for token in tokens]:
        if texts.bytes_of(entry.token) and not entry.name.startswith("bytes:"):
            assert text[entry.offset :].startswith(entry.name), (entry, text)
    assert track.offset == len(text)


def test_of_two_tokens_of_one_name_the_better_stays_but_for_the_one_that_was_drawn(texts, ids):
    piece, byte, other = ids["A"], ids["<0x41>"], ids["▁the"]
    top = {piece: -1.0, byte: -2.0}
    drawn = [Entry(other, " the", -3.0, {**top, other: -3.0}, 0), Entry(byte, "A", -2.0, top, 4)]
    assert top_ids(drawn, texts) == [{"A": piece, " the": other}, {"A": byte}]


def test_only_a_whole_text_is_a_special_token(toy):
    tokenizer = toy.tokenizer
    assert special_id(tokenizer, "[EOS]") == tokenizer.eos_id
    assert special_id(tokenizer, "[EOS] ") is None
    assert special_id(tokenizer, "the") is None


def test_no_reader_breaks_a_line_of_json():
    text = "a\u2028b\u2029c\u0085d é \u2027"
    escaped = utf8_escape(json.dumps(text, ensure_ascii=False).encode())
    assert json.loads(escaped) == text
    assert len(escaped.decode().splitlines()) == 1

"""Tokenizer: the released ids, control pieces that text cannot forge, and streaming."""

import inspect
import io
import json
import pathlib
import random

import numpy as np
import pytest
import sentencepiece

import grok1
from grok1 import tokenizer
from grok1.tokenizer import Tokenizer
from tests.helpers import SLOW_TESTS

GOLDEN = pathlib.Path(__file__).parent / "golden" / "tokenizer_cases.json"
RELEASED_MODEL = pathlib.Path(__file__).parents[1] / "checkpoints" / "tokenizer.model"
CASES = json.loads(GOLDEN.read_text(encoding="utf-8"))

FIRST_BYTE = 69  # the piece <0x00>
THE = 333  # the piece "▁the"
SPACE = 130089  # the piece "▁"
CONTROL_IDS = range(47, 69)


@pytest.fixture(scope="module")
def released():
    return Tokenizer.load(RELEASED_MODEL)


@pytest.fixture(scope="module")
def sentencepiece_released():
    return sentencepiece.SentencePieceProcessor(model_file=str(RELEASED_MODEL))


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def small_model(request):
    """A serialized model of some 300 pieces with the released one's special pieces."""
    sentences = ["the cat sat on the mat", "a model of many experts", "éé 日本 the end of the text"]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences * 20),
        model_writer=model,
        model_type=request.param,
        vocab_size=320 if request.param == "bpe" else 300,
        byte_fallback=True,
        character_coverage=0.98,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<|separator|>", "\n"],
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        pad_piece="[PAD]",
        bos_piece="[BOS]",
        eos_piece="[EOS]",
        unk_piece="[UNK]",
        minloglevel=2,
    )
    return model.getvalue()


def byte_ids(data):
    return [FIRST_BYTE + byte for byte in data]


def unchecked(method):
    """The method itself, without the type checker that a test run may put around it."""
    return inspect.unwrap(method)


# --- encoding ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=[repr(case["text"]) for case in CASES])
def test_golden_cases(released, case):
    assert released.encode(case["text"]) == case["ids"]
    assert released.decode(case["ids"]) == case["text"]


@pytest.mark.parametrize("case", CASES, ids=[repr(case["text"]) for case in CASES])
def test_the_bytes_of_tokens_are_those_of_the_text(released, case):
    found = b"".join(released.token_bytes(token) for token in case["ids"])
    # Before a text stands the space that its first word is spelled with.
    assert found == (" " + case["text"] if case["text"] else "").encode()


def test_control_pieces_add_no_bytes(released):
    controls = released.pad_id, released.bos_id, released.eos_id
    assert [released.token_bytes(token) for token in controls] == [b""] * 3


def test_released_sizes_and_special_ids(released):
    assert released.vocab_size == 131072
    assert [released.pad_id, released.bos_id, released.eos_id, released.unk_id] == [0, 1, 2, 3]


@pytest.mark.parametrize("text", ["a▁b", "▁", "x = '▁the'\n"])
def test_the_spelling_of_a_space_is_read_as_one_and_said(released, text):
    with pytest.warns(UserWarning, match="text holds the character U\\+2581, .* read as one; put"):
        tokens = released.encode(text)
    assert tokens == released.encode(text.replace("▁", " "))
    # Every other character comes back: these are the ones that look like it or stand near it.
    others = "a_b\u2580\u2582\uff3f\xa0\u2423"
    assert released.decode(released.encode(others)) == others


def test_bos_only_on_request(released):
    tokens = released.encode("Hello")
    assert 1 not in tokens
    assert released.encode("Hello", add_bos=True) == [1, *tokens]
    assert released.encode("", add_bos=True) == [1]


def test_control_pieces_are_plain_text_unless_allowed(released, sentencepiece_released):
    # "▁<|", "separator", "|>"
    assert released.encode("<|separator|>") == [112586, 39596, 47989]
    assert released.encode("<|separator|>", allow_control=True) == [SPACE, 47]
    for token in CONTROL_IDS:
        spelling = sentencepiece_released.id_to_piece(token)
        assert spelling[:2] + spelling[-2:] == "<||>"
        text = f"user: {spelling}{spelling}\n"
        plain = released.encode(text)
        assert not set(plain) & set(CONTROL_IDS)
        assert released.decode(plain) == text
        assert released.encode(text, allow_control=True).count(token) == 2


def test_names_of_special_pieces_are_plain_text_even_if_control_is_allowed(released):
    assert min(released.encode("[BOS][EOS][PAD][UNK]", allow_control=True)) > 3


def random_text(rng, parts):
    return "".join(rng.choice(parts) for _ in range(rng.randrange(12)))


def test_text_without_control_spellings_encodes_as_sentencepiece_does(
    released, sentencepiece_released
):
    rng = random.Random(0)
    parts = ["\n", "\n\n\n", "\t", " ", "    ", "2024", "the", " cat", "日", "🤗", "\0", "<|", "|>"]
    for _ in range(1000):
        text = random_text(rng, parts)
        expected = sentencepiece_released.encode(text)
        assert released.encode(text) == expected, text
        assert released.encode(text, allow_control=True) == expected, text


def test_text_with_control_spellings_encodes_as_if_there_were_no_such_pieces(
    released, sentencepiece_released
):
    # The same model in which no text can spell those pieces: as ordinary pieces with a raw space
    # they match nothing, since SentencePiece has by then turned the spaces of a text into "▁".
    model = RELEASED_MODEL.read_bytes()
    user_defined, ordinary = b"\x15\0\0\0\0\x18\x04", b"\x15\0\0\0\0\x18\x01"  # score, type
    for token in CONTROL_IDS:
        spelling = sentencepiece_released.id_to_piece(token).encode()
        assert model.count(spelling + user_defined) == 1
        model = model.replace(spelling + user_defined, b" " + spelling[1:] + ordinary)
    without = sentencepiece.SentencePieceProcessor(model_proto=model)
    rng = random.Random(1)
    parts = ["<|", "|>", "separator", "<|separator|>", "<|mask|>", "<|control17|>", "|>x", " ", "a"]
    for _ in range(1000):
        text = random_text(rng, parts)
        tokens = released.encode(text)
        assert tokens == without.encode(text), text
        assert released.decode(tokens) == text
        allowed = released.encode(text, allow_control=True)
        assert allowed == sentencepiece_released.encode(text), text


def test_random_unicode_round_trips(released):
    rng = random.Random(2)
    for _ in range(500):
        limit = rng.choice([0x80, 0x800, 0x10000, 0x110000])
        codes = [rng.randrange(limit) for _ in range(rng.randrange(20))]
        text = "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)
        text = text.replace("\u2581", " ")  # SentencePiece's own mark for a space
        assert released.decode(released.encode(text)) == text


@pytest.mark.parametrize("text", [None, b"bytes", 5, ["a"]])
def test_encode_takes_only_str(released, text):
    with pytest.raises(TypeError, match=f"text must be a str, found {type(text).__name__}"):
        unchecked(Tokenizer.encode)(released, text)


@pytest.mark.parametrize("switch", ["add_bos", "allow_control"])
@pytest.mark.parametrize("value", ["no", "False", 1, None])
def test_encode_takes_no_switch_for_true_that_is_none(released, switch, value):
    with pytest.raises(TypeError, match=f"^{switch} must be True or False, found {value!r}$"):
        released.encode("<|separator|>", **{switch: value})
    assert released.encode("a", **{switch: np.False_}) == released.encode("a")


def test_encode_names_a_lone_surrogate(released):
    with pytest.raises(ValueError, match=r"lone surrogate U\+D83E at index 2"):
        released.encode("ab\ud83e")


# --- decoding ---------------------------------------------------------------------------------


DECODED = [
    ([], "", ""),
    ([THE, THE], "the the", " the the"),
    ([1, THE], "the", " the"),  # control pieces leave the start where it is
    ([SPACE, 1, THE], " the", "  the"),  # one space only is taken from the start
    ([4, THE], "\n the", "\n the"),
    ([47, 48], "<|separator|><|mask|>", "<|separator|><|mask|>"),
    ([3, THE, 3], "[UNK] the[UNK]", "[UNK] the[UNK]"),
    ([0, 1, 2], "", ""),
    ([*byte_ids(b" "), THE], "  the", "  the"),  # a space spelt as a byte is no "▁"
    (byte_ids("日🤗".encode()), "日🤗", "日🤗"),
    ([THE, *byte_ids(b"\xe6\x97"), THE], "the\ufffd\ufffd the", " the\ufffd\ufffd the"),
    # A control piece ends a run of bytes, though it has no text.
    (
        [*byte_ids(b"\xe6"), 1, *byte_ids(b"\x97\xa5")],
        "\ufffd\ufffd\ufffd",
        "\ufffd\ufffd\ufffd",
    ),
    (byte_ids(b"\xc0\x80"), "\ufffd" * 2, "\ufffd" * 2),  # overlong
    (byte_ids(b"\xe0\x80\x80"), "\ufffd" * 3, "\ufffd" * 3),
    (byte_ids(b"\xed\xa0\x80"), "\ufffd" * 3, "\ufffd" * 3),  # a surrogate
    (byte_ids(b"\xf4\x90\x80\x80"), "\ufffd" * 4, "\ufffd" * 4),  # above U+10FFFF
    (byte_ids(b"\xff\xf5A"), "\ufffd\ufffdA", "\ufffd\ufffdA"),
    (byte_ids(b"\xf0\x9f\xa4"), "\ufffd" * 3, "\ufffd" * 3),
    (byte_ids("\ufffd".encode()), "\ufffd", "\ufffd"),
    (byte_ids(b"\xef\xbb\xbf"), "\ufeff", "\ufeff"),
]


def stream(tokenizer, tokens, *, continuation):
    decoder = tokenizer.stream_decoder(continuation=continuation)
    return "".join([decoder.push(token) for token in tokens] + [decoder.flush()])


@pytest.mark.parametrize(("tokens", "whole", "continued"), DECODED)
def test_decoding_rules(released, tokens, whole, continued):
    assert released.decode(tokens) == whole
    assert stream(released, tokens, continuation=False) == whole
    assert stream(released, tokens, continuation=True) == continued


@pytest.mark.parametrize(
    ("tokens", "pushed", "flushed"),
    [
        (byte_ids("é".encode()), ["", "é"], ""),
        (byte_ids("日".encode()), ["", "", "日"], ""),
        (byte_ids("🤗".encode()), ["", "", "", "🤗"], ""),
        (byte_ids(b"\xf0\x9f\xa4"), ["", "", ""], "\ufffd\ufffd\ufffd"),
        # The bytes that cannot begin or continue a character are given up at once, the rest kept.
        (byte_ids(b"\xff\xf0\x9f"), ["\ufffd", "", ""], "\ufffd\ufffd"),
        (byte_ids(b"\xe0\x80"), ["", "\ufffd\ufffd"], ""),
        (byte_ids(b"\xf0\x9f\xe6\x97\xa5"), ["", "", "\ufffd\ufffd", "", "日"], ""),
        ([*byte_ids(b"\xe6\x97"), THE], ["", "", "\ufffd\ufffd the"], ""),
        ([*byte_ids(b"\xe6\x97"), 2], ["", "", "\ufffd\ufffd"], ""),
        ([THE, SPACE], [" the", " "], ""),
    ],
)
def test_push_gives_what_is_certain_and_no_half_character(released, tokens, pushed, flushed):
    decoder = released.stream_decoder()
    assert [decoder.push(token) for token in tokens] == pushed
    assert decoder.flush() == flushed
    assert decoder.flush() == ""


def id_distributions(processor):
    """Id sets to draw from: all, bytes, those that break UTF-8, special pieces, "▁" pieces."""
    everything = range(processor.vocab_size())
    of_bytes = [token for token in everything if processor.is_byte(token)]
    edges = b"\x00\x7f\x80\x8f\x90\x9f\xa0\xbf\xc0\xc2\xdf\xe0\xed\xef\xf0\xf4\xf5\xff"
    spaced = [token for token in everything if processor.id_to_piece(token).startswith("▁")]
    blank = [token for token in spaced if not processor.id_to_piece(token).strip("▁")]
    return [
        everything,
        of_bytes,
        [of_bytes[byte] for byte in edges],
        range(4),
        range(4, 9),
        spaced,
        blank or spaced,
    ]


def check_stream_equals_decode(tokenizer, processor, *, seed, num_sequences):
    rng = random.Random(seed)
    distributions = id_distributions(processor)
    word = next(
        token
        for token in distributions[0]
        if processor.id_to_piece(token).isalpha() and not processor.is_control(token)
    )
    shown = processor.decode([word])
    for trial in range(num_sequences):
        # Every third sequence is uniform over the vocabulary, the others mix the sets unevenly.
        weights = [1.0] + [0.0 if trial % 3 == 0 else rng.random() ** 3 for _ in distributions[1:]]
        sets = rng.choices(distributions, weights, k=rng.randrange(30))
        tokens = [rng.choice(ids) for ids in sets]
        whole = processor.decode(tokens)
        continued = processor.decode([word, *tokens])[len(shown) :]
        assert tokenizer.decode(tokens) == whole, tokens
        assert stream(tokenizer, tokens, continuation=False) == whole, tokens
        assert stream(tokenizer, tokens, continuation=True) == continued, tokens


def test_stream_equals_sentencepiece_on_random_ids(released, sentencepiece_released):
    check_stream_equals_decode(
        released, sentencepiece_released, seed=3, num_sequences=2500 if SLOW_TESTS else 500
    )


def test_small_models(small_model):
    tokenizer = Tokenizer(small_model)
    processor = sentencepiece.SentencePieceProcessor(model_proto=small_model)
    assert 280 <= tokenizer.vocab_size <= 330
    assert [tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id] == [0, 1, 2, 3]
    check_stream_equals_decode(tokenizer, processor, seed=4, num_sequences=800)

    text = "the cat <|separator|>\n🤗 of experts"
    separator = processor.piece_to_id("<|separator|>")
    plain = tokenizer.encode(text)
    assert separator not in plain
    assert tokenizer.decode(plain) == text
    allowed = tokenizer.encode(text, allow_control=True)
    assert allowed == processor.encode(text)
    assert allowed.count(separator) == 1


def test_numpy_ids_are_ids(released):
    tokens = np.array([THE, SPACE, THE], np.int32)
    assert released.decode(tokens) == "the  the"
    assert released.stream_decoder().push(tokens[0]) == " the"


@pytest.mark.parametrize("token", [-1, 131072, 2**40])
def test_ids_out_of_range(released, token):
    message = rf"token id {token} is out of range, expected \[0, 131072\)"
    with pytest.raises(ValueError, match=message):
        released.decode([THE, token])
    with pytest.raises(ValueError, match=message):
        released.stream_decoder().push(token)


@pytest.mark.parametrize("token", [1.0, "the", True, None, np.array([1, 2])])
def test_ids_that_are_no_integers(released, token):
    message = r"token id must be an integer in \[0, 131072\), found "
    with pytest.raises(ValueError, match=message + ".*[1TtN]"):
        unchecked(Tokenizer.decode)(released, [THE, token])
    decoder = released.stream_decoder()
    with pytest.raises(ValueError, match=message):
        unchecked(type(decoder).push)(decoder, token)


# --- loading ----------------------------------------------------------------------------------


def test_load_missing_file(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"absent\.model: no such file; expected the Sentence"
    ):
        Tokenizer.load(tmp_path / "absent.model")
    with pytest.raises(grok1.CheckpointError, match="not a regular file but a directory"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"a text file", RELEASED_MODEL.read_bytes()[:100_000]])
def test_load_file_that_is_no_model(tmp_path, capfd, content):
    path = tmp_path / "other.model"
    path.write_bytes(content)
    message = f"other.model: not a SentencePiece model: found {len(content)} bytes"
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(str(path))
    assert capfd.readouterr() == ("", "")


def test_model_with_a_piece_that_is_no_text(tmp_path):
    path = tmp_path / "damaged.model"
    path.write_bytes(RELEASED_MODEL.read_bytes().replace("▁the".encode(), b"\xe2\x96\xffthe", 1))
    with pytest.raises(grok1.CheckpointError, match=r"a piece is not UTF-8, b'.*the'; copy"):
        Tokenizer.load(path)


def test_model_with_a_field_of_no_known_kind():
    # A protobuf group, number 1000: the format's obsolete kind, which no such model has.
    model = RELEASED_MODEL.read_bytes() + b"\xc3\x3e\xc4\x3e"
    with pytest.raises(ValueError, match="no protobuf wire type 3"):
        Tokenizer(model)


@pytest.mark.parametrize("length", [10, 122, 123, 300])
def test_a_control_spelling_of_any_length_is_plain_text(length):
    # A piece whose number of bytes takes one byte more, where the others have one.
    spelling = "<|" + "x" * length + "|>"
    sizes = [n.to_bytes() if n < 128 else bytes([n & 127 | 128, n >> 7])
             for n in (len(spelling), len(spelling) + 2 + (len(spelling) > 127) + 7)]  # fmt: skip
    piece = b"\x0a" + sizes[0] + spelling.encode() + b"\x15\0\0\0\0\x18\x04"
    tokenizer = Tokenizer(RELEASED_MODEL.read_bytes() + b"\x0a" + sizes[1] + piece)
    assert tokenizer.vocab_size == 131073
    assert tokenizer.encode(spelling, allow_control=True)[-1] == 131072
    assert 131072 not in tokenizer.encode(spelling)
    assert tokenizer.vocabulary[-1] == (spelling.encode(), 0, 4)


def test_bos_asked_of_a_model_without_one():
    # "[BOX]" is no name that the model's settings know as the beginning.
    model = RELEASED_MODEL.read_bytes().replace(b"\x05[BOS]\x15", b"\x05[BOX]\x15")
    tokenizer = Tokenizer(model)
    assert tokenizer.bos_id == -1
    assert tokenizer.encode("a") == [327]
    with pytest.raises(ValueError, match=r"add_bos needs a \[BOS\] piece"):
        tokenizer.encode("a", add_bos=True)


def test_the_two_models_that_were_used_last_are_not_parsed_again(monkeypatch):
    parsed = []
    monkeypatch.setattr(tokenizer, "_KNOWN", [])
    monkeypatch.setattr(tokenizer, "_new_processors", lambda data: parsed.append(data) or (data,))
    for data in (b"a", b"b", b"a", b"c", b"a", b"b"):
        assert tokenizer._processors(bytes(bytearray(data))) == (data,)
    assert parsed == [b"a", b"b", b"c", b"b"]

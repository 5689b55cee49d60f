"""CompletionBuilder: what is streamed when, where a stop cuts, and what a completion reports."""

import codecs
import dataclasses
import random

import pytest

from grok1.generate.completion import Completion, CompletionBuilder
from grok1.generate.request import Sampled
from grok1.tokenizer import StreamDecoder, Tokenizer


class PiecesTokenizer(Tokenizer):
    """Token i stands for piece i, bytes of UTF-8, which may end inside a character."""

    def __init__(self, pieces):
        self.pieces = [piece.encode() if isinstance(piece, str) else piece for piece in pieces]

    def stream_decoder(self, *, continuation=True):
        # What is generated follows the prompt's text.
        assert continuation
        return PiecesDecoder(self.pieces)


class PiecesDecoder(StreamDecoder):
    def __init__(self, pieces):
        self.pieces = pieces
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token):
        return self.utf8.decode(self.pieces[token])

    def flush(self):
        return self.utf8.decode(b"", final=True)


def sampled(token):
    return Sampled(token, -float(token), {token: -float(token), 99: -99.0})


def run(pieces, stop_strings=(), num_prompt_tokens=None, **options):
    """Pushes tokens 0, 1, ... until the request ends: the streamed texts, and the completion."""
    options = {"max_tokens": len(pieces), "limit_reason": "length", **options}
    tokenizer = PiecesTokenizer(pieces)
    builder = CompletionBuilder(tokenizer, stop_strings=stop_strings, **options)
    builder.num_prompt_tokens = num_prompt_tokens
    streamed = []
    while builder.stop_reason is None:
        streamed.append(builder.push(sampled(len(streamed))))
    completion = builder.build()
    assert completion.text == "".join(streamed)
    assert completion.tokens == list(range(len(streamed)))
    assert completion.stop_reason == builder.stop_reason
    return streamed, completion


def test_text_comes_with_its_token():
    streamed, completion = run(["a", "bc", "d"])
    assert streamed == ["a", "bc", "d"]
    assert completion == Completion("abcd", [0, 1, 2], None, None, "length")


# --- stop strings -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pieces", "stop_strings", "streamed"),
    [
        # Inside one token, at its start, and all of it.
        (["ab", "cENDd", "e"], ["END"], ["ab", "c"]),
        (["ab", "ENDd", "e"], ["END"], ["ab", ""]),
        (["END"], ["END"], [""]),
        # Over two tokens, over three, and with a token that is text on both sides.
        (["ab", "cEN", "Dd", "e"], ["END"], ["ab", "c", ""]),
        (["aE", "N", "Dd", "e"], ["END"], ["a", "", ""]),
        (["aEN", "DbE", "ND"], ["END"], ["a", ""]),
        # Held while it may begin a stop, and released when it turns out not to.
        (["aE", "N", "X", "b"], ["END"], ["a", "", "ENX", "b"]),
        (["aE", "E", "ND", "b"], ["END"], ["a", "E", ""]),
        # Candidates overlap: after "aa" comes another "a", and the second pair may still begin.
        (["a", "a", "a", "b", "c"], ["aab"], ["", "", "a", ""]),
        (["aaab", "c"], ["aab"], ["a"]),
        (["ab", "ab", "ac"], ["abac"], ["", "ab", ""]),
        # Held to the end: released when the limit comes instead.
        (["aE", "N"], ["END"], ["a", "EN"]),
        # Of two stops the earlier, whichever is named first.
        (["a", "xyz"], ["z", "y"], ["a", "x"]),
        (["a", "xyz"], ["y", "z"], ["a", "x"]),
        (["ax", "yz"], ["yz", "xyz"], ["a", ""]),
        (["axy", "z"], ["xyz", "y"], ["ax"]),  # "y" is complete first
        # One candidate fails, and only what the other does not begin is released.
        (["ab", "c", "d", "e"], ["bcX", "cde"], ["a", "", "b", ""]),
        # A stop string longer than all the text.
        (["ab"], ["abc"], ["ab"]),
        # Characters in several bytes.
        ([b"a\xc3", b"\xa9b", "c"], ["éb"], ["a", ""]),
        ([b"a\xc3", b"\xa9", "c"], ["éb"], ["a", "", "éc"]),
    ],
)
def test_stop_strings(pieces, stop_strings, streamed):
    found, completion = run(pieces, stop_strings)
    assert found == streamed
    stopped = any(
        stop in b"".join(PiecesTokenizer(pieces).pieces).decode() for stop in stop_strings
    )
    assert completion.stop_reason == ("stop" if stopped else "length")


def test_a_stop_string_that_ends_with_the_last_token_is_the_reason():
    _, completion = run(["a", "b"], ["b"], max_tokens=2)
    assert (completion.text, completion.stop_reason) == ("a", "stop")


def text_after(pieces, count):
    """Text of the first tokens, without the bytes of a character that is not whole yet."""
    return b"".join(pieces[:count]).decode("utf-8", "ignore")


def test_random_texts_are_cut_at_the_first_stop_that_becomes_complete():
    # The definition: the request ends with the first token after which the text holds a stop
    # string, and the text ends where the one that was complete first begins. Until then everything
    # is streamed but the longest end of the text that begins a stop string.
    rng = random.Random(0)
    num_stopped = 0
    for _ in range(3000):
        text = "".join(rng.choices("aabé", k=rng.randrange(1, 16))).encode()
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randrange(8)))
        pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        stops = [
            "".join(rng.choices("aabé", k=rng.randrange(1, 5))) for _ in range(rng.randrange(4))
        ]
        streamed, completion = run(pieces, stops)

        count = next(
            (n for n in range(len(pieces) + 1) if any(s in text_after(pieces, n) for s in stops)),
            None,
        )
        whole = text_after(pieces, len(pieces) if count is None else count)
        if count is None:
            assert completion.text == whole
            assert completion.stop_reason == "length"
            count = len(pieces)
        else:
            ends = [(whole.find(s) + len(s), whole.find(s)) for s in stops if s in whole]
            assert completion.text == whole[: min(ends)[1]]
            assert completion.stop_match == whole[slice(*min(ends)[::-1])]
            assert completion.stop_reason == "stop"
            num_stopped += 1
        assert len(streamed) == count
        for n in range(1, count):
            shown, certain = "".join(streamed[:n]), text_after(pieces, n)
            ends = [certain[i:] for i in range(len(certain) + 1)]
            held = next(end for end in ends if any(s.startswith(end) for s in stops) or not end)
            assert shown == certain.removesuffix(held)
    assert 500 < num_stopped < 2500


# --- stop tokens and limits -------------------------------------------------------------------


def test_a_stop_token_ends_without_its_text():
    streamed, completion = run(["a", "b", "<eos>", "c"], stop_tokens=[2, 7])
    assert streamed == ["a", "b", ""]
    assert completion == Completion("ab", [0, 1, 2], None, None, "stop", stop_match=2)


def test_a_stop_token_releases_what_was_held_for_a_stop_string():
    streamed, completion = run(["aE", "N", "<eos>", "c"], ["END"], stop_tokens=[2])
    assert streamed == ["a", "", "EN"]
    assert completion.stop_reason == "stop"


def test_a_stop_token_as_the_last_of_the_budget_is_the_reason():
    _, completion = run(["a", "<eos>"], stop_tokens=[1], max_tokens=2)
    assert completion.stop_reason == "stop"


@pytest.mark.parametrize("reason", ["length", "context"])
def test_the_limit_has_the_reason_it_was_given(reason):
    streamed, completion = run(["a", "b", "c"], max_tokens=2, limit_reason=reason)
    assert streamed == ["a", "b"]
    assert completion.stop_reason == reason


@pytest.mark.parametrize(
    ("pieces", "options"), [([b"a\xe6\x97"], {}), ([b"a\xe6\x97", "<eos>"], {"stop_tokens": [1]})]
)
def test_the_end_flushes_an_unfinished_character(pieces, options):
    _, completion = run(pieces, **options)
    assert completion.text == "a\ufffd"


def test_a_stop_string_in_what_the_end_flushes():
    _, completion = run([b"a\xe6\x97"], ["a\ufffd"])
    assert (completion.text, completion.stop_reason) == ("", "stop")
    assert completion.stop_match == "a\ufffd"


@pytest.mark.parametrize(
    ("pieces", "options", "match"),
    [
        (["a", "<eos>"], {"stop_tokens": [1, 7]}, 1),
        (["a", "END"], {"stop_tokens": [7]}, "END"),
        (["aE", "N", "<eos>"], {"stop_tokens": [2]}, 2),  # held for a stop that did not come
        (["xyz"], {}, "y"),  # complete first
        (["a", "b"], {"max_tokens": 1}, None),
    ],
)
def test_what_ended_it_is_told(pieces, options, match):
    stops = ["END", "z", "y"]
    _, completion = run(pieces, stops, 5, **options)
    assert completion.stop_match == match
    assert completion.num_prompt_tokens == 5
    assert ("stop_match" in repr(completion)) == (match is not None)


# --- what is reported -------------------------------------------------------------------------


def test_without_a_tokenizer_there_is_no_text():
    builder = CompletionBuilder(None, max_tokens=5, limit_reason="length", stop_tokens=[31])
    assert [builder.push(sampled(token)) for token in (17, 5, 31)] == ["", "", ""]
    assert builder.build() == Completion(None, [17, 5, 31], None, None, "stop", 31)


def test_log_probabilities_of_every_token_also_of_those_that_are_no_text():
    for options in ({"stop_tokens": [2]}, {"stop_strings": ["cd"]}, {"max_tokens": 3}):
        _, completion = run(["a", "b", "cd", "e"], with_logprobs=True, **options)
        assert completion.tokens == [0, 1, 2]
        assert completion.logprobs == [0, -1, -2]
        assert completion.top_logprobs == [{0: 0, 99: -99}, {1: -1, 99: -99}, {2: -2, 99: -99}]
        # Best first.
        assert [list(best) for best in completion.top_logprobs or []] == [[0, 99], [1, 99], [2, 99]]


def test_a_completion_cannot_be_changed():
    _, completion = run(["a"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        completion.text = "b"  # type: ignore[misc]


@pytest.mark.parametrize("pieces", [[b"abcde"], [b"a", b"b", b"c", b"d", b"e"]])
def test_the_cut_does_not_depend_on_the_tokens(pieces):
    assert run(pieces, ["bcd", "abcde"])[1].text == "a"

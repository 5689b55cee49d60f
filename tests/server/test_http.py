"""The protocol over HTTP, by OpenAI's own client and by hand."""

import asyncio
import dataclasses
import threading
import types

import numpy as np
import pytest

from grok1.engine.engine import Engine
from grok1.server import bodies, running, texts
from grok1.tokenizer import Tokenizer

TEXT = "The answer to life"


def test_the_openai_client_gets_what_generate_gives(client, toy):
    made = client.completions.create(
        model="toy", prompt=[TEXT, "def f("], max_tokens=9, temperature=0.7, seed=5, logprobs=2
    )
    expected = toy.generate(
        [TEXT, "def f("], max_new_tokens=9, temperature=0.7, top_p=1, seed=5, logprobs=2
    )
    assert [choice.index for choice in made.choices] == [0, 1]
    for choice, one in zip(made.choices, expected, strict=True):
        assert choice.text == one.text == "".join(choice.logprobs.tokens)
        assert choice.logprobs.token_logprobs == pytest.approx(one.logprobs, abs=1e-4)
        assert choice.finish_reason == one.stop_reason
    assert made.usage.prompt_tokens == sum(one.num_prompt_tokens for one in expected)
    assert made.usage.completion_tokens == sum(len(one.tokens) for one in expected)
    ids = toy.tokenizer.encode(TEXT)
    options = {"model": "toy", "max_tokens": 9, "temperature": 0.7, "seed": 5}
    for prompt in (ids, [ids], TEXT):
        stream = client.completions.create(
            prompt=prompt, stream=True, stream_options={"include_usage": True}, **options
        )
        *parts, last = list(stream)
        assert "".join(part.choices[0].text for part in parts) == expected[0].text
        assert [part.choices[0].finish_reason for part in parts[:-1]] == [None] * (len(parts) - 1)
        assert parts[-1].choices[0].finish_reason == "length"
        assert all("usage" in part.model_fields_set and part.usage is None for part in parts)
        assert not last.choices
        assert last.usage.completion_tokens == 9


def test_the_echo_is_scored_as_score_does(complete, toy):
    score = toy.score(TEXT, top_k=3)
    told = complete(prompt=TEXT, max_tokens=0, echo=True, logprobs=3)
    [choice] = told["choices"]
    found = choice["logprobs"]
    assert choice["text"] == TEXT == "".join(found["tokens"])
    assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
    np.testing.assert_allclose(found["token_logprobs"][1:], score.logprobs[1:], atol=1e-4)
    for place, offset in enumerate(found["text_offset"]):
        assert TEXT[offset:].startswith(found["tokens"][place])
    for place, best in enumerate(found["top_logprobs"][1:], start=1):
        assert found["tokens"][place] in best
        assert best[found["tokens"][place]] == found["token_logprobs"][place]
        assert max(best.values()) == pytest.approx(score.top_logprobs[place, 0], abs=1e-4)
    assert told["usage"]["completion_tokens"] == 0
    scored = complete(path="/v1/score", prompt=TEXT)["data"][0]
    refused = complete(400, path="/v1/score", prompt=TEXT, top_logprobs=21)["error"]
    assert (refused["param"], refused["message"].split()[0]) == ("top_logprobs",) * 2
    assert scored["total_logprob"] == pytest.approx(score.total_logprob, abs=1e-3)
    assert scored["ranks"][1:] == score.ranks[1:].tolist()
    # With new tokens, and as lm-eval asks.
    longer = complete(prompt=[score.tokens.tolist()], max_tokens=1, echo=True, logprobs=1, seed=1)
    assert longer["choices"][0]["logprobs"]["token_logprobs"][:-1] == found["token_logprobs"]
    assert complete(prompt=TEXT, max_tokens=0, echo=True)["choices"][0]["text"] == TEXT


def test_a_prompt_that_was_run_is_found_again_to_the_bit(complete):
    text = " ".join(f"word{n} of the text" for n in range(40))
    answers = []
    for suffix in ("", "", " and"):
        told = complete(
            prompt=text + suffix, max_tokens=6, echo=True, logprobs=5, temperature=0, cache_salt="a"
        )
        answers.append(told["choices"][0]["logprobs"])
        if suffix:
            assert told["usage"]["prompt_tokens_details"]["cached_tokens"] > 200
    assert answers[0] == answers[1]
    assert answers[2]["token_logprobs"][:200] == answers[0]["token_logprobs"][:200]
    scored = complete(prompt=text, max_tokens=0, echo=True, logprobs=5, cache_salt="a")
    assert scored["choices"][0]["logprobs"]["top_logprobs"] == answers[0]["top_logprobs"][:-6]
    other = complete(prompt=text, max_tokens=1, cache_salt="b")
    assert other["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_choices_are_streams_of_one_seed(complete):
    many = complete(prompt="A", n=4, max_tokens=12, seed=3)
    texts = [choice["text"] for choice in many["choices"]]
    assert len(set(texts)) == 4
    assert texts == [
        one["text"] for one in complete(prompt="A", n=4, max_tokens=12, seed=3)["choices"]
    ]
    best = complete(prompt="A", best_of=4, n=2, max_tokens=12, seed=3)
    assert {choice["text"] for choice in best["choices"]} < set(texts)
    assert best["usage"]["completion_tokens"] == 48
    fresh = {complete(prompt="A", max_tokens=12)["choices"][0]["text"] for _ in range(3)}
    assert len(fresh) > 1


def test_fields_do_what_they_say(complete, toy):
    def ask(**body):
        return complete(**{"prompt": "x", "max_tokens": 8, "temperature": 0, "seed": 1, **body})

    plain = ask(return_token_ids=True)["choices"][0]
    ids = plain["token_ids"]
    assert plain["prompt_token_ids"] == toy.tokenizer.encode("x")
    for key in ("77", "0" * 30 + "77"):
        biased = ask(logit_bias={key: 100}, return_token_ids=True)["choices"][0]
        assert biased["token_ids"] == [77] * 8
    few = ask(allowed_token_ids=[5, 9], return_token_ids=True, temperature=1)["choices"][0]
    assert set(few["token_ids"]) <= {5, 9}
    stopped = ask(stop_token_ids=[ids[3]], return_token_ids=True)["choices"][0]
    assert stopped["token_ids"] == ids[:4]
    assert (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", ids[3])
    held = ask(stop_token_ids=[ids[3]], min_tokens=6, return_token_ids=True)["choices"][0]
    assert held["token_ids"][:3] == ids[:3]
    assert ids[3] not in held["token_ids"][3:6]
    letters = sorted(set(plain["text"]))[:16]
    late = ask(stop=letters, min_tokens=6, return_token_ids=True)["choices"][0]
    assert late["token_ids"] == ids[: len(late["token_ids"])]
    assert len(late["token_ids"]) == 7
    assert late["text"] == toy.generate("x", temperature=0, max_new_tokens=6).text
    stop = plain["text"][3:5]
    cut, kept = ask(stop=stop)["choices"][0], ask(stop=stop, include_stop_str_in_output=True)
    assert cut["text"] + stop == kept["choices"][0]["text"] == plain["text"][: len(cut["text"]) + 2]
    repeats = ask(frequency_penalty=2.0, presence_penalty=2.0, repetition_penalty=50, max_tokens=40)
    words = ask(prompt=repeats["choices"][0]["text"], max_tokens=1)
    assert words["usage"]["prompt_tokens"] > 10
    short = ask(prompt=list(range(10, 40)), truncate_prompt_tokens=5, return_token_ids=True)
    assert short["choices"][0]["prompt_token_ids"] == list(range(35, 40))
    scored = ask(prompt="x = 1", prompt_logprobs=1)["choices"][0]["prompt_logprobs"]
    assert scored[0] is None
    assert all(min(one["rank"] for one in entry.values()) == 1 for entry in scored[1:])
    # What benchmarks and frameworks send along without meaning anything by it.
    nulls = dict.fromkeys(("top_p", "n", "best_of", "logprobs", "stop", "suffix", "user", "echo"))
    neutral = ask(
        **nulls, logit_bias={}, presence_penalty=0, frequency_penalty=0.0, repetition_penalty=1.0,
        top_k=-1, min_p=0.0, use_beam_search=False, skip_special_tokens=True, length_penalty=1.0,
        spaces_between_special_tokens=True, ignore_eos=True, request_id="a", store=False,
    )  # fmt: skip
    assert neutral["choices"][0]["text"] == plain["text"]


def test_who_does_not_say_how_much_gets_what_they_may(start, server):
    client, _, _ = start(lambda: server, max_tokens=5, chat_template="transcript")
    body = {"ignore_eos": True, "seed": 1}
    chat = {"messages": [{"role": "user", "content": "A"}]}
    for path, asked in (("completions", {"prompt": "A"}), ("chat/completions", chat)):
        answer = client.post(f"/v1/{path}", json={**body, **asked})
        assert answer.json()["usage"]["completion_tokens"] == 5
        refused = client.post(f"/v1/{path}", json={**body, **asked, "max_tokens": 6})
        assert refused.json()["error"]["message"] == "max_tokens must be at most 5, found 6"


def test_the_model_is_listed_under_its_name(http, complete):
    models = http.get("/v1/models").json()["data"]
    assert [(one["id"], one["max_model_len"]) for one in models] == [("toy", 1024)]
    assert http.get("/v1/models/toy").json() == models[0]
    assert complete(404, model="gpt", prompt="a")["error"]["code"] == "model_not_found"
    assert http.get("/version").json()["version"]
    assert http.head("/health").status_code == 200


def test_texts_become_ids_and_back(http, complete, toy):
    tokens = complete(path="/tokenize", prompt=TEXT)
    assert tokens["tokens"] == toy.tokenizer.encode(TEXT)
    assert tokens["count"] == len(tokens["tokens"])
    assert complete(path="/detokenize", tokens=tokens["tokens"]) == {"prompt": TEXT}
    assert http.get("/tokenizer_info").json()["eos_token"] == "[EOS]"
    assert complete(path="/tokenize", prompt="[BOS]")["tokens"] == [toy.tokenizer.bos_id]
    assert len(complete(path="/tokenize", prompt="[BOS] ")["tokens"]) > 1


def test_a_trace_is_the_models_and_runs_in_the_servers_chunks(complete, toy, monkeypatch):
    trace = complete(path="/v1/trace", prompt=toy.tokenizer.encode(TEXT))
    assert trace["experts"] == toy.trace(TEXT).expert_indices.tolist()
    chunks, prefill = [], Engine.prefill

    def counted(self, state, num_valid, chunk, *more):
        chunks.append(chunk)
        return prefill(self, state, num_valid, chunk, *more)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "prefill", counted)
        long = complete(path="/v1/trace", prompt=[5] * 40)
    assert chunks == [16, 16, 16], "others wait for longer than a chunk of the server's"
    assert np.shape(long["experts"]) == (6, 40, 2)


LONG_TEXT, LONG_IDS = "x " * 12_000, [5] * 24_000


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": LONG_TEXT}),
        ("/v1/completions", {"prompt": ["a", LONG_TEXT]}),
        ("/v1/completions", {"prompt": LONG_IDS}),
        ("/v1/completions", {"prompt": [[5], LONG_IDS]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": LONG_TEXT}]}),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": LONG_TEXT}]}]},
        ),
        ("/v1/score", {"prompt": LONG_TEXT}),
        ("/v1/trace", {"prompt": LONG_TEXT}),
        ("/v1/trace", {"prompt": LONG_IDS}),
        ("/tokenize", {"prompt": LONG_TEXT, "return_token_strs": True}),
        ("/detokenize", {"tokens": LONG_IDS}),
    ],
)
def test_long_texts_keep_nobody_else_waiting(http, monkeypatch, path, body):
    names = []

    def noted(function):
        def note(*arguments, **options):
            try:
                asyncio.get_running_loop()
                names.append("the event loop")
            except RuntimeError:
                names.append("beside it")
            return function(*arguments, **options)

        return note

    for name in ("encode", "decode", "piece"):
        monkeypatch.setattr(Tokenizer, name, noted(getattr(Tokenizer, name)))
    monkeypatch.setattr(bodies, "_check_names", noted(bodies._check_names))
    assert http.post(path, json=body).status_code in (200, 400)
    assert set(names) == {"beside it"}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/score"])
def test_long_answers_keep_nobody_else_waiting(http, complete, monkeypatch, path, stream):
    threads, entry = set(), texts.Track.entry

    def noted(*arguments):
        threads.add(threading.current_thread().name)
        return entry(*arguments)

    monkeypatch.setattr(texts.Track, "entry", noted)
    body = {"prompt": LONG_IDS[:600], "echo": True, "logprobs": 3, "max_tokens": 0}
    if path == "/v1/score":
        body = {"prompt": LONG_IDS[:600]}
    elif stream:
        body["stream"] = True
    assert http.post(path, json=body).status_code == 200
    assert len(threads) == 1
    assert "asyncio_" in next(iter(threads))  # that of `asyncio.to_thread`


def test_a_fingerprint_is_that_of_the_bits(server, toy):
    def of(params, **sizes) -> str:
        model = types.SimpleNamespace(
            config=toy.config, dtype=toy.dtype, mesh=toy.mesh, engine=toy.engine, params=params
        )
        of_sizes = dataclasses.replace(server.sizes, **sizes)
        app = running.HttpOptions().app()
        app.server = types.SimpleNamespace(model=model, sizes=of_sizes, state="ready")
        return app._fingerprint

    params = toy.params
    other = params._replace(final_norm=params.final_norm + 1)
    layers = params.layers._replace(router=params.layers.router * 2)
    found = [of(params), of(other), of(params._replace(layers=layers)), of(params, chunk=64)]
    assert len(set(found)) == 4
    assert of(params, prefix_tokens=5, host_prefix_tokens=7) == found[0]

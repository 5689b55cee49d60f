"""The protocol over HTTP, by OpenAI's own client and by hand."""

import asyncio
import dataclasses
import json
import socket
import threading
import time
import types

import numpy as np
import pytest

import grok1
from grok1.engine.engine import Engine
from grok1.generate.completion import CompletionBuilder
from grok1.generate.request import Request, ScoredPart, Wishes
from grok1.server import app, asks, bodies, running, texts
from grok1.server.errors import NoTokenError
from grok1.server.events import EventStream
from grok1.server.handle import Handle
from grok1.tokenizer import Tokenizer
from tests.server.test_core import idle

TEXT = "The answer to life"
V = 1280


@pytest.fixture(scope="module")
def client(http):
    openai = pytest.importorskip("openai")  # what it imports in turn may be missing, too
    with openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="any", max_retries=0) as one:
        yield one


def events_of(text: str) -> list:
    lines = [line for line in text.split("\n\n") if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


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


BAD = [
    ({}, "there is no prompt", "prompt"),
    ({"prompt": ""}, "the prompt is empty", "prompt"),
    ({"prompt": []}, "the prompt is empty", "prompt"),
    ({"prompt": [[]]}, "the prompt is empty", "prompt"),
    ({"prompt": ["a", 1]}, "prompt must be one kind", "prompt"),
    ({"prompt": ["a"] * 129}, "at most 128 prompts, found 129", "prompt"),
    ({"prompt": "a", "max_tokens": -1}, "there is no -1 for no limit", "max_tokens"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens 0 needs echo", "max_tokens"),
    ({"prompt": "a", "max_tokens": True}, "got `bool`", "max_tokens"),
    ({"prompt": "a", "temperature": -1}, "temperature must be from 0", "temperature"),
    ({"prompt": "a", "top_p": 0}, "top_p must be above 0", "top_p"),
    ({"prompt": "a", "n": 0}, "n must be from 1 to 128", "n"),
    ({"prompt": "a", "n": 2, "best_of": 1}, "best_of must be from n", "best_of"),
    ({"prompt": "a", "best_of": 2, "stream": True}, "without stream", "best_of"),
    ({"prompt": "a", "logprobs": 21}, "logprobs must be from 0 to 20, found 21", "logprobs"),
    ({"prompt": "a", "stop": ""}, "stop must be texts of 1 to 256", "stop"),
    ({"prompt": "a", "stop": ["a"] * 17}, "at most 16", "stop"),
    ({"prompt": "a", "suffix": "b"}, "only continues", "suffix"),
    ({"prompt": "a", "stream_options": {}}, "stream_options needs stream", "stream_options"),
    ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias must be by token id", "logit_bias"),
    ({"prompt": "a", "logit_bias": {"5": 1, "05": 2}}, "one number for each", "logit_bias"),
    ({"prompt": "a", "logit_bias": {"1": 101}}, "from -100 to 100", "logit_bias"),
    ({"prompt": "a", "logit_bias": {"9" * 5000: 1}}, "from 0 to 1279, found 9999", "logit_bias"),
    ({"prompt": "a", "logit_bias": {"0" * 30 + "1280": 1}}, "found 1280", "logit_bias"),
    ({"prompt": "a", "skip_special_tokens": False}, "must be true", "skip_special_tokens"),
    ({"prompt": "a", "min_tokens": 17}, "min_tokens must be from 0 to 16", "min_tokens"),
    ({"prompt": "a", "repetition_penalty": 1e-40}, "must be from 0.01", "repetition_penalty"),
    ({"prompt": "a", "priority": 1}, "priority must be 0", "priority"),
    ({"prompt": "a", "use_beam_search": True}, "no beam search", "use_beam_search"),
    ({"prompt": "a", "allowed_token_ids": []}, "at least one token id", "allowed_token_ids"),
    ({"prompt": "a", "temprature": 1}, "the field 'temprature' is unknown", "temprature"),
    (
        {"prompt": [5] * 1024},
        "has 1024 tokens and the context holds 1024, of which one must stay free for a new token; "
        "shorten it by 1",
        "prompt",
    ),
    (
        {"prompt": [5] * 1027, "max_tokens": 0, "echo": True},
        "has 1027 tokens and the context holds 1024; shorten it by 3",
        "prompt",
    ),
    # To come again, as 429 says, would not help.
    (
        {"prompt": ["a", "b"], "n": 128},
        "256 requests are asked for at once, of at most 68",
        "prompt",
    ),
    ({"prompt": "a", "n": 69}, "69 requests are asked for at once, of at most 68", "prompt"),
]


@pytest.mark.parametrize(("body", "words", "param"), BAD, ids=[words for _, words, _ in BAD])
def test_what_is_wrong_with_a_request_is_said(complete, body, words, param):
    error = complete(400, **body)["error"]
    assert words in error["message"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    if "context holds" in words:
        assert error["code"] == "context_length_exceeded"


def test_no_token_outside_the_vocabulary_reaches_the_engine(http):
    for bad in ("-1", str(V), str(2**31), str(2**63), "1e400", "NaN", "true", '"1"', "1.5", "[1]"):
        for body in (
            f'{{"prompt": [{bad}]}}',
            f'{{"prompt": [[{bad}, 1]]}}',
            f'{{"prompt": "a", "stop_token_ids": [{bad}]}}',
            f'{{"prompt": "a", "allowed_token_ids": [{bad}]}}',
            f'{{"prompt": "a", "logit_bias": {{"{bad.strip(chr(34))}a": 1}}}}',
        ):
            if body == '{"prompt": ["1"]}' or (bad == "[1]" and body == '{"prompt": [[1]]}'):
                continue  # a text, a list of ids
            headers = {"content-type": "application/json"}
            answer = http.post("/v1/completions", content=body, headers=headers)
            assert answer.status_code == 400, (body, answer.text)
    body = {"tokens": [V]}
    assert http.post("/detokenize", json=body).status_code == 400
    assert (
        http.post("/v1/completions", json={"prompt": "a", "logit_bias": {str(V): 1}}).status_code
        == 400
    )


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


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/completions", 405),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/..%2f..%2fetc/passwd", 404),
    ],
)
def test_what_is_no_path_is_an_error(http, method, path, status):
    answer = http.request(method, path, json={})
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


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


def test_metrics_count_turns_and_tokens(http, complete, server):
    complete(prompt="a", max_tokens=1)
    text = http.get("/metrics").text
    for name in ("generation_tokens_total", "num_requests_running", "prefix_cache_hits_total"):
        assert f"grok1_{name}" in text
    for name in ("tier_hits_total", "blocks", "tokens", "max_tokens"):
        for tier in ("device", "host"):
            assert f'grok1_prefix_cache_{name}{{tier="{tier}"}} ' in text
    assert 'grok1_prefix_cache_max_tokens{tier="device"} 1024.0' in text

    names = ('grok1_step_seconds_count{kind="prefill"}', "grok1_iteration_tokens_total_sum",
             "grok1_prompt_tokens_total")  # fmt: skip

    def counted() -> list[float]:
        text = http.get("/metrics").text.splitlines()
        parts = [line.rpartition(" ") for line in text if not line.startswith("#")]
        found = {name: float(value) for name, _, value in parts}
        return [found.get(name, 0.0) for name in names]

    # A prompt of 65 tokens is run in four turns, and its last token is a step's; then it is found.
    for added in ([4, 64 + 2, 65], [0, 2, 65]):
        idle(server)
        before = counted()
        complete(prompt=[881] * 65, max_tokens=2)
        deadline = time.monotonic() + 5  # the last turn is counted after the answer
        while (now := [new - old for new, old in zip(counted(), before, strict=True)]) != added:
            assert time.monotonic() < deadline, now


def metric(http, name: str) -> float:
    lines = [line.rpartition(" ") for line in http.get("/metrics").text.splitlines()]
    return float({name: value for name, _, value in lines}.get(name, 0))


def test_metrics_count_answers_by_path_and_status(http):
    asked = [
        ("/v1/models", 200, "/v1/models"),
        ("/v1/models/toy", 200, "/v1/models/{name:path}"),
        ("/v1/models/xai-org/grok", 404, "/v1/models/{name:path}"),
        ("/v1/completions", 405, "/v1/completions"),
        *[(f"/{number}", 404, "other") for number in range(3)],
    ]
    for path, status, handler in asked:
        name = f'grok1_http_requests_total{{handler="{handler}",status="{status}"}}'
        before = metric(http, name)
        assert http.get(path).status_code == status
        assert metric(http, name) == before + 1, name
    name = 'grok1_http_requests_total{handler="/v1/completions",status="415"}'
    before = metric(http, name)
    # What does not come in is counted too.
    assert http.post("/v1/completions", content="{}").status_code == 415
    assert metric(http, name) == before + 1


def test_metrics_say_what_answers_and_whether(http, server, monkeypatch):
    assert metric(http, f'grok1_info{{model_name="toy",version="{grok1.__version__}"}}') == 1
    assert metric(http, "grok1_ready") == 1
    assert metric(http, "process_resident_memory_bytes") > 1e6
    monkeypatch.setattr(type(server), "is_stuck", True)
    assert metric(http, "grok1_ready") == 0


def test_tokens_are_counted_as_they_come(http, server, monkeypatch):
    name = "grok1_generation_tokens_total"
    idle(server)
    before = metric(http, name)
    monkeypatch.setattr(server, "on_turn", [*server.on_turn, lambda *_: time.sleep(0.02)])
    body = {"prompt": "a", "max_tokens": 900, "ignore_eos": True, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as answer:
        next(answer.iter_lines())
        deadline = time.monotonic() + 60
        while (count := metric(http, name)) < before + 2:
            assert time.monotonic() < deadline
    assert count < before + 900


def test_every_metric_has_one_type_and_ends_as_its_type_does(http):
    kinds = {}
    for line in http.get("/metrics").text.splitlines():
        if line.startswith("# TYPE"):
            _, _, name, kind = line.split(" ")
            assert kinds.setdefault(name, kind) is kind
    for name, kind in kinds.items():
        if name != "grok1_iteration_tokens_total":  # a histogram that vLLM names so
            assert name.endswith("_total") == (kind == "counter"), name


def test_a_stream_that_fails_for_no_known_reason_is_logged(caplog):
    async def events():
        raise ZeroDivisionError("of ours")
        yield

    async def stream() -> bytes:
        sent = []

        async def send(message):
            sent.append(message.get("body", b""))

        async def receive():
            await asyncio.sleep(60)

        await EventStream(None, events(), lambda: None)({"type": "http"}, receive, send)
        return b"".join(sent)

    assert b"the server has failed to answer" in asyncio.run(stream())
    assert "ZeroDivisionError: of ours" in caplog.text


def test_what_makes_events_ends_with_the_stream():
    ended = []

    async def events():
        try:
            yield None
            yield None
        finally:
            ended.append(True)

    async def stream():
        async def send(message):
            if message["type"] == "http.response.body":
                raise OSError("the client is gone")

        async def receive():
            await asyncio.sleep(60)

        rest = events()
        await EventStream(await anext(rest), rest, lambda: None)({"type": "http"}, receive, send)
        assert ended

    asyncio.run(stream())


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_without_a_token_is_told_why(http, complete, server, monkeypatch, stream):
    monkeypatch.setattr(asks, "_wishes", lambda *_: Wishes(repetition=1e-40))
    answer = http.post("/v1/completions", json={"prompt": "A", "stream": stream})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (500, "no_token")
    assert "the model's logits must be finite" in error["message"]
    assert answer.headers["x-should-retry"] == "false"
    request = Request(tokens=[5], max_tokens=2, wishes=Wishes(repetition=1e-40))
    handle = Handle(request, CompletionBuilder(None, max_tokens=2, limit_reason="length"))
    server.enqueue([handle])
    with pytest.raises(NoTokenError, match="logits must be finite"):
        handle.result(20)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/score"])
def test_a_prompt_that_cannot_be_scored_is_told_why(complete, monkeypatch, path):
    on_host = ScoredPart.on_host

    def damaged(part):
        found = on_host(part)
        return found._replace(logprobs=np.where(np.arange(len(found.logprobs)) == 1, np.nan, 0.0))

    monkeypatch.setattr(ScoredPart, "on_host", damaged)
    body = {"echo": True, "logprobs": 1, "max_tokens": 0} if "completions" in path else {}
    error = complete(500, path=path, prompt=[5, 6, 7, 8], **body)["error"]
    assert error["message"].startswith("token 2 of the prompt has no log-probability")
    assert error["code"] == "no_token"


def test_what_nobody_foresaw_is_an_answer_like_the_others(http, monkeypatch, caplog):
    def failing(*_, **__):
        raise ZeroDivisionError("of ours")

    def count():
        line = 'grok1_http_requests_total{handler="/tokenize",status="500"}'
        text = http.get("/metrics").text
        return float(text.partition(line)[2].partition("\n")[0] or 0)

    before = count()
    monkeypatch.setattr(app, "encode_text", failing)
    with socket.create_connection(("127.0.0.1", http.base_url.port)) as one:
        one.settimeout(20)
        reader = one.makefile("rb")
        for _ in range(2):  # the connection is as good as before
            one.sendall(
                b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\nx-request-id: my-own\r\n"
                b'content-type: application/json\r\ncontent-length: 15\r\n\r\n{"prompt": "A"}'
            )
            assert reader.readline() == b"HTTP/1.1 500 Internal Server Error\r\n"
            head = dict(line.split(b": ", 1) for line in iter(reader.readline, b"\r\n"))
            assert head[b"x-request-id"] == b"my-own\r\n"
            error = json.loads(reader.read(int(head[b"content-length"])))["error"]
            assert error["message"].endswith("its log has the cause under my-own")
    assert count() == before + 2
    assert [record.name for record in caplog.records] == ["grok1.server"] * 2
    assert "ZeroDivisionError: of ours" in caplog.text


def test_a_position_that_was_not_generated_is_told(http, complete, server, monkeypatch):
    acting = (grok1.ScaleHeads(1, positions=(2, 7)),)
    monkeypatch.setattr(Engine, "interventions", property(lambda _: acting))
    message = (
        "ScaleHeads: nothing was changed at position 7, which the text did not reach: it ended by "
        "'stop' with 5 tokens run; give ignore_eos=True or fewer stops, or name all positions from "
        "one on as slice(10, None)"
    )
    body = {"prompt": [5, 6, 7, 8, 9], "max_tokens": 8, "n": 2, "allowed_token_ids": [77]}
    assert not any("warnings" in one for one in complete(**body)["choices"])
    for path, more in (("trace", {}), ("score", {}), ("completions", {"max_tokens": 2})):
        error = complete(400, path=f"/v1/{path}", prompt=body["prompt"], **more)["error"]
        assert error["message"].startswith("ScaleHeads: positions must be from 0 to ")
        assert error["param"] == "prompt"
    body["stop_token_ids"] = [77]
    assert [one["warnings"] for one in complete(**body)["choices"]] == [[message]] * 2
    parts = events_of(http.post("/v1/completions", json={**body, "stream": True}).text)
    told = [one.get("warnings") for part in parts for one in part["choices"]]
    assert [words for words in told if words is not None] == [[message]] * 2
    handle = server.submit(body["prompt"], max_new_tokens=8, allowed_tokens=[77], stop=[77])
    with pytest.warns(UserWarning, match="^ScaleHeads: nothing was changed at position 7"):
        assert handle.result(20).tokens == [77]


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


def test_a_chat_needs_a_template_and_stops_at_the_next_speaker(client, complete, start, server):
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    chat = client.chat.completions.create(
        model="toy", messages=messages, max_tokens=6, temperature=0, logprobs=True, top_logprobs=2
    )
    plain = complete(prompt="User: Hello\n\nAssistant:", max_tokens=6, temperature=0)
    assert chat.choices[0].message.content == plain["choices"][0]["text"]
    assert len(chat.choices[0].logprobs.content) == 6
    stream = client.chat.completions.create(
        model="toy", messages=messages, max_completion_tokens=6, temperature=0, stream=True
    )
    parts = list(stream)
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(one.choices[0].delta.content for one in parts) == plain["choices"][0]["text"]
    for more, words in (
        ({"messages": []}, "at least one message"),
        ({"tools": [{}]}, "tools are not supported"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "must be text"),
        ({"messages": [{**messages[0], "tool_calls": [{"id": "a"}]}]}, "tool_calls are not"),
        ({"messages": [{**messages[0], "function_call": {"name": "a"}}]}, "function_call are not"),
    ):
        error = complete(400, path="/v1/chat/completions", **{"messages": messages, **more})[
            "error"
        ]
        assert words in error["message"]
    without, _, _ = start(lambda: server)
    while without.get("/health").status_code != 200:
        time.sleep(0.01)
    answer = without.post("/v1/chat/completions", json={"messages": messages})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "no_chat_template")
    assert "/v1/completions" in answer.text


def test_a_chat_takes_what_a_completion_takes(complete):
    path, messages = "/v1/chat/completions", [{"role": "user", "content": "Hello"}]
    options = {"messages": messages, "max_tokens": 2, "temperature": 0}
    whole = complete(path=path, **options, truncate_prompt_tokens=1000)
    # The server's own stops are not the client's.
    assert (
        complete(path=path, **options, stop=[f"{k}!" for k in range(16)])["choices"]
        == (whole["choices"])
    )
    error = complete(400, path, **options, stop=["!"] * 17)["error"]
    assert error["message"] == "stop must be at most 16 texts, found 17"


def test_a_template_has_the_tokens_and_messages_have_their_spellings(start, server, tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text(
        "{{ bos_token }}{% for one in messages %}{{ one.name }}{{ one.content }}{{ eos_token }}"
        "{% endfor %}A:"
    )
    client, _, _ = start(lambda: server, chat_template=str(path), add_bos=True)
    while client.get("/health").status_code != 200:
        time.sleep(0.01)
    tokenizer = server.model.tokenizer
    bos, eos = tokenizer.piece(tokenizer.bos_id), tokenizer.piece(tokenizer.eos_id)
    body = {"messages": [{"role": "user", "content": f"{bos} {eos}"},
                         {"role": "a", "content": "", "name": "Al", "tool_calls": []}],
            "max_tokens": 1, "return_token_ids": True}  # fmt: skip
    for given in ({}, {"add_special_tokens": True}):
        answer = client.post("/v1/chat/completions", json=body | given).json()
        expected = [tokenizer.bos_id, *tokenizer.encode(f"{bos} {eos}"), tokenizer.eos_id,
                    *tokenizer.encode("Al"), tokenizer.eos_id, *tokenizer.encode("A:")]  # fmt: skip
        assert answer["choices"][0]["prompt_token_ids"] == expected


def test_a_stream_is_events_that_every_reader_takes(http, server):
    line_end = "\u2028"
    with http.stream(
        "POST", "/v1/completions", json={"prompt": f"a{line_end}b", "echo": True, "stream": True}
    ) as answer:
        text = answer.read().decode()
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["x-accel-buffering"] == "no"
    assert line_end not in text
    assert events_of(text)[0]["choices"][0]["text"].startswith(f"a{line_end}b")
    # What only spells an escape stays as it is.
    for prompt in ("\x85 \u2029 \u2028", r"\x85", r"\\x85 \u2028 \u0085", r'"\x85"', "\\\x85"):
        body = {"prompt": prompt, "echo": True, "max_tokens": 0}
        text = http.post("/v1/completions", json={**body, "stream": True}).text
        assert not {"\x85", line_end, "\u2029"} & set(text)
        told = "".join(part["choices"][0]["text"] for part in events_of(text))
        whole = http.post("/v1/completions", json=body).json()["choices"][0]["text"]
        assert told == whole == prompt
    body = {"prompt": ["a", "b"], "n": 2, "stream": True, "logprobs": 1, "max_tokens": 5,
            "ignore_eos": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True}}  # fmt: skip
    parts = events_of(http.post("/v1/completions", json=body).text)
    ended = [one["index"] for part in parts for one in part["choices"] if one["finish_reason"]]
    assert sorted(ended) == [0, 1, 2, 3]
    assert parts[-1]["usage"]["completion_tokens"] == 20
    assert sum(len(one["logprobs"]["tokens"]) for part in parts for one in part["choices"]) == 20
    assert all("usage" in part for part in parts)

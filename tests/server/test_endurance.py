"""Slow: ten thousand bodies that nobody would write, and twenty thousand requests in a row."""

import concurrent.futures
import json
import os
import pathlib
import random
import threading

from grok1.server import bodies
from tests.helpers import slow
from tests.server.helpers import PROMPTS, idle

pytestmark = slow

RAW = [
    *("NaN", "1e400", "-1", "0", "1", "2", "9223372036854775808", "1.5", "1e-400", "true", "null"),
    *('""', '"a"', "[]", "{}", "[1]", '["a"]', '[["a"]]', "[null]", '{"a": 1}', "[[1, 2], [3]]"),
    *("1e-40", '{"5": 1}', '{"include_usage": true}', '"' + "x" * 300 + '"'),
    *('"\\ud83d\\ude00"', '"\\u2028"'),
]


def body_of(one: random.Random, kind: type) -> bytes:
    """A body of any fields with any values, most of them not theirs."""
    names = [*kind.__struct_fields__, "else"]
    fields = {
        name: one.choice(RAW) for name in one.sample(names, min(one.randrange(6), len(names)))
    }
    for name, usual in (("prompt", '"A"'), ("tokens", "[5]"), ("messages", '[{"role": "user"}]')):
        if name in kind.__struct_fields__ and one.random() < 0.8:
            fields[name] = usual
    if "max_tokens" in kind.__struct_fields__ and one.random() < 0.9:
        fields["max_tokens"] = str(one.choice([0, 1, 2, 3]))
    text = "{" + ", ".join(f'"{name}": {value}' for name, value in fields.items()) + "}"
    data = bytearray(text.encode())
    if one.random() < 0.1 and data:
        data[one.randrange(len(data))] = one.randrange(256)
    return bytes(data)


def test_no_body_is_an_error_of_the_server(http, server):
    kinds = {
        "/v1/completions": bodies.CompletionBody,
        "/v1/chat/completions": bodies.ChatBody,
        "/v1/score": bodies.ScoreBody,
        "/tokenize": bodies.TokenizeBody,
        "/detokenize": bodies.DetokenizeBody,
    }
    one = random.Random(0)
    asked = [
        (path, body_of(one, kinds[path]))
        for path in one.choices(list(kinds), weights=[10, 3, 2, 1, 1], k=10_000)
    ]

    def ask(pair):
        path, body = pair
        answer = http.post(path, content=body, headers={"content-type": "application/json"})
        assert answer.status_code in (200, 400, 404, 429), (pair, answer.text)
        if answer.status_code != 200:
            assert json.loads(answer.content)["error"]["message"]
        return answer.status_code

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        found = list(pool.map(ask, asked))
    counts = {status: found.count(status) for status in sorted(set(found))}
    print(counts)
    assert min(counts[200], counts[400]) > 500
    idle(server)


def resident_bytes() -> int:
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_memory_does_not_grow_with_requests(http, server):
    def ask(number):
        body = {
            "prompt": f"{PROMPTS[number % 8]} {number}",
            "max_tokens": 1 + number % 4,
            "logprobs": 5 if number % 3 == 0 else None,
            "echo": number % 5 == 0,
            "stream": number % 2 == 0,
        }
        assert http.post("/v1/completions", json=body).status_code == 200

    def ask_all(begin, end):
        # In threads that go through their own, so that there are not as many futures as requests.
        def some(first):
            for number in range(first, end, 8):
                ask(number)

        threads = [threading.Thread(target=some, args=(begin + n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    ask_all(0, 1000)
    before = resident_bytes()
    ask_all(1000, 20_000)
    idle(server)
    print(f"{before / 1e6:.1f} MB after 1,000, {resident_bytes() / 1e6:.1f} MB after 20,000")
    assert resident_bytes() <= 1.02 * before

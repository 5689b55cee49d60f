"""What the server counts, as Prometheus reads it."""

import time

import grok1
from tests.server.helpers import idle


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

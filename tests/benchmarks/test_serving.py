"""Clients of a server, as they are counted."""

import http.server
import json
import threading
import typing

import pytest

from benchmarks import serving
from benchmarks.machine import BenchmarkError


class Completions(http.server.BaseHTTPRequestHandler):
    """Answers with the number of tokens that was asked for, or with four."""

    protocol_version = "HTTP/1.1"
    asked: typing.ClassVar[list] = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body["prompt"])
        answer = json.dumps({"usage": {"completion_tokens": min(4, body["max_tokens"])}}).encode()
        self.send_response(200 if body["prompt"] != [9] else 503)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


def test_clients_ask_once_for_each_prompt_and_count_the_tokens():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Completions) as server:
        Completions.asked.clear()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        prompts = [[n, 5] for n in range(7)]
        assert serving.tokens_per_second(server.server_port, prompts, 4, clients=3) > 0
        assert sorted(Completions.asked) == prompts
        with pytest.raises(BenchmarkError, match="5 tokens were asked for, and 4 came"):
            serving.tokens_per_second(server.server_port, prompts, 5, clients=2)
        with pytest.raises(BenchmarkError, match=r"port \d+ failed: status 503"):
            serving.tokens_per_second(server.server_port, [[9]], 4, clients=1)
        server.shutdown()

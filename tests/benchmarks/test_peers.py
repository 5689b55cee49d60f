"""What the library is measured beside: the dense form, and llama.cpp."""

import json
import pathlib
import sys

import pytest

from benchmarks import peers
from benchmarks.machine import BenchmarkError
from benchmarks.peers import DenseDecoder
from tests.helpers import slow


@slow
def test_dense_reference_draws_the_same_tokens(toy):
    prompt = toy.tokenizer.encode("The first argument")
    expected = toy.generate(prompt, max_new_tokens=8, temperature=0, ignore_eos=True).tokens
    decoder = DenseDecoder(toy)
    found = [decoder.next_token(token) for token in [*prompt, *expected[:-1]]]
    assert found[len(prompt) - 1 :] == expected


def fake_llama_cpp(directory: pathlib.Path, bench: str, batched: str) -> pathlib.Path:
    for name, output in (("llama-bench", bench), ("llama-batched-bench", batched)):
        program = directory / name
        program.write_text(f'#!/bin/sh\necho "$0 $@" >> {directory}/calls\n{output}\n')
        program.chmod(0o755)
    gguf = directory / "model.gguf"
    gguf.touch()
    return gguf


def test_llama_cpp_is_asked_for_the_same_work(tmp_path):
    counted = {
        "build_commit": "abc", "model_type": "grok", "model_n_params": 1050, "avg_ts": 12.5,
    }  # fmt: skip
    bench = f"echo '{json.dumps([counted])}'"
    batched = "echo 'log'; echo '{\"speed_tg\": 49.5, \"speed_pp\": 9}'"
    peer = peers.LlamaCpp(tmp_path, fake_llama_cpp(tmp_path, bench, batched))
    assert peer.version == "abc, grok"
    assert peer.is_model_of(1000)
    assert not peer.is_model_of(2000)
    assert peer.decode(1, 1, 64, 1) == 12.5
    assert peer.decode(8, 128, 64, 1) == 49.5
    assert peer.prefill(512, 1) == 12.5
    _, one, eight, prefill = (tmp_path / "calls").read_text().splitlines()
    assert "-ngl 0 -t 1 -n 64 -p 0 -r 1" in one
    assert "-ngl 0 -t 1 -c 1536 -npp 128 -ntg 64 -npl 8" in eight
    assert "-t 1 -n 0 -p 512 -r 1" in prefill


def test_the_server_of_llama_cpp_runs_as_long_as_it_is_asked(tmp_path):
    counted = {"build_commit": "a", "model_type": "b", "model_n_params": 1, "avg_ts": 1}
    peer = peers.LlamaCpp(tmp_path, fake_llama_cpp(tmp_path, f"echo '{json.dumps([counted])}'", ""))
    with pytest.raises(BenchmarkError, match="has no program llama-server"):
        peer.serving(2, 64, 1).__enter__()
    program = tmp_path / "llama-server"
    program.write_text(f"#!/bin/sh\necho $@ > {tmp_path}/calls; exit 3\n")
    program.chmod(0o755)
    with pytest.raises(BenchmarkError, match="ended with status 3"):
        peer.serving(2, 64, 1).__enter__()
    assert "-ngl 0 -t 1 -np 2 -c 128 --port" in (tmp_path / "calls").read_text()
    program.write_text(
        f"#!{sys.executable}\nimport http.server, sys\n"
        "class Fine(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self): self.send_response(200); self.end_headers()\n"
        "    def log_message(self, *_): pass\n"
        "http.server.HTTPServer(('127.0.0.1', int(sys.argv[-1])), Fine).serve_forever()\n"
    )
    with peer.serving(2, 64, 1) as port:
        assert peers._is_healthy(port)
    assert not peers._is_healthy(port)


def test_llama_cpp_that_fails_is_quoted(tmp_path):
    gguf = fake_llama_cpp(tmp_path, "echo 'error: unknown architecture' >&2; exit 1", "true")
    with pytest.raises(BenchmarkError, match="failed: error: unknown architecture"):
        peers.LlamaCpp(tmp_path, gguf)
    gguf = fake_llama_cpp(tmp_path, "echo nothing", "true")
    with pytest.raises(BenchmarkError, match="printed no result: 'nothing'"):
        peers.LlamaCpp(tmp_path, gguf)
    with pytest.raises(BenchmarkError, match=r"absent: no such file; --gguf takes"):
        peers.LlamaCpp(tmp_path, tmp_path / "absent")

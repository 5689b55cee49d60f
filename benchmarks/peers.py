"""llama.cpp, run as its own benchmark programs."""

import json
import os
import pathlib
import shutil
import subprocess
from typing import Any

from benchmarks.process import BenchmarkError, on_cpus

# Two counts of one model may differ by what a converter leaves out or stores twice.
_SAME_MODEL = 0.1


class LlamaCpp:
    """llama.cpp on one model file.

    Attributes:
      gguf: The model file.
      num_parameters: Weights that llama.cpp counts in it.
      version: Commit of the build, and the types of the weights.

    Args:
      directory: Where `llama-bench` and `llama-batched-bench` are; None to search the PATH.
      gguf: The model file.

    Raises:
      BenchmarkError: If a program or the file is missing, or the program cannot read the file.
    """

    def __init__(self, directory: pathlib.Path | None, gguf: pathlib.Path):
        self._bench = _program("llama-bench", directory)
        self._batched = _program("llama-batched-bench", directory)
        if not gguf.is_file():
            raise BenchmarkError(f"{gguf}: no such file; --gguf takes a model file for llama.cpp")
        self.gguf = gguf.absolute()
        found = self._run_bench(None, "-n", "1", "-p", "0", "--no-warmup")
        self.num_parameters: int = found["model_n_params"]
        self.version = f"{found['build_commit']}, {found['model_type']}"

    def is_model_of(self, num_parameters: int) -> bool:
        """Whether the file's model is about of this size."""
        return abs(self.num_parameters / num_parameters - 1) < _SAME_MODEL

    def decode(self, batch: int, prompt: int, tokens: int, threads: int) -> float:
        """Returns the tokens per second of all rows together, as they continue.

        Args:
          batch: Rows that run side by side.
          prompt: Tokens in each row before. A single row starts with none.
          tokens: Tokens that each row generates.
          threads: Threads, and CPUs they may run on.
        """
        if batch == 1:
            found = self._run_bench(threads, "-n", str(tokens), "-p", "0")
            return found["avg_ts"]
        context = batch * (prompt + tokens)
        arguments = ["-c", str(context), "-npp", str(prompt), "-ntg", str(tokens)]
        arguments += ["-npl", str(batch), "--output-format", "jsonl"]
        output = ""
        for _ in range(2):  # its log, in a thread of its own, can end before the result is out
            output = _run([self._batched, *self._common(threads), *arguments], threads)
            for line in output.splitlines():
                if line.startswith("{"):
                    return json.loads(line)["speed_tg"]
        raise BenchmarkError(f"{self._batched} printed no result: {output.strip()[-200:]!r}")

    def prefill(self, tokens: int, threads: int) -> float:
        """Returns the tokens per second of reading a prompt of this length."""
        return self._run_bench(threads, "-n", "0", "-p", str(tokens))["avg_ts"]

    def _run_bench(self, threads: int | None, *arguments: str) -> dict[str, Any]:
        command = [self._bench, *self._common(threads), *arguments, "-r", "1", "-o", "json"]
        output = _run(command, threads)
        try:
            return json.loads(output)[0]
        except (json.JSONDecodeError, IndexError, KeyError):
            raise BenchmarkError(
                f"{self._bench} printed no result: {output.strip()[-200:]!r}"
            ) from None

    def _common(self, threads: int | None) -> list[str]:
        # Without -ngl 0 a build with a GPU would run there, which is no comparison with a CPU.
        limit = [] if threads is None else ["-t", str(threads)]
        return ["-m", str(self.gguf), "-ngl", "0", *limit]


def _program(name: str, directory: pathlib.Path | None) -> str:
    if directory is not None:
        path = directory / name
        if path.is_file() and os.access(path, os.X_OK):
            return str(path.absolute())
        raise BenchmarkError(
            f"{directory} has no program {name}; --llama-cpp takes the directory of a build's "
            "programs, build/bin"
        )
    found = shutil.which(name)
    if found is None:
        raise BenchmarkError(
            f"{name} is not on the PATH; say with --llama-cpp where llama.cpp's programs are"
        )
    return found


def _run(command: list[str], threads: int | None) -> str:
    with on_cpus(threads):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"status {result.returncode}"]
        raise BenchmarkError(f"{' '.join(command)} failed: {lines[-1]}")
    return result.stdout

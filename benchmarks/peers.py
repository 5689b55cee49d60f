"""What grok1 is compared to: llama.cpp, and the dense form of the released code.

Dimension key: D model dim, K key/value head, S cache capacity, H head dim, E expert, L layer.
"""

import contextlib
import http.client
import json
import operator
import os
import pathlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import grok1
from benchmarks.machine import BenchmarkError, on_cpus
from grok1.nn.transformer import Params
from grok1.ops.attention import attend
from grok1.ops.layers import apply_rope, exact_einsum, rms_norm
from grok1.ops.quantized import Weight, dequantize
from grok1.ops.routing import route

_CAPACITY = 256

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
        self._directory = directory
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

    @contextlib.contextmanager
    def serving(self, slots: int, capacity: int, threads: int) -> Iterator[int]:
        """Runs llama.cpp's server, and says at which port.

        Args:
          slots: Requests side by side.
          capacity: Tokens that each of them may have.
          threads: Threads, and CPUs they may run on.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        arguments = ["-np", str(slots), "-c", str(slots * capacity), "--port", str(port)]
        command = [_program("llama-server", self._directory), *self._common(threads), *arguments]
        with on_cpus(threads):
            process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        try:
            while not _is_healthy(port):
                if process.poll() is not None:
                    raise BenchmarkError(
                        f"{' '.join(command)} ended with status {process.returncode}"
                    )
                time.sleep(0.1)
            yield port
        finally:
            process.kill()
            process.wait()

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


def _is_healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _run(command: list[str], threads: int | None) -> str:
    with on_cpus(threads):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"status {result.returncode}"]
        raise BenchmarkError(f"{' '.join(command)} failed: {lines[-1]}")
    return result.stdout


class DenseDecoder:
    """Greedy decoding of one sequence, a token a call, as the released code does it.

    Every weight of every layer, all experts included, is turned from int8 to floats and then
    multiplied; the router's weights pick the experts' outputs afterwards. Written with the
    functions of the readable forward pass (`transformer`), plus a cache, so that attention does not
    recompute the past. XLA may fuse what it can, as it may in the released code. Experts come one
    after the other: the floats of all at once would not fit where the model itself does.

    Args:
      model: Gives the weights, and the type of the products.
    """

    def __init__(self, model: grok1.Model):
        self._params, config, dtype = model.params, model.config, model.dtype
        shape = (config.num_layers, config.num_kv_heads, _CAPACITY, config.key_size)
        self._keys, self._values = jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
        self._position = 0

        def step(params, keys, values, token, position):
            return _dense_step(params, config, dtype, keys, values, token, position)

        self._step = jax.jit(step, donate_argnums=(1, 2))

    def next_token(self, token: int) -> int:
        """Runs one token, at the next position, and returns the most probable one after it."""
        if self._position == _CAPACITY:
            self._position = 0
        following, self._keys, self._values = self._step(
            self._params, self._keys, self._values, token, self._position
        )
        self._position += 1
        return int(following)


def _dense_step(
    params: Params,
    config: grok1.ModelConfig,
    dtype: Any,
    keys: Float[Array, "L K S H"],
    values: Float[Array, "L K S H"],
    token: Int[Array, ""],
    position: Int[Array, ""],
) -> tuple[Int[Array, ""], Float[Array, "L K S H"], Float[Array, "L K S H"]]:
    stack = params.layers
    x_D = params.embedding[token].astype(jnp.float32) * config.embedding_multiplier_scale
    visible_S = jnp.arange(keys.shape[2]) <= position

    def dot(x, weight: Weight, *index):
        matrix = dequantize(jax.tree.map(operator.itemgetter(index), weight)).astype(dtype)
        return exact_einsum("D,DN->N", x.astype(dtype), matrix)

    def heads(x_D, weight, layer):
        return dot(x_D, weight, layer).reshape(1, 1, -1, config.key_size)

    def run_layer(carry, layer):
        x_D, keys, values = carry
        normed_D = rms_norm(x_D, stack.attention_pre_norm[layer])
        at = position[None, None]
        query = apply_rope(heads(normed_D, stack.query, layer), at).astype(dtype)
        key = apply_rope(heads(normed_D, stack.key, layer), at)[0, 0].astype(dtype)
        value = heads(normed_D, stack.value, layer)[0, 0].astype(dtype)
        keys = keys.at[layer, :, position].set(key)
        values = values.at[layer, :, position].set(value)
        mixed = attend(
            query.reshape(1, 1, config.num_kv_heads, -1, config.key_size),
            keys[layer][None],
            values[layer][None],
            visible_S[None, None],
            config.attn_output_multiplier,
        )
        branch_D = dot(mixed.reshape(-1), stack.attention_out, layer)
        x_D += rms_norm(branch_D, stack.attention_post_norm[layer])

        normed_D = rms_norm(x_D, stack.moe_pre_norm[layer])
        routing = route(normed_D[None], stack.router[layer], config.num_selected_experts)
        weights_E = jnp.zeros(config.num_experts)
        weights_E = weights_E.at[routing.expert_indices[0]].set(routing.expert_weights[0])

        def add_expert(total_D, expert):
            hidden = jax.nn.gelu(
                dot(normed_D, stack.experts.gate, layer, expert), approximate=True
            ) * dot(normed_D, stack.experts.up, layer, expert)
            out_D = dot(hidden, stack.experts.down, layer, expert)
            return total_D + weights_E[expert] * out_D, None

        branch_D, _ = jax.lax.scan(add_expert, jnp.zeros_like(x_D), jnp.arange(config.num_experts))
        x_D += rms_norm(branch_D, stack.moe_post_norm[layer])
        return (x_D, keys, values), None

    carry = (x_D, keys, values)
    (x_D, keys, values), _ = jax.lax.scan(run_layer, carry, jnp.arange(config.num_layers))
    logits_V = exact_einsum(
        "VD,D->V", params.embedding.astype(jnp.float32), rms_norm(x_D, params.final_norm)
    )
    return jnp.argmax(logits_V), keys, values

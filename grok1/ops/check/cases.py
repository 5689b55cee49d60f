"""Small random cases of every operation that has a CUDA kernel, and XLA's form of it."""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from grok1.ops.attention import (
    KVCache,
    Place,
    attend_blocked,
    attend_cuda,
    attend_cuda_tiles,
)
from grok1.ops.cuda import calls, shapes
from grok1.ops.experts import (
    ExpertWeights,
    experts_cuda,
    experts_cuda_int4,
    experts_cuda_tiles,
    experts_grouped,
    experts_sparse,
)
from grok1.ops.heads import (
    Attending,
    append_and_attend_apart,
    append_and_attend_cuda,
    append_heads_by_steps,
    append_heads_cuda,
)
from grok1.ops.int4 import (
    Int4Array,
    convert_int4_cuda,
    convert_int4_xla,
    group_rows,
    num_blocks,
    pack,
    pack_subscales,
)
from grok1.ops.quantized import (
    QuantizedArray,
    convert_cuda,
    convert_xla,
    matmul_direct,
    project_cuda,
)
from grok1.ops.residual import add_branch_cuda, add_branch_xla, layer_norm_cuda, layer_norm_xla
from grok1.ops.routing import (
    Selection,
    add_and_route_apart,
    add_and_route_cuda,
    choose_experts,
    route_by_cuda,
    route_by_xla,
)
from grok1.ops.screening import screening_table
from grok1.ops.vocabulary import most_probable_cuda, most_probable_direct

_LAYERS, _EXPERTS = 2, 8

Case = tuple[Callable[..., Any], Callable[..., Any], tuple]
"""A kernel, XLA's form, and the arguments of both."""


def cases(operation: str) -> Iterator[tuple[str, Case]]:
    """Yields small random cases of an operation, each with its name."""
    make = {
        "experts": _of_experts,
        "project": _of_projections,
        "append_heads": _of_heads,
        "attend_cache": _of_attention,
        "append_and_attend": _of_steps,
        "attend_prompt": _of_prompts,
        "experts_prompt": _of_many_tokens,
        "norm": _of_norms,
        "add_norm": _of_sums,
        "route": _of_routers,
        "add_and_route": _of_sums_with_routers,
        "convert": _of_copies,
        "experts_int4": _of_int4_experts,
        "experts_int4_of_one": _of_int4_experts_of_one,
        "convert_int4": _of_int4_copies,
        "most_probable": _of_vocabularies,
    }[operation]
    return make(np.random.default_rng(0))


def _weight(rng: np.random.Generator, lead: tuple[int, ...], rows: int, columns: int, groups: int):
    values = rng.integers(-127, 128, (*lead, rows, columns), dtype=np.int8)
    scales = (0.005 + 0.01 * rng.random((*lead, groups, columns))).astype(jnp.bfloat16)
    return QuantizedArray(values, scales)


def _int4_weight(rng: np.random.Generator, lead: tuple[int, ...], rows: int, columns: int):
    blocks = num_blocks(rows)
    groups = rows // blocks // group_rows(rows // blocks)
    codes = rng.integers(16, size=(*lead, rows, columns))
    subscales = rng.integers(-32, 32, (*lead, blocks, groups, columns))
    scales = (2e-4 + 4e-4 * rng.random((*lead, blocks, columns))).astype(np.float16)
    return Int4Array(pack(codes), pack_subscales(subscales), scales)


def _of_experts(rng: np.random.Generator) -> Iterator[tuple[str, Case]]:
    width, hidden = 256, 384
    weights = ExpertWeights(
        _weight(rng, (_LAYERS, _EXPERTS), width, hidden, 1),
        _weight(rng, (_LAYERS, _EXPERTS), width, hidden, 1),
        _weight(rng, (_LAYERS, _EXPERTS), hidden, width, 8),
    )
    return _of_tokens(rng, experts_cuda, shapes.MOST_EXACT, weights)


def _of_int4_experts(rng: np.random.Generator) -> Iterator[tuple[str, Case]]:
    width, hidden = 256, 384
    lead = (_LAYERS, _EXPERTS)
    sizes = (width, hidden), (width, hidden), (hidden, width)
    weights = ExpertWeights(*(_int4_weight(rng, lead, *size) for size in sizes))
    return _of_tokens(rng, experts_cuda_int4, shapes.MOST_ROWS, weights)


def _of_int4_experts_of_one(rng: np.random.Generator) -> Iterator[tuple[str, Case]]:
    for name, (_, form, arguments) in _of_int4_experts(rng):
        if len(arguments[0]) == 1:
            yield name, (_experts_int4_of_one, form, arguments)


def _experts_int4_of_one(x, weights, layer, routing, valid):
    choice = routing.expert_indices, routing.expert_weights
    return calls.experts_int4(x, weights, layer, choice, valid, is_made_in_blocks=True)


def _of_tokens(
    rng: np.random.Generator, run: Callable[..., Any], most_exact: int, weights: ExpertWeights
) -> Iterator[tuple[str, Case]]:
    def kernel(x, weights, layer, routing, valid):
        return run(x, weights, (layer,), routing, valid)

    def form(x, weights, layer, routing, valid):
        # Of many tokens both round the hidden numbers.
        x = x.astype(jnp.float32) if len(x) <= most_exact else x
        return experts_sparse(x, weights, (layer,), routing, valid)

    sizes = (1, "bfloat16"), (4, "float32"), (33, "bfloat16")
    for tokens, dtype in sizes:
        x = rng.standard_normal((tokens, weights.gate.shape[-2])).astype(dtype)
        logits = rng.standard_normal((tokens, _EXPERTS)).astype(np.float32)
        routing = choose_experts(jnp.asarray(logits), 2)
        valid = np.arange(tokens) != 1
        arguments = (x, weights, np.int32(1), routing, valid)
        yield f"{tokens} tokens in {dtype}", (kernel, form, arguments)


def _of_projections(rng: np.random.Generator) -> Iterator[tuple[str, Case]]:
    width = 768  # whose inputs come to shared memory where they are many
    sizes = ((384, 1), (64, 1), (64, 8))
    weights = tuple(_weight(rng, (2,), width, *size) for size in sizes)

    def kernel(x, layer, *weights):
        return project_cuda(x, weights, ((layer,),) * len(weights), jnp.float32)

    def form(x, layer, *weights):
        return [matmul_direct(x, weight, (layer,), len(x)) for weight in weights]

    for rows, stacks in ((1, weights), (5, weights[2:]), (33, weights)):
        x = rng.standard_normal((rows, width)).astype(np.float32)
        yield f"{rows} rows", (kernel, form, (x, np.int32(1), *stacks))


class _Shape(NamedTuple):
    """Of a cache for one row, and of the queries that see it."""

    heads: int = 2
    group: int = 3
    size: int = 64
    capacity: int = 300


_NARROW, _DEEP = _Shape(), _Shape(1, 6, 128, 1200)  # the second like one device's share of several


def _cache(rng: np.random.Generator, dtype: str, rows: int, of: _Shape = _NARROW) -> KVCache:
    shape = (2, rows + 1, of.heads, of.capacity, of.size)
    length = jnp.zeros(rows + 1, jnp.int32)
    if dtype != "int8":
        k, v = (rng.standard_normal(shape).astype(dtype) for _ in "kv")
        return KVCache(k, v, length)
    k, v = (rng.integers(-127, 128, shape, dtype=np.int8) for _ in "kv")
    scales = (0.02 * rng.random(shape[:-1]).astype(np.float32) for _ in "kv")
    return KVCache(k, v, length, *scales)


def _place(rng: np.random.Generator, rows: int, length: int, of: _Shape = _NARROW) -> Place:
    slots = np.arange(rows, dtype=np.int32)
    starts = rng.integers(of.capacity // 2, of.capacity + 1 - length, (rows, 1)).astype(np.int32)
    valid = np.ones((rows, length), bool)
    return Place(slots, starts + np.arange(length, dtype=np.int32), valid)


_CALLS = (("float32", 1, 1), ("float16", 2, 4), ("int8", 3, 1))


def _of_heads(rng: np.random.Generator) -> Iterator[tuple[str, Case]]:
    forms = append_heads_cuda, append_heads_by_steps
    return _of_inputs(rng, forms, [(*call, _NARROW) for call in _CALLS])


def _of_steps(rng: np.random.Generator) -> Iterator[tuple[str, Case]]:
    def run(form):
        def of(x, projections, cache, layer, place, dtypes):
            dtype, query_dtype = dtypes
            attending = Attending(dtype, query_dtype, 0.3)
            return form(x, projections, cache, layer, place, attending)

        return of

    forms = map(run, (append_and_attend_cuda, append_and_attend_apart))
    calls = [(dtype, rows, 1, _NARROW) for dtype, rows, _ in _CALLS]
    return _of_inputs(rng, forms, [("float16", 1, 1, _DEEP), *calls])


def _of_inputs(
    rng: np.random.Generator,
    forms: Iterable[Callable[..., Any]],
    calls: Iterable[tuple[str, int, int, _Shape]],
) -> Iterator[tuple[str, Case]]:
    width = 256

    def run(form):
        def of(x, weights, cache, layer, place):
            projections = (weights, ((layer,),) * 3, weights[:1])
            dtypes = (jnp.float32, jnp.float32)
            return form(x, projections, cache, layer, place, dtypes)

        return of

    kernel, by_xla = map(run, forms)
    for dtype, rows, length, of in calls:
        columns = of.heads * of.size
        counts = of.group * columns, columns, columns
        weights = tuple(_weight(rng, (2,), width, count, 1) for count in counts)
        x = rng.standard_normal((rows, length, width)).astype(np.float32)
        cache, place = _cache(rng, dtype, rows, of), _place(rng, rows, length, of)
        arguments = (x, weights, cache, np.int32(1), place)
        name = f"{rows} x {length} into {of.capacity} of {dtype}"
        yield name, (kernel, by_xla, arguments)


def _attended(query: Any, *arguments: Any) -> Any:
    return attend_blocked(query.astype(jnp.float32), *arguments, 0.3)


def _of_attention(rng: np.random.Generator) -> Iterator[tuple[str, Case]]:
    def kernel(*arguments):
        return attend_cuda(*arguments, 0.3)

    for dtype, rows, length in _CALLS:
        query = rng.standard_normal((rows, length, 2, 3, 64)).astype(np.float32)
        cache, place = _cache(rng, dtype, rows), _place(rng, rows, length)
        arguments = (query, cache, np.int32(1), place)
        yield f"{rows} x {length} in {dtype}", (kernel, _attended, arguments)


def _of_prompts(rng: np.random.Generator) -> Iterator[tuple[str, Case]]:
    def kernel(*arguments):
        return attend_cuda_tiles(*arguments, 0.3)

    rows, length = 2, 100
    query = rng.standard_normal((rows, length, 2, 3, 64)).astype(np.float16)
    cache, place = _cache(rng, "float16", rows), _place(rng, rows, length)
    yield f"{rows} x {length}", (kernel, _attended, (query, cache, np.int32(1), place))


def _of_many_tokens(rng: np.random.Generator) -> Iterator[tuple[str, Case]]:
    num_experts, width, hidden, tokens = 8, 256, 384, 300
    weights = ExpertWeights(
        _weight(rng, (2, num_experts), width, hidden, 1),
        _weight(rng, (2, num_experts), width, hidden, 1),
        _weight(rng, (2, num_experts), hidden, width, 2),
    )

    def run(form):
        return lambda x, weights, layer, routing, valid: form(x, weights, (layer,), routing, valid)

    x = rng.standard_normal((tokens, width)).astype(jnp.bfloat16)
    logits = rng.standard_normal((tokens, num_experts)).astype(np.float32)
    # The first expert is nearly everybody's.
    routing = choose_experts(jnp.asarray(logits + 3 * (np.arange(num_experts) == 0)), 2)
    arguments = (x, weights, np.int32(1), routing, np.arange(tokens) % 9 != 1)
    yield f"{tokens} tokens", (run(experts_cuda_tiles), run(experts_grouped), arguments)


def _of_norms(rng: np.random.Generator) -> Iterator[tuple[str, Case]]:
    x = rng.standard_normal((3, 300)).astype(np.float32)
    scales = rng.random((2, 300)).astype(np.float32)
    yield "3 rows", (layer_norm_cuda, layer_norm_xla, (x, scales, np.int32(1)))


def _of_sums(rng: np.random.Generator) -> Iterator[tuple[str, Case]]:
    x, branch = (rng.standard_normal((3, 300)).astype(np.float32) for _ in "xb")
    scales = tuple(rng.random((2, 300)).astype(np.float32) for _ in range(2))
    for count in (1, 2):
        arguments = (x, branch, scales[:count], np.int32(1))
        yield f"{count} norms", (add_branch_cuda, add_branch_xla, arguments)


def _of_routers(rng: np.random.Generator) -> Iterator[tuple[str, Case]]:
    x = rng.standard_normal((3, 300)).astype(np.float32)
    routers = rng.standard_normal((2, 300, 8)).astype(np.float32)
    kernel, form = map(_as_router, (route_by_cuda, route_by_xla))
    yield "3 tokens", (kernel, form, (x, routers, np.int32(1)))


def _of_sums_with_routers(rng: np.random.Generator) -> Iterator[tuple[str, Case]]:
    x, branch = (rng.standard_normal((3, 300)).astype(np.float32) for _ in "xb")
    scales = tuple(rng.random((2, 300)).astype(np.float32) for _ in range(2))
    routers = rng.standard_normal((2, 300, 8)).astype(np.float32)
    kernel, form = map(_as_router, (add_and_route_cuda, add_and_route_apart))
    yield "3 tokens", (kernel, form, (x, branch, scales, routers, np.int32(1)))


def _as_router(form: Callable[..., Any]) -> Callable[..., Any]:
    return functools.partial(form, selection=Selection(2, 30.0, True))


def _of_copies(rng: np.random.Generator) -> Iterator[tuple[str, Case]]:
    def run(form, dtype):
        return lambda weight, layer, steps: form(weight, (layer, 1), steps, dtype)

    for groups, dtype in itertools.product((1, 8), (jnp.bfloat16, jnp.float16)):
        arguments = (_weight(rng, (2, 3), 320, 384, groups), np.int32(1), np.float32(4))
        kernel, form = (run(of, dtype) for of in (convert_cuda, convert_xla))
        yield f"{groups} groups, {jnp.dtype(dtype).name}", (kernel, form, arguments)


def _of_int4_copies(rng: np.random.Generator) -> Iterator[tuple[str, Case]]:
    def run(form):
        return lambda weight, layer: form(weight, (layer, 1))

    for rows in (512, 336):
        arguments = (_int4_weight(rng, (2, 3), rows, 384), np.int32(1))
        yield f"{rows} rows", (run(convert_int4_cuda), run(convert_int4_xla), arguments)


def _of_vocabularies(rng: np.random.Generator) -> Iterator[tuple[str, Case]]:
    rows, width = 1000, 336

    def run(form):
        return lambda x, embedding, allowed: form(x, embedding, screening_table(embedding), allowed)

    embedding = rng.standard_normal((rows, width)).astype(np.float32)
    for count, shape in ((1, (rows,)), (8, (8, rows))):
        x = rng.standard_normal((count, width)).astype(np.float32)
        arguments = (x, embedding, rng.random(shape) < 0.9)
        yield f"{count} rows", (run(most_probable_cuda), run(most_probable_direct), arguments)

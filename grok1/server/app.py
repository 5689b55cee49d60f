"""The HTTP interface of a server: which path does what."""

import asyncio
import dataclasses
import functools
import hashlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import jax
import msgspec
import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from grok1.generate.completion import perplexity
from grok1.server import answers, asks, bodies, fields
from grok1.server.asks import Ask, Limits
from grok1.server.chat import Template, chat_ask
from grok1.server.core import Server
from grok1.server.errors import ServingError
from grok1.server.events import ClientGoneError, EventStream, Json, unless_gone
from grok1.server.failures import http_error, nobody, refused
from grok1.server.gate import Gate, Keys
from grok1.server.metrics import CONTENT_TYPE, Answers, Metrics
from grok1.server.page import PAGE, page
from grok1.server.refusals import RefusalError
from grok1.server.texts import TokenTexts, encode_text, special_id
from grok1.server.traces import Traces
from grok1.version import __version__

_BODY_SECONDS = 30.0  # that a client has to send its body
_LONG_BODY = 1 << 14  # bytes; longer ones are read beside the event loop
_LONG_TEXT = 20_000  # characters; longer ones are encoded beside the event loop
_MOST_TRACED = 1024  # tokens


@dataclasses.dataclass(frozen=True)
class Access:
    """Who may ask, and for what.

    Attributes:
      keys: Of clients.
      metrics_keys: Of who reads the metrics.
      hosts: Names that the server is reached by; None for any.
      origins: Whose pages may ask; none by default.
      most_bytes: Largest body.
      ignore_unknown: Take bodies with fields that are not known.
      page: Whether there is a page at `/`.
    """

    keys: Keys = dataclasses.field(default_factory=Keys)
    metrics_keys: Keys = dataclasses.field(default_factory=Keys)
    hosts: Sequence[str] | None = None
    origins: Sequence[str] = ()
    most_bytes: int = 4 << 20
    ignore_unknown: bool = False
    page: bool = True


class App:
    """The endpoints of one server.

    Attributes:
      server: What answers; None while the model is being loaded.
      asgi: The application.
    """

    def __init__(
        self,
        name: str,
        limits: Limits,
        access: Access,
        template: Template | None = None,
    ):
        self.server: Server | None = None
        self._name, self._limits, self._access = name, limits, access
        self._template, self._created = template, int(time.time())
        routes = [
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/v1/score", self._score, methods=["POST"]),
            Route("/v1/trace", self._trace, methods=["POST"]),
            Route("/tokenize", self._tokenize, methods=["POST"]),
            Route("/detokenize", self._detokenize, methods=["POST"]),
            Route("/tokenizer_info", self._tokenizer_info),
            Route("/health", self._health),
            Route("/ping", self._health),
            Route("/version", self._version),
            Route("/metrics", self._metrics),
        ]
        if access.page:
            routes += [Route(path, page) for path in PAGE]
        self._answers = Answers(route.path for route in routes)
        middleware = [
            Middleware(
                Gate,
                keys=access.keys,
                metrics_keys=access.metrics_keys,
                hosts=access.hosts,
                most_bytes=access.most_bytes,
                on_answer=self._answers.count,
            )
        ]
        if access.origins:
            cors = Middleware(
                CORSMiddleware,
                allow_origins=list(access.origins),
                allow_methods=["GET", "POST"],
                # Clients have headers of their own, and read some.
                allow_headers=["*"],
                expose_headers=["x-request-id", "retry-after", "x-should-retry"],
            )
            middleware.insert(0, cors)
        handlers: dict[Any, Callable] = {
            HTTPException: http_error,
            ClientGoneError: nobody,
            ClientDisconnect: nobody,
            Exception: refused,
            RefusalError: refused,
            ServingError: refused,
        }
        self.asgi = Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)

    def serve(self, server: Server) -> None:
        """Answers with a server from now on."""
        self.server = server
        self._texts = TokenTexts(server.model.tokenizer)
        self._measured = Metrics(server, self._name, self._answers)
        self._traces = Traces(server, self._name, self._texts, self._limits.timeout)

    @functools.cached_property
    def _fingerprint(self) -> str:
        server = self._ready()
        model, engine, sizes = server.model, server.model.engine, server.sizes
        params = model.params
        named = f"{__version__} {model.config} {model.dtype} {engine.cache_dtype} {model.mesh}"
        named += f" {engine.interventions} {jax.tree.structure(params)} {sizes.num_slots}"
        named += f" {sizes.capacity} {sizes.row_counts} {sizes.chunk}"
        digest = hashlib.sha256(named.encode())
        # Of models that were trained or drawn apart these differ, and every device has them.
        for leaf in (params.final_norm, params.layers.router):
            digest.update(np.asarray(leaf.addressable_data(0)).tobytes())
        return f"fp_{digest.hexdigest()[:10]}"

    def _ready(self) -> Server:
        if self.server is None or self.server.state != "ready":
            state = "loading" if self.server is None else self.server.state
            dead = state == "dead"
            raise RefusalError(
                f"the server is {state}",
                status=503,
                type="unavailable_error",
                code="unavailable",
                headers={"x-should-retry": "false"} if dead else {"retry-after": "5"},
            )
        return self.server

    async def _read(self, request: Request, kind: type[bodies.B]) -> bodies.B:
        self._ready()
        try:
            data = await asyncio.wait_for(request.body(), _BODY_SECONDS)
        except TimeoutError:
            raise RefusalError(
                f"the body was not there after {_BODY_SECONDS:.0f} s", status=408
            ) from None
        decode = functools.partial(bodies.decode, data, kind, self._access.ignore_unknown)
        body = await asyncio.to_thread(decode) if len(data) > _LONG_BODY else decode()
        fields.check_model(getattr(body, "model", None), [self._name])
        return body

    async def _completions(self, request: Request) -> Response:
        body = await self._read(request, bodies.CompletionBody)
        ask = await self._asked(asks.completion_ask, body, body.prompt)
        return await self._answered(request, ask, body)

    async def _chat(self, request: Request) -> Response:
        body = await self._read(request, bodies.ChatBody)
        ask = await self._asked(chat_ask, body, body.messages, self._template)
        return await self._answered(request, ask, body, is_chat=True)

    async def _asked(self, make: Callable[..., Ask], body: Any, source: Any, *more: Any) -> Ask:
        arguments = (body, self._ready(), self._limits, *more)
        if asks.num_characters(source) > _LONG_TEXT:
            return await asyncio.to_thread(make, *arguments)
        return make(*arguments)

    async def _answered(
        self, request: Request, ask: Ask, body: bodies.SamplingBody, is_chat: bool = False
    ) -> Response:
        form = answers.Form(self._texts, self._name, self._fingerprint, is_chat)
        self._submit(ask)
        if not body.stream:
            await unless_gone(_all(ask), request.receive, ask.cancel)
            return await _written(ask, answers.whole, ask, form)
        options = body.stream_options or bodies.StreamOptions()
        rest = answers.events(
            ask,
            form,
            include_usage=bool(options.include_usage),
            continuous_usage=bool(options.continuous_usage_stats),
        )
        # An error before the first event has a status of its own.
        first = await unless_gone(_first(rest), request.receive, ask.cancel)
        return EventStream(first, rest, ask.cancel)

    def _submit(self, ask: Ask) -> None:
        server, now = self._ready(), time.monotonic()
        to_run = []
        for handle in ask.every_handle:
            request = handle.request
            if request.max_tokens or (request.scores_prompt and len(request.tokens) > 1):
                to_run.append(handle)
            else:
                # Nothing of it needs the model.
                handle.stamp(admitted=now)
                handle.finish()
        try:
            server.check(to_run)
        except ValueError as error:
            raise RefusalError(str(error), param="prompt") from None
        if to_run:
            server.enqueue(to_run)

    async def _models(self, request: Request) -> Response:
        return Json({"object": "list", "data": [self._described()]})

    async def _model(self, request: Request) -> Response:
        fields.check_model(request.path_params["name"], [self._name])
        return Json(self._described())

    def _described(self) -> dict[str, Any]:
        capacity = self.server.sizes.capacity if self.server else None
        return {
            "id": self._name,
            "object": "model",
            "created": self._created,
            "owned_by": "xai-org",
            "max_model_len": capacity,
        }

    async def _score(self, request: Request) -> Response:
        body = await self._read(request, bodies.ScoreBody)
        most, num_top = self._ready().num_top, body.top_logprobs
        fields.within("top_logprobs", num_top, 0, most, f"from 0 to {most}")
        num_top = min(5, most) if num_top is None else num_top
        as_completion = bodies.CompletionBody(
            prompt=body.prompt,
            max_tokens=0,
            echo=True,
            logprobs=num_top,
            add_special_tokens=body.add_special_tokens,
        )
        ask = await self._asked(asks.completion_ask, as_completion, body.prompt)
        for prompt in ask.prompts:
            if len(prompt.tokens) < 2:
                raise RefusalError(
                    "a text of one token has nothing to score; give at least two", param="prompt"
                )
        self._submit(ask)
        await unless_gone(_all(ask), request.receive, ask.cancel)
        return await _written(ask, self._all_scored, ask)

    def _all_scored(self, ask: Ask) -> dict[str, Any]:
        return {
            "object": "list",
            "model": self._name,
            "data": [self._scored(ask, number) for number in range(len(ask.prompts))],
            "usage": answers.usage(ask),
        }

    def _scored(self, ask: Ask, number: int) -> dict[str, Any]:
        prompt, [handle] = ask.prompts[number], ask.handles[number]
        entries = list(answers.prompt_entries(prompt, handle, self._texts, ask.num_top or 0))
        parts = [part.on_host() for part in handle.request.prompt_scores]
        logprobs = np.concatenate([part.logprobs for part in parts])
        total = float(logprobs.sum(dtype=np.float64))
        return {
            "index": number,
            "token_ids": prompt.tokens,
            "total_logprob": total,
            "perplexity": perplexity(-total / len(logprobs)),
            "ranks": [None, *np.concatenate([part.ranks for part in parts]).tolist()],
            "entropies": [None, *np.concatenate([part.entropies for part in parts]).tolist()],
            "logprobs": answers.legacy_logprobs(entries, self._texts),
        }

    async def _trace(self, request: Request) -> Response:
        body = await self._read(request, bodies.TraceBody)
        server, limits = self._ready(), self._limits
        if not server.model.engine.setup.is_alone:
            raise RefusalError("a model of several processes is not traced here", status=501)
        lens_top = 3 if body.lens_top is None else body.lens_top
        fields.within("lens_top", lens_top, 1, 10, "from 1 to 10")
        sampling = bodies.SamplingBody(add_special_tokens=body.add_special_tokens)
        [prompt] = await asyncio.to_thread(asks.read_prompts, body.prompt, server, limits, sampling)
        most = min(_MOST_TRACED, server.sizes.capacity)
        if len(prompt.tokens) > most:
            raise RefusalError(
                f"at most {most} tokens are traced, found {len(prompt.tokens)}", param="prompt"
            )
        try:
            server.model.engine.check_length(len(prompt.tokens))
        except ValueError as error:
            raise RefusalError(str(error), param="prompt") from None
        work = self._traces.trace(prompt.tokens, lens_top)
        return Json(await unless_gone(work, request.receive, lambda: None))

    async def _tokenize(self, request: Request) -> Response:
        body = await self._read(request, bodies.TokenizeBody)
        tokenizer = self._tokenizer()
        add_bos, capacity = bool(body.add_special_tokens) and self._limits.add_bos, self._capacity

        def made() -> bytes:
            special = special_id(tokenizer, body.prompt)
            if special is None:
                tokens = encode_text(tokenizer, body.prompt, add_bos=add_bos)
            else:
                tokens = [special]
            found = {"tokens": tokens, "count": len(tokens), "max_model_len": capacity}
            if body.return_token_strs:
                found["token_strs"] = [tokenizer.piece(token) for token in tokens]
            return msgspec.json.encode(found)

        return Json(await asyncio.to_thread(made))

    async def _detokenize(self, request: Request) -> Response:
        body = await self._read(request, bodies.DetokenizeBody)
        tokenizer = self._tokenizer()
        tokens = fields.checked_ids("tokens", body.tokens, tokenizer.vocab_size)
        return Json({"prompt": await asyncio.to_thread(tokenizer.decode, tokens)})

    async def _tokenizer_info(self, request: Request) -> Response:
        tokenizer = self._tokenizer()

        def piece(token: int) -> str | None:
            return tokenizer.piece(token) if token >= 0 else None

        return Json(
            {
                "tokenizer_class": "SentencePiece",
                "bos_token": piece(tokenizer.bos_id),
                "eos_token": piece(tokenizer.eos_id),
                "pad_token": piece(tokenizer.pad_id),
                "unk_token": piece(tokenizer.unk_id),
                "vocab_size": tokenizer.vocab_size,
                "add_bos_token": self._limits.add_bos,
                "max_model_len": self._capacity,
            }
        )

    def _tokenizer(self):
        tokenizer = self._ready().model.tokenizer
        if tokenizer is None:
            raise RefusalError("this model has no tokenizer", status=404, type="not_found_error")
        return tokenizer

    @property
    def _capacity(self) -> int:
        return self._ready().sizes.capacity

    async def _health(self, request: Request) -> Response:
        server = self.server
        state = "loading" if server is None else server.state
        if server is not None and server.is_stuck:
            state = "stuck"
        found: dict[str, Any] = {"status": "ok" if state == "ready" else state}
        if server is not None:
            load = server.load()
            found |= {"running": load.num_running, "waiting": load.num_waiting}
        return Json(found, 200 if state == "ready" else 503)

    async def _version(self, request: Request) -> Response:
        return Json({"version": __version__})

    async def _metrics(self, request: Request) -> Response:
        if self.server is None:
            raise RefusalError("the server is loading", status=503, type="unavailable_error")
        text = await asyncio.to_thread(self._measured.text)
        return Response(text, headers={"content-type": CONTENT_TYPE})


async def _written(ask: Ask, make: Callable[..., Any], *arguments: Any) -> Response:
    """Returns what a function makes as JSON; beside the event loop where it is long."""
    if not ask.is_long:
        return Json(make(*arguments))
    return Json(await asyncio.to_thread(lambda: msgspec.json.encode(make(*arguments))))


async def _first(events: AsyncIterator[Any]) -> Any:
    return await anext(events)


async def _all(ask: Ask) -> None:
    """Waits for all choices; where one fails, the others are cancelled by who waits for this."""
    await asyncio.gather(*(handle.ended() for handle in ask.every_handle))

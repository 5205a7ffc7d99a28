"""The HTTP side: OpenAI's ``/v1/chat/completions`` and ``/v1/models``, with a key where one is set.

Not ``transformers serve``: in 5.23 it loads no adapter by its folder and no quantised base, has no API key, sets no
pixel limit, opens any file or address that a request names as an image, and ``/load_model`` loads any model.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from vlmtune.config import GenerationArguments
from vlmtune.errors import VlmtuneError
from vlmtune.serving.engine import Engine, Reply
from vlmtune.serving.requests import ChatRequest, RequestError, read_request

logger = logging.getLogger("vlmtune.serve")
LOCAL_NAMES = ["localhost", "127.0.0.1", "[::1]", "::1"]


def build_app(
    engine: Engine,
    name: str,
    defaults: GenerationArguments,
    *,
    api_key: str | None = None,
    host: str | None = None,
    max_request_mb: int = 50,
    max_images: int = 16,
) -> Starlette:
    """Return the application.

    Args:
        engine: answers.
        name: of the model, in requests.
        defaults: options of what a request leaves open.
        api_key: what requests must carry as bearer token; ``None`` lets every request in.
        host: this machine's own name or address, where only it is listened on: other host names are then refused, so
            that no web page can reach the server under a name of its own.
        max_request_mb: largest body, in 10**6 bytes.
        max_images: most images of a request.
    """
    created = int(time.time())

    async def models(_: Request) -> Response:
        entry = {"id": name, "object": "model", "created": created, "owned_by": "vlmtune"}
        return JSONResponse({"object": "list", "data": [entry]})

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def chat(request: Request) -> Response:
        body = await _body(request, max_request_mb * 10**6)

        def queue() -> Any:
            asked = read_request(
                body, name, defaults, max_images=max_images, max_pixels=engine.generator.encoder.max_pixels
            )
            return asked, engine.submit(asked)

        # Images are looked at and texts are encoded beside the event loop.
        asked, future = await asyncio.to_thread(queue)
        reply = await asyncio.wrap_future(future)
        if asked.stream:
            return StreamingResponse(_events(asked, reply, name), media_type="text/event-stream")
        return JSONResponse(_completion(asked, reply, name))

    async def refused(_: Request, error: Exception) -> Response:
        known = error if isinstance(error, RequestError) else RequestError(str(error))
        return JSONResponse(error_body(known), status_code=known.status)

    async def failed(_: Request, error: Exception) -> Response:
        logger.error("a request failed: %s: %s", type(error).__name__, error)
        return JSONResponse(
            {"error": {"message": "The server failed.", "type": "server_error", "param": None, "code": None}},
            status_code=500,
        )

    async def unknown(request: Request, _: Exception) -> Response:
        message = f"There is no {request.method} {request.url.path} here; POST /v1/chat/completions is."
        return JSONResponse(error_body(RequestError(message)), status_code=404)

    middleware = [Middleware(_KeyMiddleware, api_key=api_key)] if api_key else []
    if host is not None:
        middleware.insert(0, Middleware(TrustedHostMiddleware, allowed_hosts=[*LOCAL_NAMES, host]))
    handlers: dict[Any, Callable[..., Any]] = {VlmtuneError: refused, 404: unknown, 405: unknown, Exception: failed}
    return Starlette(
        routes=[
            Route("/v1/models", models),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/health", health),
        ],
        middleware=middleware,
        exception_handlers=handlers,
    )


class _KeyMiddleware:
    """Lets requests with the key through; ``/health`` needs none."""

    def __init__(self, app: Any, api_key: str) -> None:
        self.app, self.key = app, f"Bearer {api_key}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] != "/health":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self.key):
                error = RequestError("The API key is missing or wrong.", status=401, code="invalid_api_key")
                await JSONResponse(error_body(error), status_code=401)(scope, receive, send)
                return
        await self.app(scope, receive, send)


def error_body(error: RequestError) -> dict[str, Any]:
    """Return an error in OpenAI's form."""
    kind = "invalid_request_error"
    return {"error": {"message": str(error), "type": kind, "param": error.parameter, "code": error.code}}


async def _body(request: Request, most: int) -> Any:
    # Browsers send JSON to other sites only after asking them, and here they are refused.
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise RequestError("The body must be JSON, sent as application/json.", status=415)
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > most:
            raise RequestError(f"The request is larger than {most // 10**6} MB.", status=413)
    try:
        return json.loads(data)
    except ValueError as error:
        raise RequestError(f"The body is not JSON ({error}).") from error


def _completion(asked: ChatRequest, reply: Reply, name: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": reply.answer.text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _finish(reply)}
    return _head(asked, name, "chat.completion") | {"choices": [choice], "usage": _usage(reply)}


async def _events(asked: ChatRequest, reply: Reply, name: str) -> AsyncIterator[str]:
    """The answer as server-sent events: it is generated whole, so it comes in one piece."""
    head = _head(asked, name, "chat.completion.chunk")
    for delta, finish in (
        ({"role": "assistant", "content": ""}, None),
        ({"content": reply.answer.text}, None),
        ({}, _finish(reply)),
    ):
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        yield f"data: {json.dumps(head | {'choices': [choice]})}\n\n"
    if asked.usage:
        yield f"data: {json.dumps(head | {'choices': [], 'usage': _usage(reply)})}\n\n"
    yield "data: [DONE]\n\n"


def _head(asked: ChatRequest, name: str, kind: str) -> dict[str, Any]:
    return {"id": asked.id, "object": kind, "created": int(time.time()), "model": name}


def _finish(reply: Reply) -> str:
    return "stop" if reply.answer.ended else "length"


def _usage(reply: Reply) -> dict[str, int]:
    prompt, new = reply.prompt_tokens, reply.answer.tokens
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

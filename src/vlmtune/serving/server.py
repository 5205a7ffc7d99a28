"""``vlmtune serve``: load a model, listen, and answer until told to stop."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlmtune.config import AdapterArguments, BaseModelArguments, GenerationArguments, QuantizationArguments
from vlmtune.config.serving import ServeArguments
from vlmtune.errors import ConfigError, MissingDependencyError, OutputError
from vlmtune.evaluation.command import load
from vlmtune.serving.check import Check, check_answers

logger = logging.getLogger("vlmtune.serve")
KEY_VARIABLE = "VLMTUNE_API_KEY"


def serve(
    model_args: BaseModelArguments,
    adapter_args: AdapterArguments,
    quantization_args: QuantizationArguments,
    generation_args: GenerationArguments,
    args: ServeArguments,
) -> Check | None:
    """Serve a model until the process is told to stop, or check it and return what was found.

    Raises:
        ConfigError: no key for an address that others can reach, or options that the engine lacks.
        MissingDependencyError: the server is not installed.
        OutputError: the port is taken.
        ModelError: the model cannot be loaded.
    """
    key = args.api_key or os.environ.get(KEY_VARIABLE) or None
    require_key(args, key)
    name = args.served_model_name or Path(adapter_args.adapter or model_args.model_name_or_path).name
    if args.engine == "vllm":
        from vlmtune.serving import vllm

        return vllm.serve(model_args, adapter_args, quantization_args, generation_args, args, name, key)
    _require_server()
    opened = _listen(args)
    with opened:
        port = opened.getsockname()[1]
        address = f"http://{_shown(args.host)}:{port}/v1"
        model, processor = load(model_args, adapter_args, quantization_args)
        with _running(model, processor, name, key, generation_args, args, opened) as thread:
            if args.check:
                return check_answers(address, name, key, model, processor, generation_args)
            logger.info("serving %s at %s%s; Ctrl-C stops it", name, address, " with an API key" if key else "")
            thread.join()
    return None


def require_key(args: ServeArguments, key: str | None) -> None:
    """Refuse to listen where others can reach the model, without a key.

    Raises:
        ConfigError: with the way out.
    """
    if not args.is_local and not key:
        raise ConfigError(
            f"host {args.host} can be reached from other machines, and no API key is set. Set the environment variable "
            f"{KEY_VARIABLE}, or listen on 127.0.0.1."
        )


@contextmanager
def _running(
    model: Any,
    processor: Any,
    name: str,
    key: str | None,
    generation_args: GenerationArguments,
    args: ServeArguments,
    opened: socket.socket,
) -> Iterator[threading.Thread]:
    import uvicorn

    from vlmtune.serving.app import build_app
    from vlmtune.serving.engine import Engine

    engine = Engine(model, processor, max_pixels=args.max_pixels)
    app = build_app(
        engine,
        name,
        generation_args,
        api_key=key,
        host=args.host if args.is_local else None,
        max_request_mb=args.max_request_mb,
        max_images=args.max_images,
    )
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", server_header=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]}, name="vlmtune-server", daemon=True)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        yield thread
    finally:
        server.should_exit = True
        thread.join(10)
        engine.close()


def _listen(args: ServeArguments) -> socket.socket:
    try:
        family = socket.getaddrinfo(args.host, None, type=socket.SOCK_STREAM)[0][0]
        opened = socket.socket(family, socket.SOCK_STREAM)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind((args.host, args.port))
    except OSError as error:
        raise OutputError(
            f"{args.host}, port {args.port}, cannot be listened on ({error.strerror}). Choose another port, or 0 for a "
            "free one."
        ) from error
    return opened


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _require_server() -> None:
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"Serving needs the package {error.name}. Install it by: pip install 'vlmtune[serve]'"
        ) from error

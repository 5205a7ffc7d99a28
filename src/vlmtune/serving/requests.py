"""Requests of OpenAI's chat API (platform.openai.com/docs/api-reference/chat/create) to samples and options.

What is not done as asked is refused by name, never passed over.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import secrets
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from vlmtune.config import GenerationArguments
from vlmtune.data.images import check
from vlmtune.data.sample import ROLES, ImageRef, Message, Part, Role, Sample
from vlmtune.errors import ConfigError, VlmtuneError

# Fields that change nothing in an answer.
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
USED = {"model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stream"} | {
    "stream_options"
}
# Fields that have no effect at these values.
HARMLESS: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logprobs": (False,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none",),
    "stop": ([],),
}


class RequestError(VlmtuneError):
    """A request that cannot be answered.

    Attributes:
        status: of HTTP.
        parameter: the field that is wrong.
        code: a short name for programs.
    """

    def __init__(self, message: str, *, status: int = 400, parameter: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.parameter, self.code = status, parameter, code


@dataclass(frozen=True)
class ChatRequest:
    """A request, read.

    Attributes:
        id: of the answer.
        sample: the conversation.
        options: how its answer is generated.
        seed: of sampling.
        stream: the answer is sent as events.
        usage: events end with the numbers of tokens.
    """

    id: str
    sample: Sample
    options: GenerationArguments
    seed: int
    stream: bool
    usage: bool


def read_request(
    body: Any, model: str, defaults: GenerationArguments, *, max_images: int, max_pixels: int | None = None
) -> ChatRequest:
    """Read the body of a chat request.

    Args:
        body: JSON values.
        model: the name of the model that is served.
        defaults: options of what the request leaves open.
        max_images: most images of a request.
        max_pixels: of an image.

    Raises:
        RequestError: something in it cannot be done; the message names the field.
    """
    if not isinstance(body, Mapping):
        raise RequestError("The body must be a JSON object.")
    if body.get("model") != model:
        raise RequestError(
            f"The model {body.get('model')!r} is not served here; {model!r} is.",
            status=404,
            parameter="model",
            code="model_not_found",
        )
    _refuse_unknown(body)
    messages, images = _messages(body.get("messages"), max_images)
    for image in images:
        if problem := check(image, "header", max_pixels=max_pixels):
            raise RequestError(problem, parameter="messages", code="invalid_image")
    stream_options = body.get("stream_options") or {}
    return ChatRequest(
        f"chatcmpl-{uuid.uuid4().hex}",
        # Sampling draws by the seed and this name.
        Sample("request", tuple(images), tuple(messages)),
        _options(body, defaults),
        _number(body, "seed", int, secrets.randbits(32)),
        bool(body.get("stream")),
        isinstance(stream_options, Mapping) and bool(stream_options.get("include_usage")),
    )


def _refuse_unknown(body: Mapping[str, Any]) -> None:
    for name, value in body.items():
        if name in USED | IGNORED or value is None or value in HARMLESS.get(name, ()):
            continue
        raise RequestError(f"{name} is not supported here. Leave it out.", parameter=name, code="unsupported_parameter")


def _options(body: Mapping[str, Any], defaults: GenerationArguments) -> GenerationArguments:
    most = _number(body, "max_completion_tokens", int, None)
    if most is None:
        most = _number(body, "max_tokens", int, defaults.max_new_tokens)
    try:
        return dataclasses.replace(
            defaults,
            max_new_tokens=most,
            temperature=_number(body, "temperature", float, defaults.temperature),
            top_p=_number(body, "top_p", float, defaults.top_p),
        )
    except ConfigError as error:
        raise RequestError(str(error)) from error


def _number(body: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        raise RequestError(f"{name} is {value!r}; it takes a number.", parameter=name)
    return kind(value)


def _messages(given: Any, max_images: int) -> tuple[list[Message], list[ImageRef]]:
    if not isinstance(given, list) or not given:
        raise RequestError("messages must be a list of at least one message.", parameter="messages")
    messages, images = list[Message](), list[ImageRef]()
    for index, message in enumerate(given):
        place = f"messages[{index}]"
        role = message.get("role") if isinstance(message, Mapping) else None
        role = "system" if role == "developer" else role
        if role not in ROLES:
            raise RequestError(f"{place} has the role {role!r}; use {', '.join(ROLES)}.", parameter=place)
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list) or not parts:
            raise RequestError(f"{place} has no content: a text, or a list of parts.", parameter=place)
        messages.append(Message(cast(Role, role), tuple(_part(part, f"{place}.content", images) for part in parts)))
    if messages[-1].role != "user":
        raise RequestError("The last message must be the user's.", parameter="messages")
    if len(images) > max_images:
        raise RequestError(f"There are {len(images)} images; at most {max_images} are taken.", parameter="messages")
    return messages, images


def _part(part: Any, place: str, images: list[ImageRef]) -> Part:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return Part("text", part["text"])
    if kind == "image_url":
        address = part.get("image_url")
        images.append(_image(address.get("url") if isinstance(address, Mapping) else address, place))
        return Part("image")
    raise RequestError(f"{place} holds a part that is neither a text nor an image_url.", parameter=place)


def _image(address: Any, place: str) -> ImageRef:
    """Take the image out of a ``data:`` address; files of this machine and other addresses are not opened for it."""
    head, _, data = str(address).partition(",")
    if not (head.startswith("data:image/") and head.endswith(";base64")):
        raise RequestError(
            f"{place} names the image {str(address)[:60]!r}. Send the image itself, as data:image/png;base64,... : "
            "addresses and files are not opened for a request.",
            parameter=place,
            code="invalid_image",
        )
    try:
        return ImageRef(bytes=base64.b64decode(data, validate=True))
    except binascii.Error as error:
        raise RequestError(f"{place} holds an image that is not base64 ({error}).", parameter=place) from error

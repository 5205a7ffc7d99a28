"""Texts of a recipe or flag to the type that an option declares.

Recipes are read without YAML's own guesses (``1e-4`` is a string to YAML 1.1, ``off`` a boolean), so a value
is the text that stands in the file, and the option's type decides what it means, as with a flag.
"""

from __future__ import annotations

import contextlib
import typing
from typing import Any, Literal

from vlmtune.config.options import literal_choices, union_members
from vlmtune.errors import nearest

TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
NULL = ("", "null", "~")

Raw = str | list["Raw"] | dict[str, "Raw"]


class Unconvertible(ValueError):
    """A text that is not of the option's type; the message says what the option takes."""


def convert(value: Raw, annotation: Any) -> Any:
    """Return ``value`` in the type ``annotation``.

    Args:
        value: a text, or a list or mapping of texts.
        annotation: a resolved type: bool, int, float, str, Literal, list[...], dict[...] or a union of them.

    Raises:
        Unconvertible: the text does not read as that type.
    """
    members = union_members(annotation)
    if type(None) in members and isinstance(value, str) and _is_null(value, members):
        return None
    members = tuple(member for member in members if member is not type(None))
    if isinstance(value, dict):
        if any(_container(member) is dict for member in members):
            return _free(value)
        raise Unconvertible("it takes a single value, not a mapping")
    for member in members:
        if _container(member) is list:
            items = value if isinstance(value, list) else [value]
            if isinstance(value, list) or str not in members:
                return [convert(item, typing.get_args(member)[0]) for item in items]
    if isinstance(value, list):
        raise Unconvertible("it takes a single value, not a list")
    reasons = []
    for member in sorted(members, key=_order):
        try:
            return _scalar(value, member)
        except Unconvertible as error:
            reasons.append(str(error))
    raise Unconvertible(reasons[0])


def is_bool(annotation: Any) -> bool:
    """Whether an option is a switch, whose flag needs no value."""
    members = union_members(annotation)
    return (bool in members and str not in members) or "on" in literal_choices(annotation)


def is_list(annotation: Any) -> bool:
    """Whether an option takes several values."""
    return any(_container(member) is list for member in union_members(annotation))


def _scalar(text: str, member: Any) -> Any:
    if typing.get_origin(member) is Literal:
        return _choice(text, typing.get_args(member))
    if member is bool:
        if text.lower() in TRUE + FALSE:
            return text.lower() in TRUE
        raise Unconvertible("it takes true or false")
    if member in (int, float):
        return _number(text, member)
    if member is str:
        return text
    raise Unconvertible("it cannot be set in a recipe or by a flag")


def _number(text: str, kind: type) -> int | float:
    what = "a whole number" if kind is int else "a number"
    try:
        number = float(text)
    except ValueError:
        raise Unconvertible(f"it takes {what}") from None
    if kind is float:
        return number
    with contextlib.suppress(ValueError):
        return int(text)  # exact where a float is not, above 2^53
    if not number.is_integer():
        raise Unconvertible(f"it takes {what}")
    return int(number)


def _choice(text: str, choices: tuple[Any, ...]) -> Any:
    if text in choices:
        return text
    switched = {**dict.fromkeys(TRUE, "on"), **dict.fromkeys(FALSE, "off")}.get(text.lower())
    if switched in choices:
        return switched
    names = ", ".join(map(str, choices))
    raise Unconvertible(f"it takes {names}.{nearest(text, map(str, choices))}".removesuffix("."))


def _free(value: Raw) -> Any:
    """Type the leaves of a mapping that no option describes, by how they read."""
    if isinstance(value, dict):
        return {key: _free(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_free(item) for item in value]
    if value.lower() in NULL:
        return None
    if value.lower() in TRUE[:3] + FALSE[:3]:
        return value.lower() in TRUE
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(value)
    return value


def _is_null(text: str, members: tuple[Any, ...]) -> bool:
    # "none" is a text of its own to some options, such as report_to.
    return text.lower() in NULL or (text.lower() == "none" and str not in members)


def _container(annotation: Any) -> type | None:
    origin = typing.get_origin(annotation) or annotation
    return origin if origin in (list, dict) else None


def _order(member: Any) -> int:
    """Text last: everything reads as text."""
    kinds: tuple[Any, ...] = (bool, int, float)
    if typing.get_origin(member) is Literal:
        return 0
    if member in kinds:
        return 1 + kinds.index(member)
    return 9 if member is str else 10

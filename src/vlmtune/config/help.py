"""The options of argument classes as text for people."""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
from collections.abc import Collection, Sequence
from typing import Any

from vlmtune.config.options import field_types, literal_choices, union_members

WIDTH = 100


def format_options(
    classes: Sequence[type],
    *,
    required: Collection[str] = (),
    optional: Collection[str] = (),
    without: Collection[str] = (),
) -> str:
    """Return the options of classes, a group a class, each with its kind, default and help.

    Args:
        classes: argument dataclasses.
        required: options that must be set although their class has a default.
        optional: options that need not be set although their class has none.
        without: options that are not shown.
    """
    groups: dict[str, list[str]] = {}
    shown: set[str] = set(without)
    for cls in classes:
        kinds = field_types(cls)
        for base in reversed(cls.__mro__):
            group: Any = base.__dict__.get("_argument_group_name")
            for name in inspect.get_annotations(base) if group else ():
                field = cls.__dataclass_fields__.get(name)  # type: ignore[attr-defined]
                if field is not None and name in kinds and name not in shown and field.metadata.get("help"):
                    shown.add(name)
                    groups.setdefault(group, []).append(_entry(field, kinds[name], required, optional))
    return "\n\n".join(f"{group} options:\n" + "\n".join(entries) for group, entries in groups.items())


def _entry(field: dataclasses.Field[Any], kind: Any, required: Collection[str], optional: Collection[str]) -> str:
    text = str(field.metadata["help"])
    default = "required" if field.name in required else None if field.name in optional else _default(field)
    if default is not None:
        text += f" [{default}]"
    body = textwrap.fill(text, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return f"  --{field.name} {_kind(kind)}\n{body}".replace(" \n", "\n")


def _kind(kind: Any) -> str:
    if choices := literal_choices(kind):
        return "|".join(choices)
    members = [member for member in union_members(kind) if member is not type(None)]
    names = {bool: "true|false", int: "N", float: "X", str: "TEXT"}
    plain = [member for member in members if member in names]
    if any(getattr(member, "__origin__", None) is list for member in members):
        return "TEXT ..."
    return names[plain[0]] if plain else "TEXT"


def _default(field: dataclasses.Field[Any]) -> str | None:
    if field.default_factory is not dataclasses.MISSING:
        value: Any = field.default_factory()
    elif field.default is dataclasses.MISSING:
        return "required"
    else:
        value = field.default
    if value is None or value in ("", []):
        return None
    if isinstance(value, bool):
        return str(value).lower()
    return (
        " ".join(map(str, value))
        if isinstance(value, list)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )

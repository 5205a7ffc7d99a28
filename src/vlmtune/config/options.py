"""How an option is declared and checked: its default, its help, and the values it takes."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Union

from vlmtune.errors import ConfigError, nearest


@dataclass(frozen=True)
class Limit:
    """Values that an option takes, beyond its type.

    Attributes:
        low: the smallest number, or the bound itself when ``open_low``.
        high: the largest number, or the bound itself when ``open_high``.
        open_low: ``low`` itself is refused.
        open_high: ``high`` itself is refused.
        choices: names that the option, or each item of a list, can be.
        never_empty: an empty list is refused.
    """

    low: float | None = None
    high: float | None = None
    open_low: bool = False
    open_high: bool = False
    choices: tuple[str, ...] = ()
    never_empty: bool = False

    def problem(self, value: Any) -> str | None:
        """Return what is wrong with ``value``, as what follows the option's name, or ``None``."""
        if isinstance(value, list | tuple):
            if self.never_empty and not value:
                return f"is empty; it takes some of {', '.join(self.choices)}." if self.choices else "is empty."
            return next((problem for item in value if (problem := self.problem(item))), None)
        if self.choices and value not in self.choices:
            return f"is {value!r}; it takes {', '.join(self.choices)}.{nearest(str(value), self.choices)}"
        if not isinstance(value, int | float) or isinstance(value, bool):
            return None
        too_low = self.low is not None and (value < self.low or (self.open_low and value == self.low))
        too_high = self.high is not None and (value > self.high or (self.open_high and value == self.high))
        # `value != value` is true of NaN alone, which passes every comparison above.
        return f"is {value}; it must be {self._range()}." if too_low or too_high or value != value else None

    def _range(self) -> str:
        bounds = []
        if self.low is not None:
            bounds.append(f"{'above' if self.open_low else 'at least'} {self.low:g}")
        if self.high is not None:
            bounds.append(f"{'below' if self.open_high else 'at most'} {self.high:g}")
        return " and ".join(bounds) or "a number"


Limits = Mapping[str, Limit]

AT_LEAST_ZERO = Limit(low=0)
AT_LEAST_ONE = Limit(low=1)
POSITIVE = Limit(low=0, open_low=True)
FRACTION = Limit(low=0, high=1)
FRACTION_BELOW_ONE = Limit(low=0, high=1, open_high=True)


def option(default: Any = dataclasses.MISSING, *, help: str) -> Any:
    """Declare an option; ``help`` is its documentation, on the command line and for readers of the code.

    Args:
        default: a value, or a list (each instance gets its own copy); left out for a required option.
        help: plain English, one to three sentences.
    """
    metadata = {"help": help}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata, kw_only=True)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class Checked:
    """Base of argument classes whose values are checked when they are made.

    A subclass sets ``limits``, and may extend :meth:`problems` with what options mean together.
    """

    limits: ClassVar[Limits] = {}

    def problems(self) -> list[str]:
        """Return what is wrong with the values, one sentence each, or an empty list."""
        return limit_problems(self)

    def __post_init__(self) -> None:
        """Refuse wrong values, all of them in one error."""
        raise_problems(self.problems())


class OptionsError(ConfigError):
    """Several options that cannot be used.

    Attributes:
        problems: one sentence or two for each.
    """

    def __init__(self, problems: list[str]) -> None:
        self.problems = list(problems)
        listed = "\n".join(f"  - {problem}" for problem in problems)
        super().__init__(problems[0] if len(problems) == 1 else f"{len(problems)} options cannot be used:\n{listed}")


def raise_problems(problems: list[str]) -> None:
    """Raise an :class:`OptionsError` with all ``problems``, if there are any."""
    if problems:
        raise OptionsError(problems)


def limit_problems(arguments: Any) -> list[str]:
    """Return what is wrong with each value of a dataclass instance taken alone."""
    types_by_name = field_types(type(arguments))
    limits = all_limits(type(arguments))
    problems = []
    for name, limit in limits.items():
        value = getattr(arguments, name)
        problem = None if value is None else limit.problem(value)
        if problem:
            problems.append(f"{name} {problem}")
    for name, annotation in types_by_name.items():
        choices = literal_choices(annotation)
        value = getattr(arguments, name)
        if choices and name not in limits and value is not None and value not in choices:
            problems.append(f"{name} {Limit(choices=choices).problem(value)}")
    return problems


def all_limits(cls: type) -> dict[str, Limit]:
    """Return the limits of a class and its bases, the class's own last."""
    merged: dict[str, Limit] = {}
    for base in reversed(cls.__mro__):
        merged |= base.__dict__.get("limits", {})
    return merged


def field_types(cls: type) -> dict[str, Any]:
    """Return the resolved type of every field that can be set."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def literal_choices(annotation: Any) -> tuple[str, ...]:
    """Return the strings of a ``Literal``, also one that may be ``None``; empty for other types."""
    for member in union_members(annotation):
        if typing.get_origin(member) is Literal:
            return tuple(str(choice) for choice in typing.get_args(member))
    return ()


def union_members(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the type itself."""
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)

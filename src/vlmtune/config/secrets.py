"""Keep tokens and passwords out of what is logged, printed and recorded."""

from __future__ import annotations

import logging
import os
import re

SECRET_NAME = re.compile(r"token$|_key$|password|secret|credential", re.IGNORECASE)
HIDDEN = "(hidden)"
# Shorter values are words such as "true", which stand everywhere.
SHORTEST = 8
_given: set[str] = set()


def keep_secret(value: str | None) -> None:
    """Have :func:`redact` hide a value that came from elsewhere than the environment, such as a recipe."""
    if value and len(value) >= SHORTEST:
        _given.add(value)


def redact(text: str) -> str:
    """Return ``text`` with every secret of the environment and the recipe hidden.

    Secrets are the values of variables and options that are named so, such as ``HF_TOKEN`` or ``hub_token``.
    """
    named = {value for name, value in os.environ.items() if SECRET_NAME.search(name) and len(value) >= SHORTEST}
    for secret in sorted(named | _given, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return text


class RedactingFormatter(logging.Formatter):
    """Formats a log line, traceback included, and hides secrets in it."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        return redact(super().format(record))

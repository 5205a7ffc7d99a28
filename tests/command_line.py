"""What the tests of commands share."""

from __future__ import annotations

import logging
import os
import warnings

import pytest

from vlmtune import cli


def vlmtune(*arguments: object) -> int:
    """Run a command; put back what it sets for its whole process."""
    logger, environment = logging.getLogger("vlmtune"), dict(os.environ)
    before = logger.handlers, logger.level, logger.propagate
    try:
        with warnings.catch_warnings():
            return cli.main([str(argument) for argument in arguments])
    finally:
        logger.handlers, logger.level, logger.propagate = before
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]


def error_of(capsys: pytest.CaptureFixture[str], code: int, *arguments: object) -> str:
    """Run a command that must fail with this code; return its error."""
    capsys.readouterr()
    assert vlmtune(*arguments) == code
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return said.err[said.err.index("error: ") :]

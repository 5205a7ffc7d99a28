"""What ``make audit`` says of pip-audit's answer."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "audit.py"
FINE = {"name": "idna", "version": "3.10", "vulns": []}
WEAK = {"name": "old", "version": "1.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["1.1"]}]}
SKIPPED = {"name": "torch", "skip_reason": "Dependency not found on PyPI"}


@pytest.mark.parametrize(
    ("packages", "code", "said"),
    [
        ([FINE], 0, "1 packages were looked up, 0 of them have known weaknesses; 0 were not audited"),
        ([FINE, SKIPPED], 3, "torch was NOT audited: Dependency not found on PyPI"),
        ([WEAK, SKIPPED], 1, "old 1.0: PYSEC-1, fixed in 1.1"),
        ([], 3, "0 packages were looked up"),
    ],
)
def test_what_was_not_looked_up_is_said(packages: list[dict[str, Any]], code: int, said: str) -> None:
    found, lines = runpy.run_path(str(SCRIPT))["judge"](packages)
    assert found == code
    assert said in "\n".join(lines)

"""What the parity and sharing suites prove of each family, written to a file on request (``make families``).

A test marked ``proves("merge")`` speaks for the family of its parameter ``checkpoint``. A family has what it is marked
for when such tests ran, none failed, and none of its checkpoints was left out.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest


class Proofs:
    """Collects outcomes; a pytest plugin.

    Args:
        file: where they are written.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.outcomes: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: Any) -> Any:
        """Note a marked test's outcome; a skipped one proves nothing."""
        report = yield
        marker = item.get_closest_marker("proves")
        if marker is not None and (report.when == "call" or report.failed or report.skipped):
            from families.builders import VARIANTS

            checkpoint = item.callspec.params["checkpoint"]
            self.outcomes[VARIANTS.get(checkpoint, checkpoint)][marker.args[0]].add(report.outcome)
        return report

    def pytest_sessionfinish(self) -> None:
        """Write the file."""
        import transformers

        from vlmtune.models.families import FAMILIES
        from vlmtune.models.proved import record_digest

        before = json.loads(self.file.read_text(encoding="utf-8")) if self.file.exists() else {}
        for name, found in self.outcomes.items():
            before[name] = {
                "record": record_digest(FAMILIES[name]),
                "transformers": transformers.__version__,
                "supports": sorted(what for what, outcomes in found.items() if outcomes == {"passed"}),
            }
        content = {name: before[name] for name in FAMILIES if name in before}
        self.file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

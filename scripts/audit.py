"""Look for published weaknesses in the pinned packages with pip-audit; run by ``make audit``.

Exits with 1 where there are any, and with 3 where some package, or all of them, could not be looked up.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"


def judge(packages: list[dict[str, Any]]) -> tuple[int, list[str]]:
    """Return the exit code and the lines that say what was found.

    Args:
        packages: ``dependencies`` of pip-audit's JSON: each was looked up, with its ``vulns``, or has a
            ``skip_reason``.
    """
    unaudited = [one for one in packages if "skip_reason" in one]
    audited = [one for one in packages if "skip_reason" not in one]
    weak = [one for one in audited if one["vulns"]]
    lines = [
        f"{one['name']} {one['version']}: {found['id']}, fixed in {', '.join(found['fix_versions']) or 'no version'}"
        for one in weak
        for found in one["vulns"]
    ]
    lines += [f"{one['name']} was NOT audited: {one['skip_reason']}" for one in unaudited]
    lines.append(
        f"{len(audited)} packages were looked up, {len(weak)} of them have known weaknesses; {len(unaudited)} were not "
        "audited"
    )
    return (1 if weak else 3 if unaudited or not audited else 0), lines


def main() -> int:
    """Run pip-audit and say what its answer means."""
    command = [sys.executable, "-m", "pip_audit", "--no-deps", "--disable-pip", "--requirement", str(CONSTRAINTS)]
    command += ["--format", "json", "--progress-spinner", "off"]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        print(f"pip-audit gave no answer, so nothing was looked up: {done.stderr.strip()[-300:]}")
        return 3
    code, lines = judge(packages)
    print("\n".join(lines))
    return code


if __name__ == "__main__":
    sys.exit(main())

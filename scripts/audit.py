"""Look for published weaknesses in the pinned packages with pip-audit; run by ``make audit``.

Exits with 1 where there are any, and with 3 where the advisory service cannot be reached: then nothing was looked up.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"


def main() -> int:
    """Run pip-audit and say what its answer means."""
    command = [sys.executable, "-m", "pip_audit", "--no-deps", "--disable-pip", "--requirement", str(CONSTRAINTS)]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout, end="")
    words = ("ConnectionError", "ServiceError", "Max retries", "Could not connect", "HTTPError", "timed out")
    if done.returncode and any(word in done.stderr for word in words):
        print(f"The advisory service cannot be reached, so nothing was looked up: {done.stderr.strip()[-300:]}")
        return 3
    print(done.stderr, end="", file=sys.stderr)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())

"""Fail unless an evaluation reached a score: ``python scripts/require_score.py FOLDER METRIC AT_LEAST``.

``.ci/run`` calls it on the demo, whose tuning can get stuck at what a question's words alone suggest.
"""

import json
import sys
from pathlib import Path


def main(folder: str, metric: str, at_least: str) -> None:
    """Read ``scores.json`` in the folder and compare."""
    scores = json.loads((Path(folder) / "scores.json").read_text())["metrics"]
    value = 100 * scores[metric]["value"]
    if value < float(at_least):
        raise SystemExit(f"error: {folder} scored {value:.1f} % {metric}; at least {at_least} % is expected.")
    print(f"{folder}: {value:.1f} % {metric}, at least {at_least} % expected")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""``vlmtune report``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from vlmtune.cli.common import asks_help, places_and_output

logger = logging.getLogger("vlmtune")


def report(argv: list[str]) -> int:
    """Write a page of runs and evaluations."""
    if asks_help(argv):
        print(
            "usage: vlmtune report RUN_OR_EVALUATION [...] [--output FILE]\n\n"
            "Writes one HTML file that opens offline: scores with intervals, base against tuned, whether the model\n"
            "looks at its images, answers with their pictures, training curves, and what was trained. Name the folder\n"
            "of a run (its output_dir), of an evaluation, or one that holds such folders. Of several evaluations the\n"
            "first is what the others are compared with.\n\n"
            "  --output FILE\n      The page; by default report.html in the folder named last."
        )
        return 0
    places, output = places_and_output("report", argv)
    from vlmtune.report.data import folder_of, read_records
    from vlmtune.report.page import write_report

    last = folder_of(places[-1])
    records = read_records(places)
    title = " and ".join(dict.fromkeys(folder_of(place).resolve().name for place in places))
    path = write_report(records, output or last / "report.html", title=title)
    print(f"The report is {path} ({Path(path).stat().st_size / 1e6:.1f} MB). Open it in a browser.")
    return 0


def leave_report(places: Sequence[str | Path]) -> None:
    """Write the page of a command that is done into the folder named last; what prevents it is said, not raised."""
    from vlmtune.errors import MissingDependencyError, VlmtuneError

    folder = Path(places[-1])
    try:
        from vlmtune.report.data import read_records
        from vlmtune.report.page import write_report

        named = folder.resolve()
        title = (named.parent if named.name == "evaluation" else named).name
        path = write_report(read_records(places), folder / "report.html", title=title)
    except MissingDependencyError as error:
        logger.info("no page was written: %s Then: vlmtune report %s", error, folder)
    except VlmtuneError as error:
        logger.warning("no page was written: %s", error)
    except Exception as error:  # hours of work are not lost for a page
        logger.warning("no page was written (%s: %s). Try: vlmtune report %s", type(error).__name__, error, folder)
    else:
        print(f"The report is {path}. Open it in a browser.")

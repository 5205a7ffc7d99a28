"""The page: records in, one HTML file out that opens offline."""

from __future__ import annotations

import base64
import datetime
import hashlib
from collections.abc import Mapping, Sequence
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vlmtune.errors import MissingDependencyError, OutputError
from vlmtune.evaluation.honesty import not_looked_at, verdicts
from vlmtune.evaluation.metrics import get_metric
from vlmtune.evaluation.runner import SCORES
from vlmtune.files import write_whole
from vlmtune.report.analysis import GROUPS, Analysis, Row, analyse, confusion, flips, score_rows, type_rows
from vlmtune.report.charts import Dot, interval_chart
from vlmtune.report.data import EvaluationRecord, Records, RunRecord, read_json, recipe_differences
from vlmtune.report.gallery import CARDS_AT_ONCE, gallery
from vlmtune.report.record import curves, evaluated, facts

GENERATOR = "vlmtune report"


def write_report(records: Records, output: str | Path, *, title: str, differences: bool = False) -> Path:
    """Write a page of runs and evaluations.

    Args:
        records: the first evaluation is what the others are compared with.
        output: the file; an earlier report there is replaced.
        title: of the page.
        differences: show in what the runs' recipes differ.

    Returns:
        The file's path.

    Raises:
        OutputError: another file is in the way, or the folder cannot be written.
        EvaluationError: the evaluations are not of the same samples, or nothing can be scored.
        MissingDependencyError: jinja2 or matplotlib is not installed.
    """
    path = Path(output).expanduser()
    _require_ours(path)
    page = render(records, title=title, differences=differences)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, page)
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error.strerror}). Choose another --output.") from error
    return path


def render(records: Records, *, title: str, differences: bool = False) -> str:
    """Return the page's HTML. Whatever models and data sets say in it stays text."""
    try:
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise MissingDependencyError(
            "The report needs jinja2. Install it by: pip install 'vlmtune[report]'."
        ) from error
    files = resources.files("vlmtune.report") / "templates"
    style, script = ((files / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files / "report.html.j2").read_text(encoding="utf-8"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    evaluations = records.evaluations
    content: dict[str, Any] = {"analysis": None, "honesty": None, "cards": [], "notes": [], "evaluated": []}
    if evaluations:
        content |= _evaluation_part(evaluations)
    charts = [(run.label, [Markup(svg) for svg in curves(run)]) for run in records.runs]
    return str(
        template.render(
            title=title,
            generator=f"{GENERATOR} {version('vlmtune')}",
            style=Markup(style),
            script=Markup(script),
            script_hash=Markup(digest),
            made=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
            runs=[facts(run) for run in records.runs],
            curves=[(label, drawn) for label, drawn in charts if drawn],
            cards_at_once=CARDS_AT_ONCE,
            differences=_differences(records) if differences else None,
            groups={
                key: name for key, name in GROUPS.items() if any(key in card["groups"] for card in content["cards"])
            },
            svg=Markup,
            **content,
        )
    )


def _evaluation_part(evaluations: Sequence[EvaluationRecord]) -> dict[str, Any]:
    analysis = analyse(evaluations)
    rows = score_rows(analysis)
    by, types = type_rows(analysis)
    honesty = evaluations[-1].scores.get("honesty")
    several = len(evaluations) > 1
    shown = [0, len(evaluations) - 1] if several else [0]
    shown_samples = gallery(analysis)
    return {
        "analysis": analysis,
        "labels": analysis.labels,
        "samples": len(analysis.answers[-1]),
        "rows": [_cells(row) for row in rows],
        "headline": _headline(rows[0]) if several else None,
        "main_chart": _main_chart(rows[0], evaluations[-1]),
        "types_by": by,
        "types": [_cells(row) for row in types],
        "types_chart": _types_chart(analysis.primary, types) if types else "",
        "honesty": _honesty(honesty) if honesty else None,
        "confusions": [found for place in shown if (found := confusion(analysis, place))],
        "cards": shown_samples.cards,
        "boxes": shown_samples.boxes,
        "wordy": shown_samples.wordy,
        "evaluated": [evaluated(one) for one in evaluations],
        "flips": _flip_counts(analysis) if several else None,
        "notes": analysis.notes,
    }


def number(value: float, percent: bool) -> str:
    """Return a score for people: ``78.9 %``, or ``0.512``."""
    return f"{value * 100:.1f} %" if percent else f"{value:.3f}"


def signed(difference: tuple[float, float, float], percent: bool) -> str:
    """Return a difference with its interval for people: ``+37.6 (+34.1 to +41.0)``."""
    factor, digits = (100, 1) if percent else (1, 3)
    middle, low, high = (f"{value * factor:+.{digits}f}" for value in difference)
    return f"{middle} ({low} to {high})".replace("-", "−")


def _cells(row: Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "n": row.n,
        "values": [
            {
                "value": number(one.value, row.percent),
                "interval": f"{number(one.low, row.percent).removesuffix(' %')} to {number(one.high, row.percent)}",
                "difference": signed(one.difference, row.percent) if one.difference else "",
                "sure": _sure(one.difference, row.metric),
            }
            for one in row.values
        ],
    }


def _sure(difference: tuple[float, float, float] | None, metric: str) -> str:
    """``better`` or ``worse`` where the interval of the difference leaves out 0, else nothing."""
    if difference is None or difference[1] <= 0 <= difference[2]:
        return ""
    return "better" if (difference[0] > 0) == get_metric(metric).higher_is_better else "worse"


def _headline(row: Row) -> str:
    first, last = row.values[0], row.values[-1]
    before, after = (number(value, row.percent) for value in (first.value, last.value))
    gap = signed(last.difference, row.percent) if last.difference else ""
    if not _sure(last.difference, row.metric):
        end = f"The interval of the difference holds 0: {gap}, so the two are not told apart."
        return f"{row.name} is {before} ({first.label}) and {after} ({last.label}). {end}"
    verb = "rises" if last.value > first.value else "falls"
    return f"{row.name} {verb} from {before} ({first.label}) to {after} ({last.label}): {gap} on {row.n:,} samples."


def _main_chart(row: Row, last: EvaluationRecord) -> str:
    rows = [(one.label, [Dot(one.value, one.low, one.high, place)]) for place, one in enumerate(row.values)]
    for place, check in enumerate(("shuffled", "blank")):
        scores = read_json(last.folder / check / SCORES).get("metrics", {}).get(row.name)
        if scores:
            values = (scores["value"], scores["low"], scores["high"])
            rows.append((f"{check} images", [Dot(*values, max(len(row.values), 2) + place)]))
    return interval_chart(rows, f"{row.name}, with 95 % intervals", percent=row.percent)


def _types_chart(metric: str, rows: Sequence[Row]) -> str:
    dots = [
        (row.name, [Dot(one.value, one.low, one.high, place) for place, one in enumerate(row.values)]) for row in rows
    ]
    return interval_chart(dots, f"{metric} by type, with 95 % intervals", percent=rows[0].percent)


def _honesty(honesty: Mapping[str, Any]) -> dict[str, Any]:
    rows, skipped = [], []
    for check, what in (
        ("base", "without the adapter (base model)"),
        ("shuffled", "with another image's picture"),
        ("blank", "with a grey image of the same size"),
    ):
        entry = honesty.get(check, {})
        if "skipped" in entry:
            skipped.append(f"Not scored {what}: {entry['skipped']}.")
        for metric, values in entry.get("metrics", {}).items():
            percent = values["percent"]
            gap = (values["difference"], values["low"], values["high"])
            rows.append(
                {
                    "what": what,
                    "metric": metric,
                    "value": number(values["value"], percent),
                    "model": number(values["model"], percent),
                    "gap": signed(gap, percent),
                    "sure": _sure(gap, metric),
                    "n": entry["samples"],
                }
            )
    return {
        "rows": rows,
        "skipped": [*skipped, *not_looked_at(honesty)],
        "verdicts": verdicts(honesty),
        "ended": _ended(honesty["ended_by_terminator"]),
    }


def _ended(share: float) -> str:
    if share == 1:
        return "All answers ended by themselves."
    return f"{share:.1%} of the answers ended by themselves; the others were cut at max_new_tokens.".replace("%", " %")


def _flip_counts(analysis: Analysis) -> dict[str, int]:
    found = flips(analysis)
    return {
        "better": sum(flip.change > 0 for flip in found),
        "worse": sum(flip.change < 0 for flip in found),
        "same": len(analysis.answers[-1]) - len(found),
    }


def _differences(records: Records) -> dict[str, Any]:
    shown: Sequence[EvaluationRecord | RunRecord] = records.evaluations or records.runs
    return {"labels": [one.label for one in shown], "rows": recipe_differences(shown)}


def _require_ours(path: Path) -> None:
    if path.is_dir():
        raise OutputError(f"{path} is a folder. Name a file for the page by --output.")
    if path.exists():
        with path.open("rb") as file:
            if GENERATOR.encode() not in file.read(2000):
                raise OutputError(f"{path} is not a report of vlmtune and will not be overwritten. Name another file.")

"""A check's report for people: a summary in the terminal, and one HTML page."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape
from pathlib import Path

from rich.console import Console
from rich.text import Text

from vlmtune.errors import OutputError
from vlmtune.inspection.findings import Finding, Histogram, Report
from vlmtune.inspection.html import bars, figure, items, page, shown, table, tiles

JSON_NAME, PAGE_NAME = "check.json", "check.html"
STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}
FIGURES = 8


def verdict(report: Report) -> str:
    """One sentence: would training start, and if not, why."""
    if report.refused:
        return f"Training would be refused: {'; '.join(report.refused)}."
    found = sum(finding.level == "error" for finding in report.findings)
    return "Training would start." + (f" {found} kinds of bad rows are set aside." if found else "")


def print_report(report: Report, console: Console | None = None) -> None:
    """Print the summary."""
    console = console or Console(highlight=False, soft_wrap=True)
    console.print(Text(f"{report.source} ({report.format})", style="bold"))
    for section, numbers in report.numbers.items():
        line = ", ".join(f"{name.replace('_', ' ')} {shown(value)}" for name, value in numbers.items())
        console.print(Text(f"  {section}: {line}"))
    for finding in report.sorted_findings():
        console.print(
            Text.assemble("\n", (finding.level, STYLES[finding.level]), f"  {finding.text} {finding.advice}".rstrip())
        )
        for example in finding.examples[:3]:
            console.print(Text(f"    {example[:200]}", style="dim"))
    for title, histogram in report.histograms.items():
        if len(histogram) > 1:
            console.print(Text(f"\n{title}", style="bold"))
            console.print(_bars(histogram))
    if report.answers:
        console.print(Text("\nMost frequent answers", style="bold"))
        console.print(_bars(report.answers[:10]))
    console.print(Text(f"\n{verdict(report)}", style="bold red" if report.refused else "bold green"))


def write_report(report: Report, folder: Path) -> tuple[Path, Path]:
    """Write ``check.json`` and ``check.html`` into a folder, over those of an earlier check.

    Returns:
        The two files.

    Raises:
        OutputError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        as_json, as_page = folder / JSON_NAME, folder / PAGE_NAME
        as_json.write_text(json.dumps(report.to_dict(), ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        as_page.write_text(html_page(report), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{folder} cannot be written ({error.strerror}). Choose another --report_dir.") from error
    return as_json, as_page


def html_page(report: Report) -> str:
    """Return the report as one page that needs no other file."""
    reasons = items([f"{reason[:1].upper()}{reason[1:]}." for reason in report.refused]) if report.refused else ""
    said = f"Training would be refused.{reasons}" if report.refused else escape(verdict(report))
    numbers = (
        f'<div class="card"><h3>{escape(section)}</h3>'
        f"{table((name.replace('_', ' '), value) for name, value in found.items())}</div>"
        for section, found in report.numbers.items()
    )
    parts = [
        f"<h1>Check of {escape(report.source)}</h1>",
        f'<div class="verdict {"no" if report.refused else "ok"}">{said}</div>',
        tiles(_first_numbers(report)),
        "<h2>Findings</h2>",
        *(_finding(finding) for finding in report.sorted_findings()),
        "" if report.findings else "<p>None.</p>",
        '<h2>Histograms</h2><div class="grid">',
        *(_histogram(title, rows) for title, rows in report.histograms.items() if rows),
        _histogram("Most frequent answers", report.answers) if report.answers else "",
        '</div><h2>Numbers</h2><div class="grid">',
        *numbers,
        "</div>",
    ]
    return page(f"Check of {report.source}", "\n".join(parts))


def _first_numbers(report: Report) -> Iterator[tuple[str, object]]:
    images = report.numbers["images"]
    for side in ("training", "evaluation"):
        if side in report.numbers:
            yield f"{side} rows used", report.numbers[side]["used"]
    yield "images", images["images"]
    yield "images a second", images["images_per_second"]
    if "texts_per_image" in report.numbers.get("training", {}):
        yield "texts an image", report.numbers["training"]["texts_per_image"]
    if tokens := report.numbers.get("training tokens"):
        yield "training tokens", tokens["tokens"]
        yield "of them supervised", f"{tokens['supervised_share']:.1%}"
        yield "tokens of the longest row", tokens["longest"]


def _histogram(title: str, rows: Histogram) -> str:
    return f'<div class="card"><h3>{escape(title)}</h3>{bars(rows)}</div>'


def _finding(finding: Finding) -> str:
    figures = "".join(figure(ref, ref.filename or name) for name, ref in finding.images[:FIGURES])
    examples = items(finding.examples, finding.count - len(finding.examples) if not finding.images else 0)
    listed = f"<details><summary>examples</summary>{examples}</details>" if finding.examples else ""
    return (
        f'<div class="finding {finding.level}"><span class="level {finding.level}">{finding.level}</span>'
        f'{escape(finding.text)} <span class="advice">{escape(finding.advice)}</span>{listed}{figures}</div>'
    )


def _bars(histogram: Histogram, width: int = 40) -> Text:
    most = max(count for _, count in histogram) or 1
    label = max(len(name[:40]) for name, _ in histogram)
    lines = [f"  {name[:40].rjust(label)}  {'#' * round(width * count / most)} {count:,}" for name, count in histogram]
    return Text("\n".join(lines))

"""A check's report for people: a summary in the terminal, and one HTML page."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path

from rich.console import Console
from rich.text import Text

from vlmtune.errors import OutputError
from vlmtune.inspection.findings import Finding, Histogram, Report
from vlmtune.inspection.html import bars, figure, items, page, shown, table

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
        console.print(Text.assemble("\n", (finding.level, STYLES[finding.level]), f"  {finding.text} {finding.advice}"))
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
    parts = [
        f"<h1>Check of {escape(report.source)}</h1>",
        f'<p class="verdict {"no" if report.refused else "ok"}">{escape(verdict(report))}</p>',
        "<h2>Findings</h2>",
        *(_finding(finding) for finding in report.sorted_findings()),
        "" if report.findings else "<p>None.</p>",
        "<h2>Numbers</h2>",
        *(
            f"<h3>{escape(section)}</h3>" + table((name.replace("_", " "), value) for name, value in numbers.items())
            for section, numbers in report.numbers.items()
        ),
        '<h2>Histograms</h2><div class="grid">',
        *(f"<div><h3>{escape(title)}</h3>{bars(rows)}</div>" for title, rows in report.histograms.items() if rows),
        "</div>",
        f"<h2>Most frequent answers</h2>{bars(report.answers)}" if report.answers else "",
    ]
    return page(f"Check of {report.source}", "\n".join(parts))


def _finding(finding: Finding) -> str:
    figures = "".join(figure(ref, ref.filename or ref.name) for ref in finding.images[:FIGURES])
    examples = items(finding.examples, finding.count - len(finding.examples) if not finding.images else 0)
    listed = f"<details><summary>examples</summary>{examples}</details>" if finding.examples else ""
    return (
        f'<div class="finding"><span class="level {finding.level}">{finding.level}</span> '
        f"{escape(finding.text)} {escape(finding.advice)}{listed}{figures}</div>"
    )


def _bars(histogram: Histogram, width: int = 40) -> Text:
    most = max(count for _, count in histogram) or 1
    label = max(len(name[:40]) for name, _ in histogram)
    lines = [f"  {name[:40].rjust(label)}  {'#' * round(width * count / most)} {count:,}" for name, count in histogram]
    return Text("\n".join(lines))

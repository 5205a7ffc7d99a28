"""The page: records in, one HTML file out that opens offline."""

from __future__ import annotations

import base64
import datetime
import hashlib
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vlmtune.errors import MissingDependencyError, OutputError
from vlmtune.evaluation.honesty import verdicts
from vlmtune.evaluation.metrics import get_metric
from vlmtune.evaluation.runner import SCORES
from vlmtune.report.analysis import (
    GROUPS,
    Analysis,
    Row,
    analyse,
    choose_samples,
    confusion,
    flips,
    score_rows,
    type_rows,
)
from vlmtune.report.charts import Dot, Line, Scale, interval_chart, line_chart
from vlmtune.report.data import EvaluationRecord, Records, RunRecord, read_json, recipe_differences
from vlmtune.report.pictures import Drawn, boxes_of, thumbnails

GENERATOR = "vlmtune report"
MOST_REFERENCES = 5
# (title, entries of log.jsonl with their names on the chart, scale)
CURVES: tuple[tuple[str, dict[str, str], Scale], ...] = (
    ("Loss", {"loss": "training", "eval_loss": "evaluation"}, "plain"),
    ("Learning rate", {"learning_rate": "learning rate"}, "from zero"),
    ("Gradient norm", {"grad_norm": "gradient norm"}, "log"),
    ("Samples and images per second", {"samples_per_second": "samples", "images_per_second": "images"}, "from zero"),
    ("Supervised tokens per second", {"supervised_tokens_per_second": "tokens"}, "from zero"),
    ("Share of time waiting for data", {"data_wait_share": "data wait"}, "share"),
    ("Peak memory so far, GiB", {"peak_memory_gib": "memory"}, "from zero"),
)
_RUNTIME = ("runtime", "per_second", "loss", "epoch", "seconds")


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
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(path)
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
    content: dict[str, Any] = {"analysis": None, "honesty": None, "cards": [], "notes": []}
    if evaluations:
        content |= _evaluation_part(evaluations)
    curves = [(run.label, _curves(run)) for run in records.runs]
    return str(
        template.render(
            title=title,
            generator=f"{GENERATOR} {version('vlmtune')}",
            style=Markup(style),
            script=Markup(script),
            script_hash=Markup(digest),
            made=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
            runs=[_facts(run) for run in records.runs],
            curves=[(label, [Markup(svg) for svg in charts]) for label, charts in curves if charts],
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
        "cards": _cards(analysis),
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
                    "n": entry["samples"],
                }
            )
    return {
        "rows": rows,
        "skipped": skipped,
        "verdicts": verdicts(honesty),
        "ended": f"{honesty['ended_by_terminator']:.1%}".replace("%", " %"),
    }


def _cards(analysis: Analysis) -> list[dict[str, Any]]:
    chosen = choose_samples(analysis)
    last, scores = analysis.answers[-1], analysis.scores[analysis.primary]
    binary = all(set(one.per_sample[one.scored].tolist()) <= {0.0, 1.0} for one in scores)
    wanted: dict[int, Drawn] = {}
    for index in chosen:
        texts = [last[index].references[0], *(answers[index].answer for answers in analysis.answers)]
        if last[index].images:
            wanted[index] = (last[index].images[0], boxes_of(texts))
    pictures = thumbnails(wanted.values())
    cards = []
    for index, groups in chosen.items():
        sample = last[index]
        said = []
        for label, answers, one in zip(analysis.labels, analysis.answers, scores, strict=True):
            value = float(one.per_sample[index])
            mark = "" if math.isnan(value) else ("right" if value else "wrong") if binary else f"{value:.2f}"
            said.append({"label": label, "text": answers[index].answer, "mark": mark})
        more = len(sample.references) - MOST_REFERENCES
        cards.append(
            {
                "id": sample.id,
                "groups": groups,
                "picture": pictures.get(wanted[index]) if sample.images else None,
                "image": Path(sample.images[0]).name if sample.images else "",
                "more_images": max(0, len(sample.images) - 1),
                "prompt": sample.prompt,
                "references": list(dict.fromkeys(sample.references))[:MOST_REFERENCES],
                "more": max(0, more) if len(set(sample.references)) > MOST_REFERENCES else 0,
                "answers": said,
            }
        )
    return cards


def _flip_counts(analysis: Analysis) -> dict[str, int]:
    found = flips(analysis)
    return {
        "better": sum(flip.change > 0 for flip in found),
        "worse": sum(flip.change < 0 for flip in found),
        "same": len(analysis.answers[-1]) - len(found),
    }


def _curves(run: RunRecord) -> list[str]:
    charts: list[str] = []
    known = {key for _, keys, _ in CURVES for key in keys}
    generated = {
        key: key.removeprefix("eval_")
        for entry in run.log
        for key in entry
        if key.startswith("eval_") and key not in known and not key.endswith(_RUNTIME)
    }
    for title, keys, scale in (*CURVES, ("Scores during training", generated, "plain")):
        lines = []
        for key, name in keys.items():
            points = [
                (entry["step"], entry[key]) for entry in run.log if _is_number(entry.get(key)) and "step" in entry
            ]
            if points:
                lines.append(Line(name, points))
        if lines:
            charts.append(line_chart(title, lines, scale=scale))
    return charts


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _facts(run: RunRecord) -> dict[str, Any]:
    record = run.record
    arguments = {name: group for name, group in record.get("arguments", {}).items() if isinstance(group, Mapping)}
    options = {key: value for group in arguments.values() for key, value in group.items()}
    model, data, metrics = (record.get(name) or {} for name in ("model", "data", "metrics"))
    train = data.get("train") or {}
    hardware = record.get("hardware") or {}
    machine = [*(hardware.get("gpus") or []), f"{hardware.get('processor', '?')}, {hardware.get('cores', '?')} cores"]
    if "memory_gib" in hardware:
        machine.append(f"{hardware['memory_gib']} GiB memory")
    seconds = metrics.get("training_seconds")
    facts = {
        "Model": model.get("name") or options.get("model_name_or_path"),
        "Family": model.get("family"),
        "Method": _method(options) if options else None,
        "Data": options.get("dataset_path"),
        "Training samples": _thousands(train.get("samples")),
        "Left out": _thousands(train.get("left_out")),
        "Supervised tokens": _thousands(train.get("supervised_tokens")),
        "Epochs": options.get("num_train_epochs"),
        "Batch size": options.get("per_device_train_batch_size"),
        "Learning rate": options.get("learning_rate"),
        "Training time": f"{seconds:,.0f} s" if _is_number(seconds) else None,
        "Final training loss": f"{metrics['train_loss']:.4f}" if _is_number(metrics.get("train_loss")) else None,
        "Hardware": "; ".join(machine) if hardware else None,
        "Status": record.get("status"),
        "Date": record.get("updated"),
    }
    return {
        "label": run.label,
        "folder": str(run.folder),
        "facts": {name: value for name, value in facts.items() if value not in (None, "")},
        "arguments": {name: {k: _text(v) for k, v in group.items()} for name, group in arguments.items()},
        "versions": record.get("versions") or {},
    }


def _method(options: Mapping[str, Any]) -> str:
    if not options.get("use_lora", True):
        return f"full fine-tuning of {_text(options.get('train_parts'))}"
    bits = next((f" on {b} bits" for b, key in ((4, "use_4bit"), (8, "use_8bit")) if options.get(key)), "")
    return f"LoRA, rank {options.get('lora_r')}, on {_text(options.get('lora_scopes'))}{bits}"


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _thousands(value: Any) -> str | None:
    return f"{value:,}" if isinstance(value, int) else None


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

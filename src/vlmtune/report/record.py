"""What was trained and how it was evaluated: facts, options and curves from the folders' records."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from vlmtune.evaluation.metrics import METRICS
from vlmtune.report.charts import Line, Scale, line_chart
from vlmtune.report.data import EvaluationRecord, RunRecord

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
# Of an evaluation, but no scores.
_NO_SCORES = ("runtime", "per_second", "loss", "epoch", "seconds", "answers")


def curves(run: RunRecord) -> list[str]:
    """Return the run's charts as SVG; those without any value are left out."""
    shares: dict[str, str] = {}
    others = []
    for key in dict.fromkeys(key for entry in run.log for key in entry):
        name = key.removeprefix("eval_")
        if key == name or key.endswith(_NO_SCORES):
            continue
        if name in METRICS and METRICS[name].percent:
            shares[key] = name
        else:
            others.append((f"{name} during training", {key: name}, "plain"))
    charts = []
    for title, keys, scale in (*CURVES, ("Scores during training", shares, "percent"), *others):
        lines = [Line(name, points) for key, name in keys.items() if (points := _points(run.log, key))]
        if lines:
            charts.append(line_chart(title, lines, scale=scale))  # type: ignore[arg-type]
    return charts


def _points(log: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(entry["step"], entry[key]) for entry in log if _is_number(entry.get(key)) and "step" in entry]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def facts(run: RunRecord) -> dict[str, Any]:
    """Return what was trained: the facts a reader asks for first, every option, and the versions."""
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
    found = {
        "Model": model.get("name") or options.get("model_name_or_path"),
        "Family": model.get("family"),
        "Method": _method(options) if options else None,
        "Trainable parameters": _trainable((model.get("parameters") or {}).get("all") or {}),
        "Data": options.get("dataset_path"),
        "Training samples": _thousands(train.get("samples")),
        "Training shards": _thousands(train.get("shards")),
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
        "facts": {name: value for name, value in found.items() if value not in (None, "")},
        "arguments": {name: {k: _text(v) for k, v in group.items()} for name, group in arguments.items()},
        "versions": record.get("versions") or {},
    }


def _method(options: Mapping[str, Any]) -> str:
    if not options.get("use_lora", True):
        return f"full fine-tuning of {_text(options.get('train_parts'))}"
    bits = next((f" on {b} bits" for b, key in ((4, "use_4bit"), (8, "use_8bit")) if options.get(key)), "")
    full = f", and {_text(options['train_parts'])} in full" if options.get("train_parts") else ""
    return f"LoRA, rank {options.get('lora_r')}, on {_text(options.get('lora_scopes'))}{bits}{full}"


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _thousands(value: Any) -> str | None:
    return f"{value:,}" if isinstance(value, int) else None


def _trainable(count: Mapping[str, int]) -> str | None:
    if not count.get("total"):
        return None
    share = f"{count['trainable'] / count['total']:.2%}".replace("%", " %")
    return f"{count['trainable']:,} of {count['total']:,} ({share})"


def evaluated(evaluation: EvaluationRecord) -> dict[str, Any]:
    """Return how an evaluation was made: the model, the data, the generation, and the time it took."""
    predictions, generation = evaluation.predictions, evaluation.settings.get("generation") or {}
    seconds = sum(one.seconds for one in predictions)
    found = {
        "Model": evaluation.scores.get("model") or evaluation.settings.get("model"),
        "Weights": evaluation.settings.get("weights"),
        "Data": evaluation.scores.get("source"),
        "Data fingerprint": evaluation.settings.get("data"),
        "Samples": f"{len(predictions):,}",
        "Answers": _decoding(generation.get("temperature")),
        "Most new tokens": generation.get("max_new_tokens"),
        "Answering took": f"{seconds:,.1f} s, {seconds / len(predictions) * 1000:,.1f} ms an answer"
        if seconds
        else None,
    }
    return {
        "label": evaluation.label,
        "facts": {name: value for name, value in found.items() if value not in (None, "")},
    }


def _decoding(temperature: float | None) -> str | None:
    if temperature is None:
        return None
    return f"drawn at temperature {temperature:g}" if temperature else "the likeliest token each time"

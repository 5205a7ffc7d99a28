"""Score a model on a data set: generate answers, keep every one, and compute metrics with intervals.

An evaluation folder holds ``predictions.jsonl`` (a line per sample, written as answers come, so that a killed
evaluation goes on where it was), ``settings.json`` (what the answers depend on) and ``scores.json``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import nn

from vlmtune.data.fingerprint import fingerprint
from vlmtune.data.sample import Sample
from vlmtune.errors import EvaluationError, OutputError
from vlmtune.evaluation.answering import Answerer, Prediction
from vlmtune.evaluation.generation import AnswerGenerator
from vlmtune.evaluation.metrics import Scores, get_metric
from vlmtune.evaluation.metrics.bootstrap import interval
from vlmtune.evaluation.metrics.robust import robust_scores
from vlmtune.evaluation.predictions_file import PREDICTIONS, read_lines, to_line
from vlmtune.evaluation.ranks import by_first, count, is_first, shared_out
from vlmtune.files import UNFINISHED, write_whole

logger = logging.getLogger("vlmtune.evaluation")
SETTINGS, SCORES = "settings.json", "scores.json"
SHOWN = 10
# Called with (answers done, answers in all).
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Evaluation:
    """A scored set of answers.

    Attributes:
        predictions: in the data set's order.
        scores: metric -> its values.
        table: metric -> ``value``, ``low``, ``high`` (95 % interval), ``n``; what ``scores.json`` holds.
        unanswered: sample -> why it could not be asked.
        failed: metric -> why it can score none of them.
    """

    predictions: list[Prediction]
    scores: dict[str, Scores]
    table: dict[str, dict[str, Any]]
    unanswered: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def evaluate(
    generator: AnswerGenerator,
    dataset: datasets.Dataset,
    metrics: Sequence[str],
    output_dir: str | Path,
    *,
    name: str,
    progress: Progress | None = None,
    merge_equal: bool = True,
    choose_by: str = "likelihood",
    source: str = "",
) -> Evaluation:
    """Answer every sample and score the answers; of several processes each answers its part.

    Args:
        generator: of the model to score.
        dataset: rows with references; rows that differ only in their own answer are one sample.
        metrics: names of metrics.
        output_dir: folder of this evaluation; an unfinished one with the same settings is continued.
        name: the model's, for the record.
        progress: called after each block of answers.
        merge_equal: rows that ask the same and share their references are one sample.
        choose_by: ``likelihood`` or ``text``, where a question has lettered options.
        source: where the data lies, for the record.

    Raises:
        OutputError: the folder holds another evaluation.
        EvaluationError: there is nothing to score, or a metric cannot score it.
    """
    reads = [get_metric(metric).reads for metric in metrics]
    samples = scored_samples(dataset, merge_equal=merge_equal)
    if not samples:
        raise EvaluationError("There are no samples with references to score against.")
    folder = Path(output_dir)
    settings = {
        "model": name,
        "weights": weights_fingerprint(generator.model),
        "data": fingerprint(dataset),
        "generation": {
            field.name: getattr(generator.options, field.name)
            for field in dataclasses.fields(generator.options)
            if field.name in ("max_new_tokens", "temperature", "top_p")
        }
        | {"seed": generator.seed, "choose_by": choose_by, "reference_loss": "reference_loss" in reads},
    }
    done = by_first(lambda: _open_folder(folder, settings))
    pending = [sample for sample in samples if sample.id not in done]
    answerer = Answerer(generator, choose_by=choose_by, reads=reads)
    unanswered: dict[str, str] = {}
    with (folder / PREDICTIONS).open("a", encoding="utf-8") if is_first() else nullcontext() as file:
        for block in _blocks(pending, 8 * generator.options.eval_batch_size * count()):
            for found in shared_out(block, answerer.except_bad):
                if isinstance(found, tuple):
                    unanswered[found[0]] = found[1]
                    continue
                done[found.id] = found
                if file:
                    file.write(to_line(found))
            if file:
                file.flush()
            if progress and is_first():
                progress(len(done) + len(unanswered), len(samples))
    if unanswered:
        listed = "\n".join(f"  {name}: {reason}" for name, reason in list(unanswered.items())[:SHOWN])
        counts = len(unanswered), len(samples)
        logger.warning("%d of %d samples cannot be asked and are not scored:\n%s", *counts, listed)
    answered = [done[sample.id] for sample in samples if sample.id in done]
    if not answered:
        raise EvaluationError("None of the samples can be asked.")
    scored = dataclasses.replace(score(answered, metrics), unanswered=unanswered)
    record = {
        "model": name,
        **({"source": source} if source else {}),
        "samples": len(answered),
        "metrics": scored.table,
        "ended_by_terminator": ended_share(answered),
        "answer_seconds": round(sum(p.seconds for p in answered), 3),
        **({"unanswered": unanswered} if unanswered else {}),
        **({"failed": scored.failed} if scored.failed else {}),
    }
    by_first(lambda: write_whole(folder / SCORES, json.dumps(record, indent=2) + "\n"))
    return scored


def keep(folder: Path, found: Evaluation, source: str) -> None:
    """Write the scores of answers from elsewhere as an evaluation of their own, for reports and comparisons.

    Raises:
        OutputError: the folder holds another evaluation.
    """
    lines = "".join(map(to_line, found.predictions))
    _open_folder(folder, {"model": source, "data": hashlib.sha256(lines.encode()).hexdigest()[:16]})
    write_whole(folder / PREDICTIONS, lines)
    record = {"model": source, "samples": len(found.predictions), "metrics": found.table}
    record["ended_by_terminator"] = ended_share(found.predictions)
    write_whole(folder / SCORES, json.dumps(record, indent=2) + "\n")


def ended_share(predictions: Sequence[Prediction]) -> float:
    """Return the share of the generated answers that the model ended by itself; 1 where none was generated."""
    generated = [prediction.ended for prediction in predictions if not prediction.options]
    return sum(generated) / len(generated) if generated else 1.0


def score(predictions: list[Prediction], metrics: Sequence[str]) -> Evaluation:
    """Score answers that exist already.

    A sample that a metric fails on is left out of that metric, named in its notes; a metric that can score none is
    named in a warning, and the others keep their scores.

    Raises:
        EvaluationError: there are none, some have no references, or no metric can score them.
    """
    if not predictions:
        raise EvaluationError("There are no predictions to score.")
    bare = [prediction.id for prediction in predictions if not prediction.references]
    if bare:
        raise EvaluationError(
            f"{len(bare)} of {len(predictions)} predictions have no references to score against, such as {bare[0]!r}. "
            "Add them, or take those lines out."
        )
    answers = [prediction.answer for prediction in predictions]
    references = [prediction.references for prediction in predictions]
    scores: dict[str, Scores] = {}
    table: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    for name in metrics:
        metric = get_metric(name)
        try:
            read = [getattr(prediction, metric.reads) for prediction in predictions] if metric.reads else None
            found = robust_scores(metric, answers, references, [prediction.id for prediction in predictions], read)
        except ValueError as error:
            failed[name] = f"{name} cannot score these answers: {error}."
            continue
        low, high = interval(found)
        scores[name] = found
        table[name] = {
            "value": found.value,
            "low": low,
            "high": high,
            "n": int(found.scored.sum()),
            "percent": metric.percent,
        }
        if found.notes:
            table[name]["notes"] = list(found.notes)
    if failed and not table:
        raise EvaluationError("\n".join(failed.values()))
    for said in failed.values():
        logger.warning("%s", said)
    return Evaluation(predictions, scores, table, failed=failed)


def format_table(table: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the scores as aligned lines for people: value and 95 % interval."""
    width = max(len(name) for name in table)
    lines = []
    for name, entry in table.items():
        factor, unit = (100, " %") if entry["percent"] else (1, "")
        value, low, high = (entry[key] * factor for key in ("value", "low", "high"))
        lines.append(
            f"{name.ljust(width)}  {value:6.2f}{unit}  (95 % interval {low:.2f} to {high:.2f}, n={entry['n']:,})"
        )
        lines += [f"{' ' * width}  note: {note}" for note in entry.get("notes", ())]
    return "\n".join(lines)


def scored_samples(rows: Iterable[Mapping[str, Any]], *, merge_equal: bool = True) -> list[Sample]:
    """Return the samples of the rows that have references.

    Args:
        rows: of a data set.
        merge_equal: keep one of those that ask the same about the same images and share their references.
    """
    kept: dict[Any, Sample] = {}
    for sample in map(Sample.from_row, rows):
        if sample.references:
            key = (sample.images, sample.prompt, sample.references) if merge_equal else sample.id
            kept.setdefault(key, sample)
    return list(kept.values())


def _blocks(samples: list[Sample], size: int) -> Iterator[list[Sample]]:
    for start in range(0, len(samples), size):
        yield samples[start : start + size]


def _open_folder(folder: Path, settings: dict[str, Any]) -> dict[str, Prediction]:
    """Make the folder, or return the answers that an earlier evaluation with the same settings left there."""
    file, predictions = folder / SETTINGS, folder / PREDICTIONS
    # A file half written is what a killed evaluation may leave.
    used = folder.is_dir() and any(path.suffix != UNFINISHED for path in folder.iterdir())
    earlier = _settings(file)
    if used and earlier != settings:
        changed = [name for name in settings if earlier and earlier.get(name) != settings[name]]
        what = f"an evaluation with another {' and '.join(changed)}" if changed else "other files"
        raise OutputError(
            f"The folder {folder} already holds {what}, and nothing in it will be overwritten. "
            "Choose another evaluation_dir."
        )
    folder.mkdir(parents=True, exist_ok=True)
    if not used:
        write_whole(file, json.dumps(settings, indent=2) + "\n")
    if not predictions.exists():
        return {}
    done = read_lines(predictions, last_may_be_cut=True)
    write_whole(predictions, "".join(map(to_line, done.values())))
    return done


def _settings(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def weights_fingerprint(model: nn.Module) -> str:
    """Hash a few values of every weight: another adapter, base, number format or quantisation has another."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        values = parameter.detach().reshape(-1)
        # In integers: float32 passes the end of a large tensor.
        steps = max(min(len(values), 16) - 1, 1)
        rows = torch.arange(steps + 1, device=values.device) * (len(values) - 1) // steps
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(values[rows].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]

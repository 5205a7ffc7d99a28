"""What lies in a run's or an evaluation's folder, read for the page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlmtune.errors import EvaluationError
from vlmtune.evaluation.answering import Prediction
from vlmtune.evaluation.predictions_file import PREDICTIONS, read_predictions
from vlmtune.evaluation.runner import SCORES, SETTINGS

RUN, LOG = "run.json", "log.jsonl"
# Differ between any two runs and say nothing about them.
_OWN = frozenset({"output_dir", "logging_dir", "run_name", "cache_dir", "resume_from_checkpoint", "disable_tqdm"})


@dataclass(frozen=True)
class RunRecord:
    """A training run.

    Attributes:
        folder: where it lies.
        label: its short name on the page.
        record: ``run.json``.
        log: the lines of ``log.jsonl``; lines that are damaged are left out.
    """

    folder: Path
    label: str
    record: dict[str, Any]
    log: list[dict[str, Any]]


@dataclass(frozen=True)
class EvaluationRecord:
    """An evaluation.

    Attributes:
        folder: where it lies.
        label: its short name on the page.
        scores: ``scores.json``, empty where it is missing.
        settings: ``settings.json``, empty where it is missing.
        predictions: its answers.
        run: the training run whose model was scored, where its record is found.
    """

    folder: Path
    label: str
    scores: dict[str, Any]
    settings: dict[str, Any]
    predictions: list[Prediction]
    run: RunRecord | None = None


@dataclass(frozen=True)
class Records:
    """Runs and evaluations, in the order they were named; the first evaluation is what others are compared with."""

    runs: list[RunRecord]
    evaluations: list[EvaluationRecord]


def read_records(places: Sequence[str | Path]) -> Records:
    """Read runs and evaluations from their folders.

    Args:
        places: folders of runs, of evaluations, or holding such folders, as ``vlmtune demo`` leaves.

    Raises:
        EvaluationError: a folder holds neither, or a file in it is damaged.
    """
    runs: list[RunRecord] = []
    evaluations: list[EvaluationRecord] = []
    for place in map(folder_of, places):
        folders = [place] if _holds(place) else _children(place)
        if not folders:
            raise EvaluationError(
                f"{place} holds neither a run ({RUN}) nor an evaluation ({PREDICTIONS}). Name a run's output_dir or an "
                "evaluation_dir."
            )
        for folder in folders:
            if (folder / RUN).exists():
                runs.append(_run(folder))
            for part in (folder, folder / "evaluation"):
                if (part / PREDICTIONS).exists():
                    evaluations.append(_evaluation(part))
    if len(evaluations) == 1 and (evaluations[0].folder / "base" / PREDICTIONS).exists():
        evaluations.insert(0, _evaluation(evaluations[0].folder / "base"))
    for evaluation in evaluations:
        run = evaluation.run
        if run is not None and all(run.folder.resolve() != other.folder.resolve() for other in runs):
            runs.append(run)
    labels = _labels([*(run.folder for run in runs), *(one.folder for one in evaluations)])
    runs = [replace(run, label=labels[run.folder]) for run in runs]
    evaluations = [replace(one, label=labels[one.folder]) for one in evaluations]
    return Records(runs, evaluations)


def require_evaluations(records: Records, places: Sequence[str | Path]) -> None:
    """Refuse runs without answers to compare.

    Raises:
        EvaluationError: a place has no evaluation; the message names it.
    """
    for place in map(folder_of, places):
        inside = [one for one in records.evaluations if one.folder.resolve().is_relative_to(place.resolve())]
        if not inside:
            raise EvaluationError(
                f"{place} holds no evaluation to compare. Make one by: vlmtune evaluate RECIPE --adapter {place}."
            )


def folder_of(place: str | Path) -> Path:
    """Return the folder meant by a folder or by a file of a run or evaluation in it."""
    path = Path(place).expanduser()
    return path.parent if path.name in (PREDICTIONS, RUN, SCORES) else path


def _holds(folder: Path) -> bool:
    return any((folder / name).exists() for name in (RUN, PREDICTIONS)) or (folder / "evaluation").is_dir()


def _children(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    found = [child for child in sorted(folder.iterdir()) if child.is_dir() and _holds(child)]
    return sorted(found, key=lambda child: child.name != "base")


def _run(folder: Path) -> RunRecord:
    log = []
    if (folder / LOG).exists():
        for line in (folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # a run that was killed may leave half a line
            if isinstance(entry, dict):
                log.append(entry)
    return RunRecord(folder, folder.name, read_json(folder / RUN), log)


def _evaluation(folder: Path) -> EvaluationRecord:
    settings = read_json(folder / SETTINGS)
    model = Path(str(settings.get("model", "")))
    candidates = [folder.parent] if folder.name == "evaluation" else []
    run = next((_run(place) for place in (*candidates, model) if (place / RUN).is_file()), None)
    scores = read_json(folder / SCORES)
    return EvaluationRecord(folder, folder.name, scores, settings, read_predictions(folder), run)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, empty where there is no file.

    Raises:
        EvaluationError: it cannot be read.
    """
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{path} cannot be read ({error}). Delete it or write it again.") from error
    if not isinstance(found, dict):
        raise EvaluationError(f"{path} is not a JSON object. Delete it or write it again.")
    return found


def _labels(folders: Sequence[Path]) -> dict[Path, str]:
    """Return the shortest names that tell the folders apart; ``evaluation`` goes by its run's folder."""
    parts = {
        folder: (folder.resolve().parent if folder.name == "evaluation" else folder.resolve()).parts
        for folder in folders
    }
    # A run and its own evaluation may have one name.
    distinct = set(parts.values())
    labels = {}
    for folder, names in parts.items():
        length = 1
        while length < len(names) and sum(other[-length:] == names[-length:] for other in distinct) > 1:
            length += 1
        labels[folder] = "/".join(names[-length:])
    return labels


def recipe_differences(evaluations: Sequence[EvaluationRecord | RunRecord]) -> list[tuple[str, list[str]]]:
    """Return the options, data, versions and hardware in which the runs differ, with each run's value.

    A model that was not trained here has no recipe; it is passed over, but for how it was evaluated.
    """
    flat = [_flat(_recipe(one)) for one in evaluations]
    trained = [isinstance(one, RunRecord) or one.run is not None for one in evaluations]
    rows = []
    for name in dict.fromkeys(name for one in flat for name in one):
        values = [one.get(name, "-") for one in flat]
        told = [value for value, has in zip(values, trained, strict=True) if has or name.startswith("evaluation ")]
        if len(set(told)) > 1:
            rows.append((name, values))
    return rows


def _recipe(one: EvaluationRecord | RunRecord) -> dict[str, Any]:
    recipe: dict[str, Any] = {}
    run = one if isinstance(one, RunRecord) else one.run
    if isinstance(one, EvaluationRecord):
        recipe |= {f"evaluation {name}": value for name, value in one.settings.items() if name != "weights"}
    if run is not None:
        for group, options in run.record.get("arguments", {}).items():
            # An option of the same name may stand in two groups, with one value.
            recipe |= options if isinstance(options, Mapping) else {group: options}
        recipe |= {name: run.record[name] for name in ("data", "versions", "hardware") if name in run.record}
    return recipe


def _flat(value: Any, name: str = "") -> dict[str, str]:
    if isinstance(value, Mapping):
        found: dict[str, str] = {}
        for key, item in value.items():
            if key not in _OWN:
                found |= _flat(item, f"{name} {key}".strip())
        return found
    if isinstance(value, list):
        return {name: ", ".join(map(str, value))}
    return {name: str(value)}

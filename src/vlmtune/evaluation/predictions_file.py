"""Predictions as JSON lines: what evaluations write, and files of other programs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from vlmtune.errors import EvaluationError
from vlmtune.evaluation.answering import Prediction

PREDICTIONS = "predictions.jsonl"
_FIELDS = frozenset(field.name for field in dataclasses.fields(Prediction))
_LISTS = ("images", "references", "reference_loss")


def to_line(prediction: Prediction) -> str:
    """Return a prediction as a line of JSON; what is not said has its default."""
    unsaid = {"meta": {}, "options": {}, "reference_loss": (0.0, 0), "said": ""}
    row = {name: value for name, value in dataclasses.asdict(prediction).items() if unsaid.get(name) != value}
    return json.dumps(row, ensure_ascii=False) + "\n"


def read_predictions(path: str | Path) -> list[Prediction]:
    """Read a predictions file, or that of an evaluation folder.

    A line needs ``answer`` and ``references`` (a list, or one text). ``id`` is the line's number where it is missing,
    and what is not known is kept in ``meta``.

    Raises:
        EvaluationError: there is none, it is empty, a line is not a prediction, or an id stands twice.
    """
    place = Path(path)
    file = place / PREDICTIONS if place.is_dir() else place
    if not file.exists():
        raise EvaluationError(f"There are no predictions at {place}. Name an evaluation's folder or its {PREDICTIONS}.")
    found = list(read_lines(file, last_may_be_cut=False).values())
    if not found:
        raise EvaluationError(
            f"{file} is empty. Write a line of JSON a sample, with its answer and references; an evaluation that was "
            "stopped goes on by its command."
        )
    return found


def read_lines(file: Path, *, last_may_be_cut: bool) -> dict[str, Prediction]:
    """Return id -> prediction of a file that there is, in its order.

    Args:
        file: to read.
        last_may_be_cut: pass over a damaged last line, as a killed evaluation leaves it.
    """
    found: dict[str, Prediction] = {}
    # Bytes: a cut may lie inside a character, and answers may hold what `str.splitlines` takes for a line's end.
    lines = file.read_bytes().removesuffix(b"\n").split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prediction = _prediction(json.loads(line), str(number))
        except (ValueError, TypeError) as error:
            if last_may_be_cut and number == len(lines):
                break
            raise EvaluationError(f"{file}, line {number}, is not a prediction ({error}). Mend that line.") from error
        if prediction.id in found:
            raise EvaluationError(f"{file}, line {number}, has the id {prediction.id!r} of another line. Rename one.")
        found[prediction.id] = prediction
    return found


def _prediction(row: Any, name: str) -> Prediction:
    if not isinstance(row, dict):
        raise TypeError("it is no object")
    if missing := [key for key in ("answer", "references") if key not in row]:
        raise TypeError(f"it has no {' and no '.join(missing)}")
    if isinstance(row["references"], str):
        row["references"] = [row["references"]]
    if not isinstance(row["answer"], str) or not _texts(row["references"]):
        raise TypeError("answer must be a text, and references a list of texts")
    if not _texts(row.get("images", [])) or not isinstance(row.get("meta", {}), dict):
        raise TypeError("images must be a list of names, and meta an object")
    known = {key: tuple(value) if key in _LISTS else value for key, value in row.items() if key in _FIELDS}
    other = {key: value for key, value in row.items() if key not in _FIELDS}
    known |= {"id": str(row.get("id", name)), "prompt": str(row.get("prompt", row.get("question", "")))}
    return Prediction(**{"images": ()} | known | {"meta": other | row.get("meta", {})})


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)

"""What several evaluations of the same samples say: scores, differences, types of question, confusion, flips."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vlmtune.data.sample import TYPE_FIELDS
from vlmtune.errors import ConfigError, EvaluationError
from vlmtune.evaluation.answering import Prediction
from vlmtune.evaluation.compare import compare
from vlmtune.evaluation.metrics import METRICS, Scores, get_metric
from vlmtune.evaluation.metrics.base import Array
from vlmtune.evaluation.metrics.bootstrap import interval, paired_difference
from vlmtune.evaluation.metrics.exact_match import normalize
from vlmtune.evaluation.runner import score
from vlmtune.report.data import EvaluationRecord

FEWEST_OF_A_TYPE = 5
MOST_TYPES = 15
MOST_LABELS = 12
OTHER = "(other)"
GROUPS = {
    "improved": "most improved",
    "worsened": "got worse",
    "wrong": "lowest score",
    "changed": "changed",
    "random": "random",
}


@dataclass(frozen=True)
class Value:
    """A score of one evaluation, with its interval and the difference to the first evaluation."""

    label: str
    value: float
    low: float
    high: float
    difference: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class Row:
    """One metric, or one type of question, of every evaluation."""

    name: str
    metric: str
    n: int
    percent: bool
    values: list[Value]


@dataclass(frozen=True)
class Confusion:
    """How often each reference (rows) got each answer (columns)."""

    label: str
    names: list[str]
    columns: list[str]
    counts: list[list[int]]


@dataclass(frozen=True)
class Flip:
    """A sample whose score differs between the first and the last evaluation."""

    index: int
    change: float


@dataclass(frozen=True)
class Analysis:
    """Evaluations on the samples that all of them answered.

    Attributes:
        labels: of the evaluations.
        answers: each evaluation's predictions, in one order.
        scores: metric -> each evaluation's scores.
        percent: metric -> whether it is shown in percent.
        notes: what a reader must know, such as samples left out.
    """

    labels: list[str]
    answers: list[list[Prediction]]
    scores: dict[str, list[Scores]]
    percent: dict[str, bool]
    notes: list[str] = field(default_factory=list)

    @property
    def primary(self) -> str:
        """The metric that pictures and types are told apart by: the first."""
        return next(iter(self.scores))

    def gain(self) -> Array:
        """(n,) how much better the last evaluation scores than the first, by the first metric; NaN where unknown."""
        scores = self.scores[self.primary]
        sign = 1 if get_metric(self.primary).higher_is_better else -1
        return np.asarray(sign * (scores[-1].per_sample - scores[0].per_sample))


def analyse(evaluations: Sequence[EvaluationRecord], metrics: Sequence[str] | None = None) -> Analysis:
    """Score evaluations on the samples that all of them answered.

    Args:
        evaluations: at least one.
        metrics: names; by default those of the last evaluation's ``scores.json``, else ``exact_match``.

    Raises:
        EvaluationError: they have no sample in common or other references for one, or no metric can score them.
    """
    first = evaluations[0]
    for other in evaluations[1:]:
        try:
            compare(first.predictions, other.predictions, [])
        except EvaluationError as error:
            raise EvaluationError(f"{first.folder} and {other.folder} cannot be compared: {error}") from error
    common = set.intersection(*({one.id for one in evaluation.predictions} for evaluation in evaluations))
    if not common:
        raise EvaluationError("There is no sample that all of these evaluations answered. Compare fewer of them.")
    order = [one.id for one in evaluations[-1].predictions if one.id in common]
    answers = []
    for evaluation in evaluations:
        by_id = {one.id: one for one in evaluation.predictions}
        answers.append([by_id[name] for name in order])
    notes = []
    most = max(len(evaluation.predictions) for evaluation in evaluations)
    if len(order) < most:
        notes.append(f"{len(order):,} samples that all answered are compared, of {most:,}.")
    recorded = evaluations[-1].scores.get("metrics") or {}
    asked = list(metrics or [name for name in recorded if name in METRICS] or ["exact_match"])
    for name in recorded:
        if name not in METRICS:
            # A folder that came from elsewhere must not have functions called.
            values = ", ".join(f"{one.label} {_recorded(one, name)}" for one in evaluations)
            notes.append(f"{name}, a function of your own, is not computed here. Recorded: {values}.")
    scores: dict[str, list[Scores]] = {}
    percent: dict[str, bool] = {}
    said: dict[str, dict[str, list[str]]] = {}
    for name in asked:
        try:
            found = [score(one, [name]) for one in answers]
        except (ConfigError, EvaluationError) as error:
            notes.append(str(error))
            continue
        scores[name] = [one.scores[name] for one in found]
        percent[name] = get_metric(name).percent
        for label, one in zip((e.label for e in evaluations), found, strict=True):
            for note in one.scores[name].notes:
                said.setdefault(note, {}).setdefault(label, []).append(name)
    for note, of in said.items():
        where = "; ".join(f"{label}: {', '.join(names)}" for label, names in of.items())
        notes.append(f"{note} ({where})")
    if not scores:
        raise EvaluationError(" ".join(notes))
    return Analysis([one.label for one in evaluations], answers, scores, percent, notes)


def _recorded(evaluation: EvaluationRecord, metric: str) -> str:
    entry = (evaluation.scores.get("metrics") or {}).get(metric) or {}
    value = entry.get("value")
    return f"{value:.4g}" if isinstance(value, int | float) else "nothing"


def score_rows(analysis: Analysis) -> list[Row]:
    """Return a row per metric."""
    return [_row(name, analysis, name, None) for name in analysis.scores]


def type_rows(analysis: Analysis) -> tuple[str, list[Row]]:
    """Return what tells the samples apart, and a row per type, by the first metric; none where nothing does.

    Types come from the samples' ``meta``, else from their answers where those are few.
    """
    by, types = _types(analysis.answers[-1])
    counts = Counter(types)
    shown = [name for name, count in counts.most_common(MOST_TYPES) if count >= FEWEST_OF_A_TYPE]
    if len(shown) < 2:
        return "", []
    return by, [
        _row(name, analysis, analysis.primary, [i for i, one in enumerate(types) if one == name]) for name in shown
    ]


def confusion(analysis: Analysis, which: int) -> Confusion | None:
    """Return how often each short reference got each answer, or ``None`` where answers are not short and few."""
    predictions = analysis.answers[which]
    wanted = [_label(one) for one in predictions]
    counts = Counter(wanted)
    names = [name for name, _ in counts.most_common(MOST_LABELS)]
    if len(counts) < 2 or sum(counts[name] for name in names) < 0.6 * len(wanted):
        return None
    if sum(len(name.split()) <= 3 for name in wanted) < 0.9 * len(wanted):
        return None
    columns = [*names, OTHER]
    table = [[0] * len(columns) for _ in names]
    for reference, prediction in zip(wanted, predictions, strict=True):
        if reference in counts and reference in names:
            said = normalize(prediction.answer)
            table[names.index(reference)][columns.index(said) if said in names else -1] += 1
    return Confusion(analysis.labels[which], names, columns, table)


def flips(analysis: Analysis) -> list[Flip]:
    """Return the samples that score differently in the first and the last evaluation, greatest change first."""
    gain = analysis.gain()
    found = [Flip(int(i), float(gain[i])) for i in np.flatnonzero(np.nan_to_num(gain) != 0)]
    return sorted(found, key=lambda flip: (-abs(flip.change), flip.index))


def choose_samples(analysis: Analysis, per_group: int = 40, seed: int = 0) -> dict[int, list[str]]:
    """Return the samples for the gallery, index -> its groups (see ``GROUPS``); ties are drawn by the seed."""
    rng = random.Random(seed)
    n = len(analysis.answers[-1])
    shuffled = rng.sample(range(n), n)
    sign = 1 if get_metric(analysis.primary).higher_is_better else -1
    last = np.nan_to_num(sign * analysis.scores[analysis.primary][-1].per_sample)
    best = last.max()
    chosen: dict[int, list[str]] = {}

    def take(group: str, candidates: Iterable[int], key: Callable[[int], Any] | None = None) -> None:
        ordered = sorted(candidates, key=key) if key else list(candidates)
        for index in ordered[:per_group]:
            chosen.setdefault(index, []).append(group)

    if len(analysis.answers) > 1:
        gain = np.nan_to_num(analysis.gain())
        take("improved", (i for i in shuffled if gain[i] > 0), lambda i: -gain[i])
        take("worsened", (i for i in shuffled if gain[i] < 0), lambda i: gain[i])
    # Of samples alike, those that are not shown yet come first.
    take("wrong", (i for i in shuffled if last[i] < best), lambda i: (last[i], i in chosen))
    if len(analysis.answers) > 1:
        said = [
            (one.answer, other.answer) for one, other in zip(analysis.answers[0], analysis.answers[-1], strict=True)
        ]
        take("changed", (i for i in shuffled if said[i][0] != said[i][1] and not gain[i]), lambda i: i in chosen)
    take("random", shuffled)
    return chosen


def _row(name: str, analysis: Analysis, metric: str, indices: list[int] | None) -> Row:
    found = analysis.scores[metric]
    scores = found if indices is None else [one.take(indices) for one in found]
    scores = [one.take(np.all([other.scored for other in scores], axis=0)) for one in scores]
    values = []
    for place, (label, one) in enumerate(zip(analysis.labels, scores, strict=True)):
        if not one.n:
            continue
        low, high = interval(one)
        difference = None
        if place:
            middle, ends = paired_difference(scores[0], one)
            difference = (middle, *ends)
        values.append(Value(label, one.value, low, high, difference))
    return Row(name, metric, scores[0].n, analysis.percent[metric], values)


def _types(predictions: Sequence[Prediction]) -> tuple[str, list[str]]:
    for name in TYPE_FIELDS:
        kinds = [one.meta.get(name) for one in predictions]
        if all(isinstance(kind, str | int) for kind in kinds) and len(set(kinds)) > 1:
            return name.replace("_", " "), [str(kind) for kind in kinds]
    labels = [_label(one) for one in predictions]
    few = len(set(labels)) <= MOST_TYPES and all(len(label.split()) <= 3 for label in labels)
    return ("reference", labels) if few else ("", [])


def _label(prediction: Prediction) -> str:
    """The reference that most annotators gave."""
    counts: Counter[Any] = Counter(normalize(reference) for reference in prediction.references)
    return str(counts.most_common(1)[0][0])

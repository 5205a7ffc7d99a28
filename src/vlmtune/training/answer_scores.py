"""Generated answers scored during training: the same few evaluation samples at every evaluation."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from accelerate.utils import gather_object

from vlmtune.config import EvaluationArguments, TrainingArguments
from vlmtune.data.images import TIMEOUT
from vlmtune.data.sample import Sample
from vlmtune.errors import ConfigError, EvaluationError, nearest
from vlmtune.evaluation.before import unscorable
from vlmtune.evaluation.generation import AnswerGenerator
from vlmtune.evaluation.metrics import Metric, get_metric
from vlmtune.evaluation.metrics.robust import robust_scores
from vlmtune.evaluation.runner import scored_samples

logger = logging.getLogger("vlmtune.training")


@dataclass(frozen=True)
class Answered:
    """A sample and what the model answered."""

    sample: Sample
    answer: str


class AnswerScorer:
    """Answers a fixed part of the evaluation samples with the model as it is, and scores the answers.

    Args:
        rows: evaluation rows; those without references cannot be scored and are not asked.
        processor: the model's.
        metrics: names of metrics.
        options: how answers are generated.
        count: samples to answer, drawn by the seed; the same at every evaluation.
        seed: of the draw.
        max_seconds: begin no further batch of answers after this time; ``None`` answers all.
        max_pixels: pixel limit of an image.
        image_timeout: seconds that an image may take to be read and decoded.

    Attributes:
        between: called before each batch of answers; what it raises ends the scoring.

    Raises:
        EvaluationError: no row has references, or a metric can score none of them.
        ConfigError: a metric is unknown, or cannot be scored during training.
    """

    def __init__(
        self,
        rows: Iterable[Mapping[str, Any]],
        processor: Any,
        metrics: Sequence[str],
        options: EvaluationArguments,
        *,
        count: int,
        seed: int = 0,
        max_seconds: float | None = None,
        max_pixels: int | None = None,
        image_timeout: float = TIMEOUT,
    ) -> None:
        samples = scored_samples(rows)
        if not samples:
            raise EvaluationError("eval_answers is set, but no evaluation sample has references to score against.")
        self.metrics = {name: get_metric(name) for name in metrics}
        if unread := [name for name, metric in self.metrics.items() if metric.reads == "reference_loss"]:
            raise ConfigError(
                f"{unread[0]} is not scored during training: there it is exp of the evaluation loss. Leave it out of "
                "metrics, or set eval_answers to 0."
            )
        # In an order of its own: a run out of time has then answered a random part, and the same one each time.
        self.samples = random.Random(seed).sample(samples, min(count, len(samples)))
        if failed := unscorable(samples, metrics):
            raise EvaluationError("\n".join(failed.values()))
        self.processor, self.options = processor, options
        self.max_seconds, self.max_pixels, self.image_timeout = max_seconds, max_pixels, image_timeout
        self.between: Callable[[], None] = lambda: None
        self._noted: set[str] = set()

    def __call__(self, model: Any, *, rank: int = 0, world_size: int = 1) -> tuple[dict[str, float], list[Answered]]:
        """Answer and score.

        Args:
            model: without the wrappers of distributed training; its training mode is kept.
            rank: of this process, which answers every ``world_size``-th sample.
            world_size: number of processes; each gets all answers.

        Returns:
            Metric -> value, with ``answers`` (how many were scored) and ``answer_seconds``; and the answers, in the
            samples' order.
        """
        started = time.perf_counter()
        mine = list(enumerate(self.samples))[rank::world_size]
        generator = AnswerGenerator(
            model, self.processor, self.options, max_pixels=self.max_pixels, image_timeout=self.image_timeout
        )
        found: list[tuple[int, str]] = []
        size = self.options.eval_batch_size
        for start in range(0, len(mine), size):
            if start and self.max_seconds is not None and time.perf_counter() - started >= self.max_seconds:
                break
            self.between()
            block = mine[start : start + size]
            answers = generator([sample for _, sample in block])
            found += [(place, answer.text) for (place, _), answer in zip(block, answers, strict=True)]
        answered = [Answered(self.samples[place], text) for place, text in sorted(gather_object(found))]
        seconds = time.perf_counter() - started
        if len(answered) < len(self.samples):
            logger.warning(
                "answered %d of %d evaluation samples within max_eval_seconds (%g s); the scores are of those alone",
                *(len(answered), len(self.samples), self.max_seconds),
            )
        return self._scores(answered) | {"answers": len(answered), "answer_seconds": round(seconds, 2)}, answered

    def _scores(self, answered: Sequence[Answered]) -> dict[str, float]:
        answers = [one.answer for one in answered]
        references = [one.sample.references for one in answered]
        ids = [one.sample.id for one in answered]
        values: dict[str, float] = {}
        for name, metric in self.metrics.items():
            try:
                scores = robust_scores(metric, answers, references, ids, _read(metric, answered))
            except ValueError as error:
                raise EvaluationError(f"{name} cannot score the evaluation samples: {error}.") from error
            values[name] = scores.value
            for note in scores.notes:
                # Those of the samples are the same at every evaluation.
                if note not in self._noted:
                    self._noted.add(note)
                    logger.info("%s of the samples answered during training: %s", name, note)
        return values


def _read(metric: Metric, answered: Sequence[Answered]) -> list[Any] | None:
    """What the metric reads besides answers and references."""
    if metric.reads == "images":
        return [[image.name for image in one.sample.images] for one in answered]
    return [getattr(one.sample, metric.reads) for one in answered] if metric.reads else None


def choose_best_by(args: TrainingArguments, metrics: Sequence[str]) -> None:
    """Set whether more is better of what the best checkpoint is chosen by.

    Args:
        args: changed where ``metric_for_best_model`` is one of the metrics.
        metrics: those scored at each evaluation.

    Raises:
        ConfigError: ``metric_for_best_model`` is neither the loss nor scored.
    """
    name = (args.metric_for_best_model or "loss").removeprefix("eval_")
    if name == "loss":
        return
    if name not in metrics:
        scored = f"scored are {', '.join(metrics)}" if metrics else "no answers are scored"
        raise ConfigError(
            f"metric_for_best_model is {name!r}, but at each evaluation {scored}. Add it to metrics, and set "
            f"eval_answers to the number of samples to answer.{nearest(name, metrics)}"
        )
    args.greater_is_better = get_metric(name).higher_is_better

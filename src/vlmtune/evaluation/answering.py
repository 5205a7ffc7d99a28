"""Answers to samples, generated or the likeliest of given options, and the loss of their references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmtune.data.formats.questions import LETTERS
from vlmtune.data.sample import Sample
from vlmtune.errors import VlmtuneError
from vlmtune.evaluation.generation import AnswerGenerator
from vlmtune.evaluation.likelihood import TextScorer


@dataclass(frozen=True)
class Prediction:
    """One sample's answer and what it is scored against.

    Attributes:
        id: the sample's.
        prompt: what was asked, all turns of it.
        images: names of the images.
        answer: generated, or the letter chosen.
        references: right answers.
        ended: the model closed its turn; else ``max_new_tokens`` cut it.
        tokens: generated; none where a letter was chosen.
        seconds: this answer's share of its batch's time.
        meta: the sample's own, such as its question type.
        options: where a letter was chosen, the log-probability of each.
        said: the answer as the model wrote it, where ``answer`` has it in another form: boxes in pixels of the image.
        reference_loss: the summed loss of the references in nats, and their tokens, where perplexity is a metric.
    """

    id: str
    prompt: str
    images: tuple[str, ...]
    answer: str
    references: tuple[str, ...]
    ended: bool = True
    tokens: int = 0
    seconds: float = 0.0
    meta: dict[str, Any] = field(default_factory=dict)
    options: dict[str, float] = field(default_factory=dict)
    reference_loss: tuple[float, int] = (0.0, 0)
    said: str = ""


class Answerer:
    """Answers samples with one model.

    Args:
        generator: of the model.
        choose_by: ``likelihood``: where a question has lettered options, the likeliest letter is the answer;
            ``text``: it is generated as any other.
        reads: attributes that the metrics read of predictions.
    """

    def __init__(self, generator: AnswerGenerator, *, choose_by: str, reads: Sequence[str] = ()) -> None:
        self.generator, self.scorer = generator, TextScorer(generator)
        self.choose_by, self.with_losses = choose_by, "reference_loss" in reads

    def except_bad(self, samples: Sequence[Sample]) -> list[Prediction | tuple[str, str]]:
        """Return the predictions, and (id, reason) of samples that cannot be asked; one of these stops no other."""
        try:
            return list(self(samples))
        except VlmtuneError:
            bad = {sample.id: reason for sample in samples if (reason := self.generator.problem(sample))}
            if not bad:
                raise
        good = [sample for sample in samples if sample.id not in bad]
        return [*(self(good) if good else ()), *bad.items()]

    def __call__(self, samples: Sequence[Sample]) -> list[Prediction]:
        """Return the predictions, in order."""
        chosen = [sample for sample in samples if self.choose_by == "likelihood" and sample.meta.get(LETTERS)]
        options: dict[str, dict[str, float]] = {}
        if chosen:
            found_options = self.scorer.choose(chosen, [sample.meta[LETTERS] for sample in chosen])
            options = dict(zip(_ids(chosen), found_options, strict=True))
        open_ended = [sample for sample in samples if sample.id not in options]
        answers = dict(zip(_ids(open_ended), self.generator(open_ended), strict=True)) if open_ended else {}
        losses = self._losses(samples) if self.with_losses else {}
        found = []
        for sample in samples:
            if sample.id in options:
                given: dict[str, Any] = {"answer": next(iter(options[sample.id])), "ended": True, "tokens": 0}
                given |= {"seconds": 0.0, "options": {k: round(v, 5) for k, v in options[sample.id].items()}}
            else:
                answer = answers[sample.id]
                given = {"answer": answer.text, "ended": answer.ended, "tokens": answer.tokens}
                given["seconds"] = round(answer.seconds, 5)
                given["said"] = answer.said if answer.said != answer.text else ""
            if losses:
                given["reference_loss"] = losses[sample.id]
            found.append(
                Prediction(
                    id=sample.id,
                    prompt="\n".join(message.text for message in sample.prompt if message.role == "user"),
                    images=tuple(image.name for image in sample.images),
                    references=sample.references,
                    meta=sample.meta,
                    **given,
                )
            )
        return found

    def _losses(self, samples: Sequence[Sample]) -> Mapping[str, tuple[float, int]]:
        pairs = [(sample, text) for sample in samples for text in dict.fromkeys(sample.references)]
        scored = self.scorer([sample for sample, _ in pairs], [text for _, text in pairs])
        losses = dict.fromkeys(_ids(samples), (0.0, 0))
        for (sample, _), one in zip(pairs, scored, strict=True):
            loss, tokens = losses[sample.id]
            losses[sample.id] = (round(loss + one.loss, 6), tokens + one.tokens)
        return losses


def _ids(samples: Sequence[Sample]) -> list[str]:
    return [sample.id for sample in samples]

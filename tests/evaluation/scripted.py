"""A stand-in for a model that answers, and a data set for it."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from vlmtune.config import GenerationArguments
from vlmtune.data.sample import Message, Sample
from vlmtune.evaluation.generation import Answer
from vlmtune.evaluation.runner import evaluate

ANSWERS = ["red", "blue", "green", "дог — ☂", "two\nlines", "odd\u2028\x85line\x1eends", 'quotes "', ""]


class Scripted:
    """Stands for an answer generator: says the same of a sample whenever it is asked, and counts."""

    def __init__(self, **options) -> None:
        self.options = GenerationArguments(**{"eval_batch_size": 1} | options)
        self.model = torch.nn.Linear(2, 2)
        torch.nn.init.constant_(self.model.weight, 1.0)
        torch.nn.init.constant_(self.model.bias, 1.0)
        self.seed = 0
        self.asked: list[str] = []
        self.stop_after: int | None = None

    def __call__(self, samples):
        if self.stop_after is not None and len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        self.asked += [sample.id for sample in samples]
        return [Answer(ANSWERS[int(sample.id) % len(ANSWERS)], True, 3, 0.25) for sample in samples]


def make_dataset(count: int = 20, **changes):
    import datasets

    rows = []
    for number in range(count):
        reference = ANSWERS[number % len(ANSWERS)] if number % 2 else "something else"
        messages = (Message.make("user", f"Question {number}?"), Message.make("assistant", reference or "x"))
        rows.append(Sample(str(number), (), messages, references=(reference,)).to_row() | changes)
    return datasets.Dataset.from_list(rows)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_bytes().split(b"\n") if line]


def run(generator, dataset, folder, **options):
    return evaluate(generator, dataset, ["exact_match"], folder, name=options.pop("name", "tiny"), **options)

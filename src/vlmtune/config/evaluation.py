"""Arguments that say how answers are generated and scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from vlmtune.config.options import AT_LEAST_ONE, AT_LEAST_ZERO, Checked, Limit, Limits, option


@dataclass
class GenerationArguments(Checked):
    """How answers are generated."""

    _argument_group_name = "generation"

    max_new_tokens: int = option(64, help="Most tokens of a generated answer.")
    temperature: float = option(
        0.0, help="Randomness of the answers: 0 always takes the likeliest token, so that scores are repeatable."
    )
    top_p: float = option(
        1.0, help="Draw from the likeliest tokens that make up this share of the probability; needs a temperature."
    )
    eval_batch_size: int = option(16, help="Answers generated at once on a device.")

    limits: ClassVar[Limits] = {
        "max_new_tokens": AT_LEAST_ONE,
        "temperature": AT_LEAST_ZERO,
        "top_p": Limit(low=0, high=1, open_low=True),
        "eval_batch_size": AT_LEAST_ONE,
    }


@dataclass
class AdapterArguments(Checked):
    """Which adapter is put on the model for answering."""

    _argument_group_name = "model"

    adapter: str | None = option(
        None, help="Folder of an adapter to put on the model; not needed where the model named is one itself."
    )


@dataclass
class EvaluationOutputArguments(Checked):
    """Where an evaluation is written, and what it is compared with."""

    _argument_group_name = "evaluation"

    evaluation_dir: str | None = option(
        None, help="Folder for answers and scores; by default evaluation inside the folder of the adapter or model."
    )
    predictions: str | None = option(
        None,
        help="Score the answers in this file of JSON lines, or evaluation's folder, instead of generating any; a line "
        "needs answer and references. No model is loaded.",
    )
    compare_to: str | None = option(
        None, help="Folder of another evaluation on the same data, such as the base model's, to compare with."
    )


@dataclass
class EvaluationArguments(GenerationArguments):
    """Which metrics generated answers are scored with, and on how many samples."""

    _argument_group_name = "evaluation"

    metrics: list[str] | None = option(
        None,
        help="Metrics of the generated answers, such as exact_match and vqa_accuracy; by default those of the data's "
        "format.",
    )
    eval_samples: int | None = option(
        None,
        help="Generate answers for this many evaluation samples, drawn at random with each question type in its "
        "share; by default for all.",
    )

    choose_by: Literal["likelihood", "text"] = option(
        "likelihood",
        help="How a question with lettered options is answered: by the letter that the model finds likeliest, or by "
        "the letter in a generated text.",
    )
    honesty: Literal["on", "off"] = option(
        "on",
        help="Also answer with shuffled and with blank images, and without the adapter, to see whether the model looks "
        "at its images and whether tuning helped.",
    )

    limits: ClassVar[Limits] = {
        "metrics": Limit(never_empty=True),
        "eval_samples": AT_LEAST_ONE,
    }

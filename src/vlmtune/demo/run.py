"""``vlmtune demo``: score the tiny model, tune it, score it again, and show the difference."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from vlmtune.config import GenerationArguments, parse_recipe
from vlmtune.data.loading import LoadedData, load_samples, subset
from vlmtune.demo.picture import draw_answers
from vlmtune.errors import OutputError
from vlmtune.evaluation.answering import Prediction
from vlmtune.evaluation.compare import Comparison, compare, format_comparison
from vlmtune.evaluation.generation import AnswerGenerator
from vlmtune.evaluation.honesty import check_honesty, format_honesty
from vlmtune.evaluation.runner import Evaluation, evaluate, scored_samples
from vlmtune.models.loading import load_model_for_inference
from vlmtune.report.data import read_records
from vlmtune.report.page import write_report
from vlmtune.training.run import run_training

logger = logging.getLogger("vlmtune.demo")
METRICS = ("exact_match", "vqa_accuracy")
ANSWERS_SHOWN = 8
MakeProgress = Callable[[str], Callable[[int, int], None]]


def model_folder() -> Path:
    """Folder of the tiny pretrained Gemma-3 that comes with the package."""
    return Path(str(resources.files("vlmtune.demo") / "model"))


def run_demo(output_dir: Path | None, *, questions: int, progress: MakeProgress) -> Comparison:
    """Run the demo and print what it shows.

    Args:
        output_dir: new folder for everything it writes; the next free ``runs/demo-N`` by default.
        questions: how many test questions to score on, drawn by a fixed seed.
        progress: makes a progress display of a title.

    Raises:
        OutputError: the folder is not empty.
        MissingDependencyError: easy-VQA is not installed.
    """
    started = time.perf_counter()
    folder = output_dir or _next_free(Path("runs"))
    if folder.is_dir() and any(folder.iterdir()):
        raise OutputError(f"The folder {folder} already holds files, and none will be overwritten. Choose another one.")
    test = subset(load_samples("easy-vqa", split="test"), questions, seed=0)
    print(f"The model: a Gemma-3 of 3.2 million parameters, pretrained on drawn scenes ({model_folder()})")
    print(f"The task:  easy-VQA, {len(test.dataset):,} test questions on pictures that training never shows\n")

    logger.info("scoring the base model")
    base = _score(_generator(str(model_folder())), str(model_folder()), test, folder / "base", progress("Base model"))
    recipe_path = resources.files("vlmtune.demo") / "recipes" / "easy_vqa.yaml"
    flags = ["--model_name_or_path", str(model_folder()), "--output_dir", str(folder / "adapter")]
    recipe = parse_recipe([*flags, "--cache_dir", str(folder / "feature_cache")], Path(str(recipe_path)))
    recipe.training.disable_tqdm = not sys.stderr.isatty()
    result = run_training(
        recipe.model, recipe.data, recipe.training, recipe.evaluation, progress=progress("Image features")
    )
    logger.info("scoring the tuned model")
    generator = _generator(str(result.output_dir))
    tuned = _score(generator, str(result.output_dir), test, folder / "tuned", progress("Tuned model"))
    logger.info("scoring the tuned model with shuffled and with blank images")
    honesty = check_honesty(
        generator,
        scored_samples(test.dataset),
        tuned,
        METRICS,
        folder / "tuned",
        name=str(result.output_dir),
        progress=progress("Other images"),
    )

    found = compare(base.predictions, tuned.predictions, METRICS)
    draw_answers(_shown(found), folder / "answers.png")
    report = write_report(read_records([folder]), folder / "report.html", title="The demo: easy-VQA, a tiny Gemma-3")
    print(f"\nTuned with LoRA for {result.seconds:.0f} s ({result.steps} steps). Percent right:\n")
    print(format_comparison(found))
    print(
        f"\nDoes the tuned model look at the image? The same questions with other images:\n\n{format_honesty(honesty)}"
    )
    print(f"\n{'question':<44}{'right':<12}{'base':<26}tuned")
    for one, other in _shown(found):
        print(f"{other.prompt[:42]:<44}{other.references[0]:<12}{one.answer[:24]:<26}{other.answer}")
    print(f"\nEverything is in {folder} (after {time.perf_counter() - started:.0f} s):")
    for name, what in (
        ("adapter/", "the LoRA adapter with its processor"),
        ("adapter/run.json", "options, versions, data, metrics"),
        ("adapter/log.jsonl", "loss and speed of every logged step"),
        ("base/, tuned/", "every answer (predictions.jsonl) and the scores with their intervals (scores.json)"),
        ("answers.png", "some answers with their pictures"),
        ("report.html", "all of it as a page: scores, pictures, training curves"),
    ):
        print(f"  {name:<20}{what}")
    print(f"\nOpen the report in a browser: {report.resolve()}")
    return found


def _generator(model_path: str) -> AnswerGenerator:
    model, processor = load_model_for_inference(model_path)
    return AnswerGenerator(model, processor, GenerationArguments(max_new_tokens=12, eval_batch_size=32))


def _score(generator: AnswerGenerator, name: str, data: LoadedData, folder: Path, progress: Any) -> Evaluation:
    return evaluate(generator, data.dataset, METRICS, folder, name=name, progress=progress, source=data.source)


def _shown(found: Comparison) -> list[tuple[Prediction, Prediction]]:
    """Pairs spread over the test set, whatever their answers were."""
    step = max(1, len(found.pairs) // ANSWERS_SHOWN)
    return found.pairs[step // 2 :: step][:ANSWERS_SHOWN]


def _next_free(parent: Path) -> Path:
    number = 1
    while (parent / f"demo-{number}").exists():
        number += 1
    return parent / f"demo-{number}"

"""Is the score earned? The same questions with other pictures, with none, and without the adapter.

A model that ignores its images scores as well on the wrong ones (Goyal et al. 2017, arXiv:1612.00837, show how far
visual questions can be answered from the text alone), and a tuned model may be no better than its base.
"""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from vlmtune.data.images import content_hash, decode, length_of
from vlmtune.data.sample import ImageRef, Sample
from vlmtune.evaluation.compare import compare
from vlmtune.evaluation.generation import AnswerGenerator
from vlmtune.evaluation.metrics import get_metric
from vlmtune.evaluation.ranks import by_first
from vlmtune.evaluation.runner import SCORES, Evaluation, Progress, ended_share, evaluate
from vlmtune.files import write_whole

logger = logging.getLogger("vlmtune.evaluation")
MOST_SAMPLES = 500
GREY = (128, 128, 128)
# Training and scored images to what is found of them.
NearCopies = Callable[[Iterable[ImageRef], Iterable[ImageRef]], dict[str, Any]]
TITLES = {"base": "base model", "shuffled": "shuffled images", "blank": "blank images"}


def check_honesty(
    generator: AnswerGenerator,
    samples: Sequence[Sample],
    found: Evaluation,
    metrics: Sequence[str],
    folder: str | Path,
    *,
    name: str,
    base: str | None = None,
    base_skipped: str | None = None,
    choose_by: str = "likelihood",
    seed: int = 0,
    training: Iterable[ImageRef] | str | None = None,
    near_copies: NearCopies | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Answer the checks' questions, score them, and add the results to ``scores.json`` under ``honesty``.

    The answers lie in the folders ``shuffled``, ``blank`` and ``base`` of the evaluation, each an evaluation itself,
    so that a check that was stopped goes on where it was.

    Args:
        generator: of the model that was scored.
        samples: all that were scored.
        found: their scores.
        metrics: names of metrics.
        folder: the evaluation's.
        name: the model's, for the record.
        base: the base model's name, where the model is an adapter and its base is to be scored too.
        base_skipped: why the base is not scored, for the record.
        choose_by: as in :func:`vlmtune.evaluation.runner.evaluate`.
        seed: of the choice of samples and of the shuffling.
        training: the training images, to find those that are scored too; or why they are not looked at.
        near_copies: counts scored images that look like training images; takes both.
        progress: called after each block of answers.

    Returns:
        Check -> ``samples`` and ``metrics`` (metric -> ``value`` of the check, ``model`` on the same samples, the
        ``difference`` model - value with its interval ``low`` and ``high``), or ``skipped`` with the reason; and
        ``ended_by_terminator``, the share of the model's answers. ``training_images`` holds how many ``images`` were
        scored and how many of them are ``shared`` with training, with a few names, and what ``near_copies`` found.
    """
    # Those that look at the images themselves would say something of the wrong or blank ones.
    metrics = [metric for metric in metrics if get_metric(metric).reads != "images"]
    if not metrics:
        return {"ended_by_terminator": ended_share(found.predictions)}
    place = Path(folder)
    chosen = _with_images(samples, seed)
    result: dict[str, Any] = {}

    def run(check: str, asked: Sequence[Sample], label: str) -> None:
        logger.info("checking against %s: %s samples", TITLES[check], f"{len(asked):,}")
        dataset = datasets.Dataset.from_list([sample.to_row() for sample in asked])
        other = evaluate(
            *(generator, dataset, metrics, place / check),
            name=label,
            progress=progress,
            merge_equal=False,
            choose_by=choose_by,
        )
        compared = compare(other.predictions, found.predictions, metrics)
        result[check] = {
            "samples": len(compared.pairs),
            "metrics": {
                metric: {"value": entry["base"], "model": entry["tuned"]}
                | {key: entry[key] for key in ("difference", "low", "high", "n", "percent")}
                for metric, entry in compared.table.items()
            },
        }

    without_adapter: Callable[[], AbstractContextManager[Any]] | None = getattr(
        generator.model, "disable_adapter", None
    )
    if base is not None and without_adapter is not None:
        with without_adapter():
            run("base", samples, base)
    elif base_skipped:
        result["base"] = {"skipped": base_skipped}
    if not chosen:
        result |= {check: {"skipped": "no sample has an image"} for check in ("shuffled", "blank")}
    else:
        shuffled = shuffle_images(chosen, seed)
        if shuffled is None:
            result["shuffled"] = {"skipped": "all samples show the same image"}
        else:
            run("shuffled", shuffled, name)
        run("blank", blank_images(chosen, generator.encoder.max_pixels), name)
    result["ended_by_terminator"] = ended_share(found.predictions)
    if isinstance(training, str):
        result["training_images"] = {"skipped": training}
    elif training is not None:
        result["training_images"] = by_first(lambda: _training_images(list(training), samples, near_copies))
    by_first(lambda: _add_to_scores(place / SCORES, result))
    return result


def _training_images(
    training: Sequence[ImageRef], samples: Sequence[Sample], near_copies: NearCopies | None
) -> dict[str, Any]:
    found = shared_images(training, samples)
    if near_copies is not None:
        found["near_copies"] = near_copies(training, {image for sample in samples for image in sample.images})
    return found


def shared_images(training: Iterable[ImageRef], samples: Sequence[Sample]) -> dict[str, Any]:
    """Count the images scored that are training images too, whatever their names: equal bytes are one image."""
    scored = {image for sample in samples for image in sample.images}
    by_size: dict[int, list[ImageRef]] = {}
    for image in scored:
        by_size.setdefault(length_of(image), []).append(image)
    # Only files of one length can be equal, so few of a large training set are read.
    alike = [image for image in set(training) if length_of(image) in by_size]
    seen = {content_hash(image) for image in alike}
    sizes = {length_of(image) for image in alike}
    shared = sorted(image.name for size in sizes for image in by_size[size] if content_hash(image) in seen)
    return {"images": len(scored), "shared": len(shared), "such_as": shared[:3]}


def shuffle_images(samples: Sequence[Sample], seed: int = 0) -> list[Sample] | None:
    """Give every question another image's picture, each image exchanged for one and the same other.

    Images are told apart by their bytes, so that no question keeps its picture under another name.

    Returns:
        The samples, or ``None`` where there is only one image.
    """
    keys = {image: content_hash(image) for sample in samples for image in sample.images}
    first = {key: image for image, key in reversed(keys.items())}
    order = sorted(first)
    random.Random(seed).shuffle(order)
    if len(order) < 2:
        return None
    following = dict(zip(order, [*order[1:], order[0]], strict=True))
    return [
        dataclasses.replace(sample, images=tuple(first[following[keys[image]]] for image in sample.images))
        for sample in samples
    ]


def blank_images(samples: Sequence[Sample], max_pixels: int | None = None) -> list[Sample]:
    """Replace every image by a plain grey one of the same size."""
    sizes = {
        image: decode(image, max_pixels=max_pixels).size for image in {i for sample in samples for i in sample.images}
    }
    blanks = {size: ImageRef(bytes=_grey(size)) for size in set(sizes.values())}
    return [
        dataclasses.replace(sample, images=tuple(blanks[sizes[image]] for image in sample.images)) for sample in samples
    ]


def format_honesty(honesty: Mapping[str, Any]) -> str:
    """Return the checks as an aligned table for people, with what they say."""
    rows = [("compared with", "metric", "its score", "this model", "difference (95 % interval)")]
    skipped = []
    for check, title in TITLES.items():
        entry = honesty.get(check)
        if entry is None:
            continue
        if "skipped" in entry:
            skipped.append(f"{title}: not scored, {entry['skipped']}")
            continue
        for metric, values in entry["metrics"].items():
            factor, digits = (100, 1) if values["percent"] else (1, 3)
            value, model = (f"{values[key] * factor:.{digits}f}" for key in ("value", "model"))
            difference, low, high = (f"{values[key] * factor:+.{digits}f}" for key in ("difference", "low", "high"))
            what = f"{title}, {entry['samples']:,} samples"
            rows.append((what, metric, value, model, f"{difference} ({low} to {high})"))
    skipped += not_looked_at(honesty)
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines = lines if len(rows) > 1 else []
    ended = honesty["ended_by_terminator"]
    hint = "" if ended >= 0.9 else "; the others were cut, raise max_new_tokens"
    return "\n".join([*lines, *skipped, *verdicts(honesty), f"{ended:.1%} of the answers ended by themselves{hint}."])


def not_looked_at(honesty: Mapping[str, Any]) -> list[str]:
    """Return what was not looked for among the training images, and why."""
    shared = honesty.get("training_images", {})
    said = [f"Training images: not looked at, {shared['skipped']}."] if "skipped" in shared else []
    if "skipped" in (near := shared.get("near_copies", {})):
        said.append(f"Training images that look like those scored: not looked for, {near['skipped']}.")
    return said


def verdicts(honesty: Mapping[str, Any]) -> list[str]:
    """Return what the checks on images say, those on answers by the first metric, in plain words."""
    said = []
    for check, question in (("shuffled", "the wrong images"), ("blank", "blank images")):
        metrics = honesty.get(check, {}).get("metrics")
        if not metrics:
            continue
        metric, entry = next(iter(metrics.items()))
        low, high = entry["low"], entry["high"]
        if not get_metric(metric).higher_is_better:
            low, high = -high, -low
        if low > 0:
            said.append(f"With {question} the answers are worse: the model looks at its images ({metric}).")
        elif high < 0:
            said.append(f"With {question} the answers are better: something is wrong with the images ({metric}).")
        else:
            said.append(
                f"With {question} the answers are not told apart: the model may not look at its images ({metric})."
            )
    shared = honesty.get("training_images", {})
    if shared.get("shared"):
        said.append(
            f"{shared['shared']:,} of the {shared['images']:,} images scored are training images too, such as "
            f"{', '.join(shared['such_as'])}: scores on them say little about new images."
        )
    elif shared.get("images"):
        said.append(f"None of the {shared['images']:,} images scored is a training image.")
    if (near := shared.get("near_copies", {})).get("near"):
        one, like = near["such_as"][0]
        said.append(f"{near['near']:,} of the images scored look like a training image, such as {one} like {like}.")
    elif near.get("near") == 0:
        said.append("None looks like a training image." if not shared["shared"] else "No other looks like one.")
    return said


def _with_images(samples: Sequence[Sample], seed: int) -> list[Sample]:
    having = [sample for sample in samples if sample.images]
    if len(having) <= MOST_SAMPLES:
        return having
    kept = sorted(random.Random(seed).sample(range(len(having)), MOST_SAMPLES))
    return [having[index] for index in kept]


def _grey(size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, GREY).save(file, "PNG")
    return file.getvalue()


def _add_to_scores(path: Path, result: Mapping[str, Any]) -> None:
    record = json.loads(path.read_text(encoding="utf-8")) | {"honesty": result}
    write_whole(path, json.dumps(record, indent=2) + "\n")

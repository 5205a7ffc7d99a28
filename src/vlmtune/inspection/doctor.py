"""Check data before any weight loads: every row, every image, every text, and what the model's tokens make of them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlmtune.config import BaseModelArguments, VLMDataArguments
from vlmtune.data.loading import LoadedData, load_train_and_eval, subset
from vlmtune.data.sample import ImageRef, Sample
from vlmtune.inspection.duplicates import look_alikes
from vlmtune.inspection.findings import Report, histogram
from vlmtune.inspection.images import FOUND_BY, ImageFacts, Progress, inspect_images
from vlmtune.inspection.texts import read_texts, report_texts

ADVICE = {
    "missing": "Correct the names, or set image_dir.",
    "empty": "Download or copy them again.",
    "not an image": "Replace the files, or take their rows out.",
    "too large": "Make the images smaller, or raise max_pixels.",
    "damaged": "Download or copy them again: they are cut short or altered.",
}
NOTES = {
    "animated": ("warning", "are animations; the first frame is taken."),
    "turned by EXIF": ("note", "are stored turned; they are put upright."),
    "CMYK": ("note", "are in CMYK; their colours change a little in RGB."),
    "16 bits": ("warning", "have 16 bits or floating-point values a channel; they are scaled to 8 bits."),
    "transparent": ("note", "have transparent parts, which become white."),
    "huge": ("warning", "have more than 25 million pixels and take long to decode; make them smaller once."),
    "tiny": ("warning", "are less than 32 pixels high or wide."),
    "very long": ("warning", "are more than 8 times as long as wide; resizing to a square distorts them."),
}


@dataclass(frozen=True)
class _Side:
    """One side of the data, its rows without those whose image is bad."""

    name: str
    data: LoadedData
    refs: list[tuple[ImageRef, ...]]


def check_data(
    data_args: VLMDataArguments,
    model_args: BaseModelArguments | None = None,
    *,
    processes: int | None = None,
    progress: Callable[[str], Progress] | None = None,
) -> Report:
    """Check the data of a recipe; nothing is written, no weight is loaded.

    Args:
        data_args: the data, as training would read them.
        model_args: the model whose processor counts tokens; without it they are not counted.
        processes: worker processes; by default one a CPU core.
        progress: makes a progress display of a title.

    Raises:
        VlmtuneError: the data cannot be read at all, or the model has no processor.
    """
    everything = replace(
        data_args, max_bad_fraction=1.0, verify_images="off", max_train_samples=None, max_eval_samples=None
    )
    train, evaluation = load_train_and_eval(everything)
    report = Report(train.source, train.format)
    sides = [_side("training", train)] + ([_side("evaluation", evaluation)] if evaluation else [])
    refs = list(dict.fromkeys(ref for side in sides for row in side.refs for ref in row))
    started = time.perf_counter()
    show = progress("Images") if progress else None
    facts = inspect_images(refs, max_pixels=data_args.max_pixels, processes=processes, progress=show)
    seconds = time.perf_counter() - started
    _report_quarantine(report, sides)
    _report_images(report, facts, seconds)
    _report_look_alikes(report, sides, facts)
    usable = _usable(report, sides, facts, data_args)
    texts = None
    for side in usable:
        found = read_texts(Sample.from_row(row) for row in side.data.dataset)
        report_texts(report, side.name, found, texts)
        texts = texts or found
        _report_sharing(report, side, facts)
    if model_args is not None:
        _report_model(report, usable, facts, data_args, model_args, processes)
    return report


def _side(name: str, data: LoadedData) -> _Side:
    return _Side(name, data, [tuple(ImageRef(**image) for image in row) for row in data.dataset["images"]])


def _report_quarantine(report: Report, sides: Sequence[_Side]) -> None:
    for side in sides:
        rows = side.data.quarantine.rows
        for kind in dict.fromkeys(row.kind for row in rows):
            of_kind = [row for row in rows if row.kind == kind]
            named = [row.reason if row.id in row.reason else f"{row.id}: {row.reason}" for row in of_kind]
            report.add("error", kind, named, f"{len(of_kind):,} {side.name} rows cannot be used: {kind}.",
                       "Mend or remove them.")  # fmt: skip


def _report_images(report: Report, facts: dict[ImageRef, ImageFacts], seconds: float) -> None:
    for kind, advice in ADVICE.items():
        bad = [ref for ref, image in facts.items() if image.kind == kind]
        report.add("error", f"image {kind}", [facts[ref].problem for ref in bad],
                   f"{len(bad):,} images are {kind}.", advice, bad)  # fmt: skip
    for note, (level, what) in NOTES.items():
        some = [ref for ref, image in facts.items() if note in image.notes]
        report.add(level, note, [ref.name for ref in some], f"{len(some):,} images {what}", "", some)  # type: ignore[arg-type]
    good = [image for image in facts.values() if not image.kind]
    report.numbers["images"] = {
        "images": len(facts),
        "bad": len(facts) - len(good),
        "bytes": sum(image.n_bytes for image in facts.values()),
        "formats": dict(Counter(image.format for image in good).most_common()),
        "modes": dict(Counter(image.mode for image in good).most_common()),
        "seconds": round(seconds, 2),
        "images_per_second": round(len(facts) / max(seconds, 1e-9), 1),
    }
    report.histograms["Longer side of an image, pixels"] = histogram([max(image.size) for image in good])
    report.histograms["Shorter side of an image, pixels"] = histogram([min(image.size) for image in good])


def _report_look_alikes(report: Report, sides: Sequence[_Side], facts: dict[ImageRef, ImageFacts]) -> None:
    refs = list(facts)
    groups = [[refs[index] for index in group] for group in look_alikes(list(facts.values()))]
    on_side = [{ref for row in side.refs for ref in row} for side in sides]
    # One file on both sides needs no hash to be found, and no second file to form a group.
    both = on_side[0] & on_side[1] if len(on_side) > 1 else set[ImageRef]()
    across = [group for group in groups if len(on_side) > 1 and all(any(r in side for r in group) for side in on_side)]
    report.add("warning", "same image on both sides", [ref.name for ref in facts if ref in both],
               f"{len(both):,} images are in the training and in the evaluation data.",
               "Split by image: validation_fraction does.", [ref for ref in facts if ref in both])  # fmt: skip
    report.add("warning", "alike on both sides", [_named(group) for group in across],
               f"{len(across):,} groups of images that are equal or look alike lie on both sides: scores of "
               "them say little.", "Take one side's out.", [ref for group in across for ref in group[:2]])  # fmt: skip
    equal = [group for group in groups if len({facts[ref].key for ref in group}) == 1]
    near = [group for group in groups if group not in equal]
    for kind, some, what in (
        ("equal images", equal, "the same bytes under other names"),
        ("look alike", near, "nearly the same picture"),
    ):
        count = sum(len(group) for group in some)
        report.add("note", kind, [_named(group) for group in some],
                   f"{count:,} images in {len(some):,} groups have {what}.", "",
                   [ref for group in some for ref in group[:2]], count=count)  # fmt: skip


def _named(group: Sequence[ImageRef]) -> str:
    return " = ".join("/".join(Path(ref.name).parts[-3:]) for ref in group[:4]) + (
        f" and {len(group) - 4:,} more" if len(group) > 4 else ""
    )


def _usable(
    report: Report, sides: Sequence[_Side], facts: dict[ImageRef, ImageFacts], args: VLMDataArguments
) -> list[_Side]:
    """Leave out rows with bad images, say whether training would refuse that, and draw what it would draw."""
    found_first = FOUND_BY[args.verify_images]
    bad = {ref: image.kind for ref, image in facts.items() if image.kind}
    kept: list[_Side] = []
    counts: list[tuple[int, int]] = []
    later = 0
    for side in sides:
        kinds = [[bad[ref] for ref in row if ref in bad] for row in side.refs]
        seen = sum(any(kind in found_first for kind in row) for row in kinds)
        later += sum(bool(row) and not any(kind in found_first for kind in row) for row in kinds)
        counts.append((len(side.data.quarantine) + seen, len(side.data.quarantine) + len(kinds)))
        rows = [index for index, row in enumerate(kinds) if not row]
        data = side.data
        limit = args.max_train_samples if side.name == "training" else args.max_eval_samples
        chosen = replace(data, dataset=data.dataset if len(rows) == len(kinds) else data.dataset.select(rows))
        kept.append(_side(side.name, subset(chosen, limit, args.split_seed)))
        report.numbers[side.name] = {
            "rows": len(kinds) + len(data.quarantine),
            "set_aside": len(data.quarantine) + len(kinds) - len(rows),
            "used": len(kept[-1].refs),
        }
    if args.validation_fraction and len(counts) > 1:
        # Both sides are read as one, and refused as one.
        counts = [(counts[0][0] + counts[1][0], counts[0][1] + counts[1][1])]
    for number, total in counts:
        if number > args.max_bad_fraction * total:
            report.refused.append(
                f"{number:,} of {total:,} rows cannot be used, more than max_bad_fraction "
                f"{args.max_bad_fraction:g} allows"
            )
    if later:
        report.refused.append(
            f"{later:,} rows have an image that verify_images {args.verify_images!r} does not find bad: the run would "
            "stop where it meets them. Set verify_images: full, or mend the images"
        )
    report.refused += [f"no {side.name} row is left" for side in kept if not side.refs]
    return [side for side in kept if side.refs]


def _keys(side: _Side, facts: dict[ImageRef, ImageFacts]) -> list[str]:
    return [" ".join(facts[ref].key for ref in row) for row in side.refs]


def _report_sharing(report: Report, side: _Side, facts: dict[ImageRef, ImageFacts]) -> None:
    texts = Counter(key for key in _keys(side, facts) if key)
    if texts:
        report.histograms[f"Texts of an image, {side.name}"] = histogram(list(texts.values()))
        report.numbers[side.name] |= {
            "images": len(texts),
            "texts_per_image": round(texts.total() / len(texts), 2),
        }


def _report_model(
    report: Report,
    sides: Sequence[_Side],
    facts: dict[ImageRef, ImageFacts],
    data_args: VLMDataArguments,
    model_args: BaseModelArguments,
    processes: int | None,
) -> None:
    # Importing the models' code takes seconds; a check without a model does not need it.
    from vlmtune.batching.encode import Encoder
    from vlmtune.inspection.tokens import measure, report_tokens, sharing
    from vlmtune.models.families import get_family
    from vlmtune.models.loading import load_config, load_processor

    origin: dict[str, Any] = {
        "revision": model_args.model_revision,
        "trust_remote_code": model_args.trust_remote_code,
    }
    family = get_family(load_config(model_args.model_name_or_path, **origin), model_args.model_type)
    processor = load_processor(model_args.model_name_or_path, **origin)
    encoder = Encoder(processor, family, max_pixels=data_args.max_pixels)
    if data_args.share_images == "on" and not family.sharing:
        report.refused.append(f"share_images is on, but {family.name} cannot share images: {family.sharing_reason}")
    for side in sides:
        found = measure(side.data.dataset, encoder, processes=processes)
        report_tokens(
            report,
            side.name,
            side.data.dataset,
            found,
            encoder,
            max_length=data_args.max_length,
            on_too_long=data_args.on_too_long,
            max_bad_fraction=data_args.max_bad_fraction,
        )
        uses = family.sharing and data_args.share_images != "off"
        report.numbers[f"{side.name} tokens"] |= {
            "sharing": sharing(_keys(side, facts), found),
            "sharing_is_used": uses,
        }

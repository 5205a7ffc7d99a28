"""Check data before any weight loads: every row, every image, every text, and what the model's tokens make of them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vlmtune.config import BaseModelArguments, VLMDataArguments
from vlmtune.data.loading import LoadedData, drawn, load_train_and_eval
from vlmtune.data.sample import UNNAMED, ImageRef
from vlmtune.data.shards import first_shard
from vlmtune.errors import VlmtuneError
from vlmtune.inspection.duplicates import look_alikes
from vlmtune.inspection.findings import EXAMPLES, Report, histogram, many
from vlmtune.inspection.images import FOUND_BY, ImageFacts, Progress, inspect_images
from vlmtune.inspection.pictures import Pictures
from vlmtune.inspection.texts import read_texts, report_texts

ADVICE = {
    "missing": "Correct the names, or set image_dir.",
    "empty": "Download or copy them again.",
    "not an image": "Replace the files, or take their rows out.",
    "too large": "Make the images smaller, or raise max_pixels.",
    "damaged": "Download or copy them again: they are cut short or altered.",
}
_IS, _HAS = ("image is", "images are"), ("image has", "images have")
NOTES = {
    "animated": ("warning", *_IS, "animated; the first frame is taken."),
    "turned by EXIF": ("note", *_IS, "stored turned, and put upright when decoded."),
    "CMYK": ("note", *_IS, "in CMYK; colours change a little in RGB."),
    "16 bits": ("warning", *_HAS, "16 bits or floating-point values a channel, which are scaled to 8 bits."),
    "transparent": ("note", *_HAS, "transparent parts, which become white."),
    "huge": ("warning", *_HAS, "more than 25 million pixels: decoding takes long. Make them smaller once."),
    "tiny": ("warning", *_IS, "less than 32 pixels high or wide."),
    "very long": ("warning", *_IS, "more than 8 times as long as wide; resizing to a square distorts them."),
}


@dataclass(frozen=True)
class _Side:
    """One side of the data, and the numbers of each row's images."""

    name: str
    data: LoadedData
    rows: list[tuple[int, ...]]


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
        first_shard(data_args), max_bad_fraction=1.0, verify_images="off", max_train_samples=None, max_eval_samples=None
    )
    train, evaluation = load_train_and_eval(everything)
    report = Report(train.source, train.format)
    named = {"training": train} | ({"evaluation": evaluation} if evaluation else {})
    pictures = Pictures([data.dataset for data in named.values()])
    sides = [_Side(name, data, rows) for (name, data), rows in zip(named.items(), pictures.rows, strict=True)]
    started = time.perf_counter()
    show = progress("Images") if progress else None
    limits: dict[str, Any] = {"max_pixels": data_args.max_pixels, "processes": processes}
    facts = inspect_images(pictures, len(pictures), progress=show, **limits)
    seconds = time.perf_counter() - started
    _report_quarantine(report, sides)
    _report_images(report, pictures, facts, seconds)
    _report_look_alikes(report, sides, pictures, facts)
    usable = _usable(report, sides, facts, data_args)
    texts = None
    for side in usable:
        found = read_texts(side.data.dataset)
        report_texts(report, side.name, found, texts)
        texts = texts or found
        _report_sharing(report, side, facts)
    if model_args is not None:
        _report_model(report, usable, facts, data_args, model_args, processes)
    return report


def _report_quarantine(report: Report, sides: Sequence[_Side]) -> None:
    for side in sides:
        rows = side.data.quarantine.rows
        for kind in dict.fromkeys(row.kind for row in rows):
            of_kind = [row for row in rows if row.kind == kind]
            named = [row.reason if row.id in row.reason else f"{row.id}: {row.reason}" for row in of_kind]
            report.add("error", kind, named,
                       f"{many(len(of_kind), f'{side.name} row', f'{side.name} rows')} cannot be used: {kind}.",
                       "Mend or remove them.")  # fmt: skip


def _report_images(report: Report, pictures: Pictures, facts: Sequence[ImageFacts], seconds: float) -> None:
    for kind, advice in ADVICE.items():
        bad = [number for number, image in enumerate(facts) if image.kind == kind]
        said = [facts[number].problem.replace(UNNAMED, pictures.name(number), 1) for number in bad[:EXAMPLES]]
        report.add("error", f"image {kind}", said, f"{many(len(bad), 'image is', 'images are')} {kind}.", advice,
                   _shown(pictures, bad), count=len(bad))  # fmt: skip
    for note, (level, one, more, what) in NOTES.items():
        some = [number for number, image in enumerate(facts) if note in image.notes]
        names = [pictures.name(number) for number in some[:EXAMPLES]]
        report.add(level, note, names, f"{many(len(some), one, more)} {what}", "",  # type: ignore[arg-type]
                   _shown(pictures, some), count=len(some))  # fmt: skip
    good = [image for image in facts if not image.kind]
    report.numbers["images"] = {
        "images": len(facts),
        "bad": len(facts) - len(good),
        "bytes": sum(image.n_bytes for image in facts),
        "formats": dict(Counter(image.format for image in good).most_common()),
        "modes": dict(Counter(image.mode for image in good).most_common()),
        "seconds": round(seconds, 2),
        "images_per_second": round(len(facts) / max(seconds, 1e-9), 1),
    }
    report.histograms["Longer side of an image, pixels"] = histogram([max(image.size) for image in good])
    report.histograms["Shorter side of an image, pixels"] = histogram([min(image.size) for image in good])


def _shown(pictures: Pictures, numbers: Iterable[int]) -> Iterator[tuple[str, ImageRef]]:
    return ((pictures.name(number), pictures[number]) for number in numbers)


def _report_look_alikes(
    report: Report, sides: Sequence[_Side], pictures: Pictures, facts: Sequence[ImageFacts]
) -> None:
    groups = look_alikes(facts)
    on_side = [{number for row in side.rows for number in row} for side in sides]
    # One file on both sides needs no hash to be found, and no second file to form a group.
    both = sorted(on_side[0] & on_side[1]) if len(on_side) > 1 else []
    across = [group for group in groups if len(on_side) > 1 and all(side.intersection(group) for side in on_side)]
    report.add("warning", "same image on both sides", [pictures.name(number) for number in both[:EXAMPLES]],
               f"{many(len(both), 'image is', 'images are')} in the training and in the evaluation data.",
               "Split by image: validation_fraction does.", _shown(pictures, both), count=len(both))  # fmt: skip
    report.add("warning", "alike on both sides", [_named(group, pictures) for group in across[:EXAMPLES]],
               f"{many(len(across), 'group', 'groups')} of images that are equal or look alike lie on both sides: "
               "scores of them say little.", "Take one side's out.",
               _shown(pictures, (number for group in across for number in group[:2])), count=len(across))  # fmt: skip
    equal = [group for group in groups if len({facts[number].key for number in group}) == 1]
    near = [group for group in groups if len({facts[number].key for number in group}) > 1]
    for kind, some, what in (
        ("equal images", equal, "the same bytes under other names"),
        ("look alike", near, "nearly the same picture"),
    ):
        count = sum(len(group) for group in some)
        report.add("note", kind, [_named(group, pictures) for group in some[:EXAMPLES]],
                   f"{count:,} images in {many(len(some), 'group', 'groups')} have {what}.", "",
                   _shown(pictures, (number for group in some for number in group[:2])), count=count)  # fmt: skip


def _named(group: Sequence[int], pictures: Pictures) -> str:
    names = ("/".join(Path(pictures.name(number)).parts[-3:]) for number in group[:4])
    return " = ".join(names) + (f" and {len(group) - 4:,} more" if len(group) > 4 else "")


def _usable(report: Report, sides: Sequence[_Side], facts: Sequence[ImageFacts], args: VLMDataArguments) -> list[_Side]:
    """Leave out rows with bad images, say whether training would refuse that, and draw what it would draw."""
    found_first = FOUND_BY[args.verify_images]
    bad = {number: image.kind for number, image in enumerate(facts) if image.kind}
    kept: list[_Side] = []
    counts: list[tuple[int, int]] = []
    later = 0
    for side in sides:
        kinds = [[bad[number] for number in row if number in bad] for row in side.rows]
        seen = sum(any(kind in found_first for kind in row) for row in kinds)
        later += sum(bool(row) and not any(kind in found_first for kind in row) for row in kinds)
        counts.append((len(side.data.quarantine) + seen, len(side.data.quarantine) + len(kinds)))
        rows = np.flatnonzero([not row for row in kinds])
        data = side.data
        limit = args.max_train_samples if side.name == "training" else args.max_eval_samples
        chosen = rows[drawn(len(rows), limit, args.split_seed)].tolist()
        dataset = data.dataset if len(chosen) == len(kinds) else data.dataset.select(chosen)
        kept.append(_Side(side.name, replace(data, dataset=dataset), [side.rows[index] for index in chosen]))
        report.numbers[side.name] = {
            "rows": len(kinds) + len(data.quarantine),
            "set_aside": len(data.quarantine) + len(kinds) - len(rows),
            "used": len(chosen),
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
            f"{many(later, 'row has', 'rows have')} an image that verify_images {args.verify_images!r} does not find "
            "bad: the run would stop there. Set verify_images: full, or mend the images"
        )
    report.refused += [f"no {side.name} row is left" for side in kept if not side.rows]
    return [side for side in kept if side.rows]


def _keys(side: _Side, facts: Sequence[ImageFacts]) -> list[str]:
    return [" ".join(facts[number].key for number in row) for row in side.rows]


def _report_sharing(report: Report, side: _Side, facts: Sequence[ImageFacts]) -> None:
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
    facts: Sequence[ImageFacts],
    data_args: VLMDataArguments,
    model_args: BaseModelArguments,
    processes: int | None,
) -> None:
    # Importing the models' code takes seconds; a check without a model does not need it.
    from vlmtune.batching.encode import Encoder
    from vlmtune.batching.masks import why_not_shared
    from vlmtune.inspection.tokens import measure, report_tokens, sharing
    from vlmtune.models.families import get_family
    from vlmtune.models.loading import load_config, load_processor, require_dtype
    from vlmtune.models.quantization import get_torch_dtype

    origin: dict[str, Any] = {
        "revision": model_args.model_revision,
        "trust_remote_code": model_args.trust_remote_code,
    }
    family = get_family(load_config(model_args.model_name_or_path, **origin), model_args.model_type)
    processor = load_processor(model_args.model_name_or_path, **origin, image_max_pixels=model_args.image_max_pixels)
    encoder = Encoder(processor, family, max_pixels=data_args.max_pixels)
    not_shared = why_not_shared(family, model_args.attn_implementation)
    if data_args.share_images == "on" and not_shared:
        report.refused.append(f"share_images is on, but {not_shared}")
    try:
        require_dtype(family, get_torch_dtype(model_args.torch_dtype))
    except VlmtuneError as error:
        report.refused.append(str(error))
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
        uses = not_shared is None and data_args.share_images != "off"
        report.numbers[f"{side.name} tokens"] |= {
            "sharing": sharing(_keys(side, facts), found),
            "sharing_is_used": uses,
        }

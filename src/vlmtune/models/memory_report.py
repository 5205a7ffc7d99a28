"""Estimates of memory as tables for people: what fits where, and what would make it fit."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from vlmtune.errors import ConfigError
from vlmtune.models.memory import MemoryEstimator, Settings
from vlmtune.models.memory_images import largest_size, soft_tokens

GB = 10**9
GPU_SIZES = (8, 12, 16, 24, 40, 48, 80, 141)
# Left free on a GPU for the CUDA context and fragmentation.
USABLE = 0.95
# Rough factors of time: a second forward pass; unpacking weights in every layer; emptier matrices.
SLOWER = {"checkpointing": 1.33, "4bit": 1.3, "batch": 1.05, "batch of 1": 1.15}
# Limits of an image's pixels that are tried where nothing else makes a run fit.
PIXELS = tuple(2**power for power in range(23, 9, -1))


@dataclass(frozen=True)
class Change:
    """A change of settings, by the recipe's options, about how much slower it makes a step, and bytes at the peak.

    Smaller images make it no slower; what they cost is detail.
    """

    options: str
    slower: float
    total: int


def changes(estimator: MemoryEstimator, settings: Settings, size_gb: float) -> list[Change]:
    """Return the changes of settings with which a run fits a GPU, the one that costs least speed first.

    A limit of an image's pixels is among them where a model's tokens depend on it and nothing else is enough: the
    largest that is enough, of powers of two, since less is seen on smaller images.

    Args:
        estimator: of the model.
        settings: that do not fit.
        size_gb: memory of the GPU, in 10**9 bytes.
    """
    found = _fitting(estimator, settings, settings, size_gb)
    if not found:
        bits = 4 if estimator.quantisable else settings.bits
        smaller = _smaller_images(estimator, settings)
        first = _first(
            smaller, lambda less: _one_fits(estimator, replace(less, checkpointing=True, bits=bits), size_gb)
        )
        fitting = (_fitting(estimator, settings, less, size_gb) for less in smaller[first:])
        found = next((changed for changed in fitting if changed), [])
    return sorted(found, key=lambda change: (change.slower, change.total))


def _smaller_images(estimator: MemoryEstimator, settings: Settings) -> list[Settings]:
    """The settings with each limit of an image's pixels that leaves it fewer tokens, the largest limit first."""
    size, found = settings.batch.size, list[Settings]()
    if size is None or not settings.batch.images:
        return found
    fewest = soft_tokens(estimator.processor, estimator.family, size)
    for pixels in PIXELS:
        try:
            processor = estimator.limited(pixels)
        except ConfigError:
            break
        if settings.largest_images:
            size = largest_size(processor, estimator.family)
        tokens = soft_tokens(processor, estimator.family, size)
        if tokens < fewest:
            found.append(replace(settings, batch=replace(settings.batch, size=size, image_max_pixels=pixels)))
            fewest = tokens
    return found


def _first(smaller: Sequence[Settings], fits: Callable[[Settings], bool]) -> int:
    """The index of the first that fits, or their number: looked for near the largest, where it mostly lies.

    Each look takes a trace, so the smallest is asked first whether there is any.
    """
    if not smaller or not fits(smaller[-1]):
        return len(smaller)
    known, step = 0, 1
    while not fits(smaller[step - 1]):
        known, step = step, min(step * 2, len(smaller))
    return bisect_left(smaller, True, known, step - 1, key=fits)


def _one_fits(estimator: MemoryEstimator, settings: Settings, size_gb: float) -> bool:
    """Whether a step of one sample fits: where it does not, larger ones need no trace."""
    one = replace(settings, batch=replace(settings.batch, samples=1))
    several = replace(one, accumulation=settings.accumulation * settings.batch.samples)
    return min(estimator.estimate(step).total for step in (one, several)) <= size_gb * GB * USABLE


def _fitting(estimator: MemoryEstimator, old: Settings, settings: Settings, size_gb: float) -> list[Change]:
    """The changes of everything but the images with which ``settings`` fit, as changes of ``old``."""
    found: list[Change] = []
    samples = settings.batch.samples
    for bits in {settings.bits, 4} if estimator.quantisable else {settings.bits}:
        for checkpointing in {settings.checkpointing, True}:
            if not _one_fits(estimator, replace(settings, checkpointing=checkpointing, bits=bits), size_gb):
                continue
            for batch in (n for n in range(samples, 0, -1) if samples % n == 0):
                changed = replace(
                    settings,
                    batch=replace(settings.batch, samples=batch),
                    accumulation=settings.accumulation * samples // batch,
                    checkpointing=checkpointing,
                    bits=bits,
                )
                total = estimator.estimate(changed, largest=samples).total
                if total <= size_gb * GB * USABLE:
                    found.append(_change(old, changed, total))
                    break
    return found


def format_estimate(estimator: MemoryEstimator, settings: Settings) -> str:
    """Return parameters by part, and memory by kind with and without checkpointing, as two tables."""
    plain, again = (estimator.estimate(replace(settings, checkpointing=on)) for on in (False, True))
    rows = [("part", "parameters", "trainable", "weights")]
    for part, entry in plain.parts.items():
        rows.append((part, f"{entry['total']:,}", f"{entry['trainable']:,}", gigabytes(entry["bytes"])))
    columns = ["without checkpointing", "with checkpointing"]
    columns[settings.checkpointing] += " (as set)"
    kinds = [("on each device, at most", *columns)]
    kinds += [
        (k, gigabytes(size), gigabytes(again.kinds[k])) for k, size in plain.kinds.items() if size or again.kinds[k]
    ]
    kinds.append(("together, at the peak", gigabytes(plain.total), gigabytes(again.total)))
    return format_table(rows) + "\n\n" + format_table(kinds)


def format_fits(estimator: MemoryEstimator, settings: Settings) -> str:
    """Return for each size of GPU whether the run fits, and the change with which it would at the least cost."""
    total = estimator.estimate(settings).total
    lines = []
    for size in GPU_SIZES:
        if total <= size * GB * USABLE:
            lines.append(f"{size:>4} GB  fits, {gigabytes(round(size * GB * USABLE) - total)} to spare")
            continue
        found = changes(estimator, settings, size)
        what = f"; would with {_shown(found[0])}" if found else f", nor with {_tried(estimator, settings)}"
        lines.append(f"{size:>4} GB  does not fit{what}")
    return "\n".join(lines)


def format_changes(estimator: MemoryEstimator, settings: Settings, size_gb: float) -> str:
    """Return all changes with which a run fits a GPU of one size, the cheapest first."""
    total = estimator.estimate(settings).total
    if total <= size_gb * GB * USABLE:
        return f"It fits {size_gb:g} GB as it is ({gigabytes(total)})."
    found = changes(estimator, settings, size_gb)
    if not found:
        return f"It does not fit {size_gb:g} GB ({gigabytes(total)}), nor with {_tried(estimator, settings)}."
    return "\n".join([f"It would fit {size_gb:g} GB with:", *(f"  {_shown(change)}" for change in found)])


def format_ways(ways: Mapping[str, tuple[MemoryEstimator, int]], settings: Settings) -> str:
    """Return the peak of each way of training, on one device and shared out by each strategy.

    Args:
        ways: name -> its estimator and the bits of its frozen weights.
        settings: of the run; 8 devices where it has one.
    """
    devices = settings.devices if settings.devices > 1 else 8
    strategies = ("ddp", "fsdp", "zero1", "zero2", "zero3")
    rows = [("at the peak, on each device", "1 device", *(f"{devices} {name}" for name in strategies))]
    for name, (estimator, bits) in ways.items():
        one = replace(settings, bits=bits, devices=1, strategy="ddp")
        shared = [replace(one, devices=devices, strategy=strategy) for strategy in strategies]
        rows.append((name, *(gigabytes(estimator.estimate(each).total) for each in (one, *shared))))
    return format_table(rows)


def gigabytes(size: int) -> str:
    """Return bytes as text, in GB of 10**9 bytes."""
    return f"{size / GB:,.2f} GB" if size >= 10**7 or not size else f"{size / 10**6:,.2f} MB"


def format_table(rows: Sequence[tuple[str, ...]]) -> str:
    """Return rows as aligned columns, numbers on the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    )


def _change(old: Settings, new: Settings, total: int) -> Change:
    options, slower = [], 1.0
    if new.batch.samples != old.batch.samples:
        options.append(
            f"per_device_train_batch_size: {new.batch.samples}, gradient_accumulation_steps: {new.accumulation}"
        )
        slower *= SLOWER["batch of 1" if new.batch.samples == 1 else "batch"]
    if new.checkpointing != old.checkpointing:
        options.append("activation_checkpointing: true")
        slower *= SLOWER["checkpointing"]
    if new.bits != old.bits:
        options.append("use_4bit: true")
        slower *= SLOWER["4bit"]
    if new.batch.image_max_pixels is not None:
        options.append(f"image_max_pixels: {new.batch.image_max_pixels}")
    return Change(", ".join(options), slower, total)


def _shown(change: Change) -> str:
    return f"{change.options} ({gigabytes(change.total)}, a step about {change.slower:.2g} times as long)"


def _tried(estimator: MemoryEstimator, settings: Settings) -> str:
    tried = ["a batch of 1", "checkpointing", *["4 bits"][: estimator.quantisable]]
    tried += [f"image_max_pixels: {less.batch.image_max_pixels}" for less in _smaller_images(estimator, settings)[-1:]]
    return f"{', '.join(tried[:-1])} and {tried[-1]}"

"""Seconds an epoch and peak memory as images, texts an image and image tokens grow 1, 2, 4 and 8 times.

A small random-weight Gemma-3 (3M parameters) learns captions; a step takes the texts of four images. Each point
is a process of its own; its time is the median of the epochs after the first. The slope is that of a line
through the points on logarithmic axes: 1 means twice the amount takes twice as long, 0 that it costs nothing.

python benchmarks/scaling.py [--images 8] [--texts 4] [--tokens 64] [--epochs 3] [--modes separate,shared]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from _common import (
    PROMPT,
    QUIET,
    RESULTS,
    flags_of,
    header,
    in_own_process,
    make_folder,
    make_model,
    markdown,
    now,
    peak_memory_gib,
    pyplot,
    sizes_of,
    vlmtune_trainer,
    write,
)

TIMES = (1, 2, 4, 8)
AXES = {"images": "images", "texts": "texts an image", "tokens": "tokens an image"}
COLORS = {"separate": "#9aa0a6", "shared": "#4285f4", "cached": "#1a56c4"}
IMAGES_A_STEP = 4


def worker(args: argparse.Namespace) -> None:
    """Train at one point and print its figures as the last line."""
    from transformers import TrainerCallback

    from vlmtune.config import TrainingArguments
    from vlmtune.data.loading import load_samples

    class Epochs(TrainerCallback):
        def __init__(self) -> None:
            self.starts: list[float] = []
            self.seconds: list[float] = []

        def on_epoch_begin(self, *_: Any, **__: Any) -> None:
            self.starts.append(now())

        def on_epoch_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(now() - self.starts[-1])

    epochs = Epochs()
    options = QUIET | {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": IMAGES_A_STEP * args.texts,
        "num_train_epochs": args.epochs,
        "learning_rate": 1e-4,
        "warmup_steps": 0,
        "gradient_checkpointing": False,
        "dataloader_num_workers": 0,
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder, model = Path(scratch) / "data", Path(scratch) / "model"
        make_folder(folder, images=args.images, texts=args.texts)
        make_model(model, sizes_of(args.size, args.tokens))
        data = load_samples(str(folder), prompt=PROMPT).dataset
        trainer, _ = vlmtune_trainer(
            args.worker, str(model), data, TrainingArguments(**options), callbacks=[epochs], shuffle=True
        )
        before = peak_memory_gib()
        trainer.train()
    timed = epochs.seconds[1:] or epochs.seconds
    peak = peak_memory_gib()
    print(json.dumps({"seconds": statistics.median(timed), "peak_gib": peak, "step_gib": peak - before}))


def square(tokens: int) -> int:
    """The square number nearest to ``tokens``: an image's tokens are a square of patches."""
    return round(tokens**0.5) ** 2


def slope(xs: list[float], ys: list[float]) -> float:
    """Slope of the least-squares line through the points on logarithmic axes."""
    import numpy as np

    ys = [max(y, 1e-4) for y in ys]
    return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])


def plot(points: list[dict[str, Any]], slopes: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    """Draw seconds, on logarithmic axes, and memory over each amount."""
    plt = pyplot()
    figure, panels = plt.subplots(2, len(AXES), figsize=(12, 6.5), sharey="row", squeeze=False)
    for row, (key, label) in enumerate((("seconds", "seconds an epoch"), ("peak_gib", "peak memory, GiB"))):
        for panel, (axis, name) in zip(panels[row], AXES.items(), strict=True):
            for mode, found in slopes[axis].items():
                mine = along(points, axis, mode)
                xs = [point[axis] for point in mine]
                text = f"{mode}, slope {found['seconds']:.2f}" if key == "seconds" else mode
                panel.plot(xs, [point[key] for point in mine], "o-", color=COLORS[mode], label=text)
            panel.set_xscale("log")
            panel.set_xticks(xs, [str(x) for x in xs])
            panel.set_xticks([], minor=True)
            panel.set_xlabel(name)
            panel.legend(frameon=False)
            if key == "seconds":
                panel.set_yscale("log")
                panel.yaxis.set_major_locator(plt.LogLocator(subs=(1, 2, 5)))
                panel.yaxis.set_major_formatter("{x:g}")
                panel.yaxis.set_minor_locator(plt.NullLocator())
        panels[row][0].set_ylabel(label)
    # The panels of a row share this axis: a limit set while drawing would hide what the later ones hold.
    panels[1][0].set_ylim(bottom=0)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def along(points: list[dict[str, Any]], axis: str, mode: str) -> list[dict[str, Any]]:
    """The points of one mode in which one amount grows, in its order."""
    mine = [point for point in points if axis in point["axes"] and point["mode"] == mode]
    return sorted(mine, key=lambda point: point[axis])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8, help="images, where another amount grows, and at once")
    parser.add_argument("--texts", type=int, default=4, help="texts an image, where another amount grows")
    parser.add_argument("--tokens", type=int, default=64, help="tokens an image, where another amount grows")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--size", default="mini", choices=("tiny", "mini", "small"))
    parser.add_argument("--modes", default="separate,shared", help="of separate, shared and cached")
    parser.add_argument("--worker", choices=tuple(COLORS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    base = {"images": args.images, "texts": args.texts, "tokens": square(args.tokens)}
    # Texts grow from one; the other amounts from their base.
    starts = base | {"texts": 1}
    modes = args.modes.split(",")
    wanted: dict[tuple[Any, ...], list[str]] = {}
    for axis, start in starts.items():
        for times in TIMES:
            amount = square(start * times) if axis == "tokens" else start * times
            wanted.setdefault(tuple((base | {axis: amount}).items()), []).append(axis)
    points = []
    for amounts, axes in wanted.items():
        for mode in modes:
            given = argparse.Namespace(**dict(amounts), epochs=args.epochs, size=args.size)
            flags = flags_of(given, *starts, "epochs", "size")
            points.append({"mode": mode, "axes": axes} | dict(amounts) | in_own_process(__file__, mode, flags))
            print(points[-1], file=sys.stderr)
    slopes: dict[str, dict[str, dict[str, float]]] = {}
    rows = []
    for axis, name in AXES.items():
        slopes[axis] = {}
        for mode in modes:
            mine = along(points, axis, mode)
            xs = [point[axis] for point in mine]
            found = {key: slope(xs, [point[key] for point in mine]) for key in ("seconds", "step_gib")}
            slopes[axis][mode] = found
            seconds, peaks = ([f"{point[key]:.2f}" for point in mine] for key in ("seconds", "peak_gib"))
            rows.append(
                [
                    *(name, mode, ", ".join(map(str, xs)), ", ".join(seconds), f"{found['seconds']:.2f}"),
                    *(", ".join(peaks), f"{found['step_gib']:.2f}"),
                ]
            )
    columns = ["what grows", "rows", "amounts", "seconds an epoch", "slope", "peak memory, GiB", "slope of training's"]
    table = markdown(columns, rows)
    table += f"\n\nOther amounts: {args.images} images, {args.texts} texts an image, {base['tokens']} tokens an image. "
    table += "Peak memory is the process's, libraries and weights included; the slope is that of what training adds."
    points.sort(key=lambda point: [point[axis] for axis in AXES])
    write("scaling", {"about": header(args), "points": points, "slopes": slopes}, table)
    plot(points, slopes, RESULTS / "scaling.png")


if __name__ == "__main__":
    main()

"""Seconds until the demo's model answers easy-VQA at 90 %: an image's questions computed together, or one by one.

The modes train alike (the demo's recipe; per seed the same adapters, learning rates and samples a step), each in
a process of its own, in turn. Every few steps the clock stops and the model answers a fixed set of test
questions. Filling the feature cache counts; loading and evaluation do not.

python benchmarks/time_to_accuracy.py [--model FOLDER] [--seeds 3] [--target 90] [--questions 500]

A mode is `separate`, `shared`, or `cached` (shared, with image features computed once: what vlmtune does by
default). `shared-3` has at most 3 questions of an image in one step, `shared@64` has 64 questions in a step instead of
the recipe's, and `shared:2e-3` has another learning rate; `shared-3@64:2e-3` has all of these.

Seconds of the processor are printed beside seconds of the clock: other work on the machine changes them less.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
import time
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from _common import (
    QUIET,
    RESULTS,
    demo_model,
    flags_of,
    header,
    in_own_process,
    markdown,
    now,
    pyplot,
    vlmtune_trainer,
    write,
)

COLORS = {"separate": "#9aa0a6", "shared": "#4285f4", "cached": "#1a56c4"}
MODE = re.compile(r"(?P<kind>separate|shared|cached)(-(?P<most>\d+))?(@(?P<batch>\d+))?(:(?P<rate>[\d.e-]+))?")


def watcher(args: argparse.Namespace, answer_all: Any) -> Any:
    """Make a trainer callback whose clock runs while the model trains, and which stops the run at the target."""
    from transformers import TrainerCallback

    class Watcher(TrainerCallback):
        def __init__(self) -> None:
            self.points: list[dict[str, float]] = []
            self.seconds, self.cpu_seconds, self.trainer = 0.0, 0.0, None

        def start(self) -> None:
            self.since, self.cpu_since = now(), time.process_time()

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.start()

        def on_step_end(self, _: Any, state: Any, control: Any, **__: Any) -> None:
            if state.global_step % args.every and state.global_step < state.max_steps:
                return
            self.seconds += now() - self.since
            self.cpu_seconds += time.process_time() - self.cpu_since
            accuracy = answer_all()
            work = self.trainer.work
            self.points.append(
                {
                    "step": state.global_step,
                    "samples": work.samples,
                    "images": work.images,
                    "seconds": round(self.seconds, 2),
                    "cpu_seconds": round(self.cpu_seconds, 2),
                    "right": round(accuracy, 2),
                }
            )
            print(self.points[-1], file=sys.stderr, flush=True)
            if accuracy >= args.target and not args.whole:
                control.should_training_stop = True
            self.start()

    return Watcher()


def worker(args: argparse.Namespace) -> None:
    """Train in one mode and print the curve as the last line."""
    from vlmtune.config import GenerationArguments, parse_recipe
    from vlmtune.data.loading import load_samples, subset
    from vlmtune.data.sample import Sample
    from vlmtune.evaluation.generation import AnswerGenerator
    from vlmtune.evaluation.metrics import get_metric
    from vlmtune.models.loading import load_processor

    mode = MODE.fullmatch(args.worker)
    assert mode is not None, args.worker
    flags = ["--model_name_or_path", args.model, "--output_dir", tempfile.mkdtemp(), "--seed", str(args.seed)]
    flags += ["--max_steps", str(args.max_steps)] if args.max_steps > 0 else []
    flags += ["--per_device_train_batch_size", mode["batch"]] if mode["batch"] else []
    flags += ["--learning_rate", mode["rate"]] if mode["rate"] else []
    recipe = parse_recipe(flags, Path(str(resources.files("vlmtune.demo") / "recipes" / "easy_vqa.yaml")))
    for name, value in QUIET.items():
        setattr(recipe.training, name, value)
    test = subset(load_samples("easy-vqa", split="test"), args.questions, seed=0).dataset
    samples = [Sample.from_row(row) for row in test]
    references = [sample.references for sample in samples]

    def answer_all() -> float:
        options = GenerationArguments(max_new_tokens=12, eval_batch_size=32)
        generator = AnswerGenerator(trainer.model, load_processor(args.model), options)
        answers = [answer.text for answer in generator(samples)]
        return 100 * float(get_metric("exact_match").compute(answers, references).value)

    callback = watcher(args, answer_all)
    trainer, filling = vlmtune_trainer(
        mode["kind"],
        args.model,
        load_samples("easy-vqa", split="train").dataset,
        recipe.training,
        shuffle=True,
        lora=(recipe.model.lora_r, recipe.model.lora_alpha),
        max_texts=int(mode["most"]) if mode["most"] else None,
        callbacks=[callback],
    )
    callback.trainer, callback.seconds, callback.cpu_seconds = trainer, filling.seconds, filling.cpu_seconds
    trainer.train()
    print(json.dumps({"seed": args.seed, "filling": filling.seconds, "points": callback.points}))


def reached(run: dict[str, Any], target: float) -> dict[str, float] | None:
    """The first point of a run at or above the target."""
    return next((point for point in run["points"] if point["right"] >= target), None)


def summary(runs: dict[str, list[dict[str, Any]]], target: float) -> dict[str, dict[str, Any]]:
    """Medians over the seeds; none where a seed did not reach the target."""
    found: dict[str, dict[str, Any]] = {}
    for mode, done in runs.items():
        hits = [reached(run, target) for run in done]
        found[mode] = {}
        for name in ("seconds", "cpu_seconds", "samples", "images"):
            found[mode][name] = statistics.median(hit[name] for hit in hits if hit) if all(hits) else None
            found[mode][f"{name}_each"] = [hit and hit[name] for hit in hits]
    return found


def by_samples(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Table of the mean accuracy after as many samples, so that grouping's cost per sample can be seen."""
    every = [run["points"] for done in runs.values() for run in done]
    # A run that has reached the target stops: later rows would compare what remains of the seeds.
    first = max(points[0]["samples"] for points in every)
    last = min(points[-1]["samples"] for points in every)
    rows = []
    for seen in np.linspace(first, last, 8):
        row = [f"{seen:,.0f}"]
        for done in runs.values():
            curves = [[(point["samples"], point["right"]) for point in run["points"]] for run in done]
            row.append(f"{statistics.mean(np.interp(seen, *zip(*curve, strict=True)) for curve in curves):.1f} %")
        rows.append(row)
    return markdown(["samples seen", *runs], rows)


def plot(runs: dict[str, list[dict[str, Any]]], target: float, path: Path) -> None:
    """Draw accuracy over time and over samples seen, a line a run."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for axis, key, label in ((axes[0], "cpu_seconds", "processor seconds"), (axes[1], "samples", "samples seen")):
        for number, (mode, done) in enumerate(runs.items()):
            plain = mode in COLORS
            style = "-" if plain else ("--", ":", "-.")[number % 3]
            for index, run in enumerate(done):
                xs, ys = [point[key] for point in run["points"]], [point["right"] for point in run["points"]]
                color = COLORS[mode if plain else MODE.fullmatch(mode)["kind"]]
                axis.plot(xs, ys, style, color=color, alpha=0.8, label=mode if not index else None)
        axis.axhline(target, color="black", linewidth=0.6)
        axis.set_xlabel(label)
    axes[0].set_ylabel("easy-VQA test questions right, %")
    axes[1].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def report(args: argparse.Namespace, runs: dict[str, list[dict[str, Any]]]) -> None:
    """Write the tables, the curves and the plot."""
    found = summary(runs, args.target)
    base = next(iter(runs))
    rows = []
    for mode, figures in found.items():
        row = [mode]
        for name in ("seconds", "cpu_seconds", "samples"):
            value, first = figures[name], found[base][name]
            each = ", ".join("not reached" if one is None else f"{one:,.0f}" for one in figures[f"{name}_each"])
            row += [each, f"{value / first:.2f}" if value and first else "-"]
        rows.append([*row, "-" if figures["images"] is None else f"{figures['images']:,.0f}"])
    columns = [f"seconds to {args.target:g} %, each seed", "processor's seconds", "samples seen till then"]
    columns = [text for column in columns for text in (column, f"of {base}")]
    table = markdown(["mode", *columns, "images computed"], rows)
    table += f"\n\nRatios and images are of medians; {args.questions} test questions every {args.every} steps. "
    table += "Accuracy by samples seen, means of the seeds, as far as every run went:\n\n"
    table += by_samples(runs)
    write("time_to_accuracy", {"about": header(args), "runs": runs, "summary": found}, table)
    plot(runs, args.target, RESULTS / "time_to_accuracy.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="a model's folder; by default the demo's, tiny for a random one")
    parser.add_argument("--modes", default="separate,shared,shared-3", help="separated by commas")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--target", type=float, default=90.0, help="percent right at which a run stops")
    parser.add_argument("--questions", type=int, default=500, help="test questions of each evaluation")
    parser.add_argument("--every", type=int, default=20, help="steps between evaluations")
    parser.add_argument("--max-steps", type=int, default=-1, help="by default the recipe's epoch")
    parser.add_argument("--whole", action="store_true", help="go on to the last step after the target")
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    with tempfile.TemporaryDirectory() as scratch:
        args.model = demo_model(args.model, scratch)
        runs: dict[str, list[dict[str, Any]]] = {mode: [] for mode in args.modes.split(",")}
        flags = flags_of(args, "model", "target", "questions", "every", "max_steps")
        flags += ["--whole"] if args.whole else []
        for seed in range(args.seeds):
            for mode, done in runs.items():
                done.append(in_own_process(__file__, mode, [*flags, "--seed", str(seed)]))
                last = done[-1]["points"][-1]
                print(
                    f"{mode}, seed {seed}: {last['right']:.1f} % after {last['seconds']:.0f} s and "
                    f"{last['samples']:,} samples",
                    file=sys.stderr,
                )
    report(args, runs)


if __name__ == "__main__":
    main()

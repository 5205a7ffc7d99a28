"""Seconds until the demo's model answers easy-VQA at 90 %: an image's questions computed together, or one by one.

The modes train alike (the demo's recipe; per seed the same adapters, learning rates and samples a step), each in
a process of its own, in turn. Every few steps the clock stops and the model answers a fixed set of test
questions. Filling the feature cache counts; loading and evaluation do not.

python benchmarks/time_to_accuracy.py [--model FOLDER] [--seeds 3] [--target 90] [--questions 500]

A mode is `separate`, `shared`, `cached` (shared, with image features computed once: what vlmtune does by
default), or one of the latter two with the most questions of an image in one batch, as `shared-3`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

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


def watcher(args: argparse.Namespace, answer_all: Any) -> Any:
    """Make a trainer callback whose clock runs while the model trains, and which stops the run at the target."""
    from transformers import TrainerCallback

    class Watcher(TrainerCallback):
        def __init__(self) -> None:
            self.points: list[dict[str, float]] = []
            self.seconds, self.since, self.trainer = 0.0, 0.0, None

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.since = now()

        def on_step_end(self, _: Any, state: Any, control: Any, **__: Any) -> None:
            if state.global_step % args.every and state.global_step < state.max_steps:
                return
            self.seconds += now() - self.since
            accuracy = answer_all()
            seen = self.trainer.work.samples
            self.points.append({"step": state.global_step, "samples": seen, "seconds": self.seconds, "right": accuracy})
            print(self.points[-1], file=sys.stderr, flush=True)
            if accuracy >= args.target and not args.whole:
                control.should_training_stop = True
            self.since = now()

    return Watcher()


def worker(args: argparse.Namespace) -> None:
    """Train in one mode and print the curve as the last line."""
    from vlmtune.config import GenerationArguments, parse_recipe
    from vlmtune.data.loading import load_samples, subset
    from vlmtune.data.sample import Sample
    from vlmtune.evaluation.generation import AnswerGenerator
    from vlmtune.evaluation.metrics import get_metric
    from vlmtune.models.loading import load_processor

    mode, _, most = args.worker.partition("-")
    flags = ["--model_name_or_path", args.model, "--output_dir", tempfile.mkdtemp(), "--seed", str(args.seed)]
    flags += ["--max_steps", str(args.max_steps)] if args.max_steps > 0 else []
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
        mode,
        args.model,
        load_samples("easy-vqa", split="train").dataset,
        recipe.training,
        shuffle=True,
        lora=(recipe.model.lora_r, recipe.model.lora_alpha),
        max_texts=int(most) if most else None,
        callbacks=[callback],
    )
    callback.trainer, callback.seconds = trainer, filling
    trainer.train()
    print(json.dumps({"seed": args.seed, "filling": filling, "points": callback.points}))


def reached(run: dict[str, Any], target: float) -> dict[str, float] | None:
    """The first point of a run at or above the target."""
    return next((point for point in run["points"] if point["right"] >= target), None)


def summary(runs: dict[str, list[dict[str, Any]]], target: float) -> dict[str, dict[str, Any]]:
    """Medians over the seeds; none where a seed did not reach the target."""
    found: dict[str, dict[str, Any]] = {}
    for mode, done in runs.items():
        hits = [reached(run, target) for run in done]
        found[mode] = {"seconds_each": [hit and round(hit["seconds"], 1) for hit in hits]}
        found[mode] |= {"samples_each": [hit and hit["samples"] for hit in hits]}
        whole = all(hits)
        for name in ("seconds", "samples"):
            found[mode][name] = statistics.median(hit[name] for hit in hits if hit) if whole else None
    return found


def by_samples(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Table of the mean accuracy after as many samples, so that grouping's cost per sample can be seen."""
    shared_steps = [{point["step"] for point in run["points"]} for done in runs.values() for run in done]
    steps = sorted(set.intersection(*shared_steps))
    # A run that has reached the target stops: later points would compare what remains of the seeds.
    shown = steps[:: max(1, -(-len(steps) // 12))]
    rows = []
    for step in shown:
        row = [f"{step:,}"]
        for done in runs.values():
            points = [next(point for point in run["points"] if point["step"] == step) for run in done]
            seen = statistics.mean(point["samples"] for point in points)
            row.append(f"{statistics.mean(point['right'] for point in points):.1f} % after {seen:,.0f}")
        rows.append(row)
    return markdown(["step", *runs], rows)


def plot(runs: dict[str, list[dict[str, Any]]], target: float, path: Path) -> None:
    """Draw accuracy over time and over samples seen, a line a run."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for axis, key, label in ((axes[0], "seconds", "seconds of training"), (axes[1], "samples", "samples seen")):
        for number, (mode, done) in enumerate(runs.items()):
            style = ("-", "--", ":")[min(number // 3, 2)] if "-" in mode else "-"
            for index, run in enumerate(done):
                xs, ys = [point[key] for point in run["points"]], [point["right"] for point in run["points"]]
                color = COLORS[mode.partition("-")[0]]
                axis.plot(xs, ys, style, color=color, alpha=0.8, label=mode if not index else None)
        axis.axhline(target, color="black", linewidth=0.6)
        axis.set_xlabel(label)
    axes[0].set_ylabel("easy-VQA test questions right, %")
    axes[1].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="a model's folder; by default the demo's, tiny for a random one")
    parser.add_argument("--modes", default="separate,shared,cached", help="separated by commas")
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
    found = summary(runs, args.target)
    first = next(iter(found.values()))["seconds"]
    rows = []
    for mode, figures in found.items():
        ratio = f"{figures['seconds'] / first:.2f}" if figures["seconds"] and first else "-"
        each = ", ".join("not reached" if value is None else f"{value:.0f}" for value in figures["seconds_each"])
        seen = "-" if figures["samples"] is None else f"{figures['samples']:,.0f}"
        rows.append([mode, "-" if figures["seconds"] is None else f"{figures['seconds']:.0f}", ratio, each, seen])
    columns = ["mode", f"seconds to {args.target:g} %", f"of {next(iter(runs))}", "each seed"]
    table = markdown([*columns, "samples seen till then"], rows)
    table += f"\n\nMedians of {args.seeds} seeds; {args.questions} test questions every {args.every} steps. "
    table += "Accuracy by samples seen, means of the seeds, as far as every run went:\n\n"
    table += by_samples(runs)
    write("time_to_accuracy", {"about": header(args), "runs": runs, "summary": found}, table)
    plot(runs, args.target, RESULTS / "time_to_accuracy.png")


if __name__ == "__main__":
    main()

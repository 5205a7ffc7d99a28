"""Processor time of scoring captions and of bootstrap intervals, on one core.

Captions are random sentences of the benchmarks' words and 5,000 rare ones: five references an image and an answer that
shares words with one of them. Every figure is the median of the repeats, each with an empty cache of the tokenizer.
The goals: CIDEr on 5,000 images within 4 s, 1,000 resamples of 5,000 samples within 2 s; the script fails where one
is missed.

OMP_NUM_THREADS=1 python benchmarks/metrics.py [--samples 5000] [--repeats 3]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

# Before numpy loads: it starts as many threads as there are cores.
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

from _common import WORDS, header, markdown, write


def sentences(samples: int) -> tuple[list[str], list[list[str]]]:
    """Return answers and five references of each, of 8 to 14 words."""
    words = random.Random(0)
    # Most words of a real vocabulary are rare.
    vocabulary = [*WORDS * 20, *(f"word{number}" for number in range(5000))]
    references = [
        [" ".join(words.choices(vocabulary, k=words.randint(8, 14))) + " ." for _ in range(5)] for _ in range(samples)
    ]
    answers = []
    for options in references:
        said = words.choice(options).split()[:-1]
        answers.append(" ".join(word if words.random() < 0.7 else words.choice(vocabulary) for word in said))
    return answers, references


def boxes(samples: int) -> tuple[list[str], list[list[str]]]:
    """Return answers and references of one to five boxes of three labels, a few pixels apart."""
    rng = random.Random(0)
    answers, references = [], []
    for _ in range(samples):
        said, wanted = [], []
        for _ in range(rng.randint(1, 5)):
            x, y, shift, label = rng.randrange(400), rng.randrange(300), rng.randrange(12), rng.choice(WORDS[10:13])
            wanted.append({"bbox": [x, y, x + 60, y + 40], "label": label})
            box = [x + shift, y, x + shift + 60, y + 40]
            said.append({"bbox": box, "label": label, "score": round(rng.random(), 3)})
        answers.append(json.dumps(said))
        references.append([json.dumps(wanted)])
    return answers, references


def timed(work: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Return the median seconds of the processor, and what came of it."""
    seconds = []
    for _ in range(repeats):
        started = time.process_time()
        found = work()
        seconds.append(time.process_time() - started)
    return statistics.median(seconds), found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    from vlmtune.evaluation.metrics import get_metric
    from vlmtune.evaluation.metrics.bootstrap import RESAMPLES, interval
    from vlmtune.evaluation.metrics.ptb import _split, tokenize

    def scored(name: str, data: tuple[list[str], list[list[str]]]) -> Any:
        # The tokenizer remembers words, so that a metric after another would be the faster.
        _split.cache_clear()
        return get_metric(name).compute(*data)

    def tokenized() -> None:
        _split.cache_clear()
        for options in captions[1]:
            for text in options:
                tokenize(text)

    captions, detections = sentences(args.samples), boxes(args.samples)
    runs, rows = {}, []
    for name in ("exact_match", "bleu4", "rouge_l", "cider", "map"):
        data = detections if name == "map" else captions
        scoring, scores = timed(partial(scored, name, data), args.repeats)
        drawing, _ = timed(partial(interval, scores), args.repeats)
        runs[name] = {"seconds": scoring, "interval": drawing, "value": scores.value}
        rows.append([name, f"{scoring:.2f}", f"{drawing:.2f}"])
    tokens, _ = timed(tokenized, args.repeats)
    limits = [("cider", "seconds", 4.0), *((name, "interval", 2.0) for name in runs)]
    missed = [f"{name}: {runs[name][what]:.2f} s, {limit:.0f} allowed" for name, what, limit in limits
              if runs[name][what] > limit]  # fmt: skip
    table = markdown(["metric", "scoring, s", f"interval of {RESAMPLES:,} resamples, s"], rows)
    table += (
        f"\n\n{args.samples:,} samples, five references each (boxes: one to five), processor time of one core; medians "
    )
    table += (
        f"of {args.repeats} runs. The tokenizer takes {tokens:.2f} s of a caption metric's time for the references."
    )
    goals = "Goals (CIDEr within 4 s, an interval within 2 s): "
    table += f"\n\n{goals}{'missed, ' + '; '.join(missed) if missed else 'met'}."
    write("metrics", {"about": header(args), "runs": runs, "tokenizer": tokens, "missed": missed}, table)
    if missed:
        raise SystemExit("; ".join(missed))


if __name__ == "__main__":
    main()

"""Two processes give the evaluation of one: each answers its part, the first writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def evaluated(data, family_dir, tmp_path_factory):
    """Folders of the same evaluation by one process and by two, and what they printed."""
    root = tmp_path_factory.mktemp("evaluated")
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    said = {}
    for ranks in (1, 2):
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if ranks > 1 else []
        flags = {
            "model_name_or_path": family_dir("gemma3"),
            "dataset_path": data.images,
            "evaluation_dir": root / str(ranks),
            "torch_dtype": "float32",
            "max_new_tokens": 4,
            "eval_batch_size": 2,
        }
        given = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
        command = [sys.executable, *start, "-m", "vlmtune.cli", "evaluate", *given, "--metrics", "exact_match", "cider"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-6000:]
        said[ranks] = done.stdout
    return root, said


def predictions(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.mark.parametrize("place", ["", "shuffled", "blank"])
def test_the_same_answers_in_the_same_order(evaluated, place: str) -> None:
    root, _ = evaluated
    alone, shared = (predictions(root / str(ranks) / place) for ranks in (1, 2))
    assert len(alone) > 4
    assert shared == alone


def test_the_same_scores_printed_once(evaluated) -> None:
    root, said = evaluated
    alone, shared = (json.loads((root / str(ranks) / "scores.json").read_text()) for ranks in (1, 2))
    for scores in (alone, shared):
        del scores["answer_seconds"]
    assert shared == alone
    assert said[2].replace(str(root / "2"), str(root / "1")) == said[1]
    assert said[2].count("exact_match  ") == said[1].count("exact_match  ") > 0

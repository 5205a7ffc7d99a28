"""Runs that are killed at random moments (SIGKILL) and started again: nothing is lost but time.

``make test-faults`` runs all of it; ``make test`` the few kills that are not marked slow.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

# Phase, how often it may begin in a life, and the longest time to wait in it, in seconds.
PHASES = (
    ("data", 8, 0.05),
    ("step", 8, 0.15),
    ("update", 8, 0.05),
    ("cache", 1, 0.005),
    ("checkpoint", 4, 0.1),
    ("manifest", 4, 0.01),
    ("rename", 4, 0.003),
    ("old", 4, 0.01),
    ("evaluation", 2, 0.1),
)
CHAINS, KILLS = 6, 6


def kill_again_and_again(run: Any, kills: list[tuple[str, int, float]]) -> int:
    """Start the run until it has been killed in each of these ways, if it gets so far; return how often it was."""
    killed = 0
    for kill in kills:
        code, said = run.finish(kill=kill)
        assert code in (0, -signal.SIGKILL), said
        if code == 0:
            break
        killed += 1
        run.assert_nothing_is_broken()
    return killed


def finish(run: Any, whole: Any) -> None:
    if not (run.output / "run.json").exists() or run.record()["status"] != "finished":
        code, said = run.finish()
        assert code == 0, said
    run.assert_finished_as(whole)


def test_a_kill(make_run: Callable[[], Any], whole: Any) -> None:
    run = make_run()
    assert kill_again_and_again(run, [("checkpoint", 2, 0.03)]) == 1
    finish(run, whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(CHAINS))
def test_many_kills(seed: int, make_run: Callable[[], Any], whole: Any) -> None:
    """Six kills of each of six runs; the first life of every run ends while it writes the cache or loads data."""
    rng = random.Random(seed)
    run, killed = make_run(), 0
    early = [phase for phase in PHASES if phase[0] in ("cache", "data", "step")]
    while killed < KILLS:
        phase, most, wait = rng.choice(early if killed == 0 else PHASES)
        # Few steps a life, so that there are several lives.
        kill = (phase, rng.randint(1, min(most, 2)), rng.uniform(0, wait))
        if kill_again_and_again(run, [kill]) == 0:
            # The phase did not come any more, such as a cache that is full: the run ended. Another one takes its place.
            finish(run, whole)
            run = make_run()
            continue
        killed += 1
    finish(run, whole)


@pytest.mark.slow
def test_kills_by_the_clock(make_run: Callable[[], Any], whole: Any) -> None:
    """The command as people run it, killed after random times from outside, imports and model loading included."""
    rng, run, killed = random.Random(0), make_run(), 0
    started = time.perf_counter()
    assert make_run().finish()[0] == 0
    longest = time.perf_counter() - started
    while killed < 6:
        process = run.start()
        time.sleep(rng.uniform(0.3, 1.0) * longest)
        process.kill()
        process.communicate()
        if process.returncode == 0:
            finish(run, whole)
            run = make_run()
            continue
        killed += 1
        run.assert_nothing_is_broken()
    finish(run, whole)


@pytest.mark.slow
def test_a_kill_while_the_model_is_saved(make_run: Callable[[], Any], whole: Any) -> None:
    run = make_run()
    # Twelve steps write six checkpoints; the seventh saving is the model's.
    assert kill_again_and_again(run, [("model", 7, 0.005)]) == 1
    assert run.record()["status"] == "training"
    finish(run, whole)

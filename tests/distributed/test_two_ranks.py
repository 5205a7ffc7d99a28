"""Two ranks on gloo with DDP give the one process's run: losses, gradients, adapter; uneven data, text on one rank."""

from __future__ import annotations

import pytest
import torch

FAMILIES = ("gemma3", "llava", "qwen2_vl", "paligemma")
JOBS = (*FAMILIES, "text_only_rank", "few")


def assert_same_run(found, expected) -> None:
    """Sums in another order: float32 keeps six digits of a step's loss and five of its gradient."""
    losses, alone = ([entry["loss"] for entry in run.log if "loss" in entry] for run in (found, expected))
    assert len(losses) == len(alone) > 0
    assert losses == pytest.approx(alone, rel=2e-5)
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        step = name.partition(".")[0]
        largest = max(g.abs().max() for n, g in expected.gradients.items() if n.partition(".")[0] == step)
        torch.testing.assert_close(found.gradients[name], gradient, rtol=1e-3, atol=float(largest) * 1e-4, msg=name)
    assert found.weights.keys() == expected.weights.keys()
    for name, tensor in expected.weights.items():
        torch.testing.assert_close(found.weights[name], tensor, rtol=1e-3, atol=2e-4, msg=name)


@pytest.mark.parametrize("job", JOBS)
def test_equal_to_one_process(job, one, two) -> None:
    assert_same_run(two(job), one(job))


@pytest.mark.parametrize("job", JOBS)
def test_every_rank_does_as_many_steps(job, two) -> None:
    first, second = two(job).ranks
    assert first["steps"] == second["steps"] > 0
    assert len(first["batches"]) == len(second["batches"])


def test_each_sample_is_seen_once_an_epoch(two, one) -> None:
    ids = [name for rank in two("gemma3").ranks for batch in rank["batches"] for name in batch["ids"]]
    assert sorted(ids) == sorted(2 * list(set(ids)))
    assert sorted(ids) == sorted(name for batch in one("gemma3").ranks[0]["batches"] for name in batch["ids"])


def test_a_rank_had_text_alone(two) -> None:
    """While the other's tower was trained: without a dummy image its gradients would hang or be refused."""
    turns = list(zip(*(rank["batches"] for rank in two("text_only_rank").ranks), strict=True))
    assert any(sorted(bool(batch["images"]) for batch in turn) == [False, True] for turn in turns)


def test_evaluation_counts_no_sample_twice(one, two) -> None:
    """Five samples in batches of one on two ranks: the sixth batch is a filler."""
    assert two("gemma3").ranks[0]["metrics"]["eval_loss"] == pytest.approx(
        one("gemma3").ranks[0]["metrics"]["eval_loss"], rel=1e-5
    )


def test_the_cache_is_filled_once_between_ranks(one, two) -> None:
    shares = [sum(rank["computed"]) for rank in two("gemma3").ranks]
    assert sum(shares) == sum(one("gemma3").ranks[0]["computed"]) == 7
    assert sorted(shares) == [3, 4]

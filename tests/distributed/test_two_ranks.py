"""Ranks on gloo give the one process's run: losses, gradients, adapter; uneven data, text on one rank, any strategy."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers.trainer_pt_utils import safe_globals

from vlmtune.training.optimizer_files import read_optimizer

DDP = ("gemma3", "llava", "qwen2_vl", "paligemma", "text_only_rank", "auto", "few", "full")
FSDP = ("gemma3", "llava", "qwen2_vl", "text_only_rank", "full", "quantised")
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")


def losses(run) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in run.log if "loss" in entry}


def assert_same_run(found, expected, *, weights: float = 2e-4) -> None:
    """Sums in another order: float32 keeps six digits of a step's loss and five of its gradient."""
    alone = losses(expected)
    assert losses(found) == pytest.approx(alone, rel=2e-5)
    assert len(alone) > 0
    # DeepSpeed has taken its step before gradients can be looked at.
    for name in found.gradients:
        gradient, step = expected.gradients[name], name.partition(".")[0]
        largest = max(g.abs().max() for n, g in expected.gradients.items() if n.partition(".")[0] == step)
        torch.testing.assert_close(found.gradients[name], gradient, rtol=1e-3, atol=float(largest) * 1e-4, msg=name)
    assert_same_weights(found, expected, weights)


def assert_same_weights(found, expected, tolerance: float = 2e-4) -> None:
    assert found.weights.keys() == expected.weights.keys()
    for name, tensor in expected.weights.items():
        torch.testing.assert_close(found.weights[name], tensor, rtol=1e-3, atol=tolerance, msg=name)


@pytest.mark.parametrize("job", DDP)
def test_ddp_is_one_process(job, one, two) -> None:
    found, expected = two(job), one(job)
    assert found.gradients.keys() == expected.gradients.keys()
    assert_same_run(found, expected)


@pytest.mark.parametrize("job", FSDP)
def test_fsdp_is_one_process(job, one, two) -> None:
    found, expected = two(f"fsdp/{job}"), one(job)
    assert found.gradients.keys() == expected.gradients.keys()
    assert_same_run(found, expected)


def test_fsdp_shares_every_weight_out(two) -> None:
    for job in ("gemma3", "llava", "qwen2_vl", "quantised"):
        first, second = two(f"fsdp/{job}").ranks
        assert first["sharded"] == second["sharded"]
        assert len([name for name in first["sharded"] if "lora_" not in name]) > 40, job
    assert not two("gemma3").ranks[0]["sharded"]


@pytest.mark.parametrize("job", [*DDP, *(f"fsdp/{job}" for job in FSDP)])
def test_every_rank_does_as_many_steps(job, two) -> None:
    first, second = two(job).ranks
    assert first["steps"] == second["steps"] > 0
    assert len(first["batches"]) == len(second["batches"])


def test_the_largest_device_batch_is_chosen_by_both_ranks(one, two) -> None:
    """Of batches of one: all of a rank's share of a step fits at once."""
    for rank in (*two("auto").ranks, *one("auto").ranks):
        assert len(rank["batches"]) == rank["steps"] == 2


def test_each_sample_is_seen_once_an_epoch(two, one) -> None:
    ids = [name for rank in two("gemma3").ranks for batch in rank["batches"] for name in batch["ids"]]
    assert sorted(ids) == sorted(2 * list(set(ids)))
    assert sorted(ids) == sorted(name for batch in one("gemma3").ranks[0]["batches"] for name in batch["ids"])


@pytest.mark.parametrize("job", ["text_only_rank", "fsdp/text_only_rank"])
def test_a_rank_had_text_alone(job, two) -> None:
    """While the other's tower was trained: without a dummy image its gradients would hang or be refused."""
    turns = list(zip(*(rank["batches"] for rank in two(job).ranks), strict=True))
    assert any(sorted(bool(batch["images"]) for batch in turn) == [False, True] for turn in turns)


@pytest.mark.parametrize("job", ["gemma3", "fsdp/gemma3"])
def test_evaluation_counts_no_sample_twice(job, one, two) -> None:
    """Five samples in batches of one on two ranks: the sixth batch is a filler."""
    expected = one("gemma3").ranks[0]["metrics"]["eval_loss"]
    assert two(job).ranks[0]["metrics"]["eval_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("job", ["gemma3", "fsdp/gemma3"])
def test_the_cache_is_filled_once_between_ranks(job, one, two) -> None:
    shares = [sum(rank["computed"]) for rank in two(job).ranks]
    assert sum(shares) == sum(one("gemma3").ranks[0]["computed"]) == 7
    assert sorted(shares) == [3, 4]


@pytest.mark.parametrize("job", ["gemma3", "fsdp/gemma3", "fsdp/full"])
def test_a_checkpoint_is_that_of_one_process(job, one, two) -> None:
    alone = one(job.rpartition("/")[2]).folder / "checkpoint-3"
    found = two(job).folder / "checkpoint-3"
    named = [
        {file.name for file in folder.iterdir() if not file.name.startswith(("rng_state", "optimizer"))}
        for folder in (alone, found)
    ]
    assert named[0] == named[1]
    expected, state = map(read_optimizer, (alone, found))
    assert [group["params"] for group in state["param_groups"]] == [g["params"] for g in expected["param_groups"]]
    assert state["state"].keys() == expected["state"].keys()
    for key, own in expected["state"].items():
        for name, value in own.items():
            torch.testing.assert_close(state["state"][key][name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("job", ["ddp/gemma3", "fsdp/gemma3", "fsdp/full"])
def test_saved_on_two_ranks_and_gone_on_with_in_one_process(job, one) -> None:
    whole, rest = one(job.rpartition("/")[2]), one(job)
    assert losses(rest) == pytest.approx(losses(whole), rel=2e-5)
    assert min(int(name.partition(".")[0]) for name in rest.gradients) == 3
    assert_same_weights(rest, whole)


def test_the_best_checkpoint_is_loaded_with_fsdp(two) -> None:
    assert_best_is_final(two("fsdp/best"))


def assert_best_is_final(run) -> None:
    best = run.ranks[0]["best"]
    assert best == run.ranks[1]["best"] is not None
    last = max(run.folder.glob("checkpoint-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))
    assert str(last) != best
    expected = load_file(f"{best}/adapter_model.safetensors")
    for name, tensor in run.weights.items():
        assert torch.equal(tensor, expected[name]), name
    record = json.loads((last / "trainer_state.json").read_text())
    assert record["best_model_checkpoint"] == best


@pytest.mark.slow
@pytest.mark.parametrize(
    "job", ["ddp/gemma3", "ddp/text_only_rank", "fsdp/gemma3", "fsdp/text_only_rank", "fsdp/qwen2_vl"]
)
def test_three_ranks_are_one_process(job, one, three) -> None:
    assert_same_run(three(job), one(job.rpartition("/")[2]))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_saved_on_two_ranks_and_gone_on_with_on_three(strategy, one, three) -> None:
    rest = three(f"resumed/{strategy}")
    assert losses(rest) == pytest.approx(losses(one("gemma3")), rel=2e-5)
    assert_same_weights(rest, one("gemma3"))


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize(
    "job", [*(f"zero2/{job}" for job in ("gemma3", "llava", "qwen2_vl", "text_only_rank", "full")),
            "zero3/gemma3", "zero3/text_only_rank", "zero3/full"]
)  # fmt: skip
def test_zero_is_one_process(job, one, zero) -> None:
    assert_same_run(zero(job), one(job.rpartition("/")[2]))


@pytest.mark.slow
@needs_deepspeed
def test_zero_goes_on_from_and_to_any_strategy(goes_on, one, zero) -> None:
    rest, whole = zero(goes_on), one(goes_on.rpartition("/")[2])
    assert losses(rest) == pytest.approx(losses(whole), rel=2e-5)
    assert_same_weights(rest, whole)


@pytest.mark.slow
@needs_deepspeed
def test_weights_of_16_bits_are_saved_and_gone_on_with_in_32(zero) -> None:
    """DeepSpeed computes with weights rounded to bfloat16, and adds to float32 ones in its optimizer."""
    whole, rest = zero("zero2/bf16"), zero("resumed/bf16")
    trained = {name: tensor for name, tensor in whole.weights.items() if tensor.dtype == torch.float32}
    assert len(trained) > 40
    assert max((tensor - tensor.bfloat16()).abs().max() for tensor in trained.values()) > 1e-3
    # On a CPU bfloat16 rounds by how memory lies, too.
    assert_same_weights(rest, whole, 3e-5)


def assert_trained_in_32_bits(run) -> None:
    """The checkpoint has what 16 bits cannot hold, and the finished model the 16 bits in which it was loaded."""
    held = load_file(run.folder / "checkpoint-4" / "model.safetensors")
    trained = [name for name, tensor in held.items() if tensor.dtype == torch.float32 and tensor.dim() > 1]
    assert len(trained) >= 30
    assert any((held[name] != held[name].bfloat16()).any() for name in trained)
    for name, tensor in run.weights.items():
        torch.testing.assert_close(tensor, held[name].bfloat16(), rtol=0, atol=0)
    assert json.loads((run.folder / "config.json").read_text())["dtype"] == "bfloat16"


def assert_same_in_16_bits(found, expected) -> None:
    """Sums of bfloat16 numbers keep three digits."""
    assert losses(found) == pytest.approx(losses(expected), rel=5e-3)
    assert {name: tensor.dtype for name, tensor in found.weights.items()} == {
        name: tensor.dtype for name, tensor in expected.weights.items()
    }


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_weights_of_16_bits(strategy, one, two) -> None:
    found = two(f"{strategy}/half")
    assert_trained_in_32_bits(found)
    assert_same_in_16_bits(found, one("half"))
    assert_same_in_16_bits(two(f"{strategy}/half_lora"), one("half_lora"))


def test_weights_of_16_bits_shared_out_and_gone_on_with_in_one_process(one, two) -> None:
    rest, whole = one("fsdp/half"), two("fsdp/half")
    assert_trained_in_32_bits(rest)
    assert_same_in_16_bits(rest, whole)
    # The step after the checkpoint adds to the same 32 bits: but for rounded gradients both take the same way.
    ends, start = [], load_file(whole.folder / "checkpoint-3" / "model.safetensors")
    for run in (rest, whole):
        held = load_file(run.folder / "checkpoint-4" / "model.safetensors")
        ends.append({name: held[name] - tensor for name, tensor in start.items() if tensor.dtype == torch.float32})
    way = sum(float(tensor.abs().sum()) for tensor in ends[1].values())
    apart = sum(float((ends[0][name] - tensor).abs().sum()) for name, tensor in ends[1].items())
    assert apart < 0.1 * way


@pytest.mark.slow
@needs_deepspeed
def test_weights_of_16_bits_with_zero(one, zero) -> None:
    assert_trained_in_32_bits(zero("zero2/half"))
    assert_same_in_16_bits(zero("zero2/half"), one("half"))


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_the_best_checkpoint_is_loaded_with_zero(strategy, zero) -> None:
    assert_best_is_final(zero(f"{strategy}/best"))


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("job", ["zero2/gemma3", "zero3/full"])
def test_no_file_of_zero_runs_code(job, zero) -> None:
    """DeepSpeed's own checkpoints do."""
    checkpoint = zero(job).folder / "checkpoint-3"
    assert not list(checkpoint.glob("global_step*"))
    files = list(checkpoint.glob("*.pt*"))
    assert {file.name for file in files} == {"scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"}
    # As transformers reads random numbers: numpy's arrays are allowed.
    with safe_globals():
        for file in files:
            torch.load(file, weights_only=True)

"""Shards that are read while training goes on: the same training as from memory, resumed exactly, nothing dropped."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from shard_files import write_shards
from training.run_files import log, record

from vlmtune.batching.collator import SharedImageCollator
from vlmtune.batching.sampler import FILLER
from vlmtune.config import TrainingArguments, VLMDataArguments
from vlmtune.data.shards import find_shards, first_shard
from vlmtune.errors import ConfigError, DataError, QuarantineError, ResumeError
from vlmtune.evaluation.command import training_images
from vlmtune.training.image_reuse import cache_ahead
from vlmtune.training.run import run_training
from vlmtune.training.stream_sampler import StreamRows, StreamSampler
from vlmtune.training.streaming import Stream, check_streaming


@pytest.fixture(scope="module")
def four_shards(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards") / "four", image_folder, [2, 4, 1, 3])


@pytest.fixture
def stream(processor, tmp_path: Path):
    """Make the stream and sampler of one rank."""

    def make(place: Path, rank: int = 0, world_size: int = 1, **options: Any) -> SimpleNamespace:
        settings = {"per_device_train_batch_size": 2, "max_steps": 30, "dataloader_num_workers": 0, "use_cpu": True}
        given = {name: options.pop(name) for name in list(options) if name in TrainingArguments.__dataclass_fields__}
        args = TrainingArguments(**(settings | {"output_dir": str(tmp_path)} | given))
        data = VLMDataArguments(dataset_path=str(place), streaming=True, **options)
        collator = SharedImageCollator(processor, "gemma3")
        made = Stream(find_shards(data), data, collator, seed=7, rank=rank, world_size=world_size)
        return SimpleNamespace(stream=made, sampler=StreamSampler(made, args), rows=StreamRows(made))

    return make


def ids(made: SimpleNamespace, batches: Any) -> list[list[str]]:
    """The ids of each batch; rows are read while their window's file is there."""
    return [[made.rows[index]["id"] for index in batch] for batch in batches]


def test_every_rank_reads_its_own_shards_and_each_sample_once_an_epoch(four_shards, stream) -> None:
    seen: list[set[str]] = []
    for rank in range(2):
        made = stream(four_shards, rank, world_size=2)
        assert made.stream.per_epoch == 2
        for epoch in range(2):
            files = [made.stream.files(number) for number in (2 * epoch, 2 * epoch + 1)]
            assert [len(part) for part in files] == [1, 1]
        windows = [made.stream.prepare(number) for number in range(2)]
        rows = [made.rows[window.number, index] for window in windows for index in range(len(window.lengths))]
        seen.append({row["id"] for row in rows})
    assert not seen[0] & seen[1]
    assert len(seen[0] | seen[1]) == 20


def test_epochs_differ_and_windows_hold_several_shards(four_shards, stream) -> None:
    made = stream(four_shards, streaming_shards=3).stream
    orders = [[made.files(2 * epoch), made.files(2 * epoch + 1)] for epoch in range(4)]
    assert all([len(part) for part in order] == [3, 1] for order in orders)
    assert all(len({file for part in order for file in part}) == 4 for order in orders)
    assert len({str(order) for order in orders}) > 1


def test_as_many_batches_on_every_rank_however_uneven_the_shards(four_shards, stream) -> None:
    for rank in range(2):
        made = stream(four_shards, rank, world_size=2, gradient_accumulation_steps=3, max_steps=9)
        batches = list(made.sampler)
        assert len(batches) == len(made.sampler) == 27
        assert all(batches)


def test_texts_of_an_image_are_in_one_batch(four_shards, stream) -> None:
    made = stream(four_shards, per_device_train_batch_size=4, max_steps=12)
    for batch in made.sampler:
        keys = [made.rows[index]["image_key"] for index in batch]
        assert keys and all(keys.count(key) == 2 for key in keys)


def test_a_batch_without_rows_of_its_own_is_a_filler(four_shards, stream) -> None:
    made = stream(four_shards, gradient_accumulation_steps=3, max_steps=4)
    batches = [[made.rows[index] for index in batch] for batch in made.sampler]
    fillers = [batch for batch in batches if any(FILLER in row for row in batch)]
    assert fillers and all(len(batch) == 1 for batch in fillers)


def test_a_sampler_goes_on_where_a_checkpoint_says(four_shards, stream) -> None:
    whole = ids(made := stream(four_shards), made.sampler)
    for done in (1, 8, 29):
        before = stream(four_shards)
        list(islice(before.sampler, done + 1))
        before.sampler.done = lambda done=done: done
        position = before.sampler.position()
        again = stream(four_shards)
        again.sampler.done = lambda done=done: done
        again.sampler.go_on([position])
        batches = list(islice(again.sampler, position[0]))
        assert not any(batches) and len(batches) == position[0]
        assert ids(again, islice(again.sampler, done, None)) == whole[done:]


def test_files_of_windows_that_are_done_with_go(four_shards, stream) -> None:
    made = stream(four_shards)
    step = 0
    made.sampler.done = lambda: step
    for step, batch in enumerate(made.sampler):  # noqa: B007 - the sampler asks for it
        assert [made.rows[index] for index in batch]
        assert len(list(made.stream.folder.iterdir())) <= 5


def test_going_on_with_another_number_of_processes_is_refused(four_shards, stream) -> None:
    with pytest.raises(ResumeError, match=r"written by 1 processes, and this run has 2.*as many as before"):
        stream(four_shards, world_size=2).sampler.go_on([(0, 0)])


def test_what_is_left_out_is_named_once_and_too_much_of_it_stops(image_folder, stream, tmp_path: Path) -> None:
    place = write_shards(tmp_path / "bad", image_folder, [2, 2, 2], bad=(1,))
    made = stream(place, max_steps=40, max_bad_fraction=0.5)
    assert len(list(made.sampler)) == 40
    lines = [json.loads(line) for line in (tmp_path / "left_out.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["bad2", "bad3"] == [name for name, _ in made.sampler.left_out]
    assert all("is not an image that can be read" in line["reason"] for line in lines)
    with pytest.raises(QuarantineError, match=r"2 of the first \d+ rows .* more than max_bad_fraction 0.001 allows"):
        list(stream(place, max_steps=40, max_bad_fraction=0.001).sampler)


def test_going_on_drops_the_lines_of_windows_that_are_read_again(image_folder, stream, tmp_path: Path) -> None:
    place = write_shards(tmp_path / "bad", image_folder, [2, 2, 2], bad=(0, 1, 2))
    list(stream(place, max_steps=6).sampler)
    lines = (tmp_path / "left_out.jsonl").read_text().splitlines()
    assert len(lines) == 6
    made = stream(place, max_steps=6)
    made.sampler.done = lambda: 2
    made.sampler.go_on([(2, 1)])
    assert (tmp_path / "left_out.jsonl").read_text().splitlines() == lines[:2]
    list(made.sampler)
    assert (tmp_path / "left_out.jsonl").read_text().splitlines() == lines


def test_a_shard_that_breaks_later_is_a_named_error(image_folder, stream, tmp_path: Path) -> None:
    place = write_shards(tmp_path / "cut", image_folder, [2, 2])
    made = stream(place)
    second = made.stream.files(1)[0]
    second.write_bytes(second.read_bytes()[:700])
    with pytest.raises(DataError, match=second.name):
        list(made.sampler)


def test_data_without_a_usable_row_ends(image_folder, stream, tmp_path: Path) -> None:
    place = write_shards(tmp_path / "long", image_folder, [1, 1])
    made = stream(place)
    made.stream.collator.encoder.max_length, made.stream.collator.encoder.on_too_long = 3, "drop"
    with pytest.raises(DataError, match=r"No row of .* can be trained on; see"):
        list(made.sampler)


def test_fewer_shards_than_processes_are_refused(four_shards, stream) -> None:
    with pytest.raises(DataError, match=r"4 shards for 5 processes.*vlmtune convert"):
        stream(four_shards, world_size=5)


def test_data_that_is_no_shards_is_refused(caption_folder: Path) -> None:
    with pytest.raises(DataError, match=r"in the format flickr, which is read as a whole. Streaming reads webdataset"):
        find_shards(VLMDataArguments(dataset_path=str(caption_folder), streaming=True))


@pytest.mark.parametrize(
    ("data", "training", "said"),
    [
        ({}, {"max_steps": -1}, "streaming needs max_steps"),
        ({}, {"device_batch_size": "auto"}, "device_batch_size auto"),
        ({"cache_image_features": "on"}, {}, "cache_image_features is on"),
    ],
)
def test_what_needs_all_samples_is_refused(data, training, said, tmp_path: Path) -> None:
    args = TrainingArguments(**({"output_dir": str(tmp_path), "max_steps": 1, "use_cpu": True} | training))
    with pytest.raises(ConfigError, match=said):
        check_streaming(VLMDataArguments(dataset_path=".", streaming=True, **data), args)


def test_options_that_need_all_samples_are_refused() -> None:
    for option in ({"max_train_samples": 3}, {"validation_fraction": 0.1}):
        with pytest.raises(ConfigError, match=f"{next(iter(option))} needs all samples"):
            VLMDataArguments(dataset_path=".", streaming=True, **option)


# -- whole runs ---------------------------------------------------------------------------------------------


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in log(folder) if "loss" in entry]


@pytest.fixture(scope="module")
def one_shard(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards") / "one", image_folder, [5])


def test_a_run_of_one_shard_equals_the_run_from_memory(one_shard, run_arguments, eval_folder, tmp_path: Path) -> None:
    same = {
        "dataset_path": str(one_shard),
        "eval_dataset_path": str(eval_folder),
        "eval_strategy": "steps",
        "eval_steps": 3,
        "max_steps": 7,
        "per_device_train_batch_size": 4,
        "lora_dropout": 0.0,
        "cache_image_features": "off",
    }
    run_training(*run_arguments(tmp_path / "memory", **same))
    run_training(*run_arguments(tmp_path / "stream", **same, streaming=True, dataloader_num_workers=1))
    assert len(losses(tmp_path / "memory")) == 7
    assert losses(tmp_path / "stream") == losses(tmp_path / "memory")
    data = record(tmp_path / "stream")["data"]
    assert data["train"].keys() == {"shards", "bytes", "fingerprint"} and data["train"]["shards"] == 1
    assert data["evaluation"] == record(tmp_path / "memory")["data"]["evaluation"]


def test_a_resumed_stream_equals_an_uninterrupted_one(four_shards, run_arguments, tmp_path: Path) -> None:
    same = {"dataset_path": str(four_shards), "max_steps": 12, "streaming": True, "per_device_train_batch_size": 2}
    run_training(*run_arguments(tmp_path / "whole", **same, save_strategy="no"))
    arguments = run_arguments(tmp_path / "cut", **same, save_steps=7)
    run_training(*arguments)
    state = json.loads((tmp_path / "cut" / "checkpoint-7" / "vlmtune_state.json").read_text())
    ((step, window),) = state["streamed"]
    assert 0 < step <= 7 and window > 0
    (again := tmp_path / "again").mkdir()
    for name in ("checkpoint-7", "run.json"):
        (tmp_path / "cut" / name).rename(again / name)
    changed = json.loads((again / "run.json").read_text()) | {"status": "training"}
    (again / "run.json").write_text(json.dumps(changed))
    run_training(*run_arguments(again, **same, save_steps=7))
    assert losses(again)[-5:] == losses(tmp_path / "whole")[-5:]


def test_other_commands_look_at_the_first_shard_or_say_why_not(four_shards, run_arguments, tmp_path: Path) -> None:
    model, data, _ = run_arguments(tmp_path / "out", dataset_path=str(four_shards), streaming=True, eval_split="train")
    looked_at = first_shard(data)
    assert looked_at.dataset_path == str(four_shards / "train-0000.tar") and not looked_at.streaming
    assert looked_at.eval_dataset_path == str(four_shards)
    assert "streamed" in str(training_images(data))
    with pytest.raises(ConfigError, match="streaming does not keep image features"):
        cache_ahead(model, data)

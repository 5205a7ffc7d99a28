"""From a path to a data set: recognition, splitting, drawing, and the loaders' options."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from vlmtune.config import VLMDataArguments
from vlmtune.data.fingerprint import fingerprint
from vlmtune.data.formats import FORMATS
from vlmtune.data.loading import (
    FlickrDatasetLoader,
    GenericVLMDatasetLoader,
    LoadedData,
    load_samples,
    load_train_and_eval,
    split_by_image,
    stratified,
    subset,
)
from vlmtune.data.quarantine import Quarantine
from vlmtune.data.recognition import choose_format
from vlmtune.data.sample import Message, Sample
from vlmtune.errors import ConfigError, DataError, FormatError

Make = Callable[..., Path]

CAPTIONS = "image,caption\n" + "".join(f"{i}.jpg,Caption {n} of {i}\n" for i in range(12) for n in range(5))


@pytest.fixture
def captions(flickr_folder: Make) -> Path:
    """Twelve images of five captions each, without splits."""
    return flickr_folder("captions.txt", CAPTIONS)


@pytest.fixture
def split_captions(flickr_folder: Make) -> Path:
    """The same as official files: images 0 to 7 to train on, 8 and 9 dev, 10 and 11 test."""
    tokens = "".join(f"{i}.jpg#{n}\tCaption {n} of {i}\n" for i in range(12) for n in range(5))
    names = [f"{i}.jpg\n" for i in range(12)]
    lists = {"train": names[:8], "dev": names[8:10], "test": names[10:]}
    return flickr_folder("Flickr8k.token.txt", tokens, **{name: "".join(lines) for name, lines in lists.items()})


def images_of(data: LoadedData) -> set[str]:
    return {json.loads(meta)["image"] for meta in data.dataset["meta"]}


def shuffled(data: LoadedData) -> LoadedData:
    return LoadedData(data.dataset.shuffle(seed=3), data.quarantine, data.format, data.source)


def test_each_format_is_recognised_alone(captions: Path, messages_file: Make, tmp_path: Path) -> None:
    chat = messages_file([{"messages": [{"role": "user", "content": "Hi"}]}])
    vqa = tmp_path / "vqa" / "train" / "questions.json"
    vqa.parent.mkdir(parents=True)
    vqa.write_text('[["what?", "red", 0]]')
    places = [captions, captions / "captions.txt", vqa.parent, vqa.parents[1], chat, chat.parent]
    found = [choose_format(place).name for place in places]
    assert found == ["flickr", "flickr", "easy_vqa", "easy_vqa", "messages", "messages"]


def test_ambiguous_data_asks_for_a_choice(captions: Path) -> None:
    (captions / "train.jsonl").write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n')
    with pytest.raises(FormatError, match=r"looks like flickr and messages. Choose one by dataset_format"):
        load_samples(captions)
    assert len(load_samples(captions, format="messages").dataset) == 1
    assert len(load_samples(captions, format="flickr").dataset) == 60


def test_unknown_data_is_answered_with_every_format(image_folder: Path) -> None:
    with pytest.raises(FormatError, match="in no format that vlmtune knows") as caught:
        load_samples(image_folder)
    assert all(f"{format.name}: {format.looks_like}" in str(caught.value) for format in FORMATS.values())


def test_an_unknown_format_is_answered_with_the_nearest(captions: Path) -> None:
    with pytest.raises(FormatError, match=r"'flicker' is unknown; use flickr, .*messages.* Did you mean 'flickr'"):
        load_samples(captions, format="flicker")


@pytest.mark.parametrize("format", ["auto", "flickr"])
def test_a_missing_path_is_named(tmp_path: Path, format: str) -> None:
    with pytest.raises(DataError, match=r"There is no data at .*nowhere. Correct dataset_path"):
        load_samples(tmp_path / "nowhere", format=format)


def test_a_captions_file_without_rows_is_named(flickr_folder: Make) -> None:
    with pytest.raises(DataError, match="holds no samples in the format flickr"):
        load_samples(flickr_folder("captions.txt", "image,caption\n"))


def test_nothing_left_is_an_error_whatever_the_share(flickr_folder: Make) -> None:
    with pytest.raises(DataError, match=r"No row of .* can be used.*2 missing image"):
        load_samples(flickr_folder("captions.txt", "image,caption\nx.jpg,A dog\ny.jpg,A cat\n"), max_bad_fraction=1)


def test_rows_have_the_normal_form(captions: Path) -> None:
    data = load_samples(captions)
    assert data.dataset.column_names == ["id", "images", "messages", "references", "meta"]
    assert data.source == str(captions)
    sample = Sample.from_row(data.dataset[7])
    assert (sample.id, sample.target, len(sample.references)) == ("1.jpg#2", "Caption 2 of 1", 5)


@pytest.mark.parametrize(("how", "left"), [("off", 60), ("header", 55), ("full", 50)])
def test_verify_images_says_how_far_to_look(captions: Path, how: Any, left: int) -> None:
    (captions / "Images" / "0.jpg").write_bytes(b"no image")
    whole = (captions / "Images" / "1.jpg").read_bytes()
    (captions / "Images" / "1.jpg").write_bytes(whole[:-150])
    assert len(load_samples(captions, verify_images=how, max_bad_fraction=0.5).dataset) == left


def test_large_images_are_set_aside_by_max_pixels(captions: Path) -> None:
    Image.new("RGB", (100, 100)).save(captions / "Images" / "3.jpg")
    data = load_samples(captions, max_pixels=9_999, max_bad_fraction=0.1)
    assert "3.jpg" not in images_of(data)
    assert "more than max_pixels 9,999" in data.quarantine.rows[0].reason


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_all_texts_of_an_image_stay_on_one_side(captions: Path, seed: int) -> None:
    data = load_samples(captions)
    train, held_out = split_by_image(data, 0.4, seed)
    assert not images_of(train) & images_of(held_out)
    assert sorted(train.dataset["id"][:] + held_out.dataset["id"][:]) == sorted(data.dataset["id"][:])
    assert len(held_out.dataset) == 5 * len(images_of(held_out))


def test_the_split_depends_on_contents_and_seed_alone(captions: Path) -> None:
    data = load_samples(captions)
    _, held_out = split_by_image(data, 0.4, 0)
    assert images_of(split_by_image(shuffled(data), 0.4, 0)[1]) == images_of(held_out)
    assert any(images_of(split_by_image(data, 0.4, seed)[1]) != images_of(held_out) for seed in (1, 2))
    fewer = LoadedData(data.dataset.select(range(30)), Quarantine(), data.format, data.source)
    assert images_of(split_by_image(fewer, 0.4, 0)[1]) == images_of(held_out) & images_of(fewer)
    assert images_of(split_by_image(data, 0.6, 0)[1]) >= images_of(held_out)


def test_names_do_not_change_the_split(captions: Path, tmp_path: Path) -> None:
    images = captions / "Images"
    held_out = images_of(split_by_image(load_samples(captions), 0.4, 0)[1])
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in images.iterdir():
        shutil.copy(file, moved / f"{file.stem}.renamed.jpg")
    text = (captions / "captions.txt").read_text().replace(".jpg,", ".renamed.jpg,")
    (captions / "captions.txt").write_text(text)
    again = images_of(split_by_image(load_samples(captions, image_dir=moved), 0.4, 0)[1])
    assert again == {name.replace(".jpg", ".renamed.jpg") for name in held_out}


def test_one_image_under_two_names_is_on_one_side(captions: Path) -> None:
    images = captions / "Images"
    for file in list(images.iterdir()):
        shutil.copy(file, images / f"copy-{file.name}")
    with (captions / "captions.txt").open("a") as opened:
        opened.writelines(f"copy-{i}.jpg,Another caption of {i}\n" for i in range(12))
    for side in split_by_image(load_samples(captions), 0.5, 1):
        names = images_of(side)
        assert {name.removeprefix("copy-") for name in names} == {name for name in names if "copy" not in name}


@pytest.mark.parametrize("seed", range(5))
def test_samples_that_share_one_of_several_images_stay_together(messages_file: Make, seed: int) -> None:
    pairs = [(0, 1), (1, 2), (3, 4), (5, 4), (6, 7), (8, 8), (9, 10), (2, 11)]
    rows = [
        {"messages": [{"role": "user", "content": "Same?"}, {"role": "assistant", "content": "No."}]}
        | {"images": [f"{one}.jpg", f"{other}.jpg"]}
        for one, other in pairs
    ]
    data = load_samples(messages_file(rows))
    sides = split_by_image(data, 0.5, seed)
    shown = [{Path(image["path"]).stem for row in side.dataset["images"] for image in row} for side in sides]
    assert not shown[0] & shown[1]
    # Which image stands for a group does not depend on the order.
    again = split_by_image(shuffled(data), 0.5, seed)
    assert [set(side.dataset["id"]) for side in again] == [set(side.dataset["id"]) for side in sides]


def test_texts_about_no_image_are_split_each_by_itself(messages_file: Make) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"Hi {i}"}, {"role": "assistant", "content": "x"}]} for i in range(40)
    ]
    train, held_out = split_by_image(load_samples(messages_file(rows)), 0.5, 0)
    assert len(train.dataset) + len(held_out.dataset) == 40
    assert 8 < len(held_out.dataset) < 32


@pytest.mark.parametrize(("fraction", "side"), [(1e-9, "evaluation"), (1 - 1e-9, "training")])
def test_an_empty_side_is_an_error(captions: Path, fraction: float, side: str) -> None:
    with pytest.raises(DataError, match=f"leaves no image of .* for {side}"):
        split_by_image(load_samples(captions), fraction, 0)


def test_a_subset_is_drawn_by_its_seed_in_order(captions: Path) -> None:
    data = load_samples(captions)
    drawn = [subset(data, 10, seed).dataset["id"][:] for seed in (0, 0, 1)]
    order = {name: place for place, name in enumerate(data.dataset["id"])}
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 10
    assert drawn[0] == sorted(drawn[0], key=order.__getitem__) != data.dataset["id"][:10]


@pytest.mark.parametrize("count", [None, 60, 1000])
def test_a_subset_of_everything_is_the_data(captions: Path, count: int | None) -> None:
    data = load_samples(captions)
    assert subset(data, count, 0) is data


def test_a_stratified_draw_keeps_each_types_share() -> None:
    kinds = ["yes/no"] * 60 + ["color"] * 30 + ["shape"] * 7 + [""] * 3
    rows = [
        Sample(f"{n}", (), (Message.make("user", "?"),), ("x",), {"answer_type": kind} if kind else {}).to_row()
        for n, kind in enumerate(kinds)
    ]
    data = LoadedData(datasets.Dataset.from_list(rows), Quarantine(), "messages", "here")

    def drawn(count: int, seed: int) -> list[int]:
        return [int(name) for name in stratified(data, count, seed).dataset["id"]]

    # 6, 3, 0.7 and 0.3; of 3.5 and 1.5 the one without a name is favoured.
    assert Counter(kinds[n] for n in drawn(10, 0)) == {"yes/no": 6, "color": 3, "shape": 1}
    assert Counter(kinds[n] for n in drawn(50, 0)) == {"yes/no": 30, "color": 15, "shape": 3, "": 2}
    assert drawn(10, 0) == sorted(drawn(10, 0)) != drawn(10, 1)
    assert stratified(data, 100, 0) is stratified(data, None, 0) is data


def test_the_fingerprint_is_of_texts_names_and_order(captions: Path, messages_file: Make) -> None:
    data = load_samples(captions)
    marks = {fingerprint(data.dataset), fingerprint(shuffled(data).dataset), fingerprint(data.dataset.select(range(9)))}
    assert len(marks) == 3
    moved = captions.rename(captions.with_name("elsewhere"))
    assert fingerprint(load_samples(moved).dataset) == fingerprint(data.dataset)
    line = {"messages": [{"role": "user", "content": "What?"}]}
    chats = [load_samples(messages_file([line | {"images": [f"{i}.jpg"]}])).dataset for i in range(2)]
    assert fingerprint(chats[0]) != fingerprint(chats[1])


def options(path: Path, **others: Any) -> VLMDataArguments:
    return VLMDataArguments(dataset_path=str(path), **others)


def test_train_is_taken_by_default_and_eval_where_named(split_captions: Path) -> None:
    train, evaluation = load_train_and_eval(options(split_captions))
    assert images_of(train) == {f"{i}.jpg" for i in range(8)}
    assert evaluation is None
    train, evaluation = load_train_and_eval(options(split_captions, train_split="test", eval_split="dev"))
    assert images_of(train) == {"10.jpg", "11.jpg"}
    assert evaluation is not None
    assert images_of(evaluation) == {"8.jpg", "9.jpg"}


def test_evaluation_data_may_lie_apart(captions: Path, messages_file: Make) -> None:
    chat = messages_file([{"messages": [{"role": "user", "content": "Hi"}]}])
    train, evaluation = load_train_and_eval(options(captions, eval_dataset_path=str(chat)))
    assert len(train.dataset) == 60
    assert evaluation is not None
    assert evaluation.format == "messages"


def test_held_out_images_and_draws(captions: Path) -> None:
    train, evaluation = load_train_and_eval(
        options(captions, validation_fraction=0.4, max_train_samples=7, max_eval_samples=3)
    )
    assert evaluation is not None
    assert (len(train.dataset), len(evaluation.dataset)) == (7, 3)
    assert not images_of(train) & images_of(evaluation)


@pytest.mark.parametrize("loader", [GenericVLMDatasetLoader, FlickrDatasetLoader])
def test_loaders_take_the_data_arguments(split_captions: Path, loader: Any) -> None:
    arguments = options(split_captions, prompt="What is shown?", max_train_samples=6)
    rows = loader.load(**vars(arguments))
    assert len(rows) == 6
    assert Sample.from_row(rows[0]).prompt[0].text == "What is shown?"
    assert len(loader.load(str(split_captions))) == 40


def test_the_flickr_loader_reads_flickr_alone(captions: Path, messages_file: Make) -> None:
    (captions / "train.jsonl").write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n')
    assert len(FlickrDatasetLoader.load(str(captions), dataset_format="messages")) == 60
    with pytest.raises(DataError, match="holds no captions file"):
        FlickrDatasetLoader.load(str(messages_file([{"messages": []}]).parent))


@pytest.mark.parametrize(
    ("name", "known"), [("image_dirs", "image_dir"), ("max_pixel", "max_pixels"), ("format", "dataset_format")]
)
def test_an_unknown_option_is_answered_with_the_nearest(captions: Path, name: str, known: str) -> None:
    with pytest.raises(DataError, match=f"{name} is not an option of data loading. Did you mean '{known}'"):
        GenericVLMDatasetLoader.load(str(captions), **{name: "x"})


def test_a_wrong_value_is_refused(captions: Path) -> None:
    with pytest.raises(ConfigError, match="max_bad_fraction"):
        GenericVLMDatasetLoader.load(str(captions), max_bad_fraction=2.0)

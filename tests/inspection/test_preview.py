"""The preview shows exactly what training gets: ids, what is learned, what is shared, and the pixels."""

from __future__ import annotations

import re
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlmtune.batching.encode import Encoder
from vlmtune.cli import main
from vlmtune.config import BaseModelArguments, VLMDataArguments
from vlmtune.data.sample import ImageRef, Message, Sample
from vlmtune.errors import DataError
from vlmtune.inspection.preview import Group, html_preview, preview, preview_samples
from vlmtune.models.families import FAMILIES, get_family
from vlmtune.models.loading import load_config, load_processor


@pytest.fixture
def encoder(processor: Any) -> Encoder:
    return Encoder(processor, FAMILIES["gemma3"])


@pytest.fixture
def samples(tmp_path: Path, make_photo: Callable[..., Image.Image]) -> list[Sample]:
    """Two texts of one image, one of another, and one without."""
    refs = []
    for number in range(2):
        make_photo(number).save(tmp_path / f"{number}.png")
        refs.append((ImageRef(path=str(tmp_path / f"{number}.png")),))
    texts = [("a", refs[0], "red <i>"), ("b", refs[0], "blue dog"), ("c", refs[1], "Mädchen 雪"), ("d", (), "no")]
    return [
        Sample(name, images, (Message.make("user", "What?", images=len(images)), Message.make("assistant", text)))
        for name, images, text in texts
    ]


def ids_and_learned(group: Group, number: int) -> tuple[list[int], list[bool]]:
    tokens = [*group.prefix, *group.branches[number].tokens]
    ids = [one for token in tokens for one in token.ids]
    return ids, [token.kind == "learned" for token in tokens for _ in token.ids]


@pytest.mark.parametrize("share", [True, False])
def test_tokens_are_the_encoders(samples: list[Sample], encoder: Encoder, share: bool) -> None:
    groups = preview_samples(samples, encoder, share=share)
    assert sorted(len(group.branches) for group in groups) == ([1, 1, 2] if share else [1] * 4)
    by_id = {branch.id: (group, n) for group in groups for n, branch in enumerate(group.branches)}
    for sample in samples:
        encoded = encoder(sample)
        ids, learned = ids_and_learned(*by_id[sample.id])
        assert ids == encoded.input_ids
        assert learned[1:] == encoded.supervised[1:]
        group, number = by_id[sample.id]
        assert group.branches[number].n_learned == encoded.n_supervised
        positions = [token.position for token in [*group.prefix, *group.branches[number].tokens]]
        assert int(positions[-1]) == len(encoded.input_ids) - 1


def test_texts_read_as_written(samples: list[Sample], encoder: Encoder) -> None:
    (group,) = preview_samples([samples[2]], encoder, share=True)
    text = "".join(token.text for token in group.branches[0].tokens)
    assert "What?" in text and "[image: 4 tokens]" in text and "<end_of_turn>" in text
    learned = "".join(token.text for token in group.branches[0].tokens if token.kind == "learned")
    assert learned.strip().startswith("M") and "What" not in learned


def test_pictures_are_what_the_tower_gets(samples: list[Sample], encoder: Encoder) -> None:
    (group,) = preview_samples(samples[2:3], encoder, share=True)
    (picture,) = group.pictures
    assert group.preprocessed and picture.size == (32, 32)
    wanted = Image.open(samples[2].images[0].path or "").convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)
    assert np.abs(np.asarray(picture, float) - np.asarray(wanted, float)).mean() < 4


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "gemma4", "paligemma", "mistral3"])
def test_pictures_of_other_families(
    name: str, family_dir: Callable[[str], Path], tmp_path: Path, make_photo: Callable[..., Image.Image]
) -> None:
    make_photo(3, (200, 120)).save(tmp_path / "a.png")
    talk = (Message.make("user", "What?", images=1), Message.make("assistant", "red"))
    sample = Sample("a", (ImageRef(path=str(tmp_path / "a.png")),), talk)
    folder = str(family_dir(name))
    encoder = Encoder(load_processor(folder), get_family(load_config(folder)))
    (group,) = preview_samples([sample], encoder, share=False)
    (picture,) = group.pictures
    wanted = make_photo(3, (200, 120)).resize(picture.size, Image.Resampling.BICUBIC)
    assert group.preprocessed
    assert np.abs(np.asarray(picture, float) - np.asarray(wanted, float)).mean() < 6
    assert re.search(r'class="image" title="position .* to .*, id', html_preview([group], "x"))


def test_a_row_that_cannot_be_encoded_says_why(samples: list[Sample], encoder: Encoder) -> None:
    bad = Sample("bad", (), (Message.make("user", "<end_of_turn>"), Message.make("assistant", "x")))
    groups = preview_samples([bad, samples[3]], encoder, share=True)
    assert "control token" in groups[-1].problem and groups[0].branches[0].id == "d"
    assert "control token" in html_preview(groups, "x")


def test_the_page(samples: list[Sample], encoder: Encoder) -> None:
    groups = preview_samples(samples, encoder, share=True)
    text = html_preview(groups, "<rows>")
    assert "<rows>" not in text and "<i>" not in text
    assert text.count("<img ") == 2 and "http" not in text
    assert "tokens shared by 2 texts" in text and text.count('class="branch"') == 2
    spans = re.findall(r'<span class="learned" title="position (\d+), id (\d+)">([^<]*)</span>', text)
    learned = sum(branch.n_learned for group in groups for branch in group.branches)
    assert len(spans) == learned
    assert "red" in unescape("".join(span[2] for span in spans))


def test_rows_are_chosen_by_number_or_id(captions: Path, tiny_gemma3_dir: Path) -> None:
    data, model = (
        VLMDataArguments(dataset_path=str(captions)),
        BaseModelArguments(model_name_or_path=str(tiny_gemma3_dir)),
    )
    names = [branch.id for group in preview(data, model, rows=3) for branch in group.branches]
    assert names == ["0.jpg#0", "0.jpg#1", "1.jpg#0"]
    assert [b.id for g in preview(data, model, ids=["7.jpg#1"]) for b in g.branches] == ["7.jpg#1"]
    with pytest.raises(DataError, match=r"no row '7\.jpg#9'.*Did you mean '7\.jpg"):
        preview(data, model, ids=["7.jpg#9"])


def test_the_command(captions: Path, tiny_gemma3_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "new" / "page.html"
    arguments = ["preview", str(captions), "--model_name_or_path", str(tiny_gemma3_dir), "--rows", "2"]
    assert main([*arguments, "--output", str(page)]) == 0
    said = capsys.readouterr().out
    assert "tokens shared by 2 texts" in said and "[image: 4 tokens]" in said and "A long caption" in said
    assert page.read_text().startswith("<!doctype html>")
    assert main(["preview", str(captions)]) == 2
    assert main([*arguments[:-1], "none"]) == 2


@pytest.mark.parametrize(("attention", "shared"), [("flash_attention_2", False), ("eager", True), (None, True)])
def test_texts_are_shown_apart_where_attention_takes_no_mask(
    captions: Path, tiny_gemma3_dir, attention, shared
) -> None:
    model_args = BaseModelArguments(model_name_or_path=str(tiny_gemma3_dir), attn_implementation=attention)
    groups = preview(VLMDataArguments(dataset_path=str(captions)), model_args, rows=2)
    assert [len(group.branches) for group in groups] == ([2] if shared else [1, 1])

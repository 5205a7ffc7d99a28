"""Token counts without encoding: for every family what the encoder gives, and left to it where that is in doubt."""

from __future__ import annotations

import functools
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest

from vlmtune.batching import counting
from vlmtune.batching import scan as scanning
from vlmtune.batching.counting import Counter
from vlmtune.batching.encode import Encoder
from vlmtune.batching.scan import scan
from vlmtune.data.sample import ImageRef, Message, Part, Sample
from vlmtune.data.store import table_of
from vlmtune.errors import EncodingError
from vlmtune.models.families import FAMILIES
from vlmtune.models.loading import load_processor

WORDS = "red dog a the in  two\n\n Größe \N{DOG FACE} don't 12.5 <b> user model , . ? - * </think> x\ty".split(" ")


@pytest.fixture(scope="module")
def encoder_of(family_dir):
    return functools.cache(lambda name: Encoder(load_processor(family_dir(name)), FAMILIES[name]))


def conversations(folder: Path, count: int = 120) -> list[Sample]:
    """Captions, questions, several turns, images and systems; texts with white space and a template's words."""
    rng = random.Random(0)

    def text() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, 12))) + rng.choice(["", " ", "\n", "."]) + "x"

    samples = []
    for number in range(count):
        images = [1, 1, 1, 0, 2][number % 5]
        messages = [Message.make("system", text())] if number % 11 == 0 else []
        for turn in range([1, 1, 2][number % 3]):
            parts = [Part("image")] * (images if turn == 0 else 0) + [Part("text", text())]
            messages.append(Message("user", tuple(parts if number % 7 else reversed(parts))))
            messages.append(Message.make("assistant", text()))
        refs = tuple(ImageRef(path=str(folder / f"{rng.randint(0, 2)}.jpg")) for _ in range(images))
        samples.append(Sample(f"row {number}", refs, tuple(messages)))
    return samples


def rows_of(samples: list[Sample]) -> datasets.Dataset:
    return datasets.Dataset(table_of(samples))


def encoded(encoder: Encoder, sample: Sample) -> list[int] | None:
    try:
        found = encoder(sample, pixels=False)
    except EncodingError:
        return None
    return [len(found.input_ids), found.n_supervised, sum(found.token_type_ids)]


# Answers of LLaVA's template are open, and closed by the encoder turn by turn.
ALL_COUNTED = [name for name in FAMILIES if name not in ("llava", "llava_next")]


@pytest.mark.parametrize("name", FAMILIES)
def test_counts_are_the_encoders(name: str, encoder_of, image_folder: Path) -> None:
    encoder, samples = encoder_of(name), conversations(image_folder)
    counts = Counter(encoder).count(rows_of(samples)).tolist()
    right = [encoded(encoder, sample) for sample in samples]
    known = [row != [-1, -1, -1] for row in counts]
    assert [row for row, found in zip(counts, known, strict=True) if found] == [
        row for row, found in zip(right, known, strict=True) if found
    ]
    share = sum(known) / sum(row is not None for row in right)
    assert share > 0.9 or name not in ALL_COUNTED, share


class TestInAScan:
    """Counted rows, and those left to the encoder."""

    @pytest.fixture(autouse=True)
    def small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(scanning, "COUNTED_FROM", 0)
        monkeypatch.setattr(scanning, "COMPARED", 5)

    @pytest.fixture
    def rows(self, image_folder: Path) -> list[Sample]:
        """Rows that are fine, with three that are not."""
        rows = conversations(image_folder)
        rows[7] = replace(rows[7], messages=rows[7].messages[:-1])
        rows[30] = replace(rows[30], messages=(*rows[30].messages[:-1], Message.make("assistant", "<end_of_turn>")))
        rows[31] = replace(rows[31], images=())
        return rows

    @pytest.mark.parametrize(("max_length", "policy"), [(None, "error"), (60, "drop"), (120, "truncate_text")])
    def test_all_is_as_if_every_row_were_encoded(
        self, processor, rows, max_length, policy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        encoder = Encoder(processor, FAMILIES["gemma3"], max_length=max_length, on_too_long=policy)
        counted = scan(rows_of(rows), encoder, max_bad_fraction=1)
        monkeypatch.setattr(scanning, "COUNTED_FROM", 10**9)
        right = scan(rows_of(rows), encoder, max_bad_fraction=1)
        assert len(right.left_out) >= 3 and max_length in (None, 60, right.lengths.max())
        for name in ("kept", "lengths", "supervised", "image_tokens"):
            assert getattr(counted, name).tolist() == getattr(right, name).tolist()
        assert counted.left_out == right.left_out

    def test_only_what_is_in_doubt_is_encoded(self, encoder, rows, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(counting, "ROWS_AT_ONCE", 50)
        seen: list[str] = []
        call = Encoder.__call__

        def recording(self: Encoder, sample: Sample, **options: Any) -> Any:
            seen.append(sample.id)
            return call(self, sample, **options)

        monkeypatch.setattr(Encoder, "__call__", recording)
        scan(rows_of(rows), encoder, max_bad_fraction=1)
        assert {"row 7", "row 30", "row 31"} <= set(seen)
        assert len(seen) <= 3 + 5

    def test_a_count_that_is_wrong_has_every_row_encoded(
        self, encoder, rows, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        right = scan(rows_of(rows), encoder, max_bad_fraction=1)
        caplog.set_level("INFO", "vlmtune.batching")
        fill = Counter._sum
        monkeypatch.setattr(Counter, "_sum", lambda *args: (found := fill(*args)) and (found[0] + 1, *found[1:]))
        monkeypatch.setattr(Counter, "_encoded", lambda *args: None)
        monkeypatch.setattr(Counter, "_shape", lambda self, *args, shape=Counter._shape: trusting(self, shape, *args))
        found = scan(rows_of(rows), encoder, max_bad_fraction=1)
        assert "is not of the length that was counted: all are encoded" in caplog.text
        assert found.lengths.tolist() == right.lengths.tolist()

    def test_rows_of_another_form_are_encoded(self, encoder) -> None:
        row = {"id": "1", "messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]}
        row |= {"images": [], "references": [], "meta": "{}"}
        dataset = datasets.Dataset.from_list([row])
        assert scan(dataset, encoder).lengths.tolist() == [len(encoder(Sample.from_row(row)).input_ids)]


def trusting(counter: Counter, shape: Any, sample: Sample, places: Any) -> Any:
    """A shape that was not tried."""
    from vlmtune.batching.shapes import find_shape

    return find_shape(counter.encoder, counter._cut, sample, places)


@pytest.mark.parametrize(
    "template",
    [
        "{% if 'stop' in text %}!{% endif %}{{ text }}",
        "{% if text.startswith('red') %}!{% endif %}{{ text }}",
        "{{ text.split('</think>')[-1] }}",
        "{{ text | replace('dog', 'cat and dog') }}",
        "{{ text | truncate(100) }}",
        "{{ text | upper }}",
        "{{ text | tojson }}",
    ],
)
def test_a_template_that_looks_into_texts_is_not_relied_on(
    processor, image_folder: Path, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of these gives most texts as they are."""
    start = processor.chat_template.index("{{ part.text | trim }}")
    changed = template.replace("text", "part.text")
    assert start
    monkeypatch.setattr(processor, "chat_template", processor.chat_template.replace("{{ part.text | trim }}", changed))
    encoder = Encoder(processor, FAMILIES["gemma3"])
    counts = Counter(encoder).count(rows_of(conversations(image_folder, 20)))
    assert (counts == -1).all()


def test_the_tokenizer_is_left_to_one_core(encoder, image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOKENIZERS_PARALLELISM")
    Counter(encoder).count(rows_of(conversations(image_folder, 3)))
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"

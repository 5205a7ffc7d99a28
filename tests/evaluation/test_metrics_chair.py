"""CHAIR on cases counted by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmtune.errors import ConfigError
from vlmtune.evaluation.answering import Prediction
from vlmtune.evaluation.metrics import get_metric
from vlmtune.evaluation.metrics.chair import named_objects, read_objects
from vlmtune.evaluation.runner import score

pytest.importorskip("textblob", reason="needs the extra chair")
OBJECTS = "dog, puppy, hound\nhot dog\nperson, man, woman, child\nbus\nhorse\n"


@pytest.fixture
def objects(tmp_path: Path) -> Path:
    path = tmp_path / "objects.txt"
    path.write_text(OBJECTS)
    return path


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("two puppies and a hot dog", ["dog", "hot dog"]),
        ("hot dogs for the dogs", ["hot dog", "dog"]),
        ("a bus and two buses", ["bus", "bus"]),
        ("men , children and people", ["person", "person", "person"]),
        ("nothing of the kind", []),
        ("", []),
    ],
)
def test_objects_of_a_text(text: str, named: list[str], objects: Path) -> None:
    assert named_objects(text.split(), read_objects(objects)) == named


def test_values(objects: Path) -> None:
    answers = ["A man on a horse with a puppy.", "A dog, a dog and a bus.", "A tree.", "a horse"]
    references = [["a woman rides", "a person and a dog"], ["two dogs"], ["a dog"], ["a field"]]
    metas = [{}, {}, {}, {"objects": ["horses"]}]
    # Wrong are the horse, of 3 named, and the bus, of 3; the last image holds a horse by its list.
    found = {
        name: get_metric(f"{name}:{objects}").compute(answers, references, metas) for name in ("chair_i", "chair_s")
    }
    assert found["chair_i"].value == pytest.approx(2 / 7)
    assert found["chair_i"].per_sample.tolist() == pytest.approx([1 / 3, 1 / 3, 0, 0])
    assert found["chair_s"].value == 0.5


def test_scored_from_predictions(objects: Path) -> None:
    predictions = [
        Prediction("a", "?", (), "a horse", ("a field",), True, 2, 0.0, {"objects": ["horse"]}),
        Prediction("b", "?", (), "a horse", ("a field",), True, 2, 0.0),
    ]
    table = score(predictions, [f"chair_i:{objects}"]).table
    assert table[f"chair_i:{objects}"]["value"] == 0.5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("\n , \n", "is empty"),
        ("dog, hound\ncat, hound\n", "line 2: 'hound' names 'cat' here and 'dog' before"),
    ],
)
def test_a_bad_file(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "o.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        get_metric(f"chair_s:{path}")


def test_without_a_file() -> None:
    with pytest.raises(ConfigError, match="named with what it needs: chair_i:FILE"):
        get_metric("chair_i")

"""CLIPScore is 2.5 times the cosine of a CLIP's two vectors, never below 0."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from vlmtune.errors import ConfigError
from vlmtune.evaluation.answering import Prediction
from vlmtune.evaluation.metrics import get_metric
from vlmtune.evaluation.runner import score

CAPTIONS = ["a red circle", "two dogs " * 60, "", "a blue square"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory, processor) -> Path:
    """A tiny CLIP of random weights."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    tokenizer = processor.tokenizer
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(3)
    # As in OpenAI's checkpoints: the text's vector is that of the token of the highest number.
    ends = {"bos_token_id": 0, "eos_token_id": 2}
    config = CLIPConfig(
        text_config=text | ends | {"vocab_size": len(tokenizer), "max_position_embeddings": 20},
        vision_config=text | {"image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def expected(clip: Path, caption: str, image: Path) -> float:
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    model = CLIPModel.from_pretrained(clip).eval()
    tokens = AutoTokenizer.from_pretrained(clip)(
        "A photo depicts " + caption, truncation=True, max_length=20, return_tensors="pt"
    )
    pixels = AutoImageProcessor.from_pretrained(clip)(Image.open(image).convert("RGB"), return_tensors="pt")
    with torch.no_grad():
        output = model(**tokens, pixel_values=pixels["pixel_values"])
    words, picture = output.text_embeds[0], output.image_embeds[0]
    return 2.5 * max(0.0, float(words @ picture / words.norm() / picture.norm()))


def test_values(clip: Path, image_folder: Path) -> None:
    images = [[str(image_folder / f"{number}.jpg")] for number in range(4)]
    found = get_metric(f"clip_score:{clip}").compute(CAPTIONS, [["x"]] * 4, images)
    alone = [expected(clip, caption, Path(image)) for caption, (image,) in zip(CAPTIONS, images, strict=True)]
    assert found.per_sample.tolist() == pytest.approx(alone, abs=1e-5)
    assert found.value == pytest.approx(sum(alone) / 4, abs=1e-5)
    # Of random weights half are negative, and count as 0; the others depend on picture and caption.
    pairs = [(caption, image) for caption in CAPTIONS for image in images]
    every = get_metric(f"clip_score:{clip}").compute([c for c, _ in pairs], [["x"]] * 16, [i for _, i in pairs])
    assert len(set(every.per_sample.round(4))) > 6


def test_an_image_that_is_gone_loses_no_other(clip: Path, image_folder: Path, tmp_path: Path) -> None:
    images = [(str(image_folder / "0.jpg"),), (str(tmp_path / "gone.jpg"),), ()]
    predictions = [
        Prediction(str(number), "?", names, "a dog", ("a dog",), True, 2, 0.0) for number, names in enumerate(images)
    ]
    name = f"clip_score:{clip}"
    table = score(predictions, [name]).table
    assert table[name]["n"] == 1
    assert "gone.jpg" in table[name]["notes"][0]


@pytest.mark.parametrize("kind", ["nowhere", "another model"])
def test_no_clip(kind: str, tmp_path: Path, tiny_gemma3_dir: Path) -> None:
    place = tiny_gemma3_dir if kind == "another model" else tmp_path
    with pytest.raises(ConfigError, match="and .* is none" if kind == "another model" else "cannot load a CLIP from"):
        get_metric(f"clip_score:{place}").compute(["a"], [["b"]], [["c.jpg"]])

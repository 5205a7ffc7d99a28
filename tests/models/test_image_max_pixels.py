"""``image_max_pixels``: each family's own processor resizes larger images, and is saved so."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from vlmtune.config import ModelWithLoRAArguments
from vlmtune.errors import ConfigError
from vlmtune.evaluation.command import load
from vlmtune.models import loading
from vlmtune.models.boxes import whole
from vlmtune.models.families import FAMILIES
from vlmtune.models.features import features_key
from vlmtune.models.loading import limit_pixels, load_model_for_training, load_processor
from vlmtune.models.memory_images import soft_tokens

# Limit in pixels -> soft tokens of an image of 200 x 200 pixels, by hand from the tiny processors' settings; the last
# limit is above what they make of it. A token of Qwen's is 8 x 8 pixels, of Mistral's 16 x 16 and of Gemma 4's 12 x 12;
# tiles are 16 x 16 pixels and 4 tokens, and where there are several the whole image is one more.
QWEN = {64: 1, 600: 9, 10**5: 16}
IDEFICS = {300: 4, 1100: 4 * (4 + 1), 2304: 4 * (9 + 1), 10**5: 4 * (16 + 1)}
TILES = {256: 4, 1023: 4, 1024: 4 * (4 + 1), 10**5: 4 * (4 + 1)}
TOKENS = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"), QWEN),
    **dict.fromkeys(("idefics3", "smolvlm"), IDEFICS),
    **dict.fromkeys(("internvl", "granite_docling"), TILES),
    "mistral3": {1024: 4, 2400: 9, 10**5: 16},
    "gemma4": {70 * 144: 64, 10**5: 64},
}
SMALLEST = {**dict.fromkeys(TOKENS, 256), **dict.fromkeys(TOKENS.keys() & {n for n in TOKENS if "qwen" in n}, 64)}
SMALLEST |= {"mistral3": 1024, "gemma4": 70 * 144}


def processed(family, processor, size=(200, 200)):
    images = [[Image.new("RGB", (size[1], size[0]))]]
    options = {**family.image_options(processor), "return_tensors": "pt"}
    return {name: torch.as_tensor(value) for name, value in processor.image_processor(images, **options).items()}


def limits_or_refuses(family, load) -> None:
    """Tokens are as few as the family's rule and its processor say; other families say why not."""
    if family.name not in TOKENS:
        why = "the grids of its tiles" if "llava_" in family.name else "it sees every image at one size"
        with pytest.raises(ConfigError, match=f"image_max_pixels 99,999 cannot be used with {family.name}: .*{why}"):
            limit_pixels(load(), 99_999)
        return
    for pixels, tokens in TOKENS[family.name].items():
        processor = load()
        limit_pixels(processor, pixels)
        assert soft_tokens(processor, family, (200, 200)) == tokens, pixels
        text = processor.replace_image_token({**processed(family, processor), **_counts(family, processor)}, 0)
        assert text.count(processor.image_token) == tokens
        # A higher limit changes nothing.
        limit_pixels(processor, 10**8)
        assert soft_tokens(processor, family, (200, 200)) == tokens
    least = SMALLEST[family.name]
    with pytest.raises(ConfigError, match=f"its smallest image has {least:,} pixels; set no less"):
        limit_pixels(load(), least - 1)


def _counts(family, processor):
    """What a processor counts for itself beside the image processor's tensors."""
    found = processed(family, processor)
    if "rows" in found:
        return {name: found[name].tolist() for name in ("rows", "cols")}
    return {}


@pytest.mark.parametrize("name", FAMILIES)
def test_limits_or_refuses(name, family_dir) -> None:
    limits_or_refuses(FAMILIES[name], lambda: load_processor(family_dir(name)))


def test_families_of_one_processor_limit_it_alike() -> None:
    kinds = {}
    for family in FAMILIES.values():
        assert kinds.setdefault(family.processor_class, family.limit_pixels) is family.limit_pixels


def test_budgets_of_gemma4(family_dir) -> None:
    processor = load_processor(family_dir("gemma4"))
    for own, pixels, tokens in ((1120, 10**6, 1120), (1120, 560 * 144, 560), (560, 200 * 144, 140), (70, 10**6, 70)):
        processor.image_processor.max_soft_tokens = own
        limit_pixels(processor, pixels)
        assert processor.image_processor.max_soft_tokens == tokens


@pytest.mark.parametrize("name", sorted(TOKENS))
def test_saved_and_read_again(name, family_dir, tmp_path) -> None:
    pixels = min(TOKENS[name])
    processor = load_processor(family_dir(name), image_max_pixels=pixels)
    processor.save_pretrained(tmp_path)
    again = load_processor(tmp_path)
    assert again.image_processor.to_dict() == processor.image_processor.to_dict()
    assert soft_tokens(again, FAMILIES[name], (200, 200)) == TOKENS[name][pixels]


def test_features_are_kept_apart(family_dir) -> None:
    folder = family_dir("idefics3")
    model = load_model_for_training(folder, torch_dtype="float32")
    keys = [
        features_key(model, FAMILIES["idefics3"], load_processor(folder, image_max_pixels=pixels), dtype=torch.float32)
        for pixels in (None, 10**6, 1024)
    ]
    assert keys[0] == keys[1] != keys[2]


def test_boxes_are_counted_in_the_smaller_image(family_dir) -> None:
    """Qwen2.5-VL's boxes are pixels of the image as its processor makes it."""
    family, processor = FAMILIES["qwen2_5_vl"], load_processor(family_dir("qwen2_5_vl"), image_max_pixels=600)
    for size in ((400, 200), (100, 100), (30, 170)):
        _, height, width = processed(family, processor, size)["image_grid_thw"][0].tolist()
        view = family.view(processor, size)
        assert view.seen == (width * 4, height * 4) and width * height * 16 <= 600
        assert view == type(view)(0, 0, whole(processor, size).width, size[0], view.seen)


def test_an_adapter_keeps_the_size_that_it_was_trained_with(family_dir, tmp_path, monkeypatch) -> None:
    from vlmtune.config import AdapterArguments, QuantizationArguments
    from vlmtune.models.checkpoint import save_model_and_processor
    from vlmtune.models.lora import setup_lora

    folder = family_dir("qwen3_vl")
    model = setup_lora(load_model_for_training(folder, torch_dtype="float32"))
    save_model_and_processor(model, load_processor(folder, image_max_pixels=600), tmp_path)

    def tokens(pixels):
        model_args = ModelWithLoRAArguments(model_name_or_path=str(folder), image_max_pixels=pixels)
        _, processor = load(model_args, AdapterArguments(adapter=str(tmp_path)), QuantizationArguments())
        return soft_tokens(processor, FAMILIES["qwen3_vl"], (200, 200))

    assert [tokens(None), tokens(600), tokens(1000), tokens(64)] == [9, 9, 9, 1]


def test_refused_before_weights_load(family_dir, monkeypatch) -> None:
    monkeypatch.setattr(loading, "_load", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(ConfigError, match="cannot be used with llava: it sees every image at one size"):
        loading.load_model_for_inference(family_dir("llava"), image_max_pixels=10**5)
    with pytest.raises(ConfigError, match="image_max_pixels is 0; it must be at least 1"):
        ModelWithLoRAArguments(model_name_or_path="any", image_max_pixels=0)


def test_an_unknown_processor(family_dir) -> None:
    with pytest.raises(ConfigError, match="how AyaVisionProcessor resizes images is not known"):
        load_processor(family_dir("aya_vision"), image_max_pixels=10**5)

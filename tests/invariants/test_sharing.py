"""Shared rows compute what separate rows compute: loss and every gradient, in float64.

Tolerance 1e-10 relative: sums run in another order over rows of another length, nothing else differs.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import random
import sys
import types
from pathlib import Path
from unittest import mock

import pytest
import torch
from families.builders import VARIANTS
from families.gemma import GEMMA4_TEMPLATE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlmtune.batching import masks as masks_module
from vlmtune.batching.collator import BaseVLMDataCollator, SharedImageCollator
from vlmtune.data.sample import ImageRef, Message, Sample
from vlmtune.models.families import FAMILIES
from vlmtune.models.family import attention_window
from vlmtune.models.features import FeatureCache
from vlmtune.models.loading import load_processor
from vlmtune.training import image_reuse, shared_rows
from vlmtune.training.loss import install_supervised_loss, targets_from_labels
from vlmtune.training.shared_rows import shared_row_inputs

TOLERANCE = 1e-10
SHARING = [name for name in (*FAMILIES, *VARIANTS) if FAMILIES[VARIANTS.get(name, name)].sharing]
WORDS = "red green blue circle square triangle dog cat man woman left right above below two three".split()


@pytest.fixture(params=SHARING, scope="module")
def checkpoint(request):
    return request.param


@pytest.fixture(scope="module")
def family(checkpoint):
    return FAMILIES[VARIANTS.get(checkpoint, checkpoint)]


@pytest.fixture(scope="module")
def processor(checkpoint, family_dir):
    processor = load_processor(family_dir(checkpoint))
    if checkpoint == "gemma4_large":
        # Its own loses what stood before an answer once another turn follows; masks are the same with this one.
        processor.chat_template = GEMMA4_TEMPLATE
    return processor


@pytest.fixture(scope="module")
def float64_model(checkpoint, family, family_dir):
    with in_float64(family, family_dir(checkpoint)) as model:
        yield model


@contextlib.contextmanager
def in_float64(family, folder):
    """The family's tiny model in float64 with images that matter and norms that are not all one."""
    import transformers

    model = getattr(transformers, family.model_class).from_pretrained(folder, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    # The norms compute in float32 whatever the weights are; their backward pass then rounds each token's gradient,
    # which limits agreement to 2e-7. In float64 throughout, what is left is the order of sums.
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            own = _gemma_norm_in_float64 if hasattr(module, "_norm") else _norm_in_float64
            own = _gemma4_norm_in_float64 if hasattr(module, "with_scale") else own
            module.forward = types.MethodType(own, module)
        if type(module).__name__ == "Gemma4VisionPooler":
            module.forward = functools.partial(_pooled_in_float64, module.forward)
    install_supervised_loss(model)
    # The rotary positions of some towers do, too.
    source = sys.modules[type(model).__module__]
    with pytest.MonkeyPatch.context() as patch:
        if hasattr(source, "apply_rotary_pos_emb_vision"):
            patch.setattr(source, "apply_rotary_pos_emb_vision", _rotated_in_float64)
        yield model.eval()


def _gemma_norm_in_float64(self, x):
    return self._norm(x) * (1.0 + self.weight)


def _gemma4_norm_in_float64(self, x):
    return self._norm(x) * self.weight if self.with_scale else self._norm(x)


def _pooled_in_float64(pool, *args, **options):
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        return pool(*args, **options)


def _norm_in_float64(self, x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon) * self.weight


def _rotated_in_float64(q, k, cos, sin):
    cos, sin = cos.unsqueeze(-2).to(q.dtype), sin.unsqueeze(-2).to(q.dtype)

    def half(x):
        first, second = x.chunk(2, dim=-1)
        return torch.cat((-second, first), dim=-1)

    return q * cos + half(q) * sin, k * cos + half(k) * sin


def _pixels_in_float64(encoder):
    """The encoder, whose pixels are as precise as the model."""
    made = copy.copy(encoder)
    made.images = lambda sample: {
        name: value.double() if name == "pixel_values" else value for name, value in encoder.images(sample).items()
    }
    return made


def words(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))


def make_rows(folder: Path, groups: list[tuple[tuple[int, ...], int, int, bool]], seed: int = 0) -> list[dict]:
    """Rows of (images, texts, turns, equal prompts) groups, shuffled."""
    rng, rows = random.Random(seed), []
    for number, (images, texts, turns, equal) in enumerate(groups):
        prompt = words(rng, 1, 6)
        for text in range(texts):
            messages = []
            for turn in range(turns):
                question = prompt if equal and turn == 0 else words(rng, 1, 6)
                messages.append(Message.make("user", question, images=len(images) if turn == 0 else 0))
                messages.append(Message.make("assistant", words(rng, 1, 20)))
            refs = tuple(ImageRef(str(folder / f"{image}.jpg")) for image in images)
            row = Sample(f"{number}.{text}", refs, tuple(messages)).to_row()
            rows.append(row | {"image_key": " ".join(f"k{image}" for image in images)})
    rng.shuffle(rows)
    return rows


def loss_and_gradients(model, family, batches, *, checkpointing: bool = False):
    """Sum of the losses of some batches, divided by their targets, and all gradients."""
    model.zero_grad()
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    total, count = 0.0, 0.0
    for batch in batches:
        inputs = {name: value for name, value in batch.items() if name != "sample_ids"}
        if "labels" in inputs:
            inputs["target_sources"], inputs["target_ids"] = targets_from_labels(inputs.pop("labels"))
        inputs |= shared_row_inputs(family, model, inputs)
        for name in ("pixel_values",):
            if name in inputs:
                inputs[name] = inputs[name].double()
        weights = inputs.get("target_weights", torch.ones(len(inputs["target_ids"])))
        loss = model(**inputs)["loss"]
        loss.backward()
        total, count = total + loss.item(), count + float(weights.sum())
    if checkpointing:
        model.gradient_checkpointing_disable()
        model.eval()
    return total, count, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@torch.no_grad()
def loss_alone(model, family, batch) -> float:
    """Loss of one batch of shared rows."""
    inputs = {name: value for name, value in batch.items() if name != "sample_ids"}
    inputs |= shared_row_inputs(family, model, inputs)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    return model(**inputs)["loss"].item()


def assert_equal(first, second, tolerance: float = TOLERANCE, floor: float = 1e-6) -> None:
    assert first[1] == second[1], "numbers of supervised tokens differ"
    assert first[0] == pytest.approx(second[0], rel=tolerance)
    assert first[2].keys() == second[2].keys()
    # Some gradients are zero but for rounding: a bias of the keys changes no softmax.
    floor *= max(gradient.norm() for gradient in first[2].values())
    for name, gradient in first[2].items():
        difference = (gradient - second[2][name]).norm() / gradient.norm().clamp_min(floor)
        assert difference < tolerance, f"gradient of {name} differs by {difference:.1e}"


CASES = {
    "one text": [((0,), 1, 1, True)],
    "five captions": [((0,), 5, 1, True)],
    "different prompts": [((0,), 5, 1, False)],
    "twelve texts": [((1,), 12, 1, False)],
    "multi-turn": [((0,), 3, 3, False)],
    "three images": [((0, 1, 2), 4, 1, False)],
    "same images in another order": [((0, 1), 3, 1, False), ((1, 0), 3, 1, False)],
    "text only": [((), 3, 1, False)],
    "mixed": [((0,), 5, 1, True), ((), 2, 2, False), ((1, 2), 2, 1, False), ((3,), 1, 2, True)],
}


@pytest.mark.proves("share_images")
@pytest.mark.parametrize("case", CASES)
def test_shared_equals_separate(case, float64_model, processor, image_folder, family) -> None:
    rows = make_rows(image_folder, CASES[case])
    separate = [BaseVLMDataCollator(processor, family)([row]) for row in rows]
    shared = SharedImageCollator(processor, family)(rows)
    assert_equal(
        loss_and_gradients(float64_model, family, separate), loss_and_gradients(float64_model, family, [shared])
    )


def test_cases_pass_the_sliding_window(float64_model, processor, image_folder, family) -> None:
    """The cases above are no proof of the window unless rows and samples are longer than it."""
    window, _ = attention_window(float64_model.config.get_text_config())
    if not window:
        pytest.skip("no layer of this family has a window")
    rows = make_rows(image_folder, CASES["five captions"])
    alone = BaseVLMDataCollator(processor, family)(rows)
    assert alone["attention_mask"].sum(1).min() > window


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    groups=st.lists(
        st.tuples(
            st.sampled_from([(), (0,), (1,), (2, 3), (4, 5, 4)]), st.integers(1, 4), st.integers(1, 2), st.booleans()
        ),
        min_size=1,
        max_size=3,
    ),
    seed=st.integers(0, 10_000),
    multiple=st.sampled_from([None, 16]),
    max_texts=st.sampled_from([None, 2]),
    max_tokens=st.sampled_from([None, 60]),
)
def test_any_mixture(
    groups, seed, multiple, max_texts, max_tokens, float64_model, processor, image_folder, family
) -> None:
    rows = make_rows(image_folder, groups, seed)
    separate = BaseVLMDataCollator(processor, family)(rows)
    shared = SharedImageCollator(
        processor,
        family,
        pad_to_multiple_of=multiple,
        max_texts_per_row=max_texts,
        max_tokens_per_row=max_tokens,
    )(rows)
    assert sorted(shared["sample_ids"]) == sorted(row["id"] for row in rows)
    assert_equal(
        loss_and_gradients(float64_model, family, [separate]), loss_and_gradients(float64_model, family, [shared])
    )


def test_accumulated_batches_equal_one(float64_model, processor, image_folder, family) -> None:
    rows = make_rows(image_folder, CASES["mixed"])
    collator = SharedImageCollator(processor, family)
    parts = [collator(rows[start : start + 3]) for start in range(0, len(rows), 3)]
    assert_equal(
        loss_and_gradients(float64_model, family, parts), loss_and_gradients(float64_model, family, [collator(rows)])
    )


def test_gradient_checkpointing_changes_nothing(float64_model, processor, image_folder, family) -> None:
    batch = SharedImageCollator(processor, family)(make_rows(image_folder, CASES["mixed"]))
    assert_equal(
        loss_and_gradients(float64_model, family, [batch]),
        loss_and_gradients(float64_model, family, [batch], checkpointing=True),
    )


def test_eager_attention_equals_sdpa(float64_model, processor, image_folder, family) -> None:
    batch = SharedImageCollator(processor, family)(make_rows(image_folder, CASES["mixed"]))
    sdpa = loss_and_gradients(float64_model, family, [batch])
    # An audio tower has eager attention only.
    both = ("text_config", "vision_config")
    float64_model.set_attn_implementation(dict.fromkeys(both, "eager"))
    try:
        eager = loss_and_gradients(float64_model, family, [batch])
    finally:
        float64_model.set_attn_implementation(dict.fromkeys(both, "sdpa"))
    # Eager attention takes its softmax in float32.
    assert_equal(sdpa, eager, tolerance=1e-4, floor=1e-2)


def test_flex_attention_equals_sdpa(float64_model, processor, image_folder, family, monkeypatch) -> None:
    """The loss alone: PyTorch's FlexAttention has no backward pass on a CPU."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention
    from transformers.integrations import flex_attention as integration

    given = []

    def uncompiled(query, key, value, *, training, **options):
        given.append(options["block_mask"])
        return flex_attention(query, key, value, **options)

    monkeypatch.setattr(integration, "compile_friendly_flex_attention", uncompiled)
    batch = SharedImageCollator(processor, family)(make_rows(image_folder, CASES["mixed"]))
    sdpa = loss_alone(float64_model, family, batch)
    language = float64_model.get_submodule(family.parts["language"])
    if not language._supports_flex_attn:
        pytest.skip("transformers has no FlexAttention for this family, and refuses to load it so")
    language.set_attn_implementation("flex_attention")
    try:
        flex = loss_alone(float64_model, family, batch)
    finally:
        language.set_attn_implementation("sdpa")
    assert given and all(isinstance(mask, BlockMask) for mask in given)
    assert flex == pytest.approx(sdpa, rel=TOLERANCE)


@pytest.mark.proves("feature cache")
def test_cached_features_equal_recomputed(float64_model, processor, image_folder, family, tmp_path) -> None:
    if not family.feature_cache:
        pytest.skip("this family takes no prepared features")
    rows = make_rows(image_folder, CASES["mixed"])
    plain = SharedImageCollator(processor, family)
    cache = FeatureCache(tmp_path, {"family": family.name})
    for number in range(4):
        sample = Sample("x", (ImageRef(str(image_folder / f"{number}.jpg")),), ())
        (features,) = image_reuse._features(float64_model, _pixels_in_float64(plain.encoder), list(sample.images))
        cache.put(f"k{number}", features)
    cache.flush()
    cached = SharedImageCollator(processor, family, cache=FeatureCache(tmp_path, {"family": family.name}))(rows)
    assert "pixel_values" not in cached
    total, count, gradients = loss_and_gradients(float64_model, family, [plain(rows)])
    places = (family.parts["language"], family.parts["head"])
    trained = {name: value for name, value in gradients.items() if name.startswith(places)}
    again = loss_and_gradients(float64_model, family, [cached])
    assert_equal((total, count, trained), again)


@pytest.mark.parametrize("mutation", ["sees another branch", "window by index", "image not bidirectional", "one axis"])
def test_a_wrong_mask_is_noticed(
    mutation, float64_model, processor, image_folder, family, monkeypatch: pytest.MonkeyPatch
) -> None:
    if mutation == "window by index" and not attention_window(float64_model.config.get_text_config())[0]:
        pytest.skip("no layer of this family has a window")
    looks_forward = family.attention == "image_block" and family.block_layers(float64_model.config)
    if mutation == "image not bidirectional" and not looks_forward:
        pytest.skip("no image of this family looks forward")
    if mutation == "one axis" and family.positions_of is None:
        pytest.skip("positions of this family have one axis")
    rows = make_rows(image_folder, CASES["five captions"])
    true_masks = masks_module.tree_masks

    def wrong_masks(layout, positions, **options):
        if mutation == "sees another branch":
            layout = layout.clone()
            layout[1] = layout[1].clamp_max(1)
        elif mutation == "window by index":
            by_position = true_masks(layout, positions, **options)
            index = torch.arange(positions.shape[1])
            inside = (index[:, None] - index[None, :]) < options["sliding_window"]
            return by_position | {"sliding_attention": by_position["full_attention"] & inside}
        else:
            options["block_layers"] = ()
        return true_masks(layout, positions, **options)

    batch = SharedImageCollator(processor, family)(rows)
    if mutation == "one axis":
        batch["axes"] = batch["position_ids"].expand_as(batch["axes"])
    else:
        monkeypatch.setattr(shared_rows, "tree_masks", wrong_masks)
    shared = loss_and_gradients(float64_model, family, [batch])
    monkeypatch.undo()
    separate = loss_and_gradients(float64_model, family, [BaseVLMDataCollator(processor, family)(rows)])
    with pytest.raises(AssertionError):
        assert_equal(shared, separate)

"""Every family's record is right: ids, labels, soft tokens, logits, gradients, loss, saving, against transformers.

What is compared with is made as a user of plain transformers would, from the table of conversations and not from our
samples.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import pytest
import torch
import transformers
from families.builders import VARIANTS
from PIL import Image
from torch import nn
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from vlmtune.batching.collator import BaseVLMDataCollator, join_images
from vlmtune.batching.encode import Encoder
from vlmtune.config import GenerationArguments
from vlmtune.config.merge import MergeArguments
from vlmtune.data.sample import ImageRef, Message, Sample
from vlmtune.errors import EncodingError
from vlmtune.evaluation.generation import AnswerGenerator
from vlmtune.evaluation.merging import merge
from vlmtune.models.checkpoint import save_model_and_processor
from vlmtune.models.families import FAMILIES
from vlmtune.models.loading import load_model_for_inference, load_model_for_training, load_processor
from vlmtune.models.lora import prepare_full_finetuning, setup_lora
from vlmtune.models.processors import load_auto_processor
from vlmtune.models.quantization import get_quantization_config, quantised_modules
from vlmtune.training.loss import install_supervised_loss, targets_from_labels

CONVERSATIONS = {
    "one image": ([0], [("What color is the shape?", "red")]),
    "three images": ([1, 2, 3], [("Describe these images.", "a dog, a cat and a red circle")]),
    "text only": ([], [("What color is red?", "red")]),
    "two turns": ([4], [("What color is the shape?", "red"), ("Is there a dog?", "no dog is in the image")]),
}
# (height, width) in pixels: odd, very wide, very high, tiny, large.
SIZES = [(31, 47), (17, 160), (200, 21), (5, 6), (64, 64), (33, 32), (301, 299)]


@pytest.fixture(params=[*FAMILIES, *VARIANTS], scope="module")
def checkpoint(request):
    return request.param


@pytest.fixture(scope="module")
def family(checkpoint):
    return FAMILIES[VARIANTS.get(checkpoint, checkpoint)]


@pytest.fixture(scope="module")
def folder(checkpoint, family_dir):
    return family_dir(checkpoint)


@pytest.fixture(scope="module")
def processor(folder):
    return load_processor(folder)


@pytest.fixture(scope="module")
def ours(folder):
    return load_model_for_training(folder, torch_dtype="float32").eval()


@pytest.fixture(scope="module")
def encoder(processor, family):
    return Encoder(processor, family)


@pytest.fixture(scope="module")
def plain(folder, family):
    """The model and processor as plain transformers loads them."""
    # The attention code of ours, so that sums run in the same order.
    model = getattr(transformers, family.model_class).from_pretrained(folder, dtype=torch.float32)
    return model.eval(), load_auto_processor(folder)


@pytest.fixture
def collator(processor, family):
    return BaseVLMDataCollator(processor, family)


def can_take(checkpoint: str, name: str) -> bool:
    """Whether family and template can say the conversation, with nothing changed by later turns."""
    images, turns = CONVERSATIONS[name]
    if checkpoint == "paligemma":
        return bool(images) and len(turns) == 1
    # Their templates drop what stood before an answer once another turn follows.
    return checkpoint not in ("qwen3_5", "gemma4_large") or len(turns) == 1


def make_sample(name: str, image_folder, n_turns: int | None = None) -> Sample:
    images, turns = CONVERSATIONS[name]
    messages = []
    for index, (question, answer) in enumerate(turns[:n_turns]):
        messages.append(Message.make("user", question, images=len(images) if index == 0 else 0))
        messages.append(Message.make("assistant", answer))
    return Sample(name, tuple(ImageRef(path=str(image_folder / f"{i}.jpg")) for i in images), tuple(messages))


def official(family, processor, name: str, image_folder, *, generate: bool = False):
    """The inputs that plain transformers makes of the whole conversation, or of its prompt."""
    images, turns = CONVERSATIONS[name]
    pictures = [Image.open(image_folder / f"{number}.jpg").convert("RGB") for number in images]
    conversation = []
    for index, (question, answer) in enumerate(turns):
        places = [{"type": "image"} for _ in pictures] if index == 0 else []
        conversation.append({"role": "user", "content": [*places, {"type": "text", "text": question}]})
        conversation.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    given = {"images": [pictures]} if pictures else {}
    if family.name == "paligemma":
        ((question, answer),) = turns
        text = processor.image_token * len(pictures) + question
        return processor(text=text, return_tensors="pt", **given, **({} if generate else {"suffix": answer}))
    # As the model cards of those that can think say it for answers without thoughts.
    template = functools.partial(processor.apply_chat_template, tokenize=False, enable_thinking=False)
    text = template(conversation[:-1] if generate else conversation, add_generation_prompt=generate)
    if family.opening and template(conversation[:-1], add_generation_prompt=True).endswith(family.opening):
        # What the model is given stays before the answer that is learned.
        text = text.replace("<|turn>model\n", f"<|turn>model\n{family.opening}") if not generate else text
    if not family.closes_turn:
        # The paper's code ends each answer so (llava/conversation.py); the published template has a space.
        for _, answer in turns[: len(turns) - generate]:
            assert text.count(f"ASSISTANT: {answer} ") == 1
            text = text.replace(f"ASSISTANT: {answer} ", f"ASSISTANT: {answer}</s>")
    bos = processor.tokenizer.bos_token
    twice = bool(bos) and text.startswith(bos)
    return processor(text=text, return_tensors="pt", add_special_tokens=not twice, **given)


def forward(model, batch) -> torch.Tensor:
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "sample_ids")}
    with torch.no_grad():
        return model(**inputs).logits


class TestTokens:
    """What the model is given, and what it learns."""

    @pytest.mark.parametrize("name", CONVERSATIONS)
    def test_ids_are_the_processors(self, name, checkpoint, family, encoder, processor, image_folder) -> None:
        sample = make_sample(name, image_folder)
        if not can_take(checkpoint, name):
            with pytest.raises(EncodingError, match=f"'{name}'"):
                encoder(sample)
            return
        expected = official(family, processor, name, image_folder)["input_ids"][0].tolist()
        assert encoder(sample).input_ids == expected
        prompt = official(family, processor, name, image_folder, generate=True)["input_ids"][0].tolist()
        assert encoder.prompt(sample).input_ids == prompt == expected[: len(prompt)]

    @pytest.mark.parametrize("name", CONVERSATIONS)
    def test_answers_and_their_ends_are_supervised(
        self, name, checkpoint, family, encoder, processor, image_folder
    ) -> None:
        if not can_take(checkpoint, name):
            return
        encoded = encoder(make_sample(name, image_folder))
        spans, previous = [], False
        for token, flag in zip(encoded.input_ids, encoded.supervised, strict=True):
            if flag and not previous:
                spans.append([])
            if flag:
                spans[-1].append(token)
            previous = flag
        found = [processor.tokenizer.decode(span).strip() for span in spans]
        assert found == [answer + family.turn_end for _, answer in CONVERSATIONS[name][1]]

    def test_one_bos_where_the_family_has_it(self, family, encoder, processor, image_folder) -> None:
        ids = encoder(make_sample("one image", image_folder)).input_ids
        bos = processor.tokenizer.bos_token_id
        # Granite's is the token that ends a turn.
        found = ids.count(bos) if bos != encoder.turn_end_id else ids.index(bos) == 0
        assert (found if bos is not None else 0) == int(family.bos)

    def test_generation_stops_where_the_published_model_does(self, family, encoder, ours, processor) -> None:
        vocabulary = processor.tokenizer.get_vocab()
        assert encoder.turn_end == family.turn_end == family.terminators[0]
        assert family.turn_end in vocabulary
        stops = AnswerGenerator(ours, processor, GenerationArguments()).terminators
        published = ours.generation_config.eos_token_id
        published = set(published if isinstance(published, list) else [published])
        tokenizer = processor.tokenizer
        assert published <= stops <= published | {tokenizer.eos_token_id, tokenizer.pad_token_id}

    def test_image_token_is_the_models(self, family, ours, processor) -> None:
        token = getattr(ours.config, family.image_token_attribute)
        # Some processors count the tokens around an image's soft tokens as the image's.
        assert token in processor.image_token_ids
        assert type(processor).__name__ == family.processor_class

    @pytest.mark.parametrize("size", SIZES)
    def test_soft_tokens_are_the_features(self, size, family, encoder, ours, tmp_path) -> None:
        height, width = size
        image = Image.effect_noise((width, height), 90).convert("RGB")
        image.save(tmp_path / "a.png")
        sample = Sample(
            "odd",
            (ImageRef(str(tmp_path / "a.png")),),
            (Message.make("user", "What?", images=1), Message.make("assistant", "red")),
        )
        if family.name == "mistral3" and size == (5, 6):
            with pytest.raises(EncodingError, match=r"'odd'.*6 x 5 pixels is too small.*16 pixels"):
                encoder(sample)
            return
        encoded = encoder(sample)
        with torch.no_grad():
            features = ours.get_image_features(**join_images([encoded], family), return_dict=True).pooler_output
        soft = encoded.input_ids.count(getattr(ours.config, family.image_token_attribute))
        assert soft == sum(part.numel() for part in features) // TEXT_HIDDEN
        assert encoder(sample, pixels=False).input_ids == encoded.input_ids
        assert encoder(sample, pixels=False).axes == encoded.axes

    def test_resolution_counts_only_where_the_record_says_so(self, family, encoder, tmp_path) -> None:
        counts = set()
        for height, width in SIZES:
            Image.new("RGB", (width, height), "red").save(tmp_path / "a.png")
            ref = ImageRef(str(tmp_path / "a.png"))
            sample = Sample("a", (ref,), (Message.make("user", "What?", images=1), Message.make("assistant", "red")))
            with contextlib.suppress(EncodingError):
                counts.add(sum(encoder(sample).token_type_ids))
        assert (len(counts) > 1) == family.sized

    def test_turned_photos_count_by_their_upright_size(self, family, encoder, tmp_path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.effect_noise((160, 17), 90).convert("RGB").save(tmp_path / "a.jpg", exif=exif)
        ref = ImageRef(str(tmp_path / "a.jpg"))
        sample = Sample("a", (ref,), (Message.make("user", "What?", images=1), Message.make("assistant", "red")))
        assert encoder(sample, pixels=False).input_ids == encoder(sample).input_ids

    @pytest.mark.parametrize("name", CONVERSATIONS)
    def test_positions_are_the_models(self, name, checkpoint, family, encoder, ours, processor, image_folder) -> None:
        if not can_take(checkpoint, name):
            return
        encoded = encoder(make_sample(name, image_folder))
        assert bool(encoded.axes) == hasattr(ours.model, "get_rope_index")
        if not encoded.axes:
            return
        ids, types = torch.tensor([encoded.input_ids]), torch.tensor([encoded.token_type_ids])
        grids = encoded.image_inputs.get("image_grid_thw")
        expected, _ = ours.model.get_rope_index(ids, image_grid_thw=grids, mm_token_type_ids=types)
        assert torch.equal(torch.tensor(encoded.axes), expected[:, 0])

    @pytest.mark.parametrize("name", ["one image", "three images"])
    def test_the_model_is_given_what_the_processor_gives(
        self, name, checkpoint, family, collator, processor, image_folder
    ) -> None:
        if not can_take(checkpoint, name):
            return
        given = official(family, processor, name, image_folder)
        batch = collator([make_sample(name, image_folder).to_row()])
        assert batch.keys() - {"labels"} == given.keys() - {"labels"}
        assert all(torch.equal(batch[key], torch.as_tensor(given[key])) for key in family.image_inputs)
        if name == "three images":
            by_sample = given["pixel_values"].shape[0] == 1
            assert by_sample == (family.image_axis == 1)


TEXT_HIDDEN = 64


class TestLogits:
    """Equal to plain transformers."""

    @pytest.mark.parametrize("name", CONVERSATIONS)
    def test_single(self, name, checkpoint, family, ours, plain, collator, image_folder) -> None:
        if not can_take(checkpoint, name):
            return
        batch = collator([make_sample(name, image_folder).to_row()])
        expected = forward(plain[0], official(family, plain[1], name, image_folder))
        torch.testing.assert_close(forward(ours, batch), expected, rtol=1e-5, atol=1e-6)

    def test_mixed_batch_of_0_1_and_3_images(self, checkpoint, family, ours, plain, collator, image_folder) -> None:
        names = [name for name in CONVERSATIONS if can_take(checkpoint, name)]
        batch = collator([make_sample(name, image_folder).to_row() for name in names])
        logits = forward(ours, batch)
        for index, name in enumerate(names):
            expected = forward(plain[0], official(family, plain[1], name, image_folder))[0]
            assert int(batch["attention_mask"][index].sum()) == len(expected)
            torch.testing.assert_close(logits[index, : len(expected)], expected, rtol=1e-4, atol=1e-5, msg=name)

    def test_images_matter(self, family, ours, collator, image_folder) -> None:
        samples = [make_sample("one image", image_folder)]
        samples.append(dataclasses.replace(samples[0], images=(ImageRef(str(image_folder / "7.jpg")),)))
        first, second = (forward(ours, collator([sample.to_row()]))[0, -1] for sample in samples)
        assert (first - second).abs().max() > 1e-4

    def test_attention_is_as_the_record_says(self, family, ours, collator, image_folder) -> None:
        """A prompt's last token changes what comes before it in no family but those with a prefix."""
        batch = collator([make_sample("one image", image_folder).to_row()])
        first = int((batch["labels"][0] != -100).nonzero()[0])
        changed = dict(batch, input_ids=batch["input_ids"].clone())
        other = collator.processor.tokenizer.encode("dog", add_special_tokens=False)[-1]
        changed["input_ids"][0, first - 1] = other
        difference = (forward(ours, changed) - forward(ours, batch)).abs().amax(-1)[0] > 1e-6
        assert bool(difference[: first - 1].any()) == (family.attention == "prefix")
        # And an answer's token changes none before it.
        changed["input_ids"] = batch["input_ids"].clone()
        changed["input_ids"][0, first] = other
        difference = (forward(ours, changed) - forward(ours, batch)).abs().amax(-1)[0] > 1e-6
        assert not difference[:first].any() and difference[first:].all()


class TestTraining:
    """Gradients reach what is trained and nothing else, and the loss is the plain one."""

    def test_parts_cover_every_parameter(self, family, ours) -> None:
        assert family.parts.keys() == {"language", "projector", "vision", "head"}
        assert all(list(ours.get_submodule(place).parameters()) for place in family.parts.values())
        places = tuple(place + "." for place in family.parts.values())
        places += tuple(name + "." for name in family.unused(ours.config))
        outside = {name for name, _ in ours.named_parameters() if not name.startswith(places)}
        assert outside == set(family.projector_parameters)
        assert ours.get_submodule(family.parts["head"]) is ours.get_output_embeddings()
        chosen = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(ours.config)]
        assert type(ours).__name__ == family.model_class == chosen.__name__

    def test_layers_are_the_lists_of_a_part(self, family, ours) -> None:
        for part, place in family.layers.items():
            layers = ours.get_submodule(f"{family.parts[part]}.{place}")
            assert isinstance(layers, torch.nn.ModuleList) and len(layers)

    @pytest.mark.parametrize("scope", ["language", "projector", "vision"])
    def test_lora_targets_are_all_linear_layers(self, scope, checkpoint, family, ours) -> None:
        inner = [p + "." for p in family.parts.values() if p.startswith(family.parts[scope] + ".")]
        found = {
            name.rpartition(".")[2]
            for name, module in ours.named_modules()
            if isinstance(module, nn.Linear)
            and name.startswith(family.parts[scope] + ".")
            and not name.startswith(tuple(family.unused(ours.config)) or "-")
            and not name.startswith(tuple(inner))
        }
        names = set(family.lora_targets[scope])
        assert found == names or (checkpoint in VARIANTS and found < names)

    @pytest.mark.proves("LoRA")
    @pytest.mark.parametrize("scopes", [("language",), ("projector", "vision"), ("language", "projector", "vision")])
    def test_adapters(self, scopes, family, folder, collator, image_folder) -> None:
        if scopes == ("projector", "vision") and not family.lora_targets["projector"]:
            scopes = ("vision",)
        model = setup_lora(load_model_for_training(folder, torch_dtype="float32"), lora_scopes=scopes, lora_dropout=0)
        _shake(model)
        _backward(model, collator, image_folder)
        _check_gradients(model)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        places = tuple(f"base_model.model.{family.parts[scope]}" for scope in scopes)
        assert trained and all(name.startswith(places) for name in trained)
        assert all(any(name.startswith(place) for name in trained) for place in places)

    @pytest.mark.parametrize("parts", [("language", "projector"), ("vision",), ("projector",)])
    def test_parts_in_full(self, parts, family, folder, collator, image_folder) -> None:
        model = prepare_full_finetuning(load_model_for_training(folder, torch_dtype="float32"), parts)
        _backward(model, collator, image_folder)
        _check_gradients(model)
        for part in ("language", "projector", "vision"):
            inner = tuple(p + "." for p in family.parts.values() if p.startswith(family.parts[part] + "."))
            flags = {
                p.requires_grad
                for name, p in model.named_parameters()
                if name.startswith(family.parts[part] + ".") and not name.startswith(inner)
                if not name.startswith(tuple(family.unused(model.config)) or "-")
            }
            assert flags == {part in parts}, part

    def test_supervised_loss_is_the_dense_one(self, checkpoint, family, folder, collator, image_folder) -> None:
        names = [name for name in CONVERSATIONS if can_take(checkpoint, name)]
        batch = collator([make_sample(name, image_folder).to_row() for name in names])
        model = load_model_for_training(folder, torch_dtype="float32").eval()
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits = model(**inputs).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        dense = nn.functional.cross_entropy(logits[labels != -100], labels[labels != -100], reduction="sum")
        dense.backward()
        expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        install_supervised_loss(model, chunk_tokens=3)
        sources, ids = targets_from_labels(batch["labels"])
        loss = model(**inputs, target_sources=sources, target_ids=ids)["loss"]
        loss.backward()
        torch.testing.assert_close(loss, dense)
        for name, gradient in expected.items():
            found = dict(model.named_parameters())[name].grad
            torch.testing.assert_close(found, gradient, rtol=1e-3, atol=1e-5, msg=name)

    @pytest.mark.proves("4-bit")
    def test_four_bit_only_in_the_language_model(self, family, folder, collator, image_folder) -> None:
        pytest.importorskip("bitsandbytes")
        model = load_model_for_training(
            folder, quantization_config=get_quantization_config(use_4bit=True), torch_dtype="float32"
        )
        place = family.parts["language"] + "."
        linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith(place)}
        assert set(quantised_modules(model)) == linear
        adapted = setup_lora(model, lora_scopes=("language",), lora_dropout=0)
        _shake(adapted)
        _backward(adapted, collator, image_folder)
        _check_gradients(adapted)


def _shake(model) -> None:
    """Adapters begin at zero, where half of them have no gradient."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)


def _backward(model, collator, image_folder) -> None:
    batch = collator([make_sample("three images", image_folder).to_row()])
    model(**batch).loss.backward()


def _check_gradients(model) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{name} is trained and has no gradient"
            # A bias of the keys changes no softmax.
            assert parameter.grad.any() or name.endswith("k_proj.bias"), f"{name} has a gradient of zero"
        else:
            assert parameter.grad is None, f"{name} is frozen and has a gradient"


class TestSavingAndGeneration:
    """What is saved is what was trained, and answers do not depend on how they are computed."""

    def test_an_adapter_comes_back(self, family, folder, collator, image_folder, tmp_path) -> None:
        model = setup_lora(load_model_for_training(folder, torch_dtype="float32"), lora_r=4).eval()
        _shake(model)
        batch = collator([make_sample("one image", image_folder).to_row()])
        base = forward(load_model_for_training(folder, torch_dtype="float32").eval(), batch)
        save_model_and_processor(model, collator.processor, tmp_path)
        again, processor = load_model_for_inference(tmp_path, torch_dtype="float32", device="cpu")
        same = BaseVLMDataCollator(processor, family)([make_sample("one image", image_folder).to_row()])
        assert {key: value.shape for key, value in same.items()} == {key: value.shape for key, value in batch.items()}
        assert all(torch.equal(same[key], batch[key]) for key in batch)
        assert torch.equal(forward(again, same), forward(model, batch))
        assert not torch.allclose(forward(again, same), base, atol=1e-3)

    def test_a_full_model_comes_back(self, family, folder, collator, image_folder, tmp_path) -> None:
        model = load_model_for_training(folder, torch_dtype="float32").eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.01
        batch = collator([make_sample("one image", image_folder).to_row()])
        save_model_and_processor(model, collator.processor, tmp_path)
        again, _ = load_model_for_inference(tmp_path, torch_dtype="float32", device="cpu")
        assert torch.equal(forward(again, batch), forward(model, batch))
        if (videos := getattr(collator.processor, "video_processor", None)) is not None:
            assert load_processor(tmp_path).video_processor.to_dict() == videos.to_dict()

    @pytest.mark.slow
    @pytest.mark.proves("merge")
    def test_a_merged_model_is_the_adapted_one(self, family, folder, collator, image_folder, tmp_path) -> None:
        scopes = [scope for scope, names in family.lora_targets.items() if names]
        model = setup_lora(load_model_for_training(folder, torch_dtype="float32"), lora_r=4, lora_scopes=scopes).eval()
        _shake(model)
        save_model_and_processor(model, collator.processor, tmp_path / "adapter")
        places = {"adapter": str(tmp_path / "adapter"), "output_dir": str(tmp_path / "merged")}
        merge(MergeArguments(**places, samples=1, max_new_tokens=2))
        merged, processor = load_model_for_inference(tmp_path / "merged", torch_dtype="float32", device="cpu")
        assert not hasattr(merged, "peft_config")
        batch = BaseVLMDataCollator(processor, family)([make_sample("one image", image_folder).to_row()])
        torch.testing.assert_close(forward(merged, batch), forward(model, batch), rtol=1e-3, atol=1e-4)
        with model.disable_adapter():
            assert not torch.allclose(forward(merged, batch), forward(model, batch), atol=1e-3)

    def test_answers_shared_separate_and_alone(self, checkpoint, family, ours, processor, image_folder) -> None:
        names = [name for name in CONVERSATIONS if can_take(checkpoint, name)]
        samples = [make_sample(name, image_folder) for name in names]
        other = (Message.make("user", "What is it? A dog?", images=1),)
        samples.append(dataclasses.replace(samples[0], id="other", messages=other))
        options = GenerationArguments(max_new_tokens=6, eval_batch_size=4)

        def answers(share: bool, samples) -> list[tuple[str, int]]:
            return [(a.text, a.tokens) for a in AnswerGenerator(ours, processor, options, share=share)(samples)]

        expected = answers(False, samples)
        assert len(set(expected)) > 1
        assert answers(True, samples) == expected
        assert [answers(False, [sample])[0] for sample in samples] == expected

    def test_answers_are_plain_transformers(self, checkpoint, family, ours, plain, processor, image_folder) -> None:
        generator = AnswerGenerator(ours, processor, GenerationArguments(max_new_tokens=6))
        for name in (name for name in CONVERSATIONS if can_take(checkpoint, name)):
            inputs = official(family, plain[1], name, image_folder, generate=True)
            inputs = {key: value for key, value in inputs.items() if key != "labels"}
            ends = sorted(generator.terminators)
            with torch.no_grad():
                new = plain[0].generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=ends)
            text = processor.tokenizer.decode(new[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            assert generator([make_sample(name, image_folder)])[0].text == text.strip()

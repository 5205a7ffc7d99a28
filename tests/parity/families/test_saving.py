"""What is saved of each family comes back, merges, and answers as plain transformers does."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from parity.conversations import CONVERSATIONS, can_take, forward, make_sample, official, shake

from vlmtune.batching.collator import BaseVLMDataCollator
from vlmtune.config import GenerationArguments
from vlmtune.config.merge import MergeArguments
from vlmtune.data.sample import Message
from vlmtune.evaluation.generation import AnswerGenerator
from vlmtune.evaluation.merging import merge
from vlmtune.models.checkpoint import save_model_and_processor
from vlmtune.models.loading import load_model_for_inference, load_model_for_training, load_processor
from vlmtune.models.lora import setup_lora


class TestSavingAndGeneration:
    """What is saved is what was trained, and answers do not depend on how they are computed."""

    def test_an_adapter_comes_back(self, family, folder, collator, image_folder, tmp_path) -> None:
        model = setup_lora(load_model_for_training(folder, torch_dtype="float32"), lora_r=4).eval()
        shake(model)
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
        shake(model)
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

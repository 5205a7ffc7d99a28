"""Answers are what the model says alone, without a cache, from the prompt alone (PITFALLS 9, 26)."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from evaluation.answers import LONG, NEW_TOKENS, texts

from vlmtune.config import GenerationArguments
from vlmtune.data.sample import Message
from vlmtune.evaluation.generation import AnswerGenerator

SHARE = pytest.mark.parametrize("share", [True, False], ids=["shared", "separate"])


@SHARE
def test_batched_answers_are_what_the_model_says_alone(share, answering, mixed, oracle) -> None:
    expected = [oracle(sample) for sample in mixed]
    assert len(set(expected)) == len(expected), "answers must differ for the test to see a mistake"
    assert texts(answering(share)(mixed)) == expected


@SHARE
@pytest.mark.parametrize("size", [1, 2, 100])
def test_batch_size_and_order_change_nothing(share, size, answering, mixed) -> None:
    expected = texts(answering(share)(mixed))
    assert texts(answering(share, eval_batch_size=size)(mixed)) == expected
    assert texts(answering(share, eval_batch_size=size)(mixed[::-1])) == expected[::-1]


def test_samples_pass_the_sliding_window(model, answering, mixed) -> None:
    window = model.config.get_text_config().sliding_window
    lengths = {len(answering().encoder.prompt(sample).input_ids) for sample in mixed}
    prefixes = {len(prompt.prefix) for prompt in answering()._encode(mixed)}
    assert min(lengths) <= window < max(lengths)
    assert max(prefixes) > window


def test_wrong_masks_are_noticed(answering, mixed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding on the right changes answers: the comparison above can fail."""
    from vlmtune.evaluation import generation

    expected, original = texts(answering(False)(mixed)), generation.pad
    monkeypatch.setattr(generation, "pad", lambda *args, **options: original(*args, **options | {"side": "right"}))
    assert texts(answering(False, eval_batch_size=100)(mixed)) != expected


def test_images_matter(answering, make) -> None:
    answers = texts(answering()([make([number], "Describe this image.") for number in range(6)]))
    assert len(set(answers)) > 3


@SHARE
def test_same_image_after_other_texts(share, answering, make, oracle) -> None:
    """One image, prefixes that differ: each needs the image's pixels."""
    samples = [make([0], "What?"), make([0], "What?", system="Be brief."), make([0], "no?", system="yes")]
    assert texts(answering(share)(samples)) == [oracle(sample) for sample in samples]


def test_an_image_is_decoded_once(answering, make, decoded) -> None:
    questions = ["What?", "Is there a dog?", "no?"]
    samples = [
        make([image], question, system=system) for image in (0, 1) for question in questions for system in (None, "a")
    ]
    answering()(samples)
    assert decoded == {"0.jpg": 1, "1.jpg": 1}


def test_an_images_prefix_is_computed_once(answering, make, model, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = model.get_submodule("model.vision_tower").forward

    def counted(*args, **options):
        seen.append(len(options.get("pixel_values", args[0] if args else None)))
        return original(*args, **options)

    monkeypatch.setattr(model.get_submodule("model.vision_tower"), "forward", counted)
    answering()([make([image], question) for question in ("What?", "Is there a dog?", LONG) for image in (0, 1)])
    assert sum(seen) == 2
    seen.clear()
    answering(False)([make([image], question) for question in ("What?", "Is there a dog?", LONG) for image in (0, 1)])
    assert sum(seen) == 6


@SHARE
def test_equal_prompts_are_answered_once(share, answering, make, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [make([0], "What?", answer) for answer in ("red", "a dog", "blue")] + [make([1], "What?")]
    generator = answering(share)
    counted: list[int] = []
    original = generator._encode
    monkeypatch.setattr(generator, "_encode", lambda unique: counted.append(len(unique)) or original(unique))
    found = generator(samples)
    assert counted == [2]
    assert found[0] == found[1] == found[2] != found[3]


def inputs_of(model, generator, samples) -> list[torch.Tensor]:
    """Every tensor of token ids that the model is given."""
    found: list[torch.Tensor] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: found.append(kwargs["input_ids"].clone()), with_kwargs=True
    )
    try:
        generator(samples)
    finally:
        hook.remove()
    return found


@SHARE
def test_inputs_hold_no_answer_token(share, answering, make, model, processor) -> None:
    answer = "yellow woman"
    sample = make([0], "What?", answer, earlier=[("Is there a dog?", "no")])
    given = inputs_of(model, answering(share, max_new_tokens=1), [sample])
    ids = torch.cat([tensor.flatten() for tensor in given]).tolist()
    assert ids == answering().encoder.prompt(sample).input_ids
    text = processor.tokenizer.decode(ids)
    assert "yellow" not in text
    assert text.endswith("<start_of_turn>model\n")
    assert "<start_of_turn>model\nno<end_of_turn>" in text
    other = dataclasses.replace(sample, messages=(*sample.messages[:-1], Message.make("assistant", "a green cat")))
    again = inputs_of(model, answering(share, max_new_tokens=1), [other])
    assert all(torch.equal(one, two) for one, two in zip(given, again, strict=True))


class TestEnd:
    """An answer ends with its turn or with its limit."""

    @SHARE
    @pytest.mark.parametrize("name", ["<end_of_turn>", "<eos>"])
    def test_every_terminator_stops(self, name, share, answering, make, model, processor) -> None:
        sample = make([], "What color is red?")
        whole = answering(share)([sample])[0]
        assert not whole.ended
        assert whole.tokens == NEW_TOKENS
        token, steps = processor.tokenizer.convert_tokens_to_ids(name), []

        def force(module, args, output):
            steps.append(1)
            if len(steps) == 5:
                output[..., token] = 1e6
            return output

        hook = model.lm_head.register_forward_hook(force)
        try:
            answer = answering(share)([sample])[0]
        finally:
            hook.remove()
        assert answer.ended
        assert answer.tokens == 5
        assert len(steps) == 5, "generation went on after its end"
        assert answer.text == answering(share, max_new_tokens=4)([sample])[0].text

    @SHARE
    def test_ended_rows_wait_for_the_others(self, share, answering, make, model, processor, oracle) -> None:
        samples = [make([], f"{word}?") for word in ("green", "dog", "cat")]
        lengths = {len(answering().encoder.prompt(sample).input_ids) for sample in samples}
        assert len(lengths) == 1, "they must be answered in one batch"
        token, steps = processor.tokenizer.convert_tokens_to_ids("<end_of_turn>"), []

        def force(module, args, output):
            steps.append(len(output))
            if len(steps) == 2:
                output[1, :, token] = 1e6
            return output

        hook = model.lm_head.register_forward_hook(force)
        try:
            found = answering(share)(samples)
        finally:
            hook.remove()
        assert steps == [3] * NEW_TOKENS
        assert [answer.ended for answer in found] == [False, True, False]
        assert [answer.tokens for answer in found] == [NEW_TOKENS, 2, NEW_TOKENS]
        assert [found[0].text, found[2].text] == [oracle(samples[0]), oracle(samples[2])]

    @SHARE
    @pytest.mark.parametrize("count", [1, 3])
    def test_limit(self, share, count, answering, make, processor) -> None:
        found = answering(share, max_new_tokens=count)([make([0], "What?"), make([], "What?")])
        assert [(answer.tokens, answer.ended) for answer in found] == [(count, False)] * 2

    def test_an_unknown_terminator_is_passed_over(self, model, processor, monkeypatch: pytest.MonkeyPatch) -> None:
        from vlmtune.evaluation import generation
        from vlmtune.models.families import FAMILIES

        family = dataclasses.replace(FAMILIES["gemma3"], terminators=("<end_of_turn>", "<no_such_token>"))
        monkeypatch.setattr(generation, "get_family", lambda model: family)
        end = processor.tokenizer.convert_tokens_to_ids("<end_of_turn>")
        assert AnswerGenerator(model, processor).terminators == {end}


class TestSampling:
    """Drawn answers depend on the seed and the samples alone."""

    @SHARE
    def test_seeded_and_varied(self, share, answering, make) -> None:
        samples = [make([number], "What?") for number in range(3)]
        generator = answering(share, temperature=1.0)
        torch.manual_seed(1)
        first = texts(generator(samples))
        torch.manual_seed(2)
        assert texts(generator(samples)) == first
        generator.seed = 1
        assert texts(generator(samples)) != first
        assert first != texts(answering(share)(samples))

    @SHARE
    def test_leaves_the_random_state(self, share, answering, make) -> None:
        before = torch.get_rng_state()
        answering(share, temperature=1.0)([make([0], "What?")])
        assert torch.equal(torch.get_rng_state(), before)

    @SHARE
    def test_top_p_near_zero_is_greedy(self, share, answering, mixed) -> None:
        samples = mixed[:4]
        expected = texts(answering(share)(samples))
        assert texts(answering(share, temperature=5.0, top_p=1e-6)(samples)) == expected

    def test_top_p_keeps_the_likeliest(self, answering) -> None:
        logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(2000, 4)
        torch.manual_seed(0)
        drawn = answering(temperature=1.0, top_p=0.7)._next(logits)
        counts = torch.bincount(drawn, minlength=4) / 2000
        # .5 and .3 pass .7 together; drawn in proportion. Three standard errors.
        assert counts.tolist() == pytest.approx([0.625, 0.375, 0, 0], abs=0.033)

    def test_temperature_sharpens(self, answering) -> None:
        logits = torch.tensor([[0.6, 0.4]]).log().expand(2000, 2)
        torch.manual_seed(0)
        drawn = answering(temperature=0.5)._next(logits)
        assert (drawn == 0).double().mean().item() == pytest.approx(0.36 / 0.52, abs=0.033)


class TestModelState:
    """The model is left as it was."""

    @SHARE
    @pytest.mark.parametrize("failing", [False, True])
    def test_restored(self, share, failing, tiny_model, processor, make, monkeypatch: pytest.MonkeyPatch) -> None:
        tiny_model.train()
        tower = tiny_model.get_submodule("model.vision_tower").eval()
        tiny_model.config.get_text_config().use_cache = False
        generator = AnswerGenerator(tiny_model, processor, GenerationArguments(max_new_tokens=1), share=share)
        if failing:
            monkeypatch.setattr(generator, "_answers", lambda samples: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                generator([make([0])])
        else:
            generator([make([0])])
        assert tiny_model.training
        assert tiny_model.model.language_model.training
        assert not any(module.training for module in tower.modules())
        assert tiny_model.config.get_text_config().use_cache is False
        assert all(parameter.grad is None for parameter in tiny_model.parameters())

    @SHARE
    def test_a_training_model_answers_the_same(self, share, model, answering, mixed) -> None:
        """Dropout and a cache that is off change no answer."""
        expected = texts(answering(share)(mixed))
        config = model.config.get_text_config()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        config.use_cache = False
        try:
            assert texts(answering(share)(mixed)) == expected
        finally:
            model.eval()
            model.gradient_checkpointing_disable()
            config.use_cache = True

    def test_adapted_model(self, processor, make, tiny_model) -> None:
        from vlmtune.models.lora import setup_lora

        samples = [make([0], "What?"), make([], "What?")]
        options = GenerationArguments(max_new_tokens=3)
        before = AnswerGenerator(tiny_model, processor, options)(samples)
        adapted = setup_lora(tiny_model, lora_r=2)
        # An adapter begins as no change.
        assert texts(AnswerGenerator(adapted, processor, options)(samples)) == texts(before)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter += torch.randn_like(parameter)
        assert texts(AnswerGenerator(adapted, processor, options)(samples)) != texts(before)


def test_no_samples(answering) -> None:
    assert answering()([]) == []
    assert answering(False)([]) == []


def test_seconds_are_shared_out(answering, mixed) -> None:
    found = answering()(mixed)
    assert all(answer.seconds > 0 for answer in found)

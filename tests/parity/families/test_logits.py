"""Every family's logits equal plain transformers'."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from parity.conversations import CONVERSATIONS, can_take, forward, make_sample, official

from vlmtune.data.sample import ImageRef


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

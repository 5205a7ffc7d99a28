"""How likely a model finds given texts as answers: options of a multiple choice, and references for perplexity.

Texts about one image are scored from one computation of its prefix, as in :mod:`.generation`.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmtune.batching.collator import join_images, pad
from vlmtune.data.sample import Message, Sample
from vlmtune.evaluation.generation import AnswerGenerator, Prompt, blocks_of, rows_of

# Logits held at once: 2**27 float32 numbers are 512 MiB.
LOGITS_AT_ONCE = 2**27


@dataclass(frozen=True)
class TextLoss:
    """What a text costs a model.

    Attributes:
        loss: the sum over its tokens of minus the logarithm of their probability, in nats.
        tokens: how many they are.
    """

    loss: float
    tokens: int


@dataclass(frozen=True)
class _Text:
    """A prompt with its answer, and the places of the answer's tokens in it."""

    prompt: Prompt
    targets: tuple[int, ...]


class TextScorer:
    """Scores texts as answers.

    Args:
        generator: of the model; its batch size and sharing are used.
    """

    def __init__(self, generator: AnswerGenerator) -> None:
        self.generator = generator

    @torch.no_grad()
    def __call__(self, samples: Sequence[Sample], texts: Sequence[str], *, ended: bool = True) -> list[TextLoss]:
        """Return the loss of each text as the answer to the prompt of the sample beside it.

        Args:
            samples: their own answers are not looked at.
            texts: one a sample.
            ended: count the token that ends the answer too, as training does.

        Raises:
            EncodingError: a text cannot be an answer.
        """
        encoded = self._encode(samples, texts, ended)
        losses: dict[int, TextLoss] = {}
        with self.generator.evaluating():
            for places, logits in self._shared(encoded) if self.generator.share else self._separate(encoded):
                for place, row in zip(places, logits, strict=True):
                    losses[place] = _loss(encoded[place], row)
        return [losses[place] for place in range(len(samples))]

    def choose(self, samples: Sequence[Sample], options: Sequence[Sequence[str]]) -> list[dict[str, float]]:
        """Return the log-probability of each option of each sample, the likeliest first.

        The token that ends the answer is not counted, as in EleutherAI's lm-evaluation-harness.
        """
        pairs = [(place, option) for place, listed in enumerate(options) for option in listed]
        losses = self([samples[place] for place, _ in pairs], [option for _, option in pairs], ended=False)
        found: list[dict[str, float]] = [{} for _ in samples]
        for (place, option), loss in zip(pairs, losses, strict=True):
            found[place][option] = -loss.loss
        return [dict(sorted(one.items(), key=lambda item: -item[1])) for one in found]

    def _encode(self, samples: Sequence[Sample], texts: Sequence[str], ended: bool) -> list[_Text]:
        encoder, share = self.generator.encoder, self.generator.share
        opened, decoded = dict[Any, int](), dict[Any, Any]()
        found = []
        for sample, text in zip(samples, texts, strict=True):
            asked = (sample.images, sample.prompt)
            if asked not in opened:
                opened[asked] = len(encoder.prompt(sample, pixels=False).input_ids)
            answered = dataclasses.replace(sample, messages=(*sample.prompt, Message.make("assistant", text)))
            encoded = encoder(answered, pixels=not share or sample.images not in decoded)
            if share:
                inputs = decoded.setdefault(sample.images, encoded.image_inputs)
                encoded = dataclasses.replace(encoded, image_inputs=inputs)
            targets = [i for i in range(opened[asked], len(encoded.input_ids)) if encoded.supervised[i]]
            if not ended and encoded.input_ids[targets[-1]] in self.generator.terminators:
                targets.pop()
            found.append(_Text(Prompt.cut(encoded, sample.images), tuple(targets)))
        return found

    def _separate(self, texts: list[_Text]) -> Iterator[tuple[list[int], Tensor]]:
        """Yield the logits of each text alone: without padding, positions are what they were in training."""
        generator = self.generator
        for place, text in enumerate(texts):
            encoded = text.prompt.encoded
            batch = pad(
                [encoded],
                pad_token_id=generator.processor.tokenizer.pad_token_id,
                side="right",
                token_type_ids=generator.family.needs_token_type_ids,
                family=generator.family,
            )
            batch |= join_images([encoded], generator.family)
            inputs = {name: tensor.to(generator.device) for name, tensor in batch.items()}
            yield [place], generator.model(**inputs, use_cache=False, logits_to_keep=_kept(text)).logits

    def _shared(self, texts: list[_Text]) -> Iterator[tuple[list[int], Tensor]]:
        generator, prompts = self.generator, [text.prompt for text in texts]
        vocabulary = generator.model.config.get_text_config().vocab_size
        for block in blocks_of(prompts, generator.options.eval_batch_size):
            cache = generator.prefill([prompts[group[0]] for group in block])
            alike: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
            for row, group in enumerate(block):
                for place in group:
                    alike[len(prompts[place].rest), _kept(texts[place])].append((row, place))
            for (length, kept), found in alike.items():
                size = max(1, min(generator.options.eval_batch_size, LOGITS_AT_ONCE // (kept * vocabulary)))
                for start in range(0, len(found), size):
                    part = found[start : start + size]
                    rows = torch.tensor([row for row, _ in part], device=generator.device)
                    rest = torch.tensor([prompts[place].rest for _, place in part], device=generator.device)
                    n_prefix = len(prompts[part[0][1]].prefix)
                    axes = generator.axes([prompts[place] for _, place in part], slice(n_prefix, None))
                    output = generator.model(
                        input_ids=rest,
                        attention_mask=torch.ones((len(part), n_prefix + length), dtype=torch.long, device=rest.device),
                        past_key_values=rows_of(cache, rows),
                        use_cache=True,
                        logits_to_keep=kept,
                        **({} if axes is None else {"position_ids": axes}),
                    )
                    yield [place for _, place in part], output.logits


def _kept(text: _Text) -> int:
    """Number of last positions whose logits are needed: from the one before the answer."""
    return len(text.prompt.encoded.input_ids) - text.targets[0] + 1


def _loss(text: _Text, logits_KV: Tensor) -> TextLoss:
    ids = text.prompt.encoded.input_ids
    # The token at place i is predicted from the one before it; the last row of logits belongs to the last token.
    places = torch.tensor([i - 1 - len(ids) for i in text.targets], device=logits_KV.device) + len(logits_KV)
    wanted = torch.tensor([ids[i] for i in text.targets], device=logits_KV.device)
    losses = torch.nn.functional.cross_entropy(logits_KV[places].double(), wanted, reduction="sum")
    return TextLoss(float(losses), len(text.targets))

"""Answers by generation: from the prompt alone, each image's prefix computed once for all its questions.

Prompts of one length after their images are answered together, so a batch needs no padding; where a family's
prefix cannot be shared, ``model.generate`` answers with padding on the left.

Shape legend: B prompts, P prefix tokens, S tokens after it, V vocabulary.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmtune.batching.collator import join_images, pad
from vlmtune.batching.encode import EncodedSample, Encoder
from vlmtune.config import GenerationArguments
from vlmtune.data.images import TIMEOUT
from vlmtune.data.sample import Sample
from vlmtune.errors import VlmtuneError
from vlmtune.evaluation.probe import require_sound
from vlmtune.models.families import get_family
from vlmtune.models.family import Family


@dataclass(frozen=True)
class Answer:
    """One generated answer.

    Attributes:
        text: without control tokens and white space around it; boxes in pixels of the image, whatever the family's.
        ended: the model closed its turn; else ``max_new_tokens`` cut it.
        tokens: generated, the terminator included.
        seconds: the answer's share of its batch's time.
        said: the text as the model wrote it.
    """

    text: str
    ended: bool
    tokens: int
    seconds: float
    said: str = ""


@dataclass(frozen=True)
class Prompt:
    """A prompt, or one with its answer, cut after its last image: ``prefix`` through the image, ``rest`` after it."""

    encoded: EncodedSample
    images: tuple[Any, ...]
    prefix: tuple[int, ...]
    rest: tuple[int, ...]

    @classmethod
    def cut(cls, encoded: EncodedSample, images: tuple[Any, ...]) -> Prompt:
        """Cut after the last image's tokens; at least one token is left to predict from."""
        ids = encoded.input_ids
        last_image = max((i for i, flag in enumerate(encoded.token_type_ids) if flag), default=-1)
        place = min(last_image + 1, len(ids) - 1)
        return cls(encoded, images, tuple(ids[:place]), tuple(ids[place:]))


class AnswerGenerator:
    """Generates answers with one model.

    Args:
        model: in evaluation mode, adapted by PEFT or not.
        processor: its processor.
        options: limits and sampling; greedy by default.
        share: compute each image's prefix once for all prompts about it, where the family allows.
        max_pixels: pixel limit of an image.
        image_timeout: seconds that an image may take to be read and decoded.
        seed: of sampling; the same prompts in one call get the same answers.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        options: GenerationArguments | None = None,
        *,
        share: bool = True,
        max_pixels: int | None = None,
        image_timeout: float = TIMEOUT,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.seed = seed
        self.processor = processor
        self.options = options or GenerationArguments()
        self.family = get_family(model)
        self.share = share and self.family.sharing
        self.encoder = Encoder(processor, self.family, max_pixels=max_pixels, image_timeout=image_timeout)
        self.device = next(model.parameters()).device
        self.terminators = terminators(processor, self.family)
        require_sound(model, processor, self.family)

    @torch.no_grad()
    def __call__(self, samples: Sequence[Sample]) -> list[Answer]:
        """Answer each sample's prompt, in order; equal prompts about equal images are answered once."""
        with self.evaluating(), self._seeded(samples):
            answers = self._answers(samples)
        return [
            dataclasses.replace(answer, text=self.encoder.answer(sample, answer.text))
            for sample, answer in zip(samples, answers, strict=True)
        ]

    def problem(self, sample: Sample) -> str | None:
        """Return why a sample cannot be asked, such as an image that cannot be read, or ``None``."""
        try:
            self.encoder.prompt(sample)
        except VlmtuneError as error:
            return str(error)
        return None

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Put the model in evaluation mode with its cache of keys and values on, and back afterwards."""
        cache = self.model.config.get_text_config().use_cache
        in_training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        # Training turns the cache of keys and values off.
        self.model.config.get_text_config().use_cache = True
        try:
            yield
        finally:
            self.model.config.get_text_config().use_cache = cache
            for module in in_training:
                module.training = True

    @contextmanager
    def _seeded(self, samples: Sequence[Sample]) -> Iterator[None]:
        """Draw by the seed and the samples alone, and leave the process's random state as it was."""
        if not self.options.temperature:
            yield
            return
        names = "\n".join(sample.id for sample in samples)
        seed = hashlib.sha256(f"{self.seed}\n{names}".encode()).digest()
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(int.from_bytes(seed[:8], "big"))
            yield

    def _answers(self, samples: Sequence[Sample]) -> list[Answer]:
        places: dict[Any, int] = {}
        unique: list[Sample] = []
        for sample in samples:
            key = (sample.images, sample.prompt)
            if key not in places:
                places[key] = len(unique)
                unique.append(sample)
        prompts = self._encode(unique)
        answers: dict[int, Answer] = {}
        for batch, found in self._shared(prompts) if self.share else self._separate(prompts):
            answers |= dict(zip(batch, found, strict=True))
        return [answers[places[sample.images, sample.prompt]] for sample in samples]

    def _encode(self, samples: Sequence[Sample]) -> list[Prompt]:
        prompts, decoded = [], dict[Any, Any]()
        for sample in samples:
            # An image is decoded once; prompts about it hold the same tensors.
            encoded = self.encoder.prompt(sample, pixels=not self.share or sample.images not in decoded)
            if self.share:
                inputs = decoded.setdefault(sample.images, encoded.image_inputs)
                encoded = dataclasses.replace(encoded, image_inputs=inputs)
            prompts.append(Prompt.cut(encoded, sample.images))
        return prompts

    def _separate(self, prompts: list[Prompt]) -> Iterator[tuple[list[int], list[Answer]]]:
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].encoded.input_ids))
        tokenizer, options = self.processor.tokenizer, self.options
        for start in range(0, len(order), options.eval_batch_size):
            chosen = order[start : start + options.eval_batch_size]
            began = time.perf_counter()
            encoded = [prompts[i].encoded for i in chosen]
            batch = pad(
                encoded,
                pad_token_id=tokenizer.pad_token_id,
                side="left",
                token_type_ids=self.family.needs_token_type_ids,
                family=self.family,
            )
            batch |= join_images(encoded, self.family)
            # `top_k` off: else the model's own, or 50, would cut what may be drawn.
            sampling = {"temperature": options.temperature, "top_p": options.top_p, "top_k": 0}
            generated = self.model.generate(
                **{name: tensor.to(self.device) for name, tensor in batch.items()},
                max_new_tokens=options.max_new_tokens,
                do_sample=bool(options.temperature),
                eos_token_id=sorted(self.terminators),
                pad_token_id=tokenizer.pad_token_id,
                **(sampling if options.temperature else {}),
            )
            new = generated[:, batch["input_ids"].shape[1] :].tolist()
            share = (time.perf_counter() - began) / len(chosen)
            yield chosen, [self._answer(tokens, share) for tokens in new]

    def _shared(self, prompts: list[Prompt]) -> Iterator[tuple[list[int], list[Answer]]]:
        for block in blocks_of(prompts, self.options.eval_batch_size):
            yield from self._block(prompts, block)

    def _block(self, prompts: list[Prompt], groups: list[list[int]]) -> Iterator[tuple[list[int], list[Answer]]]:
        """Prefill the prefix of each group in one batch, then answer prompts with rests of one length together."""
        began = time.perf_counter()
        members = [index for group in groups for index in group]
        cache = self.prefill([prompts[group[0]] for group in groups])
        prefill = (time.perf_counter() - began) / len(members)
        by_length: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for row, group in enumerate(groups):
            for index in group:
                by_length[len(prompts[index].rest)].append((row, index))
        for found in by_length.values():
            for start in range(0, len(found), self.options.eval_batch_size):
                part = found[start : start + self.options.eval_batch_size]
                began = time.perf_counter()
                rows = torch.tensor([row for row, _ in part], device=self.device)
                rest = torch.tensor([prompts[index].rest for _, index in part], device=self.device)
                n_prefix = len(prompts[part[0][1]].prefix)
                axes = self.axes([prompts[index] for _, index in part], slice(n_prefix, None))
                new = self._decode(rows_of(cache, rows), n_prefix, rest, axes)
                share = prefill + (time.perf_counter() - began) / len(part)
                yield [index for _, index in part], [self._answer(tokens, share) for tokens in new]

    def prefill(self, firsts: list[Prompt]) -> Any:
        """Return the keys and values of the prompts' prefixes, all of one length; nothing where that is nought."""
        if not firsts[0].prefix:
            return None
        ids = torch.tensor([prompt.prefix for prompt in firsts])
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.family.needs_token_type_ids and self.family.positions_of is None:
            types = [prompt.encoded.token_type_ids[: len(prompt.prefix)] for prompt in firsts]
            inputs[self.family.token_types_name] = torch.tensor(types)
        inputs |= join_images([prompt.encoded for prompt in firsts], self.family)
        axes = self.axes(firsts, slice(0, len(firsts[0].prefix)))
        inputs |= {} if axes is None else {"position_ids": axes}
        inputs = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        return self.model(**inputs, use_cache=True, logits_to_keep=1).past_key_values

    def axes(self, prompts: list[Prompt], span: slice) -> Tensor | None:
        """Positions of the prompts' tokens on each axis, (axes, B, tokens), where they have several."""
        if self.family.positions_of is None:
            return None
        rows = [[axis[span] for axis in prompt.encoded.axes] for prompt in prompts]
        return torch.tensor(rows, device=self.device).transpose(0, 1)

    def _decode(self, cache: Any, n_prefix: int, rest_BS: Tensor, axes: Tensor | None = None) -> list[list[int]]:
        """Extend each prompt token by token until it ends; return the new tokens of each."""
        ends = torch.tensor(sorted(self.terminators), device=self.device)
        pad_id = self.processor.tokenizer.pad_token_id
        ids, length = rest_BS, n_prefix + rest_BS.shape[1]
        open_B = torch.ones(len(ids), dtype=torch.bool, device=self.device)
        columns: list[Tensor] = []
        for _ in range(self.options.max_new_tokens):
            mask = torch.ones((len(ids), length), dtype=torch.long, device=self.device)
            given = {} if axes is None else {"position_ids": axes}
            output = self.model(
                input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1, **given
            )
            cache = output.past_key_values
            token_B = torch.where(open_B, self._next(output.logits[:, -1]), pad_id)
            columns.append(token_B)
            open_B &= ~torch.isin(token_B, ends)
            if not open_B.any():
                break
            ids, length = token_B[:, None], length + 1
            # What is generated is text: its axes go on together.
            axes = None if axes is None else axes[:, :, -1:] + 1
        return [list(row) for row in torch.stack(columns, dim=1).tolist()]

    def _next(self, logits_BV: Tensor) -> Tensor:
        if not self.options.temperature:
            return logits_BV.argmax(-1)
        probabilities, order = torch.sort((logits_BV.float() / self.options.temperature).softmax(-1), descending=True)
        outside = probabilities.cumsum(-1) - probabilities >= self.options.top_p
        drawn = torch.multinomial(probabilities.masked_fill(outside, 0.0), 1)
        return order.gather(-1, drawn).squeeze(-1)

    def _answer(self, tokens: list[int], seconds: float) -> Answer:
        end = next((i for i, token in enumerate(tokens) if token in self.terminators), None)
        kept = tokens if end is None else tokens[:end]
        text = self.processor.tokenizer.decode(kept, skip_special_tokens=True).strip()
        return Answer(text, end is not None, len(kept) + (end is not None), seconds, text)


def terminators(processor: Any, family: Family) -> frozenset[int]:
    """Ids of the tokens on which a family's models stop, those that the tokenizer has."""
    vocabulary = processor.tokenizer.get_vocab()
    return frozenset(vocabulary[token] for token in family.terminators if token in vocabulary)


def blocks_of(prompts: Sequence[Prompt], most: int) -> Iterator[list[list[int]]]:
    """Yield runs of ``most`` groups of prompts: each shares a prefix, and the prefixes of a run are of one length.

    The keys and values of a run's prefixes are in memory together.
    """
    by_image: dict[Any, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        by_image[prompt.images, prompt.prefix].append(index)
    by_length: dict[int, list[list[int]]] = defaultdict(list)
    for members in by_image.values():
        by_length[len(prompts[members[0]].prefix)].append(members)
    for length, groups in by_length.items():
        # Without images there is nothing to share: one group holds all.
        size = most if length else len(groups)
        for start in range(0, len(groups), size):
            yield groups[start : start + size]


def rows_of(cache: Any, rows: Tensor) -> Any:
    """Return a copy of a cache with the rows chosen, each as often as it is named."""
    if cache is None:
        return None
    chosen = copy.deepcopy(cache)
    chosen.batch_select_indices(rows)
    return chosen

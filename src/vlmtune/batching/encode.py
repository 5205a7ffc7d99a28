"""Samples to token ids and the mask of supervised tokens.

The chat template decides the tokens and the spans: the conversation is rendered once whole and once up to
each assistant turn, image places are expanded to soft tokens by the processor itself, and the texts are
tokenized afterwards. So training sees exactly the ids that the processor gives at inference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jinja2

from vlmtune.data.boxes import BOXES
from vlmtune.data.images import TIMEOUT, content_hash, decode, upright_size
from vlmtune.data.sample import Message, Sample
from vlmtune.errors import EncodingError, NothingSupervisedError, TooLongError
from vlmtune.models.boxes import tell, understand
from vlmtune.models.family import Family

TooLong = Literal["error", "drop", "truncate_text"]
# Rendered texts in memory at once.
PROMPTS_KEPT = 10_000


@dataclass(frozen=True)
class EncodedSample:
    """Token ids of one conversation.

    Attributes:
        id: the sample's id.
        input_ids: token ids, image soft tokens included; length L.
        supervised: L flags, true where the token is a training target.
        token_type_ids: L numbers, 1 on image soft tokens and 0 elsewhere.
        n_images: number of images in the conversation.
        image_key: content hash of each image in order; empty unless asked for.
        image_inputs: the processor's tensors for the images (``pixel_values`` first axis: images or tiles).
        axes: L positions on each axis, for families with ``multi_axis`` positions; else empty.
    """

    id: str
    input_ids: list[int]
    supervised: list[bool]
    token_type_ids: list[int]
    n_images: int
    image_key: tuple[str, ...] = ()
    image_inputs: Mapping[str, Any] = field(default_factory=dict)
    axes: tuple[list[int], ...] = ()

    @property
    def n_supervised(self) -> int:
        """Number of tokens the loss is taken on; the first token of a row has nothing to predict it from."""
        return sum(self.supervised[1:])


class Encoder:
    """Encodes samples for one processor and family.

    Args:
        processor: the model's ``AutoProcessor``.
        family: the model's family record.
        max_length: most tokens of a sample, soft tokens included; ``None`` for no limit.
        on_too_long: what happens above it: ``error``; ``drop`` (the caller leaves the sample out and counts
            it); ``truncate_text`` (text is cut from the end, images never are).
        max_pixels: pixel budget of the image decoder.
        image_timeout: seconds that an image may take to be read and decoded.
    """

    def __init__(
        self,
        processor: Any,
        family: Family,
        *,
        max_length: int | None = None,
        on_too_long: TooLong = "error",
        max_pixels: int | None = None,
        image_timeout: float = TIMEOUT,
    ) -> None:
        self.image_timeout = image_timeout
        self.processor = processor
        self.family = family
        self.max_length = max_length
        self.on_too_long = on_too_long
        self.max_pixels = max_pixels
        tokenizer = processor.tokenizer
        self.turn_end = _turn_end(tokenizer, family)
        self.turn_end_id: int = tokenizer.convert_tokens_to_ids(self.turn_end)
        self.image_token_ids: frozenset[int] = frozenset(processor.image_token_ids)
        self.control_tokens = _control_tokens(processor, family)
        # Rendered prompts: one for all captions, and rendering takes half of the time of a text.
        self._prompts: dict[tuple[Any, tuple[Message, ...]], str] = {}

    def __call__(self, sample: Sample, *, pixels: bool = True, hashes: bool = False) -> EncodedSample:
        """Encode a training sample.

        Args:
            sample: a conversation with at least one assistant turn.
            pixels: decode the images and fill ``image_inputs``.
            hashes: fill ``image_key``.

        Raises:
            ImageError: an image cannot be decoded.
            EncodingError: a text holds a control token, or images and places do not match.
            TooLongError: the sample is longer than ``max_length``, and the policy does not allow cutting it
                or the cut would hit an image.
            NothingSupervisedError: no token is left to learn from.
        """
        image_inputs = self.images(sample) if pixels and sample.images else {}
        layout = image_inputs or self.layout(sample)
        input_ids, supervised = self.tokens(sample, layout)
        input_ids, supervised = self._limit(sample, input_ids, supervised)
        if not any(supervised[1:]):
            raise NothingSupervisedError(
                f"Sample {sample.id!r} has no token to learn from: it needs an assistant turn with text. "
                "Give it an answer or leave it out."
            )
        return EncodedSample(
            id=sample.id,
            input_ids=input_ids,
            supervised=supervised,
            token_type_ids=self._token_types(input_ids),
            n_images=len(sample.images),
            image_key=tuple(content_hash(image) for image in sample.images) if hashes else (),
            image_inputs=image_inputs,
            axes=self._axes(input_ids, layout),
        )

    def prompt(self, sample: Sample, *, pixels: bool = True) -> EncodedSample:
        """Encode what generation is given: the turns before the last answer, opened for the model's turn."""
        sample = self._told(sample)
        image_inputs = self.images(sample) if pixels and sample.images else {}
        layout = image_inputs or self.layout(sample)
        text = self._expand(self.render(sample, sample.prompt, generate=True), len(sample.images), layout, sample)
        input_ids, _ = self._tokenize(text)
        return EncodedSample(
            id=sample.id,
            input_ids=input_ids,
            supervised=[False] * len(input_ids),
            token_type_ids=self._token_types(input_ids),
            n_images=len(sample.images),
            image_inputs=image_inputs,
            axes=self._axes(input_ids, layout),
        )

    def images(self, sample: Sample) -> dict[str, Any]:
        """Decode the sample's images and return the image processor's tensors.

        Raises:
            ImageError: an image cannot be decoded.
            EncodingError: the family takes no image of such a size.
        """
        pictures = [decode(image, max_pixels=self.max_pixels, timeout=self.image_timeout) for image in sample.images]
        if not self.family.generic:
            self._taken(sample, self.family.layout, [(picture.height, picture.width) for picture in pictures])
        options = {**self.family.image_options(self.processor), "return_tensors": "pt"}
        return dict(self.processor.image_processor([pictures], **options))

    def layout(self, sample: Sample) -> Mapping[str, Any]:
        """Return what the processor counts soft tokens from, without decoding an image.

        Raises:
            ImageError: an image's header cannot be read; only where its size matters.
            EncodingError: the family takes no image of such a size.
        """
        if not sample.images:
            return {}
        sized, most = self.family.sized, self.max_pixels
        sizes = [upright_size(image, max_pixels=most) if sized else (0, 0) for image in sample.images]
        layout: Mapping[str, Any] = self._taken(sample, self.family.layout, sizes)
        return layout

    def _taken(self, sample: Sample, of_family: Callable[[Any, Any], Any], sizes: Any) -> Any:
        """Ask the family about images of some sizes, which it may not take."""
        try:
            return of_family(self.processor, sizes)
        except ValueError as error:
            raise EncodingError(
                f"Sample {sample.id!r} has an image that {self.family.name} does not take: {error}. Resize or crop the "
                "image, or leave out that row."
            ) from error

    def tokens(self, sample: Sample, image_inputs: Mapping[str, Any] | None = None) -> tuple[list[int], list[bool]]:
        """Return token ids and supervised flags of the whole conversation, without a length limit."""
        sample = self._told(sample)
        messages, n_images = sample.messages, len(sample.images)
        inputs = image_inputs or self.layout(sample)
        text = self._expand(self.render(sample, messages), n_images, inputs, sample)
        input_ids, offsets = self._tokenize(text)
        supervised = [False] * len(input_ids)
        for turn, message in enumerate(messages):
            if message.role != "assistant":
                continue
            seen = sum(m.n_images for m in messages[:turn])
            prompt = self._expand(self.render(sample, messages[:turn], generate=True), seen, inputs, sample)
            is_last = turn == len(messages) - 1
            closed = text if is_last else self.render(sample, messages[: turn + 1])
            through = text if is_last else self._expand(closed, seen, inputs, sample)
            if not (text.startswith(prompt) and text.startswith(through)):
                raise EncodingError(
                    f"Sample {sample.id!r}: the chat template renders earlier turns differently once a later turn "
                    "follows, so what the model would be trained on is not what it is given when it answers. "
                    "Split the conversation into one sample a turn, or use a chat template without that."
                )
            self._mark(sample, message, input_ids, offsets, supervised, len(prompt), len(through))
        return input_ids, supervised

    def answer(self, sample: Sample, text: str) -> str:
        """Return what the model said about a sample in the form of its references: boxes in pixels of the image."""
        if BOXES not in sample.meta:
            return text
        size = self._box_size(sample)
        return understand(text, self.family.boxes, self._taken(sample, self.family.view, size), size)

    def _told(self, sample: Sample) -> Sample:
        """Check a sample, and return it in the family's words."""
        self._check(sample)
        if BOXES not in sample.meta:
            return sample
        return tell(sample, self.family.boxes, self._taken(sample, self.family.view, self._box_size(sample)))

    def _box_size(self, sample: Sample) -> tuple[int, int]:
        """Height and width of the image that boxes lie in.

        Raises:
            EncodingError: the sample has not one image, or its file is not of the size that the boxes were drawn on.
            ImageError: the image's header cannot be read.
        """
        if len(sample.images) != 1:
            raise EncodingError(f"Sample {sample.id!r} has boxes and {len(sample.images)} images; it needs one.")
        height, width = upright_size(sample.images[0], max_pixels=self.max_pixels)
        drawn_on = sample.meta[BOXES].get("size")
        if drawn_on is not None and list(drawn_on) != [width, height]:
            raise EncodingError(
                f"Sample {sample.id!r}: the boxes are of an image of {drawn_on[0]} x {drawn_on[1]} pixels, but "
                f"{sample.images[0].name} has {width} x {height} when it is upright. Use the images that were "
                "annotated, and boxes drawn on them as they are shown."
            )
        return height, width

    def _mark(
        self,
        sample: Sample,
        message: Message,
        input_ids: list[int],
        offsets: Sequence[tuple[int, int]],
        supervised: list[bool],
        start: int,
        end: int,
    ) -> None:
        """Mark the tokens of one assistant turn, through its terminator, as supervised."""
        inside = [i for i, (first, last) in enumerate(offsets) if first < end and last > start and last > first]
        if not inside or offsets[inside[0]][0] != start:
            raise EncodingError(
                f"Sample {sample.id!r}: the tokenizer joins the prompt's last characters and the answer "
                f"{message.text[:40]!r} into one token, so the answer cannot be supervised on its own. "
                "Remove leading white space or punctuation from the answer."
            )
        for index in inside:
            supervised[index] = True
            if input_ids[index] == self.turn_end_id:
                return
        raise EncodingError(
            f"Sample {sample.id!r}: the chat template does not close the assistant's turn with "
            f"{self.turn_end!r}, as {self.family.name} needs. Use the chat template that came with the model."
        )

    def _limit(self, sample: Sample, ids: list[int], supervised: list[bool]) -> tuple[list[int], list[bool]]:
        limit = self.max_length
        if limit is None or len(ids) <= limit:
            return ids, supervised
        image_tokens = sum(token in self.image_token_ids for token in ids)
        counts = f"{len(ids)} tokens ({image_tokens} of them image tokens), more than max_length {limit}"
        if self.on_too_long != "truncate_text":
            raise TooLongError(
                f"Sample {sample.id!r} has {counts}. Raise max_length, or set on_too_long to 'drop' or 'truncate_text'."
            )
        if any(token in self.image_token_ids for token in ids[limit:]):
            raise TooLongError(
                f"Sample {sample.id!r} has {counts}, and cutting it there would cut an image. "
                "Raise max_length or use fewer images a sample."
            )
        return ids[:limit], supervised[:limit]

    def _check(self, sample: Sample) -> None:
        if problem := sample.problem():
            raise EncodingError(f"Sample {sample.id!r} {problem}. Mend or leave out that row.")
        for message in sample.messages:
            found = next((token for token in self.control_tokens if token in message.text), None)
            if found:
                raise EncodingError(
                    f"Sample {sample.id!r}: the {message.role}'s text contains {found!r}, which the model reads as a "
                    "control token, not as text. Remove it from the text; images belong in the row's images."
                )

    def render(self, sample: Sample, messages: tuple[Message, ...], *, generate: bool = False) -> str:
        """Return what the chat template, or the family, makes of messages; opened for an answer by ``generate``."""
        # A person may have changed the template since.
        key = (self.processor.chat_template, messages)
        if generate and key in self._prompts:
            return self._prompts[key]
        conversation = [message.to_template() for message in messages]
        try:
            if self.family.render is not None:
                text = self.family.render(self.processor, conversation, generate)
            else:
                text = self._template(conversation, generate)
        except (ValueError, jinja2.TemplateError) as error:
            raise EncodingError(f"Sample {sample.id!r} cannot be rendered for {self.family.name}: {error}") from error
        if generate:
            if len(self._prompts) >= PROMPTS_KEPT:
                self._prompts.clear()
            self._prompts[key] = text
        return text

    def _template(self, conversation: list[dict[str, Any]], generate: bool) -> str:
        def rendered(part: list[dict[str, Any]], generate: bool = False) -> str:
            options = {"tokenize": False, "add_generation_prompt": generate, **self.family.template_options}
            return str(self.processor.apply_chat_template(part, **options))

        if self.family.closes_turn:
            text = rendered(conversation, generate)
            opening = self.family.opening
            if opening and not generate and conversation and conversation[-1]["role"] == "assistant":
                prompt = rendered(conversation[:-1], True)
                start = len(prompt.removesuffix(opening))
                if prompt.endswith(opening) and text[:start] == prompt[:start] and not text.startswith(prompt):
                    text = prompt + text[start:]
            return text
        text, done = "", ""
        for turn, message in enumerate(conversation, 1):
            if message["role"] == "assistant":
                through = rendered(conversation[:turn])
                piece = through.removeprefix(done)
                text += piece if self.turn_end in piece else piece.rstrip(" ") + self.turn_end
                done = through
        if generate or not conversation or conversation[-1]["role"] != "assistant":
            text += rendered(conversation, generate).removeprefix(done)
        return text

    def _expand(self, text: str, n_images: int, image_inputs: Mapping[str, Any], sample: Sample) -> str:
        """Replace each image place by its soft tokens, as the processor does."""
        places = text.count(self.processor.image_token)
        if places != n_images:
            raise EncodingError(
                f"Sample {sample.id!r}: the chat template renders {places} image place(s) for {n_images} image(s). "
                "Use the chat template that came with the model."
            )
        if not n_images:
            return text
        replacements = [self.processor.replace_image_token(image_inputs, index) for index in range(n_images)]
        return str(self.processor.get_text_with_replacements([text], images_replacements=replacements)[0][0])

    def _tokenize(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        tokenizer = self.processor.tokenizer
        # The template may have written BOS already; a second one would be trained on.
        has_bos = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
        encoding = tokenizer(text, add_special_tokens=not has_bos, return_offsets_mapping=True)
        return list(encoding["input_ids"]), [tuple(pair) for pair in encoding["offset_mapping"]]

    def _token_types(self, input_ids: Sequence[int]) -> list[int]:
        return [int(token in self.image_token_ids) for token in input_ids]

    def _axes(self, input_ids: Sequence[int], layout: Mapping[str, Any]) -> tuple[list[int], ...]:
        if self.family.positions_of is None:
            return ()
        return tuple(self.family.positions_of(self.processor, self._token_types(input_ids), layout))


def _turn_end(tokenizer: Any, family: Family) -> str:
    """The family's turn end, or the first of its terminators that the tokenizer knows."""
    known = (token for token in (family.turn_end, *family.terminators) if token in tokenizer.get_added_vocab())
    return next(known, family.turn_end)


def _control_tokens(processor: Any, family: Family) -> tuple[str, ...]:
    """Texts that the tokenizer would turn into control tokens, the longest first."""
    added = processor.tokenizer.added_tokens_decoder.values()
    special = {str(token.content) for token in added if token.special}
    special |= {processor.image_token, family.turn_end, *family.terminators}
    return tuple(sorted((token for token in special if token and not token.isspace()), key=len, reverse=True))

"""Token counts of many rows in a fraction of the time that encoding them takes.

Encoding renders each conversation by the chat template and tokenizes all of it. Here the template's own words are found
out once for each shape of conversation (:mod:`vlmtune.batching.shapes`), and texts alone are tokenized, many at once on
all cores. A shape is relied on only if it gives what the encoder gives for texts made to mislead it.

Shape legend: N rows.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from datasets.utils.tqdm import tqdm

from vlmtune.batching.encode import Encoder
from vlmtune.batching.shapes import ImagePlace, Shape, find_shape, number_of_texts, probes, with_texts
from vlmtune.data.boxes import BOXES
from vlmtune.data.images import upright_size
from vlmtune.data.pages import batches, number_of_batches
from vlmtune.data.sample import ROLES, ImageRef, Sample
from vlmtune.data.store import SCHEMA
from vlmtune.errors import EncodingError, ImageError

# Tokens, supervised tokens and soft tokens of a row.
Counts = tuple[int, int, int]
Size = tuple[int, int]
# A piece of a conversation, and where its answer begins or -1.
Filled = tuple[str, int]
Row = tuple[Shape, Sequence[str], tuple[ImagePlace, ...]]

UNKNOWN = -1
ROWS_AT_ONCE = 4_000
# With more shapes than this, finding them out takes longer than it spares.
MOST_SHAPES = 300
PIECES_KEPT = 20_000


class _Begun(NamedTuple):
    """Rows with the pieces of each, the pieces that are being tokenized, and what that gives."""

    filled: list[tuple[Row, list[Filled]] | None]
    pieces: list[Filled]
    encodings: Future[list[Any]]


class Counter:
    """Counts the tokens of rows as an encoder without a length limit gives them.

    Args:
        encoder: the encoder.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        tokenizer = encoder.processor.tokenizer
        # The control tokens at which the tokenizer cuts a text whatever stands beside them.
        added = [t for t in tokenizer.added_tokens_decoder.values() if str(t.content) in encoder.control_tokens]
        cuts = [str(t.content) for t in added if not (t.normalized or t.lstrip or t.rstrip or t.single_word)]
        self.applies = tokenizer.is_fast and encoder.turn_end in cuts
        self._tokenizer = tokenizer.backend_tokenizer if self.applies else None
        self._cut = re.compile("|".join(map(re.escape, sorted(cuts, key=len, reverse=True))))
        self._probes = probes(encoder) if self.applies else []
        self._shapes: dict[bytes, Shape | None] = {}
        self._counted: dict[Filled, Size | None] = {}
        self._sizes: dict[int, Size] = {}
        self._places: dict[tuple[Size, ...], tuple[ImagePlace, ...] | None] = {}

    def count(self, dataset: datasets.Dataset) -> npt.NDArray[np.int64]:
        """Count rows in the form of :meth:`~vlmtune.data.sample.Sample.to_row`.

        Returns:
            (N, 3) tokens, supervised tokens and soft tokens; -1 where only the encoder can tell, or will find a fault.
        """
        counts = np.full((len(dataset), 3), UNKNOWN, dtype=np.int64)
        columns = dataset.select_columns(SCHEMA.names)
        if not self.applies or columns.data.schema.field("messages").type != SCHEMA.field("messages").type:
            return counts
        parts = batches(columns, SCHEMA.names, ROWS_AT_ONCE)
        total = number_of_batches(columns, ROWS_AT_ONCE)
        with _all_cores(), ThreadPoolExecutor(1) as other:
            begun: deque[tuple[int, _Begun]] = deque()
            for start, batch in tqdm(parts, desc="Checking texts", total=total, leave=False):
                begun.append((start, self._begin(self._rows(batch.combine_chunks()), other)))
                full = len(self._counted) > PIECES_KEPT
                # One batch is tokenized, which needs no Python, while the next is made ready.
                while len(begun) > (0 if full else 1):
                    self._end(counts, *begun.popleft())
                if full:
                    self._counted.clear()
            for one in begun:
                self._end(counts, *one)
        return counts

    def _begin(self, rows: Iterable[Row | None], other: Executor) -> _Begun:
        """Fill the shapes with texts, and let another thread tokenize all new pieces at once."""
        assert self._tokenizer is not None
        filled = [None if row is None else (row, pieces) if (pieces := _fill(row)) else None for row in rows]
        new = [piece for one in filled if one for piece in one[1] if piece not in self._counted]
        pieces = list(dict.fromkeys(new))
        encode = partial(self._tokenizer.encode_batch, [text for text, _ in pieces], add_special_tokens=False)
        return _Begun(filled, pieces, other.submit(encode))

    def _end(self, counts: npt.NDArray[np.int64], start: int, begun: _Begun) -> None:
        found = self._ended(begun)
        counts[start : start + len(found)] = [row or (UNKNOWN,) * 3 for row in found]

    def _ended(self, begun: _Begun) -> list[Counts | None]:
        self._keep(begun.pieces, begun.encodings.result())
        return [one and self._sum(*one) for one in begun.filled]

    def _rows(self, batch: pa.Table) -> Iterator[Row | None]:
        sized = self.encoder.family.sized
        keys, texts = _keys_and_texts(batch)
        images = batch["images"].to_pylist() if sized else []
        has_boxes = pc.match_substring(batch["meta"], BOXES).fill_null(False).to_pylist()
        any_control = self._holds_control("\0".join(text for of_row in texts for text in of_row if text))
        for index, (key, of_row) in enumerate(zip(keys, texts, strict=True)):
            unsafe = None in of_row or (any_control and any(map(self._holds_control, of_row)))
            places = None
            if not unsafe and not has_boxes[index]:
                sizes = self._sizes_of(images[index]) if sized else ((0, 0),) * key[0]
                places = None if sizes is None else self._places_of(sizes)
            if places is None:
                yield None
                continue
            if key not in self._shapes and len(self._shapes) < MOST_SHAPES:
                (row,) = batch.slice(index, 1).to_pylist()
                self._shapes[key] = self._shape(Sample.from_row(row), places)
            shape = self._shapes.get(key)
            yield None if shape is None else (shape, of_row, places)

    def _holds_control(self, text: str) -> bool:
        return any(token in text for token in self.encoder.control_tokens)

    def _sum(self, row: Row, pieces: Sequence[Filled]) -> Counts | None:
        shape, _, images = row
        tokens, supervised, soft = shape.tokens, 0, 0
        for piece in pieces:
            counted = self._counted[piece]
            if counted is None:
                return None
            tokens, supervised = tokens + counted[0], supervised + counted[1]
        for image in images:
            tokens, soft = tokens + image.tokens, soft + image.soft
        return tokens, supervised, soft

    def _keep(self, pieces: Sequence[Filled], encodings: Sequence[Any]) -> None:
        """Count tokens of each piece, and those from its answer on; ``None`` where no token begins there."""
        for (text, start), encoding in zip(pieces, encodings, strict=True):
            learned: int | None = 0
            if start >= 0:
                first = encoding.char_to_token(start)
                begins = first is not None and encoding.token_to_chars(first)[0] == start
                # With the token that ends the turn, which begins the next piece.
                learned = len(encoding) - first + 1 if begins else None
            self._counted[text, start] = None if learned is None else (len(encoding), learned)

    def _sizes_of(self, images: Sequence[dict[str, Any]]) -> tuple[Size, ...] | None:
        sizes = []
        for image in images:
            ref = ImageRef(**image)
            # By its hash: the paths of millions of images take gigabytes.
            key = hash(ref)
            if key not in self._sizes:
                try:
                    self._sizes[key] = upright_size(ref, max_pixels=self.encoder.max_pixels)
                except ImageError:
                    return None
            sizes.append(self._sizes[key])
        return tuple(sizes)

    def _places_of(self, sizes: tuple[Size, ...]) -> tuple[ImagePlace, ...] | None:
        if sizes not in self._places:
            self._places[sizes] = self._new_places(sizes)
        return self._places[sizes]

    def _new_places(self, sizes: tuple[Size, ...]) -> tuple[ImagePlace, ...] | None:
        assert self._tokenizer is not None
        processor, places = self.encoder.processor, []
        try:
            layout = self.encoder.family.layout(processor, list(sizes)) if sizes else {}
        except ValueError:
            return None
        for index in range(len(sizes)):
            text = str(processor.replace_image_token(layout, index))
            marks = list(self._cut.finditer(text))
            if not marks:
                return None
            first, last = marks[0].start(), marks[-1].end()
            ids = self._tokenizer.encode(text[first:last], add_special_tokens=False).ids
            soft = sum(token in self.encoder.image_token_ids for token in ids)
            places.append(ImagePlace((text[:first], marks[-1][0], text[last:]), len(ids), soft))
        return tuple(places)

    def _shape(self, sample: Sample, places: tuple[ImagePlace, ...]) -> Shape | None:
        """Find out a sample's shape and try it; ``None`` where it does not hold."""
        count = number_of_texts(sample)
        try:
            shape = find_shape(self.encoder, self._cut, sample, places) if count else None
        except EncodingError:
            return None
        if shape is None:
            return None
        some = range(len(self._probes))
        texts = [[self._probes[(i + j * step) % len(some)] for j in range(count)] for i in some for step in (0, 1)]
        known = [self._encoded(with_texts(sample, of_row)) for of_row in texts]
        with ThreadPoolExecutor(1) as other:
            counted = self._ended(self._begin([(shape, of_row, places) for of_row in texts], other))
        pairs = list(zip(known, counted, strict=True))
        rest = {right[0] - found[0] for right, found in pairs if right and found}
        if len(rest) != 1 or any(right is None or right[1:] != found[1:] for right, found in pairs if found):
            return None
        return replace(shape, tokens=rest.pop())

    def _encoded(self, sample: Sample) -> Counts | None:
        try:
            ids, supervised = self.encoder.tokens(sample)
        except (EncodingError, ImageError):
            return None
        return len(ids), sum(supervised[1:]), sum(token in self.encoder.image_token_ids for token in ids)


def _fill(row: Row) -> list[Filled] | None:
    shape, texts, images = row
    changed = [change(text) for change, text in zip(shape.changes, texts, strict=True)]
    # Templates may write nothing at all for an empty text.
    if not all(map(str.strip, changed)) or shape.images != tuple(image.around for image in images):
        return None
    return [piece.fill(changed) for piece in shape.pieces]


def _keys_and_texts(batch: pa.Table) -> tuple[list[bytes], list[list[str]]]:
    """Return of each row the number of images, the roles and kinds of parts as bytes, and the texts."""
    messages = batch["messages"].combine_chunks()
    roles, contents = messages.flatten().flatten()
    kinds, texts = contents.flatten().flatten()
    ends_of_rows = np.concatenate([[0], np.cumsum(pc.list_value_length(messages).to_numpy())])
    ends = np.concatenate([[0], np.cumsum(pc.list_value_length(contents).to_numpy())])
    is_text = pc.equal(kinds, "text").to_numpy(zero_copy_only=False)
    # Of each message a byte for its role, and then one for each part.
    codes = np.zeros(len(roles) + len(kinds), dtype=np.uint8)
    codes[np.arange(len(roles)) + ends[:-1]] = 2 + pc.index_in(roles, pa.array(ROLES)).fill_null(len(ROLES)).to_numpy()
    codes[np.arange(len(kinds)) + np.repeat(np.arange(len(roles)), np.diff(ends)) + 1] = is_text
    starts = (ends_of_rows + ends[ends_of_rows]).tolist()
    firsts = np.concatenate([[0], np.cumsum(is_text)])[ends[ends_of_rows]].tolist()
    images = pc.list_value_length(batch["images"]).to_numpy().clip(max=255).astype(np.uint8)
    values = texts.filter(pa.array(is_text)).to_pylist()
    keys = [
        images[row : row + 1].tobytes() + codes[starts[row] : starts[row + 1]].tobytes() for row in range(len(batch))
    ]
    return keys, [values[firsts[row] : firsts[row + 1]] for row in range(len(batch))]


@contextmanager
def _all_cores() -> Iterator[None]:
    """Let the tokenizer use all cores here; processes that are forked later must not, for its threads stay behind."""
    before = os.environ.get("TOKENIZERS_PARALLELISM", "false")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = before

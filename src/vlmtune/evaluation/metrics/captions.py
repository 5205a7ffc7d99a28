"""Caption metrics: BLEU, ROUGE-L and CIDEr-D, with the numbers of tylin/coco-caption (arXiv:1504.00325).

BLEU: Papineni et al. 2002 (P02-1040). ROUGE-L: Lin 2004 (W04-1013). CIDEr-D: Vedantam et al. 2015, arXiv:1411.5726;
what coco-caption reports as "CIDEr" is CIDEr-D. Texts are tokenized as there, by :mod:`.ptb`. Answers lose their
Markdown first, which a caption has no use for and a chat model likes to write.
"""

from __future__ import annotations

import gzip
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from vlmtune.errors import ConfigError
from vlmtune.evaluation.metrics.base import Aggregate, Array, Metric, Scores
from vlmtune.evaluation.metrics.ptb import tokenize

Ngram = tuple[str, ...]

ORDERS = 4
ROUGE_BETA = 1.2
CIDER_SIGMA = 6.0
FEW_IMAGES = 500
# coco-caption's, so that a corpus without a match of some order scores almost 0 rather than fails.
_TINY, _SMALL = 1e-15, 1e-9

_MARKDOWN = (
    (re.compile(r"^[ \t]*```.*$", re.M), ""),
    (re.compile(r"^[ \t]*(?:#{1,6}|>|[-*+]|\d{1,2}\.)[ \t]+", re.M), ""),
    (re.compile(r"!?\[([^\]\n]*)\]\([^)\s]*\)"), r"\1"),
    (re.compile(r"(\*\*\*|\*\*|\*|`)(?=\S)([^*`\n]*?)(?<=\S)\1"), r"\2"),
    (re.compile(r"(?<!\w)(___|__|_)(?=\S)([^_\n]*?)(?<=\S)\1(?!\w)"), r"\2"),
)


def strip_markdown(text: str) -> str:
    """Drop Markdown's marks (headings, lists, quotes, emphasis, code, links) and keep the words."""
    for pattern, kept in _MARKDOWN:
        text = pattern.sub(kept, text)
    return text


@dataclass(frozen=True)
class _Caption:
    length: int
    ngrams: Counter[Ngram]


def _caption(tokens: Sequence[str]) -> _Caption:
    ngrams = Counter(tuple(tokens[i : i + n]) for n in range(1, ORDERS + 1) for i in range(len(tokens) - n + 1))
    return _Caption(len(tokens), ngrams)


def tokens_of(
    answers: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[list[list[str]], list[list[list[str]]], tuple[str, ...]]:
    """Return the answers' and references' tokens, and what to note about them."""
    if len(answers) != len(references):
        raise ValueError(f"there are {len(answers)} answers and {len(references)} samples with references")
    for index, options in enumerate(references):
        if not options:
            raise ValueError(f"sample {index} has no reference; a caption is scored against at least one")
    plain = [strip_markdown(answer) for answer in answers]
    changed = sum(before != after for before, after in zip(answers, plain, strict=True))
    notes = (f"Markdown was dropped from {changed} of {len(answers)} answers",) if changed else ()
    return [tokenize(text) for text in plain], [[tokenize(text) for text in options] for options in references], notes


def _bleu_of_sums(order: int, sums: Array) -> Array:
    """Return BLEU from the columns answer length, reference length, n-grams of 1 to 4, and matched ones."""
    guessed, matched = sums[..., 2 : 2 + order], sums[..., 2 + ORDERS : 2 + ORDERS + order]
    precision = ((matched + _TINY) / (guessed + _SMALL)).prod(-1) ** (1 / order)
    ratio = (sums[..., 0] + _TINY) / (sums[..., 1] + _SMALL)
    return np.asarray(precision * np.exp(1 - 1 / np.minimum(ratio, 1)))


def bleu(answers: Sequence[str], references: Sequence[Sequence[str]], *, order: int = ORDERS) -> Scores:
    """Return corpus BLEU up to n-grams of ``order``, with the reference length closest to each answer's; 0 to 1.

    The value of a sample is the BLEU of that answer alone.
    """
    said, wanted, notes = tokens_of(answers, references)
    rows = np.zeros((len(said), 2 + 2 * ORDERS))
    for row, tokens, options in zip(rows, said, wanted, strict=True):
        answer, captions = _caption(tokens), [_caption(option) for option in options]
        row[0] = answer.length
        row[1] = min((abs(caption.length - answer.length), caption.length) for caption in captions)[1]
        row[2 : 2 + ORDERS] = np.maximum(answer.length - np.arange(ORDERS), 0)
        for ngram, count in answer.ngrams.items():
            most = max(caption.ngrams.get(ngram, 0) for caption in captions)
            row[1 + ORDERS + len(ngram)] += min(count, most)
    aggregate: Aggregate = partial(_bleu_of_sums, order)
    return Scores(aggregate(rows), rows, aggregate, notes)


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Return its length, by the bit-parallel dynamic programme of Hyyrö 2004."""
    positions: dict[str, int] = {}
    for index, token in enumerate(first):
        positions[token] = positions.get(token, 0) | 1 << index
    every = (1 << len(first)) - 1
    unmatched = every
    for token in second:
        hit = unmatched & positions.get(token, 0)
        unmatched = ((unmatched + hit) | (unmatched - hit)) & every
    return len(first) - unmatched.bit_count()


def rouge_l(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """Score each answer by ROUGE-L: F with beta 1.2 of the best precision and the best recall; the mean, 0 to 1."""
    said, wanted, notes = tokens_of(answers, references)
    values = []
    for tokens, options in zip(said, wanted, strict=True):
        common = [(longest_common_subsequence(tokens, option), len(option)) for option in options]
        precision = max(length for length, _ in common) / max(len(tokens), 1)
        recall = max(length / max(whole, 1) for length, whole in common)
        weighted = recall + ROUGE_BETA**2 * precision
        values.append((1 + ROUGE_BETA**2) * precision * recall / weighted if weighted else 0.0)
    return Scores(np.asarray(values, dtype=np.float64), notes=notes)


@dataclass(frozen=True)
class DocumentFrequencies:
    """In how many images' references each n-gram stands; CIDEr-D weighs n-grams by it.

    Attributes:
        counts: n-gram -> images.
        images: all images counted.
    """

    counts: Mapping[Ngram, int]
    images: int

    @classmethod
    def of(cls, references: Iterable[Sequence[str]]) -> DocumentFrequencies:
        """Count the references of each image."""
        return cls._of_captions([_caption(tokenize(text)) for text in options] for options in references)

    @classmethod
    def _of_captions(cls, images: Iterable[Sequence[_Caption]]) -> DocumentFrequencies:
        counts: Counter[Ngram] = Counter()
        number = 0
        for captions in images:
            number += 1
            counts.update({ngram for caption in captions for ngram in caption.ngrams})
        return cls(counts, number)

    def save(self, path: str | Path) -> None:
        """Write the table as gzipped JSON, to score a small validation set by a large one's frequencies."""
        table = {"images": self.images, "counts": {" ".join(ngram): count for ngram, count in self.counts.items()}}
        path = Path(path)
        temporary = path.with_name(path.name + ".tmp")
        with gzip.open(temporary, "wt", encoding="utf-8") as file:
            json.dump(table, file, ensure_ascii=False)
        temporary.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> DocumentFrequencies:
        """Read what :meth:`save` wrote.

        Raises:
            ConfigError: the file cannot be read, or is no such table.
        """
        try:
            with gzip.open(path, "rt", encoding="utf-8") as file:
                table = json.load(file)
            counts = {tuple(ngram.split(" ")): int(count) for ngram, count in table["counts"].items()}
            if (number := int(table["images"])) < 1:
                raise ValueError(f"it counts {number} images")
            return cls(counts, number)
        except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, zlib.error) as error:
            raise ConfigError(
                f"{path} is no table of document frequencies ({error}). Write one by: vlmtune metrics "
                "--save_frequencies FILE --dataset_path DATA."
            ) from error


@dataclass(frozen=True)
class _Weighted:
    """A caption's tf-idf vectors, one for each n, with their norms."""

    bigrams: int
    vectors: tuple[dict[Ngram, float], ...]
    norms: tuple[float, ...]


def _weigh(caption: _Caption, frequencies: DocumentFrequencies) -> _Weighted:
    log_images = math.log(frequencies.images)
    vectors: tuple[dict[Ngram, float], ...] = tuple({} for _ in range(ORDERS))
    for ngram, count in caption.ngrams.items():
        vectors[len(ngram) - 1][ngram] = count * (log_images - math.log(max(1, frequencies.counts.get(ngram, 0))))
    norms = tuple(math.sqrt(sum(weight * weight for weight in vector.values())) for vector in vectors)
    return _Weighted(max(caption.length - 1, 0), vectors, norms)


def _cider_similarity(answer: _Weighted, reference: _Weighted) -> float:
    """Return the clipped cosine similarity, averaged over n, times the penalty on the lengths' difference."""
    total = 0.0
    for said, wanted, norm, other in zip(answer.vectors, reference.vectors, answer.norms, reference.norms, strict=True):
        if norm and other:
            shared = said.keys() & wanted.keys()
            total += sum(min(said[ngram], wanted[ngram]) * wanted[ngram] for ngram in shared) / (norm * other)
    # coco-caption takes the number of bigrams for a caption's length.
    difference = answer.bigrams - reference.bigrams
    return total / ORDERS * math.exp(-(difference**2) / (2 * CIDER_SIGMA**2))


def cider(
    answers: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    frequencies: DocumentFrequencies | None = None,
) -> Scores:
    """Score each answer by CIDEr-D, sigma 6, n-grams of 1 to 4; the corpus value is the mean, 0 to 10.

    Args:
        answers: generated captions.
        references: each image's captions.
        frequencies: document frequencies of another set of captions. By default those of ``references``, as in
            coco-caption; then a few images give other values than many: a single one gives 0.
    """
    said, wanted, notes = tokens_of(answers, references)
    captions = [[_caption(tokens) for tokens in options] for options in wanted]
    if frequencies is None:
        frequencies = DocumentFrequencies._of_captions(captions)
        if len(said) < FEW_IMAGES:
            notes += (
                f"CIDEr over {len(said)} images: below about {FEW_IMAGES} its value depends on their number; compare "
                "runs on the same images only, or give the document frequencies of a larger set (cider:FILE)",
            )
    values = []
    for tokens, options in zip(said, captions, strict=True):
        answer = _weigh(_caption(tokens), frequencies)
        similar = [_cider_similarity(answer, _weigh(option, frequencies)) for option in options]
        values.append(10 * sum(similar) / len(similar))
    return Scores(np.asarray(values, dtype=np.float64), notes=notes)


def _bleu_metric(name: str, order: int) -> Metric:
    what = f"n-grams of 1 to {order} words" if order > 1 else "single words"
    return Metric(
        name=name,
        summary=f"{what} shared with the references, over the whole set",
        compute=partial(bleu, order=order),
        paper="P02-1040",
        code="tylin/coco-caption Bleu",
    )


BLEU = tuple(_bleu_metric(f"bleu{order}", order) for order in range(1, ORDERS + 1))
ROUGE_L = Metric(
    name="rouge_l",
    summary="longest common subsequence of words with a reference, F with beta 1.2",
    compute=rouge_l,
    paper="W04-1013",
    code="tylin/coco-caption Rouge",
)
CIDER = Metric(
    name="cider",
    summary="CIDEr-D: n-grams shared with the references, rare ones weighing more; 0 to 10, in papers often x 100",
    compute=cider,
    paper="arXiv:1411.5726",
    code="tylin/coco-caption Cider",
    percent=False,
)


def make_cider(name: str, path: str) -> Metric:
    """Return CIDEr-D by the document frequencies in a file."""
    place = Path(path).expanduser()
    frequencies = _table(place, place.stat().st_mtime_ns if place.is_file() else 0)
    return replace(
        CIDER,
        name=f"{name}:{path}",
        summary=f"CIDEr-D by the document frequencies of {frequencies.images:,} images",
        compute=partial(cider, frequencies=frequencies),
    )


@lru_cache(maxsize=2)
def _table(path: Path, changed: int) -> DocumentFrequencies:
    """Read a table once until it changes."""
    return DocumentFrequencies.load(path)

"""What a data format is: a name, a way to recognise it, and a way to read it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vlmtune.data.quarantine import Quarantine
from vlmtune.data.sample import Sample

DEFAULT_CAPTION_PROMPT = "Describe this image."
# What a person's prompt may hold, for what each row asks; none of them in one for captions.
FIELDS = ("{question}", "{labels}", "{phrase}")
QUESTION, LABELS, PHRASE = FIELDS
CAPTION_METRICS = ("cider", "bleu4", "rouge_l")


@dataclass(frozen=True)
class Source:
    """Data to read.

    Attributes:
        path: the folder or file that a person named.
        split: the split to read; ``None`` reads all that there is.
        image_dir: folder of the images, where it was named.
        prompt: what the user asks, where a person chose it: about any image, or with one of ``FIELDS``.
        columns: name that vlmtune knows -> column of the data that holds it.
    """

    path: Path
    split: str | None = None
    image_dir: Path | None = None
    prompt: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Format:
    """One data format.

    Attributes:
        name: its name in recipes.
        looks_like: one line on the files it reads, for people.
        detect: whether a folder or file is of this format; cheap, reads at most a file's first lines.
        splits: names of the splits that a folder or file holds; empty when it names none.
        load: yields samples in the files' order and sets bad rows aside; images are checked by the caller.
        metrics: metrics that answers in this format are scored with by default; none where it can hold anything.
        asks: which of ``FIELDS`` a prompt of one's own may hold, empty for none of them; nothing where the rows are of
            several kinds, and a prompt is for those that it fits.
        shards: split name -> files, each of which ``load`` reads by itself; only for formats that lie in many files.
    """

    name: str
    looks_like: str
    detect: Callable[[Path], bool]
    splits: Callable[[Path], tuple[str, ...]]
    load: Callable[[Source, Quarantine], Iterator[Sample]]
    metrics: tuple[str, ...] = ()
    asks: tuple[str, ...] = ("",)
    shards: Callable[[Path], Mapping[str, Sequence[Path]]] | None = None

    def prompt_problem(self, prompt: str | None) -> str | None:
        """Return why a person's prompt does not fit the format, in words, or ``None``."""
        if prompt is None or not self.asks or own_prompt(prompt, *self.asks) is not None:
            return None
        takes = " or ".join(f"one with {field}" if field else "one without a field" for field in self.asks)
        return f"prompt is {prompt!r}; {self.name} takes {takes}"

    def columns_problem(self, columns: Collection[str]) -> str | None:
        """Return why columns cannot be named for the format, in words, or ``None``."""
        return f"columns is for rows of any columns; {self.name} has its own" if columns and self.asks else None


def own_prompt(prompt: str | None, *fields: str) -> str | None:
    """Return a person's prompt where it is for such rows, else ``None``.

    Args:
        prompt: as it was written.
        fields: of ``FIELDS``, what the rows ask; empty for a prompt that holds none of them.
    """
    if prompt is None:
        return None
    return prompt if next((field for field in FIELDS if field in prompt), "") in fields else None


def first_line(path: Path) -> str:
    """Return a text file's first line, or an empty string when that is no text; later lines do not matter."""
    try:
        with path.open("rb") as file:
            line = file.readline(100_000)
        # A line cut within a character still counts as text.
        return line.decode("utf-8-sig", "ignore" if len(line) == 100_000 else "strict").rstrip("\r\n")
    except (OSError, UnicodeDecodeError):
        return ""

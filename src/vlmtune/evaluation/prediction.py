"""Answers to many questions, written as they come: stopped and started again, none is lost and none is asked twice."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from vlmtune.data.formats.base import DEFAULT_CAPTION_PROMPT
from vlmtune.data.formats.columns import IMAGE_COLUMNS
from vlmtune.data.formats.files import RowError
from vlmtune.data.formats.questions import question_sample
from vlmtune.data.formats.row_images import listed_images
from vlmtune.data.formats.rows import make_sample
from vlmtune.data.images import EXTENSIONS, check
from vlmtune.data.remote import is_remote
from vlmtune.data.sample import ImageRef, Message, Sample
from vlmtune.errors import DataError, OutputError, VlmtuneError
from vlmtune.evaluation.generation import Answer, AnswerGenerator
from vlmtune.evaluation.ranks import by_first, count, is_first, shared_out
from vlmtune.evaluation.runner import weights_fingerprint
from vlmtune.files import write_whole

logger = logging.getLogger("vlmtune.predict")
QUESTION_FILES = (".jsonl", ".ndjson")
SETTINGS_SUFFIX = ".settings.json"


@dataclass
class Questions:
    """What is asked.

    Attributes:
        samples: in the order of the input, ids unique.
        bad: id -> why it cannot be asked.
        ids: of both.
    """

    samples: list[Sample] = field(default_factory=list)
    bad: dict[str, str] = field(default_factory=dict)
    ids: set[str] = field(default_factory=set)

    def __len__(self) -> int:
        """Number of questions, bad ones included."""
        return len(self.ids)


def read_questions(places: Sequence[str], prompt: str | None = None) -> Questions:
    """Read what to ask from images, folders of images (and folders inside), and JSON lines files.

    A line holds ``image`` or ``images`` and ``question`` or ``prompt``, or ``messages`` as training data does; an
    answer in it is passed over. Its id is ``id``, or the line's number.

    Raises:
        DataError: a place is missing, holds nothing to ask about, or uses an id twice.
    """
    found = Questions()
    for place in places:
        path = Path(place).expanduser()
        if path.is_dir():
            items: list[tuple[str, Sample | str]] = list(_in_folder(path, prompt))
        elif path.suffix.lower() in QUESTION_FILES:
            items = list(_in_file(path, prompt))
        else:
            items = [(place, _about(place, ImageRef(path=str(path)), prompt))]
        if not items:
            raise DataError(
                f"{place} holds no images ({', '.join(sorted(EXTENSIONS))})."
                if path.is_dir()
                else f"{place} holds no questions."
            )
        # Two folders, or two files, can use one name.
        prefix = f"{place}:" if len(places) > 1 and items[0][0] != place else ""
        for name, item in items:
            _add(found, prefix + name, item)
    return found


def _add(found: Questions, name: str, item: Sample | str) -> None:
    if name in found.ids:
        raise DataError(f"Two questions have the id {name!r}, so their answers could not be told apart. Rename one.")
    found.ids.add(name)
    if isinstance(item, str):
        found.bad[name] = item
    else:
        found.samples.append(Sample(name, item.images, item.prompt))


def _in_folder(folder: Path, prompt: str | None) -> Iterator[tuple[str, Sample]]:
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() in EXTENSIONS and file.is_file():
            name = file.relative_to(folder).as_posix()
            yield name, _about(name, ImageRef(path=str(file)), prompt)


def _in_file(file: Path, prompt: str | None) -> Iterator[tuple[str, Sample | str]]:
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}. Correct the name.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name = str(number)
        try:
            row = json.loads(line)
            if isinstance(row, dict) and row.get("id") is not None:
                name = str(row["id"])
            sample = _asked(row, name, file.parent, prompt)
            if (found := next(filter(is_remote, sample.images), None)) is not None:
                raise RowError(f"the image {found.path} lies on the network; download it and name the file")
            yield name, sample
        except (ValueError, RowError) as error:
            yield name, f"{file.name}, line {number}: {error}"


def _asked(row: Any, name: str, images: Path, prompt: str | None) -> Sample:
    if not isinstance(row, dict):
        raise RowError("it is no object")
    if row.get("messages") or row.get("conversations"):
        sample = make_sample(row, name, images)
        if not sample.prompt or sample.prompt[-1].role != "user":
            raise RowError("its messages hold no question")
        return sample
    question = row.get("question", row.get("prompt"))
    if question is None and not any(row.get(column) for column in IMAGE_COLUMNS):
        raise RowError("it has neither a question nor an image")
    return question_sample(name, listed_images(row, images), question or prompt or DEFAULT_CAPTION_PROMPT, [])


def _about(name: str, image: ImageRef, prompt: str | None) -> Sample:
    return Sample(name, (image,), (Message.make("user", prompt or DEFAULT_CAPTION_PROMPT, images=1),))


def require_readable(questions: Questions, max_pixels: int | None = None) -> None:
    """Refuse questions that cannot be asked, all of them named.

    Raises:
        DataError: with a line for each.
    """
    images = dict.fromkeys(image for sample in questions.samples for image in sample.images)
    problems = [problem for image in images if (problem := check(image, "full", max_pixels=max_pixels))]
    problems += [f"{name}: {reason}" for name, reason in questions.bad.items()]
    if problems:
        raise DataError("\n".join(problems))


class Predictor:
    """Answers questions in blocks, those of one image together and those of one length together.

    Args:
        generator: of the model.
        progress: called with answers done and answers wanted.
    """

    def __init__(self, generator: AnswerGenerator, progress: Callable[[int, int], None] | None = None) -> None:
        self.generator = generator
        self.progress = progress

    def answers(self, samples: Sequence[Sample]) -> Iterator[tuple[Sample, Answer | str]]:
        """Yield each sample with its answer, or with why there is none; not in the order given.

        Several processes take a block each in turn, and all yield all.
        """
        done = 0
        blocks = self._blocks(samples)
        while turn := list(islice(blocks, count())):
            found = shared_out(turn, lambda mine: [pair for block in mine for pair in self._block(block)])
            done += len(found)
            if self.progress:
                self.progress(done, len(samples))
            yield from found

    def to_file(self, questions: Questions, output: Path) -> tuple[int, dict[str, str]]:
        """Write the answers as JSON lines, in the order of the questions.

        A file of an earlier run with the same model and options is gone on with: what it answered stays, what it could
        not read is tried again.

        Returns:
            How many were answered already, and id -> reason of those that cannot be.

        Raises:
            OutputError: the file is of another model or other options, or was not written by this command.
        """
        done = by_first(lambda: self._continue(questions, output))
        before = len(done)
        pending = [sample for sample in questions.samples if sample.id not in done]
        if before:
            logger.info("%s holds %s answers; %s are left", output, f"{before:,}", f"{len(pending):,}")
        bad = dict(questions.bad)
        # Of several processes the first writes.
        with (output if is_first() else Path(os.devnull)).open("a", encoding="utf-8") as file:
            for sample, answer in self.answers(pending):
                if isinstance(answer, str):
                    bad[sample.id] = answer
                    continue
                done[sample.id] = _line(sample, answer)
                file.write(done[sample.id])
                file.flush()
        wanted = [*questions.samples, *(Sample(name, (), ()) for name in questions.bad)]
        if is_first():
            write_whole(output, "".join(done.get(one.id) or _bad_line(one, bad[one.id]) for one in wanted))
        return before, bad

    @property
    def _block_size(self) -> int:
        return 4 * self.generator.options.eval_batch_size

    def _blocks(self, samples: Sequence[Sample]) -> Iterator[list[Sample]]:
        groups: dict[Any, list[Sample]] = {}
        for sample in samples:
            groups.setdefault(sample.images, []).append(sample)
        # Longest first: what does not fit into memory is seen at the start.
        ordered = sorted(groups.values(), key=lambda group: -max(_length(sample) for sample in group))
        block: list[Sample] = []
        for group in ordered:
            # An image's questions stay together unless they alone are more than a block.
            if block and len(block) + len(group) > self._block_size:
                yield block
                block = []
            block += group
            while len(block) > self._block_size:
                yield block[: self._block_size]
                block = block[self._block_size :]
        if block:
            yield block

    def _block(self, block: list[Sample]) -> list[tuple[Sample, Answer | str]]:
        try:
            return list(zip(block, self.generator(block), strict=True))
        except VlmtuneError:
            bad = {sample.id: reason for sample in block if (reason := self.generator.problem(sample))}
            if not bad:
                raise
        good = [sample for sample in block if sample.id not in bad]
        answers = dict(zip((sample.id for sample in good), self.generator(good), strict=True)) if good else {}
        return [(sample, answers.get(sample.id) or bad[sample.id]) for sample in block]

    def _continue(self, questions: Questions, output: Path) -> dict[str, str]:
        """Return id -> line of the answers that are there, after making sure that they are this model's."""
        options = self.generator.options
        settings = {
            "weights": weights_fingerprint(self.generator.model),
            "max_new_tokens": options.max_new_tokens,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "max_pixels": self.generator.encoder.max_pixels,
        }
        record = output.with_name(output.name + SETTINGS_SUFFIX)
        if not output.exists():
            try:
                output.parent.mkdir(parents=True, exist_ok=True)
                write_whole(record, json.dumps(settings, indent=2) + "\n")
                output.touch()
            except OSError as error:
                raise OutputError(f"{output} cannot be written ({error.strerror}). Choose another output.") from error
            return {}
        earlier = _read_json(record)
        if earlier != settings:
            changed = [name for name in settings if earlier and earlier.get(name) != settings[name]]
            what = f"answers with other {' and '.join(changed)}" if changed else "something else than such answers"
            raise OutputError(f"{output} already holds {what}, and it will not be overwritten. Choose another output.")
        asked = {sample.id: _asked_text(sample) for sample in questions.samples}
        done: dict[str, str] = {}
        lines = output.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            row = _parse(line)
            if row is None:
                # The last line may have been cut when the run was killed.
                if line.strip() and number < len(lines):
                    raise OutputError(
                        f"{output}, line {number}, is no answer. Remove that line, or choose another output."
                    )
                continue
            name = str(row.get("id"))
            if "answer" not in row:
                continue
            if name not in asked or row.get("prompt") != asked[name]:
                raise OutputError(
                    f"{output}, line {number}, answers {name!r}, which is now "
                    f"{'another question' if name in asked else 'not asked'}. Choose another output."
                )
            done[name] = line.decode() + "\n"
        write_whole(output, "".join(done.values()))
        return done


def _length(sample: Sample) -> int:
    return sum(len(message.text) for message in sample.prompt)


def _asked_text(sample: Sample) -> str:
    return "\n".join(message.text for message in sample.prompt if message.role == "user")


def _line(sample: Sample, answer: Answer) -> str:
    row = {
        "id": sample.id,
        "images": [image.name for image in sample.images],
        "prompt": _asked_text(sample),
        "answer": answer.text,
        "ended": answer.ended,
        "tokens": answer.tokens,
    }
    return json.dumps(row, ensure_ascii=False) + "\n"


def _bad_line(sample: Sample, reason: str) -> str:
    row = {"id": sample.id, "images": [image.name for image in sample.images], "error": reason}
    return json.dumps(row, ensure_ascii=False) + "\n"


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _read_json(file: Path) -> dict[str, Any] | None:
    try:
        return _parse(file.read_bytes())
    except OSError:
        return None

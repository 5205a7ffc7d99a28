"""Checkpoints that are whole or absent: written beside their place, proved, and then renamed into it.

A checkpoint is written into ``checkpoint-N.unfinished``; every file is brought to the disk (fsync) and read back for
its hash; the manifest of sizes and hashes is written last; then the folder takes its name. A folder without a manifest,
or whose files differ from it, is never resumed from.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open

from vlmtune.errors import OutputError, ResumeError
from vlmtune.files import UNFINISHED, to_disk
from vlmtune.training.optimizer_files import OPTIMIZER, SCHEDULER, has_parts

logger = logging.getLogger("vlmtune.training")

MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def writing_checkpoint(
    place: Path, *, writes: bool = True, wait: Callable[[], None] = lambda: None
) -> AbstractContextManager[Path]:
    """Give a folder to write a checkpoint's files into; at the end it becomes ``place``, whole, or is deleted.

    Args:
        place: ``checkpoint-N``; an older folder of that name is replaced when the new one is whole.
        writes: whether this process makes and renames the folder; others only write into it.
        wait: waits for all processes.

    Raises:
        OutputError: the disk is full or fails; what lay in ``place`` before is as it was.
    """

    def finish(folder: Path) -> None:
        seal(folder)
        _rename(folder, place)

    return _writing(place, writes, wait, finish)


def writing_files(
    output_dir: Path, *, writes: bool = True, wait: Callable[[], None] = lambda: None
) -> AbstractContextManager[Path]:
    """Give a folder to write a model's files into; at the end each takes its place in ``output_dir``, whole.

    Raises:
        OutputError: the disk is full or fails.
    """

    def finish(folder: Path) -> None:
        for path in _files(folder):
            to_disk(path)
        for path in _files(folder):
            place = output_dir / path.relative_to(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            path.replace(place)
        _delete(folder)

    return _writing(output_dir / "model", writes, wait, finish)


@contextmanager
def _writing(place: Path, writes: bool, wait: Callable[[], None], finish: Callable[[Path], None]) -> Iterator[Path]:
    folder = place.with_name(place.name + UNFINISHED)
    try:
        if writes:
            _delete(folder)
            folder.mkdir(parents=True)
        wait()
        yield folder
        wait()
        if writes:
            finish(folder)
        wait()
    except BaseException as error:
        if writes:
            _delete(folder)
        if _is_of_the_disk(error):
            raise OutputError(_not_written(place, error)) from error
        raise


def seal(folder: Path) -> None:
    """Bring all files of a folder to the disk and write the manifest of their sizes and hashes, last."""
    paths = list(_files(folder))
    for path in paths:
        to_disk(path)
    with ThreadPoolExecutor(4) as pool:
        hashes = list(pool.map(_sha256, paths))
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, hashes, strict=True)
    }
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"files": files}, indent=2) + "\n", encoding="utf-8")
    to_disk(manifest)
    to_disk(folder)


def damage(folder: Path, *, hashes: bool = True) -> str | None:
    """Return why a checkpoint cannot be resumed from, in words, or ``None``: it is as it was written.

    Args:
        folder: ``checkpoint-N``.
        hashes: read every file; otherwise look at sizes and at the headers of weights alone.
    """
    if not folder.is_dir():
        return "it is not there"
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return f"it has no {MANIFEST}, so it was not written to its end"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size:,} bytes instead of {expected['bytes']:,}"
        try:
            if hashes and _sha256(path) != expected["sha256"]:
                return f"{name} was changed after it was written"
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):
                    pass
        except (OSError, SafetensorError) as error:
            return f"{name} cannot be read ({error})"
    return None


def checkpoints(output_dir: str | Path | None) -> list[Path]:
    """Return the ``checkpoint-N`` folders of a run that have a manifest, by their step."""
    found = [folder for folder in Path(output_dir or ".").glob("checkpoint-*") if _NAME.fullmatch(folder.name)]
    return sorted((folder for folder in found if (folder / MANIFEST).is_file()), key=step_of)


def step_of(folder: Path) -> int:
    """Return N of ``checkpoint-N``."""
    return int(folder.name.rpartition("-")[2])


def latest_checkpoint(output_dir: str | Path | None) -> Path | None:
    """Return the last checkpoint in ``output_dir`` that was written to its end, or ``None``."""
    return next(iter(reversed(checkpoints(output_dir))), None)


def last_whole_checkpoint(output_dir: Path) -> Path | None:
    """Return the last checkpoint whose files are all as they were written; the log names those that are not."""
    for folder in sorted((f for f in output_dir.glob("checkpoint-*") if _NAME.fullmatch(f.name)), key=step_of)[::-1]:
        reason = damage(folder)
        if reason is None:
            return folder
        logger.warning("%s is not resumed from: %s", folder, reason)
    return None


def require_whole(folder: Path) -> None:
    """Refuse a checkpoint that is damaged, or that lacks the step, the optimizer or the schedule.

    Raises:
        ResumeError: it is, or does.
    """
    reason = damage(folder)
    needed = ["trainer_state.json", *([] if has_parts(folder) else [OPTIMIZER]), SCHEDULER]
    absent = [name for name in needed if not (folder / name).exists()]
    if reason is None and absent:
        reason = f"it has no {', '.join(absent)}"
    if reason is not None:
        raise ResumeError(
            f"{folder} cannot be resumed from: {reason}. Name a checkpoint-N folder that was written to its end, and "
            "without save_only_model."
        )


def delete_old(output_dir: Path, *, keep: int | None, best: str | None, newest: Path) -> None:
    """Delete the checkpoints above ``keep``, oldest step first, once the newest one is proved.

    By step, not by time: a clock may have been put back.

    Args:
        output_dir: the run's.
        keep: how many to keep in all; ``None`` keeps every one.
        best: the best checkpoint so far, never deleted.
        newest: the one just written, never deleted.

    Raises:
        OutputError: the newest one is not whole; nothing is deleted.
    """
    if not keep:
        return
    reason = damage(newest, hashes=False)
    if reason is not None:
        raise OutputError(f"{newest} is damaged right after it was written: {reason}. Older ones were kept.")
    kept = {newest.resolve()} | ({Path(best).resolve()} if best else set())
    others = [folder for folder in checkpoints(output_dir) if folder.resolve() not in kept]
    for folder in others[: max(0, len(others) + len(kept) - max(keep, len(kept)))]:
        # Renamed first: a process that is killed while it deletes leaves no checkpoint that looks whole and is not.
        aside = folder.with_name(f"{folder.name}.old{UNFINISHED}")
        _delete(aside)
        folder.rename(aside)
        _delete(aside)


def delete_unfinished(output_dir: Path) -> None:
    """Delete what a process that was killed left half written, and name it."""
    for path in output_dir.glob(f"*{UNFINISHED}"):
        logger.info("%s was not written to its end; it is deleted", path)
        _delete(path)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _rename(folder: Path, place: Path) -> None:
    aside = place.with_name(f"{place.name}.old{UNFINISHED}")
    _delete(aside)
    if place.exists():
        place.rename(aside)
    folder.rename(place)
    to_disk(place.parent)
    _delete(aside)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _is_of_the_disk(error: BaseException) -> bool:
    """PyTorch and safetensors report a full disk as errors of their own."""
    if isinstance(error, OSError | SafetensorError):
        return True
    words = ("PytorchStreamWriter", "inline_container", "iostream error")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def _not_written(place: Path, error: BaseException) -> str:
    what = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())[:200]
    good = latest_checkpoint(place.parent)
    kept = f"The last good checkpoint, {good}, is as it was" if good else "There is no earlier checkpoint"
    with suppress(OSError):
        what += f"; {shutil.disk_usage(place.parent).free / 1e6:,.0f} MB are free there"
    return (
        f"{place} could not be written: {what}. {kept}; nothing half written was left. Make room, or lower "
        "save_total_limit, and start the same command again: it goes on from there."
    )

"""The folder of a run: never one that holds something else, and where in it an unfinished run goes on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmtune.errors import OutputError, ResumeError
from vlmtune.files import UNFINISHED
from vlmtune.training.checkpoints import delete_unfinished, last_whole_checkpoint, require_whole
from vlmtune.training.lock import LOCK_FILE
from vlmtune.training.run_info import RUN_FILE

FINISHED = "finished"


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        checkpoint: to go on from; ``None`` begins at the first step.
        before: the record of the run that is gone on with, if there is one.
    """

    checkpoint: Path | None = None
    before: dict[str, Any] | None = None


def find_start(output_dir: Path, *, resume: str | bool | None = "auto") -> Start:
    """Make the output directory, refuse one that holds something else, and find where the run in it goes on.

    Args:
        output_dir: may be absent, empty, or hold this run, unfinished.
        resume: ``auto`` goes on where there is an unfinished run and begins where there is nothing; ``on`` (or true)
            wants a checkpoint there; ``off`` (or false) wants an empty directory; or a checkpoint folder.

    Raises:
        OutputError: the directory holds a finished run or other files, or it cannot be written.
        ResumeError: there is no checkpoint to resume from, or it is damaged.
    """
    choice = str(resume or "off").lower()
    if choice in ("off", "false", "no", "none"):
        _make_empty(output_dir)
        return Start()
    if choice == "auto":
        before = read_record(output_dir)
        if before is None:
            _make_empty(output_dir)
            return Start()
        if before.get("status") == FINISHED:
            raise OutputError(
                f"The output directory {output_dir} already holds a finished run, and nothing in it will be "
                "overwritten. Choose another output_dir."
            )
        delete_unfinished(output_dir)
        return Start(last_whole_checkpoint(output_dir), before)
    if choice in ("on", "true", "yes"):
        found = last_whole_checkpoint(output_dir)
        if found is None:
            raise ResumeError(
                f"There is no finished checkpoint in {output_dir} to resume from. Start anew without --resume in "
                "another output_dir, or name a checkpoint folder."
            )
        delete_unfinished(output_dir)
        return Start(found, read_record(output_dir))
    folder = Path(str(resume))
    require_whole(folder)
    if folder.resolve().parent != output_dir.resolve():
        _make_empty(output_dir)
    return Start(folder, read_record(folder.parent))


def read_record(output_dir: Path) -> dict[str, Any] | None:
    """Return a run's ``run.json``, or ``None`` where there is none.

    Raises:
        OutputError: it cannot be read.
    """
    try:
        return dict(json.loads((output_dir / RUN_FILE).read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise OutputError(
            f"{output_dir / RUN_FILE} cannot be read ({error}), so the run in {output_dir} cannot go on. Name one "
            "of its checkpoints with --resume_from_checkpoint and another output_dir."
        ) from error


def _make_empty(output_dir: Path) -> None:
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        held = [path.name for path in output_dir.iterdir()]
    except OSError as error:
        raise OutputError(
            f"The output directory {output_dir} cannot be made ({error.strerror}). Choose another output_dir."
        ) from error
    if any(name != LOCK_FILE and not name.endswith(UNFINISHED) for name in held):
        what = "another run" if RUN_FILE in held else "other files"
        raise OutputError(
            f"The output directory {output_dir} already holds {what}, and nothing in it will be overwritten. "
            "Choose another output_dir" + (", or go on with that run by --resume." if RUN_FILE in held else ".")
        )
    delete_unfinished(output_dir)

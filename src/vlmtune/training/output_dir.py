"""The folder of a run: never one that holds something else, and what in it can be gone on from."""

from __future__ import annotations

from pathlib import Path

from vlmtune.errors import OutputError, ResumeError
from vlmtune.training.run_info import RUN_FILE

# The base class writes it last.
TRAINER_STATE = "trainer_state.json"


def prepare_output_dir(output_dir: Path, *, resume: str | bool | None = None) -> Path | None:
    """Make the output directory, refuse one that holds another run, and find the checkpoint to resume from.

    Args:
        output_dir: may be absent, empty, or this run's own when resuming.
        resume: a checkpoint folder, or true for the latest in ``output_dir``.

    Returns:
        The checkpoint to resume from, or ``None`` for a new run.

    Raises:
        OutputError: the directory is not empty and ``resume`` was not asked for, or it cannot be written.
        ResumeError: there is no checkpoint to resume from.
    """
    if resume in (None, False, "", "false", "False", "no"):
        _make_empty(output_dir)
        return None
    if str(resume).lower() in ("true", "yes", "auto"):
        found = latest_checkpoint(output_dir)
        if found is None:
            raise ResumeError(
                f"There is no finished checkpoint in {output_dir} to resume from. Start anew without "
                "--resume_from_checkpoint in another output_dir, or name a checkpoint folder."
            )
        return found
    folder = Path(str(resume))
    if not (folder / TRAINER_STATE).exists():
        raise ResumeError(
            f"{folder} is not a finished checkpoint of a run: it has no {TRAINER_STATE}. "
            "Name a checkpoint-N folder, or use --resume_from_checkpoint true for the latest."
        )
    if folder.resolve().parent != output_dir.resolve():
        _make_empty(output_dir)
    return folder


def _make_empty(output_dir: Path) -> None:
    if output_dir.is_dir() and any(output_dir.iterdir()):
        what = "another run" if (output_dir / RUN_FILE).exists() else "other files"
        raise OutputError(
            f"The output directory {output_dir} already holds {what}, and nothing in it will be overwritten. "
            "Choose another output_dir, or go on with that run by --resume_from_checkpoint true."
        )
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"The output directory {output_dir} cannot be made ({error.strerror}). Choose another output_dir."
        ) from error


def latest_checkpoint(output_dir: str | Path | None) -> Path | None:
    """Return the last checkpoint in ``output_dir`` that was written to its end, or ``None``."""
    finished = [
        folder
        for folder in Path(output_dir or ".").glob("checkpoint-*")
        if folder.name.rpartition("-")[2].isdigit() and (folder / TRAINER_STATE).exists()
    ]
    return max(finished, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)


def require_whole(folder: Path, *, sharded: bool = False) -> None:
    """Refuse a folder that the base class would silently resume without its step, optimizer or schedule."""
    needed = [TRAINER_STATE]
    if not sharded:
        needed += ["optimizer.pt", "scheduler.pt"]
    absent = [name for name in needed if not (folder / name).exists()]
    if absent:
        raise ResumeError(
            f"{folder} is no whole checkpoint of a run: it has no {', '.join(absent)}. Name a checkpoint-N folder "
            "that was written to its end, and without save_only_model."
        )

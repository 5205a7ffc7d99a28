"""What the commands share: flags, help, log lines and progress bars."""

from __future__ import annotations

import gc
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from vlmtune.config.secrets import RedactingFormatter
from vlmtune.errors import ConfigError, nearest

logger = logging.getLogger("vlmtune")
SECONDS_BETWEEN_LINES = 30
# Exit code of a run that a signal ended after a checkpoint: EX_TEMPFAIL of sysexits.h, try again.
SAVED_AND_STOPPED = 75


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import without looking for garbage: libraries make a million objects that stay, and a fifth of the time goes."""
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():
            gc.freeze()
        gc.enable()


def asks_help(argv: list[str]) -> bool:
    """Whether the flags ask for help."""
    return "--help" in argv or "-h" in argv


def print_help(
    usage: str,
    classes: Sequence[type],
    ending: str = "",
    *,
    required: Sequence[str] = (),
    optional: Sequence[str] = (),
    without: Sequence[str] = (),
) -> None:
    """Print a command's usage and the options of its argument classes."""
    from vlmtune.config.help import format_options

    options = format_options(classes, required=required, optional=optional, without=without)
    print(f"{usage}\n\n{options}" + (f"\n\n{ending}" if ending else ""))


def refuse(command: str, argument: str, known: Sequence[str]) -> NoReturn:
    """Refuse an unknown option, with the nearest known one."""
    raise ConfigError(
        f"{command} has no option {argument!r}.{nearest(argument.partition('=')[0], known)} See vlmtune {command} "
        "--help."
    )


def recipe_and_flags(argv: list[str]) -> tuple[str | None, list[str]]:
    """Split off a recipe that stands first."""
    if argv and not argv[0].startswith("--"):
        return argv[0], argv[1:]
    return None, argv


def take(argv: list[str], flag: str) -> tuple[str | None, list[str]]:
    """Take ``flag VALUE`` or ``flag=VALUE`` out of the flags."""
    for index, argument in enumerate(argv):
        if argument.startswith(flag + "="):
            return argument.partition("=")[2], argv[:index] + argv[index + 1 :]
        if argument == flag:
            if index + 1 == len(argv):
                raise ConfigError(f"{flag} needs a value.")
            return argv[index + 1], argv[:index] + argv[index + 2 :]
    return None, argv


def places_and_output(command: str, argv: list[str]) -> tuple[list[str], str | None]:
    """Split ``PLACE ... [--output FILE]``.

    Raises:
        ConfigError: no place is named, or an option is unknown.
    """
    output, places = take(argv, "--output")
    unknown = next((place for place in places if place.startswith("--")), None)
    if unknown is not None:
        refuse(command, unknown, ("--output",))
    if not places:
        raise ConfigError(f"{command} needs a run's or an evaluation's folder. See vlmtune {command} --help.")
    return places, output


def model_and_places(command: str, argv: list[str], wanted: str, usage: str) -> tuple[str, list[str], list[str]]:
    """Split ``MODEL PLACE ... --option value ...`` into the model, the places and the flags.

    Args:
        command: its name.
        argv: what follows it.
        wanted: the places, in words; empty where there are none.
        usage: what to write, after the command's name.

    Raises:
        ConfigError: the model or the places are missing, or stand behind options.
    """
    count = next((index for index, argument in enumerate(argv) if argument.startswith("--")), len(argv))
    places = argv[:count]
    if len(places) < (2 if wanted else 1) or (not wanted and len(places) > 1):
        needed = f"a model and {wanted}, and they stand" if wanted else "a model, and it stands"
        raise ConfigError(f"{command} needs {needed} before all options. Write: vlmtune {command} {usage}.")
    return places[0], places[1:], argv[count:]


class _BesideBars(logging.Handler):
    """Writes log lines above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


def set_up_output() -> None:
    """Log our lines to the terminal; keep libraries to errors, and their bars to terminals."""
    handler = _BesideBars()
    handler.setFormatter(RedactingFormatter("%(asctime)s  %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("vlmtune")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    if rank := int(os.environ.get("RANK") or 0):
        # What all say the first says; what one alone has to say is at least a warning.
        logger.setLevel(logging.WARNING)
        handler.setFormatter(logging.Formatter(f"%(asctime)s  rank {rank}: %(message)s", "%H:%M:%S"))
    logger.propagate = False
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not sys.warnoptions:
        # Libraries announcing each other's renamed functions; nothing a person who trains can act on.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|peft")
        # attach_adapter looks at the weights of the base model itself.
        warnings.filterwarnings("ignore", message=r".*`base_model_name_or_path` was renamed")


def progress(title: str) -> Callable[[int, int], None]:
    """Return a function that shows how far something is, and the time left: a bar on a terminal, else log lines."""
    if not sys.stderr.isatty():
        return _lines(title)
    from tqdm import tqdm

    bar: Any = None

    def show(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            hidden = os.environ.get("LOCAL_RANK", "0") != "0"
            bar = tqdm(total=total, desc=title, unit="", leave=False, disable=hidden)
        bar.update(done - bar.n)
        if done >= total:
            bar.close()
            bar = None

    return show


def _lines(title: str) -> Callable[[int, int], None]:
    """Return a function that logs how far something is, and the time left, every half minute."""
    began: tuple[float, int] | None = None
    said = time.perf_counter()

    def show(done: int, total: int) -> None:
        nonlocal began, said
        now = time.perf_counter()
        if began is None:
            # What an earlier run left, and what was done before the first call, says nothing of this one's speed.
            began = now, done
        elif done < total and now - said >= SECONDS_BETWEEN_LINES:
            said = now
            left = (now - began[0]) / max(done - began[1], 1) * (total - done)
            spoken = f"{left / 60:.0f} min" if left >= 90 else f"{left:.0f} s"
            logger.info(
                "%s: %s of %s (%.0f %%), about %s left", title, f"{done:,}", f"{total:,}", 100 * done / total, spoken
            )
        if done >= total:
            began = None

    return show

"""Data sets of the Hugging Face Hub, and whatever else ``datasets.load_dataset`` reads, by an address.

``hf://OWNER/NAME``, with ``@REVISION``, ``?config=CONFIG`` and ``?data_files=FILES``; also the name of one of its
readers (``hf://parquet?data_files=...``) or a folder. The data is downloaded and written as Arrow files into the cache
of ``datasets``, where a machine without network finds it again. No code of a data set runs: ``datasets`` has no way to.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from urllib.parse import parse_qs

from vlmtune.errors import DataError, nearest

SCHEME = "hf://"
OPTIONS = ("config", "data_files")


@dataclass(frozen=True)
class Address:
    """What ``load_dataset`` is asked for.

    Attributes:
        name: on the Hub, of a reader, or a folder.
        revision: a branch, tag or commit.
        config: one of several configurations.
        data_files: names or patterns of files.
    """

    name: str
    revision: str | None = None
    config: str | None = None
    data_files: tuple[str, ...] = ()


def is_address(path: object) -> bool:
    """Whether a path is such an address."""
    return str(path).startswith(SCHEME)


def parse(address: str) -> Address:
    """Read an address.

    Raises:
        DataError: it has no name, or an option that there is not.
    """
    place, _, query = address.removeprefix(SCHEME).removeprefix("datasets/").partition("?")
    name, _, revision = place.partition("@")
    options = parse_qs(query, keep_blank_values=True)
    if unknown := next((option for option in options if option not in OPTIONS), None):
        raise DataError(
            f"{address}: there is no option {unknown!r}; write {SCHEME}OWNER/NAME@REVISION?config=CONFIG&data_files="
            f"FILES.{nearest(unknown, OPTIONS)}"
        )
    if not name or len(options.get("config", ())) > 1:
        raise DataError(f"{address} must have one name and one config at most: {SCHEME}OWNER/NAME?config=CONFIG.")
    return Address(name, revision or None, options.get("config", [None])[0], tuple(options.get("data_files", ())))


@lru_cache(maxsize=64)
def prepare(address: str) -> Path:
    """Return the folder of a data set's Arrow files, after downloading what is not there yet.

    Raises:
        DataError: there is no such data set, it needs code of its own, or it cannot be reached.
    """
    import datasets

    wanted = parse(address)
    files = list(wanted.data_files) or None
    try:
        builder = datasets.load_dataset_builder(wanted.name, wanted.config, data_files=files, revision=wanted.revision)
        builder.download_and_prepare()
    # Readers of every kind of file, and the network, can fail in almost any way.
    except Exception as error:
        reason = " ".join(str(error).split())[:400] or type(error).__name__
        way = "Convert it to Parquet files" if "script" in reason else "Correct the address, or download it beforehand"
        raise DataError(f"{address} cannot be loaded: {reason}. {way}.") from error
    return Path(builder.cache_dir)

"""``vlmtune convert``."""

from __future__ import annotations

from vlmtune.cli.common import asks_help, print_help, progress, recipe_and_flags, refuse, take
from vlmtune.errors import ConfigError, nearest

OWN_OPTIONS = """\
  --to messages|parquet|webdataset
      What to write: JSON lines beside the images, Parquet files or tar shards with the images inside. [required]
  --output DIR
      The folder to make; it appears when all of it is written, with manifest.json. [required]
  --split NAME
      The split to convert; by default all that the data name.
  --images copy|keep
      With messages: copy images into the folder, or name them where they lie. [copy]
  --shard_mb N
      About how many megabytes a Parquet file or shard holds. [256]
"""
# Options of training that say how data are read.
SHARED = (
    *("dataset_format", "image_dir", "prompt", "columns", "max_bad_fraction", "verify_images", "max_pixels"),
    *("allow_remote_images", "private_image_hosts"),
)
FLAGS = ("--to", "--output", "--split", "--images", "--shard_mb")


def convert(argv: list[str]) -> int:
    """Convert data to messages JSONL, Parquet or WebDataset shards."""
    from vlmtune.config import VLMDataArguments
    from vlmtune.config.recipe import parse_arguments
    from vlmtune.data.conversion.convert import MANIFEST
    from vlmtune.data.conversion.convert import convert as convert_data
    from vlmtune.data.conversion.targets import TARGETS

    if asks_help(argv):
        print_help(
            "usage: vlmtune convert DATA --to TARGET --output DIR [--option value ...]\n\n"
            "Converts data of any format. What cannot be used is left out, and named in manifest.json. verify_images\n"
            "is full here unless it is set: no image is written that cannot be decoded.\n\n" + OWN_OPTIONS,
            [VLMDataArguments],
            without=[name for name in VLMDataArguments.__dataclass_fields__ if name not in SHARED],
        )
        return 0
    given: dict[str, str | None] = {}
    for flag in FLAGS:
        given[flag], argv = take(argv, flag)
    data, flags = recipe_and_flags(argv)
    if data is None:
        raise ConfigError("convert needs data, before all options. See vlmtune convert --help.")
    to, output, shard = given["--to"], given["--output"], given["--shard_mb"] or "256"
    if to is None or to not in TARGETS:
        raise ConfigError(f"--to is {to!r}; it takes {', '.join(TARGETS)}.{nearest(to or '', TARGETS)}")
    if not output:
        raise ConfigError("convert needs --output, the folder to make.")
    if given["--images"] not in (None, "copy", "keep"):
        raise ConfigError(f"--images is {given['--images']!r}; it takes copy or keep.")
    if given["--images"] == "keep" and to != "messages":
        raise ConfigError(f"--images keep goes with --to messages alone: {to} holds the images' bytes.")
    if not (shard.isdigit() and int(shard)):
        raise ConfigError(f"--shard_mb is {shard!r}; it must be a whole number above 0.")
    named = [flag for flag in flags if flag.startswith("--")]
    for flag in named:
        if flag[2:].partition("=")[0].replace("-", "_") not in SHARED:
            refuse("convert", flag, [*FLAGS, *(f"--{name}" for name in SHARED)])
    if not any(flag[2:].startswith(("verify_images", "verify-images")) for flag in named):
        flags = [*flags, "--verify_images", "full"]
    (options,) = parse_arguments([VLMDataArguments], ["--dataset_path", data, *flags], None)
    manifest = convert_data(
        options.dataset_path,
        output,
        to,
        format=options.dataset_format,
        split=given["--split"],
        image_dir=options.image_dir,
        prompt=options.prompt,
        columns=options.columns or (),
        max_bad_fraction=options.max_bad_fraction,
        verify_images=options.verify_images,
        max_pixels=options.max_pixels,
        allow_remote_images=options.allow_remote_images,
        private_image_hosts=options.private_image_hosts or (),
        keep_images=given["--images"] == "keep",
        shard_mb=int(shard),
        progress=progress,
    )
    for name, counts in manifest["splits"].items():
        written, read, left_out = (f"{counts[key]:,}" for key in ("rows_written", "rows_read", "left_out"))
        print(f"{name}: {written} of {read} rows written, {left_out} left out")
    print(f"Written: {output} ({len(manifest['files']):,} files, listed in {MANIFEST})")
    return 0

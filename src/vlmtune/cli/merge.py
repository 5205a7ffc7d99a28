"""``vlmtune merge``."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

from vlmtune.cli.common import asks_help, print_help
from vlmtune.errors import ConfigError

if TYPE_CHECKING:
    from vlmtune.config.merge import MergeArguments


def merge(argv: list[str]) -> int:
    """Merge an adapter into its base model."""
    from vlmtune.config.merge import MergeArguments

    if asks_help(argv):
        print_help(
            "usage: vlmtune merge ADAPTER OUTPUT_DIR [--option value ...]\n"
            "       vlmtune merge MERGED --check_serving\n\n"
            "Merges an adapter into its 16- or 32-bit base model, file by file in the base's own layout, so that\n"
            "every server that takes the base takes the result. The result is loaded again and compared with the\n"
            "adapter on some samples; it is kept only if it gives the same. The second form runs the\n"
            "loaders and converters of other programs on what is merged already.",
            [MergeArguments],
            without=["adapter", "output_dir"],
        )
        return 0
    from vlmtune.config.recipe import parse_arguments

    if len(argv) > 1 and not argv[0].startswith("--") and "--check_serving" in argv[1:] and argv[1].startswith("--"):
        (given,) = parse_arguments([MergeArguments], ["--adapter", "", "--output_dir", *argv])
        return _check_serving(given)
    if len(argv) < 2 or any(place.startswith("--") for place in argv[:2]):
        raise ConfigError(
            "merge needs an adapter and a folder for the merged model, and they stand before all options. Write: "
            "vlmtune merge ADAPTER OUTPUT_DIR [--option value ...]."
        )
    (args,) = parse_arguments([MergeArguments], ["--adapter", argv[0], "--output_dir", argv[1], *argv[2:]])
    from vlmtune.evaluation import merging

    # A polite kill then cleans up as Ctrl-C does.
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        result = merging.merge(args)
    finally:
        signal.signal(signal.SIGTERM, before)
    print(merging.format_drifts(result.drifts))
    print(f"\nMerged {result.changed_tensors} tensors ({result.dtype}) into {result.output_dir}.")
    print(f"Try it: vlmtune predict {result.output_dir} IMAGE --prompt 'Describe this image.'")
    return _check_serving(args) if args.check_serving else 0


def _check_serving(args: MergeArguments) -> int:
    from vlmtune.models.serve_check import check_serving, format_checks

    checks = check_serving(args.output_dir, args.base_model)
    print(f"\nWhat other programs make of {args.output_dir}:\n{format_checks(checks)}")
    failed = [check.name for check in checks if check.outcome == "failed"]
    if failed:
        print(f"\nFailed: {'; '.join(failed)}. The merged model was kept.")
    return 1 if failed else 0


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt

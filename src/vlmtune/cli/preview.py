"""``vlmtune preview``."""

from __future__ import annotations

from pathlib import Path

from vlmtune.cli.check import BATCH_OPTIONS, data_and_model, free_folder
from vlmtune.cli.common import asks_help, print_help, take
from vlmtune.errors import ConfigError, OutputError

OWN_OPTIONS = (
    "  --rows N\n      Rows to show, from the first on. [5]\n"
    "  --ids ID,ID,...\n      These rows instead.\n"
    "  --output FILE\n      The page to write; by default preview.html in the next free runs/preview-N."
)


def preview(argv: list[str]) -> int:
    """Show rows as the model will see them."""
    from vlmtune.config import BaseModelArguments, VLMDataArguments

    if asks_help(argv):
        print_help(
            "usage: vlmtune preview RECIPE.yaml|DATA --model_name_or_path MODEL [--option value ...]\n\n"
            "Shows training rows as the model will see them: every token, those that are learned in colour, images\n"
            "after preprocessing, and what texts of one image share. In the terminal and as a page.\n\n" + OWN_OPTIONS,
            [BaseModelArguments, VLMDataArguments],
            optional=("dataset_path",),
            without=BATCH_OPTIONS,
        )
        return 0
    rows, argv = take(argv, "--rows")
    ids, argv = take(argv, "--ids")
    output, argv = take(argv, "--output")
    if rows is not None and not (rows.isdigit() and int(rows)):
        raise ConfigError(f"--rows is {rows!r}; it must be a whole number above 0.")
    data_args, model_args = data_and_model(argv, model_required=True)
    from vlmtune.inspection.preview import html_preview, print_preview
    from vlmtune.inspection.preview import preview as make_preview

    chosen = [name for name in (ids or "").split(",") if name]
    groups = make_preview(data_args, model_args, rows=int(rows or 5), ids=chosen)
    print_preview(groups)
    file = Path(output) if output else free_folder("preview") / "preview.html"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(html_preview(groups, f"What the model sees of {data_args.dataset_path}"), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{file} cannot be written ({error.strerror}). Choose another --output.") from error
    print(f"Written: {file}")
    return 0

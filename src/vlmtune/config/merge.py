"""Arguments of merging an adapter into its base model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from vlmtune.config.model import DtypeName
from vlmtune.config.options import AT_LEAST_ONE, POSITIVE, Checked, Limits, option


@dataclass
class MergeArguments(Checked):
    """Which adapter is merged, onto what, and how the result is checked."""

    _argument_group_name = "merge"

    adapter: str = option(help="Folder of the adapter.")
    output_dir: str = option(help="Folder for the merged model; it must be absent or empty.")
    base_model: str | None = option(
        None, help="The adapter's base model, where it has moved or its quantised form was trained on."
    )
    merge_onto: Literal["original", "dequantised"] = option(
        "original",
        help="For an adapter that was trained on quantised weights: merge onto the original ones, or onto the "
        "quantised ones unpacked, which are what it was trained on. The drift of both is shown.",
    )
    quantised: Literal["auto", "no", "4bit", "8bit"] = option(
        "auto", help="In what the adapter's base was kept in training; auto takes it from the adapter's record."
    )
    torch_dtype: DtypeName = option(
        "float32",
        help="Number format in which the models are compared; bfloat16 takes half the memory and hides small drifts.",
    )
    dataset_path: str | None = option(
        None, help="Data to compare on, in any format that train takes; by default on drawn pictures."
    )
    samples: int = option(4, help="Samples to compare on.")
    max_new_tokens: int = option(32, help="Most tokens of an answer that is compared.")
    tolerance: float | None = option(
        None,
        help="Largest drift, as a share of what the adapter changes in the logits; by default 0.01 for a float32 "
        "model compared in float32, and 0.08 in 16 bits, whose rounding alone has some.",
    )

    check_serving: bool = option(
        False,
        help="Then run the loaders and converters of other programs that are installed (gguf, llama.cpp's "
        "convert_hf_to_gguf.py on PATH, vLLM), and fail where one of them refuses the model.",
    )

    limits: ClassVar[Limits] = {"samples": AT_LEAST_ONE, "max_new_tokens": AT_LEAST_ONE, "tolerance": POSITIVE}

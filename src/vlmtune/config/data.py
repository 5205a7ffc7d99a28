"""Arguments that say which data, and how rows become samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from vlmtune.config.options import (
    AT_LEAST_ONE,
    AT_LEAST_ZERO,
    FRACTION,
    FRACTION_BELOW_ONE,
    POSITIVE,
    Checked,
    Limits,
    option,
)

Switch = Literal["auto", "on", "off"]


@dataclass
class VLMDataArguments(Checked):
    """Which data, and how its rows become samples."""

    _argument_group_name = "data"

    dataset_path: str = option(
        help="The data: a folder, the file with the captions, questions or messages, or hf://OWNER/NAME for a data "
        "set of the Hugging Face Hub."
    )
    dataset_format: str = option(
        "auto", help="Format of the data, such as flickr, easy_vqa or messages; auto recognises it by its files."
    )
    train_split: str | None = option(
        None, help="Split to train on; by default train where the data names splits, else everything."
    )
    eval_split: str | None = option(None, help="Split to evaluate on, such as dev or test; by default none.")
    eval_dataset_path: str | None = option(None, help="Data to evaluate on, where it lies apart from dataset_path.")
    image_dir: str | None = option(
        None, help="Folder of the images, where the data does not lie beside them or name them in full."
    )
    prompt: str | None = option(
        None,
        help="What the user asks: of caption data the same about every image, by default 'Describe this image.'; of "
        "question data a text with {question}, of boxes one with {labels} or {phrase}.",
    )
    columns: list[str] | None = option(
        None,
        help="NAME=COLUMN pairs for rows whose columns have other names than vlmtune reads, such as image=photo "
        "caption=description.",
    )
    max_train_samples: int | None = option(
        None, help="Train on this many samples, drawn at random by split_seed; by default on all."
    )
    max_eval_samples: int | None = option(
        None, help="Evaluate on this many samples, drawn at random by split_seed; by default on all."
    )
    validation_fraction: float = option(
        0.0,
        help="Hold out this share of the images, with all their texts, for evaluation, where the data has no split "
        "for it.",
    )
    split_seed: int = option(0, help="Seed of every random choice of samples and images.")
    max_bad_fraction: float = option(
        0.01,
        help="Bad rows and images are set aside and named in the run's record; a larger share of them stops the run.",
    )
    verify_images: Literal["off", "header", "full"] = option(
        "header",
        help="How images are checked before any weight loads: header reads each one's size and format, full decodes "
        "it whole, off only looks whether the file exists.",
    )
    max_pixels: int | None = option(
        None,
        help="Most pixels of an image file, 179 million by default; a larger one is refused as a decompression bomb.",
    )
    allow_remote_images: bool = option(
        False,
        help="Download images that rows name by http or https address into the user's cache folder before anything "
        "else; by default such rows are set aside.",
    )
    private_image_hosts: list[str] | None = option(
        None,
        help="Hosts, as HOST or HOST:PORT, of this machine or its private network that images may be downloaded from; "
        "by default none, so that data cannot reach into the network.",
    )
    image_timeout: float = option(
        60.0, help="Seconds that reading and decoding one image may take; a slower one is an error that names it."
    )
    max_length: int | None = option(
        None, help="Most tokens of a sample, image tokens included; by default no limit. An image is never cut."
    )
    on_too_long: Literal["error", "drop", "truncate_text"] = option(
        "error", help="What happens to a longer sample: stop, leave it out (and count it), or cut its text at the end."
    )
    streaming: bool = option(
        False,
        help="Read the shards of WebDataset data while training goes on, each process its own, with nothing of the "
        "whole in memory: for data too large for an index. Needs max_steps.",
    )
    streaming_shards: int = option(
        1,
        help="With streaming, shards of a process that are shuffled together, and between which texts share images. "
        "All of their rows are checked before the first is trained on.",
    )
    share_images: Switch = option(
        "auto",
        help="Compute an image once for all texts about it in a batch. auto does so wherever it is exact; on makes it "
        "an error where it is not.",
    )
    max_texts_per_row: int | None = option(
        None,
        help="Most texts of one image that are computed together; an image with more is split evenly over several "
        "rows. By default all of them in a batch.",
    )
    max_tokens_per_row: int | None = option(
        None,
        help="Most tokens of an image and the texts computed together with it; what is longer is split evenly over "
        "several rows. By default no limit. Lower it where an image with many texts fills the memory.",
    )
    cache_image_features: Switch = option(
        "auto",
        help="Compute the features of a frozen vision tower once and keep them on disk. auto does so wherever it is "
        "exact and the disk has room; on makes it an error where it is not.",
    )
    cache_dir: str | None = option(
        None, help="Folder of the feature cache; by default vlmtune/features in the user's cache folder."
    )
    cache_max_gb: float = option(20.0, help="Most disk space, in gigabytes, that the feature cache takes.")

    limits: ClassVar[Limits] = {
        "max_train_samples": AT_LEAST_ONE,
        "max_eval_samples": AT_LEAST_ONE,
        "validation_fraction": FRACTION_BELOW_ONE,
        "split_seed": AT_LEAST_ZERO,
        "max_bad_fraction": FRACTION,
        "max_pixels": AT_LEAST_ONE,
        "image_timeout": POSITIVE,
        "max_length": AT_LEAST_ONE,
        "streaming_shards": AT_LEAST_ONE,
        "max_texts_per_row": AT_LEAST_ONE,
        "max_tokens_per_row": AT_LEAST_ONE,
        "cache_max_gb": POSITIVE,
    }

    def problems(self) -> list[str]:
        """Return what is wrong with the values, one sentence each."""
        found = super().problems()
        if self.streaming:
            found += [
                f"{name} needs all samples to be known, which streaming does not; leave out one of them."
                for name in ("max_train_samples", "validation_fraction")
                if getattr(self, name)
            ]
        if self.private_image_hosts and not self.allow_remote_images:
            found.append("private_image_hosts goes with allow_remote_images: true alone.")
        ways = [name for name in ("eval_split", "eval_dataset_path", "validation_fraction") if getattr(self, name)]
        if "validation_fraction" in ways and len(ways) > 1:
            found.append(
                f"validation_fraction and {ways[0]} both name the evaluation data; set one of them (eval_split may "
                "go with eval_dataset_path)."
            )
        return found

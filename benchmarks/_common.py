"""What the benchmarks share: their data and models, vlmtune's trainer, own processes, and how results are written."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

# Elsewhere for runs that only try a script.
RESULTS = Path(os.environ.get("BENCHMARK_RESULTS", Path(__file__).parent / "results"))
PROMPT = "Describe this image."
WORDS = (
    "a the two three young old man woman child dog cat bird horse red blue green yellow black white small large "
    "runs jumps sits stands plays sleeps walks looks on in under near behind with grass water snow street park "
    "beach field house tree ball bike boat car bench hat shirt"
).split()
QUIET = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True}


# -- data and models --------------------------------------------------------------------------------------


def make_folder(folder: Path, images: int, texts: int) -> None:
    """Write a Flickr-style folder of noisy JPEG pictures with captions of 8 to 14 words."""
    import numpy as np
    from PIL import Image

    rng, words = np.random.default_rng(0), random.Random(0)
    (folder / "Images").mkdir(parents=True)
    lines = ["image,caption"]
    for number in range(images):
        coarse = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        picture = np.asarray(Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)).astype(np.int16)
        picture = np.clip(picture + rng.integers(-12, 13, picture.shape), 0, 255).astype(np.uint8)
        name = f"{1000 + number}.jpg"
        Image.fromarray(picture).save(folder / "Images" / name, quality=90)
        for _ in range(texts):
            lines.append(f"{name},{' '.join(words.choices(WORDS, k=words.randint(8, 14)))} .")
    (folder / "captions.txt").write_text("\n".join(lines) + "\n")


def sizes_of(name: str, image_tokens: int | None = None) -> Any:
    """Sizes of a random-weight Gemma-3.

    Args:
        name: ``tiny`` (to try a script), ``mini`` (3M parameters), ``small`` (81M) or ``4b`` (the real ones).
        image_tokens: a square number; the picture grows with it, at two by two patches a token (not for ``4b``).
    """
    from vlmtune.demo.build import Sizes

    def layers(count: int) -> tuple[str, ...]:
        return tuple("full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(count))

    patch, soft = (8, 16) if name == "tiny" else (14, 256)
    soft = image_tokens or soft
    side = 2 * patch * round(soft**0.5)
    if name == "tiny":
        return Sizes(
            image_size=side, patch_size=patch, tokens_per_image=soft, vision_hidden=32, vision_layers=2,
            vision_heads=2, text_hidden=64, text_layers=2, text_heads=2, text_kv_heads=1, head_dim=32, text_mlp=128,
            sliding_window=16, vocab_size=512, layer_types=("sliding_attention", "full_attention"),
        )  # fmt: skip
    if name == "mini":
        return Sizes(
            image_size=side, patch_size=patch, tokens_per_image=soft, vision_hidden=128, vision_layers=4,
            vision_heads=4, text_hidden=192, text_layers=4, text_heads=4, text_kv_heads=2, head_dim=48, text_mlp=768,
            sliding_window=512, vocab_size=4096, layer_types=layers(4),
        )  # fmt: skip
    if name == "small":
        return Sizes(
            image_size=side, patch_size=patch, tokens_per_image=soft, vision_hidden=384, vision_layers=8,
            vision_heads=6, text_hidden=512, text_layers=8, text_heads=8, text_kv_heads=4, head_dim=64, text_mlp=2048,
            sliding_window=512, vocab_size=65_536, layer_types=layers(8),
        )  # fmt: skip
    return Sizes(
        image_size=896, patch_size=14, tokens_per_image=256, vision_hidden=1152, vision_layers=27, vision_heads=16,
        vision_mlp=4304, text_hidden=2560, text_layers=34, text_heads=8, text_kv_heads=4, head_dim=256,
        text_mlp=10240, sliding_window=1024, vocab_size=262_208, layer_types=layers(34),
    )  # fmt: skip


def make_model(folder: Path, sizes: Any, *, dtype: str = "float32") -> None:
    """Write a random-weight Gemma-3 with its processor."""
    import torch

    from vlmtune.demo.build import build_model, build_processor, save

    processor = build_processor([PROMPT, " ".join(WORDS)] * 50, sizes)
    save(build_model(processor, sizes, dtype=getattr(torch, dtype)), processor, folder)


def default_size() -> str:
    """``4b`` on a GPU of 40 GB or more, else ``small``."""
    import torch

    large = torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory >= 40e9
    return "4b" if large else "small"


def dtype_of(size: str) -> str:
    """Number format that a model of this size is trained in."""
    return "bfloat16" if size == "4b" else "float32"


def demo_model(path: str, scratch: str) -> str:
    """Folder of the demo's model: ``path``, the shipped one where it is empty, a random one for ``tiny``."""
    if path == "tiny":
        make_model(Path(scratch) / "tiny", sizes_of("tiny"))
        return f"{scratch}/tiny"
    if not path:
        from vlmtune.demo.run import model_folder

        path = str(model_folder())
    if not (Path(path) / "config.json").exists():
        raise SystemExit(f"There is no model in {path}. Name one with --model, or --model tiny to try the script.")
    return path


# -- training ---------------------------------------------------------------------------------------------


def step_options(samples: int, steps: int, size: str) -> dict[str, Any]:
    """Training options of a throughput run, the same for every trainer."""
    return QUIET | {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": samples,
        "max_steps": steps,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "logging_steps": 1,
        "bf16": size == "4b",
        "gradient_checkpointing": False,
        "dataloader_num_workers": 4 if size == "4b" else 0,
        "seed": 0,
    }


class Filling(NamedTuple):
    """Time that the feature cache took to fill."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0


def vlmtune_trainer(
    mode: str,
    model_path: str,
    data: Any,
    args: Any,
    *,
    dtype: str = "float32",
    shuffle: bool = False,
    lora: tuple[int, int] = (16, 32),
    max_texts: int | None = None,
    callbacks: list[Any] | None = None,
) -> tuple[Any, Filling]:
    """Make vlmtune's trainer with LoRA on the language model.

    Args:
        mode: ``separate``, ``shared``, or ``cached``: shared, with every image's features computed before.
        model_path: the model's folder.
        data: rows, from :func:`vlmtune.data.loading.load_samples`.
        args: ``TrainingArguments``.
        dtype: number format of the weights.
        shuffle: draw samples, or whole groups, at random; else the rows are taken in their order.
        lora: the adapters' rank and alpha.
        max_texts: most texts of an image in one batch.
        callbacks: the trainer's.

    Returns:
        The trainer, and what it took to compute the features.
    """
    import torch

    from vlmtune.batching.collator import BaseVLMDataCollator, SharedImageCollator
    from vlmtune.batching.sampler import ImageGroupSampler
    from vlmtune.batching.scan import scan
    from vlmtune.config import VLMDataArguments
    from vlmtune.models.families import get_family
    from vlmtune.models.loading import load_model_for_training, load_processor
    from vlmtune.models.lora import setup_lora
    from vlmtune.training.image_reuse import fill_feature_cache, open_feature_cache, with_image_keys
    from vlmtune.training.trainer import create_trainer

    processor = load_processor(model_path)
    model = load_model_for_training(model_path, torch_dtype=dtype)
    family = get_family(model)
    torch.manual_seed(args.seed)
    model = setup_lora(model, lora_r=lora[0], lora_alpha=lora[1], lora_dropout=0.0)
    rows = with_image_keys(data)
    collator = (BaseVLMDataCollator if mode == "separate" else SharedImageCollator)(processor, family)
    sampler = None
    if mode != "separate" or not shuffle:
        lengths = scan(rows, collator.encoder).lengths if shuffle else [1] * len(rows)
        sampler = ImageGroupSampler(
            rows["image_key"][:],
            lengths,
            args.per_device_train_batch_size,
            max_texts=max_texts,
            seed=args.seed,
            shuffle=shuffle,
        )
    filling = Filling()
    if mode == "cached":
        if torch.cuda.is_available():
            model.to("cuda")
        cache = open_feature_cache(
            model, family, processor, VLMDataArguments(dataset_path="", cache_dir=tempfile.mkdtemp())
        )
        assert cache is not None and isinstance(collator, SharedImageCollator)
        started, cpu_started = time.perf_counter(), time.process_time()
        fill_feature_cache(cache, model, collator.encoder, rows)
        filling = Filling(time.perf_counter() - started, time.process_time() - cpu_started)
        collator.cache = cache
    trainer = create_trainer(
        model=model,
        args=args,
        train_dataset=rows,
        data_collator=collator,
        processor=processor,
        callbacks=callbacks,
        train_sampler=sampler,
    )
    return trainer, filling


# -- running and writing ----------------------------------------------------------------------------------


def flags_of(args: argparse.Namespace, *names: str) -> list[str]:
    """Write some arguments as flags again, for a worker."""
    return [text for name in names for text in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]


def in_own_process(script: str, mode: str, arguments: list[str]) -> dict[str, Any]:
    """Run ``script --worker mode`` in a process of its own and return the JSON of its last line."""
    command = [sys.executable, script, "--worker", mode, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{mode} failed:\n{result.stderr[-3000:]}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def peak_memory_gib() -> float:
    """Peak memory of this process so far, in GiB: of the GPU where there is one, else resident."""
    import resource

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def now() -> float:
    """Seconds, when all that was given to the GPU is done."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def header(args: argparse.Namespace) -> dict[str, Any]:
    """Describe where and how the figures were taken."""
    from vlmtune.training.run_info import hardware, versions

    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": hardware(),
        "versions": versions(),
        "arguments": {key: str(value) for key, value in vars(args).items()},
    }


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """Return a table."""
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def write(name: str, record: dict[str, Any], table: str) -> None:
    """Write ``results/NAME.json`` and ``results/NAME.md`` and print the table."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
    about = record["about"]
    hardware = about["hardware"]
    machine = ", ".join(hardware.get("gpus", [])) or f"{hardware['processor']}, {hardware['cores']} cores"
    versions = ", ".join(f"{key} {value}" for key, value in about["versions"].items())
    arguments = " ".join(f"{key}={value}" for key, value in about["arguments"].items() if key != "worker")
    text = f"# {name}\n\n{table}\n\n- date: {about['date']}\n- hardware: {machine}\n- versions: {versions}\n"
    (RESULTS / f"{name}.md").write_text(text + f"- arguments: {arguments}\n")
    print(text)


def pyplot() -> Any:
    """Return matplotlib's pyplot, drawing to files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    return plt

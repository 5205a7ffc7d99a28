"""Process-wide settings for training: seeds, threads, matrix precision and quiet libraries."""

from __future__ import annotations

import logging
import os

import torch
from transformers import set_seed


def setup_training_environment(
    seed: int | None = None, *, deterministic: bool = False, num_threads: int | None = None
) -> dict[str, object]:
    """Set up this process for training and return what was set.

    TF32 is allowed for float32 matrix products on GPUs that have it. Tokenizers' own threads are turned off,
    since they deadlock in forked data loader workers.

    Args:
        seed: seeds Python, NumPy and PyTorch.
        deterministic: ask PyTorch for deterministic kernels; slower, and an error where there is none.
        num_threads: CPU threads of PyTorch; its own choice when absent.

    Returns:
        The settings in force, for the run's record.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if seed is not None:
        set_seed(seed)
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = not deterministic
        torch.backends.cudnn.allow_tf32 = not deterministic
    for noisy in ("httpx", "httpx2", "urllib3", "filelock", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    return {
        "seed": seed,
        "deterministic": deterministic,
        "num_threads": torch.get_num_threads(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }

"""Serve through vLLM, started with the model's own template, terminators, adapter and limits."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

from vlmtune.config import AdapterArguments, BaseModelArguments, GenerationArguments, QuantizationArguments
from vlmtune.config.serving import ServeArguments
from vlmtune.errors import AdapterError, ConfigError, EvaluationError, MissingDependencyError
from vlmtune.evaluation.command import load
from vlmtune.evaluation.generation import terminators
from vlmtune.models.checkpoint import adapter_base, is_adapter_dir
from vlmtune.models.families import get_family
from vlmtune.models.loading import load_config, load_processor
from vlmtune.models.serving import adapter_limits, adapter_rank
from vlmtune.serving.check import Check, check_answers

logger = logging.getLogger("vlmtune.serve")
# The ranks that vLLM makes room for.
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
START_SECONDS = 900


def serve(
    model_args: BaseModelArguments,
    adapter_args: AdapterArguments,
    quantization_args: QuantizationArguments,
    generation_args: GenerationArguments,
    args: ServeArguments,
    name: str,
    key: str | None,
) -> Check | None:
    """Run vLLM's server until it ends, or check it and return what was found.

    Raises:
        MissingDependencyError: vLLM is not installed.
        ConfigError: an option that it lacks.
        AdapterError: an adapter that it would apply in part.
        EvaluationError: it ended, or did not begin.
    """
    program = shutil.which("vllm")
    if program is None:
        raise MissingDependencyError(
            "engine vllm needs vLLM (docs.vllm.ai), which is not installed. Install it, or leave engine out."
        )
    with tempfile.TemporaryDirectory(prefix="vlmtune-vllm-") as folder:
        command = build_command(model_args, adapter_args, quantization_args, generation_args, args, name, Path(folder))
        environment = dict(os.environ) | ({"VLLM_API_KEY": key} if key else {})
        logger.info("starting %s", " ".join([program, *command]))
        process = subprocess.Popen([program, *command], env=environment)
        try:
            if not args.check:
                raise EvaluationError(f"vLLM ended with code {process.wait()}; its own messages stand above.")
            address = f"http://{args.host}:{args.port}"
            _wait(process, f"{address}/health")
            model, processor = load(model_args, adapter_args, quantization_args)
            return check_answers(f"{address}/v1", name, key, model, processor, generation_args)
        finally:
            process.terminate()
            process.wait()


def build_command(
    model_args: BaseModelArguments,
    adapter_args: AdapterArguments,
    quantization_args: QuantizationArguments,
    generation_args: GenerationArguments,
    args: ServeArguments,
    name: str,
    folder: Path,
) -> list[str]:
    """Return the options of ``vllm`` (docs.vllm.ai/en/stable/cli/serve), and write the files that they name.

    Args:
        model_args: the model.
        adapter_args: an adapter for it.
        quantization_args: of its weights.
        generation_args: what a request leaves open.
        args: address and limits.
        name: of the model, in requests.
        folder: for the files.

    Raises:
        ConfigError: an option that vLLM lacks.
        AdapterError: an adapter that it would apply in part.
    """
    if args.max_pixels is not None:
        raise ConfigError("vLLM cannot refuse images by their size; leave out max_pixels, or use engine vlmtune.")
    if model_args.image_max_pixels is not None:
        raise ConfigError(
            "vLLM resizes images as the model's own processor says; leave out image_max_pixels, or use engine vlmtune."
        )
    if args.port == 0:
        raise ConfigError("vLLM cannot choose a port itself; set port.")
    base, adapter = model_args.model_name_or_path, adapter_args.adapter
    if is_adapter_dir(base):
        base, adapter = adapter_base(base), base
    revision = model_args.model_revision
    processor = load_processor(adapter) if adapter else load_processor(base, revision=revision)
    family = get_family(load_config(base, revision=revision), model_args.model_type)
    command = ["serve", base, "--host", args.host, "--port", str(args.port)]
    if revision:
        command += ["--revision", revision]
    if model_args.trust_remote_code:
        command.append("--trust-remote-code")
    if model_args.torch_dtype != "auto":
        command += ["--dtype", model_args.torch_dtype]
    if quantization_args.use_4bit:
        command += ["--quantization", "bitsandbytes"]
    if quantization_args.use_8bit:
        raise ConfigError("vLLM quantises to 4 bits only; use use_4bit, or engine vlmtune.")
    # Whoever names the base gets the base, so the adapter takes the name that was asked for.
    command += ["--served-model-name", f"{name}-base" if adapter else name]
    if adapter:
        if problems := adapter_limits(adapter, family):
            raise AdapterError(
                f"vLLM would not apply all of the adapter {adapter}: {'; '.join(problems)}. Merge it by vlmtune merge "
                "and serve the merged model, or use engine vlmtune."
            )
        own, of_base = (p.image_processor.to_dict() for p in (processor, load_processor(base, revision=revision)))
        if own != of_base:
            raise AdapterError(
                f"The adapter {adapter} takes images at another size than its base (image_max_pixels), and vLLM would "
                "take the base's. Merge it by vlmtune merge and serve the merged model, or use engine vlmtune."
            )
        rank = next((rank for rank in RANKS if rank >= adapter_rank(adapter)), None)
        if rank is None:
            raise AdapterError(f"vLLM takes adapters of at most rank {RANKS[-1]}. Merge {adapter} by vlmtune merge.")
        command += [
            "--enable-lora",
            "--lora-modules",
            f"{name}={Path(adapter).resolve()}",
            "--max-lora-rank",
            str(rank),
        ]
    generation = {
        "eos_token_id": sorted(terminators(processor, family)),
        "temperature": generation_args.temperature,
        "top_p": generation_args.top_p,
        "max_new_tokens": generation_args.max_new_tokens,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation) + "\n", encoding="utf-8")
    command += ["--generation-config", str(folder)]
    if processor.chat_template is not None:
        (folder / "chat_template.jinja").write_text(processor.chat_template, encoding="utf-8")
        command += ["--chat-template", str(folder / "chat_template.jinja")]
    return [*command, "--limit-mm-per-prompt", json.dumps({"image": args.max_images})]


def _wait(process: subprocess.Popen[bytes], address: str) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        if process.poll() is not None:
            raise EvaluationError(f"vLLM ended with code {process.returncode}; its own messages stand above.")
        try:
            with opener.open(address, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise EvaluationError(f"vLLM did not begin within {START_SECONDS} s; its own messages stand above.")

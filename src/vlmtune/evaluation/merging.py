"""Merge an adapter, load the result again, and keep it only if it answers as the adapter does.

Shape legend: L positions, V vocabulary.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BitsAndBytesConfig, GenerationConfig

from vlmtune.batching.collator import BaseVLMDataCollator
from vlmtune.config import GenerationArguments
from vlmtune.config.merge import MergeArguments
from vlmtune.data.loading import load_samples
from vlmtune.data.sample import Message, Sample
from vlmtune.errors import AdapterError, ModelError, OutputError
from vlmtune.evaluation.card import leave_card
from vlmtune.evaluation.drawn import drawn_sample
from vlmtune.evaluation.generation import AnswerGenerator, terminators
from vlmtune.models.adapter_files import read_settings
from vlmtune.models.checkpoint import adapter_base, is_adapter_dir, saved_quantization, saved_start
from vlmtune.models.families import get_family
from vlmtune.models.loading import load_model_for_inference
from vlmtune.models.merge import MERGE_FILE, Merged, merge_weights, require_mergeable
from vlmtune.models.provenance import versions
from vlmtune.models.quantization import get_quantization_config, get_torch_dtype

logger = logging.getLogger("vlmtune.merge")

# Last positions of a conversation whose logits are compared.
POSITIONS = 64
# Largest drift. Rounding to 16 bits, and quantised kernels, leave some noise; a scale that is wrong by a tenth
# must still be seen.
TOLERANCE = 0.01
ROUNDED_TOLERANCE = 0.08


@dataclass(frozen=True)
class Drift:
    """How far a merged model is from the adapter on its base, on some samples.

    Attributes:
        drift: root mean square of the difference of the logits, as a share of what the adapter changes in them.
        strength: how much of the adapter's change is there: 1 when all of it (least squares over all logits).
        largest: largest absolute difference of a logit.
        same_tokens: share of positions with the same likeliest token.
        same_answers: greedy answers that are equal, letter by letter.
        answers: answers compared.
        changes: root mean square of what the adapter changes.
    """

    drift: float
    strength: float
    largest: float
    same_tokens: float
    same_answers: int
    answers: int
    changes: float


@dataclass(frozen=True)
class MergeResult:
    """A merged model that was kept: its folder, and its drift from each form of the adapter, by name."""

    output_dir: Path
    changed_tensors: int
    dtype: str
    drifts: dict[str, Drift]


@dataclass(frozen=True)
class _Outputs:
    """What a model gives on the samples: logits (L, V) of each, and answers."""

    logits: list[Tensor]
    answers: list[str]


def merge(args: MergeArguments) -> MergeResult:
    """Merge an adapter, check the result against it, and put it in place.

    Raises:
        OutputError: the output folder is not empty, or cannot be made.
        AdapterError: the adapter cannot be merged, or the merged model drifts from it.
        ModelError: the base model cannot be loaded.
    """
    adapter, output_dir = Path(args.adapter).expanduser(), Path(args.output_dir).expanduser()
    if not is_adapter_dir(adapter):
        raise AdapterError(f"{adapter} is no adapter folder: it has no adapter_config.json. Name a run's output_dir.")
    base = args.base_model or adapter_base(adapter)
    _require_free(output_dir)
    dtype = get_torch_dtype(args.torch_dtype)
    quantised = _quantisation(args, adapter)
    samples = _samples(args)
    run = _Comparison(base, adapter, samples, args, dtype)
    require_mergeable(base, adapter)

    logger.info("answering %d samples with the adapter on %s", len(samples), base)
    # What began with loftq makes up for what quantising lost, and says nothing on whole weights.
    quantised_only = saved_start(adapter) == "loftq"
    if quantised_only and args.merge_onto == "original":
        raise AdapterError(
            f"The adapter {adapter} began with lora_init loftq, which makes up for what 4 bits lost of the weights, "
            "so it cannot be merged onto the original ones. Set merge_onto to dequantised."
        )
    plain, without = (None, None) if quantised_only else run.adapter_outputs(None)
    trained, trained_without = (None, None) if quantised is None else run.adapter_outputs(quantised)
    drifts: dict[str, Drift] = {}
    ways = ["original"] if quantised is None else sorted(("original", "dequantised"), key=args.merge_onto.__eq__)
    ways = ways[-1:] if quantised_only else ways
    with _temporary(output_dir) as scratch:
        # The chosen way comes last and is the one that stays.
        for way in ways:
            place = scratch / "model"
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            logger.info("merging onto the %s weights", way)
            merged = merge_weights(base, adapter, place, dequantise=quantised if way == "dequantised" else None)
            _write_generation_config(base, place, run.processor)
            run.processor.save_pretrained(place)
            outputs = run.merged_outputs(place)
            if way == "original" and plain is not None and without is not None:
                drifts["the adapter on the original base"] = compare_outputs(outputs, plain, without)
            if trained is not None and trained_without is not None:
                name = f"{way} weights, against the adapter on the quantised base it was trained on"
                drifts[name] = compare_outputs(outputs, trained, trained_without)
            if way == ways[-1]:
                gate = "the adapter on the original base" if way == "original" else name
                exact = way == "original" and {merged.dtype, dtype} <= {torch.float32, torch.float64}
                _require_close(drifts[gate], gate, exact, args.tolerance, adapter)
        _write_record(place, args, str(base), merged, drifts)
        _require_free(output_dir)
        place.rename(output_dir)
    leave_card(output_dir)
    return MergeResult(output_dir, len(merged.changed), str(merged.dtype).removeprefix("torch."), drifts)


def compare_outputs(merged: _Outputs, adapter: _Outputs, base: _Outputs) -> Drift:
    """Compare a merged model's outputs with the adapter's, measured by what the adapter changes in the base's."""
    squares, cross, error, largest, same, count = 0.0, 0.0, 0.0, 0.0, 0, 0
    for m_LV, a_LV, b_LV in zip(merged.logits, adapter.logits, base.logits, strict=True):
        change, found = (a_LV - b_LV).double(), (m_LV - b_LV).double()
        squares += float(change.square().sum())
        cross += float((change * found).sum())
        error += float((found - change).square().sum())
        largest = max(largest, float((m_LV - a_LV).abs().max()))
        same += int((m_LV.argmax(-1) == a_LV.argmax(-1)).sum())
        count += len(m_LV)
    numbers = sum(logits.numel() for logits in adapter.logits)
    size = sum(float(logits.double().square().sum()) for logits in adapter.logits)
    # An adapter that changes nothing is measured by the logits themselves.
    by = squares if squares > 1e-12 * size else size
    return Drift(
        drift=(error / by) ** 0.5,
        strength=cross / squares if squares > 1e-12 * size else 1.0,
        largest=largest,
        same_tokens=same / count,
        same_answers=sum(one == other for one, other in zip(merged.answers, adapter.answers, strict=True)),
        answers=len(adapter.answers),
        changes=(squares / numbers) ** 0.5,
    )


def format_drifts(drifts: dict[str, Drift]) -> str:
    """Return the drifts as lines for people."""
    lines = []
    for name, found in drifts.items():
        lines.append(f"{name}:")
        lines.append(
            f"  drift {found.drift:.2%} of the adapter's change of the logits ({found.changes:.3g} on average), "
            f"largest difference {found.largest:.3g}"
        )
        lines.append(
            f"  strength {found.strength:.4f}; same likeliest token at {found.same_tokens:.1%} of the positions; "
            f"{found.same_answers} of {found.answers} greedy answers equal"
        )
    return "\n".join(lines)


class _Comparison:
    """Takes logits and answers of models on the same samples, one model in memory at a time."""

    def __init__(
        self, base: str, adapter: Path, samples: Sequence[Sample], args: MergeArguments, dtype: torch.dtype
    ) -> None:
        self.base, self.adapter, self.samples, self.dtype = base, adapter, samples, dtype
        self.options = GenerationArguments(max_new_tokens=args.max_new_tokens)
        self.processor: Any = None
        self.replies: list[str] = []
        self.inputs: list[dict[str, Tensor]] = []

    def adapter_outputs(self, quantised: BitsAndBytesConfig | None) -> tuple[_Outputs, _Outputs]:
        """Outputs of the adapter on its base, and of the base alone."""
        model: Any
        model, self.processor = load_model_for_inference(
            self.base, adapter=self.adapter, torch_dtype=self.dtype, quantization_config=quantised
        )
        answers = self._answers(model)
        if not self.inputs:
            self.replies = answers
            self.inputs = self._batches(self.processor, model)
        found = _Outputs(self._logits(model), answers)
        with model.disable_adapter():
            without = _Outputs(self._logits(model), [])
        del model
        gc.collect()
        return found, without

    def merged_outputs(self, folder: Path) -> _Outputs:
        """Outputs of the merged model, loaded from its folder with its own processor."""
        model: Any
        model, processor = load_model_for_inference(folder, torch_dtype=self.dtype)
        ends = model.generation_config.eos_token_id
        missing = terminators(processor, get_family(model)) - set(ends if isinstance(ends, list) else [ends])
        if missing:
            raise ModelError(f"The merged model would not stop on the tokens {sorted(missing)}; it was not kept.")
        self._require_same_inputs(processor, model)
        outputs = _Outputs(self._logits(model), self._answers(model, processor))
        del model
        gc.collect()
        return outputs

    def _answers(self, model: Any, processor: Any = None) -> list[str]:
        generator = AnswerGenerator(model, processor or self.processor, self.options)
        return [answer.text for answer in generator(self.samples)]

    def _batches(self, processor: Any, model: Any) -> list[dict[str, Tensor]]:
        """The conversations, each closed by the adapter's answer, as the model takes them."""
        collate = BaseVLMDataCollator(processor, get_family(model))
        batches = []
        for sample, answer in zip(self.samples, self.replies, strict=True):
            # An empty answer is no turn that could be learned, which is what the collator is for.
            turns = (*sample.prompt, Message.make("assistant", answer or "."))
            batch = collate([Sample(sample.id, sample.images, turns).to_row()])
            batches.append({name: value for name, value in batch.items() if name not in ("labels", "sample_ids")})
        return batches

    def _require_same_inputs(self, processor: Any, model: Any) -> None:
        for old, new in zip(self.inputs, self._batches(processor, model), strict=True):
            wrong = [name for name in old if name not in new or not torch.equal(old[name], new[name])]
            if wrong or len(old) != len(new):
                raise ModelError(
                    f"The merged model's processor gives other {', '.join(wrong)} than the adapter's, so it was not "
                    "kept. Report this with your versions."
                )

    @torch.no_grad()
    def _logits(self, model: Any) -> list[Tensor]:
        device = next(model.parameters()).device
        found = []
        for inputs in self.inputs:
            given = {name: tensor.to(device) for name, tensor in inputs.items()}
            logits = model(**given, use_cache=False, logits_to_keep=POSITIONS).logits
            found.append(logits[0].float().cpu())
        return found


def _write_generation_config(base: str, folder: Path, processor: Any) -> None:
    from vlmtune.models.loading import load_config

    config = load_config(folder)
    if (folder / "generation_config.json").exists():
        generation = GenerationConfig.from_pretrained(folder)
    else:
        generation = GenerationConfig.from_model_config(config)
    ends = generation.eos_token_id
    known = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
    wanted = known | terminators(processor, get_family(config))
    if wanted != known or not (folder / "generation_config.json").exists():
        generation.eos_token_id = sorted(wanted)
        generation.save_pretrained(folder)


def _require_close(found: Drift, name: str, exact: bool, tolerance: float | None, adapter: Path) -> None:
    limit = tolerance or (TOLERANCE if exact else ROUNDED_TOLERANCE)
    # Written so that a drift that is no number is refused too.
    if not found.drift <= limit:
        raise AdapterError(
            f"The merged model drifts from the adapter {adapter}, so it was not kept: {found.drift:.2%} of what the "
            f"adapter changes (at most {limit:.0%}), measured against {name}. In 16 bits a small change can drown in "
            "rounding: compare in float32 (torch_dtype), merge onto a float32 copy of the base, serve the adapter "
            "beside it, or set tolerance. Else report this with your versions."
        )


def _require_free(output_dir: Path) -> None:
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise OutputError(
            f"{output_dir} is there already, and nothing in it will be overwritten. Choose another output_dir."
        )


@contextmanager
def _temporary(output_dir: Path) -> Iterator[Path]:
    """A folder beside the output, on the same disk, removed whatever happens."""
    prefix = f".{output_dir.name}.merging-"
    try:
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        for left in output_dir.parent.glob(prefix + "*"):
            logger.warning("%s is left from a merge that was killed; it can be deleted", left)
        scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=output_dir.parent))
    except OSError as error:
        raise OutputError(f"{output_dir} cannot be made ({error.strerror}). Choose another output_dir.") from error
    try:
        yield scratch
    except OSError as error:
        raise OutputError(f"The merged model cannot be written beside {output_dir}: {error.strerror}.") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write_record(folder: Path, args: MergeArguments, base: str, merged: Merged, drifts: dict[str, Drift]) -> None:
    record = {
        "base_model": base,
        "revision": read_settings(args.adapter).get("revision"),
        "adapter": str(args.adapter),
        "merged_onto": args.merge_onto,
        "changed_tensors": len(merged.changed),
        "drift": {name: asdict(found) for name, found in drifts.items()},
        "versions": versions(),
    }
    (folder / MERGE_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())


def _quantisation(args: MergeArguments, adapter: Path) -> BitsAndBytesConfig | None:
    options: dict[str, Any] = saved_quantization(adapter) or {}
    if args.quantised != "auto":
        bits = {"use_4bit": args.quantised == "4bit", "use_8bit": args.quantised == "8bit"}
        options = options if options.get(f"use_{args.quantised}") else bits
    if not options and args.merge_onto == "dequantised":
        raise AdapterError(
            f"{adapter} has no record that it was trained on quantised weights, so there is nothing to dequantise. "
            "Set quantised to 4bit or 8bit if it was, or merge_onto to original."
        )
    return get_quantization_config(**({"bnb_4bit_compute_dtype": args.torch_dtype} | options))


def _samples(args: MergeArguments) -> list[Sample]:
    if args.dataset_path:
        rows = load_samples(args.dataset_path).dataset
        step = max(1, len(rows) // args.samples)
        return [Sample.from_row(rows[index]) for index in range(0, len(rows), step)][: args.samples]
    return [drawn_sample(number) for number in range(args.samples)]

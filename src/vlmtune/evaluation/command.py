"""What ``vlmtune evaluate`` and ``vlmtune predict`` do, from options to text."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from vlmtune.config import (
    AdapterArguments,
    BaseModelArguments,
    EvaluationArguments,
    EvaluationOutputArguments,
    GenerationArguments,
    QuantizationArguments,
    VLMDataArguments,
)
from vlmtune.config.serving import PredictArguments
from vlmtune.data.loading import (
    LoadedData,
    load_split,
    load_train_and_eval,
    stratified,
    subset,
)
from vlmtune.data.recognition import choose_format, resolve
from vlmtune.data.sample import ImageRef, Sample
from vlmtune.errors import ConfigError, DataError, OutputError, VlmtuneError
from vlmtune.evaluation.before import require_scorable
from vlmtune.evaluation.compare import compare, format_comparison
from vlmtune.evaluation.defaults import default_metrics, metrics_of
from vlmtune.evaluation.generation import AnswerGenerator
from vlmtune.evaluation.honesty import NearCopies, check_honesty, format_honesty
from vlmtune.evaluation.metrics import get_metric
from vlmtune.evaluation.metrics.captions import DocumentFrequencies
from vlmtune.evaluation.prediction import Predictor, read_questions, require_readable
from vlmtune.evaluation.predictions_file import read_predictions
from vlmtune.evaluation.runner import Progress, evaluate, format_table, keep, score, scored_samples
from vlmtune.models.checkpoint import is_adapter_dir
from vlmtune.models.families import get_family
from vlmtune.models.loading import load_model_for_inference
from vlmtune.models.quantization import quantization_of

logger = logging.getLogger("vlmtune.evaluation")
SHOWN = 10
EVALUATION_SPLITS = ("test", "validation", "valid", "val", "dev")


def run_evaluation(
    model_args: BaseModelArguments,
    adapter_args: AdapterArguments,
    quantization_args: QuantizationArguments,
    data_args: VLMDataArguments,
    evaluation_args: EvaluationArguments,
    output_args: EvaluationOutputArguments,
    *,
    progress: Progress | None = None,
    near_copies: NearCopies | None = None,
) -> str:
    """Generate and score answers; return the table for people.

    Raises:
        VlmtuneError: data, model, metric or folder cannot be used.
    """
    for name in evaluation_args.metrics or ():
        get_metric(name)
    data = load_evaluation_data(data_args)
    data = stratified(data, evaluation_args.eval_samples, data_args.split_seed)
    metrics = evaluation_args.metrics or default_metrics(data.metrics, data.dataset)
    require_scorable([Sample.from_row(row) for row in data.dataset], metrics)
    compared = read_predictions(output_args.compare_to) if output_args.compare_to else None
    folder = evaluation_folder(model_args, adapter_args, output_args)
    logger.info("evaluating on %s samples of %s", f"{len(data.dataset):,}", data.source)
    model, processor = load(model_args, adapter_args, quantization_args)
    generator = AnswerGenerator(
        model, processor, evaluation_args, max_pixels=data_args.max_pixels, image_timeout=data_args.image_timeout
    )
    name = adapter_args.adapter or model_args.model_name_or_path
    how: dict[str, Any] = {"name": str(name), "progress": progress, "choose_by": evaluation_args.choose_by}
    found = evaluate(generator, data.dataset, metrics, folder, source=data.source, **how)
    lines = [format_table(found.table), f"Answers and scores are in {folder}."]
    if evaluation_args.honesty == "on":
        honesty = check_honesty(
            generator,
            [sample for sample in scored_samples(data.dataset) if sample.id not in found.unanswered],
            found,
            list(found.table),
            folder,
            **how,
            base=None if output_args.compare_to else base_of(model),
            training=training_images(data_args),
            near_copies=near_copies,
            base_skipped=_why_no_base(model, name, compared=bool(output_args.compare_to)),
        )
        lines[1:1] = ["", format_honesty(honesty), ""]
    if compared is not None:
        lines[1:1] = ["", format_comparison(compare(compared, found.predictions, list(found.table))), ""]
    return "\n".join(lines)


def training_images(data_args: VLMDataArguments) -> list[ImageRef] | str | None:
    """Return the images that this data trains on, why they cannot be read, or ``None`` where nothing tells them."""
    if data_args.streaming:
        return "they are streamed, and reading all of them again would take as long as an epoch"
    try:
        place = resolve(data_args.dataset_path)
        splits = choose_format(place, data_args.dataset_format).splits(place)
        separate = data_args.validation_fraction or data_args.eval_dataset_path or data_args.train_split
        if not separate and "train" not in splits:
            return None
        train = load_train_and_eval(dataclasses.replace(data_args, verify_images="off"))[0]
    except VlmtuneError as error:
        return str(error)
    rows = train.dataset["images"][:]
    return [ImageRef(image["path"], image["bytes"]) for images in rows for image in images]


def base_of(model: Any) -> str | None:
    """Return the name of an adapted model's base, or ``None`` for a model without adapter."""
    return str(model.get_base_model().name_or_path) if hasattr(model, "disable_adapter") else None


def _why_no_base(model: Any, name: str, *, compared: bool) -> str | None:
    """Return why a tuned model's base is not scored beside it, where it is not."""
    if compared:
        return "compare_to names what to compare with"
    if base_of(model) is None and (Path(name) / "run.json").is_file():
        return "the model was tuned in full: score the one it was tuned from, and name its evaluation by compare_to"
    return None


def score_file(evaluation_args: EvaluationArguments, output_args: EvaluationOutputArguments) -> str:
    """Score predictions that exist already; return the table for people.

    Raises:
        VlmtuneError: they cannot be scored, or ``evaluation_dir`` holds something else.
    """
    source = str(output_args.predictions)
    predictions = read_predictions(source)
    metrics = evaluation_args.metrics or metrics_of([one.references for one in predictions])
    found = score(predictions, metrics)
    lines = [format_table(found.table)]
    if output_args.evaluation_dir:
        folder = Path(output_args.evaluation_dir).expanduser()
        keep(folder, found, source)
        lines.append(f"Answers and scores are in {folder}.")
    if output_args.compare_to:
        compared = compare(read_predictions(output_args.compare_to), predictions, list(found.table))
        lines += ["", format_comparison(compared)]
    return "\n".join(lines)


def save_frequencies(data_args: VLMDataArguments, output: str) -> str:
    """Write in how many images' references each n-gram of training data stands, for ``cider:FILE``.

    Returns:
        What was written, in words.

    Raises:
        VlmtuneError: the data cannot be read, no sample has references, or the file is there already.
    """
    path = Path(output).expanduser()
    if path.exists():
        raise OutputError(f"{path} is there already and will not be overwritten. Name another file.")
    data = load_train_and_eval(data_args)[0]
    texts: dict[tuple[ImageRef, ...], dict[str, None]] = {}
    for sample in scored_samples(data.dataset):
        texts.setdefault(sample.images, {}).update(dict.fromkeys(sample.references))
    if not texts:
        raise DataError(f"No sample of {data.source} has references to count.")
    frequencies = DocumentFrequencies.of(map(list, texts.values()))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        frequencies.save(path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error.strerror}). Name another file.") from error
    return (
        f"{path} holds the document frequencies of {len(frequencies.counts):,} n-grams in the references of "
        f"{frequencies.images:,} images of {data.source}. Name the metric cider:{output}."
    )


def predict(
    model_args: BaseModelArguments,
    adapter_args: AdapterArguments,
    quantization_args: QuantizationArguments,
    generation_args: GenerationArguments,
    predict_args: PredictArguments,
    *,
    places: Sequence[str],
    progress: Progress | None = None,
) -> Iterator[tuple[str, str]]:
    """Yield (id, answer) of each question about ``places``, in order; with an output file, write there instead.

    Raises:
        DataError: something that cannot be asked: before the model loads where answers are yielded, and after all
            others are answered where they are written.
    """
    questions = read_questions(places, predict_args.prompt)
    if predict_args.output is None:
        require_readable(questions, predict_args.max_pixels)
    model, processor = load(model_args, adapter_args, quantization_args)
    generator = AnswerGenerator(model, processor, generation_args, max_pixels=predict_args.max_pixels)
    predictor = Predictor(generator, progress)
    if predict_args.output is None:
        answers = dict[str, str]()
        for sample, answer in predictor.answers(questions.samples):
            if isinstance(answer, str):
                raise DataError(answer)
            answers[sample.id] = answer.text
        yield from ((sample.id, answers[sample.id]) for sample in questions.samples)
        return
    output = Path(predict_args.output).expanduser()
    before, bad = predictor.to_file(questions, output)
    answered = len(questions) - len(bad)
    logger.info("%s answers in %s, %s of them from before", f"{answered:,}", output, f"{before:,}")
    if bad:
        listed = "\n".join(f"  {name}: {reason}" for name, reason in list(bad.items())[:SHOWN])
        more = f"\n  and {len(bad) - SHOWN:,} more" if len(bad) > SHOWN else ""
        raise DataError(
            f"{len(bad):,} of {len(questions):,} questions have no answer; {output} says why for each. Mend them and "
            f"run the command again.\n{listed}{more}"
        )


def load(
    model_args: BaseModelArguments, adapter_args: AdapterArguments, quantization_args: QuantizationArguments
) -> tuple[nn.Module, Any]:
    """Load model and processor for answering."""
    model, processor = load_model_for_inference(
        model_args.model_name_or_path,
        adapter=adapter_args.adapter,
        torch_dtype=model_args.torch_dtype,
        attn_implementation=model_args.attn_implementation,
        quantization_config=quantization_of(quantization_args, model_args.torch_dtype),
        revision=model_args.model_revision,
        trust_remote_code=model_args.trust_remote_code,
        image_max_pixels=model_args.image_max_pixels,
    )
    get_family(model, model_args.model_type)
    return model, processor


def load_evaluation_data(data_args: VLMDataArguments) -> LoadedData:
    """Read the evaluation data: what training held out, the split named, the first meant for it, or everything.

    Raises:
        DataError: the data cannot be read.
    """
    if data_args.validation_fraction:
        held_out = load_train_and_eval(data_args)[1]
        if held_out is not None:
            return held_out
    path = data_args.eval_dataset_path or data_args.dataset_path
    place = resolve(path)
    available = choose_format(place, data_args.dataset_format).splits(place)
    default = next((name for name in EVALUATION_SPLITS if name in available), None)
    if default is None and not (data_args.eval_split or data_args.eval_dataset_path):
        logger.warning(
            "%s names no split for evaluation (%s), so all its samples are used. Scores on samples that the model was "
            "trained on say nothing about new images.",
            path,
            ", ".join(EVALUATION_SPLITS),
        )
    data = load_split(data_args, path, data_args.eval_split or default)
    return subset(data, data_args.max_eval_samples, data_args.split_seed)


def evaluation_folder(
    model_args: BaseModelArguments, adapter_args: AdapterArguments, output_args: EvaluationOutputArguments
) -> Path:
    """Return the folder to write to.

    Raises:
        ConfigError: none was named, and the model lies in no folder of a person's own.
    """
    if output_args.evaluation_dir:
        return Path(output_args.evaluation_dir).expanduser()
    name = adapter_args.adapter or model_args.model_name_or_path
    if not is_adapter_dir(name) and not (Path(name) / "run.json").exists():
        raise ConfigError(
            f"evaluation_dir is not set, and {name} is no run's folder to put the evaluation in. Set evaluation_dir."
        )
    return Path(name) / "evaluation"

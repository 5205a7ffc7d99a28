"""A conservative record for a family that vlmtune does not know, read off a checkpoint's model and processor.

Nothing is proved of such a family beforehand: its language model alone is adapted, no image is shared and no feature is
kept. Before it is used, :func:`vlmtune.evaluation.probe.require_sound` checks on the checkpoint itself what the parity
suite checks of the families that have a record.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from vlmtune.errors import UnsupportedModelError
from vlmtune.models.family import Family, Part, Size, class_image_options
from vlmtune.models.processors import load_auto_processor

_ANSWER = "0123456789"
_TYPES = ("token_type_ids", "mm_token_type_ids")
_UNPROVED = "nothing is proved of a family that vlmtune does not know"


def generic_family(config: Any) -> Family:
    """Return a record for a checkpoint of an unknown family.

    Args:
        config: the configuration, as loaded from the checkpoint.

    Raises:
        UnsupportedModelError: the model is of a kind that no record describes, with the reason.
    """
    name, revision = getattr(config, "_name_or_path", ""), getattr(config, "_commit_hash", None)
    if not name:
        raise _refused(config, "only a checkpoint says what it needs, and this configuration comes from none")
    key = (str(name), revision, config.model_type)
    if key not in _made:
        _made[key] = _generic(config, str(name), revision)
    return _made[key]


_made: dict[tuple[str, str | None, str], Family] = {}


def _generic(config: Any, name: str, revision: str | None) -> Family:
    model = _skeleton(config)
    parts = _parts(config, model)
    try:
        processor = load_auto_processor(name, revision=revision)
    except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
        raise _refused(config, f"its processor cannot be loaded: {' '.join(str(error).split())[:240]}") from error
    _require_processor(config, processor)
    types, image_inputs, image_axis = _inputs(config, processor, model)
    turn_end = _turn_end(config, processor)
    language = model.get_submodule(parts["language"])
    targets = {n.rpartition(".")[2] for n, module in language.named_modules() if isinstance(module, nn.Linear)}
    others = _others(model, parts)
    if len(others) == 1:
        parts["projector"], others = others[0], []
    return Family(
        name=config.model_type,
        aliases=(),
        model_types=(config.model_type,),
        model_class=type(model).__name__,
        processor_class=type(processor).__name__,
        parts=parts,
        lora_targets={"language": tuple(sorted(targets))},
        attention="causal",
        turn_end=turn_end,
        terminators=tuple(dict.fromkeys((turn_end, processor.tokenizer.eos_token or turn_end))),
        bos=processor.tokenizer.bos_token is not None,
        image_token_attribute="image_token_id" if hasattr(config, "image_token_id") else "image_token_index",
        needs_token_type_ids=bool(types),
        token_types_name=types or "token_type_ids",
        image_inputs=image_inputs,
        image_axis=image_axis,
        sized=True,
        layout=blank_layout,
        attn_implementation=None,
        unused=functools.partial(_named, tuple(others)),
        template_options={"enable_thinking": False},
        sharing_reason=_UNPROVED,
        cache_reason=_UNPROVED,
        min_transformers=transformers.__version__,
        paper="",
        licence="unknown",
        source=f"transformers/models/{config.model_type}",
        generic=True,
    )


def blank_layout(processor: Any, sizes: Sequence[Size]) -> Mapping[str, Any]:
    """What the image processor gives for blank images of these sizes, without their pixels."""
    return _blank(processor, tuple(sizes))


@functools.lru_cache(maxsize=4096)
def _blank(processor: Any, sizes: tuple[Size, ...]) -> Mapping[str, Any]:
    pictures = [Image.new("RGB", (width, height)) for height, width in sizes]
    options = dict(class_image_options(processor)) | {"return_tensors": "pt"}
    found = dict(processor.image_processor([pictures], **options))
    # Counts are small; pixels keep their shape alone.
    large = {key: value for key, value in found.items() if isinstance(value, Tensor) and value.dim() > 2}
    return found | {key: torch.zeros((), dtype=value.dtype).expand(value.shape) for key, value in large.items()}


def _refused(config: Any, why: str) -> UnsupportedModelError:
    name = getattr(config, "_name_or_path", "") or "the model"
    return UnsupportedModelError(
        f"{name} is a {config.model_type} model, a family that vlmtune does not know yet, and it cannot be taken as an "
        f"unknown one: {why}. `vlmtune families` lists those that are known."
    )


def _skeleton(config: Any) -> Any:
    """The model without memory for its weights."""
    if getattr(config, "is_encoder_decoder", False):
        raise _refused(config, "it is an encoder and a decoder, whose labels are other than those of a conversation")
    try:
        model_class = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
        with torch.device("meta"):
            return model_class(config)
    except KeyError as error:
        raise _refused(config, "transformers has no class for it that makes text of images and text") from error
    except ImportError as error:
        raise _refused(config, " ".join(str(error).split())[:240]) from error


def _parts(config: Any, model: Any) -> dict[Part, str]:
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[Part, Any] = {
        "language": model.get_decoder(),
        "vision": model.get_encoder(modality="image"),
        "head": model.get_output_embeddings(),
    }
    for part, module in found.items():
        if module is None or not names.get(id(module)):
            raise _refused(config, f"its {part} part cannot be told from the rest")
    return {part: names[id(module)] for part, module in found.items()}


def _others(model: Any, parts: Mapping[Part, str]) -> list[str]:
    """The modules beside the parts that have weights, such as the projector."""
    within = parts["language"].rpartition(".")[0]
    known = tuple(place + "." for place in parts.values())
    outside = (name for name, _ in model.named_parameters() if not name.startswith(known))
    depth = within.count(".") + 1 if within else 0
    return sorted({".".join(name.split(".")[: depth + 1]) for name in outside if name.count(".") > depth})


def _named(names: Sequence[str], config: Any) -> Sequence[str]:
    return names


def _require_processor(config: Any, processor: Any) -> None:
    own = getattr(type(processor), "replace_image_token", None)
    if own is None or own is getattr(transformers.ProcessorMixin, "replace_image_token", None):
        raise _refused(config, "its processor does not say which tokens stand for an image")
    for name in ("image_processor", "tokenizer", "image_token", "image_token_ids", "chat_template"):
        if not getattr(processor, name, None):
            raise _refused(config, f"its processor has no {name}")


def _conversation(processor: Any, images: int, answer: str | None = None) -> str:
    content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": "What is it?"}]
    turns: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if answer is not None:
        turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    options = {"tokenize": False, "add_generation_prompt": answer is None, "enable_thinking": False}
    return str(processor.apply_chat_template(turns, **options))


def _inputs(config: Any, processor: Any, model: Any) -> tuple[str | None, tuple[str, ...], int]:
    """The name of the token types, those of the images' tensors, and the axis along which images are joined."""
    pictures = [Image.new("RGB", (64, 48)), Image.new("RGB", (48, 64))]
    try:
        alone = dict(blank_layout(processor, [(48, 64), (64, 48)]))
        given = dict(processor(text=[_conversation(processor, 2)], images=[pictures], return_tensors="pt"))
    except Exception as error:
        raise _refused(
            config, f"its processor does not take a text with two images: {' '.join(str(error).split())[:240]}"
        ) from error
    taken = [name for name in given if name in inspect.signature(type(model).forward).parameters]
    types = next((name for name in _TYPES if name in taken), None)
    of_images = [name for name in taken if name not in ("input_ids", "attention_mask", *_TYPES)]
    joint = [name for name in of_images if name not in alone]
    if joint or not of_images:
        what = f"makes {', '.join(joint)} of the text and its images together" if joint else "makes nothing of an image"
        raise _refused(config, f"its processor {what}")
    pixels = next((name for name in of_images if name.startswith("pixel_values")), of_images[0])
    return types, tuple(of_images), int(torch.as_tensor(given[pixels]).shape[0] == 1)


def _turn_end(config: Any, processor: Any) -> str:
    """The first control token that the chat template writes after an answer."""
    behind = _conversation(processor, 0, _ANSWER).rpartition(_ANSWER)[2]
    tokenizer = processor.tokenizer
    added = tokenizer.get_added_vocab()
    pieces = tokenizer.convert_ids_to_tokens(tokenizer(behind, add_special_tokens=False)["input_ids"])
    for token in pieces:
        if token in added:
            return str(token)
    raise _refused(config, "its chat template closes an answer with no token on which generation could stop")

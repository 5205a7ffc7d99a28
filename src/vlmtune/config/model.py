"""Arguments that say which model is tuned, in which precision, and which of its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from vlmtune.config.options import AT_LEAST_ONE, FRACTION_BELOW_ONE, POSITIVE, Checked, Limit, Limits, option

DtypeName = Literal["auto", "bfloat16", "bf16", "float32", "fp32", "float16", "fp16"]
SCOPES = ("language", "projector", "vision")


@dataclass
class BaseModelArguments(Checked):
    """Which model, and how it is loaded."""

    _argument_group_name = "model"

    model_name_or_path: str = option(
        help="The model: a folder with its weights and processor, or its name on the Hugging Face Hub, "
        "such as google/gemma-3-4b-pt."
    )
    model_revision: str | None = option(
        None, help="Branch, tag or commit of a model from the Hub; a commit makes a run repeatable."
    )
    model_type: str = option(
        "auto",
        help="Family of the model, such as gemma, to refuse a model of another one; auto takes the family that the "
        "model's configuration names.",
    )
    torch_dtype: DtypeName = option(
        "auto",
        help="Number format of the weights. auto takes bfloat16 where the hardware computes in it and float32 "
        "elsewhere. Gemma-3 cannot be trained in float16: its activations are too large for it.",
    )
    attn_implementation: str | None = option(
        None,
        help="Attention code: sdpa, eager, flex_attention or flash_attention_2; by default what the model's family is "
        "exact with. With flash attention no image is shared between texts.",
    )
    image_max_pixels: int | None = option(
        None,
        help="Resize larger images to at most so many pixels, such as 501760, before the model sees them: fewer image "
        "tokens, less memory, less detail. It is done by the model's own processor, which is saved so with what is "
        "trained. max_pixels is another thing: it refuses files.",
    )
    trust_remote_code: bool = option(
        False, help="Run Python code that comes with the model. Leave it off unless you have read that code."
    )

    limits: ClassVar[Limits] = {"image_max_pixels": AT_LEAST_ONE}


@dataclass
class QuantizationArguments(Checked):
    """Quantisation of the frozen language weights by bitsandbytes, for QLoRA."""

    _argument_group_name = "quantization"

    use_4bit: bool = option(
        False,
        help="Keep the language model's frozen weights in 4 bits (QLoRA). The vision tower, projector and head stay "
        "in 16 or 32 bits. Needs the package bitsandbytes.",
    )
    use_8bit: bool = option(False, help="Keep the language model's frozen weights in 8 bits. Needs bitsandbytes.")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = option(
        "nf4", help="4-bit number format: nf4 (made for normally distributed weights) or fp4."
    )
    bnb_4bit_compute_dtype: DtypeName = option(
        "auto", help="Number format that 4-bit weights are unpacked to for computing; auto takes that of torch_dtype."
    )
    bnb_4bit_use_double_quant: bool = option(
        True, help="Quantise the scales of the 4-bit weights too, which saves about 0.4 bits a weight."
    )

    def problems(self) -> list[str]:
        """Return what is wrong with the values, one sentence each."""
        found = super().problems()
        if self.use_4bit and self.use_8bit:
            found.append("use_4bit and use_8bit are both on; choose one of them.")
        return found


@dataclass
class LoRAArguments(Checked):
    """Low-rank adapters, or which parts are tuned in full."""

    _argument_group_name = "adapter"

    use_lora: bool = option(
        True, help="Train low-rank adapters (LoRA) beside frozen weights; when off, the weights of train_parts."
    )
    lora_scopes: list[str] = option(
        ["language"], help="Parts of the model that get adapters: some of language, projector, vision."
    )
    train_parts: list[str] = option(
        [],
        help="Parts whose own weights are trained, some of language, projector, vision. By default none beside "
        "adapters, and language and projector when use_lora is off. What is neither here nor in lora_scopes is frozen.",
    )
    lora_r: int = option(16, help="Rank of the adapters: their size, and how much they can change.")
    lora_alpha: int = option(32, help="Scale of the adapters; their output is multiplied by lora_alpha / lora_r.")
    vision_lora_r: int | None = option(None, help="Rank of the vision tower's adapters; by default lora_r.")
    vision_lora_alpha: int | None = option(None, help="Scale of the vision tower's adapters; by default lora_alpha.")
    projector_lora_r: int | None = option(None, help="Rank of the projector's adapters; by default lora_r.")
    projector_lora_alpha: int | None = option(None, help="Scale of the projector's adapters; by default lora_alpha.")
    lora_dropout: float = option(0.05, help="Share of an adapter's inputs set to zero in training.")
    lora_target_modules: list[str] | None = option(
        None,
        help="Names of the linear layers that get adapters, such as q_proj v_proj, inside lora_scopes. By default, and "
        "by all-linear, all attention and MLP layers of those parts: the language model's, if lora_scopes is not set.",
    )
    lora_init: Literal["default", "gaussian", "pissa", "loftq"] = option(
        "default",
        help="First weights of the adapters. default and gaussian change nothing at first; pissa begins with the "
        "weights' largest singular values and is saved as plain LoRA of twice the rank; loftq makes up for what 4-bit "
        "quantisation lost, and its adapters work on the 4-bit model only.",
    )
    use_rslora: bool = option(False, help="Scale by lora_alpha / sqrt(lora_r) (rsLoRA), which keeps high ranks stable.")
    use_dora: bool = option(
        False, help="Train a magnitude for each output beside the low-rank direction (DoRA); slower, at times better."
    )
    lora_bias: Literal["none", "all", "lora_only"] = option("none", help="Which bias vectors are trained too.")
    modules_to_save: list[str] | None = option(
        None, help="Modules trained in full and saved with the adapter, such as lm_head."
    )

    limits: ClassVar[Limits] = {
        "lora_r": AT_LEAST_ONE,
        "lora_alpha": POSITIVE,
        "vision_lora_r": AT_LEAST_ONE,
        "vision_lora_alpha": POSITIVE,
        "projector_lora_r": AT_LEAST_ONE,
        "projector_lora_alpha": POSITIVE,
        "lora_dropout": FRACTION_BELOW_ONE,
        "lora_scopes": Limit(choices=SCOPES, never_empty=True),
        "lora_target_modules": Limit(never_empty=True),
        "train_parts": Limit(choices=SCOPES),
    }

    @property
    def trained_parts(self) -> set[str]:
        """Parts that change in training, by adapters or themselves."""
        return {*self.train_parts, *(self.lora_scopes if self.use_lora else ())}

    def __post_init__(self) -> None:
        """Choose the parts to train where neither adapters nor parts are asked for, then check."""
        if not self.use_lora and not self.train_parts:
            self.train_parts = ["language", "projector"]
        super().__post_init__()

    def problems(self) -> list[str]:
        """Return what is wrong with the values, one sentence each."""
        found = super().problems()
        if not self.use_lora:
            return found
        both = [part for part in SCOPES if part in self.lora_scopes and part in self.train_parts]
        if both:
            found.append(
                f"{' and '.join(both)} stand both in lora_scopes and in train_parts; a part is adapted, or trained in "
                "full, or frozen. To train without adapters, set use_lora: false."
            )
        for part in ("vision", "projector"):
            found += [
                f"{name} is set, but lora_scopes has no {part}; add it there, or leave {name} out."
                for name in (f"{part}_lora_r", f"{part}_lora_alpha")
                if getattr(self, name) is not None and part not in self.lora_scopes
            ]
        return found


@dataclass
class ModelWithLoRAArguments(LoRAArguments, QuantizationArguments, BaseModelArguments):
    """Everything about the model: which, in which precision, and which of its weights are trained."""

    _argument_group_name = "model"

    def problems(self) -> list[str]:
        """Return what is wrong with the values, one sentence each."""
        found = super().problems()
        quantised = self.use_4bit or self.use_8bit
        if quantised and not self.use_lora:
            found.append(
                "use_4bit and use_8bit freeze the weights, so use_lora: false leaves nothing to train; "
                "turn use_lora on, or quantisation off."
            )
        elif quantised and "language" in self.train_parts:
            found.append(
                "use_4bit and use_8bit freeze the language model's weights, so train_parts cannot have language."
            )
        if self.use_lora and self.lora_init == "pissa" and quantised:
            found.append(
                "lora_init is pissa, which takes the adapters' first weights out of the frozen ones, and quantised "
                "weights cannot give them; take loftq with use_4bit, or turn quantisation off."
            )
        if self.use_lora and self.lora_init == "loftq" and not (self.use_4bit and self.bnb_4bit_quant_type == "nf4"):
            found.append(
                "lora_init is loftq, which makes up for what quantisation to 4 bits (nf4) lost; set use_4bit: true, or "
                "another lora_init."
            )
        return found

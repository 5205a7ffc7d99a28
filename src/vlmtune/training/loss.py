"""Cross entropy on the supervised positions only, in chunks, so that full logits are never formed.

With 262,208 words, logits of 1,000 tokens take 1 GiB in float32. Most positions are image or prompt tokens
without a target; the LM head skips them, and takes the others a chunk at a time.

Shape legend: B rows, L tokens, N supervised tokens, H hidden features, V vocabulary.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

from vlmtune.batching.collator import IGNORE_INDEX
from vlmtune.models.families import get_family
from vlmtune.models.provenance import base_model

# Logits held at once: 2**26 float32 numbers are 256 MiB.
LOGITS_AT_ONCE = 2**26


def targets_from_labels(labels_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Return (source, target id) pairs of padded labels.

    The token at column ``j`` is predicted from column ``j - 1``, so labels in the first column have no source.

    Args:
        labels_BL: ids, -100 where nothing is supervised.

    Returns:
        Two tensors (N,): indices into the flattened B * L positions, and the ids to predict from there.
    """
    rows, columns = (labels_BL[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
    return rows * labels_BL.shape[1] + columns, labels_BL[rows, columns + 1]


def chunked_cross_entropy(
    hidden_NH: Tensor,
    targets_N: Tensor,
    head: nn.Module,
    *,
    weights_N: Tensor | None = None,
    softcap: float | None = None,
    chunk_tokens: int = 0,
) -> Tensor:
    """Sum of the cross entropy of ``head(hidden)`` against ``targets``, a chunk of tokens at a time.

    Equals ``F.cross_entropy(head(hidden).float(), targets, reduction="sum")`` in value and gradients.

    Args:
        hidden_NH: last hidden states at the sources.
        targets_N: ids to predict.
        head: the LM head. A plain ``nn.Linear`` takes the fused path, whose backward needs no second
            pass over the vocabulary; any other module (adapted, quantised) is recomputed by checkpointing.
        weights_N: how often each target counts; once when absent.
        softcap: logits become ``softcap * tanh(logits / softcap)``, where the family does so.
        chunk_tokens: tokens at a time; 0 chooses by the vocabulary's size.

    Returns:
        A float32 (or float64) scalar.
    """
    vocabulary = getattr(head, "out_features", None) or head.weight.shape[0]  # type: ignore[index]
    chunk = chunk_tokens or max(16, LOGITS_AT_ONCE // vocabulary)
    if weights_N is None:
        weights_N = torch.ones(targets_N.shape, device=hidden_NH.device)
    if type(head) is nn.Linear and not head._forward_hooks and not head._forward_pre_hooks:
        loss: Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
            hidden_NH, targets_N, weights_N, head.weight, head.bias, softcap, chunk
        )
        return loss
    total = hidden_NH.new_zeros((), dtype=_loss_dtype(hidden_NH))
    for start in range(0, len(targets_N), chunk):
        span = slice(start, start + chunk)
        total = total + checkpoint(
            _dense_cross_entropy,
            hidden_NH[span],
            targets_N[span],
            weights_N[span],
            head,
            softcap,
            use_reentrant=False,
        )
    return total


def _loss_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _dense_cross_entropy(
    hidden_NH: Tensor, targets_N: Tensor, weights_N: Tensor, head: nn.Module, softcap: float | None
) -> Tensor:
    logits_NV = head(hidden_NH).to(_loss_dtype(hidden_NH))
    if softcap:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    losses_N = nn.functional.cross_entropy(logits_NV, targets_N, reduction="none")
    return (losses_N * weights_N.to(losses_N.dtype)).sum()


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the gradients of a linear head in the forward pass, so that logits are made once only."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        targets_N: Tensor,
        weights_N: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        softcap: float | None,
        chunk: int,
    ) -> Tensor:
        needs_hidden, _, _, needs_weight, needs_bias = ctx.needs_input_grad[:5]
        dtype = _loss_dtype(hidden_NH)
        total = hidden_NH.new_zeros((), dtype=dtype)
        grad_hidden = torch.empty_like(hidden_NH) if needs_hidden else None
        # Many small chunks are added up: in half precision their sum would lose the small ones.
        grad_weight = torch.zeros_like(weight_VH, dtype=dtype) if needs_weight else None
        grad_bias = torch.zeros_like(bias_V, dtype=dtype) if needs_bias and bias_V is not None else None
        for start in range(0, len(targets_N), chunk):
            span = slice(start, start + chunk)
            hidden, targets, weights = hidden_NH[span], targets_N[span], weights_N[span].to(dtype)
            logits = nn.functional.linear(hidden, weight_VH, bias_V).to(dtype)
            if softcap:
                logits = softcap * torch.tanh(logits / softcap)
            slope = 1 - (logits / softcap) ** 2 if softcap else None
            normalizer = torch.logsumexp(logits, dim=-1)
            picked = logits.gather(1, targets[:, None]).squeeze(1)
            total += ((normalizer - picked) * weights).sum()
            if not (needs_hidden or needs_weight or needs_bias):
                continue
            grad = logits.sub_(normalizer[:, None]).exp_()
            grad.scatter_add_(1, targets[:, None], grad.new_full((len(targets), 1), -1.0))
            grad *= weights[:, None]
            if slope is not None:
                grad *= slope
            if grad_hidden is not None:
                grad_hidden[span] = (grad.to(weight_VH.dtype) @ weight_VH).to(hidden.dtype)
            if grad_weight is not None:
                grad_weight += (grad.to(hidden.dtype).T @ hidden).to(dtype)
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        ctx.save_for_backward(
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight_VH.dtype),
            None if grad_bias is None or bias_V is None else grad_bias.to(bias_V.dtype),
        )
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grads = [None if g is None else g * grad_output.to(g.dtype) for g in ctx.saved_tensors]
        return grads[0], None, None, grads[1], grads[2], None, None


def install_supervised_loss(model: nn.Module, *, chunk_tokens: int = 0) -> None:
    """Let ``model.forward`` take ``target_sources`` and ``target_ids`` and return the summed loss.

    The loss is computed inside the model's forward, so that DDP and FSDP see every parameter used where they
    expect it. Calls without ``target_sources``, as in generation, go to the model's own forward.

    ``dummy_image``, an image's tensors, goes through tower and projector and adds nothing. It does so where an image
    of the batch would, before the language model: ranks that share weights out gather them layer by layer, and all
    must do so in one order, forward and backward.

    Args:
        model: a vision-language model with an LM head, or a PEFT model around one.
        chunk_tokens: as in :func:`chunked_cross_entropy`.
    """
    base = base_model(model)
    original = base.forward
    text_config = base.config.get_text_config()
    softcap = getattr(text_config, "final_logit_softcapping", None)
    scale = get_family(base).logit_scale(base.config)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        sources = kwargs.pop("target_sources", None)
        if sources is None:
            return original(*args, **kwargs)
        targets, weights = kwargs.pop("target_ids"), kwargs.pop("target_weights", None)
        dummy = kwargs.pop("dummy_image", None)
        kwargs.pop("labels", None)
        with _seen(self, dummy) if dummy else nullcontext():
            hidden_BLH = getattr(self, self.base_model_prefix)(*args, **kwargs, use_cache=False)[0]
        hidden_NH = hidden_BLH.flatten(0, 1)[sources]
        loss = chunked_cross_entropy(
            hidden_NH if scale == 1 else hidden_NH * scale,
            targets,
            self.get_output_embeddings(),
            weights_N=weights,
            softcap=softcap,
            chunk_tokens=chunk_tokens,
        )
        return ModelOutput(loss=loss)

    base.forward = types.MethodType(forward, base)


@contextmanager
def _seen(base: Any, image: Mapping[str, Tensor]) -> Iterator[None]:
    """Let an image pass through tower and projector when the language model is called, and change nothing there."""

    def look(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        features = base.get_image_features(**image, return_dict=True)
        embeds = kwargs["inputs_embeds"]
        return args, kwargs | {"inputs_embeds": embeds + _nothing(features).to(embeds.dtype)}

    language = base.get_submodule(get_family(base).parts["language"])
    # Before the hooks by which the language model's own weights are gathered.
    hook = language.register_forward_pre_hook(look, prepend=True, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _nothing(outputs: Any) -> Tensor:
    """Zero, with a path back to everything that made ``outputs``."""
    if isinstance(outputs, Tensor):
        return outputs.sum() * 0
    parts = outputs.values() if isinstance(outputs, Mapping) else outputs
    return torch.stack([_nothing(part) for part in parts]).sum()


def count_targets(batch: Mapping[str, Any]) -> int:
    """Number of supervised tokens of a batch that can be predicted."""
    if "target_weights" in batch:
        return int(batch["target_weights"].sum())
    if "target_ids" in batch:
        return len(batch["target_ids"])
    return int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())

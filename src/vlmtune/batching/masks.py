"""Attention masks of rows that hold several samples: a token sees its own sample and nothing else.

Shape legend: B rows, L tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from vlmtune.batching.sharing import NO_BLOCK, PADDING
from vlmtune.models.family import Family

# Attention code of transformers that takes prepared masks. Flash attention knows none of this kind.
EXACT_ATTENTION = ("sdpa", "eager", "flex_attention")


def why_not_shared(family: Family, attn_implementation: str | None) -> str | None:
    """Return why texts cannot share an image exactly with this family and attention code, or ``None``."""
    if not family.sharing:
        return f"{family.name} cannot share an image between texts exactly: {family.sharing_reason}"
    if attn_implementation and attn_implementation not in EXACT_ATTENTION:
        return (
            f"attn_implementation {attn_implementation} takes no mask that keeps an image's texts apart; "
            f"{', '.join(EXACT_ATTENTION)} do"
        )
    return None


def tree_masks(
    layout_3BL: Tensor,
    positions_BL: Tensor,
    *,
    block_layers: Collection[str] = (),
    sliding_window: int | None = None,
) -> dict[str, Tensor]:
    """Return which token sees which, for each kind of attention layer.

    A token sees the tokens of its group's prefix and of its own branch that do not come after it by *position*.
    In ``block_layers`` the soft tokens of one image see each other. A sliding window counts positions too:
    by index, a late branch would lose sight of a prefix that it sees when it stands alone.

    Args:
        layout_3BL: group, branch and image block of each token, from
            :func:`~vlmtune.batching.sharing.collate_rows`.
        positions_BL: position of each token in its sample.
        block_layers: kinds of layers in which the soft tokens of one image see each other.
        sliding_window: window of the layers that have one, in positions.

    Returns:
        ``full_attention`` and, with a window, ``sliding_attention``: (B, 1, L, L), true where query (third axis)
        sees key (fourth).
    """
    group, branch, block = layout_3BL
    distance = positions_BL[:, :, None] - positions_BL[:, None, :]
    same_sample = (group[:, :, None] == group[:, None, :]) & (
        (branch[:, None, :] == 0) | (branch[:, :, None] == branch[:, None, :])
    )
    causal = same_sample & (distance >= 0)
    same_image = (block[:, :, None] == block[:, None, :]) & (block != NO_BLOCK)[:, :, None]
    # Padding sees itself alone: a query that sees nothing would become NaN.
    itself = torch.eye(causal.shape[-1], dtype=torch.bool, device=causal.device)
    padding = (group == PADDING)[:, :, None]

    def mask(kind: str, allowed: Tensor | None = None) -> Tensor:
        seen = torch.where(padding, itself, causal | same_image if kind in block_layers else causal)
        return (seen if allowed is None else seen & allowed)[:, None]

    masks = {"full_attention": mask("full_attention")}
    if sliding_window is not None:
        masks["sliding_attention"] = mask("sliding_attention", distance < sliding_window)
    return masks


def prepared(masks: Mapping[str, Tensor], implementation: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return masks in the form that an attention implementation takes.

    ``sdpa`` takes booleans. ``eager`` adds numbers: 0 where the mask is true, the lowest number of ``dtype``
    elsewhere. ``flex_attention`` takes a ``BlockMask``, by which it leaves out blocks where nothing is seen.

    Args:
        masks: from :func:`tree_masks`.
        implementation: one of :data:`EXACT_ATTENTION`.
        dtype: number format the model computes in.
    """
    if implementation == "eager":
        return {kind: additive(mask, dtype) for kind, mask in masks.items()}
    if implementation == "flex_attention":
        return {kind: _block_mask(mask) for kind, mask in masks.items()}
    return dict(masks)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0 where ``mask`` is true and the lowest number of ``dtype`` elsewhere, as eager attention adds it."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def _block_mask(mask_B1LL: Tensor) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    rows, _, length, _ = mask_B1LL.shape

    def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return mask_B1LL[row, 0, query, key]

    return create_block_mask(seen, rows, None, length, length, device=str(mask_B1LL.device))

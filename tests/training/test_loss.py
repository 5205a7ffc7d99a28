"""The chunked loss equals the dense one, in value and in every gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vlmtune.training.loss import chunked_cross_entropy, install_supervised_loss, targets_from_labels


class _WrappedHead(nn.Module):
    """A head that is no plain Linear, as an adapted or quantised one."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.out_features = linear.out_features

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.linear(hidden)


def _problem(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, nn.Linear]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(23, 8, generator=generator, dtype=dtype)
    targets = torch.randint(0, 50, (23,), generator=generator)
    head = nn.Linear(8, 50, bias=True, dtype=dtype)
    return hidden, targets, head


@pytest.mark.parametrize("chunk", [1, 5, 23, 64])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("wrapped", [False, True])
def test_equals_dense(chunk: int, softcap: float | None, wrapped: bool) -> None:
    hidden, targets, head = _problem()
    weights = torch.arange(23, dtype=torch.float64) % 3
    dense_hidden = hidden.clone().requires_grad_()
    logits = head(dense_hidden)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    expected = (nn.functional.cross_entropy(logits, targets, reduction="none") * weights).sum()
    (expected * 0.5).backward()
    expected_grads = [dense_hidden.grad, head.weight.grad.clone(), head.bias.grad.clone()]
    head.zero_grad()

    own_hidden = hidden.clone().requires_grad_()
    loss = chunked_cross_entropy(
        own_hidden,
        targets,
        _WrappedHead(head) if wrapped else head,
        weights_N=weights,
        softcap=softcap,
        chunk_tokens=chunk,
    )
    (loss * 0.5).backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for own, dense in zip([own_hidden.grad, head.weight.grad, head.bias.grad], expected_grads, strict=True):
        torch.testing.assert_close(own, dense, rtol=1e-10, atol=1e-12)


def test_frozen_head_gets_no_gradient() -> None:
    hidden, targets, head = _problem(torch.float32)
    head.requires_grad_(False)
    hidden.requires_grad_()
    chunked_cross_entropy(hidden, targets, head, chunk_tokens=4).backward()
    assert head.weight.grad is None
    assert hidden.grad.abs().sum() > 0


def test_pairs_from_labels() -> None:
    labels = torch.tensor([[7, -100, 3, 4], [-100, 5, -100, -100]])
    sources, targets = targets_from_labels(labels)
    # The 7 in the first column has nothing before it to be predicted from.
    assert sources.tolist() == [1, 2, 4]
    assert targets.tolist() == [3, 4, 5]


def test_model_loss_equals_transformers(tiny_model, processor) -> None:
    model = tiny_model.double()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(10, 300, (2, 20), generator=generator)
    labels = ids.masked_fill(torch.rand(2, 20, generator=generator) < 0.6, -100)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    # transformers' own loss goes through float32, so the dense one is taken from its logits in float64.
    logits = model(**inputs).logits
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    expected.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    install_supervised_loss(model, chunk_tokens=3)
    sources, targets = targets_from_labels(labels)
    loss = model(**inputs, target_sources=sources, target_ids=targets).loss / len(targets)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for name, parameter in model.named_parameters():
        if name in grads:
            torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-9, atol=1e-13)
    assert model(**inputs).logits.shape[:2] == (2, 20)

"""The number format in which trained weights are kept.

In 16 bits a step that is smaller than half of a weight's last bit is lost. bfloat16 keeps 8 binary digits, so a weight
of 0.02 changes by steps of 0.0001 alone: at the learning rates of full fine-tuning most steps do nothing. Mixed
precision therefore adds steps to float32 weights, and computes with rounded ones (arXiv:1710.03740, section 3.1).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vlmtune.models.provenance import base_model


def short_formats(model: nn.Module) -> dict[str, torch.dtype]:
    """Return the number formats of the weights that :func:`raise_trained` raises, by name.

    These are the trained ones of fewer than 32 bits and, where there are any, the small ones of all layer norms, since
    on a CPU PyTorch's takes none of 16 bits after a float32 activation.
    """
    named = {name: p for name, p in model.named_parameters() if p.is_floating_point() and p.itemsize < 4}
    if not any(parameter.requires_grad for parameter in named.values()):
        return {}
    norms = {id(p) for module in model.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()}
    return {name: p.dtype for name, p in named.items() if p.requires_grad or id(p) in norms}


def raise_trained(model: nn.Module) -> None:
    """Keep trained weights in float32, one after another; tied weights stay one tensor."""
    formats = short_formats(model)
    if not formats:
        return
    for name in formats:
        parameter = model.get_parameter(name)
        parameter.data = parameter.data.to(torch.float32)
    base = base_model(model)
    # Families put image features among the embeddings in the format of the model, which is that of its first weight.
    base.get_input_embeddings().register_forward_hook(lambda _module, _inputs, output: output.to(base.dtype))


def lowered(state: Mapping[str, Tensor], formats: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """Return tensors with those named rounded to their formats, on the CPU; what is one tensor stays so.

    Args:
        state: the model's tensors by name; tied ones are the same object.
        formats: from :func:`short_formats`, of which one name of tied weights is enough.
    """
    by_tensor = {id(state[name]): wanted for name, wanted in formats.items() if name in state}
    made: dict[int, Tensor] = {}
    for tensor in state.values():
        if id(tensor) in by_tensor and id(tensor) not in made:
            made[id(tensor)] = tensor.detach().to("cpu", by_tensor[id(tensor)])
    return {name: made.get(id(tensor), tensor) for name, tensor in state.items()}

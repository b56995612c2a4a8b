"""The pull towards the base's weights where the loss leads away from them (AEGIS, ICLR 2026).

With g_e the gradient of the loss and g_r that of the distance from the base, 1/2 |W - W_0|^2:

    g = g_e - omega <g_e, g_r> / |g_r|^2 g_r   where <g_e, g_r> < 0,   else g_e

A step along -g_e leads away from the base exactly where that product is below 0; with omega = 1 the part of it that does is
taken out. W - W_0 is what the LoRA adds, B A. Its factors by themselves are no distance: A starts at random values while nothing
is added yet, and B A is the same for other sizes of both. So g_r is B^T B A for A and B A A^T for B.
"""

from collections.abc import Mapping

import torch
from torch import nn

from ..low_rank import DOWN, UP


def distance_gradients(factors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The gradient of half the sum of |B A|^2 over all layers of a LoRA, by the names of its factors."""
    found = {}
    for name, down in factors.items():
        if not name.endswith(DOWN):
            continue
        other = name.removesuffix(DOWN) + UP
        up = factors[other]
        a, b = down.flatten(1), up.flatten(1)  # of convolutions: the kernel's places are columns of A
        found[name] = ((b.T @ b) @ a).view_as(down)
        found[other] = (b @ (a @ a.T)).view_as(up)
    return found


@torch.no_grad()
def pull(factors: Mapping[str, nn.Parameter], weight: float) -> None:
    """Change the gradients of a LoRA's factors as above, with `weight` for omega; without conflict they stay as they are."""
    towards = distance_gradients(factors)
    pairs = [(grad, own) for name, own in towards.items() if (grad := factors[name].grad) is not None]
    product = torch.stack([(grad * own).sum() for grad, own in pairs]).sum()
    square = torch.stack([own.square().sum() for _, own in pairs]).sum()
    # Not a branch, for which an accelerator would be waited for. At the start all of g_r is 0.
    scale = -weight * product.clamp(max=0) / square.clamp_min(torch.finfo(square.dtype).tiny)
    for grad, own in pairs:
        grad.addcmul_(own, scale)

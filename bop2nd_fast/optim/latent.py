"""Adam for networks with latent weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..binary_tensor import BinaryTensor, pack
from ..nn import latent_weights
from .distributed import local_tensor


def _clip(optimizer: Optimizer, *_: Any) -> None:
    """Latent weights back into ``[-clip, clip]``, all of a group in a few calls."""
    for group in optimizer.param_groups:
        weights = [p for p in group["params"] if p.grad is not None]
        if group.get("clip") is not None and weights:
            with torch.no_grad():
                torch._foreach_clamp_max_(weights, group["clip"])
                torch._foreach_clamp_min_(weights, -group["clip"])


class LatentAdam(torch.optim.Adam):
    """Adam that keeps latent weights in [-1, 1]: the baseline that latent-free optimizers are compared with.

    A latent weight far outside would never flip again (Courbariaux et al., arXiv 1602.02830). A group with a
    ``clip`` is clipped after every step that gave its weights a gradient; a model's other parameters have
    none.

    Args:
        parameters: a model (its latent weights become a group with ``clip=1``, its other parameters one
            without), or parameters or groups as torch's optimizers take them.
        kwargs: as ``torch.optim.Adam`` takes them.

    Raises:
        ValueError: as ``torch.optim.Adam``.
    """

    def __init__(self, parameters: nn.Module | Iterable[Any], **kwargs: Any) -> None:
        super().__init__(
            latent_groups(parameters) if isinstance(parameters, nn.Module) else parameters, **kwargs
        )
        self.register_step_post_hook(_clip)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if _clip not in self._optimizer_step_post_hooks.values():  # copies and pickles leave hooks behind
            self.register_step_post_hook(_clip)


def latent_groups(model: nn.Module) -> list[dict[str, Any]]:
    """A model's trainable parameters in at most two groups: latent weights with ``clip=1``, all others."""
    latent = latent_weights(model)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [entry for entry in named if entry[0] in latent], "clip": 1.0},
        {"params": [entry for entry in named if entry[0] not in latent]},
    ]
    return [group for group in groups if group["params"]]


@torch.no_grad()
def from_latent(optimizer: Optimizer, binary: nn.Module, latent: nn.Module, c: float) -> None:
    """Start a latent-free optimizer where latent weights ended: first moments ``m0 = -c * w``.

    A weight flips when its first moment has its sign, so one that ended far from 0 needs a long pull before
    it flips, as it did while it was latent. Second moments and step counts stay as they are.

    >>> binary = bf.nn.binarized(latent)  # bits = sign(w)
    >>> optimizer = bf.optim.MixedOptimizer(binary, binary=functools.partial(bf.optim.Bop2ndOrder, ...))
    >>> bf.optim.from_latent(optimizer, binary, latent, c=1e-3)

    Args:
        optimizer: ``Bop``, ``Bop2ndOrder`` or a ``MixedOptimizer`` of one, for ``binary``.
        binary: the network that it trains.
        latent: one whose parameters of the same names are real-valued; every weight's sign is ``binary``'s.
        c: moment per unit of latent weight, at least 0; gradients' size is the natural scale.

    Raises:
        ValueError: ``c`` is negative or not finite, a binary weight that ``latent`` lacks, or has in another
            shape or with other signs. Nothing is changed then.
    """
    if not 0 <= c < math.inf:
        raise ValueError(f"c must be a finite number of at least 0, got {c}")
    sources = dict(latent.named_parameters())
    moments = []
    for name, p in binary.named_parameters():
        local = local_tensor(p)
        if not isinstance(local, BinaryTensor):
            continue
        w = sources.get(name)
        if w is None or w.shape != p.shape:
            found = "no such parameter" if w is None else f"shape {tuple(w.shape)}"
            raise ValueError(f"{name}: the latent network has {found}, but must have {tuple(p.shape)}")
        if not torch.equal(pack(w, local.bit_layout.dim).words.to(local.words.device), local.words):
            raise ValueError(f"{name}: the signs of the latent weights are not those of the binary network")
        moments.append((optimizer.state[p]["exp_avg"], w))
    for moment, w in moments:
        moment.copy_(w.detach().to(torch.float32).mul(-c))

"""Bop and Bop2ndOrder: latent-free optimizers of binary weights, one fused pass per group and step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from . import thresholds
from .base import BopBase
from .group import LEVEL, RATE


class Bop(BopBase):
    """Bop (arXiv 1906.02107): flip a weight where the gradient's moving average exceeds a threshold.

    >>> binary, real = bf.optim.split_parameters(model)
    >>> optimizer = bf.optim.Bop(binary, gamma=1e-4, threshold=1e-8)

    Args:
        params: BinaryTensors, or dense floating tensors of +1 / -1; or groups of them.
        gamma: adaptivity rate of the moving average, in [0, 1]; a number or a 0-dim tensor. 0 leaves the
            average as it is.
        threshold: tau >= 0; likewise.
        maximize: ascend instead of descend.
        capturable: the step may be captured in a CUDA graph; hyperparameters given as tensors must lie on the
            parameters' device.
        moment_dtype: fp32, or bf16 with stochastic rounding from ``seed``.
        warmup_steps: this many first steps move the moments and flip nothing.
        target_flip_rate: flips per weight and step at which to hold each layer, by a factor on its threshold.

    Raises:
        ValueError: hyperparameters out of range, dense weights that are not +-1.
        TypeError: parameters that are not floating point.
    """

    _ranges = {"gamma": RATE, "threshold": LEVEL}
    _moments = ("exp_avg",)
    _rule = staticmethod(thresholds.bop_hyper)

    def __init__(
        self,
        params: Iterable[Any],
        gamma: float | Tensor = 1e-4,
        threshold: float | Tensor = 1e-8,
        *,
        maximize: bool = False,
        capturable: bool = False,
        moment_dtype: torch.dtype = torch.float32,
        seed: int = 0,
        warmup_steps: int = 0,
        target_flip_rate: float | None = None,
    ) -> None:
        defaults = {
            "gamma": gamma,
            "threshold": threshold,
            "maximize": maximize,
            "capturable": capturable,
            "moment_dtype": moment_dtype,
            "seed": seed,
            "warmup_steps": warmup_steps,
            "target_flip_rate": target_flip_rate,
        }
        super().__init__(params, defaults)


class Bop2ndOrder(BopBase):
    """Bop2ndOrder (arXiv 2104.05124): the moving average is normalised by the second raw moment.

    A weight flips where the sign of ``m`` equals its own and ``|m| > tau * (sqrt(v) + eps)``, with the
    chosen bias correction of both moments.

    >>> optimizer = bf.optim.Bop2ndOrder(binary, gamma=1e-7, sigma=1e-3, threshold=1e-6)
    >>> loss.backward()
    >>> optimizer.step()

    Args:
        params: BinaryTensors, or dense floating tensors of +1 / -1; or groups of them.
        gamma, sigma: adaptivity rates of the first and second moment, in [0, 1]; numbers or 0-dim tensors. 0
            leaves the moment as it is; with a bias correction, which divides by it, nothing flips then.
        threshold: tau >= 0. The noise of ``m / sqrt(v)`` is ``sqrt(gamma / 2)``, a natural unit for it.
        eps: >= 0, outside the square root; not negligible at these scales.
        bias_correction: ``"none"`` (the paper's biased version), ``"reference"`` (what the authors' code
            does: ``m / gamma``, ``v / sigma``) or ``"adam"`` (the paper's text: ``1 - (1 - gamma)^t``,
            with ``t`` the steps this parameter took).
        maximize, capturable, moment_dtype, seed, warmup_steps, target_flip_rate: as in :class:`Bop`.

    Raises:
        ValueError: hyperparameters out of range, dense weights that are not +-1.
        TypeError: parameters that are not floating point.
    """

    _ranges = {"gamma": RATE, "sigma": RATE, "threshold": LEVEL, "eps": LEVEL}
    _moments = ("exp_avg", "exp_avg_sq")
    _rule = staticmethod(thresholds.bop2nd_hyper)

    def __init__(
        self,
        params: Iterable[Any],
        gamma: float | Tensor = 1e-6,
        sigma: float | Tensor = 1e-2,
        threshold: float | Tensor = 1e-6,
        eps: float | Tensor = 1e-10,
        bias_correction: str = "none",
        *,
        maximize: bool = False,
        capturable: bool = False,
        moment_dtype: torch.dtype = torch.float32,
        seed: int = 0,
        warmup_steps: int = 0,
        target_flip_rate: float | None = None,
    ) -> None:
        defaults = {
            "gamma": gamma,
            "sigma": sigma,
            "threshold": threshold,
            "eps": eps,
            "bias_correction": bias_correction,
            "maximize": maximize,
            "capturable": capturable,
            "moment_dtype": moment_dtype,
            "seed": seed,
            "warmup_steps": warmup_steps,
            "target_flip_rate": target_flip_rate,
        }
        super().__init__(params, defaults)

    def _check_option(self, name: str, value: Any, together: Mapping[str, Any]) -> Any:
        if name == "bias_correction" and value not in thresholds.BIAS_CORRECTIONS:
            raise ValueError(f"bias_correction must be one of {thresholds.BIAS_CORRECTIONS}, got {value!r}")
        return super()._check_option(name, value, together)

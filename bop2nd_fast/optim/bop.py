"""Bop and Bop2ndOrder: latent-free optimizers of binary weights, one fused pass per group and step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..binary_tensor import BinaryTensor, check_plus_minus_one
from . import thresholds

MOMENT_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class FlipCounts:
    """What the last step did to one parameter.

    ``candidates``: weights whose sign agrees with the first moment's (a flip would go downhill);
    ``flips``: those that flipped; ``blocked``: candidates the threshold held back.
    """

    group: int
    index: int
    numel: int
    candidates: int
    flips: int

    @property
    def blocked(self) -> int:
        return self.candidates - self.flips


class _BopBase(Optimizer):
    """What both optimizers share: validation, state, walk order, the call of ``bop2nd::bop_step_``."""

    _step_supports_amp_scaling = True  # GradScaler hands over grad_scale and found_inf instead of unscaling
    _ranges: dict[str, tuple[bool, str]]  # hyperparameter -> (whether it is a rate, what is allowed)

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self._weight_versions: dict[Tensor, int] = {}
        self._counts: list[Tensor] = []
        self._check_hyperparameters(defaults)
        super().__init__(params, defaults)

    # ------------------------------------------------------------------ validation

    def _check_hyperparameters(self, group: dict[str, Any]) -> None:
        for name, (is_rate, allowed) in self._ranges.items():
            value = float(group[name])
            fits = 0 < value <= 1 if is_rate else value >= 0
            if not fits or not math.isfinite(value):
                raise ValueError(f"{name} must be {allowed}, got {value}")
        if group["moment_dtype"] not in MOMENT_DTYPES:
            raise ValueError(f"moment_dtype must be one of {MOMENT_DTYPES}, got {group['moment_dtype']}")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group after checking it: binary or +-1 dense parameters, hyperparameters in range.

        Raises:
            ValueError: hyperparameters out of range, or dense weights that are not +1 / -1.
            TypeError: a parameter that is not floating point.
        """
        params = param_group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        checked = {**self.defaults, **param_group, "params": params}
        self._check_hyperparameters(checked)
        for i, entry in enumerate(params):
            _check_weight(entry[1] if isinstance(entry, tuple) else entry, f"parameter {i} of the group")
        super().add_param_group({**param_group, "params": params})
        group = self.param_groups[-1]
        group.setdefault("step", torch.zeros((), dtype=torch.int64))
        for p in group["params"]:
            self._weight_versions[p] = p._version

    def _check_gradients(self, group: dict[str, Any]) -> list[Tensor]:
        """The group's parameters that have a gradient; raises before anything is changed."""
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            grad = p.grad
            if grad.layout != torch.strided:
                raise ValueError(f"gradient of a parameter of shape {tuple(p.shape)} is {grad.layout}; it must be dense")
            if grad.shape != p.shape or grad.device != p.device or not grad.is_floating_point():
                raise ValueError(
                    f"gradient ({tuple(grad.shape)}, {grad.dtype}, {grad.device}) does not fit its parameter "
                    f"({tuple(p.shape)}, {p.dtype}, {p.device})"
                )
            if not isinstance(p, BinaryTensor) and self._weight_versions.get(p) != p._version:
                _check_weight(p, f"parameter of shape {tuple(p.shape)}")  # somebody else wrote to it
        if len({p.device for p in params}) > 1:
            raise ValueError(f"a group's parameters must share a device, got {sorted({str(p.device) for p in params})}")
        return params

    # ------------------------------------------------------------------ the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. Returns the closure's loss, if a closure is given.

        Raises:
            ValueError: a sparse, wrongly shaped or wrongly placed gradient, or a dense weight that is no
                longer +-1. Nothing has been changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [(group, self._check_gradients(group)) for group in self.param_groups]
        self._counts = [self._step_group(group, params) for group, params in work]
        return loss

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> Tensor:
        if not params:
            return torch.zeros(0, 2, dtype=torch.int64)
        device = params[0].device
        grad_scale, found_inf = (getattr(self, name, None) for name in ("grad_scale", "found_inf"))
        inv_scale = None if grad_scale is None else grad_scale.double().reciprocal().float().to(device)
        skipped = 0 if found_inf is None else (found_inf != 0).to(group["step"].device).view(())
        group["step"] += 1 - skipped
        for p in params:
            self._init_state(group, p)
        states = [self.state[p] for p in params]
        low_precision = group["moment_dtype"] != torch.float32
        counts = torch.zeros(len(params), 2, dtype=torch.int64, device=device)
        torch.ops.bop2nd.bop_step_(
            [p.words if isinstance(p, BinaryTensor) else _walk(p, p) for p in params],
            [_walk(p, p.grad) for p in params],
            [_walk(p, s["exp_avg"]) for p, s in zip(params, states, strict=True)],
            [_walk(p, s["exp_avg_sq"]) for p, s in zip(params, states, strict=True) if "exp_avg_sq" in s],
            self._hyper(group).to(device),
            counts,
            inv_scale=inv_scale,
            found_inf=None if found_inf is None else found_inf.to(device),
            seed=_seed(group, device) if low_precision else None,
            maximize=group["maximize"],
        )
        for p in params:
            if isinstance(p, BinaryTensor):
                torch.autograd.graph.increment_version(p)
            self._weight_versions[p] = p._version
        return counts

    def _init_state(self, group: dict[str, Any], p: Tensor) -> None:
        if not self.state[p]:
            for name in self._moments:
                self.state[p][name] = torch.zeros_like(p, dtype=group["moment_dtype"])

    _moments: tuple[str, ...]

    def _hyper(self, group: dict[str, Any]) -> Tensor:
        raise NotImplementedError

    # ------------------------------------------------------------------ telemetry

    def telemetry(self) -> list[FlipCounts]:
        """Candidates and flips of the last step, per parameter that had a gradient. Synchronises."""
        rows = []
        for g, (group, counts) in enumerate(zip(self.param_groups, self._counts, strict=False)):
            params = [p for p in group["params"] if p.grad is not None or len(counts) == len(group["params"])]
            for i, (p, (candidates, flips)) in enumerate(zip(params, counts.tolist(), strict=False)):
                rows.append(FlipCounts(g, i, p.numel(), candidates, flips))
        return rows


def _check_weight(p: Any, what: str) -> None:
    if not isinstance(p, Tensor) or not p.is_floating_point():
        raise TypeError(f"{what} must be a floating point tensor or a BinaryTensor, got {type(p).__name__}")
    if not isinstance(p, BinaryTensor):
        check_plus_minus_one(p, what)


def _walk(p: Tensor, x: Tensor) -> Tensor:
    """``x`` (shaped like ``p``) as a contiguous view in the order in which ``p`` lies in memory."""
    if isinstance(p, BinaryTensor):
        view = x.movedim(p.bit_layout.dim, -1)
    else:
        view = x.permute(sorted(range(p.dim()), key=lambda d: (-p.stride(d), d)))
    if x is p and not view.is_contiguous():
        raise ValueError(f"a dense binary weight must be dense in memory, got strides {p.stride()}")
    return view.contiguous()


def _seed(group: dict[str, Any], device: torch.device) -> Tensor:
    return torch.stack([torch.tensor(group["seed"], dtype=torch.int64), group["step"].cpu()]).to(device)


def _as_double(value: float | Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


class Bop(_BopBase):
    """Bop (arXiv 1906.02107): flip a weight where the gradient's moving average exceeds a threshold.

    Args:
        params: BinaryTensors, or dense floating tensors of +1 / -1; or groups of them.
        gamma: adaptivity rate of the moving average, in (0, 1].
        threshold: tau >= 0.
        maximize: ascend instead of descend.
        moment_dtype: fp32, or bf16 with stochastic rounding from ``seed``.

    Raises:
        ValueError: hyperparameters out of range, dense weights that are not +-1.
        TypeError: parameters that are not floating point.
    """

    _ranges = {"gamma": (True, "in (0, 1]"), "threshold": (False, ">= 0")}
    _moments = ("exp_avg",)

    def __init__(
        self,
        params: Iterable[Any],
        gamma: float | Tensor = 1e-4,
        threshold: float | Tensor = 1e-8,
        *,
        maximize: bool = False,
        moment_dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        defaults = {
            "gamma": gamma,
            "threshold": threshold,
            "maximize": maximize,
            "moment_dtype": moment_dtype,
            "seed": seed,
        }
        super().__init__(params, defaults)

    def _hyper(self, group: dict[str, Any]) -> Tensor:
        return thresholds.bop_hyper(_as_double(group["gamma"]), _as_double(group["threshold"]))


class Bop2ndOrder(_BopBase):
    """Bop2ndOrder (arXiv 2104.05124): the moving average is normalised by the second raw moment.

    A weight flips where the sign of ``m`` equals its own and ``|m| > tau * (sqrt(v) + eps)``, with the
    chosen bias correction of both moments.

    Args:
        params: BinaryTensors, or dense floating tensors of +1 / -1; or groups of them.
        gamma, sigma: adaptivity rates of the first and second moment, in (0, 1].
        threshold: tau >= 0. The noise of ``m / sqrt(v)`` is ``sqrt(gamma / 2)``, a natural unit for it.
        eps: >= 0, outside the square root; not negligible at these scales.
        bias_correction: ``"none"`` (the paper's biased version), ``"reference"`` (what the authors' code
            does: ``m / gamma``, ``v / sigma``) or ``"adam"`` (the paper's text: ``1 - (1 - gamma)^t``).
        maximize: ascend instead of descend.
        moment_dtype: fp32, or bf16 with stochastic rounding from ``seed``.

    Raises:
        ValueError: hyperparameters out of range, dense weights that are not +-1.
        TypeError: parameters that are not floating point.
    """

    _ranges = {
        "gamma": (True, "in (0, 1]"),
        "sigma": (True, "in (0, 1]"),
        "threshold": (False, ">= 0"),
        "eps": (False, ">= 0"),
    }
    _moments = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable[Any],
        gamma: float | Tensor = 1e-6,
        sigma: float | Tensor = 1e-2,
        threshold: float | Tensor = 1e-6,
        eps: float = 1e-10,
        bias_correction: str = "none",
        *,
        maximize: bool = False,
        capturable: bool = False,
        moment_dtype: torch.dtype = torch.float32,
        seed: int = 0,
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
        }
        super().__init__(params, defaults)

    def _check_hyperparameters(self, group: dict[str, Any]) -> None:
        super()._check_hyperparameters(group)
        if group["bias_correction"] not in thresholds.BIAS_CORRECTIONS:
            raise ValueError(
                f"bias_correction must be one of {thresholds.BIAS_CORRECTIONS}, got {group['bias_correction']!r}"
            )

    def _hyper(self, group: dict[str, Any]) -> Tensor:
        values = (_as_double(group[name]) for name in ("gamma", "sigma", "threshold", "eps"))
        return thresholds.bop2nd_hyper(*values, group["step"].double(), group["bias_correction"])

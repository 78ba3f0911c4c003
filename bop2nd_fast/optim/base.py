"""BopBase: groups, state, step and checkpoints of the latent-free optimizers; their rules are in ``bop``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..binary_tensor import BinaryTensor, check_plus_minus_one
from . import saved_state
from .distributed import local_tensor
from .group import HyperGroup, Range
from .plan import Batch, Plan, cut_batches, is_laid_like, lock_step_parts, steps_of
from .telemetry import FlipCounts, LayerReport, layer_reports, print_report, read_counts, signal_histograms

MOMENT_DTYPES = (torch.float32, torch.bfloat16)


class BopBase(Optimizer):
    """What both optimizers share: validation, state, the step, counters. Not made directly.

    State of a parameter: ``exp_avg`` (and ``exp_avg_sq``), shaped like it and lying in memory in its order;
    ``step``, int64, shared by the parameters that have always stepped together; with ``target_flip_rate``
    also ``threshold_scale``. It is made when the parameter is added, so that a first compiled step finds it.
    """

    _step_supports_amp_scaling = True  # GradScaler hands over grad_scale and found_inf instead of unscaling
    _ranges: dict[str, Range]
    _moments: tuple[str, ...]

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self._plans: list[Plan] = []
        self._observers: list[Any] = []
        self._weight_versions: dict[Tensor, int] = {}
        HyperGroup({**defaults, "params": []}, self._ranges, self._check_option)  # raises early
        super().__init__(params, defaults)

    # ------------------------------------------------------------------ groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group after checking it: binary or +-1 dense parameters, hyperparameters in range.

        Raises:
            ValueError: hyperparameters out of range, dense weights that are not +1 / -1, parameters on
                several devices or already in another group.
            TypeError: a parameter that is not floating point, a hyperparameter that is not a number.
        """
        params = param_group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        checked = HyperGroup(
            {**self.defaults, **param_group, "params": params}, self._ranges, self._check_option
        )
        tensors = [entry[1] if isinstance(entry, tuple) else entry for entry in params]
        _check_one_device([p for p in tensors if isinstance(p, Tensor)])
        for i, p in enumerate(tensors):
            _check_weight(local_tensor(p), f"parameter {i} of the group")
        _check_knobs(checked, self._ranges, tensors)
        super().add_param_group({**param_group, "params": params})
        wrapped = self.param_groups[-1] = self._wrapped(self.param_groups[-1])
        for p in tensors:
            self._weight_versions[p] = p._version
        self._plans.append(self._plan(wrapped))

    def _wrapped(self, group: dict[str, Any]) -> HyperGroup:
        return HyperGroup(group, self._ranges, self._check_option, self._replan)

    def _check_option(self, name: str, value: Any, together: Mapping[str, Any]) -> None:
        """Raise if a group's item may not have this value, alone or with the others."""
        if name == "moment_dtype" and value not in MOMENT_DTYPES:
            raise ValueError(f"moment_dtype must be one of {MOMENT_DTYPES}, got {value}")
        if name == "warmup_steps" and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise ValueError(f"warmup_steps must be an integer >= 0, got {value!r}")
        if name == "target_flip_rate" and value is not None and not 0 < value < 1:
            raise ValueError(f"target_flip_rate must be None or in (0, 1), got {value!r}")
        if name == "seed" and (isinstance(value, bool) or not isinstance(value, int)):
            raise ValueError(f"seed must be an integer, got {value!r}")
        if name in ("threshold", "target_flip_rate") and together.get("target_flip_rate") is not None:
            threshold = together["threshold"]
            if not isinstance(threshold, Tensor) and threshold == 0:
                raise ValueError("target_flip_rate multiplies the threshold, so the threshold must be > 0")

    # ------------------------------------------------------------------ plans

    def _replan(self, group: HyperGroup, changed: str) -> None:
        """Make a group's plan anew, as an option has changed. Its totals start from 0."""
        if changed not in self.defaults:
            return  # something that others keep in the group
        for g, plan in enumerate(self._plans):
            if plan.group is group:
                self._plans[g] = self._plan(plan.group)

    def _plan(self, group: HyperGroup) -> Plan:
        params: list[Tensor] = group["params"]
        target = group["target_flip_rate"]
        self._complete_state(group, [p for p in params if p.requires_grad and not self.state.get(p)])
        stepped = [p for p in params if self.state.get(p)]
        self._settle_state(group, stepped)
        device = params[0].device if params else torch.device("cpu")
        parts = lock_step_parts(stepped, self.state)
        batches = cut_batches(parts, self.state, group, target is not None)
        return Plan(
            group=group,
            knobs={name: group.knob(name, device) for name in self._ranges},
            batches=batches,
            last=torch.zeros(len(stepped), 2, dtype=torch.int64, device=device),
            total=torch.zeros(len(stepped), 2, dtype=torch.int64, device=device),
            since=steps_of(batches, device),
            stateless=[p for p in params if not self.state.get(p)],
            maximize=group["maximize"],
            capturable=group["capturable"],
            bias_correction=group.get("bias_correction"),
            moment_dtype=group["moment_dtype"],
            seed=group["seed"],
            warmup_steps=group["warmup_steps"],
            target_flip_rate=target,
        )

    def _complete_state(self, group: HyperGroup, fresh: list[Tensor]) -> None:
        if not fresh:
            return
        step = torch.zeros((), dtype=torch.int64, device=fresh[0].device)
        for p in fresh:
            self.state[p]["step"] = step
            for name in self._moments:
                self.state[p][name] = torch.zeros_like(p, dtype=group["moment_dtype"])

    def _settle_state(self, group: HyperGroup, params: list[Tensor]) -> None:
        """Moments on their parameter's device, in its memory order and the group's dtype; the controller's
        factor if it is on."""
        steps: dict[int, Tensor] = {}
        for p in params:
            state = self.state[p]
            for name in self._moments:
                if not _fits(p, state[name], group["moment_dtype"]):
                    state[name] = torch.zeros_like(p, dtype=group["moment_dtype"]).copy_(state[name])
            if state["step"].device != p.device:
                state["step"] = steps.setdefault(id(state["step"]), state["step"].to(p.device))
            if group["target_flip_rate"] is None:
                state.pop("threshold_scale", None)
            elif "threshold_scale" not in state:
                state["threshold_scale"] = torch.ones((), dtype=torch.float64, device=p.device)

    # ------------------------------------------------------------------ the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient. Returns the closure's loss, if one is given.

        Raises:
            ValueError: a sparse, wrongly shaped or wrongly placed gradient, or a dense weight that is no
                longer +-1. Nothing has been changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            self._step_traced()
        else:
            self._step_some(
                [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
            )
        return loss

    @torch.no_grad()
    def _step_only(self, p: Tensor) -> None:
        """Step one parameter (for ``step_in_backward``)."""
        groups = self.param_groups
        self._step_some([[p] if any(p is q for q in group["params"]) else [] for group in groups], alone=True)

    def _step_traced(self) -> None:
        """What a compiler sees: tensors only; the host's checks and book-keeping stay outside."""
        for plan in self._plans:
            for batch in plan.batches:
                for p in batch.params:
                    if p.grad is None:
                        raise RuntimeError(
                            "a compiled step needs a gradient for every parameter of its group"
                        )
                plan.run(batch, self._hyper, None, None)
            for p in plan.stateless:
                if p.grad is not None:
                    raise RuntimeError(
                        "a parameter got its first gradient: run one step that is not compiled"
                    )

    def _step_some(self, active: list[list[Tensor]], alone: bool = False) -> None:
        """Step the ``active`` parameters (one list per group); checks all before it changes anything."""
        for params in active:
            for p in params:
                self._check_gradient(p)
            _check_one_device(params)
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if not any(active):
            return
        for g, params in enumerate(active):
            if alone and not params:
                continue
            plan = self._ready_plan(g, params)
            ids = {id(p) for p in params}
            plan.missed = set() if alone else {id(p) for p in plan.params} - ids
            for observer in self._observers:
                observer.before(params)
            for batch in plan.batches:
                if id(batch.params[0]) in ids:
                    plan.run(batch, self._hyper, grad_scale, found_inf)
                elif not alone:
                    plan.last[batch.rows].zero_()
            torch.autograd.graph.increment_version(
                [p for p in params if isinstance(local_tensor(p), BinaryTensor)]
            )
            for p in params:
                self._weight_versions[p] = p._version
            for observer in self._observers:
                observer.after(params)

    def _ready_plan(self, g: int, params: list[Tensor]) -> Plan:
        """The plan of group ``g``, such that each of its batches is either all ``params`` or none of them."""
        group, plan = self.param_groups[g], self._plans[g]
        fresh = [p for p in params if not self.state.get(p)]
        if fresh or plan.is_stale(self.state):
            assert isinstance(group, HyperGroup)
            self._complete_state(group, fresh)
            self._plans[g] = plan = self._plan(group)
        if len(params) < len(plan.params):
            plan.split({id(p) for p in params}, self.state)
        return plan

    def _check_gradient(self, p: Tensor) -> None:
        grad = p.grad
        assert grad is not None
        if grad.layout != torch.strided:
            raise ValueError(
                f"gradient of a parameter of shape {tuple(p.shape)} is {grad.layout}; it must be dense"
            )
        if grad.shape != p.shape or grad.device != p.device or not grad.is_floating_point():
            raise ValueError(
                f"gradient ({tuple(grad.shape)}, {grad.dtype}, {grad.device}) does not fit its parameter "
                f"({tuple(p.shape)}, {p.dtype}, {p.device})"
            )
        weight = local_tensor(p)
        if not isinstance(weight, BinaryTensor) and self._weight_versions.get(p) != p._version:
            _check_weight(weight, f"parameter of shape {tuple(p.shape)}")  # somebody else wrote to it

    def _hyper(self, plan: Plan, batch: Batch) -> Tensor:
        """fp32 ``[gamma, sigma, a, b]`` of a batch, computed in fp64 on its device."""
        knobs = {name: knob.to(batch.step.device, torch.float64) for name, knob in plan.knobs.items()}
        if batch.scale is not None:
            knobs["threshold"] = knobs["threshold"] * batch.scale
        hold = batch.step <= plan.warmup_steps if plan.warmup_steps else None
        return self._rule(knobs, batch.step.double(), plan.bias_correction, hold)

    def _rule(
        self, knobs: dict[str, Tensor], step: Tensor, bias_correction: str | None, hold: Tensor | None
    ) -> Tensor:
        raise NotImplementedError

    # ------------------------------------------------------------------ saving, copying

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from :meth:`state_dict`, also of an optimizer on another device or backend, and between
        packed and dense weights: moments are shaped like their parameter whatever holds its bits.

        Moments keep their precision (torch would cast them to the parameter's dtype).

        Raises:
            ValueError: groups, parameters, moments or hyperparameters that do not fit. Nothing is changed
                then.
        """
        saved_state.load(self, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "param_groups": [dict(group) for group in self.param_groups]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._observers, self._weight_versions = [], {}
        self.param_groups = [self._wrapped(dict(group)) for group in self.param_groups]
        self._plans = [self._plan(group) for group in self.param_groups]  # type: ignore[arg-type]

    # ------------------------------------------------------------------ telemetry

    def telemetry(self) -> list[FlipCounts]:
        """Candidates, flips and blocked flips of the last step, per parameter that took part. Synchronises.

        >>> for c in optimizer.telemetry():
        ...     print(c.name, c.flips / c.numel, c.blocked)
        """
        return read_counts(self)

    def report(self, quiet: bool = False) -> list[LayerReport]:
        """Print which regime each layer was in since the last report, and what to change; returns the rows.

        ``inactive``: the threshold holds back under 1 % of the flips that the sign alone would make;
        ``frozen``: it holds back all but a millionth of the weights per step; ``active``: in between.
        Clears the totals. Synchronises.
        """
        rows = layer_reports(self)
        if not quiet:
            print_report(rows)
        return rows

    def signal_histogram(self, bins: int = 40, limit: float = 8.0) -> dict[str, Tensor]:
        """Per parameter, the histogram of ``|m| / sqrt(v)`` in units of its noise ``sqrt(gamma / 2)``.

        Returns name -> int64 ``[bins + 1]`` on the CPU: equal bins over ``[0, limit)`` and one for the rest.

        Raises:
            TypeError: the optimizer keeps no second moment (Bop).
        """
        return signal_histograms(self, bins, limit)


def _check_weight(p: Any, what: str) -> None:
    if not isinstance(p, Tensor) or not p.is_floating_point():
        raise TypeError(f"{what} must be a floating point tensor or a BinaryTensor, got {_kind(p)}")
    if isinstance(p, BinaryTensor) or p.is_meta:
        return
    if p.numel() and not is_laid_like(p, p):
        raise ValueError(
            f"{what} must be dense in memory, got strides {p.stride()} for shape {tuple(p.shape)}"
        )
    check_plus_minus_one(p, what)


def _kind(p: Any) -> str:
    return f"a tensor of {p.dtype}" if isinstance(p, Tensor) else type(p).__name__


def _fits(p: Tensor, moment: Tensor, dtype: torch.dtype) -> bool:
    return moment.device == p.device and moment.dtype == dtype and is_laid_like(p, moment)


def _check_one_device(params: list[Tensor]) -> None:
    devices = {p.device for p in params}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"a group's parameters must share a device, got {names}: use a group for each")


def _check_knobs(group: HyperGroup, ranges: dict[str, Range], params: list[Tensor]) -> None:
    """Values that contradict each other or the parameters' device."""
    for name in ranges:
        value = group[name]
        if isinstance(value, Tensor) and group["capturable"] and params and value.device != params[0].device:
            raise ValueError(
                f"with capturable=True, {name} must lie on {params[0].device}, got {value.device}"
            )
    if group["target_flip_rate"] is not None and any(hasattr(p, "to_local") for p in params):
        raise ValueError(
            "target_flip_rate steers by the flips of a whole parameter; of a sharded one each process counts "
            "only its block"
        )

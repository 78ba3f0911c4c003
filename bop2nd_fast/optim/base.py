"""BopBase: groups, state, step and checkpoints of the latent-free optimizers; their rules are in ``bop``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import checks, saved_state
from .distributed import local_tensor
from .group import HyperGroup, Range
from .plan import Cut, Plan, Rule, is_laid_like
from .telemetry import FlipCounts, LayerReport, layer_reports, print_report, read_counts, signal_histograms

_EDITED = "param_groups were edited: run one step that is not compiled before the next compiled one"


class BopBase(Optimizer):
    """What both optimizers share: validation, state, the step, counters. Not made directly.

    State of a parameter: ``exp_avg`` (and ``exp_avg_sq``), shaped like it and lying in memory in its order;
    ``step``, int64, shared by parameters that have taken as many steps; with ``target_flip_rate`` also
    ``threshold_scale``. It is made when the parameter is added, so that a first compiled step finds it.

    ``param_groups`` may be edited between steps as those of torch's optimizers: groups and parameters taken
    out, moved, replaced, put back; a parameter's state is what ``state`` holds for it. Every step first looks
    at what the groups hold now.
    """

    _step_supports_amp_scaling = True  # GradScaler hands over grad_scale and found_inf instead of unscaling
    _ranges: dict[str, Range]
    _moments: tuple[str, ...]
    _rule: Rule

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self._plans: list[Plan] = []  # one per group, in their order
        self._observers: list[Any] = []
        HyperGroup({**defaults, "params": []}, self._ranges, self._check_option)  # raises early
        super().__init__(params, defaults)

    # ------------------------------------------------------------------ groups

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self._groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._groups = groups  # a name of its own: compilers treat an optimizer's param_groups as constant

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group after checking it: binary or +-1 dense parameters, hyperparameters in range.

        Raises:
            ValueError: hyperparameters out of range, dense weights that are not +1 / -1, parameters on
                several devices or already in another group.
            TypeError: a parameter that the step cannot take, a hyperparameter that is not a number.
        """
        params = param_group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        tensors = [entry[1] if isinstance(entry, tuple) else entry for entry in params]
        self._follow()
        self._check_group(self._wrapped({**self.defaults, **param_group, "params": tensors}))
        super().add_param_group({**param_group, "params": params})
        self.param_groups[-1] = self._wrapped(self.param_groups[-1])
        self._follow()

    def _wrapped(self, group: dict[str, Any], source: dict[str, Any] | None = None) -> HyperGroup:
        return HyperGroup(
            group, self._ranges, self._check_option, self._option_changed, self.defaults, source
        )

    def _check_option(self, name: str, value: Any, together: Mapping[str, Any]) -> Any:
        return checks.option(name, value, together)

    def _check_group(self, group: HyperGroup) -> None:
        params = group["params"]
        for i, p in enumerate(params):
            checks.weight(local_tensor(p), f"parameter {i} of the group")
        checks.one_device(params)
        checks.knobs(group, self._ranges, params)
        checks.states(params, self.state, self._moments)

    def _option_changed(self, group: HyperGroup, name: str) -> None:
        """Make a group's plan anew. (Items that others keep in the group change nothing.)"""
        for g, plan in enumerate(self._plans):
            if plan.group is group and name in self.defaults:
                self._plans[g] = self._plan(group, [plan])
            elif plan.group is group and name == "params":
                plan.listed = group["params"]

    # ------------------------------------------------------------------ plans

    def _follow(self) -> None:
        """Bring the plans in line with ``param_groups``, which anybody may have edited. Checks all first."""
        groups: Any = self.param_groups
        plans = self._plans
        for plan in plans:
            plan.group.follow()
        if len(groups) == len(plans) and all(p.is_for(g) for p, g in zip(plans, groups, strict=True)):
            return
        for g, group in enumerate(groups):
            checks.is_group(g, group)
        wrapped: list[HyperGroup] = [
            g if self._is_ours(g) else self._wrapped({**self.defaults, **g}, g) for g in groups
        ]
        kept = {id(plan.group): plan for plan in plans if plan.is_for(plan.group)}
        checks.each_once(wrapped)
        for group in wrapped:
            if id(group) not in kept:
                self._check_group(group)
        if not isinstance(groups, list):
            self.param_groups = groups = list(groups)
        groups[:] = wrapped
        old, self._plans = self._plans, []
        for group in wrapped:
            self._plans.append(kept[id(group)] if id(group) in kept else self._plan(group, old))
        self._let_go(old)
        self._separate_groups()

    def _is_ours(self, group: Any) -> bool:
        return isinstance(group, HyperGroup) and group.belongs_to(self._option_changed)

    def _let_go(self, old: list[Plan]) -> None:
        """Parameters that left the groups keep their step count, which may be that of others too."""
        staying = {id(lane.step) for plan in self._plans for lane in plan.lanes.values()}
        listed = {id(p) for plan in self._plans for p in plan.params}
        for lane in (lane for plan in old for lane in plan.lanes.values() if id(lane.p) not in listed):
            if id(lane.step) in staying and self.state.get(lane.p) is lane.own:
                lane.take_step(lane.step.clone())

    def _separate_groups(self) -> None:
        """Groups step by themselves, so parameters of two groups may not share a step tensor."""
        owner: dict[int, Plan] = {}
        for plan in self._plans:
            for lane in plan.lanes.values():
                if owner.setdefault(id(lane.step), plan) is not plan:
                    lane.take_step(lane.step.clone())
                    plan.drop_cuts()

    def _plan(self, group: HyperGroup, old: Iterable[Plan]) -> Plan:
        """The plan of a group as it is now. Counts and names follow their parameters from ``old`` plans."""
        params: list[Tensor] = list(group["params"])
        device = params[0].device if params else torch.device("cpu")
        fresh = [p for p in params if not self.state.get(p) and (p.requires_grad or p.grad is not None)]
        self._complete_state(group, fresh)
        self._settle_state(group, [p for p in params if self.state.get(p)])
        plan = Plan(
            group=group,
            params=params,
            knobs={name: group.knob(name, device) for name in self._ranges},
            rule=self._rule,
            moments=self._moments,
            maximize=group["maximize"],
            capturable=group["capturable"],
            bias_correction=group.get("bias_correction"),
            moment_dtype=group["moment_dtype"],
            seed=group["seed"],
            warmup_steps=group["warmup_steps"],
            target_flip_rate=group["target_flip_rate"],
            device=device,
        )
        plan.inherit(list(old), self.state)
        return plan

    def _complete_state(self, group: HyperGroup, fresh: list[Tensor]) -> None:
        if not fresh:
            return
        step = torch.zeros((), dtype=torch.int64, device=fresh[0].device)
        for p in fresh:
            self.state[p] = {"step": step}
            for name in self._moments:
                self.state[p][name] = torch.zeros_like(p, dtype=group["moment_dtype"])

    def _settle_state(self, group: HyperGroup, params: list[Tensor]) -> None:
        """Moments on their parameter's device, in its memory order and the group's dtype; the step an int64
        tensor there; the controller's factor if it is on."""
        steps: dict[int, Tensor] = {}
        for p in params:
            state = self.state[p]
            for name in self._moments:
                if not _fits(p, state[name], group["moment_dtype"]):
                    state[name] = torch.zeros_like(p, dtype=group["moment_dtype"]).copy_(state[name])
            step = state["step"]
            fits = isinstance(step, Tensor) and step.device == p.device and step.dtype == torch.int64
            if not fits or step.dim():
                made = torch.as_tensor(step).to(p.device, torch.int64, copy=True).reshape(())
                state["step"] = steps.setdefault(id(step), made)
            if group["target_flip_rate"] is None:
                state.pop("threshold_scale", None)
            elif "threshold_scale" not in state:
                state["threshold_scale"] = torch.ones((), dtype=torch.float64, device=p.device)

    # ------------------------------------------------------------------ the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient. Returns the closure's loss, if one is given.

        Raises:
            ValueError: a gradient that is sparse, of another shape, place or dtype than the step takes,
                a dense weight that is no longer +-1, groups that contradict each other. Nothing has been
                changed then.
            RuntimeError: inside a CUDA graph's capture without ``capturable``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            self._step_traced()
        else:
            self._step_eager()
        return loss

    @torch._disable_dynamo  # a compiler that has met an error above must not try its hand at the host's part
    def _step_eager(self) -> None:
        active = self._check_step()
        if any(active):
            for plan, params in zip(self._plans, active, strict=True):
                self._run(plan, plan.take(params), params)

    def _check_step(self) -> list[list[Tensor]]:
        """The parameters that the next step will step, one list per plan. Raises if it cannot step
        them all; weights, moments and counts are as they were then."""
        self._follow()
        checks.capture(self._plans)
        active = [[p for p in plan.params if p.grad is not None] for plan in self._plans]
        for plan, params in zip(self._plans, active, strict=True):
            lanes = plan.lanes
            for p in params:
                checks.parameter(p, lanes.get(id(p)))
        stale = [g for g, plan in enumerate(self._plans) if plan.stale(active[g], self.state)]
        if stale:
            self._renew(stale)
        return active

    def _renew(self, which: list[int]) -> None:
        """Make plans anew whose parameters' memory or state was moved or replaced."""
        for g in which:
            checks.one_device(self._plans[g].params)
            checks.states(self._plans[g].params, self.state, self._moments)
        for g in which:
            self._plans[g] = self._plan(self._plans[g].group, [self._plans[g]])
        self._separate_groups()

    def _run(self, plan: Plan, cut: Cut, params: list[Tensor]) -> None:
        if not params:
            return
        for observer in self._observers:
            observer.before(params)
        plan.run(cut, getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        cut.note_written()
        for observer in self._observers:
            observer.after(params)

    @torch.no_grad()
    def _step_only(self, g: int, i: int, p: Tensor) -> None:
        """Step one parameter, the ``i``-th of group ``g`` (for ``step_in_backward``)."""
        if not (g < len(self._plans) and self._plans[g].holds(self.param_groups[g], i, p)):
            self._follow()
        checks.capture([self._plans[g]])
        checks.parameter(p, self._plans[g].lanes.get(id(p)))
        if self._plans[g].stale([p], self.state):
            self._renew([g])
        plan = self._plans[g]
        self._run(plan, plan.take_alone(p), [p])

    def _step_traced(self) -> None:
        """What a compiler sees: tensors only; the host's checks and book-keeping stay outside."""
        if len(self._plans) != len(self._groups):
            raise RuntimeError(_EDITED)
        for plan, group in zip(self._plans, self._groups, strict=True):
            if plan.group is not group or not len(plan.listed) == len(plan.params) == len(plan.ready):
                raise RuntimeError(_EDITED)
            for p, q in zip(plan.listed, plan.params, strict=True):
                if p is not q:
                    raise RuntimeError(_EDITED)
        for plan in self._plans:
            for p, ready in zip(plan.params, plan.ready, strict=True):
                if (p.grad is not None) != ready:
                    raise RuntimeError(
                        "a compiled step steps what the step before it did, so each of these parameters "
                        "needs a gradient, and no other may have one: run one step that is not compiled"
                    )
            for cut in plan.recent:
                plan.run(cut, None, None)

    # ------------------------------------------------------------------ saving, copying

    def state_dict(self) -> dict[str, Any]:
        """As torch's; what ``state`` keeps for parameters that were taken out of the groups is left out."""
        self._follow()
        listed = {id(p) for group in self.param_groups for p in group["params"]}
        absent = {p: self.state.pop(p) for p in list(self.state) if id(p) not in listed}
        try:
            return super().state_dict()
        finally:
            self.state.update(absent)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from :meth:`state_dict`, also of an optimizer on another device or backend, and between
        packed and dense weights: moments are shaped like their parameter whatever holds its bits.

        Moments keep their precision (torch would cast them to the parameter's dtype).

        Raises:
            ValueError: groups, parameters, moments or hyperparameters that do not fit. Nothing is changed
                then.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            if replaced is not None:
                state_dict = replaced
        loaded = self._check_state_dict(state_dict)
        self.state.clear()
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            self.state.update(saved_state.taken(group["params"], loaded))
            group.load(saved)  # type: ignore[attr-defined]
        self._plans = [self._plan(group, []) for group in self.param_groups]  # type: ignore[arg-type]
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _check_state_dict(self, state_dict: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
        """Raise unless ``state_dict`` can be loaded; returns the saved states by id of their parameter."""
        self._follow()
        states = saved_state.paired(self.param_groups, state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            missing = [name for name in self._ranges if name not in saved]
            if missing:
                raise ValueError(
                    f"the saved state is another optimizer's: it has no {', '.join(missing)}, but "
                    f"{', '.join(sorted(set(saved) - {'params'}))}"
                )
            group.check_all({k: v for k, v in saved.items() if k != "params"})  # type: ignore[attr-defined]
            for p in group["params"]:
                if states[id(p)]:
                    checks.own_state(p, states[id(p)], self._moments, "the saved state of a parameter")
        return states

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "param_groups": [dict(group) for group in self.param_groups]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({name: value for name, value in state.items() if name != "param_groups"})
        self._groups, self._observers, self._plans = state["param_groups"], [], []
        self._follow()

    # ------------------------------------------------------------------ telemetry

    def telemetry(self) -> list[FlipCounts]:
        """Candidates, flips and blocked flips of the last step, per parameter that took part. Synchronises.

        >>> for c in optimizer.telemetry():
        ...     print(c.name, c.flips / c.numel, c.blocked)
        """
        return read_counts(self._plans)

    def report(self, quiet: bool = False) -> list[LayerReport]:
        """Print which regime each layer was in since the last report, and what to change; returns the rows.

        ``inactive``: the threshold holds back under 1 % of the flips that the sign alone would make;
        ``frozen``: it holds back all but a millionth of the weights per step; ``active``: in between;
        ``not finite``: moments are infinite or NaN, and their weights do not flip any more.
        Clears the totals. Synchronises.
        """
        rows = layer_reports(self._plans)
        if not quiet:
            print_report(rows)
        return rows

    def signal_histogram(self, bins: int = 40, limit: float = 8.0) -> dict[str, Tensor]:
        """Per parameter, the histogram of ``|m| / sqrt(v)`` in units of its noise ``sqrt(gamma / 2)``.

        Returns name -> int64 ``[bins + 1]`` on the CPU: equal bins over ``[0, limit)`` and one for the rest.
        Weights with a moment that is not finite are in none.

        Raises:
            TypeError: the optimizer keeps no second moment (Bop).
        """
        return signal_histograms(self._plans, bins, limit)


def _fits(p: Tensor, moment: Tensor, dtype: torch.dtype) -> bool:
    return moment.device == p.device and moment.dtype == dtype and is_laid_like(p, moment)

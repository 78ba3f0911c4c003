"""Which parameters of a group step together, and the tensors that their step reads and writes.

The operator takes one set of numbers ``[gamma, sigma, a, b]`` for a list of parameters: a *batch*. Where the
numbers do not depend on how many steps a parameter took, all parameters that have a gradient are one batch.
With Adam's bias correction or a warm-up they depend on it: parameters with one ``step`` tensor are a batch,
and equal counts share that tensor. With ``target_flip_rate`` every parameter is a batch of its own, because
each has its own threshold. The batches of one set of parameters are a :class:`Cut`; a plan keeps its cuts, so
that sets which take turns are cut once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import is_
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..binary_tensor import BinaryTensor
from .control import adapt_threshold
from .distributed import local_tensor
from .group import HyperGroup

State: TypeAlias = dict[Tensor, dict[str, Any]]
# (knobs and step count in fp64, bias correction, where nothing may flip) -> fp32 [gamma, sigma, a, b]
Rule: TypeAlias = "Callable[[dict[str, Tensor], Tensor, str | None, Tensor | None], Tensor]"

_SPARE_CUTS = 16  # kept besides those of single parameters


def _walk_axes(p: Tensor) -> tuple[int, ...]:
    """The axes of ``p`` (a local block) in the order in which it lies in memory."""
    axes = range(p.dim())
    if isinstance(p, BinaryTensor):
        return (*(d for d in axes if d != p.bit_layout.dim), p.bit_layout.dim)
    strides = p.stride()
    return tuple(sorted(axes, key=lambda d: (-strides[d], d)))


def _in_walk_order(axes: tuple[int, ...], x: Tensor) -> Tensor:
    return x if axes == tuple(range(x.dim())) else x.permute(axes)


def is_laid_like(p: Tensor, x: Tensor) -> bool:
    """Whether ``x`` (shaped like ``p``) lies in memory in the order of ``p``, without gaps."""
    p, x = local_tensor(p), local_tensor(x)
    return _in_walk_order(_walk_axes(p), x).is_contiguous()


class Lane:
    """One parameter with its state, and its moments as contiguous views in walk order: the order in which the
    parameter lies in memory."""

    def __init__(self, p: Tensor, own: dict[str, Any], index: int, moments: tuple[str, ...]) -> None:
        self.p, self.index, self.own = p, index, own
        self.step: Tensor = own["step"]
        self.scale: Tensor | None = own.get("threshold_scale")
        self.version: int | None = None  # of a dense weight when it was last known to be +-1
        local = local_tensor(p)
        self.is_packed, self.is_sharded = isinstance(local, BinaryTensor), local is not p
        self._order, self._device, self.dtype = _order_of(local), local.device, local.dtype
        axes = _walk_axes(local)
        self._axes = None if axes == tuple(range(local.dim())) else axes
        self.walked = [self.walk(local_tensor(own[name])) for name in moments]
        self._moments: list[tuple[str, Tensor, int]] = [
            (name, own[name], view.data_ptr()) for name, view in zip(moments, self.walked, strict=True)
        ]

    def walk(self, x: Tensor) -> Tensor:
        """``x`` (shaped like the parameter's local block) as a contiguous tensor in walk order."""
        return (x if self._axes is None else x.permute(self._axes)).contiguous()

    def weight(self) -> Tensor:
        """What the operator takes: words, or a dense weight in walk order."""
        w = local_tensor(self.p) if self.is_sharded else self.p
        return w._words if isinstance(w, BinaryTensor) else self.walk(w)

    def gradient(self) -> Tensor:
        grad = self.p.grad
        assert grad is not None
        return self.walk(local_tensor(grad) if self.is_sharded else grad)

    def is_current(self, own: dict[str, Any] | None) -> bool:
        """Whether parameter and state (now ``own``) are the tensors this lane was made for, in place."""
        if own is None or own.get("step") is not self.step:
            return False
        sharded = self.is_sharded
        for name, moment, address in self._moments:
            if own.get(name) is not moment:
                return False
            if (local_tensor(moment) if sharded else moment).data_ptr() != address:
                return False
        local = local_tensor(self.p) if sharded else self.p
        order = local.bit_layout if isinstance(local, BinaryTensor) else (local.shape, local.stride())
        return (order is self._order or order == self._order) and local.device == self._device

    def take_step(self, step: Tensor) -> None:
        self.step = self.own["step"] = step


def _order_of(local: Tensor) -> Any:
    return local.bit_layout if isinstance(local, BinaryTensor) else (local.shape, local.stride())


class Batch:
    """One call of the operator: parameters, their counts of the last step and of all since they were folded.

    ``counts``, ``total``: int64 ``[n, 2]``, candidates and flips, one row per lane.
    """

    def __init__(self, lanes: list[Lane], scale: Tensor | None) -> None:
        self.lanes, self.scale = lanes, scale
        self.params = [lane.p for lane in lanes]
        self.walked = [list(column) for column in zip(*(lane.walked for lane in lanes), strict=True)]
        self.step = lanes[0].step
        self.counts = torch.zeros(len(lanes), 2, dtype=torch.int64, device=self.step.device)
        self.total = torch.zeros_like(self.counts)
        self.cached: tuple[Any, Tensor] | None = None


@dataclass(eq=False)
class Cut:
    """The batches of parameters that step at the same time, and the step tensors that they share."""

    steps: list[Tensor]
    batches: list[Batch]

    def __post_init__(self) -> None:
        self.lanes = [lane for batch in self.batches for lane in batch.lanes]
        self.dense = [lane for lane in self.lanes if not lane.is_packed]
        self.packed = [lane.p for lane in self.lanes if lane.is_packed]

    def note_written(self) -> None:
        """The operator wrote the weights, behind autograd's back."""
        torch.autograd.graph.increment_version(self.packed)
        for lane in self.dense:
            lane.version = lane.p._version


@dataclass(eq=False)
class Plan:
    """What one group's steps need, made for exactly these parameters and options.

    ``total``: int64 ``[n, 2]``, candidates and flips since the totals were last cleared, without what the
    cuts still hold; ``since``: int64 ``[n]``, each parameter's step count then. Rows in the group's order.
    """

    group: HyperGroup
    params: list[Tensor]
    knobs: dict[str, Tensor]
    rule: Rule
    moments: tuple[str, ...]
    device: torch.device
    # read from the group when the plan is made, so that compiled code has them as constants of the plan
    maximize: bool
    capturable: bool
    bias_correction: str | None
    moment_dtype: torch.dtype
    seed: int
    warmup_steps: int
    target_flip_rate: float | None

    def __post_init__(self) -> None:
        self.lanes: dict[int, Lane] = {}  # by id of the parameter; none for those that never had a gradient
        self.recent: list[Cut] = []  # one cut, that of the last step of all parameters; none after an edit
        self.alone: dict[int, Cut] = {}  # by id, those of parameters that have since stepped by themselves
        self.ready: list[bool] = []  # whether the last step stepped the parameter, in their order
        self.listed: list[Tensor] = self.group["params"]  # the group's own list, to see whether it was edited
        self._cuts: dict[tuple[int, ...], Cut] = {}
        self.total = torch.zeros(len(self.params), 2, dtype=torch.int64, device=self.device)
        self.since = torch.zeros(len(self.params), dtype=torch.int64, device=self.device)
        self.names: list[str | None] = [None] * len(self.params)

    def inherit(self, old: Iterable[Plan], state: State) -> None:
        """Make the lanes and the cut of all of them; counts, names and what is known of dense weights follow
        their parameters from the ``old`` plans. Parameters with another state than there start from 0."""
        before: dict[int, tuple[Plan, int]] = {}
        for earlier in old:
            earlier.totals()
            before |= {id(p): (earlier, i) for i, p in enumerate(earlier.params)}
        for i, p in enumerate(self.params):
            if state.get(p):
                self.lanes[id(p)] = lane = Lane(p, state[p], i, self.moments)
                self.since[i].copy_(lane.step)
            if id(p) in before:
                self._inherit_row(i, *before[id(p)])
        self._complete_names()
        self.take([p for p in self.params if id(p) in self.lanes])

    def _inherit_row(self, i: int, plan: Plan, row: int) -> None:
        self.names[i] = plan.names[row]
        lane, known = (lanes.get(id(self.params[i])) for lanes in (self.lanes, plan.lanes))
        if lane is not None and known is not None and lane.step is known.step:
            self.total[i].copy_(plan.total[row])
            self.since[i].copy_(plan.since[row])
            lane.version = known.version

    def _complete_names(self) -> None:
        """Parameters not known before have the group's names, and the group's list follows an edit."""
        names = self.group.get("param_names")
        if not names:
            return
        inherited = set(self.names)
        for i, name in enumerate(names if len(names) == len(self.params) else ()):
            if self.names[i] is None and name not in inherited:
                self.names[i] = str(name)
        kept = [name or f"param{i}" for i, name in enumerate(self.names)]
        self.names = [*kept]
        dict.__setitem__(self.group, "param_names", kept)

    def is_for(self, group: Any) -> bool:
        """Whether this is still the plan of ``group``, with the parameters that it has now."""
        if group is not self.group:
            return False
        listed = group["params"]
        return len(listed) == len(self.params) and all(map(is_, listed, self.params))

    def holds(self, group: Any, i: int, p: Tensor) -> bool:
        return group is self.group and i < len(self.params) and self.params[i] is p

    def stale(self, params: Iterable[Tensor], state: State) -> list[Tensor]:
        """Those of ``params`` that have no lane, or whose memory or state somebody moved or replaced."""
        lanes = self.lanes
        return [p for p in params if (lane := lanes.get(id(p))) is None or not lane.is_current(state.get(p))]

    def depends_on_step(self) -> bool:
        return self.bias_correction == "adam" or self.warmup_steps > 0 or self.target_flip_rate is not None

    # ------------------------------------------------------------------ cutting

    def cut(self, params: list[Tensor]) -> Cut:
        """The cut of ``params``; each has a lane."""
        key = tuple(map(id, params))
        cut = self._cuts.get(key)
        if cut is None:
            lanes = [self.lanes[i] for i in key]
            if self._part_ways(lanes, set(key)):
                self.drop_cuts()
            if len(self._cuts) >= len(self.params) + _SPARE_CUTS:
                self._fold(self._cuts.pop(next(iter(self._cuts))))
            cut = self._cuts[key] = self._cut(lanes)
        return cut

    def _part_ways(self, lanes: list[Lane], active: set[int]) -> bool:
        """Give the lanes step tensors that no other lane has, and equal counts the same one; returns whether
        any changed. Counts on an accelerator are read (the host waits) only where the numbers depend on them.
        """
        outside = {id(lane.step) for i, lane in self.lanes.items() if i not in active}
        parts: dict[int, list[Lane]] = {}
        for lane in lanes:
            parts.setdefault(id(lane.step), []).append(lane)
        changed = False
        for i, part in parts.items():
            if i in outside:
                step, changed = part[0].step.clone(), True
                for lane in part:
                    lane.take_step(step)
        firsts = [part[0].step for part in parts.values()]
        kind = firsts[0].device.type if firsts else "meta"
        if len(firsts) > 1 and kind != "meta" and (kind == "cpu" or self.depends_on_step()):
            shared: dict[int, Tensor] = {}
            for count, part in zip(torch.stack(firsts).tolist(), parts.values(), strict=True):
                step = shared.setdefault(count, part[0].step)
                changed |= step is not part[0].step
                for lane in part:
                    lane.take_step(step)
        return changed

    def _cut(self, lanes: list[Lane]) -> Cut:
        if self.target_flip_rate is not None:
            batches = [Batch([lane], lane.scale) for lane in lanes]
        elif self.depends_on_step():
            parts: dict[int, list[Lane]] = {}
            for lane in lanes:
                parts.setdefault(id(lane.step), []).append(lane)
            batches = [Batch(part, None) for part in parts.values()]
        else:
            batches = [Batch(lanes, None)] if lanes else []
        steps = list({id(lane.step): lane.step for lane in lanes}.values())
        return Cut(steps, batches)

    def drop_cuts(self) -> None:
        """Forget all cuts; their totals are added to the plan's."""
        for cut in self._cuts.values():
            self._fold(cut)
        self._cuts = {}
        self.recent, self.alone, self.ready = [], {}, []

    def _fold(self, cut: Cut) -> None:
        for batch in cut.batches:
            rows = [self.total[lane.index] for lane in batch.lanes]
            torch._foreach_add_(rows, list(batch.total.unbind()))
            batch.total.zero_()

    # ------------------------------------------------------------------ a step

    def take(self, params: list[Tensor]) -> Cut:
        """The cut of ``params``, which from now on is what the last step stepped."""
        cut = self.cut(params)
        if self.alone or len(self.recent) != 1 or self.recent[0] is not cut:
            active = {id(p) for p in params}
            self.alone, self.recent, self.ready = {}, [cut], [id(p) in active for p in self.params]
        return cut

    def take_alone(self, p: Tensor) -> Cut:
        """The cut of one parameter that steps by itself (for ``step_in_backward``)."""
        cut = self.alone[id(p)] = self.cut([p])
        return cut

    def run(self, cut: Cut, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Step the parameters of a cut. Nothing here reads a value on the host or depends on one."""
        inv_scale = applied = None
        if grad_scale is not None:
            inv_scale = grad_scale.double().reciprocal().float().to(self.device)
        if found_inf is not None:
            found_inf = found_inf.to(self.device)
            applied = (found_inf == 0).to(torch.int64).reshape(())
        if len(cut.steps) == 1:
            cut.steps[0].add_(1 if applied is None else applied)
        elif cut.steps:
            torch._foreach_add_(cut.steps, 1 if applied is None else applied)
        for batch in cut.batches:
            self._run(batch, inv_scale, found_inf, applied)

    def _run(
        self, batch: Batch, inv_scale: Tensor | None, found_inf: Tensor | None, applied: Tensor | None
    ) -> None:
        torch.ops.bop2nd.bop_step_(
            [lane.weight() for lane in batch.lanes],
            [lane.gradient() for lane in batch.lanes],
            batch.walked[0],
            batch.walked[1] if len(batch.walked) > 1 else [],
            self._hyper(batch),
            batch.counts,
            inv_scale=inv_scale,
            found_inf=found_inf,
            seed=None if self.moment_dtype == torch.float32 else self._seed(batch),
            maximize=self.maximize,
        )
        batch.total.add_(batch.counts)
        if batch.scale is not None:
            assert self.target_flip_rate is not None
            adapting = batch.step > self.warmup_steps
            adapt_threshold(
                batch.scale,
                batch.counts.select(0, 0).select(0, 1),
                batch.params[0].numel(),
                self.target_flip_rate,
                adapting if applied is None else adapting * applied,
            )

    def _hyper(self, batch: Batch) -> Tensor:
        """fp32 ``[gamma, sigma, a, b]``; kept between steps where only the host decides when it changes."""
        if torch.compiler.is_compiling() or self.capturable or self.depends_on_step():
            return self._apply_rule(batch)
        key = tuple((id(knob), knob._version) for knob in self.knobs.values())
        if batch.cached is None or batch.cached[0] != key:
            batch.cached = (key, self._apply_rule(batch))
        return batch.cached[1]

    def _apply_rule(self, batch: Batch) -> Tensor:
        knobs = {name: knob.to(batch.step.device, torch.float64) for name, knob in self.knobs.items()}
        if batch.scale is not None:
            knobs["threshold"] = knobs["threshold"] * batch.scale
        hold = batch.step <= self.warmup_steps if self.warmup_steps else None
        return self.rule(knobs, batch.step.double(), self.bias_correction, hold)

    def _seed(self, batch: Batch) -> Tensor:
        """int64 ``[2]``; batches differ, or their first tensors would share their random bits."""
        user = (self.seed + 0x9E3779B97F4A7C15 * batch.lanes[0].index) & 0xFFFFFFFFFFFFFFFF
        return torch.stack([torch.full_like(batch.step, user - (user >> 63 << 64)), batch.step])

    # ------------------------------------------------------------------ counts

    def name_of(self, group_index: int, index: int) -> str:
        return self.names[index] or f"group{group_index}.param{index}"

    def last_counts(self) -> dict[int, tuple[int, int]]:
        """Index in the group -> (candidates, flips) of the last step, for parameters that took part in one.
        Synchronises."""
        cuts = [*self.recent, *self.alone.values()]
        lanes = [lane for cut in cuts for lane in cut.lanes]
        if not lanes:
            return {}
        counts = torch.cat([batch.counts for cut in cuts for batch in cut.batches]).tolist()
        taken = torch.stack([lane.step for lane in lanes]).tolist()
        return {  # a parameter's last cut comes last
            lane.index: (row[0], row[1]) for lane, row, n in zip(lanes, counts, taken, strict=True) if n > 0
        }

    def totals(self) -> tuple[Tensor, Tensor]:
        """int64 ``[n, 2]`` candidates and flips, ``[n]`` steps, since the totals were last cleared."""
        for cut in self._cuts.values():
            self._fold(cut)
        return self.total, (self._steps_by_row() - self.since).clamp_min(0)

    def clear_totals(self) -> None:
        """Count anew from here."""
        self.totals()
        self.total.zero_()
        self.since = self._steps_by_row()

    def _steps_by_row(self) -> Tensor:
        none = torch.zeros((), dtype=torch.int64, device=self.device)
        steps = [lane.step if (lane := self.lanes.get(id(p))) else none for p in self.params]
        return torch.stack(steps) if steps else torch.zeros_like(self.since)

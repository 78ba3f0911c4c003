"""Which parameters of a group step together, and the tensors that their step reads and writes.

The operator takes one set of numbers ``[gamma, sigma, a, b]`` for a list of parameters. With Adam's bias
correction those numbers depend on the parameter's own step count. So a group is cut into *batches* of
parameters that have always stepped together: they share one ``step`` tensor, which is what makes "together"
a fact that survives a checkpoint. Usually a group is one batch. A parameter that misses a step (no gradient)
leaves its batch. With ``target_flip_rate`` every parameter is a batch of its own, because each has its own
threshold.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..binary_tensor import BinaryTensor
from .control import adapt_threshold
from .distributed import local_tensor
from .group import HyperGroup

State = dict[Tensor, dict[str, Any]]


def _in_walk_order(p: Tensor, x: Tensor) -> Tensor:
    """A view of ``x`` (shaped like ``p``) whose axes are in the order in which ``p`` lies in memory."""
    if isinstance(p, BinaryTensor):
        dim = p.bit_layout.dim
        return x if dim == x.dim() - 1 else x.movedim(dim, -1)
    strides = p.stride()
    return x.permute(sorted(range(p.dim()), key=lambda d: (-strides[d], d)))


def walk(p: Tensor, x: Tensor) -> Tensor:
    """``x`` (shaped like ``p``) as a contiguous tensor in the order in which ``p`` lies in memory: a view of
    ``x`` where :func:`is_laid_like` says so, else a copy. Of sharded tensors this process's blocks."""
    return _in_walk_order(local_tensor(p), local_tensor(x)).contiguous()


def is_laid_like(p: Tensor, x: Tensor) -> bool:
    """Whether ``walk(p, x)`` is a view of ``x``: only then does writing it write ``x``."""
    return _in_walk_order(local_tensor(p), local_tensor(x)).is_contiguous()


@dataclass
class Batch:
    """Parameters that step together, with what their step reads and writes besides weights and gradients."""

    params: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    step: Tensor
    scale: Tensor | None
    rows: slice
    first_index: int
    strides: list[tuple[int, ...]]
    walked: tuple[list[Tensor], list[Tensor]]  # both moments as views in walk order
    cached: tuple[Any, Tensor] | None = None


@dataclass
class Plan:
    """The batches of one group and its counters.

    ``last`` and ``total``: int64 ``[n, 2]``, candidates and flips of the last step and of all steps since the
    totals were last cleared, one row per parameter in ``rows`` order (not always the group's order).
    """

    group: HyperGroup
    knobs: dict[str, Tensor]
    batches: list[Batch]
    last: Tensor
    total: Tensor
    since: Tensor  # int64 [n], each row's step count when its total was 0
    stateless: list[Tensor]  # parameters that never had a gradient (and need none so far)
    missed: set[int] = field(default_factory=set)  # ids of the parameters that the last step left out
    # read from the group when the plan is made, so that compiled code has them as constants of the plan
    maximize: bool = False
    capturable: bool = False
    bias_correction: str | None = None
    moment_dtype: torch.dtype = torch.float32
    seed: int = 0
    warmup_steps: int = 0
    target_flip_rate: float | None = None

    @property
    def params(self) -> list[Tensor]:
        return [p for batch in self.batches for p in batch.params]

    def is_stale(self, state: State) -> bool:
        """Whether somebody moved or replaced a parameter's memory or its state since the plan was made."""
        device = self.last.device
        return any(
            (own := state[p]).get("exp_avg") is not batch.exp_avgs[i]
            or (batch.exp_avg_sqs and own["exp_avg_sq"] is not batch.exp_avg_sqs[i])
            or own["step"] is not batch.step
            or p.stride() != batch.strides[i]
            or p.device != device
            for batch in self.batches
            for i, p in enumerate(batch.params)
        )

    def clear_totals(self) -> None:
        self.total.zero_()
        self.since = steps_of(self.batches, self.last.device)

    def depends_on_step(self) -> bool:
        return self.bias_correction == "adam" or self.warmup_steps > 0 or self.target_flip_rate is not None

    # ------------------------------------------------------------------ one batch's step

    def run(self, batch: Batch, hyper_of: Any, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Step one batch. Nothing here reads a value on the host or depends on one."""
        device = self.last.device
        inv_scale = None if grad_scale is None else grad_scale.double().reciprocal().float().to(device)
        applied = torch.ones_like(batch.step)
        if found_inf is not None:
            found_inf = found_inf.to(device)
            applied = (found_inf == 0).to(torch.int64).reshape(())
        batch.step.add_(applied)
        first, n = batch.rows.start, len(batch.params)
        counts = self.last.narrow(0, first, n)
        torch.ops.bop2nd.bop_step_(
            [w.words if isinstance(w, BinaryTensor) else walk(w, w) for w in map(local_tensor, batch.params)],
            [walk(p, p.grad) for p in batch.params],  # type: ignore[arg-type]
            *batch.walked,
            self._hyper(batch, hyper_of),
            counts,
            inv_scale=inv_scale,
            found_inf=found_inf,
            seed=None if self.moment_dtype == torch.float32 else self._seed(batch),
            maximize=self.maximize,
        )
        self.total.narrow(0, first, n).add_(counts)
        if batch.scale is not None:
            assert self.target_flip_rate is not None
            adapting = applied * (batch.step > self.warmup_steps)
            adapt_threshold(
                batch.scale,
                counts.select(0, 0).select(0, 1),
                batch.params[0].numel(),
                self.target_flip_rate,
                adapting,
            )

    def _hyper(self, batch: Batch, hyper_of: Any) -> Tensor:
        """fp32 ``[gamma, sigma, a, b]``; kept between steps where only the host decides when it changes."""
        if torch.compiler.is_compiling() or self.capturable or self.depends_on_step():
            return hyper_of(self, batch)
        key = tuple((id(knob), knob._version) for knob in self.knobs.values())
        if batch.cached is None or batch.cached[0] != key:
            batch.cached = (key, hyper_of(self, batch))
        return batch.cached[1]

    def _seed(self, batch: Batch) -> Tensor:
        """int64 ``[2]``; batches differ, or their first tensors would share their random bits."""
        user = (self.seed + 0x9E3779B97F4A7C15 * batch.first_index) & 0xFFFFFFFFFFFFFFFF
        return torch.stack([torch.full_like(batch.step, user - (user >> 63 << 64)), batch.step])

    # ------------------------------------------------------------------ cutting

    def split(self, active: set[int], state: State) -> None:
        """Cut every batch of which only some parameters are ``active`` (ids): those part ways."""
        parts: list[list[Tensor]] = []
        for batch in self.batches:
            ours = [p for p in batch.params if id(p) in active]
            rest = [p for p in batch.params if id(p) not in active]
            if ours and rest:
                step = batch.step.clone()
                for p in ours:
                    state[p]["step"] = step
            parts += [part for part in (ours, rest) if part]
        if len(parts) > len(self.batches):
            self._arrange(parts, state)

    def _arrange(self, parts: list[list[Tensor]], state: State) -> None:
        """Make the batches anew from ``parts``; the counters follow their parameters."""
        old = {id(p): i for i, p in enumerate(self.params)}
        order = [old[id(p)] for part in parts for p in part]
        self.last, self.total, self.since = self.last[order], self.total[order], self.since[order]
        self.batches = cut_batches(parts, state, self.group, self.target_flip_rate is not None)


def steps_of(batches: list[Batch], device: torch.device) -> Tensor:
    """int64 ``[n]``: how many steps the parameter of each row has taken."""
    steps = [batch.step.expand(len(batch.params)) for batch in batches]
    return torch.cat(steps) if steps else torch.zeros(0, dtype=torch.int64, device=device)


def lock_step_parts(params: Iterable[Tensor], state: State) -> list[list[Tensor]]:
    """Parameters that share a step tensor, in the order in which they first appear."""
    parts: dict[int, list[Tensor]] = {}
    for p in params:
        parts.setdefault(id(state[p]["step"]), []).append(p)
    return list(parts.values())


def cut_batches(parts: list[list[Tensor]], state: State, group: HyperGroup, singly: bool) -> list[Batch]:
    """Batches from parts (lists of parameters in lock-step); one per parameter if ``singly``."""
    if singly:
        for part in parts:
            for p in part[1:]:
                state[p]["step"] = state[p]["step"].clone()
        parts = [[p] for part in parts for p in part]
    index = {id(p): i for i, p in enumerate(group["params"])}
    batches, row = [], 0
    for part in parts:
        states = [state[p] for p in part]
        exp_avgs = [s["exp_avg"] for s in states]
        exp_avg_sqs = [s["exp_avg_sq"] for s in states if "exp_avg_sq" in s]
        batches.append(
            Batch(
                params=part,
                exp_avgs=exp_avgs,
                exp_avg_sqs=exp_avg_sqs,
                step=states[0]["step"],
                scale=states[0].get("threshold_scale") if singly else None,
                rows=slice(row, row + len(part)),
                first_index=index[id(part[0])],
                strides=[p.stride() for p in part],
                walked=(
                    [walk(p, m) for p, m in zip(part, exp_avgs, strict=True)],
                    [walk(p, v) for p, v in zip(part, exp_avg_sqs, strict=False)],
                ),
            )
        )
        row += len(part)
    return batches

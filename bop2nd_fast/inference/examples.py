"""How a model is called in its conversion: the example's arguments, their names, the model that is meant."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from .graph import REQUIRED, Parameter, Ref, Signature, map_leaves

_KINDS: dict[Any, Any] = {
    inspect.Parameter.POSITIONAL_ONLY: "positional",
    inspect.Parameter.POSITIONAL_OR_KEYWORD: "any",
    inspect.Parameter.VAR_POSITIONAL: "args",
    inspect.Parameter.KEYWORD_ONLY: "keyword",
    inspect.Parameter.VAR_KEYWORD: "kwargs",
}
_PLAIN = (type(None), bool, int, float, str)


class ConversionError(ValueError):
    """The model cannot be converted, or the packed model did not reproduce its result on the example."""


@dataclass(frozen=True)
class Example:
    """One call of the model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @staticmethod
    def of(given: Any, forward: Any) -> Example:
        """A tensor, a sequence of positional arguments, or a dict of keyword arguments.

        Raises:
            TypeError: anything else, arguments that ``forward`` does not take, NumPy arrays.
        """
        if isinstance(given, Tensor):
            call = Example((given,), {})
        elif isinstance(given, Mapping):
            call = Example((), dict(given))
        elif isinstance(given, Sequence) and not isinstance(given, str):
            call = Example(tuple(given), {})
        else:
            raise TypeError(
                "example_input must be a tensor, a sequence of positional arguments or a dict of keyword "
                f"arguments, got {type(given).__name__}{_way_out(given)}"
            )
        for leaf in call.leaves():
            if not isinstance(leaf, (Tensor, *_PLAIN)):
                raise TypeError(
                    f"an example holds tensors, numbers, strings and None, not {type(leaf).__name__}"
                    f"{_way_out(leaf)}"
                )
        bound = inspect.signature(forward).bind(*call.args, **call.kwargs)
        return Example(bound.args, bound.kwargs)  # in the order of the signature

    def leaves(self) -> list[Any]:
        return pytree.tree_leaves((self.args, self.kwargs))

    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in self.leaves() if isinstance(leaf, Tensor)]

    def with_tensors(self, tensors: Sequence[Any]) -> Example:
        """The same call with other leaves in the tensors' places."""
        rest = iter(tensors)
        leaves, tree = pytree.tree_flatten((self.args, self.kwargs))
        swapped = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return Example(*pytree.tree_unflatten(swapped, tree))

    def clone(self) -> Example:
        """Tensors that nobody else holds: models may write into theirs."""
        return self.with_tensors([t.detach().clone() for t in self.tensors()])


def _way_out(value: Any) -> str:
    return ": use torch.from_numpy" if type(value).__module__ == "numpy" else ""


def signature(forward: Any, example: Example, names: Sequence[str]) -> Signature:
    """The model's parameters, and what the example gave them; ``names``: of its tensors, in order."""
    call = example.with_tensors([Ref(name) for name in names])
    declared = inspect.signature(forward)
    bound = declared.bind(*call.args, **call.kwargs)
    given = set(bound.arguments)
    bound.apply_defaults()
    parameters: list[Parameter] = []
    values: dict[str, Any] = {}
    for parameter in declared.parameters.values():
        value = bound.arguments[parameter.name]
        default = REQUIRED if parameter.default is inspect.Parameter.empty else parameter.default
        if default is not REQUIRED and not _is_plain(default):
            if parameter.name not in given:
                continue  # stays what it was: a call cannot give it
            default = REQUIRED
        parameters.append(Parameter(parameter.name, _KINDS[parameter.kind], default))
        values[parameter.name] = map_leaves(value, lambda leaf: leaf)
    return Signature(tuple(parameters), values)


def _is_plain(tree: Any) -> bool:
    found: list[bool] = []
    map_leaves(tree, lambda leaf: found.append(isinstance(leaf, _PLAIN)))
    return all(found)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DataParallel, DistributedDataParallel, torch.compile and AveragedModel, at any depth.

    Raises:
        ConversionError: a wrapper that has hooks of its own.
    """
    while (inner := _inside(model)) is not None:
        if model._forward_hooks or model._forward_pre_hooks:
            raise ConversionError(
                f"{type(model).__name__} has hooks of its own: convert the module it wraps, or put them there"
            )
        model = inner
    return model


def _inside(module: nn.Module) -> nn.Module | None:
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.optim.swa_utils.AveragedModel)
    if isinstance(module, wrappers):
        return module.module
    return module._modules.get("_orig_mod") if hasattr(module, "_orig_mod") else None


@contextmanager
def borrowed(model: nn.Module) -> Iterator[Callable[[], nn.Module]]:
    """A function that gives the model in eval mode, wanting no gradients: each time a new copy.

    A ``forward`` that was put into a module by hand may know that module itself, beside any copy: such a
    model is used as it is. In both cases the given model is as before in the end.

    Raises:
        ConversionError: a model on the meta device, or one that cannot be copied.
    """
    held = [*model.parameters(), *model.buffers()]
    if any(t.device.type == "meta" for t in held):
        raise ConversionError("the model is on the meta device: give it values (to_empty, load_state_dict)")
    modules = list(model.modules())
    itself = any("forward" in vars(module) for module in modules)
    modes = [module.training for module in modules]
    wanting = [p for p in model.parameters() if itself and p.requires_grad]
    states = [(module, _state(module)) for module in modules if itself]
    values = [(b, b.clone()) for b in model.buffers() if itself]
    try:
        model.eval()
        for parameter in wanting:
            parameter.requires_grad_(False)
        yield lambda: model if itself else _working_copy(model)
    finally:
        for module, state in states:
            vars(module).clear()
            vars(module).update(state)
        for buffer, value in values:
            if not torch.equal(buffer, value):
                buffer.copy_(value)
        for parameter in wanting:
            parameter.requires_grad_(True)
        for module, training in zip(modules, modes, strict=True):
            module.training = training


def _state(module: nn.Module) -> dict[str, Any]:
    """A module's attributes; its dictionaries of parameters, buffers and modules copied."""
    return {key: copy.copy(v) if isinstance(v, dict) else v for key, v in vars(module).items()}


def _working_copy(model: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():  # results of earlier calls, which torch does not copy
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    try:
        copied = copy.deepcopy(model, memo)
    except (TypeError, RuntimeError) as error:
        raise ConversionError(f"{type(model).__name__} cannot be copied: {error}") from error
    for module in list(copied.modules()):
        for name, child in module._modules.items():
            if child is not None and _inside(child) is not None:
                module._modules[name] = unwrapped(child)
    for parameter in copied.parameters():
        parameter.requires_grad_(False)
    return copied.eval()


def plain(tree: Any) -> Any:
    """A result's containers as tuples, lists and dicts.

    Raises:
        ConversionError: a container that is none of these.
    """
    if isinstance(tree, tuple):
        return tuple(map(plain, tree))
    if isinstance(tree, list):
        return list(map(plain, tree))
    if isinstance(tree, dict):
        return {key: plain(value) for key, value in tree.items()}
    if isinstance(tree, (Tensor, fx.Node, *_PLAIN)):
        return tree
    raise ConversionError(
        f"the model returns a {type(tree).__name__}: return tensors, numbers, None, tuples, lists and dicts"
    )

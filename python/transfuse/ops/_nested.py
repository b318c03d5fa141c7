"""Tensors inside arguments: finding them, and putting meta tensors in their place."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Iterator
from typing import Any

import torch


def tensors(value: Any, _inside: frozenset[int] = frozenset()) -> Iterator[torch.Tensor]:
    """The tensors that a value holds, in containers, modules, bound methods and this package's objects."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, torch.nn.Module):
        yield from value.parameters()
        yield from value.buffers()
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item, _inside)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()), _inside)
    elif isinstance(value, types.MethodType):
        yield from tensors(value.__self__, _inside)
    elif isinstance(value, functools.partial):
        yield from tensors((value.func, value.args, value.keywords), _inside)
    elif _ours(value) and id(value) not in _inside:  # a cache and its layers know one another
        yield from tensors(_attributes(value), _inside | {id(value)})


def without_data(value: Any, twins: dict[int, Any] | None = None) -> Any:
    """The same value with meta tensors for tensors; what holds none, or cannot be looked into, as it is.

    Nothing of the original is changed, and what two places share they share in the result too.
    """
    twins = {} if twins is None else twins
    if id(value) in twins:
        return twins[id(value)][0]
    found: Any = value
    if isinstance(value, torch.Tensor):
        found = _meta(value)
    elif isinstance(value, torch.nn.Module):
        return _module(getattr(value, "_orig_mod", value), twins)  # a compiled module launches what its module does
    elif isinstance(value, tuple):
        items = [without_data(item, twins) for item in value]
        found = type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    elif isinstance(value, list):
        found = [without_data(item, twins) for item in value]
    elif isinstance(value, dict):
        found = copy.copy(value)
        for key, item in value.items():
            found[key] = without_data(item, twins)
    elif isinstance(value, types.MethodType):
        found = types.MethodType(value.__func__, without_data(value.__self__, twins))
    elif isinstance(value, functools.partial):
        arguments, keywords = without_data((value.args, value.keywords), twins)
        found = functools.partial(without_data(value.func, twins), *arguments, **keywords)
    elif _ours(value):
        found = copy.copy(value)
        twins[id(value)] = (found, value)
        for name, item in _attributes(value).items():
            object.__setattr__(found, name, without_data(item, twins))  # also where it is frozen
    twins[id(value)] = (found, value)  # the value too, so that nothing else gets its id
    return found


def _ours(value: Any) -> bool:
    return type(value).__module__.startswith("transfuse.") and not isinstance(value, (type, types.FunctionType))


def _attributes(value: Any) -> dict[str, Any]:
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    return {name: getattr(value, name) for name in slots if hasattr(value, name)} | getattr(value, "__dict__", {})


def _module(module: torch.nn.Module, twins: dict[int, Any]) -> torch.nn.Module:
    if id(module) in twins:
        found: torch.nn.Module = twins[id(module)][0]
        return found
    twin = module.__new__(type(module))
    twins[id(module)] = (twin, module)
    twin.__dict__ = {}
    for name, value in module.__dict__.items():  # parameters, buffers and submodules are dicts among them
        twin.__dict__[name] = without_data(value, twins)
    return twin


def _meta(t: torch.Tensor) -> torch.Tensor:
    """A meta tensor like t, whose offset is t's address modulo 16 bytes: kernels are specialised for aligned ones."""
    if t.device.type == "meta":
        return t
    offset = t.data_ptr() % 16 // t.element_size()
    span = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    with torch.no_grad():
        twin = torch.empty(offset + span, dtype=t.dtype, device="meta").as_strided(t.shape, t.stride(), offset)
    if isinstance(t, torch.nn.Parameter):
        return torch.nn.Parameter(twin, requires_grad=t.requires_grad)
    return twin.requires_grad_(t.requires_grad)

# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""A device that is the CPU under another name, and as strict as a GPU about mixing the two.

Tensors on it say that they are on "pretend:0". An operation on them and on a tensor of the CPU
raises RuntimeError naming it, as CUDA does: code that runs here makes its tensors where they
belong. Registering the device changes the whole process: use it in one of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
_setup_privateuseone_for_python_backend(NAME)
torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(x, device=...) as torch.tensor(x).to(...)
_MOVES = ("aten::to", "aten::_to_copy", "aten::copy_")  # take tensors of both
_INDEX = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")


class Elsewhere(Tensor):
    """A tensor on the device; inner: where its values really are."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied: Tensor = Elsewhere(self.inner.clone())
        if isinstance(self, nn.Parameter):
            copied = nn.Parameter(copied, self.requires_grad)
        memo[id(self)] = copied
        return copied

    def __repr__(self) -> str:
        return f"Elsewhere({self.inner})"


class Pretend(TorchDispatchMode):
    """While it lasts, functions that make tensors know the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name
    leaves = pytree.tree_leaves((args, kwargs))
    tensors = [one for one in leaves if isinstance(one, Tensor)]
    there = any(isinstance(one, Elsewhere) for one in tensors)
    if there and name not in _MOVES:
        _check(name, args, tensors)
    for wanted in (one for one in leaves if isinstance(one, torch.device)):
        there = wanted.type == NAME
        if there and kwargs.get("generator") is not None:
            raise RuntimeError(f"{name}: a generator of the CPU for a tensor on {NAME}")
    inner_args, inner_kwargs = pytree.tree_map(_inside, (args, kwargs))
    found = func(*inner_args, **inner_kwargs)
    if func._schema.is_mutable and not kwargs.get("out"):
        return args[0]  # in place
    return pytree.tree_map_only(Tensor, Elsewhere, found) if there else found


def _inside(one: Any) -> Any:
    """An argument as the CPU takes it."""
    if isinstance(one, Elsewhere):
        return one.inner
    return torch.device("cpu") if isinstance(one, torch.device) else one


def _check(name: str, args: Any, tensors: list[Tensor]) -> None:
    """RuntimeError where CUDA would raise it: scalars, and indices into its tensors, may differ."""
    if name in _INDEX and isinstance(args[0], Elsewhere):
        return
    for one in tensors:
        if not isinstance(one, Elsewhere) and one.dim() > 0:
            raise RuntimeError(
                f"{name}: {list(one.shape)} {one.dtype} on the CPU, another tensor on {NAME}"
            )

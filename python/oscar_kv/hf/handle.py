# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Handle: stands for the dense K or V of a packed layer.

A model passes what ``cache.update`` returns straight on to its attention function. Ours recognises
a handle and reads the codes; for any other operation the handle turns into a dense tensor, which is
right but slow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

if TYPE_CHECKING:
    from .layer import OscarLayer

_DETACH = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


class Handle(torch.Tensor):
    """A tensor [batch, kv_heads, columns, head_dim] without storage.

    It is valid until its layer changes; later use raises RuntimeError instead of reading other
    tokens than it was made for.
    """

    layer: OscarLayer
    part: int  # 0: K, 1: V
    version: int

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def make(layer: OscarLayer, part: int, shape: tuple[int, ...], like: Tensor) -> Handle:
        """A handle on the present state of `layer`, with dtype and device of `like`."""
        self: Handle = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            Handle, shape, dtype=like.dtype, device=like.device
        )
        self.layer = layer
        self.part = part
        self.version = layer.version
        return self

    def checked_layer(self) -> OscarLayer:
        """The layer, or RuntimeError if it has changed since."""
        if self.version != self.layer.version:
            raise RuntimeError(
                f"stale K/V of layer {self.layer.index}: the cache has been updated, cropped, "
                "reordered or reset since cache.update() returned this tensor"
            )
        return self.layer

    def dense(self) -> Tensor:
        """The dequantised tensor: what a query reads."""
        return self.checked_layer().dense(self.part)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        name = "KV"[self.part]
        return f"Handle({name} of layer {self.layer.index}, shape={tuple(self.shape)})"

    def __deepcopy__(self, memo: object) -> Tensor:
        return self.dense().clone()

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _DETACH:
            source: Handle = args[0]
            copy = Handle.make(source.layer, source.part, tuple(source.shape), source)
            copy.version = source.version
            return copy
        if func._schema.is_mutable:
            _refuse_writes(func._schema, args)
        args, kwargs = tree_map_only(Handle, Handle.dense, (args, kwargs or {}))
        return func(*args, **kwargs)


def _refuse_writes(schema: Any, args: tuple[Any, ...]) -> None:
    """Raises where an operation would write into a handle: into a temporary, and be lost."""
    for parameter, value in zip(schema.arguments, args, strict=False):
        written = parameter.alias_info is not None and parameter.alias_info.is_write
        if written and isinstance(value, Handle):
            raise RuntimeError(f"{schema.name} cannot write into packed K or V")

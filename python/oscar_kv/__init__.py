# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""oscar-kv: an LLM's KV cache in about 2.25 bits per element, attended to as packed.

``enable(model)`` makes a transformers model generate with it; ``OscarCache`` is the cache itself;
``PagedCache`` and the ops ``oscar_kv::append`` and ``oscar_kv::attend`` are for engines.
"""

from typing import TYPE_CHECKING, Any

import torch  # noqa: F401  (first: the native module then shares torch's OpenMP threads)

from ._core import active_backend, available_backends, cuda_available, cuda_built, set_backend
from ._core import version as _version
from .balance import Balance, calibrate
from .cache import PagedCache

if TYPE_CHECKING:
    from .hf import Memory, OscarCache, disable, enable

__version__ = _version()

__all__ = [
    "Balance",
    "Memory",
    "OscarCache",
    "PagedCache",
    "__version__",
    "active_backend",
    "available_backends",
    "calibrate",
    "cuda_available",
    "cuda_built",
    "disable",
    "enable",
    "set_backend",
]


def __getattr__(name: str) -> Any:
    # transformers takes seconds to import: only what needs it does.
    if name in ("Memory", "OscarCache", "disable", "enable"):
        from . import hf

        return getattr(hf, name)
    raise AttributeError(f"module 'oscar_kv' has no attribute '{name}'")

# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""The SGLang plugin: ``--attention-backend oscar_k2v2`` (docs/sglang.md).

* register.py: what SGLang calls at start; backends, and hooks on the making of the pool
* hooks.py: the hooks, which leave every other backend as it is
* refuse.py: what is not supported, said at start-up
* pool.py: the packed pages and the exact memory, and how many bytes they are
* slots.py: which request a slot belongs to, and from which position on its exact copies are valid
* backend.py: the attention backend
"""

from .register import register

__all__ = ["register"]

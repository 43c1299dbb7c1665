# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""The vLLM plugin: ``--kv-cache-dtype oscar_k2v2`` (docs/vllm.md).

* register.py: what vLLM calls at start; dtypes and backends
* spec.py: bytes of a page, and where the exact ring lies in pages
* refuse.py: what is not supported, said at start-up
* ring.py: the layers that make vLLM hand out ring blocks
* ledger.py: from which position on a request's exact copies are valid
* metadata.py: the builder
* attention.py: the attention layer of both devices; sinks.py: sinks after a prefix hit
* measured.py: balance and error feedback
* cpu.py, cuda.py: the backends
"""

from .register import register

__all__ = ["register"]

# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Stands for SGLang's kernel library, which has no wheel for CPUs.

SGLang's Python code takes names from it when it is imported; on a CPU without AMX it then runs
torch's own operators, and calls none of them.
"""


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args, **kwargs):
        raise NotImplementedError(f"sgl_kernel.{name} is not part of this test")

    return missing

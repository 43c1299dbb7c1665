# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""lmms-eval's command line with the packed cache under any of its transformers models.

    python -m oscar_kv.eval.tasks.lmms --oscar-format k2v2 --model llava_hf \\
        --model_args pretrained=llava-hf/llava-v1.6-mistral-7b-hf --tasks ocrbench --batch_size 1

Everything but the options that begin with --oscar goes to lmms-eval (0.7.3 was tried), which must
be installed. Its models read the prompt exactly, as `generate` does.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any


def packed_models(get_model: Callable[..., type], **settings: Any) -> Callable[..., type]:
    """lmms-eval's `get_model`, whose classes enable oscar_kv on the model that they load.

    settings: arguments of `oscar_kv.enable`. Raises TypeError for a class that holds no
    transformers model, when it is made.
    """

    def get_packed(*args: Any, **kwargs: Any) -> type:
        base = get_model(*args, **kwargs)

        def load(self: Any, *args: Any, **kwargs: Any) -> None:
            from ...hf import enable

            base.__init__(self, *args, **kwargs)  # type: ignore[misc]
            enable(getattr(self, "model", None), **settings)

        return type(f"Packed{base.__name__}", (base,), {"__init__": load})

    return get_packed


def main() -> None:
    """Takes our options off the command line and hands over to lmms-eval."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    options.add_argument("--oscar-format", default="k2v2", help="k2v2, k4v2 or k4v4")
    options.add_argument("--oscar-window", type=int, default=32, help="newest exact tokens")
    options.add_argument("--oscar-sinks", type=int, default=4, help="exact first tokens")
    ours, rest = options.parse_known_args()
    if importlib.util.find_spec("lmms_eval") is None:
        options.error("lmms-eval is not installed: pip install lmms-eval")
    models: Any = importlib.import_module("lmms_eval.models")
    models.get_model = packed_models(
        models.get_model, format=ours.oscar_format, window=ours.oscar_window, sinks=ours.oscar_sinks
    )
    sys.argv = ["lmms_eval", *rest]
    importlib.import_module("lmms_eval.__main__").cli_evaluate()


if __name__ == "__main__":
    main()

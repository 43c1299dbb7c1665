# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""`transformers serve`, an OpenAI-compatible server, with every model's cache packed.

    pip install 'transformers[serving]'
    OSCAR_FORMAT=k4v2 python examples/serve.py Qwen/Qwen3-0.6B --port 8000

Takes the options of `transformers serve`. Requests run one after the other: with
--continuous-batching transformers keeps a 16-bit cache of its own, and the server refuses to start
one for a packed model.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import oscar_kv
import typer
from transformers.cli.serve import Serve
from transformers.cli.serving.model_manager import ModelManager


def pack_models(manager: type[ModelManager], **settings: Any) -> None:
    """Lets `manager` enable oscar_kv on each model it loads; settings: arguments of enable."""
    load = manager.load_model_and_processor

    @functools.wraps(load)
    def load_packed(self: ModelManager, *args: Any, **kwargs: Any) -> Any:
        model, processor = load(self, *args, **kwargs)
        if model.config._attn_implementation != "oscar":  # else it was loaded before
            oscar_kv.enable(model, **settings)
        return model, processor

    manager.load_model_and_processor = load_packed


if __name__ == "__main__":
    pack_models(ModelManager, format=os.environ.get("OSCAR_FORMAT", "k2v2"))
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(Serve)
    app()

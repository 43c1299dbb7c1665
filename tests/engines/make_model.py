# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Writes the demo model, a GGUF file, as a checkpoint folder: vLLM reads those.

python tests/engines/make_model.py FOLDER
"""

import sys

from oscar_kv.cli.models import load_model


def main(folder):
    """Weights in bfloat16 and the tokenizer."""
    loaded = load_model(None)
    model = loaded.model
    # The weights are dequantised: what is saved is an ordinary checkpoint.
    model.hf_quantizer, model.is_quantized = None, False
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])

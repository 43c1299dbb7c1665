# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Token norm imbalance: what spoils 2-bit keys of a model on a text, and what each step mends.

Source: OScaR, arXiv 2605.19660. ``measure`` runs a model once; ``save_html`` draws its result.
"""

from .capture import measure
from .constant import Constant, constants
from .measure import LayerMeasure, LayerTensors, Measurement, Settings, measure_layer
from .modality import Modality, modalities, token_kinds
from .report import save_html
from .summary import as_dict, findings
from .tokens import Outlier, Token, find_outliers, label_tokens

__all__ = [
    "Constant",
    "LayerMeasure",
    "LayerTensors",
    "Measurement",
    "Modality",
    "Outlier",
    "Settings",
    "Token",
    "as_dict",
    "constants",
    "find_outliers",
    "findings",
    "label_tokens",
    "measure",
    "measure_layer",
    "modalities",
    "save_html",
    "token_kinds",
]

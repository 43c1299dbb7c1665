# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""All families, and how tests take one each."""

from __future__ import annotations

from typing import Any

import pytest
from audio_models import AUDIO, ENCODER_DECODER
from family import Family
from refused_models import REFUSED
from text_models import TEXT
from vision_models import VISION

MEDIA = VISION + AUDIO
DECODERS = TEXT + MEDIA
FAMILIES = DECODERS + ENCODER_DECODER
ALL = FAMILIES + REFUSED


def each(families: list[Family]) -> Any:
    """Parametrises a test by family."""
    return pytest.mark.parametrize("family", families, ids=[family.title for family in families])


def each_case(families: list[Family]) -> Any:
    """Parametrises a test by family and by what is sent to it."""
    pairs = [(family, case) for family in families for case in family.cases]
    names = [f"{family.title}-{case}" for family, case in pairs]
    return pytest.mark.parametrize(("family", "case"), pairs, ids=names)

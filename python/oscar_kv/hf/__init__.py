# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""The transformers integration: a packed cache and the attention function that reads it.

* cache.py: OscarCache, one layer object a decoder layer; memory report
* layer.py: OscarLayer, pending tokens, packed history
* measuring.py: when a layer is calibrated
* handle.py: Handle, what a model gets instead of dense K and V
* attention.py: the "oscar" attention function; reads handles, delegates everything else
* columns.py: which columns of a padded batch are stored, and the check of masks against it
* survey.py: which layers can be packed, and why the others cannot
* install.py: enable and disable, a model whose generate() uses the packed cache
"""

from .cache import Memory, OscarCache
from .install import disable, enable
from .survey import Survey, survey

__all__ = ["Memory", "OscarCache", "Survey", "disable", "enable", "survey"]

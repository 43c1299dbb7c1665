# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""The accuracy laboratory: any cache format on any model and text, with equal bits in view.

* codec.py: what a format is to the laboratory; bits at a length
* twin.py: our own format in torch, with changeable parameters
* baselines/: the formats of other papers, one file each
* formats.py: names and parameters of all formats
* texts.py: the documents to measure on
* simulate.py: one forward pass that decodes a document through a codec, or the real packed cache
* generation.py: documents that the model itself goes on with
* stress.py: outliers that leave the 16-bit model unchanged, and large biases of K and V
* modality.py: the same for gaps between the key norms of modalities
* kl.py: prefill, teacher-forced decoding, figures per format
* settings.py: what a run stands on, beside its rows in the JSON file
* report.py: the HTML report
"""

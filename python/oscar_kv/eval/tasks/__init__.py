# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Tasks that a model answers through the cache: RULER, LongBench-E, OCRBench, MMAU-Pro, lm-eval's.

* runner.py: one exact prefill, then each cache format generates from it
* sample.py: a prompt in two parts, its references and scores; fitting it to a length
* haystack.py, needles.py, tracing.py, words.py: the prompts of RULER; ruler.py: the run
* lm.py: lm-eval's model class; longbench.py, metrics.py, buckets.py: LongBench-E
* media.py, media_runner.py: prompts with images and sounds; ocrbench.py; mmau_pro.py, with
  instructions.py
* lmms.py: lmms-eval with the packed cache
* store.py: answers on disk, so that a run can go on where it stopped
"""

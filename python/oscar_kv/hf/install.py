# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""enable / disable: a model whose ``generate`` uses the packed cache, with nothing else changed."""

from __future__ import annotations

import contextlib
import logging
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.generation import utils as generation

from ..balance import text_config
from ..calibration import Calibration
from .attention import NAME, register
from .cache import BalanceLike, OscarCache, nothing_to_pack, resolve_balance
from .survey import survey

_STATE = "_oscar_kv"
_PREPARE = "_prepare_cache_for_generation"
_BATCHING = "init_continuous_batching"
# The argument of generate: transformers 5.24 renamed it and still takes the old name.
_OLD_CACHE = "past_key_values"
_CACHE = "cache" if "cache" in getattr(generation, "ALL_CACHE_NAMES", ()) else _OLD_CACHE
_log = logging.getLogger(__name__)


@dataclass
class _Enabled:
    """What `enable` remembers on a model."""

    settings: dict[str, Any]
    measure: bool
    given: dict[int, Calibration]
    previous: list[tuple[Any, Any]] = field(default_factory=list)  # (config, implementation)
    generate: Any = None  # the instance's own generate, if it had one
    made: list[OscarCache] = field(default_factory=list)  # by the running generate

    def new_cache(self, model: PreTrainedModel) -> OscarCache:
        cache = OscarCache(model.config, balance=None, **self.settings)
        cache.shared.measure = self.measure
        cache.shared.given = self.given
        return cache


def enable(
    model: PreTrainedModel,
    format: str = "k2v2",
    window: int = 32,
    sinks: int = 4,
    balance: BalanceLike = "auto",
    strict: bool = False,
) -> PreTrainedModel:
    """Lets ``model.generate`` keep K and V packed and attend on the codes; returns the model.

    The arguments are those of `OscarCache`. With balance="auto" every call measures its own prompt:
    no call depends on an earlier one. A `past_key_values` that a caller passes is used as it is.
    Called again: replaces the settings.

    Layers that cannot be packed stay in transformers' own cache and are named in a log message
    (`survey(model.config)` says the same). Of an encoder-decoder the decoder's self-attention is
    packed, of an omni model the thinker.

    Raises TypeError for what is not a transformers model, and ValueError (naming the model class or
    the value and its limit) for a model none of whose layers can be packed (sliding windows only,
    latent attention, position bias, unsupported head sizes), model files without the attention
    interface, and unsupported dtypes.
    """
    whole, model = model, decoder_of(model)
    _check_model(model)
    known = resolve_balance(balance, model.config)
    probe = OscarCache(model.config, format=format, window=window, sinks=sinks, balance=None)
    state = _Enabled(
        settings={"format": format, "window": window, "sinks": sinks, "strict": strict},
        measure=known is None,
        given=known or {},
    )
    old: _Enabled | None = getattr(model, _STATE, None)
    if old is None:
        state.previous = _install(model)
        state.generate = model.__dict__.get("generate")
        model.generate = types.MethodType(_generate, model)
        setattr(model, _BATCHING, types.MethodType(_no_continuous_batching, model))
        if model.config.is_encoder_decoder:
            setattr(model, _PREPARE, types.MethodType(_prepare_cache, model))
    else:
        state.previous, state.generate = old.previous, old.generate
    setattr(model, _STATE, state)
    level = logging.WARNING if probe.survey.kept else logging.INFO
    _log.log(level, "%s: %s (%s)", type(model).__name__, probe.survey, format)
    return whole


def disable(model: PreTrainedModel) -> PreTrainedModel:
    """Undoes `enable`: attention implementation and ``generate``. Does nothing if not enabled."""
    whole, model = model, decoder_of(model)
    state: _Enabled | None = getattr(model, _STATE, None)
    if state is None:
        return whole
    _restore(state.previous)
    if state.generate is not None:
        model.generate = state.generate
    else:
        del model.generate  # the class has its own
    for name in (_PREPARE, _BATCHING):
        model.__dict__.pop(name, None)
    delattr(model, _STATE)
    return whole


def decoder_of(model: Any) -> Any:
    """The part that generates text: the thinker of an omni model, else the model itself."""
    thinker = getattr(model, "thinker", None)
    return thinker if isinstance(thinker, GenerationMixin) else model


@contextlib.contextmanager
def attention_installed(model: PreTrainedModel, name: str = NAME) -> Iterator[None]:
    """The model with the attention function `name` ("oscar"), its previous one afterwards.

    ValueError for a model that `enable` refuses, and for an encoder-decoder: code that brings its
    own cache would give cross-attention the cache of self-attention.
    """
    model = decoder_of(model)
    _check_model(model)
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder model: only enable(model) and "
            "generate() are supported for it"
        )
    previous = _install(model, name)
    try:
        yield
    finally:
        _restore(previous)


def _install(model: PreTrainedModel, name: str = NAME) -> list[tuple[Any, Any]]:
    """Switches the decoder's attention to `name`; returns what every config had before."""
    register()
    configs = _configs(model)
    previous = [(config, config._attn_implementation_internal) for config in configs]
    try:
        model.set_attn_implementation(name)
    except BaseException:
        _restore(previous)
        raise
    # set_attn_implementation also switches vision and audio towers; they keep what they had.
    # By type: a decoder may hold a copy of its part of the configuration.
    ours = (type(model.config), type(text_config(model.config)))
    _restore([(config, value) for config, value in previous if type(config) not in ours])
    return previous


def _restore(previous: list[tuple[Any, Any]]) -> None:
    for config, value in previous:
        config._attn_implementation_internal = value


def _configs(model: PreTrainedModel) -> list[Any]:
    """Every distinct configuration in the model, sub-configurations included."""
    found: dict[int, Any] = {}
    waiting = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    while waiting:
        config = waiting.pop()
        if config is None or id(config) in found:
            continue
        found[id(config)] = config
        waiting.extend(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))
    return list(found.values())


def _check_model(model: Any) -> None:
    """Refuses models whose attention cannot be replaced, naming the class and the reason."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"expected a transformers PreTrainedModel, got {type(model).__name__}")
    name = type(model).__name__
    if not isinstance(model, GenerationMixin) or not model.can_generate():
        raise ValueError(f"{name} cannot generate: use its ...ForCausalLM class")
    text = text_config(model.config)
    if not hasattr(text, "num_attention_heads") or not model._supports_default_dynamic_cache():
        raise ValueError(f"{name} has no attention layers whose K and V could be packed")
    found = survey(model.config)
    if not found.packed:
        raise ValueError(f"{name}: {nothing_to_pack(text, found)}")
    for module in model.modules():
        # By type: of an encoder-decoder, text_config makes a copy.
        decoder = isinstance(module, PreTrainedModel) and type(module.config) is type(text)
        if decoder and not module._can_set_attn_implementation():
            raise ValueError(
                f"{type(module).__name__} does not use transformers' attention interface, its "
                "attention cannot be replaced"
            )
    dtype, device = model.dtype, model.device
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"{name} has dtype {dtype}, must be float32, float16 or bfloat16")
    if device.type == "meta":
        raise ValueError(f"{name} is on the meta device: load its weights first")


def _generate(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """``generate`` with a fresh packed cache where the caller passed none."""
    state: _Enabled = getattr(self, _STATE)
    inner = state.generate or types.MethodType(type(self).generate, self)
    if kwargs.get("cache_implementation") is not None:
        raise ValueError(
            f"cache_implementation={kwargs['cache_implementation']!r} on a model with oscar_kv "
            "enabled: call oscar_kv.disable(model) first"
        )
    config = kwargs.get("generation_config")
    if config is None and len(args) > 1 and isinstance(args[1], GenerationConfig):
        config = args[1]
    asked = [kwargs.get("use_cache"), getattr(config, "use_cache", None)]
    asked.append(self.generation_config.use_cache)
    if next((value for value in asked if value is not None), True) is False:
        return inner(*args, **kwargs)
    given = _CACHE if kwargs.get(_CACHE) is not None else _OLD_CACHE
    cache = kwargs.get(given)
    if self.config.is_encoder_decoder:
        # One call may run several (Whisper, a long recording), each with a cache of its own: they
        # are made where transformers makes them, see _prepare_cache.
        if isinstance(cache, OscarCache):
            kwargs[given] = _with_cross_attention(cache)
    elif cache is None:
        # An instance's own generate may know the old name only.
        cache = kwargs[_OLD_CACHE if state.generate else _CACHE] = state.new_cache(self)
    with _no_cache_implementation(self.generation_config, config):
        result = inner(*args, **kwargs)
    made, state.made = state.made, []
    for one in [cache, *made]:
        if isinstance(one, OscarCache):
            one.check()  # of the last step on a GPU nothing else would be heard
    return result


def _no_continuous_batching(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """transformers would keep a paged 16-bit cache, with no word that nothing is packed."""
    raise NotImplementedError(
        f"continuous batching of {type(self).__name__} (generate_batch, transformers serve "
        "--continuous-batching) keeps a 16-bit cache of its own, which oscar_kv cannot pack: call "
        "oscar_kv.disable(model) first, or use generate() with a padded batch"
    )


def _prepare_cache(
    self: PreTrainedModel, generation_config: Any, model_kwargs: dict[str, Any], *args: Any
) -> Any:
    """transformers' step of ``generate`` that makes a cache where the caller passed none."""
    state: _Enabled = getattr(self, _STATE)
    if model_kwargs.get(_CACHE) is None and generation_config.use_cache is not False:
        state.made.append(state.new_cache(self))
        model_kwargs[_CACHE] = _with_cross_attention(state.made[-1])
    return getattr(type(self), _PREPARE)(self, generation_config, model_kwargs, *args)


def _with_cross_attention(cache: OscarCache) -> EncoderDecoderCache:
    return EncoderDecoderCache(cache, DynamicCache())  # which sees all of the encoder


@contextlib.contextmanager
def _no_cache_implementation(*configs: GenerationConfig | None) -> Iterator[None]:
    """A checkpoint may ask for a cache class of its own: not during this call."""
    saved = [
        (config, config.cache_implementation)
        for config in configs
        if config is not None and config.cache_implementation is not None
    ]
    for config, _ in saved:
        config.cache_implementation = None
    try:
        yield
    finally:
        for config, value in reversed(saved):
            config.cache_implementation = value

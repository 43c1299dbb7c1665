# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Teacher-forced decoding of a document in one forward pass, through a codec or the packed cache.

`prefill` reads the prompt exactly and records what codecs may want to see. `decode` then runs the
remaining tokens at once: in every layer each query reads, token by token, the copy that it would
read if the tokens came one by one, so K and V of later tokens carry the errors of earlier reads.
`decode_packed` does the same through OscarCache and the packed kernels (its `strict` rule).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..hf import OscarCache
from ..hf.columns import ALL_REAL
from ..hf.install import attention_installed
from ..hf.layer import OscarLayer
from .codec import EXACT_BITS, Codec, LayerCodes, LayerInput, bits_resident

_NAME = "oscar_eval"
_CHUNK = 256  # queries that share one list of K, V copies


@dataclass
class PackedFormat:
    """Our format through the real kernels: the arguments of OscarCache. name, label: as Codec's."""

    format: str = "k2v2"
    window: int = 32
    sinks: int = 4
    balance: str = "auto"  # "auto", "none" or a file
    name: str = ""
    label: str = ""

    def __post_init__(self) -> None:
        self.name = self.format
        changed = [("w", self.window, 32), ("s", self.sinks, 4), ("balance ", self.balance, "auto")]
        notes = [f"{short}{value}" for short, value, usual in changed if value != usual]
        self.label = " ".join([f"OSCAR-KV {self.format}", *notes])


@dataclass
class Record:
    """Exact tensors of one layer, [tokens, ...] of a prompt or of one pass; see LayerInput."""

    q: Tensor | None = None  # [q_heads, tokens, head_dim]
    k_pre_rope: Tensor | None = None
    hidden: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None


@dataclass
class Prefill:
    """A prompt that was read exactly: its K and V, and records by layer."""

    ids: Tensor  # [1, tokens], the whole document
    prompt: int
    cache: DynamicCache
    records: dict[int, Record]
    seed: int = 0


@dataclass
class Decoded:
    """hidden: final states [queries, hidden_size]; bits: see the functions that return it."""

    hidden: Tensor
    bits: float
    packed_bits: float


@dataclass
class _Pass:
    """The forward pass in progress."""

    layers: frozenset[int]  # full-attention layers
    prefill: Prefill | None = None  # None: this is the prompt
    codec: Codec | None = None
    records: dict[int, Record] = field(default_factory=dict)
    bits: list[float] = field(default_factory=list)
    packed_bits: list[float] = field(default_factory=list)

    def record(self, layer: int) -> Record:
        return self.records.setdefault(layer, Record())


_active: _Pass | None = None


@torch.inference_mode()
def prefill(model: PreTrainedModel, ids: Tensor, prompt: int, seed: int = 0) -> Prefill:
    """Reads the first `prompt` tokens of ids [1, tokens] exactly, on the device of the model.

    ValueError for other shapes.
    """
    if ids.dim() != 2 or ids.shape[0] != 1 or not 0 < prompt < ids.shape[1]:
        raise ValueError(
            f"prompt is {prompt} and ids {list(ids.shape)}: ids must be [1, tokens] with at least "
            "one token of prompt and one after it"
        )
    ids = ids.to(model.device)
    cache = DynamicCache(config=model.config)
    layers = full_layers(cache)
    with _running(model, _Pass(layers)) as state:
        model.base_model(input_ids=ids[:, :prompt], past_key_values=cache, use_cache=True)
    return Prefill(ids, prompt, cache, state.records, seed)


@torch.inference_mode()
def decode(model: PreTrainedModel, start: Prefill, codec: Codec | None = None) -> Decoded:
    """Tokens prompt..end-1 through `codec`, None: exact.

    Bits are means over the full-attention layers: with windows at the end of the document, and of
    the packed part.
    """
    layers = full_layers(start.cache)
    with _running(model, _Pass(layers, start, codec)) as state:
        hidden = _forward(model, start.ids[:, start.prompt :], copy.deepcopy(start.cache))
    if codec is None:
        return Decoded(hidden, EXACT_BITS, EXACT_BITS)
    return Decoded(hidden, _mean(state.bits), _mean(state.packed_bits))


@torch.inference_mode()
def decode_packed(
    model: PreTrainedModel, start: Prefill, packed: PackedFormat, chunk: int | None = None
) -> Decoded:
    """Tokens prompt..end-1 through OscarCache, `chunk` at a time (None: all at once).

    The bits are those of the arrays that the cache holds at the end, all counted; exact rows count
    16 bits an element (they are float32 here as the whole model is).
    """
    cache = OscarCache(
        model.config,
        format=packed.format,
        window=packed.window,
        sinks=packed.sinks,
        balance=None if packed.balance == "none" else packed.balance,
        strict=True,
    )
    for index, (ours, exact) in enumerate(zip(cache.layers, start.cache.layers, strict=True)):
        if not isinstance(ours, OscarLayer):
            cache.layers[index] = copy.deepcopy(exact)
            continue
        q = start.records[index].q
        assert q is not None
        ours.update(exact.keys, exact.values)
        ours.observe(q[None], ALL_REAL)
        ours.commit()
    ids = start.ids[:, start.prompt :]
    with attention_installed(model):
        parts = [_forward(model, part, cache) for part in ids.split(chunk or ids.shape[1], dim=1)]
    memory = cache.memory()
    width = torch.finfo(model.dtype).bits / EXACT_BITS
    held = memory.packed + memory.exact / width + memory.tables
    ours_only = (layer for layer in cache.layers if isinstance(layer, OscarLayer))
    paged = [layer.paged for layer in ours_only if layer.paged is not None]
    pages = sum(one.pool.storage[0].numel() for one in paged)  # bytes of one page of each layer
    elements = sum(2 * one.page_tokens * one.kv_heads * one.head_dim for one in paged)
    return Decoded(torch.cat(parts), 8 * held / memory.elements, 8 * pages / elements)


def _forward(model: PreTrainedModel, ids: Tensor, cache: Any) -> Tensor:
    output = model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
    return output.last_hidden_state[0]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def full_layers(cache: DynamicCache) -> frozenset[int]:
    """Layers that keep all tokens: the others are not packed."""
    return frozenset(i for i, layer in enumerate(cache.layers) if type(layer) is DynamicLayer)


@contextlib.contextmanager
def _running(model: PreTrainedModel, state: _Pass) -> Iterator[_Pass]:
    """The model with our attention function, which finds `state` while this lasts."""
    global _active
    _register()
    with attention_installed(model, _NAME), contextlib.ExitStack() as hooks:
        for layer in model.modules():
            for module in layer.children():
                if isinstance(getattr(module, "layer_idx", None), int) and hasattr(
                    module, "o_proj"
                ):
                    _observe(layer, module, state, hooks)
        _active = state
        try:
            yield state
        finally:
            _active = None


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)


def _observe(
    layer: nn.Module, module: nn.Module, state: _Pass, hooks: contextlib.ExitStack
) -> None:
    """Records a layer's input, and the RoPE tables and K before RoPE of its attention block."""
    record = state.record(module.layer_idx)

    def entered(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        record.hidden = None if hidden is None else hidden[0]

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tables = kwargs.get("position_embeddings")
        if isinstance(tables, tuple):
            record.cos, record.sin = tables[0][0], tables[1][0]

    def projected(_: nn.Module, __: tuple[Any, ...], k: Tensor) -> None:
        heads = k[0].unflatten(-1, (-1, module.head_dim)) if k.dim() == 3 else k[0]
        kv_heads = module.k_proj.out_features // module.head_dim
        record.k_pre_rope = heads.transpose(0, 1) if heads.shape[1] == kv_heads else heads

    hooks.callback(layer.register_forward_pre_hook(entered, with_kwargs=True).remove)
    hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
    # Where K has a norm of its own, RoPE comes after that.
    source = getattr(module, "k_norm", None) or getattr(module, "k_proj", None)
    if source is not None and hasattr(module, "k_proj") and hasattr(module, "head_dim"):
        hooks.callback(source.register_forward_hook(projected).remove)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: exact for a prompt, through the codec after it."""
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"{type(module).__name__} asks for {name}: not simulated")
    state = _active
    assert state is not None
    index = module.layer_idx
    state.record(index).q = query[0]
    if state.prefill is None or state.codec is None or index not in state.layers:
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return out, None
    layer = _layer_input(state, index, key[0], value[0])
    codes = state.codec.encode(layer)
    state.bits.append(bits_resident(state.codec, codes, layer))
    kv_heads, _, head_dim = layer.k.shape
    state.packed_bits.append(_mean(list(state.codec.bits(head_dim, kv_heads))))
    out = attend(layer, codes, head_dim**-0.5 if scaling is None else scaling)
    return out.transpose(0, 1)[None], None


def _layer_input(state: _Pass, index: int, k: Tensor, v: Tensor) -> LayerInput:
    start, now = state.prefill, state.record(index)
    assert start is not None
    old = start.records[index]

    def joined(name: str, dim: int) -> Any:
        parts = [getattr(record, name) for record in (old, now)]
        return None if any(part is None for part in parts) else torch.cat(parts, dim)

    return LayerInput(
        layer=index,
        prompt=start.prompt,
        q=joined("q", 1),
        k=k,
        v=v,
        k_pre_rope=joined("k_pre_rope", 1),
        hidden=joined("hidden", 0),
        cos=joined("cos", 0),
        sin=joined("sin", 0),
        seed=start.seed,
    )


def attend(layer: LayerInput, codes: LayerCodes, scale: float) -> Tensor:
    """Output [q_heads, queries, head_dim] of the decoded queries, each reading its own copies.

    Queries are taken in chunks. Most tokens are read as the same copy by a whole chunk; those that
    are not stand in the chunk's K and V once for each copy, and the mask says who reads which.
    """
    kv_heads, tokens, _ = layer.k.shape
    q = layer.q[:, layer.prompt :].unflatten(0, (kv_heads, -1))  # [kv_heads, group, queries, d]
    copies_k, copies_v = (layer.k, codes.k), (layer.v, codes.v)
    outputs = []
    for first in range(0, layer.queries, _CHUNK):
        last = min(first + _CHUNK, layer.queries)
        end = layer.prompt + last
        position = torch.arange(layer.prompt + first, end, device=q.device)[:, None]
        causal = torch.arange(end, device=q.device)[None, :] <= position
        packed = [
            mask.expand(-1, layer.queries, tokens)[:, first:last, :end]
            if mask.dim() == 3
            else mask.expand(layer.queries, tokens)[None, first:last, :end]
            for mask in (codes.k_packed, codes.v_packed)
        ]
        keys, values, masks = [], [], []
        for choice in ((0, 0), (0, 1), (1, 0), (1, 1)):
            reads = causal & (packed[0] == bool(choice[0])) & (packed[1] == bool(choice[1]))
            columns = reads.flatten(0, 1).any(0).nonzero().squeeze(1)
            if columns.numel():
                keys.append(copies_k[choice[0]][:, columns])
                values.append(copies_v[choice[1]][:, columns])
                masks.append(reads[..., columns])
        k, v, mask = torch.cat(keys, 1), torch.cat(values, 1), torch.cat(masks, 2)
        group = q.shape[1]
        outputs.append(
            functional.scaled_dot_product_attention(
                q[:, :, first:last],
                k[:, None].expand(-1, group, -1, -1),
                v[:, None].expand(-1, group, -1, -1),
                attn_mask=mask[:, None],
                scale=scale,
            )
        )
    return torch.cat(outputs, 2).flatten(0, 1)

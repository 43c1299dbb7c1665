# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Vision-language families: a tiny model each, prompts made by transformers' own processors."""

from __future__ import annotations

import functools
from typing import Any

import transformers
from family import Built, Family, Inputs, repeated, to_tensors
from processors import PAD, VOCABULARY, Frames, clip, picture, processor, tokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

RANGE = {"initializer_range": 0.15}  # wide: see models.py
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_CLIP = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
_CROP = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
_QWEN_TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}


def text_sizes(hidden: int = 128, q_heads: int = 4, kv_heads: int = 2, head_dim: int = 64) -> Any:
    """Arguments of a text configuration."""
    return {
        "vocab_size": VOCABULARY,
        "num_hidden_layers": 2,
        "pad_token_id": PAD,
        "bos_token_id": 0,
        "eos_token_id": None,
        "tie_word_embeddings": False,
        "hidden_size": hidden,
        "intermediate_size": 96,
        "num_attention_heads": q_heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        **RANGE,
    }


def qwen_vision(out: int, **more: Any) -> dict[str, Any]:
    """Arguments of the vision configuration of Qwen2.5 and Qwen3."""
    return {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 32,
        "out_hidden_size": out,
        "num_heads": 2,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        **RANGE,
        **more,
    }


def qwen_images(patch: int) -> Qwen2VLImageProcessorPil:
    """Qwen's image processor for small images."""
    side = 2 * patch
    return Qwen2VLImageProcessorPil(
        patch_size=patch,
        merge_size=2,
        temporal_patch_size=2,
        min_pixels=side**2,
        max_pixels=16 * side**2,
    )


def _cases(maker: Any, image: str, video: str = "") -> dict[str, Any]:
    """Inputs of a processor; image, video: how a prompt names one."""

    def run(*texts: str, **media: Any) -> Inputs:
        return to_tensors(maker(text=list(texts), padding=True, return_tensors="pt", **media))

    first, second = picture(1), picture(2, 40, 64)
    tail = repeated("What is it?", 20)
    cases = {
        "one": lambda: run(f"What is {image} this picture? Tell me all of it!", images=[first]),
        "images": lambda: run(f"First {image} and then {image} here.", images=[first, second]),
        "batch": lambda: run(
            f"A longer text, {image} padded on the left.",
            f"x{image}",
            images=[[first], [second]],
        ),
        "long": lambda: run(f"Look at {image} now. {tail}", images=[first]),
        "more": lambda: run(f"And this {image} here?", images=[second]),
    }
    if video:
        cases["video"] = lambda: run(f"Look: {video} what happens?", videos=[clip(1)])
        cases["mixed"] = lambda: run(
            f"Look: {video} and {image} differ?", images=[first], videos=[clip(1)]
        )
    return cases


def llava() -> tuple[Any, Any]:
    """A tiny LLaVA-1.5 and its processor."""
    tokens = tokenizer(image_token="<image>")
    maker = transformers.LlavaProcessor(
        image_processor=CLIPImageProcessorPil(**_CROP),
        tokenizer=tokens,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**text_sizes()),
        vision_config=transformers.CLIPVisionConfig(**_CLIP),
        image_token_index=tokens.image_token_id,
        vision_feature_layer=-1,
        **RANGE,
    )
    return transformers.LlavaForConditionalGeneration(config), maker


def _llava() -> Built:
    model, maker = llava()
    return Built(model, _cases(maker, "<image>"))


def _llava_next() -> Built:
    tokens = tokenizer(image_token="<image>")
    grids = [[28, 56], [56, 28], [56, 56]]
    maker = transformers.LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(**_CROP, image_grid_pinpoints=grids),
        tokenizer=tokens,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    config = transformers.LlavaNextConfig(
        text_config=transformers.MistralConfig(**text_sizes(), sliding_window=None),
        vision_config=transformers.CLIPVisionConfig(**_CLIP),
        image_token_index=tokens.image_token_id,
        vision_feature_layer=-1,
        image_grid_pinpoints=grids,
        **RANGE,
    )
    return Built(transformers.LlavaNextForConditionalGeneration(config), _cases(maker, "<image>"))


def _qwen(prefix: str, patch: int, text: Any, vision: Any) -> Built:
    tokens, images = tokenizer(**_QWEN_TOKENS), qwen_images(patch)
    kind = getattr(transformers, prefix.removesuffix("Moe") + "Processor")
    maker = processor(
        kind, image_processor=images, tokenizer=tokens, video_processor=Frames(images)
    )
    ids = {name + "_id": tokens.convert_tokens_to_ids(x) for name, x in _QWEN_TOKENS.items()}
    config_class = getattr(transformers, prefix + "Config")
    config = config_class(text_config=text, vision_config=vision, **ids)
    model = getattr(transformers, prefix + "ForConditionalGeneration")(config)
    image, video = (f"<|vision_start|><|{x}_pad|><|vision_end|>" for x in ("image", "video"))
    # Qwen3-VL's processor writes the markers of each frame by itself.
    return Built(model, _cases(maker, image, "<|video_pad|>" if patch == 16 else video))


def _qwen2_vl() -> Built:
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 256, "num_heads": 2, "mlp_ratio": 2}
    vision |= {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, **RANGE}
    return _qwen("Qwen2VL", 14, text_sizes(256) | {"rope_parameters": MROPE}, vision)


def _qwen2_5_vl() -> Built:
    vision = qwen_vision(256, patch_size=14, window_size=56, fullatt_block_indexes=[1])
    return _qwen("Qwen2_5_VL", 14, text_sizes(256) | {"rope_parameters": MROPE}, vision)


def _qwen3_vl(prefix: str, **more: Any) -> Built:
    rope = MROPE | {"mrope_interleaved": True}
    vision = qwen_vision(128, num_position_embeddings=64, deepstack_visual_indexes=[0])
    return _qwen(prefix, 16, text_sizes() | {"rope_parameters": rope, **more}, vision)


def _gemma3() -> Built:
    tokens = tokenizer(
        boi_token="<start_of_image>", image_token="<image_soft_token>", eoi_token="<end_of_image>"
    )
    maker = transformers.Gemma3Processor(
        image_processor=Gemma3ImageProcessorPil(size={"height": 28, "width": 28}),
        tokenizer=tokens,
        image_seq_length=4,
    )
    mixed = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
    config = transformers.Gemma3Config(
        text_config=text_sizes(96, 2, 1, 256) | mixed | {"query_pre_attn_scalar": 256},
        vision_config=_CLIP,
        mm_tokens_per_image=4,
        boi_token_index=tokens.boi_token_id,
        eoi_token_index=tokens.eoi_token_id,
        image_token_index=tokens.image_token_id,
        **RANGE,
    )
    model = transformers.Gemma3ForConditionalGeneration(config)
    return Built(model, _cases(maker, "<start_of_image>"))


def _idefics3() -> Built:
    rows = {f"tile_{i}_{j}": f"<row_{i}_col_{j}>" for i in (1, 2) for j in (1, 2)}
    tokens = tokenizer(
        image_token="<image>",
        around="<fake_token_around_image>",
        whole="<global-img>",
        end="<end_of_utterance>",
        **rows,
    )
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 56}, max_image_size={"longest_edge": 28}, do_image_splitting=True
    )
    maker = transformers.Idefics3Processor(
        image_processor=images, tokenizer=tokens, image_seq_len=4
    )
    config = transformers.Idefics3Config(
        text_config=transformers.LlamaConfig(**text_sizes()),
        vision_config=_CLIP,
        image_token_id=tokens.image_token_id,
        scale_factor=2,
        pad_token_id=PAD,
        **RANGE,
    )
    return Built(transformers.Idefics3ForConditionalGeneration(config), _cases(maker, "<image>"))


def _paligemma() -> Built:
    tokens = tokenizer(image_token="<image>", bos_token="<bos>")
    images = SiglipImageProcessorPil(size={"height": 28, "width": 28})
    images.image_seq_length = 16
    maker = transformers.PaliGemmaProcessor(image_processor=images, tokenizer=tokens)
    vision = {**_CLIP, "projection_dim": 128, "num_image_tokens": 16, "vision_use_head": False}
    text = text_sizes() | {"model_type": "gemma", "vocab_size": len(tokens)}
    config = transformers.PaliGemmaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=tokens.image_token_id,
        projection_dim=128,
        **RANGE,
    )
    model = transformers.PaliGemmaForConditionalGeneration(config)
    return Built(model, _cases(maker, "<image>"))


_IMAGES = ("one", "images", "batch")
_VIDEO = (*_IMAGES, "video", "mixed")

VISION = [
    Family("LLaVA-1.5", _llava, _IMAGES, "image"),
    Family("LLaVA-NeXT (v1.6)", _llava_next, _IMAGES, "image"),
    Family("Qwen2-VL", _qwen2_vl, _VIDEO, "image"),
    Family("Qwen2.5-VL", _qwen2_5_vl, _VIDEO, "image"),
    Family("Qwen3-VL", functools.partial(_qwen3_vl, "Qwen3VL"), _VIDEO, "image"),
    Family("Qwen3-VL-MoE", functools.partial(_qwen3_vl, "Qwen3VLMoe", **EXPERTS), _VIDEO, "image"),
    Family("Gemma 3 (vision)", _gemma3, _IMAGES, "image"),
    Family("PaliGemma", _paligemma, _IMAGES, "image"),
    Family("Idefics 3", _idefics3, _IMAGES, "image"),
]

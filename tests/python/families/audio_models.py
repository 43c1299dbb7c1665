# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Audio and omni families, and encoder-decoders."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from family import Built, Family, Inputs, repeated, to_tensors
from processors import PAD, VOCABULARY, Frames, clip, picture, processor, tokenizer, tone
from transformers.models.whisper.feature_extraction_whisper import WhisperFeatureExtractor
from vision_models import EXPERTS, MROPE, RANGE, qwen_images, qwen_vision, text_sizes

_RATE = 16000
_AUDIO = {
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "num_mel_bins": 16,
    "max_source_positions": 100,
}
_OMNI_TOKENS = {
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}


def _ears() -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(feature_size=16, chunk_length=2)


def _cases(maker: Any, omni: bool = False) -> dict[str, Any]:
    def run(*texts: str, **media: Any) -> Inputs:
        return to_tensors(maker(text=list(texts), padding=True, return_tensors="pt", **media))

    audio = "<|audio_bos|><|AUDIO|><|audio_eos|>"
    first, second = tone(1.0), tone(0.5, pitch=300.0)
    tail = repeated("What is it?", 20)
    cases = {
        "one": lambda: run(f"What is {audio} this sound? Tell me all of it!", audio=[first]),
        "two": lambda: run(f"First {audio} and then {audio} here.", audio=[first, second]),
        "batch": lambda: run(
            f"A longer text, {audio} padded on the left.", f"x{audio}", audio=[first, second]
        ),
        "long": lambda: run(f"Listen to {audio} now. {tail}", audio=[first]),
        "more": lambda: run(f"And this {audio} here?", audio=[second]),
    }
    if omni:
        image, video = (f"<|vision_bos|><|{x}|><|vision_eos|>" for x in ("IMAGE", "VIDEO"))
        cases["mixed"] = lambda: run(
            f"See {image} hear {audio} and watch {video} together.",
            images=[picture(1)],
            videos=[clip(1)],
            audio=[first],
        )
    return cases


def qwen2_audio() -> tuple[Any, Any]:
    """A tiny Qwen2-Audio and its processor."""
    names = ("audio_token", "audio_bos_token", "audio_eos_token")
    tokens = tokenizer(**{name: _OMNI_TOKENS[name] for name in names})
    maker = transformers.Qwen2AudioProcessor(feature_extractor=_ears(), tokenizer=tokens)
    config = transformers.Qwen2AudioConfig(
        text_config=text_sizes(256) | {"model_type": "qwen2"},
        audio_config=_AUDIO | {"init_std": 0.15},
        audio_token_index=tokens.audio_token_id,
    )
    return transformers.Qwen2AudioForConditionalGeneration(config), maker


def _qwen2_audio() -> Built:
    model, maker = qwen2_audio()
    return Built(model, _cases(maker))


def _omni_processor(prefix: str, patch: int) -> Any:
    images = qwen_images(patch)
    return processor(
        getattr(transformers, prefix + "Processor"),
        image_processor=images,
        video_processor=Frames(images),
        feature_extractor=_ears(),
        tokenizer=tokenizer(**_OMNI_TOKENS),
    )


def _qwen2_5_omni() -> Built:
    maker = _omni_processor("Qwen2_5Omni", 14)
    tokens = maker.tokenizer
    config = transformers.Qwen2_5OmniThinkerConfig(
        text_config=text_sizes(256) | {"rope_parameters": MROPE},
        audio_config=_AUDIO | {"n_window": 50, "output_dim": 256, **RANGE},
        vision_config=qwen_vision(256, patch_size=14, window_size=56, fullatt_block_indexes=[1]),
        image_token_index=tokens.image_token_id,
        video_token_index=tokens.video_token_id,
        audio_token_index=tokens.audio_token_id,
        audio_start_token_id=tokens.audio_bos_token_id,
        audio_end_token_id=tokens.audio_eos_token_id,
        vision_start_token_id=tokens.vision_bos_token_id,
        vision_end_token_id=tokens.vision_eos_token_id,
        **RANGE,
    )
    model = transformers.Qwen2_5OmniThinkerForConditionalGeneration(config)
    return Built(model, _cases(maker, omni=True))


def _qwen3_omni() -> Built:
    maker = _omni_processor("Qwen3OmniMoe", 16)
    tokens = maker.tokenizer
    rope = {"rope_parameters": MROPE | {"mrope_interleaved": True}}
    ears = {"n_window": 50, "n_window_infer": 100, "output_dim": 128, "downsample_hidden_size": 16}
    eyes = qwen_vision(128, num_position_embeddings=64, deepstack_visual_indexes=[0])
    config = transformers.Qwen3OmniMoeThinkerConfig(
        text_config=text_sizes() | rope | EXPERTS,
        audio_config=_AUDIO | ears | RANGE,
        vision_config=eyes,
        image_token_id=tokens.image_token_id,
        video_token_id=tokens.video_token_id,
        audio_token_id=tokens.audio_token_id,
        audio_start_token_id=tokens.audio_bos_token_id,
        audio_end_token_id=tokens.audio_eos_token_id,
        vision_start_token_id=tokens.vision_bos_token_id,
        vision_end_token_id=tokens.vision_eos_token_id,
        **RANGE,
    )
    model = transformers.Qwen3OmniMoeThinkerForConditionalGeneration(config)
    return Built(model, _cases(maker, omni=True))


# -- encoder-decoders ------------------------------------------------------------------------------

_SEQ2SEQ = {
    "vocab_size": VOCABULARY,
    "d_model": 128,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "init_std": 0.15,
    "pad_token_id": PAD,
    "bos_token_id": 0,
    "eos_token_id": None,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}


def _decoder_ids(tokens: int, batch: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(2, 250, (batch, tokens), generator=generator)


def _whisper() -> Built:
    sizes = {"num_mel_bins": 16, "max_source_positions": 100, "max_target_positions": 512}
    config = transformers.WhisperConfig(**_SEQ2SEQ, **sizes)
    model = transformers.WhisperForConditionalGeneration(config)
    ears = _ears()

    def run(tokens: int, *sounds: Any) -> Inputs:
        heard = ears(list(sounds), sampling_rate=_RATE, return_tensors="pt")
        ids = _decoder_ids(tokens, len(sounds))
        return {"input_features": heard.input_features, "decoder_input_ids": ids}

    first, second = tone(1.0), tone(0.5, pitch=300.0)
    cases = {
        "one": lambda: run(60, first),
        "batch": lambda: run(60, first, second),
        "long": lambda: run(200, first),
    }
    return Built(model, cases)


def _text_to_text(model: Any) -> Built:
    def run(tokens: int, batch: int) -> Inputs:
        ids = _decoder_ids(40, batch)
        mask = torch.ones_like(ids)
        mask[-1, -7:] = 0  # an encoder is padded on the right
        decoder = _decoder_ids(tokens, batch)
        return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": decoder}

    cases = {
        "one": lambda: run(60, 1),
        "batch": lambda: run(60, 2),
        "long": lambda: run(200, 1),
    }
    return Built(model, cases)


def _bart() -> Built:
    config = transformers.BartConfig(**_SEQ2SEQ, max_position_embeddings=512)
    return _text_to_text(transformers.BartForConditionalGeneration(config))


def _t5gemma() -> Built:
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 24}
    text = text_sizes(96, 4, 2, 64) | layers | {"query_pre_attn_scalar": 64}
    text |= {"attn_logit_softcapping": 5.0}
    config = transformers.T5GemmaConfig(
        encoder=text, decoder=dict(text), vocab_size=VOCABULARY, pad_token_id=PAD, **RANGE
    )
    config.decoder_start_token_id = 1
    return _text_to_text(transformers.T5GemmaForConditionalGeneration(config))


_SOUNDS = ("one", "two", "batch")

AUDIO = [
    Family("Qwen2-Audio", _qwen2_audio, _SOUNDS, "sound"),
    Family("Qwen2.5-Omni (thinker)", _qwen2_5_omni, (*_SOUNDS, "mixed"), "sound"),
    Family("Qwen3-Omni (thinker)", _qwen3_omni, (*_SOUNDS, "mixed"), "sound"),
]
ENCODER_DECODER = [
    Family("Whisper", _whisper, ("one", "batch"), "sound"),
    Family("BART", _bart, ("one", "batch")),
    Family("T5Gemma", _t5gemma, ("one", "batch")),
]

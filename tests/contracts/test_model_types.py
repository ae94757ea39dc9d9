"""Facts about model types that are kept as lists, so that no check of a recipe needs transformers, against transformers."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, PretrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from peftkit.methods.bitfit import SWITCHES, WITHOUT_BIASES
from peftkit.recipe.fit import ENCODER_DECODERS, ENCODERS

MASKED = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
SEQ_2_SEQ = modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
CAUSAL = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
# Among transformers' models from sequence to sequence: these hear, and their text comes from a decoder (or their own class).
AUDIO = {
    "audioflamingo3", "glmasr", "granite_speech", "granite_speech_plus", "moss_transcribe_diarize", "musicflamingo",
    "nemo_speechlm", "qwen2_audio", "qwen3_asr", "seamless_m4t", "seamless_m4t_v2", "vibevoice_asr", "voxtral",
    "voxtral_realtime",
}  # fmt: skip
SWITCHLESS = {"mpt"}  # composed of sections of which none can add biases
LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")


@functools.cache
def default_config(model_type: str) -> PretrainedConfig | None:
    """The default config of a model type; None where there is none."""
    try:
        return CONFIG_MAPPING[model_type]()
    except Exception:  # whatever a config wants that has no default
        return None


def build(config: PretrainedConfig, model_type: str) -> torch.nn.Module | None:
    """The language model of a config with two layers, on the meta device; None where its defaults do not make one."""
    auto = AutoModelForMaskedLM if model_type in MASKED else AutoModelForCausalLM
    auto = AutoModelForSeq2SeqLM if model_type in SEQ_2_SEQ else auto
    two = {name: 2 for name in LAYERS if isinstance(getattr(config, name, None), int)}
    try:
        with torch.device("meta"):
            return auto.from_config(type(config)(**two))
    except Exception:  # models whose own defaults do not go together, or with two layers
        return None


def biases(model: torch.nn.Module) -> list[str]:
    """Trained parameters of this name outside the output layer."""
    return [name for name, _ in model.named_parameters() if name.endswith("bias") and "lm_head" not in name]


def test_the_encoders_are_those_of_transformers_masked_language_models() -> None:
    configs: dict[str, Any] = {name: default_config(name) for name in MASKED}
    assert {name for name, config in configs.items() if not config.is_encoder_decoder} == ENCODERS


def test_the_encoder_decoders_are_those_of_transformers_that_read_text() -> None:
    assert set(SEQ_2_SEQ) - AUDIO == ENCODER_DECODERS
    configs = [default_config(name) for name in ENCODER_DECODERS]
    assert all(config.is_encoder_decoder for config in configs if config is not None)


def test_the_models_without_biases_are_those_that_transformers_builds_without() -> None:
    found = set()
    for name in {*CAUSAL, *SEQ_2_SEQ, *MASKED}:
        config = default_config(name)
        if config is None or (config.sub_configs and name not in SWITCHLESS):
            continue  # of composed models, the switches that add biases lie deeper than a check of config.json looks
        model = build(config, name)
        if model is not None and not biases(model):
            found.add(name)
    assert found == WITHOUT_BIASES


@pytest.mark.parametrize("name", sorted(WITHOUT_BIASES))
def test_no_switch_of_a_config_adds_biases_unseen(name: str) -> None:
    config: Any = default_config(name)
    unseen = [key for key, value in config.to_dict().items() if "bias" in key and value is False and key not in SWITCHES]
    assert unseen == []

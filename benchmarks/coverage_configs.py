"""Tiny random transformers models for `coverage.py`: one for every architecture, from its own configuration class.

No table of models: sizes are set wherever a configuration has a field of a known name, nested configurations included.
An architecture whose fields have to agree in further ways is not built, and reported as such.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import bpfx  # noqa: F401  (torchvision's import may need it)

BATCH, TOKENS, PADDED, IMAGE, WORDS, SAMPLES, FRAMES = 2, 12, 3, 32, 99, 8000, 4
WIDTH, WIDE, LAYERS, HEADS = 32, 64, 2, 4
MOST_PARAMETERS = 30_000_000

# New values of the fields that we know. A smaller value stays as it is.
FIELDS: tuple[tuple[int, str], ...] = (
    (WORDS, "vocab_size text_vocab_size src_vocab_size tgt_vocab_size decoder_vocab_size entity_vocab_size"),
    (
        WIDTH,
        "hidden_size d_model n_embd dim emb_dim embed_dim embedding_size model_dim hidden_dim encoder_hidden_dim "
        "decoder_hidden_size projection_dim entity_emb_size moe_intermediate_size attention_hidden_size "
        "rnn_hidden_size word_embed_proj_dim shared_expert_intermediate_size expert_ffn_hidden_size encoder_width "
        "moe_shared_expert_intermediate_size kv_lora_rank q_lora_rank lru_width hidden_size_per_layer_input "
        "out_hidden_size encoder_hidden_size text_hidden_size output_hidden_size fpn_hidden_size",
    ),
    (
        WIDE,
        "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff n_inner d_inner ffn_hidden_size mlp_dim "
        "ffn_intermediate_size max_position_embeddings n_positions n_ctx max_seq_len max_source_positions "
        "max_target_positions seq_length encoder_max_position_embeddings decoder_max_position_embeddings",
    ),
    (
        LAYERS,
        "num_hidden_layers n_layer n_layers num_layers num_decoder_layers num_encoder_layers encoder_layers depth "
        "decoder_layers num_blocks num_hidden_groups inner_group_num num_experts_per_tok num_experts_per_token "
        "moe_top_k top_k_experts moe_topk num_key_value_heads num_kv_heads n_group topk_group mamba_n_groups "
        "n_groups linear_num_key_heads num_codebooks moe_k window_size",
    ),
    (
        HEADS,
        "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_experts "
        "num_decoder_attention_heads num_encoder_attention_heads mamba_n_heads num_local_experts n_routed_experts "
        "moe_num_experts linear_num_value_heads sliding_window mamba_num_heads n_mamba_heads",
    ),
    (
        8,
        "head_dim d_kv kv_channels qk_rope_head_dim qk_nope_head_dim v_head_dim patch_size qk_head_dim mamba_d_state "
        "linear_key_head_dim linear_value_head_dim mamba_head_dim state_size attention_head_size rotary_dim "
        "mamba_d_head mamba_headdim",
    ),
    (IMAGE, "image_size crop_size pretrain_image_size"),
    (1, "expand mamba_expand"),
)
VALUES = {name: value for value, names in FIELDS for name in names.split()}
# Set even where the default is None, which stands for something derived from larger sizes, or for nothing.
NEEDED = {"head_dim": WIDTH // HEADS, "num_key_value_heads": HEADS, "vocab_size": WORDS, "num_experts_per_tok": 2}
TOKEN_IDS = {"pad_token_id": 0, "bos_token_id": 1, "decoder_start_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}
# Which of two layers is of which kind, in the words that configurations have for it.
PATTERNS: dict[str, Any] = {
    "attention_types": [[["global", "local"], 1]],
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "attn_layer_indices": [1],
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "hybrid_override_pattern": "M*",
}
# Lists with an entry for every stage keep their length.
STAGES: dict[str, Callable[[int], int]] = {
    "depths": lambda k: 1,
    "layers": lambda k: 1,
    "encoder_depths": lambda k: 1,
    "hidden_sizes": lambda k: WIDTH * 2**k,
    "embed_dims": lambda k: WIDTH * 2**k,
    "num_heads": lambda k: 2**k,
    "num_attention_heads": lambda k: 2**k,
}
PER_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types")

# What a model is trained for, by the class that transformers builds it with; an architecture has the first of its own.
TASKS = {
    "causal language model": "AutoModelForCausalLM",
    "masked language model": "AutoModelForMaskedLM",
    "sequence to sequence": "AutoModelForSeq2SeqLM",
    "speech to text": "AutoModelForSpeechSeq2Seq",
    "speech recognition (CTC)": "AutoModelForCTC",
    "image classification": "AutoModelForImageClassification",
    "semantic segmentation": "AutoModelForSemanticSegmentation",
    "audio classification": "AutoModelForAudioClassification",
    "video classification": "AutoModelForVideoClassification",
    "image and text, contrastive": "AutoModelForZeroShotImageClassification",
    "sequence classification": "AutoModelForSequenceClassification",
    "masked image modelling": "AutoModelForMaskedImageModeling",
}


def architectures() -> dict[str, str]:
    """The task of every architecture (transformers calls it a model type) that has one of ours."""
    import transformers

    found: dict[str, str] = {}
    for task, auto in TASKS.items():
        for config_class in getattr(transformers, auto)._model_mapping:
            found.setdefault(config_class.model_type, task)
    return found


def build(kind: str, task: str) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
    """A tiny model in train mode, and the batches to try with it.

    Raises:
        Exception: anything; the configuration does not take these sizes.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class, auto = CONFIG_MAPPING[kind], getattr(transformers, TASKS[task])
    config = config_class(**changes(config_class()))
    config.architectures = config.architectures or []
    for name, value in TOKEN_IDS.items():
        if getattr(config, name, None) is None:
            setattr(config, name, value)
    with contextlib.suppress(RuntimeError, NotImplementedError), torch.device("meta"):  # not all can be built there
        count = sum(p.numel() for p in auto.from_config(copy.deepcopy(config)).parameters())
        if count > MOST_PARAMETERS:
            raise ValueError(f"the configuration stays large: {count:,} parameters")
    model = auto.from_config(config).float().train()
    for batch in batches(model, task):
        yield model, batch


def changes(config: Any) -> dict[str, Any]:
    """The fields of a configuration that get smaller, and their new values."""
    found: dict[str, Any] = {}
    fields = vars(config)
    kinds = {name: list(dict.fromkeys(fields[name])) for name in PER_LAYER if fields.get(name)}
    for of_layers in kinds.values():
        if of_layers == ["linear_attention"]:
            of_layers.append("full_attention")  # a hybrid whose default has none
    count = max(LAYERS, *map(len, kinds.values()), 0)
    for name, value in fields.items():
        if name in PATTERNS and value is not None:
            found[name] = PATTERNS[name]
        elif name in TOKEN_IDS and isinstance(value, int):
            found[name] = TOKEN_IDS[name]
        elif name in STAGES and isinstance(value, (list, tuple)) and all(isinstance(v, int) for v in value):
            found[name] = type(value)(STAGES[name](k) for k in range(len(value)))
        elif name in kinds:
            found[name] = (kinds[name] * count)[:count]
        elif hasattr(value, "model_type") and hasattr(value, "to_dict"):
            found[name] = type(value)(**changes(value))
        elif name in NEEDED and value is None:
            found[name] = NEEDED[name]
        elif name in VALUES and type(value) is int and value > VALUES[name]:
            found[name] = VALUES[name]
    if "num_hidden_layers" in found:
        found["num_hidden_layers"] = count
    if "num_key_value_heads" in found and fields["num_key_value_heads"] == fields.get("num_attention_heads"):
        found["num_key_value_heads"] = HEADS
    if "qk_rope_head_dim" in fields:  # these follow from their two parts
        found = {name: value for name, value in found.items() if name not in ("head_dim", "qk_head_dim")}
    return found


def batches(model: Any, task: str) -> Iterator[dict[str, Any]]:
    """Batches as this model might take them, the likelier first."""
    config, main = model.config, model.main_input_name
    parameters = inspect.signature(model.forward).parameters
    words = torch.randint(3, _first(config, "vocab_size", default=WORDS), (BATCH, TOKENS))
    mask = torch.ones(BATCH, TOKENS, dtype=torch.int64)
    mask[-1, -PADDED:] = 0
    masked = {"attention_mask": mask} if "attention_mask" in parameters else {}
    labels = _labels(config, task, words.masked_fill(mask == 0, -100))
    if task == "image and text, contrastive":
        yield {"input_ids": words, **masked, "pixel_values": _image(config), "return_loss": True}
        return
    if main == "input_ids":
        yield {"input_ids": words, **masked, **labels}
        return
    for values in _inputs(config, main, task):
        given = {main: values, **labels}
        if "decoder_input_ids" in parameters and "labels" not in parameters:
            given["decoder_input_ids"] = words
        yield {key: value for key, value in given.items() if key in parameters}


def _inputs(config: Any, main: str, task: str) -> Iterator[Tensor]:
    if main == "pixel_values" and task == "video classification":
        frames, size = _first(config, "num_frames", default=FRAMES), _side(config)
        yield torch.randn(BATCH, frames, 3, size, size)
    elif main == "pixel_values":
        for size in dict.fromkeys((_side(config), 64, 128, 224)):
            yield torch.randn(BATCH, _first(config, "num_channels", default=3), size, size)
    elif main == "input_values":
        yield torch.randn(BATCH, SAMPLES)
        yield torch.randn(
            BATCH, _first(config, "max_length", default=FRAMES), _first(config, "num_mel_bins", default=80)
        )
    else:
        mels = _first(config, "num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", default=80)
        yield torch.randn(BATCH, mels, 2 * _first(config, "max_source_positions", default=WIDE))
        yield torch.randn(BATCH, 2 * WIDE, mels)


def _labels(config: Any, task: str, words: Tensor) -> dict[str, Any]:
    classes = torch.randint(0, config.num_labels, (BATCH,))
    if "classification" in task:
        return {"labels": classes}
    if task == "speech recognition (CTC)":
        return {"labels": words[:, :4].clamp_min(3)}
    if task == "semantic segmentation":
        size = _side(config)
        return {"labels": torch.randint(0, config.num_labels, (BATCH, size, size))}
    if task == "masked image modelling":
        patches = (_side(config) // _first(config, "patch_size", default=8)) ** 2
        return {"bool_masked_pos": torch.rand(BATCH, patches) < 0.5}
    return {"labels": words}


def _image(config: Any) -> Tensor:
    vision = getattr(config, "vision_config", config)
    return torch.randn(BATCH, _first(vision, "num_channels", default=3), _side(vision), _side(vision))


def _side(config: Any) -> int:
    size = getattr(config, "image_size", None) or getattr(getattr(config, "vision_config", None), "image_size", None)
    size = size[0] if isinstance(size, (list, tuple)) else size
    return size if isinstance(size, int) else 2 * IMAGE


def _first(config: Any, *names: str, default: int) -> int:
    """The first of these fields that is set, in the configuration or in its text part."""
    for place in (config, getattr(config, "text_config", None)):
        for name in names:
            value = getattr(place, name, None)
            if isinstance(value, int):
                return value
    return default

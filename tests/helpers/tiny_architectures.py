"""Builds a tiny random model of each architecture that transformers has for causal language modelling.

PYTHONPATH=src python tests/helpers/tiny_architectures.py > docs/architectures.md
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from selfteach.errors import EngineError
from selfteach.models.plain_pass import plain_logits
from selfteach.models.policy import Policy, Schedule
from selfteach.rollout.decoding.prompt_layout import proven_layout

WINDOW = 8
CONTEXT = 256
_SIZES: dict[str, Any] = dict.fromkeys(
    ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers",
     "num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads",
     "num_experts", "num_local_experts", "n_routed_experts", "linear_num_value_heads",
     "mamba_n_heads", "mamba_num_heads", "rotary_dim", "hidden_size_per_layer_input"), 4,
) | dict.fromkeys(
    ("hidden_size", "n_embd", "d_model", "block_dim", "attention_hidden_size", "embedding_size",
     "word_embed_proj_dim", "lru_width"), 32,
) | dict.fromkeys(
    ("intermediate_size", "ffn_dim", "decoder_ffn_dim", "d_ff", "ffn_hidden_size"), 48,
) | dict.fromkeys(
    ("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size",
     "q_lora_rank", "kv_lora_rank", "mamba_d_head", "mamba_head_dim"), 16,
) | dict.fromkeys(
    ("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "d_kv", "state_size",
     "mamba_d_state", "ssm_state_size", "linear_key_head_dim", "linear_value_head_dim",
     "chunk_size"), 8,
) | dict.fromkeys(
    ("sliding_window", "attention_chunk_size", "attention_window_size", "window_size",
     "index_topk"), WINDOW,
) | dict.fromkeys(
    ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), CONTEXT,
) | dict.fromkeys(
    ("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace", "num_kv_shared_layers",
     "n_groups", "mamba_n_groups", "expand", "bos_token_id"), 1,
) | dict.fromkeys(
    ("num_key_value_heads", "num_experts_per_tok", "linear_num_key_heads", "eos_token_id"), 2,
) | {
    "vocab_size": 128, "vocab_size_per_layer_input": 128, "conv_L_cache": 3, "pad_token_id": 0,
}  # fmt: skip
_OPTIONAL = {"q_lora_rank", "num_experts", "n_routed_experts", "head_dim"}
"""Sizes that stay absent where an architecture's default has none."""
_EXTRA: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "dots3_note": {"num_key_value_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1, "use_mamba_kernels": False,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "ministral": {"head_dim": 8},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
MOST_WEIGHTS = 3_000_000


def tiny_model(family: str, **settings: Any) -> PreTrainedModel:
    """Build a model of four layers with large random weights, so that all that attention leaves out
    shows. Raises what transformers raises for an architecture that cannot be made so small."""
    whole = AutoConfig.for_model(family)
    text = whole.get_text_config()
    have = text.to_dict()
    aliases: dict[str, str] = getattr(type(text), "attribute_map", {})
    values = {
        name: value
        for name, value in _SIZES.items()
        if (name in have or name in aliases) and not (name in _OPTIONAL and have.get(name) is None)
    }
    for name, other in aliases.items():
        if name in values and other in values:
            del values[name]
    if have.get("layer_types"):
        kinds = list(dict.fromkeys(have["layer_types"]))
        values["layer_types"] = [kinds[layer % len(kinds)] for layer in range(4)]
    if "qk_rope_head_dim" in have:  # latent attention: one size of heads
        values.pop("head_dim", None)
        values["num_key_value_heads"] = 4
    values |= _EXTRA.get(family, {}) | settings

    def build() -> PreTrainedModel:
        config = type(text)(**values)
        try:
            return AutoModelForCausalLM.from_config(config)
        except ValueError:  # only the multimodal configuration has a causal language model
            return AutoModelForCausalLM.from_config(type(whole)(text_config=config))

    with torch.device("meta"):
        if sum(weight.numel() for weight in build().parameters()) > MOST_WEIGHTS:
            raise ValueError(f"{family} has parts whose sizes are not known here")
    torch.manual_seed(0)
    model = build()
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if weight.ndim >= 2:
            embeds = "emb" in name or "wte" in name
            scale = 1.0 if embeds else 0.6 / max(1, weight.shape[-1]) ** 0.5
            weight.data = scale * torch.randn(weight.shape, generator=generator)
    return model.eval().float()


def outcomes() -> Iterator[tuple[str, str, str]]:
    """Yield each family with how it samples and how it is scored, or why it is refused."""
    for family in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        try:
            model = tiny_model(family)
            with torch.no_grad():
                plain_logits(model, range(3, 15))
        except Exception:  # configurations and models raise anything
            yield family, "not tried", ""
            continue
        try:
            policy = Policy(model, Schedule(1e-3))
            layout = proven_layout(model, pad_id=0, max_length=CONTEXT)
        except EngineError as error:
            yield family, "refused", " ".join(str(error).split()[1:])
            continue
        saved = [
            name
            for name, used in (
                ("tree", policy.uses_tree_attention), ("shared prefix", policy.shares_prefixes)
            )
            if used
        ]  # fmt: skip
        yield family, layout, " and ".join(saved) or "sequence by sequence"


def page() -> Iterator[str]:
    """Yield the lines of docs/architectures.md."""
    rows = list(outcomes())
    groups: dict[tuple[str, str], list[str]] = {}
    for family, sampling, scoring in rows:
        groups.setdefault((sampling, scoring), []).append(family)
    yield from INTRODUCTION.format(count=len(rows), version=transformers.__version__).splitlines()
    yield "| sampling | scoring | architectures |"
    yield "|---|---|---|"
    order = ["shared_prefix", "left_padded", "equal_lengths", "uncached", "refused", "not tried"]
    for (sampling, scoring), families in sorted(groups.items(), key=lambda g: order.index(g[0][0])):
        yield f"| {sampling} | {scoring} | {', '.join(families)} |"


INTRODUCTION = """\
# Architectures

When a run is built, its model proves on a few tokens that it samples and is scored as in its plain
pass: one sequence, no cache, no padding (`models.plain_pass`, `rollout.decoding.prompt_layout`).
Windows that the run's sequences reach past are shortened for that, so that a few tokens reach past
them too. What does not agree is not used, and a line says so; a model for which nothing can agree is
refused.

Sampling, from fast to slow:

- `shared_prefix`: the prefix that all prompts share is run once, the rest is padded on the left;
- `left_padded`: whole prompts are padded on the left. Sliding windows need it: padding inside a prompt
  would use them up;
- `equal_lengths`: only prompts of equal lengths are sampled side by side, for layers that read padding;
- `uncached`: a pass over all tokens for each new one. Right, and slow.

In scoring and training, a `tree` computes each prefix that sequences share once, a `shared prefix` only
the one that all share; `sequence by sequence` computes none together. Rotary embeddings that change
with a sequence's length (`dynamic`, `longrope`) are used up to the original length only; a longer
`train.max_length` is refused.

Below are the outcomes of the {count} architectures for causal language modelling in transformers
{version}, each as a random model of four layers (`tests/helpers/tiny_architectures.py` writes this
page; a slow test repeats it). *Not tried* are those that cannot be made small without knowing more
about them; at a run's build they prove themselves like the others.

"""

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    sys.stdout.writelines(f"{line}\n" for line in page())

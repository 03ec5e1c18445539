"""Decodes one token per row with Llama-like models, without the overhead of passes of any length.

transformers' modules are made for passes of many tokens: on a small model most of a one-token pass is
spent around the matrix products, and a cache that grows by copying costs as much again. Tests compare
the logits with those of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

from selfteach.models import matmul
from selfteach.models.plain_pass import backbone_of
from selfteach.models.prefix_cache import States
from selfteach.rollout.decoding.forward import PrefilledPrompts

BLOCK = 32
"""The cache grows by at least this many tokens."""
MAX_FUSED_WEIGHTS = 4_000_000
"""Models with at most this many weights in their layers run with concatenated copies of them."""
MAX_PACKED_WEIGHTS = 400_000_000
"""Up to this many weights, the head's included, the copies are packed on a CPU (`matmul`)."""

Linear = Callable[[Tensor], Tensor]
MakeLinear = Callable[[Tensor, Tensor | None], Linear]
"""From a weight and a bias to the function that applies them to rows."""


class LlamaDecoder:
    """Decodes with Llama-like models, with the model's weights.

    Keys and values stay where they are: a row that goes on is not moved, and a row is copied only if
    it branches off another or fills the place of a row that has ended. In float32 the prefix that all
    prompts share is stored once, and all rows attend to it in one matrix product.
    """

    def __init__(
        self, causal: PreTrainedModel, prompts: PrefilledPrompts, completions: int
    ) -> None:
        backbone: Any = backbone_of(causal)
        self._embed = backbone.embed_tokens
        self._rotary = backbone.rotary_emb
        cached: list[Any] = prompts.cache.layers
        first: Tensor = cached[0].keys
        dtype, autocast = first.dtype, torch.is_autocast_enabled(first.device.type)
        if autocast:
            dtype = torch.get_autocast_dtype(first.device.type)
        self._exact = dtype in (torch.float32, torch.float64)
        fused = _fused_linear(causal, completions) if self._exact and not autocast else None
        self._layers = [_Layer(layer, fused) for layer in backbone.layers]
        self._head = _norm_linear(backbone.norm, [causal.get_output_embeddings()], fused)
        shared = prompts.shared if self._exact else 0
        self._shared = [
            (layer.keys[0, :, :shared], layer.values[0, :, :shared]) for layer in cached
        ]
        num_prompts, heads, width, size = first.shape
        self._used, self._steps = width - shared, 0
        self._cache = first.new_empty(
            (len(cached), 2, completions, heads, self._used + BLOCK, size), dtype=dtype
        )
        for at, layer in enumerate(cached):
            for kind, states in enumerate((layer.keys, layer.values)):
                self._cache[at, kind, :num_prompts, :, : self._used] = states[:, :, shared:]
        self._position_R, self._angles = prompts.lengths_Q, first.new_empty(0)
        self._bias_RT: Tensor | None = None
        if prompts.mask_QT is not None:
            hidden = prompts.mask_QT[:, shared:] == 0
            self._bias_RT = first.new_zeros(hidden.shape, dtype=dtype).masked_fill(
                hidden, -torch.inf
            )

    @staticmethod
    def supports(causal: PreTrainedModel) -> bool:
        """Return True for models with Llama's layers and full causal attention in all of them."""
        config = causal.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
        return (
            type(backbone_of(causal)) in (LlamaModel, Qwen2Model, Qwen3Model)
            and kinds == {"full_attention"}
            and rope in ("default", "linear", "llama3", "yarn")
        )

    def __call__(self, parent_R: np.ndarray, token_R: Tensor) -> Tensor:
        """Run one step; see `Decoder`."""
        self._rearrange(parent_R)
        x_RH = self._embed(token_R)
        rotary = self._rotary_angles(x_RH)
        for at, layer in enumerate(self._layers):
            attended_RH = self._attend(at, layer, x_RH, rotary)
            x_RH = layer.out(attended_RH, x_RH)
            x_RH = layer.feed_forward(x_RH)
        self._used, self._steps = self._used + 1, self._steps + 1
        self._position_R = self._position_R + 1
        return self._head(x_RH)

    def states(self, row: int) -> States:
        """Return a row's keys and values, see `CachedDecoder`."""
        tokens = self._cache.new_ones(self._used, dtype=torch.bool)
        if self._bias_RT is not None:
            tokens[: self._bias_RT.shape[1]] = self._bias_RT[row] == 0
        rows = self._cache[:, :, row, :, : self._used][..., tokens, :]
        return tuple(
            (torch.cat([shared[0], keys], 1), torch.cat([shared[1], values], 1))
            for shared, (keys, values) in zip(self._shared, rows, strict=True)
        )

    def _rearrange(self, parent_R: np.ndarray) -> None:
        """Reorder the rows, and make room for one more token."""
        rows, before = len(parent_R), len(self._position_R)
        moved = (parent_R != np.arange(rows)).nonzero()[0]
        if len(moved):
            to, source = (
                torch.from_numpy(x).to(self._cache.device) for x in (moved, parent_R[moved])
            )
            used = self._cache[:, :, :, :, : self._used]
            used.index_copy_(2, to, used.index_select(2, source))
        if len(moved) or rows < before:
            self._position_R = self._position_R[parent_R.tolist()]
            self._bias_RT = self._bias_RT[parent_R.tolist()] if self._bias_RT is not None else None
        room = self._cache.shape[4]
        if self._used == room:
            shape = list(self._cache.shape)
            shape[4] = room + max(BLOCK, room // 2)
            larger = self._cache.new_empty(shape)
            larger[:, :, :rows, :, :room] = self._cache[:, :, :rows]
            self._cache = larger

    def _rotary_angles(self, x_RH: Tensor) -> tuple[Tensor, Tensor]:
        """Return each row's cosines and sines [R, 1, S]; the first half of the sines is negated, so
        that rolling a head by half its size does the rest of the rotation."""
        if self._steps % BLOCK == 0:
            ahead = int(self._position_R.max()) + BLOCK + 1
            position = torch.arange(ahead, device=x_RH.device)[None]
            cos, sin = (angle[0] for angle in self._rotary(x_RH, position))
            half = sin.shape[-1] // 2
            self._angles = torch.stack([cos, torch.cat([-sin[:, :half], sin[:, half:]], -1)])
        cos, sin = self._angles[:, self._position_R, None]
        return cos, sin

    def _attend(
        self, at: int, layer: _Layer, x_RH: Tensor, rotary: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Append the rows' keys and values to the cache; return the attention's output [R, H]."""
        rows, used = len(x_RH), self._used
        heads, size = self._cache.shape[3], self._cache.shape[5]
        qkv_RES = layer.qkv(x_RH).view(rows, -1, size)  # E: heads of queries, keys, values
        queries = qkv_RES.shape[1] - 2 * heads
        rotated = qkv_RES[:, : queries + heads]
        layer.norm_heads(rotated, queries)
        swapped = rotated.roll(size // 2, -1)
        rotated.mul_(rotary[0]).addcmul_(swapped, rotary[1])
        cache = self._cache[at, :, :rows]
        cache[:, :, :, used] = qkv_RES[:, queries:].view(rows, 2, heads, size).transpose(0, 1)
        keys, values = cache.flatten(1, 2)[:, :, : used + 1].unbind()  # [R x K, T, S]
        q_RKGS = qkv_RES[:, :queries].view(rows, heads, -1, size)
        out = self._attention(q_RKGS, keys, values, self._shared[at], layer.scale)
        return out.reshape(rows, -1)

    def _attention(
        self,
        q_RKGS: Tensor,
        keys: Tensor,
        values: Tensor,
        shared: tuple[Tensor, Tensor],
        scale: float,
    ) -> Tensor:
        """Attend from one token per row to [shared | the row's cache], in the order of the queries."""
        rows, heads, group, size = q_RKGS.shape
        if not self._exact:
            keys, values = (x.unflatten(0, (rows, heads)) for x in (keys, values))
            bias = self._bias_RT
            if bias is not None:
                bias = F.pad(bias, (0, keys.shape[2] - bias.shape[1]))[:, None, None]
            return F.scaled_dot_product_attention(
                q_RKGS.to(keys.dtype), keys, values, attn_mask=bias, scale=scale
            )
        q_NGS = q_RKGS.reshape(-1, group, size)
        score = torch.bmm(q_NGS, keys.transpose(1, 2)).mul_(scale)
        if self._bias_RT is not None:
            padded = score.view(rows, heads, group, -1)[..., : self._bias_RT.shape[1]]
            padded += self._bias_RT[:, None, None]
        prefix = shared[0].shape[1]
        if not prefix:
            return torch.bmm(score.softmax(-1), values)
        q_KMS = q_RKGS.transpose(0, 1).reshape(heads, rows * group, size)
        prefix_score = torch.bmm(q_KMS, shared[0].transpose(1, 2)).mul_(scale)
        prefix_score = prefix_score.view(heads, rows, group, prefix).transpose(0, 1).flatten(0, 1)
        prob = torch.cat([prefix_score, score], -1).softmax(-1)
        from_cache = torch.bmm(prob[..., prefix:], values).view(q_RKGS.shape)
        prefix_prob = prob[..., :prefix].unflatten(0, (rows, heads)).transpose(0, 1)
        from_prefix = torch.bmm(prefix_prob.reshape(heads, rows * group, prefix), shared[1])
        return from_cache + from_prefix.view(heads, rows, group, size).transpose(0, 1)


class _Layer:
    """Applies one layer: its modules, or concatenated copies of their weights where that is faster."""

    def __init__(self, layer: Any, fused: MakeLinear | None) -> None:
        attn, mlp = layer.self_attn, layer.mlp
        self._head_norms = getattr(attn, "q_norm", None), getattr(attn, "k_norm", None)
        self._act, self.scale = mlp.act_fn, attn.scaling
        attn_norm, mlp_norm = layer.input_layernorm, layer.post_attention_layernorm
        self.qkv = _norm_linear(attn_norm, [attn.q_proj, attn.k_proj, attn.v_proj], fused)
        self._gate_up = _norm_linear(mlp_norm, [mlp.gate_proj, mlp.up_proj], fused)
        self.out, self._down = (_add_linear(m, fused) for m in (attn.o_proj, mlp.down_proj))

    def norm_heads(self, rotated_RES: Tensor, queries: int) -> None:
        """Apply Qwen3's norms of queries and keys, in place."""
        q_norm, k_norm = self._head_norms
        if q_norm is not None and k_norm is not None:
            rotated_RES[:, :queries] = q_norm(rotated_RES[:, :queries])
            rotated_RES[:, queries:] = k_norm(rotated_RES[:, queries:])

    def feed_forward(self, x_RH: Tensor) -> Tensor:
        """Add the MLP's output to the residual stream."""
        gate, up = self._gate_up(x_RH).chunk(2, -1)
        return self._down(self._act(gate) * up, x_RH)


def _fused_linear(causal: PreTrainedModel, rows: int) -> MakeLinear | None:
    """Return how to multiply with copies of weights; None if the modules are as fast themselves."""
    backbone: Any = backbone_of(causal)
    head: Any = causal.get_output_embeddings()
    weights = sum(weight.numel() for weight in backbone.layers.parameters())
    if weights <= MAX_FUSED_WEIGHTS:
        return lambda weight, bias: lambda x: F.linear(x, weight, bias)
    if weights + head.weight.numel() > MAX_PACKED_WEIGHTS or not matmul.can_pack(head.weight):
        return None
    return lambda weight, bias: matmul.pack(weight, bias, rows)


def _norm_linear(norm: Any, modules: list[Any], fused: MakeLinear | None) -> Linear:
    """Return the function that applies the norm, then the linear modules, and concatenates."""
    if fused is None or not all(type(module) is nn.Linear for module in modules):
        return lambda x: torch.cat([module(n) for n in [norm(x)] for module in modules], -1)
    weight = torch.cat([module.weight for module in modules]) * norm.weight
    bias = None
    if modules[0].bias is not None:
        bias = torch.cat([module.bias for module in modules])
    epsilon, width = weight.new_tensor(norm.variance_epsilon), weight.shape[1]
    linear = fused(weight, bias)

    def norm_linear(x_RH: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x_RH, dim=-1, keepdim=True)
        scale = torch.addcmul(epsilon, length, length, value=1 / width).rsqrt_()
        return linear(x_RH * scale)

    return norm_linear


def _add_linear(module: Any, fused: MakeLinear | None) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the function (x, residual) -> residual + module(x)."""
    linear = module
    if fused is not None and type(module) is nn.Linear:
        linear = fused(module.weight, module.bias)
    return lambda x, residual: residual + linear(x)

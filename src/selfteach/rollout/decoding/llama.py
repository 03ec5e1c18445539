"""One token per row through Llama and its like, without what a pass of many tokens needs.

transformers' modules are made for passes of any length: on a small model most of a pass of one token is
spent around the products of matrices, and a cache that grows by copying costs as much again. Tests hold
these passes against the model's own.
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
from selfteach.rollout.decoding.forward import Prompts

BLOCK = 32
"""Storage grows by at least this many tokens."""
JOINED = 4_000_000
"""Models whose layers have at most so many weights are run with copies that are joined."""
PACKED = 400_000_000
"""Up to so many, the head's among them, the copies are packed on a processor (`products`)."""

Product = Callable[[Tensor], Tensor]
Joined = Callable[[Tensor, Tensor | None], Product]
"""From a weight and a bias to their product with rows."""


class LlamaPasses:
    """Passes of Llama and its like, with the model's own weights.

    Keys and values stand where they are: a row that goes on stays, and only what branches off it or
    takes the place of a row that has ended is copied. In float32 what all prompts begin with is kept
    once, and all rows look at it in one product of matrices.
    """

    def __init__(self, causal: PreTrainedModel, prompts: Prompts, answers: int) -> None:
        backbone: Any = getattr(causal, causal.base_model_prefix)
        self._embed = backbone.embed_tokens
        self._rotary = backbone.rotary_emb
        cached: list[Any] = prompts.cache.layers
        first: Tensor = cached[0].keys
        kept, whole = first.dtype, torch.is_autocast_enabled(first.device.type)
        if whole:
            kept = torch.get_autocast_dtype(first.device.type)
        self._exact = kept in (torch.float32, torch.float64)
        joined = _joined(causal, answers) if self._exact and not whole else None
        self._layers = [_Layer(layer, joined) for layer in backbone.layers]
        self._head = _behind(backbone.norm, [causal.get_output_embeddings()], joined)
        shared = prompts.shared if self._exact else 0
        self._shared = [
            (layer.keys[0, :, :shared], layer.values[0, :, :shared]) for layer in cached
        ]
        questions, heads, width, size = first.shape
        self._used, self._passes = width - shared, 0
        self._kept = first.new_empty(
            (len(cached), 2, answers, heads, self._used + BLOCK, size), dtype=kept
        )
        for at, layer in enumerate(cached):
            for kind, states in enumerate((layer.keys, layer.values)):
                self._kept[at, kind, :questions, :, : self._used] = states[:, :, shared:]
        self._position_R, self._turns = prompts.lengths_Q, first.new_empty(0)
        self._bias_RT: Tensor | None = None
        if prompts.mask_QT is not None:
            hidden = prompts.mask_QT[:, shared:] == 0
            self._bias_RT = first.new_zeros(hidden.shape, dtype=kept).masked_fill(
                hidden, -torch.inf
            )

    @staticmethod
    def fits(causal: PreTrainedModel) -> bool:
        """True for models whose layers are Llama's and see everything before them."""
        config = causal.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
        return (
            type(getattr(causal, causal.base_model_prefix)) in (LlamaModel, Qwen2Model, Qwen3Model)
            and kinds == {"full_attention"}
            and rope in ("default", "linear", "llama3", "yarn")
        )

    def __call__(self, parent_R: np.ndarray, token_R: Tensor) -> Tensor:
        """See `Passes`."""
        self._rearrange(parent_R)
        x_RH = self._embed(token_R)
        turn = self._turn(x_RH)
        for at, layer in enumerate(self._layers):
            told_RH = self._attend(at, layer, x_RH, turn)
            x_RH = layer.out(told_RH, x_RH)
            x_RH = layer.think(x_RH)
        self._used, self._passes = self._used + 1, self._passes + 1
        self._position_R = self._position_R + 1
        return self._head(x_RH)

    def _rearrange(self, parent_R: np.ndarray) -> None:
        """Put rows in their places, and see that there is room for one token more."""
        rows, before = len(parent_R), len(self._position_R)
        moved = (parent_R != np.arange(rows)).nonzero()[0]
        if len(moved):
            to, source = (
                torch.from_numpy(x).to(self._kept.device) for x in (moved, parent_R[moved])
            )
            used = self._kept[:, :, :, :, : self._used]
            used.index_copy_(2, to, used.index_select(2, source))
        if len(moved) or rows < before:
            self._position_R = self._position_R[parent_R.tolist()]
            self._bias_RT = self._bias_RT[parent_R.tolist()] if self._bias_RT is not None else None
        room = self._kept.shape[4]
        if self._used == room:
            shape = list(self._kept.shape)
            shape[4] = room + max(BLOCK, room // 2)
            larger = self._kept.new_empty(shape)
            larger[:, :, :rows, :, :room] = self._kept[:, :, :rows]
            self._kept = larger

    def _turn(self, x_RH: Tensor) -> tuple[Tensor, Tensor]:
        """Each row's rotary angles [R, 1, S], the sine with the sign that exchanged halves need."""
        if self._passes % BLOCK == 0:
            ahead = int(self._position_R.max()) + BLOCK + 1
            position = torch.arange(ahead, device=x_RH.device)[None]
            cos, sin = (angle[0] for angle in self._rotary(x_RH, position))
            half = sin.shape[-1] // 2
            self._turns = torch.stack([cos, torch.cat([-sin[:, :half], sin[:, half:]], -1)])
        cos, sin = self._turns[:, self._position_R, None]
        return cos, sin

    def _attend(self, at: int, layer: _Layer, x_RH: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        rows, used = len(x_RH), self._used
        heads, size = self._kept.shape[3], self._kept.shape[5]
        qkv_RES = layer.qkv(x_RH).view(rows, -1, size)  # E: heads of queries, keys, values
        queries = qkv_RES.shape[1] - 2 * heads
        turning = qkv_RES[:, : queries + heads]
        layer.norm_heads(turning, queries)
        exchanged = turning.roll(size // 2, -1)
        turning.mul_(turn[0]).addcmul_(exchanged, turn[1])
        kept = self._kept[at, :, :rows]
        kept[:, :, :, used] = qkv_RES[:, queries:].view(rows, 2, heads, size).transpose(0, 1)
        keys, values = kept.flatten(1, 2)[:, :, : used + 1].unbind()  # [R x K, T, S]
        q_RKGS = qkv_RES[:, :queries].view(rows, heads, -1, size)
        return self._looked(q_RKGS, keys, values, self._shared[at], layer.scale).reshape(rows, -1)

    def _looked(
        self,
        q_RKGS: Tensor,
        keys: Tensor,
        values: Tensor,
        shared: tuple[Tensor, Tensor],
        scale: float,
    ) -> Tensor:
        """Attention of one token per row over [shared | its own], in the order of the queries."""
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
        common = shared[0].shape[1]
        if not common:
            return torch.bmm(score.softmax(-1), values)
        q_KMS = q_RKGS.transpose(0, 1).reshape(heads, rows * group, size)
        ahead = torch.bmm(q_KMS, shared[0].transpose(1, 2)).mul_(scale)
        ahead = ahead.view(heads, rows, group, common).transpose(0, 1).flatten(0, 1)
        share = torch.cat([ahead, score], -1).softmax(-1)
        told = torch.bmm(share[..., common:], values).view(q_RKGS.shape)
        ahead = share[..., :common].unflatten(0, (rows, heads)).transpose(0, 1)
        early = torch.bmm(ahead.reshape(heads, rows * group, common), shared[1])
        return told + early.view(heads, rows, group, size).transpose(0, 1)


class _Layer:
    """One layer's modules, or copies of their weights, joined, where that saves more than it costs."""

    def __init__(self, layer: Any, joined: Joined | None) -> None:
        attn, mlp = layer.self_attn, layer.mlp
        self._head_norms = getattr(attn, "q_norm", None), getattr(attn, "k_norm", None)
        self._act, self.scale = mlp.act_fn, attn.scaling
        before, between = layer.input_layernorm, layer.post_attention_layernorm
        self.qkv = _behind(before, [attn.q_proj, attn.k_proj, attn.v_proj], joined)
        self._gate_up = _behind(between, [mlp.gate_proj, mlp.up_proj], joined)
        self.out, self._down = _added(attn.o_proj, joined), _added(mlp.down_proj, joined)

    def norm_heads(self, turning_RES: Tensor, queries: int) -> None:
        """Qwen3's norms of queries and keys, in place."""
        q_norm, k_norm = self._head_norms
        if q_norm is not None and k_norm is not None:
            turning_RES[:, :queries] = q_norm(turning_RES[:, :queries])
            turning_RES[:, queries:] = k_norm(turning_RES[:, queries:])

    def think(self, x_RH: Tensor) -> Tensor:
        """The stream behind the feed-forward part."""
        gate, up = self._gate_up(x_RH).chunk(2, -1)
        return self._down(self._act(gate) * up, x_RH)


def _joined(causal: PreTrainedModel, rows: int) -> Joined | None:
    """How products with a copy of weights are made; None where the modules do as well themselves."""
    backbone: Any = getattr(causal, causal.base_model_prefix)
    head: Any = causal.get_output_embeddings()
    weights = sum(weight.numel() for weight in backbone.layers.parameters())
    if weights <= JOINED:
        return lambda weight, bias: lambda x: F.linear(x, weight, bias)
    if weights + head.weight.numel() > PACKED or not matmul.can_pack(head.weight):
        return None
    return lambda weight, bias: matmul.pack(weight, bias, rows)


def _behind(norm: Any, modules: list[Any], joined: Joined | None) -> Product:
    """What linear modules make of the normed stream, side by side."""
    if joined is None or not all(type(module) is nn.Linear for module in modules):
        return lambda x: torch.cat([module(n) for n in [norm(x)] for module in modules], -1)
    weight = torch.cat([module.weight for module in modules]) * norm.weight
    bias = None
    if modules[0].bias is not None:
        bias = torch.cat([module.bias for module in modules])
    epsilon, width = weight.new_tensor(norm.variance_epsilon), weight.shape[1]
    product = joined(weight, bias)

    def behind(x_RH: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x_RH, dim=-1, keepdim=True)
        scale = torch.addcmul(epsilon, length, length, value=1 / width).rsqrt_()
        return product(x_RH * scale)

    return behind


def _added(module: Any, joined: Joined | None) -> Callable[[Tensor, Tensor], Tensor]:
    """What a linear module adds to the stream."""
    product = module
    if joined is not None and type(module) is nn.Linear:
        product = joined(module.weight, module.bias)
    return lambda x, to: to + product(x)

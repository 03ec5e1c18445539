"""Passes of one token per row behind a prompt, with keys and values kept: any model's, and Llama's fast.

A row is what some answers have in common so far. Before each pass rows are rearranged: ``parent_R``
says, for each row of the pass, which row of the one before it continues. Rows that are nobody's parent
are gone, and a row may be the parent of several.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

from selfteach import prefixes

BLOCK = 32
"""Storage grows by at least this many tokens."""
JOINED = 4_000_000
"""Models whose layers have at most so many weights are run with copies that are joined."""


class Prompts:
    """Prompts that have been read: their keys and values, one row each, ``[shared | padding | rest]``.

    What all prompts begin with is run once (`prefixes`); the rest is padded on the left.
    """

    def __init__(
        self, causal: PreTrainedModel, prompts: Sequence[Sequence[int]], pad_id: int
    ) -> None:
        device = next(causal.parameters()).device
        shared, width = prefixes.shared_length(prompts), max(map(len, prompts))
        ids = torch.full((len(prompts), width), pad_id)
        mask = torch.zeros((len(prompts), width), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            rest = torch.tensor(prompt[shared:])
            ids[row, width - len(rest) :] = rest
            mask[row, width - len(rest) :] = 1
        mask[:, :shared] = 1
        self.lengths_Q = torch.tensor([len(prompt) for prompt in prompts], device=device)
        padded = not bool(mask.all())
        ids, mask = ids.to(device), mask.to(device)
        self.shared = shared
        self.mask_QT = mask if padded else None
        """1 where a token stands; None where nothing is padded."""
        self.width = width
        self.cache = DynamicCache()
        cache_name = prefixes.cache_argument(causal)
        if shared:
            backbone = getattr(causal, causal.base_model_prefix)
            self.cache = prefixes.fill(backbone, ids.new_tensor(prompts[0][:shared]), len(prompts))
        self.logits_QV: Tensor = causal(
            input_ids=ids[:, shared:],
            attention_mask=self.mask_QT,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, shared:],
            **{cache_name: self.cache},
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        """Of each answer's first token."""


@runtime_checkable
class Passes(Protocol):
    """One token for every row."""

    def __call__(self, parent_R: np.ndarray, token_R: Tensor) -> Tensor:
        """Rows continue their parents with a token each; the logits [R, V] of what comes next."""
        ...


def passes(causal: PreTrainedModel, prompts: Prompts, answers: int) -> Passes:
    """The fastest passes for a model; ``answers`` is how many rows there may be."""
    return (LlamaPasses if LlamaPasses.fits(causal) else ModelPasses)(causal, prompts, answers)


class ModelPasses:
    """Of any model that takes transformers' dynamic cache."""

    def __init__(self, causal: PreTrainedModel, prompts: Prompts, answers: int) -> None:
        del answers  # the cache grows as it must
        self._causal, self._cache, self._mask_RT = causal, prompts.cache, prompts.mask_QT
        self._cache_name = prefixes.cache_argument(causal)
        self._position_R = prompts.lengths_Q

    def __call__(self, parent_R: np.ndarray, token_R: Tensor) -> Tensor:
        """See `Passes`."""
        mask_RT = self._mask_RT
        if not np.array_equal(parent_R, np.arange(len(self._position_R))):
            parent = torch.from_numpy(parent_R).to(token_R.device)
            self._cache.batch_select_indices(parent)
            self._position_R = self._position_R[parent]
            mask_RT = mask_RT[parent] if mask_RT is not None else None
        if mask_RT is not None:
            self._mask_RT = F.pad(mask_RT, (0, 1), value=1)
        logits = self._causal(
            input_ids=token_R[:, None],
            attention_mask=self._mask_RT,
            position_ids=self._position_R[:, None],
            **{self._cache_name: self._cache},
            use_cache=True,
        ).logits[:, -1]
        self._position_R = self._position_R + 1
        return logits


class LlamaPasses:
    """Of Llama and its like: the model's own weights and modules without what a pass of many tokens needs.

    Keys and values stand where they are: a row that goes on stays, and only what branches off it or
    takes the place of a row that has ended is copied. In float32 what all prompts begin with is kept
    once, and all rows look at it in one product of matrices.
    """

    def __init__(self, causal: PreTrainedModel, prompts: Prompts, answers: int) -> None:
        backbone = getattr(causal, causal.base_model_prefix)
        self._embed, self._norm = backbone.embed_tokens, backbone.norm
        self._rotary, self._head = backbone.rotary_emb, causal.get_output_embeddings()
        cached = prompts.cache.layers
        first = cached[0].keys
        kept, whole = first.dtype, torch.is_autocast_enabled(first.device.type)
        if whole:
            kept = torch.get_autocast_dtype(first.device.type)
        self._exact = kept in (torch.float32, torch.float64)
        joins = not whole and sum(w.numel() for w in backbone.layers.parameters()) <= JOINED
        self._layers = [_Layer(layer, joins=joins) for layer in backbone.layers]
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
        return self._head(_normed(self._norm, x_RH))

    def _rearrange(self, parent_R: np.ndarray) -> None:
        """Put rows in their places, and see that there is room for one token more."""
        rows, before = len(parent_R), len(self._position_R)
        if moved := (parent_R != np.arange(rows)).nonzero()[0].tolist():
            used = self._kept[:, :, :, :, : self._used]
            used[:, :, moved] = used[:, :, parent_R[moved].tolist()]
        if moved or rows < before:
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

    def _attend(
        self, at: int, layer: _Layer, x_RH: Tensor, turn: tuple[Tensor, Tensor]
    ) -> Tensor:
        rows, used = len(x_RH), self._used
        _, _, _, heads, _, size = self._kept.shape
        qkv_RES = layer.qkv(x_RH).view(rows, -1, size)  # E: heads of queries, keys, values
        queries = qkv_RES.shape[1] - 2 * heads
        turning = qkv_RES[:, : queries + heads]
        layer.norm_heads(turning, queries)
        exchanged = turning.roll(size // 2, -1)
        turned_RES = (turning * turn[0]).addcmul_(exchanged, turn[1])
        kept = self._kept[at, :, :rows]
        kept[0, :, :, used] = turned_RES[:, queries:]
        kept[1, :, :, used] = qkv_RES[:, queries + heads :]
        keys, values = kept[:, :, :, : used + 1]
        q_RKGS = turned_RES[:, :queries].reshape(rows, heads, -1, size)
        return self._looked(q_RKGS, keys, values, self._shared[at], layer.scale).reshape(rows, -1)

    def _looked(
        self, q_RKGS: Tensor, keys: Tensor, values: Tensor, shared: tuple[Tensor, Tensor], scale: float
    ) -> Tensor:
        """Attention of one token per row over [shared | its own], [R, K, G, S] like the queries."""
        if not self._exact:
            bias = self._bias_RT
            if bias is not None:
                bias = F.pad(bias, (0, keys.shape[2] - bias.shape[1]))[:, None, None]
            return F.scaled_dot_product_attention(
                q_RKGS.to(keys.dtype), keys, values, attn_mask=bias, scale=scale
            )
        q_RKGS = q_RKGS * scale
        score = q_RKGS @ keys.transpose(2, 3)
        if self._bias_RT is not None:
            score[..., : self._bias_RT.shape[1]] += self._bias_RT[:, None, None]
        common = shared[0].shape[1]
        if not common:
            return score.softmax(-1) @ values
        rows, heads, group, size = q_RKGS.shape
        q_KNS = q_RKGS.transpose(0, 1).reshape(heads, rows * group, size)
        ahead = (q_KNS @ shared[0].transpose(1, 2)).view(heads, rows, group, common).transpose(0, 1)
        share = torch.cat([ahead, score], -1).softmax(-1)
        told = share[..., common:] @ values
        ahead_KNP = share[..., :common].transpose(0, 1).reshape(heads, rows * group, common)
        return told + (ahead_KNP @ shared[1]).view(heads, rows, group, size).transpose(0, 1)


class _Layer:
    """One layer's modules; of a small model their weights joined, which saves more than it copies."""

    def __init__(self, layer: nn.Module, *, joins: bool) -> None:
        attn, mlp = layer.self_attn, layer.mlp
        self._norms = layer.input_layernorm, layer.post_attention_layernorm
        self._head_norms = getattr(attn, "q_norm", None), getattr(attn, "k_norm", None)
        self._act, self.scale = mlp.act_fn, attn.scaling
        self._qkv = _side_by_side([attn.q_proj, attn.k_proj, attn.v_proj], joins=joins)
        self._gate_up = _side_by_side([mlp.gate_proj, mlp.up_proj], joins=joins)
        self._out, self._down = _added(attn.o_proj, joins), _added(mlp.down_proj, joins)

    def qkv(self, x_RH: Tensor) -> Tensor:
        """Queries, keys and values side by side, before they are turned."""
        return self._qkv(_normed(self._norms[0], x_RH))

    def norm_heads(self, turning_RES: Tensor, queries: int) -> None:
        """Qwen3's norms of queries and keys, in place."""
        q_norm, k_norm = self._head_norms
        if q_norm is not None and k_norm is not None:
            turning_RES[:, :queries] = q_norm(turning_RES[:, :queries])
            turning_RES[:, queries:] = k_norm(turning_RES[:, queries:])

    def out(self, told_RH: Tensor, x_RH: Tensor) -> Tensor:
        """What attention adds to the stream."""
        return self._out(told_RH, x_RH)

    def think(self, x_RH: Tensor) -> Tensor:
        """The stream behind the feed-forward part."""
        gate, up = self._gate_up(_normed(self._norms[1], x_RH)).chunk(2, -1)
        return self._down(self._act(gate) * up, x_RH)


def _side_by_side(modules: list[nn.Module], *, joins: bool) -> Callable[[Tensor], Tensor]:
    if joins and all(type(module) is nn.Linear for module in modules):
        weight = torch.cat([module.weight for module in modules])
        bias = None
        if modules[0].bias is not None:
            bias = torch.cat([module.bias for module in modules])
        return lambda x: F.linear(x, weight, bias)
    return lambda x: torch.cat([module(x) for module in modules], -1)


def _added(module: nn.Module, joins: bool) -> Callable[[Tensor, Tensor], Tensor]:
    if joins and type(module) is nn.Linear and module.bias is None:
        turned = module.weight.t()
        return lambda x, to: torch.addmm(to, x, turned)
    return lambda x, to: to + module(x)


def _normed(norm: nn.Module, x_RH: Tensor) -> Tensor:
    """RMS norm. The module's own where its half precision is rounded in places of its own."""
    if x_RH.dtype == norm.weight.dtype == torch.float32:
        return F.rms_norm(x_RH, x_RH.shape[-1:], norm.weight, norm.variance_epsilon)
    return norm(x_RH)

"""Train and score with the policy: a causal language model with its optimizer."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from selfteach.config.guard_section import NO_GRADIENT
from selfteach.errors import EngineError
from selfteach.models import (
    compiled_layers,
    packed_attention,
    pass_probe,
    plain_pass,
    prefix_cache,
    tree_attention,
)
from selfteach.models.fsdp import Shards, whole
from selfteach.models.lm_head import Head, Scores
from selfteach.models.sequences import SequenceLayout, sequences
from selfteach.runtime.distributed import SINGLE_PROCESS, Ranks
from selfteach.types import Sequences

PROBE_TOLERANCE = 1e-3
"""Largest difference between our logits and the model's forward pass, relative to their spread."""

_SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Names of a head's soft cap in configs of transformers."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Computes the learning rate of each update, counted from 0."""

    lr: float
    warmup_steps: int = 0
    decay: Literal["constant", "linear", "cosine"] = "constant"
    total_steps: int = 1

    def __call__(self, update: int) -> float:
        """Return the learning rate of an update: ``lr`` at the end of the warm-up, then the decay."""
        if update < self.warmup_steps:
            return self.lr * (update + 1) / self.warmup_steps
        if self.decay == "constant":
            return self.lr
        left, decaying = self.total_steps - update, self.total_steps - self.warmup_steps
        share = max(0.0, left / max(1, decaying))
        if self.decay == "cosine":
            share = 0.5 * (1 - math.cos(math.pi * share))
        return self.lr * share


class Policy:
    """Holds a model and its optimizer; scores rollouts as hidden states with their head.

    The trainable weights are the adapters' where there are any, else all. With ``shard`` each rank
    holds a shard of every weight, and all ranks run every pass together; without, each rank holds all
    weights and gradients are summed over ``ranks`` before an update. ``compiles`` has the layers
    compiled where they compute the same (`compiled_layers`); it is not for shards.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        schedule: Schedule,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        grad_clip: float = 1.0,
        autocast: torch.dtype | None = None,
        ranks: Ranks = SINGLE_PROCESS,
        shard: Callable[[PreTrainedModel], Shards] | None = None,
        compiles: bool = False,
    ) -> None:
        self.model = model
        self.version = 0
        self.lr_factor = 1.0
        """Factor of the scheduled learning rate; a run's guard lowers it."""
        self._schedule, self._grad_clip, self._autocast = schedule, grad_clip, autocast
        causal = model.get_base_model() if isinstance(model, PeftModel) else model
        assert isinstance(causal, PreTrainedModel)
        self._backbone = plain_pass.backbone_of(causal)
        plain_pass.require_causal(causal, autocast=autocast)
        self._head = head_of(causal)
        # Gradient checkpointing and a key-value cache exclude each other in transformers.
        self.shares_prefixes = not any(
            getattr(module, "gradient_checkpointing", False) for module in causal.modules()
        )
        self.uses_tree_attention = tree_attention.enable_tree_attention(causal)
        self.packs_sequences = False
        """Runs trees of whole sequences without padding."""
        self._shards = None
        self._prove_passes(causal)
        self.packs_sequences = shard is None and self._can_pack(causal, causal.dtype)
        self.compiles_layers = compiles and self._compile_layers(causal)
        """Runs the decoder layers compiled in passes without a cache."""
        # The head and padded passes are probed on the full model; the optimizer must get the shards.
        self._ranks, self._shards = ranks, shard(causal) if shard is not None else self._shards
        if self._shards is not None:
            # A pass for the prefix would have no counterpart on other ranks.
            self.shares_prefixes = False
            self.packs_sequences = self._can_pack(causal, self._shards.dtype)
            self._shards.reshard()
        self.trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        # As the field does, matrices decay (embeddings and adapters too), norms and biases do not.
        matrices = [param for param in self.trainable.values() if param.ndim >= 2]
        vectors = [param for param in self.trainable.values() if param.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
            lr=schedule(0), betas=betas, eps=eps, weight_decay=weight_decay,
            fused=True,  # one pass over weights and moments: a quarter to a seventh of the time
        )  # fmt: skip

    @property
    def device(self) -> torch.device:
        """Return the device of the model's weights."""
        return next(iter(self.trainable.values())).device

    @property
    def is_sharded(self) -> bool:
        """Return whether this rank holds a shard of each weight."""
        return self._shards is not None

    @property
    def layout(self) -> SequenceLayout:
        """Return how sequences that this policy scores are to be laid out."""
        return SequenceLayout(prefix=self.shares_prefixes, packed=self.packs_sequences)

    @property
    def has_adapters(self) -> bool:
        """Return whether only low-rank adapters train."""
        return isinstance(self.model, PeftModel)

    def score(self, sequences: Sequences) -> Scores:
        """Score the rollouts' tokens: logits on demand. Prompt tokens never reach the head."""
        if self.model.training != torch.is_grad_enabled():  # it walks through all modules
            self.model.train(torch.is_grad_enabled())
        with torch.autocast(self.device.type, self._autocast, enabled=self._autocast is not None):
            hidden_NH = self._hidden(sequences)
        head = self._head if self._shards is None else self._shards.head(self._head)
        hidden_NH = hidden_NH.to(self._autocast or hidden_NH.dtype)
        if not torch.is_grad_enabled():  # a teacher's head: cast once, not once per chunk
            head = _cast(head, hidden_NH.dtype)
        return Scores.single(hidden_NH, head)

    def _hidden(self, sequences: Sequences) -> Tensor:
        """Compute the last layer's states that predict the rollouts' tokens, [N, H]."""
        ids_BT, rows_N, columns_N = sequences.ids_BT, sequences.rows_N, sequences.columns_N
        shared = sequences.shared if self.shares_prefixes else 0
        ids_BT, columns_N, extra = ids_BT[:, shared:], columns_N - shared, dict[str, Any]()
        if sequences.tree and self.uses_tree_attention and shared == sequences.shared:
            tree = sequences.tree
            ids_BT, rows_N, columns_N = tree.ids_1U, 0, tree.columns_N
            packed = self.packs_sequences and not shared
            extra = tree_attention.model_inputs(tree, shared, self.model.dtype, packed=packed)
        elif self.uses_tree_attention and not shared:
            extra = tree_attention.causal_inputs(ids_BT, self.model.dtype)
        if shared:
            cache = prefix_cache.fill(self._backbone, sequences.ids_BT[0, :shared], len(ids_BT))
            extra[prefix_cache.cache_argument(self._backbone)] = cache
        if self._shards is not None:
            return self._shards.hidden(ids_BT, **extra)[rows_N, columns_N]
        return self._backbone(input_ids=ids_BT, use_cache=shared > 0, **extra)[0][rows_N, columns_N]

    @torch.no_grad()
    def _prove_passes(self, causal: PreTrainedModel) -> None:
        """Keep only those of tree attention and shared prefixes that leave the hidden states unchanged.

        Raises `EngineError` if even padding changes them.
        """
        self.model.eval()
        prompts, completions = _probe(causal)
        device = next(causal.parameters()).device
        padded = sequences(prompts, completions, 0, plain_pass.PROBE_SHARED).to(device)
        rounded = plain_pass.is_rounded(causal, self._autocast)
        with (
            torch.autocast(device.type, self._autocast, enabled=self._autocast is not None),
            plain_pass.shrunk_windows(causal, sys.maxsize),
        ):
            plain_NH = torch.cat([
                plain_pass.plain_states(causal, [*prompt, *completion])[len(prompt) - 1 : -1]
                for prompt, completion in zip(prompts, completions, strict=True)
            ])  # fmt: skip
            spread = float(plain_NH.double().std())

            def proves(side: Sequences) -> bool:
                try:
                    hidden_NH = self._hidden(side)
                except Exception:  # a model's code raises anything for a cache it does not know
                    return False
                return plain_pass.agree(hidden_NH, plain_NH, rounded=rounded, spread=spread)

            shares, trees = self.shares_prefixes, self.uses_tree_attention
            ways = dict.fromkeys([(shares, trees), (shares, False), (False, trees), (False, False)])
            for self.shares_prefixes, self.uses_tree_attention in ways:
                if proves(padded):
                    break
            else:
                raise EngineError(
                    f"{type(causal).__name__} computes other states in a batch than alone, so its "
                    "rollouts cannot be scored in batches"
                )

    def _can_pack(self, causal: PreTrainedModel, dtype: torch.dtype) -> bool:
        """Return whether sequences without padding have the states and gradients of padded ones.

        With shards all ranks decide alike: each cuts the micro-batches of all.
        """
        device, dtype = next(causal.parameters()).device, self._autocast or dtype
        ranks = SINGLE_PROCESS if self._shards is None else self._ranks
        available = self.uses_tree_attention and packed_attention.is_available(device, dtype)
        if ranks.any(not available):
            return False
        padded, packed = (
            sequences(*_probe(causal), 0, sys.maxsize, layout=layout).to(device)
            for layout in (SequenceLayout(), SequenceLayout(packed=True))
        )
        assert packed.tree is not None
        reason = packed_attention.failure(causal, packed.tree, dtype)
        if not ranks.any(reason is not None):
            rounded = dtype not in (torch.float32, torch.float64)
            results = []
            try:
                for side, self.packs_sequences in (
                    (replace(padded, tree=None), False),
                    (packed, True),
                ):
                    results.append(self._probed(causal, [side]))
                if not pass_probe.agree(*reversed(results), rounded=rounded):
                    reason = "with it states or gradients are others"
            except Exception as error:  # a model's code raises anything
                reason = packed_attention.described(error)
        if reason is not None:
            packed_attention.report_padded(causal, reason)
        return not ranks.any(reason is not None)

    def _probed(self, causal: PreTrainedModel, sides: Sequence[Sequences]) -> list[Tensor]:
        """Return the states of sequences, and gradients of a sum over them."""
        layers = list(compiled_layers.decoder_layers(causal) or [causal])
        return pass_probe.states_and_gradients(self.model, layers, partial(self._states, sides))

    def _states(self, sides: Sequence[Sequences]) -> Tensor:
        """Compute the states of sequences for a probe, [N, H]."""
        if self._shards is not None:
            self._shards.reshard()  # a pass without gradients before it has left them gathered
        device = sides[0].ids_BT.device.type
        with torch.autocast(device, self._autocast, enabled=self._autocast is not None):
            return torch.cat([self._hidden(side) for side in sides])

    def _compile_layers(self, causal: PreTrainedModel) -> bool:
        """Compile the layers if that leaves a probe's states and gradients as they are; else False."""
        layers = compiled_layers.decoder_layers(causal)
        reason = None
        if layers is None or not self.uses_tree_attention:
            reason = "its attention does not run along paths"
        elif any(getattr(module, "gradient_checkpointing", False) for module in causal.modules()):
            reason = "activations are computed again (model.gradient_checkpointing)"
        if layers is None or reason is not None:
            compiled_layers.report_uncompiled(causal, str(reason))
            return False
        prompts, completions = _probe(causal)
        side = sequences(prompts, completions, 0, sys.maxsize, layout=self.layout)
        sides = [side.to(next(causal.parameters()).device)]
        if not self.packs_sequences and side.tree is not None:
            sides.append(replace(sides[0], tree=None))
        rounded, states = (
            plain_pass.is_rounded(causal, self._autocast),
            partial(self._states, sides),
        )
        return compiled_layers.compile_layers(self.model, list(layers), states, rounded=rounded)

    def optimizer_step(self) -> dict[str, float]:
        """Take one AdamW step on the accumulated gradients; returns its metrics.

        A non-finite gradient changes no weight and is counted in ``nonfinite_updates``. Neither does
        one that is rounding errors: AdamW would scale it to a whole step.
        """
        rate = self._schedule(self.version) * self.lr_factor
        if self._shards is None:
            self._ranks.sum_gradients(self.trainable.values())
        norm = whole(nn.utils.clip_grad_norm_(self.trainable.values(), self._grad_clip)).item()
        finite = norm == norm and norm != float("inf")
        if finite and norm > NO_GRADIENT:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.version += 1
        return {"grad_norm": norm, "lr": rate, "nonfinite_updates": float(not finite)}

    @contextlib.contextmanager
    def weights_swapped(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Run with other values in the trainable weights, restored on leaving."""
        if self._shards is not None:
            with self._shards.swapped(self.trainable, weights):
                yield
            return
        original = {name: param.data for name, param in self.trainable.items()}
        try:
            for name, param in self.trainable.items():
                param.data = weights[name]
            yield
        finally:
            for name, param in self.trainable.items():
                param.data = original[name]

    @contextlib.contextmanager
    def adapters_off(self) -> Iterator[None]:
        """Run the model without its adapters: as the initial policy."""
        assert isinstance(self.model, PeftModel)
        with self.model.disable_adapter():
            yield


def _probe(causal: PreTrainedModel) -> tuple[list[list[int]], list[list[int]]]:
    """Return prompts and completions in which everything that a pass can share is shared."""
    prompts = [
        prompt
        for prompt in plain_pass.probe_prompts(causal.config.get_text_config().vocab_size)
        for _ in range(2)
    ]
    return prompts, [[*prompts[0][: 2 + row], row] for row in range(len(prompts))]


def _cast(head: Head, dtype: torch.dtype) -> Head:
    """Cast a head to a dtype."""
    bias_V = None if head.bias_V is None else head.bias_V.to(dtype)
    return replace(head, weight_VH=head.weight_VH.to(dtype), bias_V=bias_V)


def head_of(model: PreTrainedModel) -> Head:
    """Return a model's output head, checked against the model's logits on a few tokens.

    Raises `EngineError` for a model whose logits are more than a linear map, a scale and a soft cap
    of its last hidden states: divergences would not be of the distribution it samples from.
    """
    linear = model.get_output_embeddings()
    if not isinstance(linear, nn.Linear):
        raise EngineError(f"{type(model).__name__} has no plain linear output head to score with")
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0
    if getattr(config, "logits_scaling", None):
        scale /= config.logits_scaling
    caps = (getattr(config, name, None) for name in _SOFT_CAPS)
    head = Head(linear.weight, linear.bias, scale, next((cap for cap in caps if cap), None))
    ids = torch.arange(min(8, config.vocab_size), device=linear.weight.device)[None]
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits.float()
        hidden = plain_pass.backbone_of(model)(input_ids=ids, use_cache=False)[0]
        error = (head.logits(hidden) - expected).abs().max() / expected.std().clamp(min=1e-6)
    # With bf16 weights the float32 head here and the model's bf16 head differ more.
    tolerance = PROBE_TOLERANCE if linear.weight.dtype == torch.float32 else 0.1
    if error > tolerance:
        raise EngineError(
            f"{type(model).__name__} changes its logits in an unsupported way "
            f"(relative difference {error:.2g}); its divergences would be wrong"
        )
    return head

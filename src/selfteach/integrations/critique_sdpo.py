"""Shows TRL's SDPO teacher a critique of each rollout, written while it trains. Imports TRL 1.16.

TRL's seam is the object ``trainer.teacher_context_builder``: it gets the rollouts of a batch and the
feedback of each (the column ``privileged_context``), and returns the teacher's sequences. Here the
feedback is our context of a fresh critique; the rest is TRL's: its templates, its successful rollouts,
its loss. A rollout whose critique fails has no feedback.
"""

from __future__ import annotations

import inspect
from collections import Counter
from typing import Any

from accelerate.utils import gather_object
from trl.experimental.sdpo import SDPOTrainer  # pyright: ignore[reportMissingImports]
from trl.experimental.sdpo.sdpo_trainer import (  # pyright: ignore[reportMissingImports]
    SuccessfulRolloutTeacherContextBuilder,
    _extract_last_user_text,
)

from selfteach.errors import RecipeError, SelfteachError
from selfteach.integrations.critique_feedback import (
    KINDS,
    TOO_LONG,
    BatchFeedback,
    CritiqueFeedback,
    SampledCompletion,
    failure_kind,
)
from selfteach.prompts.control_tokens import ControlTokenEscaper
from selfteach.types import CritiqueFailure


class CritiqueContextBuilder(SuccessfulRolloutTeacherContextBuilder):
    """Builds the teacher's prompts of a batch with a critique of each rollout as feedback."""

    def __init__(self, trainer: Any, feedback: CritiqueFeedback) -> None:
        super().__init__(trainer)
        self._feedback = feedback
        self._escaper = ControlTokenEscaper(_control_tokens(trainer._tokenizer))
        self._truncated = 0
        self.rows: list[dict[str, Any]] = []
        """The rows of the batch; `CritiqueSDPOTrainer` sets them."""
        self.failures: Counter[str] = Counter()
        """Failures of this process so far, by kind."""
        self.last_feedback: BatchFeedback | None = None
        """Contexts and failures of this process's last batch."""

    def build(
        self, output: Any, prompts: list[Any], rewards: Any, feedbacks: list[Any] | None = None
    ) -> Any:
        """Return what TRL's builder returns, with contexts in the place of the feedback column."""
        contexts = self._contexts(output, prompts)
        self._truncated = 0
        built = super().build(output, prompts, rewards, feedbacks=contexts)
        counts = Counter(failure_kind(one) for one in self._failed())
        self.failures.update(counts)
        self.last_metrics = {**self.last_metrics, **self._measured(counts, len(prompts))}
        return built

    def _contexts(self, output: Any, prompts: list[Any]) -> list[str | None]:
        """Return the context of each rollout of this process; None where there is none.

        Raises the first error of any process, on all of them.
        """
        trainer = self.trainer
        ids = trainer._get_completion_ids_list(output)
        texts = trainer.processing_class.batch_decode(ids, skip_special_tokens=True)
        ends = set(trainer.eos_token_ids)
        sampled = [
            SampledCompletion(row, text, tuple(tokens), not ends.isdisjoint(tokens[-1:]))
            for row, text, tokens in zip(self.rows, texts, ids, strict=True)
        ]
        error: SelfteachError | None = None
        try:
            self.last_feedback = self._feedback(sampled)
        except SelfteachError as raised:
            error = raised
        for other in gather_object([None if error is None else str(error)]):
            if other is not None:
                raise error or SelfteachError(f"another process: {other}")
        assert self.last_feedback is not None
        contexts = [
            None if text is None else self._escaper.escape(text)
            for text in self.last_feedback.contexts
        ]
        return self._fitting(contexts, prompts)

    def _fitting(self, contexts: list[str | None], prompts: list[Any]) -> list[str | None]:
        """Replace contexts by None with which TRL would cut the problem off the teacher's prompt."""
        assert self.last_feedback is not None
        shown = [place for place, context in enumerate(contexts) if context is not None]
        if not shown:
            return contexts
        longest = self.trainer.args.max_reprompt_len
        messages = [self._teacher_messages(prompts[place], str(contexts[place])) for place in shown]
        for place, ids in zip(
            shown, self.trainer._tokenize_prompts_untruncated(messages), strict=True
        ):
            if len(ids) > longest:
                contexts[place] = None
                detail = f"{len(ids)} tokens, max_reprompt_len = {longest}"
                self.last_feedback.failures[place] = CritiqueFailure(TOO_LONG, detail)
        return contexts

    def _teacher_messages(self, prompt: Any, context: str) -> Any:
        """Return the teacher's prompt with a context alone, as TRL composes it."""
        feedback = self.trainer.args.feedback_template.format(feedback_raw=context)
        if not isinstance(prompt, list):
            return self._build_reprompt_text(prompt, "", feedback)
        text = self._build_reprompt_text(_extract_last_user_text(prompt), "", feedback)
        return [*prompt[:-1], {"role": "user", "content": text}]

    def _tokenize_teacher_messages(self, teacher_messages_list: list[Any]) -> Any:
        """Count the prompts that TRL truncates: those with a successful rollout besides."""
        longest = self.trainer.args.max_reprompt_len
        ids = self.trainer._tokenize_prompts_untruncated(teacher_messages_list)
        self._truncated = sum(len(one) > longest for one in ids)
        return super()._tokenize_teacher_messages(teacher_messages_list)

    def _failed(self) -> list[CritiqueFailure]:
        assert self.last_feedback is not None
        return [failure for failure in self.last_feedback.failures if failure is not None]

    def _measured(self, counts: Counter[str], rollouts: int) -> dict[str, float]:
        """Return the batch's metrics, summed over processes."""
        assert self.last_feedback is not None
        usage, failed = self.last_feedback.usage, counts.total()
        measured: dict[str, float] = {
            "rollouts": rollouts,
            "failed": failed,
            **{f"failed/{kind}": counts[kind] for kind in KINDS},
            "truncated_teacher_prompts": self._truncated,
            "requests": usage.requests,
            "cached": usage.cached,
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "cost": usage.cost,
        }
        every = gather_object([measured])
        total = {name: sum(one[name] for one in every) for name in measured}
        return {f"critique/{name}": float(number) for name, number in total.items()}


class CritiqueSDPOTrainer(SDPOTrainer):
    """Trains with TRL's SDPO and a critique of each rollout as the teacher's feedback.

    ``feedback`` is what `critique_feedback` returns; all other arguments are TRL's. The data set needs
    the columns that a reward function of ours reads. Logs gain ``critique/failed`` (rollouts of a
    batch without a usable critique, also by kind), ``critique/requests``, ``critique/cached``, tokens
    and cost.
    """

    def __init__(self, *args: Any, feedback: CritiqueFeedback, **kwargs: Any) -> None:
        given = inspect.signature(SDPOTrainer.__init__).bind(self, *args, **kwargs).arguments
        config = given.get("args")
        if config is None or not config.include_environment_feedback:
            raise RecipeError(
                "without SDPOConfig(include_environment_feedback=True) TRL ignores feedback, and "
                "critiques would be paid for in vain: set it in args"
            )
        super().__init__(*args, **kwargs)
        self.teacher_context_builder = CritiqueContextBuilder(self, feedback)

    def _prepare_training_batch(self, inputs: list[dict[str, Any]]) -> Any:
        self.teacher_context_builder.rows = inputs
        return super()._prepare_training_batch(inputs)


def _control_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Return the tokenizer's control tokens: a critique that quotes one must not end a turn."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    steering = (*tokenizer.all_special_tokens, *added)
    return tuple(
        dict.fromkeys(token for token in steering if token.strip() and not token.isalnum())
    )

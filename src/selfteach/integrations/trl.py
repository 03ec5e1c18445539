"""Use our verifiers, critics and contexts with TRL 1.16. See docs/other_trainers.md.

    from trl.experimental.sdpo import SDPOConfig
    from selfteach.integrations.trl import CritiqueSDPOTrainer, critique_feedback, reward_func

    trainer = CritiqueSDPOTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        reward_funcs=reward_func("math", answer_in="boxed"),
        feedback=critique_feedback("recipe.toml"),
        args=SDPOConfig("out", include_environment_feedback=True),
        train_dataset=dataset,
    )

`reward_func` and `critique_feedback` need no TRL; what does is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from selfteach.integrations.critique_feedback import CritiqueFeedback, critique_feedback
from selfteach.integrations.verifier_rewards import VerifierReward, reward_func

if TYPE_CHECKING:
    from selfteach.integrations.critique_sdpo import CritiqueContextBuilder, CritiqueSDPOTrainer

__all__ = [
    "CritiqueContextBuilder",
    "CritiqueFeedback",
    "CritiqueSDPOTrainer",
    "VerifierReward",
    "critique_feedback",
    "reward_func",
]

NEED_TRL = ("CritiqueContextBuilder", "CritiqueSDPOTrainer")


def __getattr__(name: str) -> Any:
    """Import what needs TRL. Raises ImportError, in one line, where it is not installed."""
    if name not in NEED_TRL:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module("selfteach.integrations.critique_sdpo")
    except ImportError as error:
        raise ImportError(
            f"{name} needs TRL 1.16 with SDPO ({error}): pip install 'trl>=1.16,<1.17'"
        ) from error
    return getattr(module, name)

"""Keep critiques in the run folder: none is requested twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from selfteach.feedback.critics.reply_cache import buying_for
from selfteach.protocols import Critic
from selfteach.types import Critique, CritiqueFailure, Rollout, Verdict

Critiques = Sequence[Critique | CritiqueFailure | None]
Save = Callable[[Sequence[Rollout], Critiques], None]


class JournaledCritic:
    """Critiques through another critic; saves the critiques before it returns them.

    ``saved`` are the critiques of an earlier attempt by `Rollout.key`. A batch of which all critiques
    are saved is not given to the critic; any other is critiqued as a whole, so that a resumed run
    sends the critic the same batches. ``journal`` names the place where they are saved: replies bought
    for it before a kill, whose critiques were not saved, are counted as paid when it is filled.
    """

    def __init__(
        self,
        critic: Critic,
        saved: Mapping[tuple[str, int], Critique | CritiqueFailure | None],
        save: Save | None = None,
        journal: str = "",
    ) -> None:
        self._critic, self._saved, self._save = critic, saved, save
        self._journal = journal

    def __call__(
        self, judged: Sequence[tuple[Rollout, Verdict]]
    ) -> list[Critique | CritiqueFailure]:
        """Return one critique, or the reason for none, per rollout, in order."""
        rollouts = [rollout for rollout, _ in judged]
        saved = [self._saved.get(rollout.key) for rollout in rollouts]
        if all(critique is not None for critique in saved):
            return [critique for critique in saved if critique is not None]
        with buying_for(self._journal):
            critiques = self._critic(judged)
        if self._save is not None:
            self._save(rollouts, critiques)
        return critiques

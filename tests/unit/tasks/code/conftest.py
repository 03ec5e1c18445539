"""Provides pools of isolated processes, one for each isolation that works on this machine; no torch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from selfteach.config.code_section import CodeConfig, Isolation
from selfteach.errors import DataError
from selfteach.tasks.code.code_pool import CodePool

LEVELS: tuple[Isolation, ...] = ("bubblewrap", "namespaces", "landlock")
QUICK: Isolation = "namespaces"
"""The level of the tests that are not slow: most machines have it."""


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Replace the fixture that imports torch: nothing here needs it."""


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    """Replace the fixture that imports torch."""


def started(config: CodeConfig) -> CodePool:
    """Return a pool; skip the test where this machine lacks what it needs, not where it fails."""
    try:
        return CodePool(config)
    except DataError as error:
        if "was able to" in str(error):
            raise
        pytest.skip(str(error))


@pytest.fixture(
    scope="session",
    params=[pytest.param(n, marks=() if n == QUICK else pytest.mark.slow) for n in LEVELS],
)
def pool(request: pytest.FixtureRequest) -> Iterator[CodePool]:
    """Yield a pool of one isolation, with short limits and no refused imports."""
    config = CodeConfig(
        isolation=request.param,
        cpu_s=0.5,
        memory_mb=512,
        scratch_mb=2,
        workers=2,
        refused_imports=(),
    )
    pool = started(config)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def any_pool() -> Iterator[CodePool]:
    """Yield a pool with the isolation that a recipe gets by default."""
    pool = started(CodeConfig(cpu_s=1.0, workers=2))
    yield pool
    pool.close()

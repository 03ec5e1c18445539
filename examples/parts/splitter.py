"""A splitter of one's own: where the solution steps of a text begin and end, in characters."""


def words_at_a_time(text: str, *, words: int = 6) -> list[tuple[int, int]]:
    """Return spans of ``words`` words each; they are in order and do not overlap."""
    spans, begin = [], 0
    starts = [
        i for i, c in enumerate(text) if not c.isspace() and (i == 0 or text[i - 1].isspace())
    ]
    for begin, end in zip(starts[::words], [*starts[words::words], len(text)], strict=False):
        spans.append((begin, len(text[:end].rstrip())))
    return spans

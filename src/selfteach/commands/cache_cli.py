"""Defines `selfteach cache`: share the replies of a critic as a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

cache_app = typer.Typer(
    help="Share a critic's replies: export them to Parquet, import those of others.",
    rich_markup_mode=None,
    no_args_is_help=True,
)


@cache_app.command("export")
def export_cache(
    cache: Annotated[Path, typer.Argument(help="Reply cache (SQLite), as critic.reply_cache.")],
    file: Annotated[Path, typer.Argument(help="New Parquet file.")],
) -> None:
    """Write all replies of a reply cache to a Parquet file; what may hold a key is left out."""
    from selfteach.feedback.critics.shared_replies import export_replies

    counts = export_replies(cache, file)
    typer.echo(f"exported: {counts.exported:,} replies of {counts.models:,} models to {file}")
    if counts.secret:
        typer.echo(f"left out: {counts.secret:,} replies in which something looks like a key")
    if counts.damaged:
        typer.echo(f"left out: {counts.damaged:,} damaged replies")


@cache_app.command("import")
def import_cache(
    file: Annotated[Path, typer.Argument(help="Parquet file that `cache export` has written.")],
    cache: Annotated[Path, typer.Argument(help="Reply cache to add to; made if there is none.")],
) -> None:
    """Add the replies of a Parquet file to a reply cache; replies that are there already stay."""
    from selfteach.feedback.critics.shared_replies import import_replies

    counts = import_replies(file, cache)
    typer.echo(
        f"imported: {counts.new:,} new replies into {cache}; {counts.same:,} were there already, "
        f"{counts.differing:,} are other ones than those there, which stay"
    )

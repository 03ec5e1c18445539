"""Read the files of runs and studies, and show them: figures, report, terminal.

Nothing here imports training code, so results.json from another machine can be shown too.
"""

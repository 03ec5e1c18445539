"""Reads the files that a study leaves behind and shows them: figures, report, terminal.

Nothing here imports training code: a results.json from elsewhere is shown just as well.
"""

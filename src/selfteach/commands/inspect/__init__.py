"""Commands behind `selfteach inspect`: score the same rollouts with and without feedback, per token.

`answer_rows` locates steps and first errors, `token_kinds` tells style from task tokens, `token_table`
defines ``tokens.parquet``, `folder` scores and writes the files, `labelled` reads rollouts whose steps
are labelled, and `inspection` runs all of it for one model.
"""

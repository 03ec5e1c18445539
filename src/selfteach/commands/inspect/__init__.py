"""What feedback changes: the same answers scored with and without it, token by token, on disk.

`answers` says what is known of each answer, `token_scores` what student and self-teacher make of it,
`kinds` which tokens are style and which are task, `table` what ``tokens.parquet`` holds, `folder`
puts it all into files, and `labelled` reads answers whose steps somebody else has marked.
"""

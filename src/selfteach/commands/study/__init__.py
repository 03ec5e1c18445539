"""`selfteach study` and `selfteach sweep`: arms × seeds, a process per run, one results.json."""

"""Critics: who marks an answer step by step.

`oracle` is a program that can check every step. The others are language models that write text:
`text` asks, `reading` turns what comes back into a critique or a typed reason why there is none,
`store` keeps every reply before it is used, and `endpoint`, `local` and `recorded` are where replies
come from.
"""

"""Leaves messages as they are."""


def normalize_messages(value, *, field_name="messages"):
    return [dict(message) for message in value]

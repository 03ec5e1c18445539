"""The state of a rollout, a dictionary that reads its input too."""


class State(dict):
    def __missing__(self, key):
        return self["input"][key]

    def get(self, key, default=None):
        try:
            return self[key]
        except KeyError:
            return default


class RolloutTiming: ...


def flatten_task_input(row):
    return dict(row)


class ToolCall:
    def __init__(self, values):
        self.id, self.name, self.arguments = values["id"], values["name"], values["arguments"]

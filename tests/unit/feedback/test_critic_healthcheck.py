"""Whether a served critic is there is found out first, with one question, in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from scripted_server import Behaviour, Server, cuts, lists, raw, refuses, says, serving, stalls

from selfteach import cli
from selfteach.config.critic_section import EndpointConfig, OracleConfig
from selfteach.errors import CriticError
from selfteach.feedback.critics.critic_healthcheck import require_server
from selfteach.feedback.critics.endpoint import Endpoint
from selfteach.trainer.build_critic import require_critic

RECIPE = """
[model]
path = "lab:two_styles"
[data]
train = 4
validation = 1
test = 1
[context]
type = "step_aligned"
[critic]
type = "endpoint"
base_url = "{url}"
model = "m"
reply_cache = "{store}"
"""


def ask(server: Server, model: str = "m", **settings: object) -> None:
    require_server(Endpoint(server.url, model, **settings))  # type: ignore[arg-type]


def test_a_listed_model_is_asked_for_nothing() -> None:
    with serving(refuses(500)) as server:
        ask(server)
        assert server.asked == []


@pytest.mark.parametrize(
    "listing",
    [lists("n"), lists(), refuses(404), refuses(501), raw(b"<html>"), raw(b"[1]"), raw(b"{}")],
    ids=["not listed", "empty", "404", "501", "no json", "a list", "an object"],
)
def test_where_the_list_does_not_say_one_token_is_asked_for(listing: Behaviour) -> None:
    with serving(says("1", "length")) as server:
        server.listing = listing
        ask(server)
        assert [body["max_tokens"] for body in server.asked] == [1]


@pytest.mark.parametrize(
    "listing", [refuses(429, Retry_After="60"), refuses(503), refuses(500), stalls(1)]
)
def test_a_slow_or_busy_server_is_there(listing: Behaviour) -> None:
    with serving(says("1")) as server:
        server.listing = listing
        ask(server, timeout_s=0.2)
        assert server.asked == []


@pytest.mark.parametrize("behaviour", [refuses(429), refuses(503), stalls(1), raw(b"?"), says("")])
def test_a_server_that_is_busy_with_the_token_is_there_too(behaviour: Behaviour) -> None:
    with serving(behaviour) as server:
        server.listing = refuses(404)
        ask(server, timeout_s=0.2)
        assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("listing", "behaviour", "said"),
    [
        (refuses(401), says("1"), r"lets us not in \(it says 401\): the key in K is wrong"),
        (refuses(404), refuses(403), r"lets us not in \(it says 403\)"),
        (lists("mm", "other"), refuses(404), r"does not serve it .*did you mean 'mm'\?"),
        (lists("other"), refuses(400), r"does not serve it .*it has other"),
        (refuses(404), refuses(404), r"critic\.model = 'm'.*check critic\.model and"),
        (cuts, says("1"), "nobody answers"),
    ],
    ids=["key", "key for the token", "unknown", "400", "no such path", "cut"],
)
def test_what_is_wrong_is_one_line(
    listing: Behaviour, behaviour: Behaviour, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("K", "secret")
    with serving(behaviour) as server:
        server.listing = listing
        with pytest.raises(CriticError, match=said) as told:
            ask(server, api_key_env="K")
    assert "\n" not in str(told.value) and "secret" not in str(told.value)


def test_a_recipe_may_say_not_to_ask(tmp_path: Path) -> None:
    gone = {"type": "endpoint", "base_url": "http://127.0.0.1:9/v1", "model": "m"}
    with pytest.raises(CriticError, match=r"nobody answers at http://127\.0\.0\.1:9/v1"):
        require_critic(EndpointConfig.model_validate(gone))
    require_critic(EndpointConfig.model_validate({**gone, "healthcheck": False}))
    require_critic(OracleConfig())
    require_critic(None)


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    def run(*words: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["selfteach", *map(str, words)])
        try:
            cli.main()
        except SystemExit as stop:
            return int(stop.code or 0), capsys.readouterr().err
        return 0, capsys.readouterr().err

    return run


@pytest.mark.parametrize("command", ["check", "train", "study"])
def test_nothing_is_spent_where_nobody_is_there(
    command: str, call: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(url="http://127.0.0.1:9/v1", store=tmp_path / "s.sqlite"))
    out = () if command == "check" else ("--out", tmp_path / "out")
    status, said = call(command, recipe, *out)
    assert status == 2 and said.count("\n") == 1 and "nobody answers" in said
    assert not [*tmp_path.rglob("rollouts/*"), *tmp_path.rglob("evaluations/*")]
    if command == "check":
        assert call("check", recipe, "--offline") == (0, "")

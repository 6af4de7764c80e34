"""Task names, the built-in ones and a user's own."""

from pathlib import Path

import pytest

from preconcert.core import ConfigError, Env, UnknownNameError
from preconcert.envs import Rendezvous, make_env, register, task_class, tasks
from tests.envs.playing import EXAMPLES


def test_built_in_tasks() -> None:
    assert list(tasks()) == ["box-push", "dilemma", "kuhn", "matrix", "pursuit", "rendezvous", "repeated-rps", "signal"]
    assert task_class("rendezvous") is Rendezvous
    assert all(isinstance(make_env(name, {}, 0), Env) for name in tasks())


def test_unknown_task_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="unknown task 'rendevous'; did you mean 'rendezvous'"):
        make_env("rendevous", {}, 0)


def test_a_name_is_taken_once() -> None:
    class Impostor(Rendezvous):
        pass

    with pytest.raises(ConfigError, match="'rendezvous' is already"):
        register(Impostor)
    assert tasks()["rendezvous"] is Rendezvous


def test_user_class_gets_a_plain_dict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES)
    env = make_env("lights_out:LightsOut", {"horizon": 5}, 1, "heldout")
    assert env.horizon == 5
    assert isinstance(env, Env)


def test_user_class_with_params_gets_them_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES)
    assert len(make_env("mpe_spread:MpeSpread", {"agents": 3}, 1).agents) == 3
    with pytest.raises(ConfigError, match="unknown parameter 'agens' = 3; did you mean 'agents'"):
        make_env("mpe_spread:MpeSpread", {"agens": 3}, 1)


def test_missing_module_and_class_name_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES)
    with pytest.raises(ConfigError, match="no module 'light_out'; did you mean 'lights_out'"):
        make_env("light_out:LightsOut", {}, 0)
    with pytest.raises(ConfigError, match=r"no class 'LightOut' in module 'lights_out'; did you mean 'LightsOut'"):
        make_env("lights_out:LightOut", {}, 0)
    with pytest.raises(ConfigError, match="not a module name"):
        make_env(":LightsOut", {}, 0)


def test_an_error_inside_the_users_module_is_shown_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_task_module.py").write_text("import no_such_library\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        make_env("broken_task_module:Thing", {}, 0)


@pytest.mark.parametrize(("line", "kind"), [("int(None)", TypeError), ("int('x')", ValueError)])
def test_no_error_of_the_users_module_is_taken_for_a_bad_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, kind: type[Exception]
) -> None:
    (tmp_path / f"wrong_{kind.__name__.lower()}.py").write_text(f"{line}\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind):
        make_env(f"wrong_{kind.__name__.lower()}:Thing", {}, 0)

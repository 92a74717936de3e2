"""Where relative paths of a config begin."""

import os
import re
from pathlib import Path

import pytest

from raynium.config.load import load_config
from raynium.config.paths import RAY_JOB_VARIABLE, collisions, resolve
from raynium.errors import ConfigError

pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch, tmp_path):
    """A laptop: a current folder, a home folder, no Ray job."""
    for variable in ("RAYNIUM_HOME", RAY_JOB_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    (tmp_path / "here").mkdir()
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")


def config(*overrides):
    return load_config("quickstart", overrides)


def places(resolved):
    data = resolved.data
    return resolved.run.root, data.path, data.source, data.tokenizer


RELATIVE = ("data.source=corpus", "data.tokenizer=tok/../tokenizer.json", "tracking.uri=mlruns")


def test_on_a_laptop_paths_begin_at_the_current_folder(tmp_path):
    here = str(tmp_path / "here")
    resolved = resolve(config(*RELATIVE))
    expected = (f"{here}/runs", f"{here}/runs/data/corpus", f"{here}/corpus", f"{here}/tokenizer.json")
    assert places(resolved) == expected
    assert resolved.tracking.uri == f"{here}/mlruns"


def test_a_base_folder_takes_the_place_of_the_current_one():
    assert resolve(config(), base_folder="/base").run.root == "/base/runs"


def test_in_a_ray_job_paths_begin_at_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv(RAY_JOB_VARIABLE, "{}")
    assert resolve(config()).run.root == str(tmp_path / "home/runs")


def test_in_a_folder_that_ray_unpacked_paths_begin_at_the_home_folder(tmp_path, monkeypatch):
    unpacked = tmp_path / "session_1/runtime_resources/working_dir_files/_ray_pkg_12/sub"
    unpacked.mkdir(parents=True)
    monkeypatch.chdir(unpacked)
    assert resolve(config()).data.path == str(tmp_path / "home/runs/data/python-stdlib")


def test_ray_names_that_variable_so():
    from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

    assert RAY_JOB_VARIABLE == RAY_JOB_CONFIG_JSON_ENV_VAR


@pytest.mark.parametrize("in_job", [False, True])
@pytest.mark.parametrize(
    ("home", "root"),
    [("/shared", "/shared/runs"), ("s3://bucket/team/", "s3://bucket/team/runs"), ("~/team", "{home}/team/runs")],
)
def test_raynium_home_wins_everywhere(monkeypatch, tmp_path, in_job, home, root):
    monkeypatch.setenv("RAYNIUM_HOME", home)
    if in_job:
        monkeypatch.setenv(RAY_JOB_VARIABLE, "{}")
    assert resolve(config()).run.root == root.format(home=tmp_path / "home")


def test_a_relative_raynium_home_is_refused(monkeypatch):
    monkeypatch.setenv("RAYNIUM_HOME", "somewhere")
    with pytest.raises(ConfigError, match="RAYNIUM_HOME is 'somewhere': it must be an absolute folder or a URL"):
        resolve(config())


def test_a_path_cannot_leave_a_url(monkeypatch):
    monkeypatch.setenv("RAYNIUM_HOME", "s3://bucket/team")
    with pytest.raises(
        ConfigError, match=r"run.root is '../other': below RAYNIUM_HOME=s3://bucket/team a path cannot go up"
    ):
        resolve(config("run.root=../other"))


def test_absolute_paths_urls_and_words_stay():
    given = config(
        "run.root=/a/b", "data.path=s3://bucket/x", "data.tokenizer=file:///t.json", "tracking.uri=http://host:5000"
    )
    assert resolve(given) == given
    for word in ("sqlite:////a/mlflow.db", "databricks"):
        assert resolve(config(f"tracking.uri={word}")).tracking.uri == word


def test_a_relative_sqlite_file_becomes_absolute():
    assert (
        resolve(config("tracking.uri=sqlite:///runs/mlflow.db")).tracking.uri
        == f"sqlite:///{Path.cwd()}/runs/mlflow.db"
    )


def test_tilde_is_the_home_folder(tmp_path):
    assert resolve(config("run.root=~/runs")).run.root == str(tmp_path / "home/runs")


def test_resolving_twice_changes_nothing(monkeypatch):
    once = resolve(config(*RELATIVE))
    monkeypatch.chdir(os.sep)
    assert resolve(once) == once


def test_all_bad_paths_are_reported_at_once():
    with pytest.raises(ConfigError) as caught:
        resolve(config("run.root=s3:/bucket", "data.path=~nobody-of-that-name/x"))
    assert caught.value.problems == [
        "run.root is 's3:/bucket': a URL has two slashes and a name after its scheme, as s3://bucket/folder",
        "data.path is '~nobody-of-that-name/x': there is no user of that name; give an absolute path",
    ]


def test_a_store_of_a_mixture_is_a_name_under_the_root_a_path_or_a_url(tmp_path):
    stores = "[{store: web, weight: 1}, {store: ./code, weight: 1}, {store: s3://bucket/books, weight: 1}]"
    resolved = resolve(config("run.root=s3://bucket/runs/", "data.source=null", f"data.mixture={stores}"))
    places = [store.store for store in resolved.data.mixture]
    assert places == ["s3://bucket/runs/data/web", str(tmp_path / "here/code"), "s3://bucket/books"]
    assert [store.name for store in resolved.data.mixture] == ["web", "code", "books"]
    assert resolve(resolved) == resolved


def test_a_store_of_a_mixture_lies_outside_the_run():
    stores = "[{store: runs/quickstart/web, weight: 1}]"
    found = collisions(resolve(config("data.source=null", f"data.mixture={stores}")))
    assert len(found) == 1 and found[0].startswith("data.mixture[0].store is '")


@pytest.mark.parametrize("source", [".", "..", "runs", "runs/data/here"])
def test_a_source_does_not_hold_what_runs_write(source: str):
    found = collisions(resolve(config(f"data.source={source}", "data.path=runs/data/here")))
    assert found and all(
        re.match(r"data\.source is '.*', which holds (run\.root|data\.path), '", each) for each in found
    )
    assert not collisions(resolve(config("data.source=*.txt", "data.path=runs/data/here")))

"""The folder in /tmp that anybody could have made before us."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from raynium.config.local_folders import cache_home, ignored_tmpdir, local_path, scratch_folder, temporary_parent
from raynium.errors import ConfigError, StoreError
from raynium.node.scratch import log_folder

pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True)
def temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield tmp_path


def ours(temporary_folder: Path) -> Path:
    return temporary_folder / f"raynium-{os.getuid()}"


def test_it_is_made_for_this_user_alone_and_found_again(temporary_folder: Path) -> None:
    assert scratch_folder() == scratch_folder() == ours(temporary_folder)
    assert ours(temporary_folder).stat().st_mode & 0o777 == 0o700


def test_a_folder_that_others_may_write_is_refused(temporary_folder: Path) -> None:
    ours(temporary_folder).mkdir()
    ours(temporary_folder).chmod(0o777)
    with pytest.raises(StoreError, match=r"that nobody else may write; .* mode drwxrwxrwx\. Remove it, or set TMPDIR"):
        scratch_folder()


def test_a_folder_of_another_user_is_refused(temporary_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = temporary_folder / f"raynium-{os.getuid() + 1}"
    theirs.mkdir(mode=0o700)
    uid = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    with pytest.raises(StoreError, match=f"must be a folder of user {uid + 1} .* has owner {uid}"):
        scratch_folder()


def test_a_link_is_not_followed(temporary_folder: Path) -> None:
    (temporary_folder / "elsewhere").mkdir(mode=0o700)
    ours(temporary_folder).symlink_to(temporary_folder / "elsewhere")
    with pytest.raises(StoreError, match="must be a folder of user"):
        scratch_folder()


def test_a_file_in_its_place_is_named(temporary_folder: Path) -> None:
    ours(temporary_folder).write_text("")
    with pytest.raises(StoreError, match=r"raynium-\d+ cannot be made: File exists\. Remove it"):
        scratch_folder()


def test_runs_of_one_name_in_two_roots_have_two_log_folders() -> None:
    first, second = log_folder("file:///a/first"), log_folder("s3://bucket/first")
    assert first != second
    assert first.name.startswith("first-") and second.name.startswith("first-")
    assert first.parent == second.parent == scratch_folder() / "logs"


def test_a_machine_without_a_temporary_folder_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_found() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", none_found)
    with pytest.raises(StoreError, match=r"^there is no temporary folder .* found in \['/tmp'\]\): set TMPDIR to one$"):
        temporary_parent()


def test_a_temporary_folder_that_no_text_can_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/tmp/\udcff")
    with pytest.raises(StoreError, match=r"^the temporary folder '/tmp/\\udcff' holds bytes .*: set TMPDIR"):
        scratch_folder()


def test_a_home_folder_that_nobody_has_is_refused_in_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"^~nosuch/x begins with a home folder that is not known here: give an abs"):
        local_path("~nosuch/x")
    monkeypatch.setenv("HOME", "/h")
    assert [str(local_path(each)) for each in ("~/x", "x", Path("/a/x"))] == ["/h/x", f"{Path.cwd()}/x", "/a/x"]


def test_a_tmpdir_that_python_cannot_use_is_named(temporary_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/nonexistent")
    assert ignored_tmpdir() == [
        f"TMPDIR is /nonexistent, which is no folder that can be written: {temporary_folder} is used. Make it, or set "
        "TMPDIR to another"
    ]
    for fine in ("", f"{temporary_folder}/"):
        monkeypatch.setenv("TMPDIR", fine)
        assert ignored_tmpdir() == []


@pytest.mark.parametrize("home", [None, "/proc/no/such", "/proc"])
def test_caches_lie_in_the_scratch_folder_where_no_home_folder_can_be_written(
    home: str | None, temporary_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr("pwd.getpwuid", nobody)
    monkeypatch.setattr(os, "access", lambda path, how: not str(path).startswith("/proc"))
    if home is None:
        monkeypatch.delenv("HOME")
    else:
        monkeypatch.setenv("HOME", home)
    assert cache_home() == scratch_folder() / "cache"


def test_caches_lie_in_a_home_folder_that_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "new"))
    assert cache_home() == tmp_path / "new/.cache/raynium"

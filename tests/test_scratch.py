"""The folder in /tmp that anybody could have made before us."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from raynium.errors import StoreError
from raynium.node.scratch import log_folder, scratch_folder

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

"""Where a store in S3 gets its credentials from, and what becomes of those that change while it lives."""

from pathlib import Path
from uuid import uuid4

import pytest
import s3fs

from raynium.errors import StoreError
from raynium.storage.store import Store


@pytest.fixture(autouse=True)
def no_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None in the environment; what `tmp_path` holds counts: files `credentials` and `config`."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()  # which all stores of this process share


@pytest.mark.s3
def test_keys_that_come_later_or_are_renewed_in_a_file_are_taken_over(
    s3_server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_keys(access_key: str) -> None:
        secret = s3_server.env["AWS_SECRET_ACCESS_KEY"]
        text = f"[default]\naws_access_key_id={access_key}\naws_secret_access_key={secret}\n"
        (tmp_path / "credentials").write_text(text)

    bucket = s3_server.create_bucket(f"b-{uuid4().hex[:12]}")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
    store = Store(f"{bucket}/first")
    with pytest.raises(StoreError, match="Unable to locate credentials"):
        store.write_new("object", b"1")
    write_keys(s3_server.env["AWS_ACCESS_KEY_ID"])
    store.write_new("object", b"1")

    write_keys("expired")
    s3fs.S3FileSystem.clear_instance_cache()
    store = Store(f"{bucket}/second")
    with pytest.raises(StoreError, match="the access key is unknown there"):
        store.write_new("object", b"1")
    write_keys(s3_server.env["AWS_ACCESS_KEY_ID"])
    store.write_new("object", b"1")
    assert store.read("object") == b"1"


EXPIRED = '{"Version": 1, "AccessKeyId": "a", "SecretAccessKey": "b", "Expiration": "2020-01-01T00:00:00Z"}'


@pytest.mark.parametrize(
    ("program", "says"),
    [
        ("false", "Error when retrieving credentials"),
        (f"echo '{EXPIRED}'", "the refreshed credentials are still expired"),
    ],
)
def test_credentials_that_a_program_does_not_give_are_told(tmp_path: Path, program: str, says: str) -> None:
    (tmp_path / "program").write_text(program)
    (tmp_path / "config").write_text(f"[default]\ncredential_process = sh {tmp_path}/program\n")
    with pytest.raises(StoreError, match=f"{says}.* see why the profile's credential_process"):
        Store("s3://bucket/run", options={"endpoint_url": "http://127.0.0.1:9"}).read("object")

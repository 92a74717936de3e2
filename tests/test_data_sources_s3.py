"""Sources in S3: listed, read in ranges and ahead of use, with credentials of their own. Against a real server."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs

from raynium.config.schema import DataSection
from raynium.data.build import store_build
from raynium.data.build.prepare import check_data, prepare_store
from raynium.data.build.store_build import build_from_recipe
from raynium.data.manifest import Recipe, StoreManifest
from raynium.data.runner import in_this_process
from raynium.data.text.documents import Document
from raynium.data.text.left_out import LeftOut
from raynium.data.text.sources import open_source, plan_splits, read_split
from raynium.data.tokenizer import Tokenizer
from raynium.errors import DataError, StoreError
from raynium.storage import reading
from raynium.storage.backend import Head
from raynium.storage.reading import open_reading, will_read

pytestmark = pytest.mark.s3


@pytest.fixture
def bucket(s3_server: Any, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    """A bucket of this test's own; the environment says where it is."""
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    reading._bucket.cache_clear()
    yield s3_server.create_bucket(f"sources-{abs(hash(request.node.nodeid)) % 10**9}")
    reading._bucket.cache_clear()


def client() -> Any:
    """Of this test's environment: boto3's default session keeps the credentials of whoever used it first."""
    return boto3.Session().client("s3")


def put(bucket: str, key: str, content: bytes) -> None:
    client().put_object(Bucket=bucket.removeprefix("s3://"), Key=key, Body=content)


def lines(first: int, number: int) -> bytes:
    texts = (f"document {n}: " + "word " * (n % 50) for n in range(first, first + number))
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def test_a_folder_a_glob_and_one_object_are_sources_whatever_their_names(bucket: str):
    for key in (
        "web/a b&c+é.jsonl",
        "web/_part/1.txt",
        "web/2.csv",
        "web/.x/3.txt",
        "web/",
        "website/4.txt",
        "a.jsonl/5.txt",
    ):
        put(bucket, key, b'{"text": "x"}' if "jsonl" in key else b"y")
    source = open_source(f"{bucket}/web")
    assert [file.name for file in source.files] == ["_part/1.txt", "a b&c+é.jsonl"]
    assert list(source.items()) == [
        LeftOut(".x/3.txt", "hidden"),
        LeftOut("2.csv", "unread kind", 1, ".csv"),
        Document("_part/1.txt", "y"),
        Document("a b&c+é.jsonl:0", "x"),
    ]
    for given, names in (
        (f"{bucket}/web/", ["_part/1.txt", "a b&c+é.jsonl"]),
        (f"{bucket}/web/*.jsonl", ["a b&c+é.jsonl"]),
        (f"{bucket}/web*/*.txt", ["website/4.txt"]),
        (f"{bucket}/**/*.txt", ["a.jsonl/5.txt", "web/_part/1.txt", "website/4.txt"]),
        (f"{bucket}/web/a b&c+é.jsonl", ["a b&c+é.jsonl"]),
        (f"{bucket}/a.jsonl", ["5.txt"]),
    ):
        assert [file.name for file in open_source(given).files] == names


def test_splits_of_large_objects_give_what_the_same_files_give_on_disk(bucket: str, tmp_path: Path):
    content = lines(0, 20_000)
    table = pa.table({"text": [json.loads(line)["text"] for line in content.splitlines()]})
    pq.write_table(table, tmp_path / "b.parquet", row_group_size=1_500)
    (tmp_path / "a.jsonl").write_bytes(content)
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    (tmp_path / "c.jsonl.zst").write_bytes(sink.getvalue().to_pybytes())
    for path in tmp_path.iterdir():
        put(bucket, f"d/{path.name}", path.read_bytes())
    expected = list(open_source(str(tmp_path)).items())
    source = open_source(f"{bucket}/d")
    splits = plan_splits(source, most_bytes=300_000)
    assert len(splits) > 8 and len(expected) == 60_000
    assert [item for split in splits for item in read_split(split)] == expected


def test_any_reads_and_seeks_give_the_bytes_of_the_object(bucket: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reading, "LONE_WINDOW_BYTES", 700)
    monkeypatch.setattr(reading, "FIRST_WINDOW_BYTES", 1_000)
    monkeypatch.setattr(reading, "MOST_WINDOW_BYTES", 4_000)
    content = random.Random(0).randbytes(60_000)
    put(bucket, "a.bin", content)
    dice = random.Random(1)
    with open_reading(f"{bucket}/a.bin") as stream:
        position = 0
        for _ in range(300):
            if dice.random() < 0.1:
                will_read(stream, dice.randrange(70_000), dice.randrange(70_000))
            if dice.random() < 0.2:
                position = stream.seek(*dice.choice([(dice.randrange(70_000), 0), (-dice.randrange(60_000), 2)]))
            number = dice.choice([1, 10, 500, 3_000, 20_000])
            assert stream.read(number) == content[position : position + number]
            position = stream.tell()
        stream.seek(0)
        assert b"".join(iter(lambda: stream.read(777), b"")) == content


@pytest.fixture
def asked(bucket: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The first byte and the number of bytes of every request for them."""
    found: list[tuple[int, int]] = []
    backend = reading._bucket(bucket.removeprefix("s3://"), None)
    read_into = backend.read_into

    def noted(key: str, start: int, buffers: Any) -> None:
        found.append((start, sum(map(len, buffers))))
        read_into(key, start, buffers)

    monkeypatch.setattr(backend, "read_into", noted)
    return found


def test_what_will_be_read_comes_in_windows_that_grow_ahead_of_use_and_nothing_else(bucket: str, asked: Any):
    put(bucket, "a.bin", bytes(40 * 2**20))
    with open_reading(f"{bucket}/a.bin") as stream:
        stream.seek(3 * 2**20)
        stream.read(10)
        assert asked == [(3 * 2**20, reading.LONE_WINDOW_BYTES)]
        asked.clear()
        will_read(stream, 2**20, 21 * 2**20)
        stream.seek(2**20)
        stream.read(10)
        # The first is being read, the second is on its way.
        assert asked == [(2**20, 2**19), (2**20 + 2**19, 2**21)]
        while stream.tell() < 21 * 2**20:
            stream.read(100_000)
    sizes = [size for _, size in sorted(asked)]
    assert sizes[:4] == [2**19, 2**21, 2**23, 2**23] and sum(sizes[:5]) == 20 * 2**20
    assert sizes[5:] in ([], [reading.LONE_WINDOW_BYTES])


def test_a_read_that_failed_gives_the_right_bytes_when_tried_again(bucket: str, monkeypatch: pytest.MonkeyPatch):
    content = random.Random(0).randbytes(3 * 2**20)
    put(bucket, "a.bin", content)
    backend = reading._bucket(bucket.removeprefix("s3://"), None)
    read_into, fails = backend.read_into, False

    def sometimes(*request: Any) -> None:
        if fails:
            raise StoreError("the network is away")
        read_into(*request)

    monkeypatch.setattr(backend, "read_into", sometimes)
    with open_reading(f"{bucket}/a.bin") as stream:
        for begin, end in ((0, 0), (2**20, 2**21)):
            will_read(stream, begin, end)
            assert stream.read(10) == content[:10]
            fails = True
            stream.seek(2**20)
            with pytest.raises(StoreError, match="away"):
                stream.read(10)
            fails = False
            assert stream.read(10) == content[2**20 : 2**20 + 10]
            stream.seek(0)


def test_of_a_table_only_the_footer_and_the_column_of_text_are_fetched(bucket: str, asked: Any):
    dice = random.Random(0)
    texts = [f"row {n}" + "x" * 400 for n in range(40_000)]
    rows = {"text": texts, "other": [dice.randbytes(200) for _ in texts]}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(rows), sink, row_group_size=10_000, compression="none", use_dictionary=False)
    put(bucket, "a.parquet", sink.getvalue().to_pybytes())
    assert len(list(open_source(f"{bucket}/a.parquet").items())) == 40_000
    assert sum(size for _, size in asked) < 40_000 * 420 + 6 * reading.LONE_WINDOW_BYTES < 40_000 * 600


def test_small_objects_are_opened_ahead_of_use_and_fetched_in_one_piece(bucket: str, monkeypatch: pytest.MonkeyPatch):
    for number in range(40):
        put(bucket, f"d/{number:02}.txt", f"text {number}".encode())
    backend = reading._bucket(bucket.removeprefix("s3://"), None)
    head, asked = backend.head, set[str]()

    def noted(key: str) -> Head:
        asked.add(key)
        return head(key)

    monkeypatch.setattr(backend, "head", noted)
    [split] = plan_splits(open_source(f"{bucket}/d"))
    items = read_split(split)
    assert next(items) == Document("00.txt", "text 0")
    # All but those that were waiting for a place, also where nobody reads on.
    items.close()
    assert 1 <= len(asked) <= reading.OPEN_AHEAD
    assert list(read_split(split)) == [Document(f"{number:02}.txt", f"text {number}") for number in range(40)]
    client().delete_object(Bucket=bucket.removeprefix("s3://"), Key="d/20.txt")
    items = read_split(split)
    assert [next(items)[1] for _ in range(20)] == [f"text {number}" for number in range(20)]
    with pytest.raises(DataError, match=r"d/20\.txt cannot be read: .* does not exist"):
        next(items)


def use_profile(s3_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The profiles "research" and "wrong" instead of the environment. Returns the keys of the former."""
    place = f"region = us-east-1\nendpoint_url = {s3_server.endpoint}\n"
    (tmp_path / "config").write_text(f"[profile research]\n{place}[profile wrong]\n{place}")
    keys = {name.lower(): value for name, value in s3_server.env.items() if name.startswith("AWS_") and "KEY" in name}
    research = "".join(f"{key} = {value}\n" for key, value in keys.items())
    wrong = research.replace(s3_server.env["AWS_SECRET_ACCESS_KEY"], "wrong")
    (tmp_path / "credentials").write_text(f"[research]\n{research}[wrong]\n{wrong}")
    for name in s3_server.env:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    # s3fs keeps clients, with what they found.
    s3fs.S3FileSystem.clear_instance_cache()
    return keys


def test_a_profile_has_the_credentials_and_the_place_of_a_source(
    bucket: str, s3_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    put(bucket, "web/a.txt", b"x")
    keys = use_profile(s3_server, tmp_path, monkeypatch)
    source = open_source(f"{bucket}/web", profile="research")
    assert list(source.items()) == [Document("a.txt", "x")]
    assert all(secret not in repr(plan_splits(source)) for secret in keys.values())
    with pytest.raises(DataError, match=r"data\.source = 's3://.*profile .*absent.*could not be found"):
        open_source(f"{bucket}/web", profile="absent")
    for given in (f"{bucket}/web", f"{bucket}/web/a.txt", f"{bucket}/web/*"):
        with pytest.raises(DataError, match=r"data\.source = 's3://.*(secret key is wrong|allow s3:GetObject)"):
            open_source(given, profile="wrong")


def test_a_saved_dataset_in_s3_is_the_files_that_its_state_names(bucket: str):
    table = pa.table({"text": ["one", "two"]})
    for name in ("data-00000-of-00001", "cache-0123"):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        put(bucket, f"d/{name}.arrow", sink.getvalue().to_pybytes())
    put(bucket, "d/dataset_info.json", b"{}")
    put(bucket, "d/state.json", b'{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
    assert [item[1] for item in open_source(f"{bucket}/d").items()] == ["one", "two"]


def test_a_store_is_built_with_the_profile_and_does_not_name_it(
    bucket: str, s3_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    put(bucket, "web/a.jsonl", lines(0, 200))
    tokenizer = Tokenizer.train((f"document {n}" for n in range(9)), vocab_size=300)
    use_profile(s3_server, tmp_path, monkeypatch)
    recipe = Recipe(sources=[f"{bucket}/web"], text_field="text", heldout_fraction=0.1, dedup="none")
    how = {"runner": in_this_process, "tell": lambda line: None}
    with pytest.raises(DataError, match="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"):
        build_from_recipe(tmp_path / "store", recipe, tokenizer, **how)
    manifest = build_from_recipe(tmp_path / "store", recipe, tokenizer, profile="research", **how)
    assert manifest.train.documents + manifest.heldout.documents == 200
    assert "research" not in (tmp_path / "store/manifest.json").read_text()


def test_the_source_of_a_run_has_a_field_a_profile_and_no_duplicates(
    bucket: str, s3_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    put(bucket, "web/a.jsonl", 2 * lines(0, 200).replace(b'"text"', b'"body"'))
    use_profile(s3_server, tmp_path, monkeypatch)
    given: dict[str, Any] = {"source": f"{bucket}/web", "path": str(tmp_path / "store"), "seq_len": 16}
    asked = {**given, "text_field": "body", "aws_profile": "research", "dedup": "exact"}

    def prepare(fields: dict[str, Any]) -> StoreManifest:
        data, tell = DataSection(**fields), lambda line: None
        found = check_data(data, model_vocab_size=300, tell=tell)
        where = {"run": str(tmp_path / "run"), "cache_dir": tmp_path / "cache"}
        return prepare_store(data, model_vocab_size=300, surveyed=found, tell=tell, **where).manifest

    with pytest.raises(DataError, match="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"):
        prepare(asked | {"aws_profile": None})
    with pytest.raises(DataError, match=r"no field 'text'"):
        prepare(asked | {"text_field": "text"})
    manifest = prepare(asked)
    assert manifest.train.documents + manifest.heldout.documents == 200
    assert [(group.reason, group.number) for group in manifest.left_out] == [("duplicate", 200)]
    for name, value in (("text_field", "text"), ("dedup", "none")):
        with pytest.raises(DataError, match=rf"built with data\.{name} = '.*', the config says '{value}'; set it back"):
            prepare(asked | {name: value})


@pytest.mark.parametrize("given", ["web", "web/*.jsonl", "web/b.jsonl"])
def test_an_object_replaced_by_one_of_its_size_between_two_tries_of_a_build_is_tokenised_anew(
    bucket: str, given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for key in ("web/a.jsonl", "web/b.jsonl"):
        put(bucket, key, lines(0, 200))
    tokenizer = Tokenizer.train((f"document {n}" for n in range(9)), vocab_size=300)
    recipe = Recipe(sources=[f"{bucket}/{given}"], text_field="text", heldout_fraction=0.1, dedup="none")
    how = {"runner": in_this_process, "tell": lambda line: None}
    with monkeypatch.context() as patch:
        # It breaks off when all is tokenised.
        patch.setattr(store_build, "finish", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build_from_recipe(tmp_path / "store", recipe, tokenizer, **how)
    put(bucket, "web/b.jsonl", lines(0, 200).replace(b"word", b"drow"))
    manifest = build_from_recipe(tmp_path / "store", recipe, tokenizer, **how)
    assert manifest == build_from_recipe(tmp_path / "expected", recipe, tokenizer, **how)


def test_what_is_not_there_is_told(bucket: str):
    put(bucket, "web/a.csv", b"x")
    for given, message in (
        (f"{bucket}/nothing", r"no file of a kind that is read \(.*\) under s3://.*/nothing; give a folder"),
        (f"{bucket}/nothing/a.jsonl", r"no file of a kind that is read \(.*\) under s3://.*/nothing/a\.jsonl;"),
        (f"{bucket}/web/*.jsonl", r"no file under s3://.*/web matches '\*\.jsonl'"),
        (f"{bucket}/web", r"there is a\.csv \(unread kind\)"),
        ("s3://no-such-bucket-here/web", r"data\.source = 's3://no-such.*: .*bucket"),
    ):
        with pytest.raises(DataError, match=message):
            open_source(given)


def test_what_s3_refuses_while_it_is_read_is_told(bucket: str, monkeypatch: pytest.MonkeyPatch):
    put(bucket, "a.jsonl", lines(0, 10_000))
    [split] = plan_splits(open_source(bucket))
    backend = reading._bucket(bucket.removeprefix("s3://"), None)

    def denied(*_: Any) -> None:
        raise StoreError(f"{bucket}/a.jsonl: denied; allow s3:GetObject on it to this role")

    for method in ("read_into", "head"):
        monkeypatch.setattr(backend, method, denied)
        with pytest.raises(DataError, match=r"a\.jsonl: denied; allow s3:GetObject"):
            list(read_split(split))


def test_an_object_that_changed_or_went_since_it_was_listed_is_refused(bucket: str):
    put(bucket, "a.txt", b"x")
    source = open_source(bucket)
    put(bucket, "a.txt", b"xy")
    with pytest.raises(DataError, match=r"a\.txt has 2 bytes, and had 1 when its folder was listed"):
        list(source.items())
    source = open_source(bucket)
    put(bucket, "a.txt", b"yx")
    with pytest.raises(DataError, match=r"a\.txt was written to after its folder was listed: let nothing write"):
        list(source.items())
    client().delete_object(Bucket=bucket.removeprefix("s3://"), Key="a.txt")
    with pytest.raises(DataError, match=r"a\.txt cannot be read: .* does not exist"):
        list(source.items())

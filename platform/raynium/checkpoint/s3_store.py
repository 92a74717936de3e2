"""A store in S3, through s3fs. No torch.

Checksums are CRC64NVME, given by us: S3 (and SeaweedFS, and Ceph) refuse bytes that differ, part by part and whole.
"""

import asyncio
import os
import threading
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import s3fs
from botocore.exceptions import BotoCoreError, ClientError

from raynium.checkpoint.checksum import PART_BYTES, FileChecksums, checksum, checksum_units, num_units, to_text
from raynium.checkpoint.file_store import after, mapped
from raynium.checkpoint.store import KeyExists, KeyMissing, Listing, refuse_large
from raynium.errors import StoreError

T = TypeVar("T")

PARTS_IN_FLIGHT = 4  # of 64 MiB: hides S3's latency; each is one copy in memory
_MAX_UPLOAD_PARTS = 10_000  # S3's limit
_DELETE_BATCH = 1000  # S3's limit
_MAX_ATTEMPTS = 8  # per request, by botocore, with growing pauses
_CLEANUP_SECONDS = 20
_READ_ATTEMPTS = 6  # connections that may break while one range is read, with progress or without

_REMEDIES = {
    "NoSuchBucket": "create the bucket, or set run.root to one that exists",
    "AccessDenied": "allow s3:GetObject, s3:PutObject, s3:DeleteObject and s3:ListBucket on it to this role",
    "403": "allow s3:GetObject, s3:PutObject, s3:DeleteObject and s3:ListBucket on it to this role",
    "InvalidAccessKeyId": "the access key is unknown there: set AWS_ACCESS_KEY_ID or AWS_PROFILE",
    "SignatureDoesNotMatch": "the secret key is wrong: set AWS_SECRET_ACCESS_KEY or AWS_PROFILE",
    "ExpiredToken": "the credentials have expired: renew them",
    "InvalidBucketName": "set run.root to a valid bucket name (3 to 63 lower-case letters, digits, dots and hyphens)",
    "NoCredentialsError": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or an instance role",
    "EndpointConnectionError": "check the network, and AWS_ENDPOINT_URL if it is set",
    "ConnectTimeoutError": "check the network, and AWS_ENDPOINT_URL if it is set",
    "SlowDown": "S3 asks for fewer requests: try again later",
    "BadDigest": "the bytes changed on the way: try again",
}


class S3Backend:
    """Keys are objects under `prefix` of `bucket`."""

    def __init__(self, bucket: str, prefix: str, options: dict[str, Any], *, max_attempts: int = _MAX_ATTEMPTS):
        self.bucket, self.prefix, self._options = bucket, prefix, options
        endpoint = (
            options.get("endpoint_url") or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        )
        if endpoint and "@" in urlsplit(endpoint).netloc:
            raise StoreError("the S3 endpoint's address may not hold credentials, because addresses are logged")
        self._fs = s3fs.S3FileSystem(
            **options,
            use_listings_cache=False,
            config_kwargs={
                # We send and check CRC64NVME ourselves; botocore's default would add a slower CRC32 to every request
                "request_checksum_calculation": "when_required",
                "response_checksum_validation": "when_required",
                "connect_timeout": 10,
                "read_timeout": 120,  # s3fs: 15 s, less than a throttled bucket may take
                "retries": {"mode": "standard", "max_attempts": max_attempts},
                "max_pool_connections": 32,
            },
        )
        self._fs.retries = 1  # s3fs would multiply botocore's attempts by five

    def put(self, key: str, data: bytes, *, exclusive: bool) -> None:
        with self._errors(key):
            self._run(self._put(key, data, exclusive=exclusive, crc=checksum(data)))

    def read(self, key: str, *, max_bytes: int) -> bytes:
        with self._errors(key):
            return self._run(self._read(key, max_bytes))

    def read_into(self, key: str, start: int, buffers: Sequence[memoryview]) -> None:
        with self._errors(key):
            self._run(self._read_into(key, start, buffers))

    def size(self, key: str) -> int:
        with self._errors(key):
            return self._call("head_object", key)["ContentLength"]

    def list(self, folder: str, *, recursive: bool) -> Listing:
        sizes: dict[str, int] = {}
        folders: list[str] = []
        start = f"{self._object(folder)}/".lstrip("/")
        base = len(f"{self.prefix}/") if self.prefix else 0
        request = {"Prefix": start, "Delimiter": "" if recursive else "/"}
        while True:
            with self._errors(folder):
                page = self._run(self._fs._call_s3("list_objects_v2", Bucket=self.bucket, **request))
            for item in page.get("Contents", ()):
                if not item["Key"].endswith("/"):  # "folders" made by web consoles are empty objects
                    sizes[item["Key"][base:]] = item["Size"]
            folders += [item["Prefix"][base:-1] for item in page.get("CommonPrefixes", ())]
            if not page.get("IsTruncated"):
                return Listing(sizes, tuple(folders))
            request["ContinuationToken"] = page["NextContinuationToken"]

    def delete(self, key: str) -> None:
        with self._errors(key):
            self._call("delete_object", key)

    def delete_prefix(self, folder: str) -> int:
        keys = list(self.list(folder, recursive=True).sizes)
        for first in range(0, len(keys), _DELETE_BATCH):
            batch = [{"Key": self._object(key)} for key in keys[first : first + _DELETE_BATCH]]
            with self._errors(folder):
                answer = self._run(
                    self._fs._call_s3("delete_objects", Bucket=self.bucket, Delete={"Objects": batch, "Quiet": True})
                )
            for problem in answer.get("Errors", ())[:1]:
                remedy = _REMEDIES.get(problem.get("Code", ""), "try again")
                raise StoreError(
                    f"{self._uri(folder)}: cannot delete {problem['Key']}: {problem.get('Code')}; {remedy}"
                )
        return len(keys)

    def upload_file(self, key: str, path: Path, *, unit_bytes: int) -> FileChecksums:
        try:
            source = path.open("rb")
        except OSError as error:
            raise StoreError(f"cannot upload {path} to {self._uri(key)}: {error.strerror}") from error
        size = os.fstat(source.fileno()).st_size
        with source, self._errors(key):
            view = mapped(source, size)
            # S3 takes at most 10,000 parts a file
            part_bytes = num_units(max(PART_BYTES, num_units(size, _MAX_UPLOAD_PARTS)), unit_bytes) * unit_bytes
            if size <= part_bytes:
                sent = checksum_units(body := bytes(view), unit_bytes)
                self._run(self._put(key, body, exclusive=True, crc=sent.crc))
            else:
                sent = self._run(self._upload_parts(key, view, part_bytes, unit_bytes))
        self._check_stored(key, sent)
        return sent

    def check_reachable(self, *, need_bytes: int) -> None:
        """Fail in seconds, not after all attempts, where the address or the credentials are wrong."""
        del need_bytes  # a bucket has no limit
        impatient = S3Backend(self.bucket, self.prefix, self._options, max_attempts=2)
        with impatient._errors(""):
            impatient._run(impatient._fs._call_s3("list_objects_v2", Bucket=self.bucket, MaxKeys=1))

    # ---- requests -----------------------------------------------------------------------------------------------

    async def _put(self, key: str, data: bytes, *, exclusive: bool, crc: int) -> None:
        condition = {"IfNoneMatch": "*"} if exclusive else {}
        request = {"Bucket": self.bucket, "Key": self._object(key), "Body": data, "ChecksumCRC64NVME": to_text(crc)}
        await self._conditional("put_object", **request, **condition)

    async def _upload_parts(self, key: str, view: memoryview, part_bytes: int, unit_bytes: int) -> FileChecksums:
        """One multipart upload. Whatever ends it early, nothing is left behind to be paid."""
        target = {"Bucket": self.bucket, "Key": self._object(key)}
        kind = {"ChecksumAlgorithm": "CRC64NVME", "ChecksumType": "FULL_OBJECT"}
        started = await self._fs._call_s3("create_multipart_upload", **target, **kind)
        upload = {**target, "UploadId": started["UploadId"]}
        free = asyncio.Semaphore(PARTS_IN_FLIGHT)

        async def send(index: int) -> tuple[FileChecksums, dict[str, Any]]:
            async with free:
                body = bytes(view[index * part_bytes : (index + 1) * part_bytes])
                sums = checksum_units(body, unit_bytes)  # of the copy that is sent: the image may be written meanwhile
                part = {"PartNumber": index + 1, "ChecksumCRC64NVME": to_text(sums.crc)}
                answer = await self._fs._call_s3("upload_part", **upload, **part, Body=body)
                return sums, {**part, "ETag": answer["ETag"]}

        try:
            async with asyncio.TaskGroup() as group:  # one fails: the others are cancelled
                sends = [group.create_task(send(index)) for index in range(num_units(len(view), part_bytes))]
            sums, parts = zip(*(task.result() for task in sends), strict=True)
            whole = FileChecksums(len(view), unit_bytes, tuple(crc for some in sums for crc in some.unit_crcs))
            await self._conditional(
                "complete_multipart_upload",
                **upload,
                MultipartUpload={"Parts": list(parts)},
                ChecksumCRC64NVME=to_text(whole.crc),
                ChecksumType="FULL_OBJECT",
                IfNoneMatch="*",
            )
            return whole
        except BaseException as error:
            await asyncio.shield(self._fs._call_s3("abort_multipart_upload", **upload))
            if isinstance(error, BaseExceptionGroup):
                raise error.exceptions[0] from error  # the first that failed; the rest were cancelled
            raise

    async def _conditional(self, method: str, **request: Any) -> None:
        """A conditional write, repeated while S3 says that another one is in progress (409), not when lost (412)."""
        for attempt in range(_MAX_ATTEMPTS):
            try:
                await self._fs._call_s3(method, **request)
                return
            except OSError as error:
                if _code(error) != "ConditionalRequestConflict" or attempt == _MAX_ATTEMPTS - 1:
                    raise
                await asyncio.sleep(0.1 * 2**attempt)

    async def _read(self, key: str, max_bytes: int) -> bytes:
        """All of one version; when the connection breaks, from the start again, since it may be another by then."""
        for attempt in range(1, _READ_ATTEMPTS + 1):
            answer = await self._fs._call_s3("get_object", Bucket=self.bucket, Key=self._object(key))
            try:
                refuse_large(self._uri(key), answer["ContentLength"], max_bytes)
                return await answer["Body"].read()
            except (BotoCoreError, OSError):
                if attempt == _READ_ATTEMPTS:
                    raise
                await asyncio.sleep(0.1 * 2**attempt)
            finally:
                answer["Body"].close()
        raise AssertionError("returned or raised above")

    async def _read_into(self, key: str, start: int, buffers: Sequence[memoryview]) -> None:
        """Fill `buffers`; when the connection breaks, go on from the byte received."""
        waiting, position, end = list(buffers), start, start + sum(map(len, buffers))
        attempt = 0
        while True:
            wanted = f"bytes={position}-{end - 1}"
            answer = await self._fs._call_s3("get_object", Bucket=self.bucket, Key=self._object(key), Range=wanted)
            try:
                while waiting and (count := await answer["Body"].readinto(waiting[0])):
                    waiting, position = after(waiting, count), position + count
            except (BotoCoreError, OSError):
                attempt += 1
                if attempt == _READ_ATTEMPTS:
                    raise
                await asyncio.sleep(0.1 * 2**attempt)
                continue
            finally:
                answer["Body"].close()
            if waiting:
                raise StoreError(f"{self._uri(key)} ends at byte {position:,} of {end:,} needed")
            return

    def _check_stored(self, key: str, sent: FileChecksums) -> None:
        """Compare what the server says it holds with what was sent, without reading it again."""
        with self._errors(key):
            head = self._call("head_object", key, ChecksumMode="ENABLED")
        stored_crc = head.get("ChecksumCRC64NVME", to_text(sent.crc))  # an old server may keep none
        if head["ContentLength"] != sent.size or stored_crc != to_text(sent.crc):
            raise StoreError(
                f"{self._uri(key)}: sent {sent.size:,} bytes with CRC64NVME {to_text(sent.crc)}, the server holds "
                f"{head['ContentLength']:,} with {stored_crc}; the object is not used. Check the server"
            )

    # ---- plumbing -----------------------------------------------------------------------------------------------

    def _object(self, key: str) -> str:
        return "/".join(part for part in (self.prefix, key) if part)

    def _uri(self, key: str) -> str:
        return f"s3://{self.bucket}/{self._object(key)}".rstrip("/")

    def _call(self, method: str, key: str, **request: Any) -> dict[str, Any]:
        return self._run(self._fs._call_s3(method, Bucket=self.bucket, Key=self._object(key), **request))

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run on s3fs's own thread and wait. Ctrl-C cancels the work and lets it clean up (abort its parts) first."""
        finished = threading.Event()

        async def guarded() -> T:
            try:
                return await work
            finally:
                finished.set()

        assert self._fs.loop is not None  # only an asynchronous file system has none
        future = asyncio.run_coroutine_threadsafe(guarded(), self._fs.loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            finished.wait(_CLEANUP_SECONDS)
            raise

    @contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        """Turn botocore's and s3fs's errors into StoreErrors that say what to do."""
        try:
            yield
        except (OSError, BotoCoreError, ClientError) as error:
            code = _code(error)
            if code == "PreconditionFailed":
                raise KeyExists(f"{self._uri(key)} exists already; another writer was first") from error
            if code in ("NoSuchKey", "404"):
                raise KeyMissing(f"{self._uri(key)} does not exist") from error
            if code == "InvalidRange":
                raise StoreError(f"{self._uri(key)} ends before the bytes that were asked for") from error
            raise StoreError(
                f"{self._uri(key)}: {error}; {_REMEDIES.get(code, 'check the bucket and the network')}"
            ) from error


def _code(error: BaseException) -> str:
    """S3's own word for what went wrong; s3fs keeps it only in the cause of the OSError that it raises."""
    for candidate in (error, error.__cause__):
        if isinstance(candidate, ClientError):
            return candidate.response.get("Error", {}).get("Code", "")
    for candidate in (error, error.__cause__):
        if isinstance(candidate, BotoCoreError):
            return type(candidate).__name__
    return ""

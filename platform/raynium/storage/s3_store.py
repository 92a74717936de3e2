"""A store in S3, through s3fs. No torch.

Checksums are CRC64NVME, given by us: S3 (and SeaweedFS, and Ceph) refuse bytes that differ, part by part and whole.
Each exclusive write stores a mark of its own with the object, as x-amz-meta-raynium-write: when an answer is lost and
the retry finds the key taken, the mark says whether by itself.
"""

import asyncio
import logging
import os
import threading
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import aiohttp
import s3fs
from aiobotocore.session import AioSession
from botocore.credentials import RefreshableCredentials
from botocore.exceptions import BotoCoreError, ClientError

from raynium.config.proxies import spare_loopback
from raynium.errors import StoreError
from raynium.storage.backend import Head, KeyExists, KeyMissing, Listing, refuse_large
from raynium.storage.checksum import PART_BYTES, FileChecksums, checksum, checksum_units, num_units, to_text
from raynium.storage.local_files import mapped
from raynium.storage.s3_body import Destination, MemoryBody, receive
from raynium.storage.s3_errors import (
    TAKEN,
    are_credentials_old,
    check_endpoint,
    code_of,
    passes,
    pause_after,
    remedy_for,
)
from raynium.storage.s3_uploads import LeftOpen, OpenUpload

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Parts of 64 MiB in flight hide S3's latency; they are sent from where they lie, so more costs no memory.
PARTS_IN_FLIGHT = 8
# S3's limits.
_MAX_UPLOAD_PARTS = 10_000
_DELETE_BATCH = 1000
# Tries of a request, over half a minute of SlowDown; and breaks in a row that one read bears without progress.
_MAX_ATTEMPTS = 8
_READ_ATTEMPTS = 6
_READ_PROGRESS_BYTES = 64 * 1024
# s3fs waits 15 s, less than a throttled bucket may take to answer.
_SILENCE_SECONDS = 120
_CLEANUP_SECONDS = 20
_MARK = "raynium-write"
_BROKEN = (BotoCoreError, OSError, aiohttp.ClientError)


class S3Backend:
    """Keys are objects under `prefix` of `bucket`. The "folders" that web consoles make are empty objects, not keys."""

    def __init__(
        self,
        bucket: str,
        prefix: str,
        options: dict[str, Any],
        *,
        tries: int = _MAX_ATTEMPTS,
        limit: float | None = None,
    ):
        """limit: seconds of one call, with all its tries; None: as long as these take."""
        self.bucket, self.prefix, self._options, self._max_attempts = bucket, prefix, options, tries
        self._limit_seconds = limit
        check_endpoint(options, os.environ)
        spare_loopback()
        self._fs = s3fs.S3FileSystem(
            **options,
            use_listings_cache=False,
            config_kwargs={
                # We send and check CRC64NVME ourselves; botocore's default would add a slower CRC32 to every request
                "request_checksum_calculation": "when_required",
                "response_checksum_validation": "when_required",
                # The CRC64NVME header is signed. Without TLS, botocore would hash every body with SHA256 besides
                # (1 CPU s/GiB), which guards only against people who can read and change the traffic anyway
                "s3": {"payload_signing_enabled": False},
                "connect_timeout": 10,
                "read_timeout": _SILENCE_SECONDS,
                # Ours, in `_request`: botocore gives all requests of a process 100 more tries together, and successes
                # give few of them back, so that 32 parts in flight give up after seconds of SlowDown, and later at once
                "retries": {"total_max_attempts": 1},
                "max_pool_connections": 32,
            },
        )
        self._fs.retries = 1
        self._left_open: list[LeftOpen] = []

    def put(self, key: str, data: bytes, *, exclusive: bool) -> None:
        with self._errors(key, "s3:PutObject"):
            self._run(self._put(key, memoryview(data), exclusive=exclusive, crc=checksum(data)))

    def read(self, key: str, *, max_bytes: int) -> bytes:
        with self._errors(key, "s3:GetObject"):
            return self._run(self._read(key, max_bytes))

    def read_into(self, key: str, start: int, buffers: Sequence[memoryview]) -> None:
        with self._errors(key, "s3:GetObject"):
            self._run(self._read_into(key, start, Destination(buffers)))

    def head(self, key: str) -> Head:
        with self._errors(key, "s3:GetObject"):
            head = self._run(self._request("head_object", key, ChecksumMode="ENABLED"))
        return Head(head["ContentLength"], head.get("ChecksumCRC64NVME"), head["ETag"].strip('"'))

    def list(self, folder: str, *, recursive: bool) -> Listing:
        sizes: dict[str, int] = {}
        modified_unix: dict[str, float] = {}
        versions: dict[str, str] = {}
        folders: list[str] = []
        base = len(f"{self.prefix}/") if self.prefix else 0
        request = {"Prefix": self._folder_prefix(folder), "Delimiter": "" if recursive else "/"}
        while True:
            with self._errors(folder, "s3:ListBucket"):
                page = self._run(self._request("list_objects_v2", **request))
            for item in page.get("Contents", ()):
                if not item["Key"].endswith("/"):
                    key = item["Key"][base:]
                    sizes[key], versions[key] = item["Size"], item["ETag"].strip('"')
                    modified_unix[key] = item["LastModified"].timestamp()
            folders += [item["Prefix"][base:-1] for item in page.get("CommonPrefixes", ())]
            if not page.get("IsTruncated"):
                return Listing(sizes, modified_unix, versions, tuple(folders))
            request["ContinuationToken"] = page["NextContinuationToken"]

    def delete(self, key: str) -> None:
        with self._errors(key, "s3:DeleteObject"):
            self._run(self._request("delete_object", key))

    def delete_prefix(self, folder: str) -> int:
        keys = list(self.list(folder, recursive=True).sizes)
        for first in range(0, len(keys), _DELETE_BATCH):
            batch = [{"Key": self._object(key)} for key in keys[first : first + _DELETE_BATCH]]
            with self._errors(folder, "s3:DeleteObject"):
                answer = self._run(self._request("delete_objects", Delete={"Objects": batch, "Quiet": True}))
            for problem in answer.get("Errors", ()):
                # Another process may delete here, too.
                if (code := problem.get("Code", "")) != "NoSuchKey":
                    remedy = remedy_for(code, "s3:DeleteObject")
                    raise StoreError(f"{self._uri(folder)}: cannot delete {problem['Key']}: {code}; {remedy}")
        return len(keys)

    def discard_unfinished(self, under: str, *, older_than_unix: float) -> int:
        count = 0
        for upload in self._open_uploads(under):
            if upload.began.timestamp() < older_than_unix:
                with self._errors(under, "s3:AbortMultipartUpload"):
                    count += self._run(self._abort(upload.target))
        return count

    def upload_file(self, key: str, path: Path, *, unit_bytes: int) -> FileChecksums:
        try:
            source = path.open("rb")
        except OSError as error:
            raise StoreError(f"cannot upload {path} to {self._uri(key)}: {error.strerror}") from error
        with source, self._errors(key, "s3:PutObject and s3:AbortMultipartUpload"):
            view = mapped(source, size := os.fstat(source.fileno()).st_size)
            part_bytes = num_units(max(PART_BYTES, num_units(size, _MAX_UPLOAD_PARTS)), unit_bytes) * unit_bytes
            if size <= part_bytes:
                sent = checksum_units(view, unit_bytes)
                self._run(self._put(key, view, exclusive=True, crc=sent.crc))
            else:
                sent = self._run(self._upload_parts(key, view, part_bytes, unit_bytes))
        self._check_stored(key, sent)
        if self._left_open:
            self._run(self._clean_up_left_open())
        return sent

    def check_reachable(self, *, need_bytes: int) -> None:
        """Fail in seconds, not after all attempts, where the address, the credentials or a permission is wrong."""
        del need_bytes
        S3Backend(self.bucket, self.prefix, self._options, tries=2)._try_requests()

    def _try_requests(self) -> None:
        with self._errors("", "s3:ListBucket"):
            self._run(self._request("list_objects_v2", MaxKeys=1))
        probe = f"probe-{uuid4().hex}"
        with self._errors("", "s3:PutObject"):
            started = self._run(self._request("create_multipart_upload", probe))
        with self._errors("", "s3:AbortMultipartUpload"):
            self._run(self._abort({"Key": started["Key"], "UploadId": started["UploadId"]}))
        with self._errors("", "s3:ListBucketMultipartUploads"):
            self._run(self._request("list_multipart_uploads", MaxUploads=1))

    # ---- writing ------------------------------------------------------------------------------------------------

    async def _put(self, key: str, data: memoryview, *, exclusive: bool, crc: int) -> None:
        request = {"Body": data, "ChecksumCRC64NVME": to_text(crc)}
        if exclusive:
            mark = uuid4().hex
            await self._create(key, mark, "put_object", **request, Metadata={_MARK: mark})
        else:
            await self._request("put_object", key, **request)

    async def _upload_parts(self, key: str, view: memoryview, part_bytes: int, unit_bytes: int) -> FileChecksums:
        """One multipart upload. Whatever ends it early, short of a kill, nothing is left behind to be paid."""
        mark = uuid4().hex
        kind = {"ChecksumAlgorithm": "CRC64NVME", "ChecksumType": "FULL_OBJECT"}
        started = await self._request("create_multipart_upload", key, **kind, Metadata={_MARK: mark})
        upload = {"Key": started["Key"], "UploadId": started["UploadId"]}
        free = asyncio.Semaphore(PARTS_IN_FLIGHT)

        async def send(index: int) -> tuple[FileChecksums, dict[str, Any]]:
            async with free:
                body = view[index * part_bytes : (index + 1) * part_bytes]
                # This holds up the other parts for 6 ms of the 64 MiB's 25.
                sums = checksum_units(body, unit_bytes)
                part = {"PartNumber": index + 1, "ChecksumCRC64NVME": to_text(sums.crc)}
                answer = await self._request("upload_part", **upload, **part, Body=body)
                return sums, {**part, "ETag": answer["ETag"]}

        try:
            async with asyncio.TaskGroup() as group:
                sends = [group.create_task(send(index)) for index in range(num_units(len(view), part_bytes))]
            sums, parts = zip(*(task.result() for task in sends), strict=True)
            whole = FileChecksums(len(view), unit_bytes, tuple(crc for some in sums for crc in some.unit_crcs))
            await self._create(
                key,
                mark,
                "complete_multipart_upload",
                UploadId=upload["UploadId"],
                MultipartUpload={"Parts": list(parts)},
                ChecksumCRC64NVME=to_text(whole.crc),
                ChecksumType="FULL_OBJECT",
            )
        except BaseException as error:
            # The first part to fail: the group has cancelled the others.
            cause = error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error
            await self._clean_up(upload, cause)
            raise cause  # noqa: B904  (`from` would replace the cause in which s3fs keeps S3's own words)
        if started["ResponseMetadata"].get("RetryAttempts"):
            # A lost answer may have begun an upload too; the key is taken, so no open upload to it can win any more.
            for twin in await self._open_uploads_of(key):
                await self._abort(twin.target)
        return whole

    async def _create(self, key: str, mark: str, method: str, **request: Any) -> None:
        """A write that only succeeds if the key is free, or if the retry of a lost answer finds it taken by itself.

        KeyExists if another has it. Repeated while S3 says that another write is in progress (409).
        """
        for attempt in range(1, _MAX_ATTEMPTS + 1):
            try:
                await self._request(method, key, **request, IfNoneMatch="*")
                return
            except (OSError, BotoCoreError) as error:
                code = code_of(error)
                if code == "ConditionalRequestConflict" and attempt < _MAX_ATTEMPTS:
                    await pause_after(attempt)
                    continue
                taken_by = await self._mark_of(key)
                if taken_by == mark:
                    logger.info("%s was written, though the answer was lost (%s)", self._uri(key), error)
                    return
                if taken_by is not None and code in (*TAKEN, "NoSuchUpload"):
                    raise KeyExists(f"{self._uri(key)} exists already; another writer was first") from error
                raise

    async def _mark_of(self, key: str) -> str | None:
        """The mark of `key`'s writer, "" for one without. None: no such key, or an error: the caller has one."""
        try:
            async with asyncio.timeout(_SILENCE_SECONDS):
                head = await self._request("head_object", key)
        except (OSError, BotoCoreError) as error:
            logger.debug("cannot look at %s: %s", self._uri(key), error)
            return None
        return head["Metadata"].get(_MARK, "")

    async def _clean_up(self, upload: Mapping[str, str], cause: BaseException) -> None:
        """Abort `upload`, which `cause` ended. That may fail for the same reason: then our next upload tries again."""
        try:
            async with asyncio.timeout(_CLEANUP_SECONDS):
                await self._abort(upload)
        except (OSError, BotoCoreError) as error:
            self._left_open.append(LeftOpen(upload, cause))
            logger.warning(
                "the unfinished upload of %s to s3://%s cannot be aborted (%s); its parts cost money until our "
                "next upload, Store.discard_unfinished or the bucket's lifecycle rule removes them, after: %s",
                *(upload["Key"], self.bucket, error, cause),
            )

    async def _clean_up_left_open(self) -> None:
        again, self._left_open = self._left_open, []
        for each in again:
            await self._clean_up(each.target, each.cause)

    async def _abort(self, upload: Mapping[str, str]) -> bool:
        """False if it is gone already."""
        try:
            await self._request("abort_multipart_upload", **upload)
        except OSError as error:
            if code_of(error) not in ("NoSuchUpload", "404"):
                raise
            return False
        return True

    def _check_stored(self, key: str, sent: FileChecksums) -> None:
        """Compare what the server says it holds (an old one keeps no checksum) with what was sent; nothing is read."""
        size, stored, _ = self.head(key)
        if size != sent.size or (stored or to_text(sent.crc)) != to_text(sent.crc):
            raise StoreError(
                f"{self._uri(key)}: sent {sent.size:,} bytes with CRC64NVME {to_text(sent.crc)}, the server holds "
                f"{size:,} with {stored}; the object is not used. Check the server"
            )

    # ---- reading ------------------------------------------------------------------------------------------------

    async def _read(self, key: str, max_bytes: int) -> bytes:
        """All of one version; when the connection breaks, from the start again, since it may be another by then."""
        for attempt in range(1, _READ_ATTEMPTS + 1):
            answer = await self._request("get_object", key)
            try:
                refuse_large(self._uri(key), answer["ContentLength"], max_bytes)
                return await answer["Body"].raw_stream.content.read()
            except _BROKEN as error:
                if attempt == _READ_ATTEMPTS:
                    raise self._broken(key, error) from error
                await pause_after(attempt)
            finally:
                answer["Body"].close()
        raise AssertionError("returned or raised above")

    async def _read_into(self, key: str, start: int, destination: Destination) -> None:
        """Fill `destination` from one version; when the connection breaks, go on from the byte received."""
        same_version: dict[str, str] = {}
        attempt = 0
        while destination.missing_bytes:
            received = destination.received_bytes
            first, last = start + received, start + received + destination.missing_bytes - 1
            try:
                answer = await self._request("get_object", key, Range=f"bytes={first}-{last}", **same_version)
            except OSError as error:
                if code_of(error) in TAKEN:
                    raise StoreError(f"{self._uri(key)} was replaced while it was read; read it again") from error
                raise
            same_version = {"IfMatch": answer["ETag"]}
            try:
                if not answer.get("ContentRange", "").startswith(f"bytes {first}-"):
                    raise StoreError(f"{self._uri(key)}: the server does not answer ranged reads; use another store")
                await receive(answer["Body"].raw_stream, destination, silence_seconds=_SILENCE_SECONDS)
            except _BROKEN as error:
                progress = destination.received_bytes - received >= _READ_PROGRESS_BYTES
                attempt = 1 if progress else attempt + 1
                if attempt == _READ_ATTEMPTS:
                    raise self._broken(key, error) from error
                await pause_after(attempt)
                continue
            finally:
                answer["Body"].close()
            if destination.missing_bytes:
                ends = start + destination.received_bytes
                raise StoreError(f"{self._uri(key)} ends at byte {ends:,} of {last + 1:,} needed")

    def _broken(self, key: str, error: BaseException) -> StoreError:
        return StoreError(
            f"{self._uri(key)}: {error or type(error).__name__}; the connection broke {_READ_ATTEMPTS} times while it "
            "was read: check the network and proxies, then try again"
        )

    # ---- plumbing -----------------------------------------------------------------------------------------------

    def _open_uploads(self, under: str) -> "list[OpenUpload]":
        """Those to the key `under`, and to keys in the folder of that name."""
        with self._errors(under, "s3:ListBucketMultipartUploads"):
            found = self._run(self._list_uploads(self._object(under)))
        folder = self._folder_prefix(under)
        return [each for each in found if f"{each.target['Key']}/".startswith(folder)]

    async def _open_uploads_of(self, key: str) -> "list[OpenUpload]":
        found = await self._list_uploads(self._object(key))
        return [upload for upload in found if upload.target["Key"] == self._object(key)]

    async def _list_uploads(self, prefix: str) -> "list[OpenUpload]":
        found: list[OpenUpload] = []
        request = {"Prefix": prefix}
        while True:
            page = await self._request("list_multipart_uploads", **request)
            for upload in page.get("Uploads", ()):
                target = {"Key": upload["Key"], "UploadId": upload["UploadId"]}
                found.append(OpenUpload(target, upload["Initiated"]))
            if not page.get("IsTruncated"):
                return found
            request |= {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def _object(self, key: str) -> str:
        return "/".join(part for part in (self.prefix, key) if part)

    def _folder_prefix(self, folder: str) -> str:
        return f"{self._object(folder)}/".lstrip("/")

    def _uri(self, key: str) -> str:
        return f"s3://{self.bucket}/{self._object(key)}".rstrip("/")

    async def _request(self, method: str, key: str | None = None, **request: Any) -> dict[str, Any]:
        """S3's answer. Tried again after what passes by itself. Body: a memoryview."""
        if key is not None:
            request["Key"] = self._object(key)
        for attempt in range(1, self._max_attempts + 1):
            try:
                answer = await (self._send if "Body" in request else self._call)(method, request)
            except (OSError, BotoCoreError) as error:
                if attempt == self._max_attempts:
                    raise
                if attempt == 1 and are_credentials_old(error, method):
                    await self._renew_credentials(code_of(error))
                elif passes(error):
                    await pause_after(attempt)
                else:
                    raise
            else:
                answer["ResponseMetadata"]["RetryAttempts"] = attempt - 1
                return answer
        raise AssertionError("returned or raised above")

    async def _send(self, method: str, request: Mapping[str, Any]) -> dict[str, Any]:
        """With a limit of silence: aiohttp has none while it sends a body, or awaits the server's go-ahead for it."""
        time = asyncio.get_running_loop().time

        def moved() -> None:
            if not limit.expired():
                limit.reschedule(time() + _SILENCE_SECONDS)

        try:
            async with asyncio.timeout(_SILENCE_SECONDS) as limit:
                return await self._call(method, {**request, "Body": MemoryBody(request["Body"], moved=moved)})
        except TimeoutError as error:
            raise TimeoutError(f"nothing moved for {_SILENCE_SECONDS:g} s") from error

    async def _call(self, method: str, request: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return await self._fs._call_s3(method, Bucket=self.bucket, **request)
        except RuntimeError as error:
            if "credentials" not in str(error):
                raise
            raise StoreError(f"s3://{self.bucket}: {error} {remedy_for('CredentialRetrievalError', '')}") from error

    async def _renew_credentials(self, code: str) -> None:
        """Look for them again: a client does so once, or not before they expire by their own word."""
        session = self._fs.session
        if "key" in self._options or session is None:
            return
        if code == "NoCredentialsError":
            await self._fs.set_session(refresh=True)
            return
        used = await session.get_credentials()
        if used is not None and not isinstance(used, RefreshableCredentials):
            found = await AioSession(**self._fs.kwargs).get_credentials()
            if found is not None:
                now = await found.get_frozen_credentials()
                used.access_key, used.secret_key, used.token = now.access_key, now.secret_key, now.token

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run on s3fs's own thread and wait. Ctrl-C, or the limit, cancels the work: it first aborts its parts."""
        finished = threading.Event()

        async def guarded() -> T:
            try:
                return await work
            finally:
                finished.set()

        assert self._fs.loop is not None
        future = asyncio.run_coroutine_threadsafe(guarded(), self._fs.loop)
        try:
            return future.result(self._limit_seconds)
        except BaseException as error:
            too_late = isinstance(error, TimeoutError) and not future.done()
            future.cancel()
            finished.wait(_CLEANUP_SECONDS)
            if too_late:
                raise TimeoutError(f"no answer within {self._limit_seconds:g} s") from None
            raise

    @contextmanager
    def _errors(self, key: str, permission: str) -> Iterator[None]:
        """Turn botocore's and s3fs's errors into StoreErrors that say what to do."""
        try:
            yield
        # ValueError: an endpoint in the profile's file that is no address.
        except (OSError, ValueError, BotoCoreError, ClientError) as error:
            code = code_of(error)
            if key and code in ("NoSuchKey", "404"):
                raise KeyMissing(f"{self._uri(key)} does not exist") from error
            if code in ("InvalidRange", "416"):
                raise StoreError(f"{self._uri(key)} ends before the bytes that were asked for") from error
            raise StoreError(f"{self._uri(key)}: {error}; {remedy_for(code, permission)}") from error

"""Multipart uploads that are not over. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True)
class OpenUpload:
    """A multipart upload that is neither completed nor aborted. target: Key and UploadId, as S3 takes them."""

    target: Mapping[str, str]
    began: datetime


@dataclass(frozen=True)
class LeftOpen:
    """A multipart upload of ours that `cause` ended, and that could not be aborted. Used on s3fs's thread only."""

    target: Mapping[str, str]
    cause: BaseException

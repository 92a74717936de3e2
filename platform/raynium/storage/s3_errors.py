"""What S3's refusals, and the failures on the way to it, mean: whether they pass, and what to do. No torch."""

import asyncio
import random
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
from botocore.exceptions import ConnectionError as BotoConnectionError

from raynium.errors import StoreError

_PAUSE_SECONDS = 0.25
_LONGEST_PAUSE_SECONDS = 20

_REMEDIES = {
    "NoSuchBucket": "create the bucket, or name one that exists",
    "ProfileNotFound": "set AWS_PROFILE to a profile of ~/.aws/config, or unset it (`aws configure list-profiles`)",
    "404": "there is no such bucket: create it, or name another; check AWS_ENDPOINT_URL if it is set",
    "InvalidAccessKeyId": "the access key is unknown there: set AWS_ACCESS_KEY_ID or AWS_PROFILE",
    "SignatureDoesNotMatch": "the secret key is wrong: set AWS_SECRET_ACCESS_KEY or AWS_PROFILE",
    "ExpiredToken": "the credentials have expired: renew them",
    "RequestTimeTooSkewed": "this machine's clock is wrong: set it",
    "InvalidBucketName": "name a valid bucket (3 to 63 lower-case letters, digits, dots and hyphens)",
    "PermanentRedirect": "the bucket is in another region: set AWS_DEFAULT_REGION to it",
    "AuthorizationHeaderMalformed": "the bucket is in another region: set AWS_DEFAULT_REGION to it",
    "NoCredentialsError": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or an instance role",
    "CredentialRetrievalError": "see why the profile's credential_process, or the role's service, gives no valid ones",
    "EndpointConnectionError": "check the network, and AWS_ENDPOINT_URL if it is set",
    "ConnectTimeoutError": "check the network, and AWS_ENDPOINT_URL if it is set",
    "SSLError": "check that AWS_ENDPOINT_URL speaks TLS, and AWS_CA_BUNDLE",
    "ReadTimeoutError": "the server has gone silent: check it and the network, then try again",
    "TimeoutError": "the server has gone silent: check it and the network, then try again",
    "ConnectionClosedError": "the connection broke each time: check the network and proxies, then try again",
    "SlowDown": "S3 asks for fewer requests: try again later",
    "ServiceUnavailable": "S3 is overloaded: try again later",
    "InternalError": "the server failed each time: try again later",
    "500": "what answers there failed each time, or is not S3: check AWS_ENDPOINT_URL if it is set, or try again later",
    "BadDigest": "the bytes changed on the way, or in memory while they were sent: try again",
    "PreconditionFailed": "it exists, and who wrote it could not be asked: try again",
    "NoSuchUpload": "the upload was aborted by a lifecycle rule or by discard_unfinished: give uploads more time there",
}
_DENIED = ("AccessDenied", "403", "AllAccessDisabled", "UnauthorizedAccess")
TAKEN = ("PreconditionFailed", "412")
_OLD_CREDENTIALS = (
    "ExpiredToken",
    "InvalidToken",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    # The instance's metadata service did not answer the many who asked at once.
    "NoCredentialsError",
)
# Answers to HEAD have no words, only a status.
_OLD_CREDENTIALS_OF_HEAD = ("400", "403")
_PASSING = ("RequestTimeout", "SlowDown", "ServiceUnavailable", "InternalError", "Throttling", "RequestLimitExceeded")
_PASSING_STATUS = (429, 500, 502, 503, 504)


def check_endpoint(options: Mapping[str, Any], environment: Mapping[str, str]) -> None:
    """StoreError unless the S3 endpoint that was set, if one was, is an address without credentials."""
    given = {"endpoint_url": options.get("endpoint_url")}
    given |= {name: environment.get(name) for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")}
    for name, endpoint in given.items():
        if not endpoint:
            continue
        if "@" in endpoint:
            raise StoreError(f"{name} may not hold credentials, because addresses are logged: take them out")
        if not (endpoint.startswith(("http://", "https://")) and urlsplit(endpoint).hostname):
            raise StoreError(
                f"{name} is {endpoint!r}: it begins with http:// or https:// and names a host, as http://127.0.0.1:9000"
            )


def _answer(error: BaseException) -> Mapping[str, Any]:
    """S3's refusal; s3fs keeps it only in the cause of the OSError that it raises. Empty if there was no answer."""
    answers = (each.response for each in (error, error.__cause__) if isinstance(each, ClientError))
    return next(answers, {})


def code_of(error: BaseException) -> str:
    """S3's own word for what went wrong, or the name of what kept it from answering."""
    if answer := _answer(error):
        return answer.get("Error", {}).get("Code", "")
    for candidate in (error, error.__cause__):
        if isinstance(candidate, BotoCoreError | TimeoutError):
            return type(candidate).__name__
    return ""


def passes(error: BaseException) -> bool:
    """Whether the same request may succeed in a while."""
    if answer := _answer(error):
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return status in _PASSING_STATUS or code_of(error) in _PASSING
    return isinstance(error, HTTPClientError | BotoConnectionError | ConnectionError | TimeoutError)


def are_credentials_old(error: BaseException, method: str) -> bool:
    """Whether there may be others by now."""
    code = code_of(error)
    return code in _OLD_CREDENTIALS or (method == "head_object" and code in _OLD_CREDENTIALS_OF_HEAD)


def remedy_for(code: str, permission: str) -> str:
    if code in _DENIED:
        return f"allow {permission} on it to this role"
    return _REMEDIES.get(code, "check the bucket, the network, and AWS_ENDPOINT_URL if it is set")


async def pause_after(attempt: int) -> None:
    """Longer each time; never the same for two, which would come back together."""
    await asyncio.sleep(min(_PAUSE_SECONDS * 2**attempt, _LONGEST_PAUSE_SECONDS) * random.uniform(0.5, 1))

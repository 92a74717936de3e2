"""What EC2 is asked to do with one instance, with the credentials of whoever asks: on a head its instance profile's."""

from typing import Literal

from raynium.errors import LaunchError

# EC2 answers in a second. With all its tries a call so takes at most a minute and a half.
CONNECT_SECONDS, ANSWER_SECONDS, TRIES = 5.0, 20.0, 3

_REMEDIES = {
    "UnauthorizedOperation": "let the driver's role do it: `raynium cluster policy head` renders what a head needs, "
    "and `aws sts decode-authorization-message` says which statement is missing",
    "AuthFailure": "give the driver credentials of the instance's own account, best the head's instance profile",
    "InvalidInstanceID.NotFound": "it is gone already, or of another account: nothing is left to do",
    "IncorrectInstanceState": "it stops or ends already: nothing is left to do",
    "OperationNotPermitted": "its termination protection is on, or it is in use: see to it by hand",
}
_OTHERWISE = "see to that instance by hand"


def ask_ec2(call: Literal["reboot", "terminate"], *, instance_id: str, region: str) -> None:
    """Returns once EC2 has agreed to; it does it within minutes. Raises LaunchError with what to do.

    The endpoint is EC2's of the region, or AWS_ENDPOINT_URL_EC2.
    """
    # Only drivers that have a bad node need it.
    import botocore.session
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    settings = Config(
        connect_timeout=CONNECT_SECONDS,
        read_timeout=ANSWER_SECONDS,
        retries={"mode": "standard", "total_max_attempts": TRIES},
    )
    try:
        client = botocore.session.get_session().create_client("ec2", region_name=region, config=settings)
        ask = client.reboot_instances if call == "reboot" else client.terminate_instances
        ask(InstanceIds=[instance_id])
    except ClientError as error:
        code = error.response["Error"]["Code"]
        # The rest of it may be a message of kilobytes that only AWS can read.
        words = error.response["Error"]["Message"].partition(" Encoded authorization failure message")[0].rstrip(". ")
        remedy = _REMEDIES.get(code, _OTHERWISE)
        raise LaunchError(f"EC2 would not {call} {instance_id} ({region}): {code}: {words}: {remedy}") from error
    except BotoCoreError as error:
        remedy = "the driver has to reach EC2 with credentials, best the head's instance profile"
        raise LaunchError(f"EC2 could not be asked to {call} {instance_id} ({region}): {error}: {remedy}") from error

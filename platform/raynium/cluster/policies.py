"""IAM policies of a cluster, each allowing what its holder was seen to call and no more.

    operator   whoever runs `ray up`, `ray attach` and `ray down`
    head       the head node: its autoscaler starts and ends workers, its drivers reboot or end those that are bad
    worker     a worker node: the run store
    trust      who may take the roles head and worker: EC2 instances

Instances are told apart by the tag ray-cluster-name, which Ray puts on every one it starts and looks for.
"""

import json
from collections.abc import Sequence
from typing import Any, Literal

from raynium.cluster.site import Site
from raynium.hardware.catalog import CPU_INSTANCES, INSTANCES

Holder = Literal["operator", "head", "worker", "trust"]
HOLDERS: tuple[Holder, ...] = ("operator", "head", "worker", "trust")


def render_policy(site: Site, holder: Holder) -> str:
    """The policy document as JSON text."""
    if holder == "trust":
        who = {"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"}
        statements = [who]
    elif holder == "worker":
        statements = _run_store(site)
    elif holder == "head":
        neuron_types = [name for name, each in INSTANCES.items() if each.is_neuron and each.markets]
        # EC2 knows no narrower resource for Describe.
        statements = [
            _allow(["ec2:DescribeInstances", "ec2:DescribeInstanceTypes"], "*"),
            *_start_instances(site, [*neuron_types, *CPU_INSTANCES], ["worker"]),
            *_own_instances(site, ["ec2:TerminateInstances", "ec2:RebootInstances"]),
            *_run_store(site),
        ]
    else:
        statements = [
            _allow(
                [
                    *("ec2:DescribeInstances", "ec2:DescribeInstanceTypes", "ec2:DescribeKeyPairs"),
                    *("ec2:DescribeSecurityGroups", "ec2:DescribeSubnets", "ec2:DescribeInstanceConnectEndpoints"),
                ],
                "*",
            ),
            *_start_instances(site, [site.head_instance_type], ["head"]),
            *_own_instances(site, "ec2:TerminateInstances"),
            _allow("ec2:CreateKeyPair", _ec2(site, "key-pair/ray-autoscaler*")),
            # Only to the ssh port of private addresses behind this endpoint, an hour at a time.
            _allow(
                "ec2-instance-connect:OpenTunnel",
                _ec2(site, f"instance-connect-endpoint/{site.instance_connect_endpoint}"),
                {"NumericEquals": {"ec2-instance-connect:remotePort": "22"}},
            ),
            *_run_store(site),
        ]
    return json.dumps({"Version": "2012-10-17", "Statement": statements}, indent=2) + "\n"


def role_name(site: Site, holder: Literal["head", "worker"]) -> str:
    """Of the role, and of the instance profile that carries it."""
    return f"{site.cluster_name}-{holder}"


def _allow(actions: str | Sequence[str], resources: str | Sequence[str], condition: Any = None) -> dict[str, Any]:
    statement: dict[str, Any] = {"Effect": "Allow", "Action": actions, "Resource": resources}
    return statement | ({"Condition": condition} if condition else {})


def _ec2(site: Site, what: str) -> str:
    return f"arn:aws:ec2:{site.region}:{site.account}:{what}"


def _start_instances(site: Site, types: list[str], holders: list[Literal["head", "worker"]]) -> list[dict[str, Any]]:
    """Instances of these types, with the cluster's tag, IMDSv2 and these roles, in this subnet and group."""
    profiles = [f"arn:aws:iam::{site.account}:instance-profile/{role_name(site, holder)}" for holder in holders]
    return [
        _allow(
            "ec2:RunInstances",
            _ec2(site, "instance/*"),
            {
                "StringEquals": {
                    "aws:RequestTag/ray-cluster-name": site.cluster_name,
                    "ec2:InstanceType": types,
                    "ec2:MetadataHttpTokens": "required",
                },
                "ArnEquals": {"ec2:InstanceProfile": profiles},
            },
        ),
        _allow(
            "ec2:RunInstances",
            [
                f"arn:aws:ec2:{site.region}::image/*",
                _ec2(site, f"subnet/{site.subnet}"),
                _ec2(site, f"security-group/{site.security_group}"),
                _ec2(site, f"placement-group/{site.cluster_name}"),
                _ec2(site, "key-pair/ray-autoscaler*"),
                _ec2(site, "capacity-reservation/*"),
                _ec2(site, "network-interface/*"),
                _ec2(site, "spot-instances-request/*"),
                _ec2(site, "volume/*"),
            ],
        ),
        # EC2 looks `resolve:ssm:` up with the caller's rights.
        _allow("ssm:GetParameters", f"arn:aws:ssm:{site.region}::parameter/aws/service/*"),
        _allow(
            "iam:PassRole",
            [f"arn:aws:iam::{site.account}:role/{role_name(site, holder)}" for holder in holders],
            {"StringEquals": {"iam:PassedToService": "ec2.amazonaws.com"}},
        ),
        _allow("ec2:CreateTags", _ec2(site, "instance/*"), {"StringEquals": {"ec2:CreateAction": "RunInstances"}}),
    ]


def _own_instances(site: Site, calls: str | list[str]) -> list[dict[str, Any]]:
    """These calls, and Ray's own tags: only on instances where the cluster's tag is, so nobody else's become ours."""
    own = {"aws:ResourceTag/ray-cluster-name": site.cluster_name}
    return [
        _allow(calls, _ec2(site, "instance/*"), {"StringEquals": own}),
        _allow(
            "ec2:CreateTags",
            _ec2(site, "instance/*"),
            {"StringEquals": own, "ForAllValues:StringLike": {"aws:TagKeys": ["ray-*", "Name"]}},
        ),
    ]


def _run_store(site: Site) -> list[dict[str, Any]]:
    """The site's folder of its bucket: listing, reading, writing, deleting; multipart uploads too."""
    bucket = f"arn:aws:s3:::{site.bucket}"
    return [
        # IfExists: a plain read names no prefix, and without this right S3 answers 403, not 404, where no object is.
        # The price: a listing of the whole bucket shows the names of what else is in it.
        # The second right finds what uploaders that died left open; it knows no prefix.
        _allow(
            ["s3:ListBucket", "s3:ListBucketMultipartUploads"],
            bucket,
            {"StringLikeIfExists": {"s3:prefix": [site.prefix, f"{site.prefix}/*"]}},
        ),
        _allow(
            [
                *("s3:GetObject", "s3:PutObject", "s3:DeleteObject"),
                *("s3:AbortMultipartUpload", "s3:ListMultipartUploadParts"),
            ],
            f"{bucket}/{site.prefix}/*",
        ),
    ]

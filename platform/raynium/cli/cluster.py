"""The `raynium cluster` commands. Thin, and everything heavy is imported inside, as in `cli/app.py`."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Argument, Option

from raynium.cli.config import ConfigArgument, OverridesArgument

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Files that start clusters on AWS.")

SiteOption = Annotated[
    Path, Option(help="Your account's ids; cluster/site.yaml is one to copy.", envvar="RAYNIUM_SITE")
]
OutputOption = Annotated[Path | None, Option(help="The file to write. Default: print it.")]


@app.command(epilog="Example: raynium cluster render trn2.48xlarge --max-workers 4 --output trn2.yaml")
def render(
    instance_type: Annotated[str, Argument(metavar="TYPE", help="Of the nodes that train, e.g. trn2.48xlarge.")],
    site: SiteOption = Path("cluster/site.yaml"),
    output: OutputOption = None,
    max_workers: Annotated[int, Option(help="The most nodes that train.")] = 2,
    min_workers: Annotated[int, Option(help="Nodes that are there without a job too.")] = 0,
    market: Annotated[Literal["on-demand", "spot", "capacity-block"], Option(help="How to buy them.")] = "on-demand",
    reservation: Annotated[str | None, Option(help="The Capacity Block's reservation, cr-….")] = None,
    image: Annotated[str | None, Option(help="ami-… or resolve:ssm:…, in place of the type's own.")] = None,
) -> None:
    """Write the file that `ray up` reads."""
    from raynium.cluster.render import Workers, render_cluster
    from raynium.cluster.site import load_site

    workers = Workers(
        instance_type=instance_type,
        max_workers=max_workers,
        min_workers=min_workers,
        market=market,
        reservation=reservation,
        image=image,
    )
    _write(render_cluster(load_site(site), workers), output)


@app.command(epilog="Example: raynium cluster policy worker --site cluster/site.yaml")
def policy(
    holder: Annotated[Literal["operator", "head", "worker", "trust"], Argument(metavar="HOLDER")],
    site: SiteOption = Path("cluster/site.yaml"),
    output: OutputOption = None,
) -> None:
    """Write the IAM policy of operator, head or worker, or the roles' trust policy."""
    from raynium.cluster.policies import render_policy
    from raynium.cluster.site import load_site

    _write(render_policy(load_site(site), holder), output)


@app.command(
    epilog="Example: raynium cluster kuberay job.yaml --image registry/raynium:1 --redis redis:6379 --output ray.yaml"
)
def kuberay(
    config: ConfigArgument,
    image: Annotated[str, Option(help="Container image with Raynium, Ray and the Neuron libraries.")],
    redis: Annotated[str, Option(help="HOST:PORT of a Redis outside of the cluster, for Ray's head.")],
    overrides: OverridesArgument = None,
    ray_version: Annotated[str | None, Option(help="Of the image. Default: the one installed here.")] = None,
    name: Annotated[str, Option(help="Of the RayCluster.")] = "raynium",
    service_account: Annotated[str, Option(help="That may read and write run.root.")] = "raynium",
    token_secret: Annotated[str, Option(help="Secret with Ray's token, key auth_token.")] = "raynium-token",
    redis_secret: Annotated[str, Option(help="Secret with Redis' password, key password.")] = "raynium-redis",
    output: OutputOption = None,
) -> None:
    """Write the RayCluster that `kubectl apply` reads, with as many pods as the job's config takes."""
    from importlib.metadata import version

    from raynium.cluster.kuberay import Pods, render_kuberay
    from raynium.config.load import load_config

    pods = Pods(
        image=image,
        ray_version=ray_version or version("ray"),
        redis=redis,
        name=name,
        service_account=service_account,
        token_secret=token_secret,
        redis_secret=redis_secret,
    )
    _write(render_kuberay(load_config(config, overrides or []), pods), output)


def _write(text: str, output: Path | None) -> None:
    if output is None:
        typer.echo(text, nl=False)
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, encoding="utf-8")
    typer.echo(f"wrote {output}")

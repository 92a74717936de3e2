"""The `raynium checkpoints` commands. Thin, and everything heavy is imported inside, as in `cli/app.py`."""

import re
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Argument, Option

from raynium.cli.names import (
    CheckpointArgument,
    JsonOption,
    RootOption,
    RunArgument,
    StepOption,
    print_json,
    split_name,
)

if TYPE_CHECKING:
    from raynium.checkpoint.catalog import CheckpointSummary
    from raynium.checkpoint.compare import Comparison
    from raynium.checkpoint.ref import CheckpointRef
    from raynium.checkpoint.retention import Retention
    from raynium.storage.store import Store

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="List, check, move and remove checkpoints.")

SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT]i?)?B?", re.IGNORECASE)
MULTIPLES = (
    {"": 1} | {f"{p}i": 2 ** (10 * i) for i, p in enumerate("kmgt", 1)} | {p: 1000**i for i, p in enumerate("kmgt", 1)}
)


class KvOrderChoice(StrEnum):
    """Of the ranks that share a key/value head: as a Trainium1 saves them, or a Trainium2."""

    INTERLEAVED = "interleaved"
    ADJACENT = "adjacent"


def summaries_json(found: "Sequence[CheckpointSummary]", policy: "Retention | None") -> list[dict[str, Any]]:
    """A run's checkpoints as `--json` prints them. kept_for: why; none if it goes after the next save, null if nothing
    is ever deleted.
    """
    from dataclasses import asdict

    from raynium.checkpoint.retention import reasons_to_keep
    from raynium.terminal.report import as_json

    reasons = reasons_to_keep(found, policy) if policy is not None else {}
    return [
        asdict(each)
        | {"metrics": {name: as_json(value) for name, value in each.metrics.items()}}
        | {"kept_for": reasons.get(each.step)}
        for each in found
    ]


@app.command("ls", epilog="Example: raynium checkpoints ls first --json")
def list_(name: RunArgument, root: RootOption = "runs", as_json: JsonOption = False) -> None:
    """List a run's checkpoints, oldest first, and why each is kept."""
    from raynium.checkpoint.retention import reasons_to_keep
    from raynium.sdk import find_run

    run = find_run(name, root)
    found = run.checkpoints()
    # This raises StoreError if there is no such run.
    state = "" if found else run.record().state
    policy = run.retention()
    if as_json:
        print_json(summaries_json(found, policy))
        return
    if not found:
        typer.echo(f"run {name} ({state}) has no checkpoint yet")
        return
    from rich.console import Console
    from rich.table import Table

    reasons = reasons_to_keep(found, policy) if policy is not None else None
    table = Table("step", "size", "ranks", "saved", "kept for", "manifest", box=None)
    for each in found:
        # Without a driver there is no policy, and nothing is deleted
        why = reasons[each.step] if reasons is not None else [f"tag {tag}" for tag in each.tags]
        kept = ", ".join(why) or ("" if reasons is None else "goes after the next save")
        if each.problem is None:
            saved = _ago(time.time() - each.committed_unix)
            table.add_row(f"{each.step:,}", _size(each.num_bytes), str(each.world_size), saved, kept, "whole")
        else:
            table.add_row(f"{each.step:,}", "", "", "", kept, "cannot be used, see below")
    Console().print(table)
    for each in found:
        if each.problem is not None:
            typer.echo(f"step {each.step:,}: {each.problem}")


@app.command(epilog="Example: raynium checkpoints show first@400")
def show(name: CheckpointArgument, root: RootOption = "runs", step: StepOption = None) -> None:
    """Describe one checkpoint, and say what can load it."""
    from raynium.checkpoint.catalog import checkpoint_tags

    ref = _named(name, root, step)
    for title, text in _description(ref, checkpoint_tags(ref.store, ref.step), time.time()):
        typer.echo(f"{title:20}{text}")


@app.command(epilog="Example: raynium checkpoints verify first@400 --deep")
def verify(
    name: CheckpointArgument,
    root: RootOption = "runs",
    step: StepOption = None,
    deep: Annotated[bool, Option("--deep", help="Read every byte and compare checksums.")] = False,
) -> None:
    """Check a checkpoint's files against its manifest.

    Without --deep the store is asked for their sizes and, where it keeps them (S3), their checksums; nothing is read.
    Exits with 1 if it is damaged.
    """
    from raynium.checkpoint.verify import damage_text, verify_checkpoint
    from raynium.errors import CheckpointDamaged

    ref = _named(name, root, step)
    if damages := verify_checkpoint(ref, depth="contents" if deep else "stored"):
        raise CheckpointDamaged(damage_text(ref.step, damages))
    stored = "sizes and checksums" if ref.store.url.startswith("s3://") else "sizes"
    done = "all bytes read, all checksums right" if deep else f"{stored} right as stored; --deep would read them"
    typer.echo(f"step {ref.step:,} is whole: {_files(ref)}, {_size(ref.manifest.num_bytes)}, {done}")


@app.command(epilog="Example: raynium checkpoints tag first@400 release")
def tag(
    name: CheckpointArgument,
    tag: Annotated[str, Argument(metavar="TAG", help="A name, such as release or before-the-spike.")],
    root: RootOption = "runs",
    remove: Annotated[bool, Option("--remove", help="Take the tag away.")] = False,
) -> None:
    """Keep a checkpoint for as long as it has this tag."""
    from raynium.sdk import find_run

    name, step = split_name(name)
    run = find_run(name, root)
    step = _named(name, root).step if step is None else step
    if remove:
        run.untag(step, tag)
        typer.echo(f"step {step:,} of run {name} is no longer tagged {tag}")
    else:
        run.tag(step, tag)
        typer.echo(f"step {step:,} of run {name} is tagged {tag}, and kept until the tag is removed")


@app.command(epilog="Example: raynium checkpoints export first@400 hf --dtype bfloat16")
def export(
    name: CheckpointArgument,
    folder: Annotated[str, Argument(metavar="FOLDER", help="The folder to make; it must not exist.")],
    root: RootOption = "runs",
    step: StepOption = None,
    dtype: Annotated[
        Literal["float32", "bfloat16"], Option(help="float32 keeps every bit; bfloat16 is half the size.")
    ] = "float32",
    max_shard_size: Annotated[
        str, Option(help="Of one file of weights, e.g. 500MB. Also the memory this takes.")
    ] = "2GiB",
    adapter: Annotated[
        bool, Option("--adapter", help="The adapter alone, as PEFT writes it, in float32; without it, merged.")
    ] = False,
) -> None:
    """Write a checkpoint as a Hugging Face folder."""
    from raynium.sdk import find_run

    name, step = split_name(name, step)
    done = find_run(name, root).export(
        folder,
        step=step,
        dtype=dtype,
        max_shard_bytes=_bytes(max_shard_size),
        what="adapter" if adapter else "model",
    )
    typer.echo(
        f"exported step {done.step:,} to {done.folder}: {done.num_tensors} tensors, {_size(done.num_bytes)} of "
        f"{'float32' if adapter else dtype} "
        f"in {len(done.files)} file(s)"
    )


@app.command("import", epilog="Example: raynium checkpoints import Llama-3.2-1B base")
def import_(
    folder: Annotated[
        str, Argument(metavar="FOLDER", help="A Hugging Face folder, or a neuronx-distributed checkpoint.")
    ],
    name: Annotated[str, Argument(metavar="RUN", help="The name of the new run.")],
    root: RootOption = "runs",
    model: Annotated[
        str | None,
        Option(help="For neuronx-distributed: a Hugging Face folder with this model's config.json and tokenizer.json."),
    ] = None,
    tokenizer: Annotated[str | None, Option(help="The model's tokenizer.json, for a folder without one.")] = None,
    optimizer: Annotated[bool, Option(help="For neuronx-distributed: take the optimizer's state too.")] = True,
    kv_order: Annotated[
        KvOrderChoice, Option(help="For neuronx-distributed, where ranks share a key/value head: how they stand.")
    ] = KvOrderChoice.INTERLEAVED,
) -> None:
    """Make a Llama 3 or Qwen 3 model the start of a new run.

    A checkpoint of neuronx-distributed brings its optimizer along, and the run goes on at its step.
    """
    from raynium.config.paths import absolute_root
    from raynium.convert.import_folder import import_folder
    from raynium.convert.nxd_folder import import_nxd_folder

    _check_new_name(name)
    if model is None:
        imported = import_folder(folder, _store(name, root), tokenizer=tokenizer)
    else:
        imported = import_nxd_folder(
            folder,
            _store(name, root),
            model_folder=model,
            tokenizer=tokenizer,
            with_optimizer=optimizer,
            kv_order=kv_order.value,
        )
    typer.echo(f"# {folder} is step {imported.ref.step} of run {name}; a job with these lines trains it further:")
    typer.echo(imported.job_snippet(name=name, root=absolute_root(root)).rstrip())


@app.command("rm", epilog="Example: raynium checkpoints rm first@400")
def remove(
    name: CheckpointArgument,
    root: RootOption = "runs",
    step: StepOption = None,
    yes: Annotated[bool, Option("--yes", help="Do not ask.")] = False,
    force: Annotated[bool, Option("--force", help="Also the newest one, or a tagged one.")] = False,
) -> None:
    """Delete one checkpoint."""
    from raynium.run.removal import check_removable, remove_checkpoint

    name, step = split_name(name, step)
    if step is None:
        raise typer.BadParameter(f"say which checkpoint of run {name}: {name}@STEP (`raynium checkpoints ls {name}`)")
    store = _store(name, root)
    # Before the question, which it may make pointless.
    check_removable(store, step, force=force)
    if not yes:
        typer.confirm(f"delete the checkpoint of step {step:,} of run {name} under {root} for good?", abort=True)
    remove_checkpoint(store, step, force=force)
    typer.echo(f"deleted the checkpoint of step {step:,} of run {name}")


@app.command(epilog="Example: raynium checkpoints diff first@400 second@400")
def diff(
    first: CheckpointArgument,
    second: Annotated[str, Argument(metavar="RUN[@STEP]", help="What to compare it with.")],
    root: RootOption = "runs",
    every: Annotated[bool, Option("--all", help="A line for each tensor that differs, layers not folded.")] = False,
) -> None:
    """Compare two checkpoints bit by bit, whatever their layouts.

    Prints how many tensors are equal, then those that differ. Exits with 1 if there are any.
    """
    from raynium.checkpoint.compare import compare

    found = compare(_named(first, root), _named(second, root))
    if not found.differences:
        typer.echo(f"equal: all {len(found.names)} tensors have the same bits")
        return
    _print_counts(found)
    for line in [f"{each.name} {each.text}" for each in found.differences] if every else found.lines():
        typer.echo(line)
    typer.echo(f"{len(found.differences)} of {len(found.names)} tensors differ")
    raise typer.Exit(1)


# ---- arguments ----------------------------------------------------------------------------------------------------


def _store(name: str, root: str) -> "Store":
    from raynium.sdk import find_run
    from raynium.storage.store import Store

    return Store(find_run(name, root).url)


def _named(text: str, root: str, step: int | None = None) -> "CheckpointRef":
    """The checkpoint that `run` or `run@step` names. step: of --step."""
    from raynium.checkpoint.catalog import choose_checkpoint

    name, step = split_name(text, step)
    return choose_checkpoint(_store(name, root), step)


def _bytes(text: str) -> int:
    match = SIZE.fullmatch(text)
    if match is None:
        raise typer.BadParameter(f"{text!r} is no size: write a number with a unit, such as 500MB or 2GiB")
    return int(float(match[1]) * MULTIPLES[(match[2] or "").lower()])


def _check_new_name(name: str) -> None:
    from pydantic import ValidationError

    from raynium.config.fields import schema_fields
    from raynium.config.schema import RunSection
    from raynium.errors import ConfigError

    try:
        RunSection(name=name)
    except ValidationError as error:
        raise ConfigError([f"run.name is {name!r}: it must be {schema_fields()['run.name'].accepted}"]) from error


def _print_counts(found: "Comparison") -> None:
    from rich.console import Console
    from rich.table import Table

    from raynium.checkpoint.compare import OUTCOMES

    table = Table("tensors of", *OUTCOMES, box=None)
    for group, counts in found.counts().items():
        table.add_row(group, *(f"{counts[outcome]:,}" for outcome in OUTCOMES))
    Console().print(table)


# ---- words --------------------------------------------------------------------------------------------------------


def _description(ref: "CheckpointRef", tags: Sequence[str], now_unix: float) -> Iterator[tuple[str, str]]:
    """(title, text) lines about a checkpoint."""
    manifest = ref.manifest
    when = datetime.fromtimestamp(manifest.committed_unix, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    layout = ", ".join(f"{key} {value}" for key, value in manifest.layout.items())
    came_from = "" if manifest.parent_step is None else f", which began at step {manifest.parent_step:,}"
    yield "step", f"{ref.step:,}"
    yield "place", ref.uri
    yield "size", f"{_size(manifest.num_bytes)} in {_files(ref)}"
    yield "saved", f"{when} ({_ago(now_unix - manifest.committed_unix)})"
    if (timing := manifest.timing) is not None:
        yield (
            "took",
            f"training stood still {timing.stall_seconds:.3g} s; upload {timing.upload_seconds:.3g} s, commit "
            f"{timing.commit_seconds:.3g} s",
        )
    if tags:
        yield "tags", ", ".join(tags)
    for metric, value in sorted(manifest.metrics.items()):
        yield metric, f"{value:.6g}"
    if imported_from := manifest.state.get("imported_from"):
        yield "imported", f"from {imported_from}"
    else:
        yield "saved by", f"{manifest.world_size} rank(s) ({layout}) of generation {manifest.generation}{came_from}"
    for kind in ("model", "optimizer", "rng"):
        if line := _tensors(ref, f"{kind}/"):
            yield kind, line
    yield "loads into", _who_can_load(ref)


def _tensors(ref: "CheckpointRef", prefix: str) -> str:
    """How many tensors of a kind there are, of which dtypes, and what they take; "" if there are none."""
    from math import prod

    from raynium.checkpoint.format.manifest import DTYPES

    entries = [entry for entry in ref.manifest.tensors if entry.name.startswith(prefix)]
    if not entries:
        return ""
    numbers = sum(prod(entry.global_shape) for entry in entries)
    num_bytes = sum(prod(entry.global_shape) * DTYPES[entry.dtype][1] for entry in entries)
    dtypes = ", ".join(sorted({entry.dtype for entry in entries}))
    return f"{len(entries)} tensors, {numbers:,} numbers, {dtypes}, {_size(num_bytes)}"


def _who_can_load(ref: "CheckpointRef") -> str:
    """The model, the layouts, and what starts anew."""
    from math import gcd

    from raynium.convert.config_json import saved_model
    from raynium.models.plan import divided_sizes

    model = saved_model(ref)
    # 0 is a multiple of every degree: the data is not part of a checkpoint.
    sizes = divided_sizes(model, seq_len=0)
    largest = gcd(*sizes.values())
    degrees = ", ".join(str(degree) for degree in range(1, largest + 1) if largest % degree == 0)
    optimizer = "; the optimizer begins anew" if ref.manifest.weights_only else ""
    return (
        f"{model.family} of {model.num_layers} layers, hidden size {model.hidden_size:,}, vocabulary "
        f"{model.vocab_size:,}, {model.embeddings} embeddings; any number of ranks, tensor-parallel degree "
        f"{degrees}{optimizer}"
    )


def _files(ref: "CheckpointRef") -> str:
    return f"{len(ref.manifest.shards)} file(s)"


def _size(num_bytes: int) -> str:
    if num_bytes >= 1e9:
        return f"{num_bytes / 1e9:,.2f} GB"
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1e5 else f"{num_bytes / 1e3:.1f} kB"


def _ago(seconds: float) -> str:
    for unit, length in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{max(seconds, 0):.0f} s ago"

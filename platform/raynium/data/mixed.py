"""Whether the stores of a run go together, and last for as long as it trains: by their manifests alone."""

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction

from raynium.config.schema import Config
from raynium.data.manifest import StoreManifest
from raynium.data.order.mixture import mixture_of
from raynium.errors import ConfigError, DataError


def refuse_unmixable(config: Config, manifests: Sequence[StoreManifest]) -> None:
    """Raises DataError if stores of a mixture were made with different tokenizers, or ends of documents, or are one.

    manifests: of the stores, in their order.
    """
    first, *others = config.data.stores
    for store, manifest in zip(others, manifests[1:], strict=True):
        for what, ours, theirs in (
            ("tokenizers (sha256", manifests[0].tokenizer_sha256, manifest.tokenizer_sha256),
            ("ends of documents (token id", manifests[0].end_of_document_id, manifest.end_of_document_id),
        ):
            if ours != theirs:
                raise DataError(
                    f"data.mixture has stores of different {what} {ours} in {first.store}, {theirs} in {store.store}): "
                    "a token id would mean two things; build both with one tokenizer, given as `--tokenizer`"
                )
    seen: dict[str, str] = {}
    for store, manifest in zip(config.data.stores, manifests, strict=True):
        if manifest.identity in seen:
            raise DataError(
                f"data.mixture has the same data twice, in {seen[manifest.identity]} and {store.store} (identity "
                f"{manifest.identity}): give it once, with the weights added"
            )
        seen[manifest.identity] = store.store


def metrics_of_stores(
    config: Config, counts: Sequence[int], *, num_rows: Sequence[int], num_labels: Sequence[int]
) -> dict[str, float]:
    """What a run has taken of each store of a mixture, after so many samples of each; {} for one store.

    num_rows, num_labels: of each. Rows of whole documents hold unlike numbers of labels, so tokens are exact at the end
    of each epoch, and by the mean of all rows within one.
    """
    if len(num_rows) == 1:
        return {}
    metrics = {}
    for store, rows, labels, samples in zip(config.data.stores, num_rows, num_labels, counts, strict=True):
        metrics[f"data/{store.name}/tokens"] = float(samples * labels // rows)
        metrics[f"data/{store.name}/epochs"] = samples / rows
    return metrics


def refuse_used_up(config: Config, num_rows: Sequence[int], *, rows_per_sample: int = 1) -> None:
    """Raises DataError if the run goes through a store more than data.max_epochs times. num_rows: of each store.

    rows_per_sample: that are learned together; the order deals samples.
    """
    if config.data.max_epochs is None or config.train.steps is None:
        return
    batch, steps = config.train.global_batch_size // rows_per_sample, config.train.steps
    what = "rows" if rows_per_sample == 1 else f"samples of {rows_per_sample} rows"
    mixture = mixture_of(config.data, batch)
    problems = []
    for number, (store, of_store, samples) in enumerate(
        zip(config.data.stores, num_rows, mixture.counts(steps * batch), strict=True)
    ):
        there = of_store // rows_per_sample
        # By the decimal that was given: of 100 rows, 0.29 are 29, and as floats 28.999….
        most = int(Fraction(str(config.data.max_epochs)) * there)
        if samples > most:
            step = -(-mixture.samples_with(most + 1, number, most=steps * batch) // batch)
            problems.append(
                f"store {store.store} runs out at step {step:,} of {steps:,}: it has {there:,} {what}, and the run "
                f"takes {samples:,} ({samples / there:.3g} epochs)"
            )
    if problems:
        raise DataError(
            f"data.max_epochs is {config.data.max_epochs:g}: {'; '.join(problems)}. Raise data.max_epochs, lower "
            "train.steps or the weight, give a stage that leaves the store out, or add text"
        )


def epochs_in_words(config: Config, num_rows: Sequence[int], *, rows_per_sample: int = 1) -> Iterator[str]:
    """A line for each store of a mixture: what the whole run takes of it. As `refuse_used_up`."""
    batch = config.train.global_batch_size // rows_per_sample
    mixture, total = mixture_of(config.data, batch), config.train.num_steps * batch
    for store, rows, samples in zip(config.data.stores, num_rows, mixture.counts(total), strict=True):
        epochs = samples * rows_per_sample / rows
        yield f"data: {store.name}: {samples / total:.1%} of the samples, {epochs:.3g} epochs"


def with_steps(config: Config, rows: int) -> Config:
    """The config with the steps that its epochs make. rows: of its one store, both of each pair.

    Raises ConfigError where it has others.
    """
    train = config.train
    assert train.epochs is not None
    # By the decimal that was given, so that a tenth of ten rows is one.
    steps = math.ceil(Fraction(str(train.epochs)) * rows / train.global_batch_size)
    if train.steps not in (None, steps):
        raise ConfigError(
            [
                f"train.steps is {train.steps} and train.epochs {train.epochs:g}, which are {steps} steps: take one of "
                "them out"
            ]
        )
    return config.model_copy(update={"train": train.model_copy(update={"steps": steps})})

"""A run: looked at, waited for, and what its model can be asked."""

import codecs
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, overload

from raynium.errors import ConfigError, LaunchError, RayniumError, RunFailed, StoreError

if TYPE_CHECKING:
    from pandas import DataFrame

    from raynium.checkpoint.catalog import CheckpointSummary
    from raynium.checkpoint.compare import Comparison
    from raynium.checkpoint.retention import Retention
    from raynium.checkpoint.verify import Damage, Depth
    from raynium.convert.config_json import Dtype
    from raynium.convert.export import Exported
    from raynium.generation.chat import Chat
    from raynium.generation.sampler import Sampler
    from raynium.run.record import RunRecord
    from raynium.storage.store import Store
    from raynium.tracking.runs import MetricPoint

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
# Of the cluster or the store, that `Run.wait` and `Run.follow` bear: a head that starts again, S3 that throttles.
SILENCE_SECONDS = 300.0
LOG_LINES_IN_ERRORS = 30
ENDED_JOBS = ("SUCCEEDED", "FAILED", "STOPPED")


class Jobs(Protocol):
    """What knows the job of a submitted run: a `Client`. Each raises LaunchError if it gets no answer."""

    def job_state(self, job_id: str) -> str: ...

    def job_logs(self, job_id: str) -> str: ...


@dataclass(frozen=True)
class Run:
    """A run, by where it lives. It need not run, nor exist yet: a submitted job takes its name when it starts.

    url: <root>/<name>, a folder or URL that this machine can read. client: of the cluster it was submitted to.
    """

    name: str
    url: str
    client: Jobs | None = None
    job_id: str | None = None

    def record(self) -> "RunRecord":
        """What the run is, how far it got, and where its time went (`record().ledger.goodput`, `.restart`, …).

        Raises StoreError while it has written nothing.
        """
        from raynium.run.record import read_record

        record = read_record(self._store())
        if record is None:
            raise StoreError(
                f"no run {self.name!r} at {self.url}. Check the name with `raynium runs`, and that this machine "
                f"can read the run's root"
            )
        return record

    @property
    def state(self) -> str:
        """preparing, running, finished, stopped, failed; or interrupted: its driver is gone. StoreError as `record`."""
        return self.record().shown_state(time.time())

    @property
    def page(self) -> str | None:
        """The address of its MLflow page, None while it has none. `raynium ui` serves that of a local store."""
        from raynium.terminal.report import page_of

        return page_of(self.record())

    def wait(self, timeout_seconds: float | None = None) -> "RunRecord":
        """Returns when the run has finished or was stopped, and its job has ended.

        Raises RunFailed with the cause, TimeoutError in time.
        """
        from raynium.run.record import LIVE_STATES, read_record

        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        heard: float | None = None
        while True:
            try:
                job_state = self.client.job_state(self.job_id) if self.client and self.job_id else None
                record = read_record(self._store())
            except (LaunchError, StoreError) as error:
                # One lost answer must not end a wait of weeks.
                if heard is None or time.monotonic() - heard > SILENCE_SECONDS:
                    raise
                logger.warning("asked again: %s", error)
                time.sleep(POLL_SECONDS)
                continue
            heard = time.monotonic()
            job_ended = job_state in (None, *ENDED_JOBS)
            if record is not None and self.job_id in (None, record.job_id):
                if record.state not in LIVE_STATES:
                    if job_ended and record.state == "failed":
                        raise RunFailed(f"run {self.name!r} failed: {record.cause}")
                    if job_ended:
                        return record
                # A job that runs has a driver that lives, whatever this machine's clock says of its last heartbeat
                elif job_ended and not record.owner_is_alive(time.time()):
                    raise RunFailed(
                        f"run {self.name!r}: its driver died at step {record.step}. Start it again to go on"
                    )
            elif job_state == "SUCCEEDED" and record is not None:
                # It had finished before this job, which therefore had nothing to do.
                return record
            elif job_state is not None and job_ended:
                raise RunFailed(f"the job of run {self.name!r} ended as {job_state}. Its last lines:\n{self._tail()}")
            elif self.job_id is None:
                # No job will write it: this raises.
                self.record()
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(f"run {self.name!r} has not ended after {timeout_seconds:g} s")
            time.sleep(POLL_SECONDS)

    def metrics(self, name: str) -> "list[MetricPoint]":
        """All points of one metric, by step. ConfigError unless it is one of raynium.tracking.metrics.METRICS."""
        from raynium.tracking.metrics import unknown_metric
        from raynium.tracking.runs import read_metric

        if problem := unknown_metric(name):
            raise ConfigError([problem])
        record = self.record()
        if record.mlflow_uri is None or record.mlflow_run_id is None:
            return []
        return read_metric(record.mlflow_uri, record.mlflow_run_id, name)

    def dataframe(self, *names: str) -> "DataFrame":
        """The metrics of these names, or all that the run has logged: a column each, over the step as index.

        NaN where a step has no point of one. Raises as `metrics`.
        """
        from pandas import DataFrame, Series

        from raynium.tracking.runs import metric_names

        record = self.record()
        if not names and record.mlflow_uri is not None and record.mlflow_run_id is not None:
            names = tuple(metric_names(record.mlflow_uri, record.mlflow_run_id))
        columns = {name: {point.step: point.value for point in self.metrics(name)} for name in names}
        frame = DataFrame({name: Series(points, dtype="float64") for name, points in columns.items()}).sort_index()
        return frame.rename_axis("step")

    def checkpoints(self) -> "list[CheckpointSummary]":
        """The committed checkpoints, oldest first."""
        from raynium.checkpoint.catalog import list_checkpoints

        return list_checkpoints(self._store())

    def retention(self) -> "Retention | None":
        """Which checkpoints the run keeps, by its config; None if no driver has started it (it was imported)."""
        from raynium.checkpoint.retention import Retention
        from raynium.config.schema import CheckpointSection
        from raynium.run.record import read_record

        record = read_record(self._store())
        return Retention.of(CheckpointSection(**record.config["checkpoint"])) if record is not None else None

    def tag(self, step: int, tag: str) -> None:
        """Keeps the checkpoint of `step` for as long as it has this tag. Raises CheckpointError if there is none."""
        from raynium.checkpoint.catalog import add_tag

        add_tag(self._store(), step, tag)

    def untag(self, step: int, tag: str) -> None:
        """Takes a tag away. Raises CheckpointError if the checkpoint of `step` does not have it."""
        from raynium.checkpoint.catalog import remove_tag

        remove_tag(self._store(), step, tag)

    def verify(self, step: int | None = None, *, depth: "Depth" = "stored") -> "list[Damage]":
        """What is wrong with the files of the newest checkpoint, or that of `step`; [] if it is whole.

        depth: "stored" asks the store for sizes and, on S3, checksums; "contents" reads every byte. Raises
        CheckpointError if there is no such checkpoint, CheckpointDamaged if its manifest itself is damaged.
        """
        from raynium.checkpoint.catalog import choose_checkpoint
        from raynium.checkpoint.verify import verify_checkpoint

        return verify_checkpoint(choose_checkpoint(self._store(), step), depth=depth)

    def compare(self, other: "Run", *, step: int | None = None, other_step: int | None = None) -> "Comparison":
        """The newest checkpoint, or that of `step`, beside one of `other`, bit by bit, whatever their layouts.

        Reads both here, on the CPU. CheckpointError if one of them does not exist, CheckpointDamaged.
        """
        from raynium.checkpoint.catalog import choose_checkpoint
        from raynium.checkpoint.compare import compare

        return compare(choose_checkpoint(self._store(), step), choose_checkpoint(other._store(), other_step))

    def export(
        self,
        folder: str | Path,
        *,
        step: int | None = None,
        dtype: "Dtype" = "float32",
        max_shard_bytes: int = 2 * 2**30,
        what: Literal["model", "adapter"] = "model",
    ) -> "Exported":
        """Writes the newest checkpoint, or that of `step`, as a Hugging Face folder, which must not exist yet.

        dtype: float32 keeps every bit, bfloat16 is half the size. max_shard_bytes: of one file of weights, also the
        memory this takes. what: the model, an adapter merged; or that alone, as PEFT writes it. Runs here, on the CPU.
        """
        from raynium.checkpoint.catalog import choose_checkpoint
        from raynium.convert.peft_folder import export

        return export(choose_checkpoint(self._store(), step), folder, what, dtype, max_shard_bytes=max_shard_bytes)

    @overload
    def sample(self, prompt: str, *, step: int | None = None, **drawing: Any) -> str: ...

    @overload
    def sample(self, prompt: Sequence[str], *, step: int | None = None, **drawing: Any) -> list[str]: ...

    def sample(self, prompt: str | Sequence[str], *, step: int | None = None, **drawing: Any) -> str | list[str]:
        """The prompt and its continuation by the newest checkpoint, or that of `step`; or those of several prompts.

        drawing: of `raynium.generation.drawing.Drawing`, as temperature=0.8, stop=["\\n"]. Runs here, on the CPU.
        """
        from raynium.generation.drawing import Drawing

        prompts = [prompt] if isinstance(prompt, str) else prompt
        answers = self.sampler(step).answers(prompts, Drawing(**drawing))
        texts = [answer.prompt + answer.text for answer in answers]
        return texts[0] if isinstance(prompt, str) else texts

    def evaluate(
        self, *files: str | Path, step: int | None = None, limit: int | None = None, track: bool = False
    ) -> dict[str, float]:
        """`acc` and `acc_norm` of files of questions, as eval/<file>/acc, by the newest checkpoint, or that of `step`.

        Each line of a file is {"context": …, "choices": […], "answer": …}; limit: so many of each. track: also into the
        run's MLflow page, at the checkpoint's step. Runs here, on the CPU. DataError for a file with file and line.
        """
        from raynium.generation.choices import evaluate_files

        places = [os.fspath(file) for file in files]
        sampler = self.sampler(step)
        found = evaluate_files(sampler, places, limit=limit)
        if track:
            self._track_evaluation(found, step=sampler.step)
        return found

    def chat(self, *, step: int | None = None, system: str | None = None, **drawing: Any) -> "Chat":
        """A conversation with the model of the newest checkpoint, or of that of `step`: `for piece in chat.say("Hi")`.

        drawing: as of `sample`, of each answer. ConfigError if the run has no chat template.
        """
        from raynium.generation.chat import open_chat
        from raynium.generation.drawing import Drawing

        return open_chat(self.url, Drawing(**drawing), step=step, system=system)

    def sampler(self, step: int | None = None) -> "Sampler":
        """The model of the newest checkpoint, or that of `step`, in memory: for text as it comes, for many texts."""
        from raynium.generation.sampler import open_sampler

        return open_sampler(self.url, step)

    def logs(self, *, of: Literal["driver", "ranks"] = "driver") -> str:
        """The output so far of the driver, or of the ranks that ran on this host."""
        if of == "ranks":
            from raynium.node.node_log import node_logs
            from raynium.node.scratch import log_folder

            paths = node_logs(self._store().url)
            if not paths:
                folder = log_folder(self._store().url)
                raise StoreError(f"no rank of run {self.name!r} has run on this host: there are no logs in {folder}")
            return "".join(path.read_text(encoding="utf-8", errors="replace") for path in paths)
        if self.client is not None and self.job_id is not None:
            try:
                return self.client.job_logs(self.job_id)
            except LaunchError:
                # The cluster is gone. Its driver's own log outlives it, where that disk is here.
                if (path := self._log_path()) is None:
                    raise
                return path.read_text(encoding="utf-8", errors="replace")
        return self._driver_log().read_text(encoding="utf-8", errors="replace")

    def follow(self) -> Iterator[str]:
        """What the driver prints, in pieces as it comes: all of it until now, then more until the run has ended.

        Raises as `logs` and `record`, after bearing a cluster or store that does not answer as long as `wait` does.
        """
        seen = 0
        heard: float | None = None
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        while True:
            try:
                # Asked before the look, which then has all that was printed.
                over = self._is_over()
                if self.client is not None and self.job_id is not None:
                    text = self.client.job_logs(self.job_id)[seen:]
                    seen += len(text)
                else:
                    with self._driver_log().open("rb") as file:
                        file.seek(seen)
                        new = file.read()
                    text = decoder.decode(new)
                    seen += len(new)
            except (LaunchError, StoreError) as error:
                if isinstance(error, LaunchError) and heard is None and self._log_path() is not None:
                    yield from replace(self, client=None).follow()
                    return
                if heard is None or time.monotonic() - heard > SILENCE_SECONDS:
                    raise
                logger.warning("asked again: %s", error)
                time.sleep(POLL_SECONDS)
                continue
            heard = time.monotonic()
            if text:
                yield text
            if over:
                return
            time.sleep(POLL_SECONDS)

    def stop(self) -> None:
        """Asks the run to save a checkpoint at its next step and end. Returns at once; `wait()` for it."""
        from raynium.run.record import request_stop

        request_stop(self._store())

    def _track_evaluation(self, metrics: Mapping[str, float], *, step: int) -> None:
        from raynium.tracking.runs import log_evaluation

        record = self.record()
        if record.mlflow_uri is None or record.mlflow_run_id is None:
            raise ConfigError([f"run {self.name!r} has no MLflow page yet: evaluate it without tracking, or train it"])
        log_evaluation(record.mlflow_uri, record.mlflow_run_id, metrics, step=step)

    def _store(self) -> "Store":
        from raynium.storage.store import Store

        return Store(self.url)

    def _is_over(self) -> bool:
        from raynium.run.record import LIVE_STATES

        if self.client is not None and self.job_id is not None:
            return self.client.job_state(self.job_id) in ENDED_JOBS
        return self.state not in LIVE_STATES

    def _driver_log(self) -> Path:
        path = self._log_path()
        if path is None:
            where = self.record().log_path
            raise StoreError(f"the log of run {self.name!r} is {where} on the host of its driver, not on this one")
        return path

    def _log_path(self) -> Path | None:
        """The driver's log, if it is on a disk of this machine."""
        from raynium.run.record import read_record
        from raynium.storage.local_files import look

        record = read_record(self._store())
        path = Path(record.log_path) if record is not None and record.log_path is not None else None
        return path if path is not None and look(path.is_file) else None

    def _repr_html_(self) -> str:
        """For notebooks: state, step, losses and the page."""
        from html import escape

        from raynium.terminal.report import record_json

        try:
            facts = record_json(self.record(), time.time())
        except RayniumError as error:
            return f"<b>{escape(self.name)}</b>: {escape(str(error))}"
        rows = {"state": f"{facts['state']} at step {facts['step']:,} of {facts['steps']:,}", "cause": facts["cause"]}
        losses = {name: facts["metrics"].get(name) for name in ("train/loss", "eval/loss")}
        rows |= {name: f"{loss:.4g}" for name, loss in losses.items() if loss is not None}
        cells = "".join(f"<tr><td>{name}</td><td>{escape(text)}</td></tr>" for name, text in rows.items() if text)
        if page := facts["page"]:
            cells += f'<tr><td>page</td><td><a href="{escape(page)}">{escape(page)}</a></td></tr>'
        return f"<table><caption>run {escape(self.name)}</caption>{cells}</table>"

    def _tail(self) -> str:
        return "\n".join(self.logs().splitlines()[-LOG_LINES_IN_ERRORS:])


def find_run(name: str, root: "str | os.PathLike[str]" = "runs") -> Run:
    """The run of this name under `root` (a folder or URL; relative ones as in a config's run.root)."""
    from raynium.config.paths import absolute_root

    return Run(name, f"{absolute_root(os.fspath(root)).rstrip('/')}/{name}")


def list_runs(root: "str | os.PathLike[str]" = "runs") -> "list[RunRecord]":
    """The records of all runs under `root`, newest first. Raises StoreError if there is no such folder or bucket."""
    from raynium.config.paths import absolute_root
    from raynium.run.record import read_records
    from raynium.storage.local_files import look
    from raynium.storage.store import Store

    store = Store(absolute_root(os.fspath(root)))
    folder = store.url.removeprefix("file://")
    if "://" not in folder and not look(Path(folder).is_dir):
        raise StoreError(
            f"there is no folder {folder}: runs are where their run.root says, which the first `raynium train` makes. "
            "Name it by --root or RAYNIUM_ROOT"
        )
    return sorted(read_records(store), key=lambda each: -each.created_unix)

"""`raynium checkpoints` on runs as their ranks leave them; what the commands call is tested in its own modules."""

import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import typer
from commands import Ended, run_command
from tiny import job_text

from raynium.checkpoint.catalog import list_checkpoints, open_checkpoint
from raynium.checkpoint.format.manifest import Timing, manifest_key, manifest_to_bytes
from raynium.checkpoint.retention import Retention
from raynium.cli import checkpoints as cli_checkpoints
from raynium.config.load import parse_config
from raynium.models.decoder import Decoder
from raynium.run.record import Owner, RecordKeeper, claim
from raynium.sdk import find_run
from raynium.storage.store import Store

CONFIG = parse_config(
    job_text({"run.name": "first", "model.vocab_size": 320, "model.num_heads": 4, "model.num_kv_heads": 4})
)
COMMANDS = ("ls", "show", "verify", "tag", "export", "import", "rm", "diff")


@pytest.fixture
def checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ended]:
    """Runs `raynium checkpoints …` in this process, where `runs` is a folder of its own."""
    for name in ("RAYNIUM_HOME", "RAYNIUM_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)

    return partial(run_command, "checkpoints", monkeypatch=monkeypatch, capsys=capsys)


def model(seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    return Decoder(CONFIG.model)


@pytest.fixture
def store(save_run: Callable[..., Store]) -> Store:
    """Run `first` with the checkpoints of steps 2 and 4, the newer one by two ranks."""
    save_run(model(1), CONFIG, step=2)
    return save_run(model(2), CONFIG, step=4, num_ranks=2, parent_step=2)


def damage_manifest(store: Store, step: int) -> None:
    path = Path(store.uri(f"checkpoints/step-{step:09d}/manifest.json").removeprefix("file://"))
    path.write_bytes(path.read_bytes()[:-9])


def flip_bit(store: Store, step: int) -> None:
    """In the very first weight of the step's first file."""
    path = Path(store.uri(f"checkpoints/step-{step:09d}/g1/shard-00000.safetensors").removeprefix("file://"))
    content = bytearray(path.read_bytes())
    content[int.from_bytes(content[:8], "little") + 8] ^= 1
    path.write_bytes(content)


def steps(store: Store) -> list[int]:
    return [each.step for each in list_checkpoints(store)]


def test_every_command_explains_itself_on_one_line(checkpoints: Callable[..., Ended]) -> None:
    lines = checkpoints("--help").out.partition("Commands:")[2].strip().splitlines()
    assert [line.split()[0] for line in lines] == list(COMMANDS)
    assert not any(line.endswith("...") for line in lines)
    for command in COMMANDS:
        ended = checkpoints(command, "--help")
        assert ended.code == 0 and ended.out.startswith(f"Usage: raynium checkpoints {command}")


# ------------------------------------------------------------------------------------------------- looking


def test_ls_shows_whole_and_damaged_ones(checkpoints: Callable[..., Ended], store: Store) -> None:
    damage_manifest(store, 2)
    title, damaged, whole, problem = checkpoints("ls", "first").out.splitlines()
    assert re.split(r"  +", title.strip()) == ["step", "size", "ranks", "saved", "kept for", "manifest"]
    assert damaged.split() == ["2", "cannot", "be", "used,", "see", "below"]
    assert problem.startswith("step 2: file://") and "is damaged: its crc64nvme does not match" in problem
    assert re.fullmatch(r"\s*4 +[\d.]+ MB +2 +\d+ s ago +whole\s*", whole)
    assert checkpoints("ls", "first", "--root", str(Path("runs").absolute())).code == 0
    assert "error: no run 'nothing' at /" in checkpoints("ls", "nothing").err


def test_ls_says_why_each_is_kept(
    checkpoints: Callable[..., Ended], store: Store, save_run: Callable[..., Store]
) -> None:
    for step in (3, 5):
        save_run(model(1), CONFIG, step=step)
    checkpoints("tag", "first@3", "release")
    assert [each.split()[-2:] for each in checkpoints("ls", "first").out.splitlines()[1:]] == [
        ["ago", "whole"], ["release", "whole"], ["ago", "whole"], ["ago", "whole"],
    ], "no driver has said what it keeps"  # fmt: skip
    policy = {"checkpoint": {"keep_last": 1, "keep_every_steps": 2}}
    claim(store, "first", CONFIG.model_dump(mode="json") | policy)
    assert find_run("first").retention() == Retention(1, 2, keep_best=1)
    save_run(model(1), CONFIG, step=7)
    kept = [re.split(r" s ago +|  +whole", line)[1] for line in checkpoints("ls", "first").out.splitlines()[1:]]
    assert kept == ["every 2 steps", "tag release", "every 2 steps", "goes after the next save", "last"]
    claim(Store("runs/fresh"), "fresh", CONFIG.model_dump(mode="json"))
    assert checkpoints("ls", "fresh") == Ended(0, "run fresh (preparing) has no checkpoint yet\n", "")


def test_show_says_what_it_is_and_who_can_load_it(checkpoints: Callable[..., Ended], store: Store) -> None:
    out = checkpoints("show", "first").out
    numbers = sum(parameter.numel() for parameter in model().parameters())
    assert out.startswith(f"step                4\nplace               {store.uri('checkpoints/step-000000004')}\n")
    assert re.search(
        r"\nsize                0\.\d MB in 2 file\(s\)\nsaved               20\d\d-.* UTC \(\d+ s ago\)\n", out
    )
    assert "saved by            2 rank(s) (data 2, tensor 1) of generation g1, which began at step 2\n" in out
    assert f"\nmodel               21 tensors, {numbers:,} numbers, float32, {4 * numbers / 1e6:.1f} MB\n" in out
    assert f"\noptimizer           42 tensors, {2 * numbers:,} numbers" in out and "\nrng" not in out
    assert out.endswith(
        "loads into          llama3 of 2 layers, hidden size 32, vocabulary 320, untied embeddings; any number of "
        "ranks, tensor-parallel degree 1, 2, 4\n"
    )
    assert "saved by            1 rank(s)" in checkpoints("show", "first", "--step", "2").out
    assert "\ntook" not in out and "\ntags" not in out and "eval/" not in out


def test_show_says_what_a_save_cost_and_how_good_it_is(checkpoints: Callable[..., Ended], store: Store) -> None:
    ref = open_checkpoint(store, 4)
    timing = Timing(stall_seconds=0.0321, upload_seconds=12.5, commit_seconds=0.25)
    metrics = {"eval/loss": 2.123456789, "eval/bits_per_byte": 0.75}
    changed = ref.manifest.model_copy(update={"timing": timing, "metrics": metrics})
    store.replace(manifest_key(4), manifest_to_bytes(changed))
    for tag in ("v1", "best"):
        checkpoints("tag", "first@4", tag)
    out = checkpoints("show", "first").out
    assert (
        "\ntook                training stood still 0.0321 s; upload 12.5 s, commit 0.25 s\n"
        "tags                best, v1\n"
        "eval/bits_per_byte  0.75\n"
        "eval/loss           2.12346\n"
    ) in out


def test_verify_is_quiet_about_a_whole_one_and_names_damage(checkpoints: Callable[..., Ended], store: Store) -> None:
    assert re.fullmatch(
        r"step 4 is whole: 2 file\(s\), .* MB, sizes right as stored; .*\n", checkpoints("verify", "first").out
    )
    assert "all bytes read, all checksums right" in checkpoints("verify", "first", "--deep").out
    flip_bit(store, 2)
    assert checkpoints("verify", "first", "--step", "2").code == 0, "sizes are still right"
    assert checkpoints("verify", "first", "--deep").code == 0, "the newest is still whole"
    ended = checkpoints("verify", "first", "--step", "2", "--deep")
    assert ended.code == 1 and ended.out == ""
    assert ended.err.startswith("error: the checkpoint of step 2 is damaged:\n  - file://")
    assert re.search(r"bytes [\d,]+ to [\d,]+ cannot be used, which hold model/", ended.err)
    damage_manifest(store, 4)
    ended = checkpoints("verify", "first")
    assert ended.code == 1 and "step-000000004/manifest.json is damaged" in ended.err
    ended = checkpoints("show", "first")
    assert ended.code == 1 and "to only read it, name step 2. file://" in ended.err, "no other is shown instead"
    assert find_run("first").verify(2) == [] and len(find_run("first").verify(2, depth="contents")) == 1


def test_diff_names_what_differs(
    checkpoints: Callable[..., Ended], store: Store, save_run: Callable[..., Store]
) -> None:
    save_run(model(2), CONFIG, name="second", step=4)
    assert checkpoints("diff", "first", "second") == Ended(0, "equal: all 63 tensors have the same bits\n", "")
    ended = checkpoints("diff", "first@2", "second@4")
    assert ended.code == 1
    assert ended.out.splitlines()[-1] == "16 of 63 tensors differ", "norms begin as ones, moments as zeros"
    assert "model/head.weight differs in 10,240 of 10,240 numbers\n" in ended.out
    title, model_counts, *_ = ended.out.splitlines()
    assert re.split("  +", title.strip()) == [
        "tensors of",
        "equal",
        "different",
        "only in the first",
        "only in the second",
    ]
    assert model_counts.split() == ["model", "5", "16", "0", "0"]
    layers = re.search(r"^model/blocks\.\[0-1\]\.(.*)$", ended.out, re.MULTILINE)
    assert layers is not None and layers[1].endswith("numbers (all 2)") and "model/blocks.0." not in ended.out
    every = checkpoints("diff", "first@2", "second@4", "--all")
    assert (every.code, every.out.count(" differs in ")) == (1, 16) and "[0-1]" not in every.out
    compared = find_run("first").compare(find_run("second"), step=2)
    assert [f"{each.name} {each.text}" for each in compared.differences] == every.out.splitlines()[-17:-1]
    for odd in ("first@", "first@new", "first@-1"):
        ended = checkpoints("diff", odd, "second")
        assert ended.code == 2 and f"'{odd}' names no step: write first@1000" in ended.err


# ------------------------------------------------------------------------------------------------- moving


def test_export_and_import_make_a_run_with_the_same_weights(checkpoints: Callable[..., Ended], store: Store) -> None:
    ended = checkpoints("export", "first", "out", "--max-shard-size", "50KB")
    assert re.fullmatch(
        r"exported step 4 to /.*/out: 21 tensors, 0\.\d MB of float32 in [3-9] file\(s\)\n", ended.out
    ), ended.err
    ended = checkpoints("import", "out", "copy")
    assert ended.code == 0 and ended.out.startswith("# out is step 0 of run copy; a job with these lines trains it")
    job = ended.out + "train: {steps: 1, global_batch_size: 1}\n"
    found = parse_config(job, {"data.path": "/data", "data.seq_len": 8})
    assert (found.model, found.run.name, found.run.root) == (CONFIG.model, "copy", str(Path("runs").absolute()))
    assert Path(found.data.tokenizer or "").samefile("runs/copy/tokenizer.json")
    out = checkpoints("show", "copy").out
    assert f"imported            from {Path('out').absolute()}\n" in out
    assert "\noptimizer" not in out and out.endswith("degree 1, 2, 4; the optimizer begins anew\n")
    differing = checkpoints("diff", "first", "copy", "--all").out
    assert differing.count(" is only in the first") == 42 and differing.endswith("42 of 63 tensors differ\n")

    assert "exported step 2" in checkpoints("export", "first", "half", "--step", "2", "--dtype", "bfloat16").out
    assert find_run("first").export("sdk", step=2, dtype="bfloat16").num_bytes == 2 * sum(
        parameter.numel() for parameter in model().parameters()
    )
    assert Path("sdk/model.safetensors").read_bytes() == Path("half/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("7", 7), ("500MB", 5 * 10**8), ("2GiB", 2**31), ("1.5 kb", 1500), ("3k", 3000), ("1Ti", 2**40)],
)
def test_sizes(text: str, num_bytes: int) -> None:
    assert cli_checkpoints._bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GB", "2 gigabytes", "-1GB", "1e9", "2,5GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="is no size: write a number with a unit, such as 500MB or 2GiB"):
        cli_checkpoints._bytes(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-3, "0 s ago"), (119, "119 s ago"), (120, "2 min ago"), (7_300, "2 h ago"), (10 * 86_400, "10 days ago")],
)
def test_ages(seconds: float, text: str) -> None:
    assert cli_checkpoints._ago(seconds) == text


def test_large_sizes_are_gigabytes() -> None:
    assert (cli_checkpoints._size(96_360_000_000), cli_checkpoints._size(512_000)) == ("96.36 GB", "0.5 MB")


# ------------------------------------------------------------------------------------------------- removing


def owned(store: Store) -> RecordKeeper:
    """A live run: this process is its driver."""
    keeper = claim(store, "first", CONFIG.model_dump(mode="json"))
    keeper.update(state="running", step=4)
    return keeper


def test_an_older_checkpoint_is_deleted_when_confirmed(
    checkpoints: Callable[..., Ended], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    owned(store)  # a live run does not need its older ones
    asked: list[str] = []

    def confirm(text: str, abort: bool) -> None:
        asked.append(text)
        if len(asked) == 1:
            raise typer.Abort

    monkeypatch.setattr(typer, "confirm", confirm)
    assert checkpoints("rm", "first", "--step", "2").code == 1 and steps(store) == [2, 4]
    assert asked == ["delete the checkpoint of step 2 of run first under runs for good?"]
    ended = checkpoints("rm", "first", "--step", "2")
    assert ended == Ended(0, "deleted the checkpoint of step 2 of run first\n", "") and len(asked) == 2
    assert steps(store) == [4] and not Path("runs/first/checkpoints/step-000000002").exists()


def test_the_newest_is_refused_unless_forced(checkpoints: Callable[..., Ended], store: Store) -> None:
    ended = checkpoints("rm", "first", "--step", "4", "--yes")
    assert ended.code == 1 and "step 4 is the newest checkpoint of file://" in ended.err
    assert "Use --force if that is meant" in ended.err and steps(store) == [2, 4]
    assert checkpoints("rm", "first", "--step", "4", "--yes", "--force").code == 0
    assert steps(store) == [2]


def test_the_newest_of_a_live_run_is_refused_even_if_forced(checkpoints: Callable[..., Ended], store: Store) -> None:
    keeper = owned(store)
    ended = checkpoints("rm", "first", "--step", "4", "--yes", "--force")
    assert ended.code == 1 and "which would restart from it: stop the run first, with `raynium stop first`" in ended.err
    assert steps(store) == [2, 4]
    record = replace(keeper.record, owner=Owner("elsewhere", "boot", 1, "1"), heartbeat_unix=time.time() - 3600)
    store.replace("run.json", record.to_json())
    assert checkpoints("rm", "first", "--step", "4", "--yes", "--force").code == 0


def test_a_tagged_one_is_refused_unless_forced(checkpoints: Callable[..., Ended], store: Store) -> None:
    ended = checkpoints("tag", "first@2", "release")
    assert ended == Ended(0, "step 2 of run first is tagged release, and kept until the tag is removed\n", "")
    checkpoints("tag", "first@2", "paper")
    ended = checkpoints("rm", "first", "--step", "2", "--yes")
    assert ended.code == 1 and "is tagged paper, release, so somebody wants to keep it" in ended.err
    assert steps(store) == [2, 4]
    advised = ended.err.partition("`raynium checkpoints ")[2].partition("`")[0]
    ended = checkpoints(*advised.split())
    assert ended == Ended(0, "step 2 of run first is no longer tagged paper\n", "")
    find_run("first").untag(2, "release")
    find_run("first").tag(2, "mine")
    assert [each.tags for each in find_run("first").checkpoints()] == [("mine",), ()]
    assert checkpoints("rm", "first", "--step", "2", "--yes", "--force").code == 0 and steps(store) == [4]


def test_a_newer_one_with_missing_data_does_not_make_an_older_one_spare(
    checkpoints: Callable[..., Ended], store: Store
) -> None:
    store.delete("checkpoints/step-000000004/g1/shard-00001.safetensors")
    ended = checkpoints("rm", "first", "--step", "2", "--yes")
    assert ended.code == 1 and "step 2 is the newest checkpoint of file://" in ended.err
    assert "and no later one is whole" in ended.err and steps(store) == [2, 4]


def test_a_damaged_newer_one_does_not_make_an_older_one_spare(checkpoints: Callable[..., Ended], store: Store) -> None:
    damage_manifest(store, 4)
    assert "step 2 is the newest checkpoint" in checkpoints("rm", "first", "--step", "2", "--yes").err
    assert checkpoints("rm", "first", "--step", "4", "--yes", "--force").code == 0
    assert steps(store) == [2]


# ------------------------------------------------------------------------------------------------- names and JSON


def test_a_step_is_named_the_same_way_wherever_a_checkpoint_is(
    checkpoints: Callable[..., Ended], store: Store, tmp_path: Path
) -> None:
    for command in (["show"], ["verify"]):
        at = checkpoints(*command, "first@2").out
        assert (
            at
            == checkpoints(*command, "first", "--step", "2").out
            == checkpoints(*command, "first@2", "--step", "2").out
        )
        assert "2" in at and at != checkpoints(*command, "first").out
    assert "step 4" in checkpoints("tag", "first", "newest").out
    assert "exported step 2" in checkpoints("export", "first@2", str(tmp_path / "hf")).out
    assert checkpoints("rm", "first@2", "--yes").code == 0 and steps(store) == [4]


def test_the_list_as_json(checkpoints: Callable[..., Ended], store: Store) -> None:
    checkpoints("tag", "first@2", "release")
    older, newest = json.loads(checkpoints("ls", "first", "--json").out)
    assert (older["step"], older["tags"], newest["step"], newest["tags"]) == (2, ["release"], 4, [])
    assert newest["num_bytes"] > 0 and newest["problem"] is None and newest["kept_for"] is None
    manifest = next(Path("runs/first/checkpoints/step-000000004").rglob("manifest.json"))
    manifest.write_bytes(manifest.read_bytes()[:-10])
    assert "manifest" in json.loads(checkpoints("ls", "first", "--json").out)[1]["problem"]


# ------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["show", "nothing"], 1, "error: run file:///"),
        (["verify", "first", "--step", "3"], 1, "has no checkpoint of step 3: it has 4, 2"),
        (["export", "first", "runs"], 1, "/runs exists: give a folder that does not"),
        (["export", "first", "out", "--max-shard-size", "big"], 2, "'big' is no size"),
        (["export", "first", "out", "--dtype", "int8"], 2, "int8"),
        (["import", "nothing", "copy"], 1, "nothing is no folder of this machine"),
        (["import", "runs", "Bad Name"], 2, "error: run.name is 'Bad Name': it must be 1 to 63 of a-z"),
        (["rm", "first", "--step", "3"], 1, "has no checkpoint of step 3: it has 4, 2"),
        (["rm", "nothing", "--step", "3"], 1, "has no checkpoint of step 3: it has none"),
        (["rm", "first"], 2, "say which checkpoint of run first: first@STEP"),
        (["show", "first@x"], 2, "'first@x' names no step: write first@1000, or first for its newest checkpoint"),
        (["show", "first@4", "--step", "2"], 2, "name two checkpoints"),
        (["tag", "first@3", "release"], 1, "has no checkpoint of step 3: it has 4, 2"),
        (["tag", "first@4", "a/b"], 1, "'a/b' is not a tag"),
        (["tag", "first@4", "release", "--remove"], 1, "has no tag 'release': it has none"),
        (["ls", "first", "--root", "ftp://host/runs"], 1, "has the scheme 'ftp'"),
        (["diff", "first", "nothing"], 1, "has no checkpoint. Check its name"),
    ],
)
def test_a_mistake_ends_in_one_message(
    checkpoints: Callable[..., Ended], store: Store, arguments: list[str], code: int, message: str
) -> None:
    ended = checkpoints(*arguments)
    assert (ended.code, ended.out) == (code, "") and message in ended.err
    assert steps(store) == [2, 4] and not Path("out").exists() and not Path("runs/copy").exists()

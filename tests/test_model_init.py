"""Runs that begin with published weights, or with another run's: `model.init`."""

import errno
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import torch.distributed as dist
import yaml
from conversions import config_of, weights_in
from safetensors.torch import save_file
from standalone_ranks import Ended, standalone
from tiny import loader_of
from typer.testing import CliRunner

from raynium import sdk
from raynium.accelerators.cpu import CpuAccelerator
from raynium.checkpoint.base import base_of, find_base
from raynium.checkpoint.catalog import checkpoint_tags, latest, open_checkpoint
from raynium.checkpoint.load import load_checkpoint, read_tensors
from raynium.checkpoint.state import Chunk
from raynium.cli.app import app
from raynium.config.load import dump_yaml, load_config, parse_config
from raynium.config.schema import Config
from raynium.config.world import World
from raynium.convert.adopt import adopt, check_weights, describe, find
from raynium.convert.beginning import adopt_weights
from raynium.convert.config_json import saved_model
from raynium.convert.export import export_checkpoint
from raynium.data.build.store_build import build_store
from raynium.data.records.template import OWN_NAME, ChatTemplate
from raynium.data.store import TOKENIZER_NAME, open_store
from raynium.data.tokenizer import Tokenizer, beside
from raynium.engines.native import build_native_engine
from raynium.errors import CheckpointDamaged, CheckpointError, CheckpointMismatch, ConfigError, StoreError
from raynium.generation.drawing import Drawing
from raynium.generation.sampler import open_sampler
from raynium.models.decoder import Decoder
from raynium.rank.snapshots import Snapshots
from raynium.storage.store import Store
from raynium.tasks.pretraining import Pretraining
from raynium.train.guard import Guard
from raynium.train.link import MemoryLink
from raynium.train.patience import Patience

MODEL = "llama, tied, scaled rope"


def job(tmp_path: Path, **changes: Any) -> Path:
    """A job file that says nothing of the model but where its weights are. changes: section__field=value."""
    fields: dict[str, Any] = {
        "run": {"name": "tuned", "root": str(tmp_path / "runs")},
        "cluster": {"accelerator": "cpu", "ranks_per_node": 1},
        "model": {"init": str(tmp_path / "hugging-face")},
        "data": {"path": str(tmp_path / "data"), "seq_len": 16, "heldout_fraction": 0.2},
        "train": {"steps": 4, "global_batch_size": 4, "micro_batch_size": 1},
        "optimizer": {"schedule": "constant"},
        "checkpoint": {"every_steps": 2, "keep_last": 9},
        "evaluate": {"every_steps": 9},
    }
    for name, value in changes.items():
        section, field = name.split("__")
        fields[section][field] = value
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


def config_at(tmp_path: Path, *overrides: str, **changes: Any) -> Config:
    return load_config(job(tmp_path, **changes), overrides, describe=describe)


def ended(job: Path, *overrides: str, ranks: int = 1) -> Ended:
    return standalone(job, f"cluster.ranks_per_node={ranks}", *overrides, ranks=ranks)


def trained(job: Path, *overrides: str, ranks: int = 1) -> dict[int, float]:
    """Losses by step."""
    done = ended(job, *overrides, ranks=ranks)
    assert done.returncode == 0, done.log
    return {int(step): float(loss) for step, loss in re.findall(r"step (\d+): train/loss ([\d.]+)", done.log)}


@pytest.fixture
def folder(hugging_face: Callable[..., Path], tmp_path: Path) -> Path:
    """Weights in bfloat16 in several files, and documents made with their tokenizer."""
    folder = hugging_face(config_of(MODEL).model, dtype=torch.bfloat16, max_shard_size="20KB")
    (tmp_path / "text").mkdir()
    for number in range(12):
        text = "\n".join(f"def function_{number}_{line}(x): return x * {line}" for line in range(40))
        (tmp_path / "text" / f"{number}.py").write_text(text)
    build_store(
        tmp_path / "data",
        source=str(tmp_path / "text"),
        vocab_size=320,
        tokenizer_path=str(folder / TOKENIZER_NAME),
        heldout_fraction=0.2,
    )
    return folder


# ------------------------------------------------------------------------------------------------- training


def test_the_first_loss_is_that_of_transformers_on_the_same_batch(
    transformers: Any, folder: Path, tmp_path: Path
) -> None:
    losses = trained(job(tmp_path))
    batch = loader_of(open_store(tmp_path / "data"), seq_len=16, global_batch_size=4).batch(1)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits_BTV = theirs(batch.tokens_BT).logits
        expected = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), batch.labels_BT.flatten())
    # The log has six digits.
    assert losses[1] == pytest.approx(expected.item(), rel=2e-5)
    saved = latest(Store(tmp_path / "runs/tuned"))
    assert saved is not None and saved.step == 4 and not saved.manifest.weights_only
    base = find_base(Store(tmp_path / "runs/tuned"))
    model = saved_model(saved)
    assert base is not None and (model.init, model.init_identity) == (str(folder), base.identity)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", [(2, "parallel.tensor=1"), (2, "parallel.tensor=2")], ids=["FSDP", "tensor parallel"]
)
def test_every_layout_begins_with_the_same_bits(folder: Path, tmp_path: Path, layout: tuple[int, str]) -> None:
    """A step at a rate of almost nothing, from which float32 weights come out as they went in."""
    ranks, parallel = layout
    still = ("optimizer.learning_rate=1e-30", "optimizer.weight_decay=0", "train.steps=1", "data.seq_len=16")
    trained(job(tmp_path), parallel, *still, ranks=ranks)
    ours = read_tensors(open_checkpoint(Store(tmp_path / "runs/tuned"), 1))
    export_checkpoint(open_checkpoint(Store(tmp_path / "runs/tuned"), 1), tmp_path / "back", dtype="bfloat16")
    theirs, back = weights_in(folder), weights_in(tmp_path / "back")
    assert torch.equal(ours["model/embedding.weight"], theirs["model.embed_tokens.weight"].float())
    assert theirs.keys() == back.keys() and all(torch.equal(theirs[name], back[name]) for name in theirs)


def test_a_run_goes_on_bit_equal_without_its_base(folder: Path, tmp_path: Path) -> None:
    path = job(tmp_path)
    trained(path, "run.name=whole", ranks=2)
    # The rate is constant: the first half of the run is that of a shorter one.
    trained(path, "train.steps=2", ranks=2)
    shutil.rmtree(folder)
    losses = trained(path, ranks=2)
    assert sorted(losses) == [3, 4]
    whole, halves = (
        read_tensors(open_checkpoint(Store(tmp_path / f"runs/{name}"), 4), "") for name in ("whole", "tuned")
    )
    assert whole.keys() == halves.keys() and all(torch.equal(whole[name], halves[name]) for name in whole)

    shutil.copytree(tmp_path / "runs/tuned", tmp_path / "other")
    done = ended(path, f"model.init={tmp_path / 'other'}", "train.steps=5")
    assert done.returncode != 0
    assert re.search(r"model\.init is .*other.*, but the checkpoint was trained with .*hugging-face", done.log)


@pytest.mark.slow
def test_a_run_begins_with_another_runs_checkpoint(folder: Path, tmp_path: Path) -> None:
    path = job(tmp_path)
    trained(path, ranks=2)
    first = Store(tmp_path / "runs/tuned")
    init = f"model.init={tmp_path / 'runs/tuned'}"
    still = ("optimizer.learning_rate=1e-30", "optimizer.weight_decay=0", "train.steps=1", "run.name=second")
    trained(path, f"{init}@2", *still)
    second = read_tensors(open_checkpoint(Store(tmp_path / "runs/second"), 1))
    assert all(torch.equal(second[name], tensor) for name, tensor in read_tensors(open_checkpoint(first, 2)).items())
    newest = find(str(tmp_path / "runs/tuned"))
    assert newest.read().shards[0].key.startswith("checkpoints/step-000000004/")
    assert open_sampler(str(tmp_path / "runs/second")).text("def", Drawing(3)).startswith("def")
    with pytest.raises(CheckpointError, match="no checkpoint of step 3"):
        find(f"{tmp_path / 'runs/tuned'}@3")


# ------------------------------------------------------------------------------------------------- the config


def test_the_config_takes_from_the_folder_what_it_settles(folder: Path, tmp_path: Path) -> None:
    config = config_at(tmp_path, f"data.source={tmp_path / 'text'}")
    of_folder = config_of(MODEL).model
    assert config.model == of_folder.model_copy(update={"init": str(folder)})
    assert config.data.tokenizer == str(folder / TOKENIZER_NAME)
    # The resolved config says all of it, and is read without the folder.
    shutil.rmtree(folder)
    assert parse_config(dump_yaml(config), describe=describe) == config


def test_weights_named_over_a_model_take_its_place(folder: Path, tmp_path: Path) -> None:
    """As a preset's do: `raynium train quickstart model.init=./folder`, and a file that builds on another."""
    of_folder = config_of(MODEL).model.model_copy(update={"init": str(folder)})
    assert load_config("quickstart", [f"model.init={folder}"], describe=describe).model == of_folder
    (tmp_path / "upper.yaml").write_text(f"extends: quickstart\nmodel: {{init: {folder}, max_seq_len: 48}}\n")
    upper = load_config(tmp_path / "upper.yaml", describe=describe).model
    assert upper == of_folder.model_copy(update={"max_seq_len": 48})
    # The tokens to add are the run's own.
    (tmp_path / "tokens.yaml").write_text("extends: quickstart\nmodel: {add_tokens: [<new>]}\n")
    assert load_config(tmp_path / "tokens.yaml", [f"model.init={folder}"], describe=describe).model.add_tokens == (
        "<new>",
    )
    # What stands beside them is compared.
    with pytest.raises(ConfigError, match=r"model\.num_layers is 32, but the weights at .* have 3"):
        load_config("quickstart", [f"model.init={folder}", "model.num_layers=32"], describe=describe)
    (tmp_path / "both.yaml").write_text(f"extends: quickstart\nmodel: {{preset: llama3-1b, init: {folder}}}\n")
    with pytest.raises(ConfigError, match=r"model\.vocab_size is 128256, but the weights at .* have 320"):
        load_config(tmp_path / "both.yaml", describe=describe)
    assert load_config("quickstart", ["model.init=null"], describe=describe).model.num_layers > 0


def test_the_commands_and_the_sdk_read_it_too(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    done = runner.invoke(app, ["init", "mine", f"model.init={folder}", "data.source=text"])
    assert done.exit_code == 0, done.output
    shown = runner.invoke(app, ["config", "--diff", "mine.yaml"]).output
    assert f"model.init: {folder}" in shown and "model.num_layers: 3" in shown
    assert f"data.tokenizer: {folder}/tokenizer.json" in shown
    of_folder = config_of(MODEL).model.model_copy(update={"init": str(folder)})
    assert sdk.client._loaded("mine.yaml", {}).model == of_folder
    fields = {"run": {"name": "x"}, "model": {"init": folder}, "data": {"path": "/data"}}
    fields |= {"train": {"steps": 1, "global_batch_size": 1}}
    assert sdk.client._loaded(fields, {}).model == of_folder


def test_what_contradicts_the_weights_is_refused_with_both_values(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        config_at(tmp_path, "model.vocab_size=512", "model.family=qwen3", "model.hidden_size=32")
    family, vocabulary = error.value.problems
    assert re.search(r"model\.family is 'qwen3', but the weights at model\.init = .* have 'llama3': leave", family)
    assert re.search(r"model\.vocab_size is 512, but the weights .* have 320", vocabulary)
    # These are bounds of the run's own.
    assert config_at(tmp_path, "model.max_seq_len=48").model.max_seq_len == 48
    # A config that says everything is compared before anything starts.
    whole = config_at(tmp_path)
    other = whole.model_copy(update={"model": whole.model.model_copy(update={"vocab_size": 640})})
    with pytest.raises(ConfigError, match=r"model\.vocab_size is 640, .* have 320"):
        check_weights(other)


def test_what_is_no_model_is_refused_as_the_config_is_read(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for place, message in (("nothing", "is no folder of this machine"), ("empty", r"cannot read .*config\.json")):
        with pytest.raises(ConfigError, match=rf"model\.init is .*{place}.*{message}"):
            config_at(tmp_path, model__init=str(tmp_path / place))
    weights = weights_in(folder)
    del weights["model.layers.1.mlp.up_proj.weight"]
    (folder / "model.safetensors.index.json").unlink()
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"it lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        config_at(tmp_path)


# ------------------------------------------------------------------------------------------------- adopting


def test_another_runs_checkpoint_is_kept_for_the_runs_that_begin_with_it(
    save_run: Callable[..., Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = config_of("llama").model
    first = save_run(Decoder(model), config_of("llama"), num_ranks=2)
    config = config_at(tmp_path, model__init=str(tmp_path / "runs/first"))
    told: list[str] = []
    begun = adopt_weights(config, Store(tmp_path / "runs/tuned"), None, told.append)
    assert checkpoint_tags(first, 4) == ("base-of-tuned",) and len(told) == 1
    assert begun.model.init_identity is not None
    weights, saved = loaded(Store(tmp_path / "runs/tuned")), read_tensors(open_checkpoint(first, 4))
    assert all(torch.equal(tensor, saved[name]) for name, tensor in weights.items())

    def refused(*arguments: Any) -> None:
        raise StoreError("nobody here may write there")

    monkeypatch.setattr("raynium.convert.adopt.add_tag", refused)
    other = config_at(tmp_path, "run.name=other", model__init=f"{tmp_path / 'runs/first'}@4")
    adopt_weights(other, Store(tmp_path / "runs/other"), None, told.append)
    assert told[-1] == (
        "note: the run whose checkpoint this begins with may delete it, since it could not be tagged: nobody here may "
        "write there"
    )
    first.delete("tokenizer.json")
    with pytest.raises(CheckpointError, match=r"runs/first has no tokenizer\.json, as a run keeps one: give another"):
        find(str(tmp_path / "runs/first"))


def test_a_run_that_goes_on_finds_the_chat_template_of_the_run_that_it_began_with(
    save_run: Callable[..., Store], tmp_path: Path
) -> None:
    first, tuned = save_run(Decoder(config_of("llama").model), config_of("llama")), Store(tmp_path / "runs/tuned")
    first.replace(OWN_NAME, ChatTemplate({"default": "{{ eos_token }}"}, {"eos_token": "</s>"}).to_json())
    templates, places = [], []
    for _ in ("as it begins", "as it goes on"):
        config = config_at(tmp_path, f"data.source={tmp_path}", model__init=str(tmp_path / "runs/first"))
        assert config.data.tokenizer is not None
        templates.append(ChatTemplate.load(beside(config.data.tokenizer)[0], config.data.tokenizer))
        places.append(config.data.tokenizer)
        adopt_weights(config, tuned, None, print)
    assert templates[0] is not None and templates[0] == templates[1]
    assert "/runs/first/" in places[0] and "/runs/tuned/" in places[1]


def test_weights_that_changed_since_are_not_used(folder: Path, tmp_path: Path) -> None:
    config, store = config_at(tmp_path), Store(tmp_path / "runs/tuned")
    identity = adopt(config, store, check_weights(config))
    shutil.copytree(folder, tmp_path / "copy")
    copy = config_at(tmp_path, model__init=str(tmp_path / "copy"), model__init_identity=identity)
    assert adopt(copy, Store(tmp_path / "runs/copy"), check_weights(copy)) == identity

    file = sorted(folder.glob("*.safetensors"))[0]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    base = base_of(store)
    chunks = [
        Chunk.whole(entry.name, torch.empty(entry.global_shape), saved_here=True) for entry in base.manifest.tensors
    ]
    with pytest.raises(CheckpointDamaged, match=rf"{file.name} is damaged in bytes .*CRC64NVME"):
        load_checkpoint(base, chunks, dtypes="converted")
    pinned = config_at(tmp_path, model__init_identity=identity)
    with pytest.raises(CheckpointMismatch, match=rf"holds weights with the identity \w+, and .* asks for {identity}"):
        adopt(pinned, store, check_weights(pinned))


def test_a_rank_that_does_not_find_the_weights_says_who_must_see_them(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, store = config_at(tmp_path), Store(tmp_path / "runs/tuned")
    adopt(config, store, check_weights(config))
    shutil.rmtree(folder)
    engine = build_native_engine(config, World.of(config), CpuAccelerator(), Pretraining(), weights="loaded")
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    snapshots = Snapshots(engine, MemoryLink(), tmp_path, Guard(), Patience(), if_busy="wait")
    with pytest.raises(CheckpointMismatch, match=rf"is missing\. All nodes must see the weights at .* = '{folder}'"):
        snapshots.begin_with(base_of(store))


def test_a_base_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"runs/first has no base\.json"):
        base_of(Store(tmp_path / "runs/first"))
    assert find_base(Store(tmp_path / "runs/first")) is None
    Store(tmp_path / "runs/first").replace("base.json", b"{}")
    with pytest.raises(CheckpointDamaged, match=r"base\.json is damaged"):
        find_base(Store(tmp_path / "runs/first"))


def test_numbers_at_odd_places_are_refused(folder: Path, tmp_path: Path) -> None:
    """safetensors' own writer never does that; others may."""
    for file in folder.glob("*.safetensors"):
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        file.write_bytes((length + 1).to_bytes(8, "little") + content[8 : 8 + length] + b" " + content[8 + length :])
    with pytest.raises(CheckpointMismatch, match="begins at no multiple of the size of its numbers: save it again"):
        find(str(folder))


def test_a_folder_that_may_not_be_looked_into_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refused)
    with pytest.raises(CheckpointError, match=rf"cannot read {folder}: Permission denied"):
        find(str(folder))


def test_bytes_of_no_tensor_are_refused(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[1]
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    last = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])
    header[last]["data_offsets"] = [place + 4 for place in header[last]["data_offsets"]]
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :] + bytes(4))
    with pytest.raises(CheckpointDamaged, match=rf"{file.name} is not a whole .*begins at byte .*ends at .*again"):
        find(str(folder))


# ------------------------------------------------------------------------------------------------- added tokens

CHATML = ["<|im_start|>", "<|im_end|>"]


def loaded(store: Store) -> dict[str, torch.Tensor]:
    """All that the run at `store` begins with, in float32."""
    base = base_of(store)
    tensors = {entry.name: torch.empty(entry.global_shape) for entry in base.manifest.tensors}
    chunks = [Chunk.whole(name, tensor, saved_here=True) for name, tensor in tensors.items()]
    load_checkpoint(base, chunks, dtypes="converted")
    return tensors


@pytest.mark.parametrize("room", ["in the padding", "beyond it"])
@pytest.mark.parametrize("name", ["llama", MODEL])
def test_added_tokens_get_the_mean_row_and_all_else_stays(
    hugging_face: Callable[..., Path], tmp_path: Path, name: str, room: str
) -> None:
    tokenizer_size = Tokenizer.load(
        hugging_face(config_of(name).model, dtype=torch.bfloat16) / TOKENIZER_NAME
    ).vocab_size
    vocab_size = 320 if room == "in the padding" else tokenizer_size
    folder = hugging_face(config_of(name, vocab_size=vocab_size).model, dtype=torch.bfloat16)
    more = [] if room == "in the padding" else ["model.vocab_size=284"]
    config = config_at(tmp_path, f"model.add_tokens={json.dumps(CHATML)}", *more)
    assert config.model.vocab_size == (320 if room == "in the padding" else 284)
    store = Store(tmp_path / "runs/tuned")
    adopt(config, store, check_weights(config))
    ours, theirs = loaded(store), weights_in(folder)
    first = tokenizer_size
    tables = {"embedding.weight": "model.embed_tokens.weight"}
    tables |= {"head.weight": "lm_head.weight"} if name == "llama" else {}
    for mine, published in tables.items():
        table, old = ours[f"model/{mine}"], theirs[published]
        mean = old[:first].double().mean(0).to(torch.bfloat16).float()
        assert torch.equal(table[:first], old[:first].float())
        assert torch.equal(table[first : first + 2], mean.expand(2, -1))
        rest = old[first + 2 :].float() if room == "in the padding" else mean.expand(284 - first - 2, -1)
        assert torch.equal(table[first + 2 :], rest)
    kept = Tokenizer.kept(store)
    assert kept.vocab_size == first + 2
    beside = tokenizers.Tokenizer.from_file(str(tmp_path / "runs/tuned/tokenizer" / TOKENIZER_NAME))
    assert beside.encode("def<|im_end|>").ids[-1] == first + 1
    assert first not in kept.encode("<|im_start|>"), "text that spells a special token stays text"


def test_tokens_that_are_there_are_not_added_again(folder: Path, tmp_path: Path) -> None:
    tokens = '["<|endoftext|>", "x", "x"]'
    with pytest.raises(ConfigError) as error:
        config_at(tmp_path, f"model.add_tokens={tokens}")
    assert re.search(r"'<\|endoftext\|>', which the tokenizer has, with the id 0: take it out", str(error.value))
    with pytest.raises(ConfigError, match="names '<new>' twice: take one out"):
        config_at(tmp_path, 'model.add_tokens=["<new>", "<new>"]')
    with pytest.raises(ConfigError, match=r"model\.vocab_size is 300, but the weights .* have 320"):
        config_at(tmp_path, f"model.add_tokens={json.dumps(CHATML)}", "model.vocab_size=300")


def test_a_run_with_added_tokens_trains_them_and_exports_them(transformers: Any, folder: Path, tmp_path: Path) -> None:
    """Its store is made with the tokenizer that has them, and a second start goes on with the same."""
    shutil.rmtree(tmp_path / "data")
    path = job(tmp_path, data__source=str(tmp_path / "text"), model__add_tokens=CHATML)
    trained(path, "train.steps=1")
    begun = loaded(Store(tmp_path / "runs/tuned"))["model/embedding.weight"]
    shutil.rmtree(folder)
    assert sorted(trained(path, "train.steps=2")) == [2]
    sampler = open_sampler(str(tmp_path / "runs/tuned"))
    first = sampler.tokenizer.vocab_size - 2
    export_checkpoint(open_checkpoint(Store(tmp_path / "runs/tuned"), 2), tmp_path / "back")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert theirs.convert_tokens_to_ids(CHATML) == [first, first + 1]
    assert theirs("<|im_end|>", add_special_tokens=False).input_ids == [first + 1]
    after = weights_in(tmp_path / "back")["model.embed_tokens.weight"]
    assert not torch.equal(begun[first], after[first]), "the head's row learns from every step"


@pytest.mark.s3
def test_a_folder_in_s3_is_read_where_it_lies(
    folder: Path, tmp_path: Path, s3_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = Store(s3_server.create_bucket("weights"), options=s3_server.options)
    for file in folder.iterdir():
        bucket.replace(f"models/{file.name}", file.read_bytes())
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    config, store = config_at(tmp_path, model__init=f"{bucket.url}/models"), Store(tmp_path / "runs/tuned")
    identity = adopt(config, store, check_weights(config))
    local = config_at(tmp_path)
    assert adopt(local, Store(tmp_path / "runs/local"), check_weights(local)) == identity
    weight = torch.empty(config.model.vocab_size, config.model.hidden_size)
    load_checkpoint(
        base_of(store), [Chunk.whole("model/embedding.weight", weight, saved_here=True)], dtypes="converted"
    )
    assert torch.equal(weight, weights_in(folder)["model.embed_tokens.weight"].float())
    assert json.loads(store.read("imported.json")).keys() >= {"config.json", "generation_config.json"}
    for name, message in {
        TOKENIZER_NAME: r"cannot read s3://.*tokenizer\.json: it does not exist\. Give this model's tokenizer",
        "model-00001-of-00004.safetensors": r"lacks model-00001-of-00004\.safetensors, which .* download it again",
        "config.json": r"cannot read s3://.*config\.json: it does not exist; is its folder a Hugging Face model",
    }.items():
        bucket.delete(f"models/{name}")
        with pytest.raises(CheckpointError, match=message):
            find(f"{bucket.url}/models")
        bucket.replace(f"models/{name}", (folder / name).read_bytes())
    bucket.replace("models/config.json", b" " * (16 * 2**20 + 1))
    with pytest.raises(CheckpointError, match=r"cannot read s3://.*config\.json: .*16,777,217"):
        find(f"{bucket.url}/models")

"""Hugging Face folders made by transformers become runs that train on."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conversions import JOB, MODELS, config_of, same_tensors, weights_in
from safetensors.torch import save_file
from tiny import loader_of

from raynium.accelerators import native_dtype
from raynium.checkpoint import load
from raynium.checkpoint.catalog import choose_checkpoint, latest, list_checkpoints, open_checkpoint
from raynium.checkpoint.compare import differences
from raynium.checkpoint.load import read_tensors
from raynium.checkpoint.verify import verify_checkpoint
from raynium.config.load import parse_config
from raynium.config.schema import Config
from raynium.convert import new_run
from raynium.convert.export import export_checkpoint
from raynium.convert.import_folder import import_folder as import_from
from raynium.data.build.store_build import build_store
from raynium.data.store import TOKENIZER_NAME, open_store
from raynium.data.tokenizer import Tokenizer
from raynium.errors import CheckpointDamaged, CheckpointError, CheckpointMismatch, DataError, StoreError
from raynium.generation.drawing import Drawing
from raynium.generation.sampler import open_sampler
from raynium.launch.preparation import keep_tokenizer
from raynium.launch.settle import settled
from raynium.models.decoder import Decoder
from raynium.rank.ports import free_port
from raynium.storage.store import Store

Save = Callable[..., Store]


def random_model(config: Config) -> Decoder:
    return Decoder(config.model).eval()


# ------------------------------------------------------------------------------------------------- in


@pytest.mark.parametrize("name", MODELS)
def test_a_round_trip_is_bit_equal(hugging_face: Callable[..., Path], tmp_path: Path, name: str) -> None:
    folder = hugging_face(config_of(name).model, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    imported = import_from(folder, Store(tmp_path / "runs/imported"))
    assert imported.model == config_of(name).model
    assert imported.ref.step == 0 and imported.ref.manifest.weights_only
    export_checkpoint(imported.ref, tmp_path / "back", max_shard_bytes=20_000)
    assert same_tensors(weights_in(tmp_path / "back"), weights_in(folder))
    assert Tokenizer.load(tmp_path / "back" / TOKENIZER_NAME).sha256 == Tokenizer.load(folder / TOKENIZER_NAME).sha256

    again = import_from(tmp_path / "back", Store(tmp_path / "runs/again"))
    assert list(differences(imported.ref, again.ref)) == [] and again.model == imported.model


@pytest.mark.s3
def test_a_run_in_s3_is_imported_verified_and_exported(
    hugging_face: Callable[..., Path], tmp_path: Path, s3_server: Any
) -> None:
    folder = hugging_face(config_of().model, max_shard_size="20KB")
    store = Store(f"{s3_server.create_bucket('convert')}/runs/imported", options=s3_server.options)
    imported = import_from(folder, store)
    assert imported.tokenizer_path == str(folder / TOKENIZER_NAME), "data.tokenizer is a file of this machine"
    assert verify_checkpoint(imported.ref, depth="contents") == []
    export_checkpoint(choose_checkpoint(store), tmp_path / "back")
    assert same_tensors(weights_in(tmp_path / "back"), weights_in(folder))
    store.delete(imported.ref.shard_key(1))
    (damage,) = verify_checkpoint(imported.ref, depth="stored")
    assert (damage.uri, damage.reason) == (store.uri(imported.ref.shard_key(1)), "is missing")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_become_float32_without_loss(
    hugging_face: Callable[..., Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    folder = hugging_face(config_of("llama, tied, scaled rope").model, dtype=dtype)
    imported = import_from(folder, Store(tmp_path / "runs/imported"))
    ours = read_tensors(imported.ref)
    theirs = weights_in(folder)
    assert torch.equal(ours["model/embedding.weight"], theirs["model.embed_tokens.weight"].float())
    assert {tensor.dtype for tensor in ours.values()} == {torch.float32}
    if dtype is torch.bfloat16:
        export_checkpoint(imported.ref, tmp_path / "back", dtype="bfloat16")
        assert same_tensors(weights_in(tmp_path / "back"), theirs)


def test_an_imported_run_can_be_sampled_and_described(
    transformers: Any, hugging_face: Callable[..., Path], tmp_path: Path
) -> None:
    folder = hugging_face(config_of("qwen3").model)
    imported = import_from(folder, Store(tmp_path / "runs/imported"))
    sampler = open_sampler(imported.ref.store.url)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokens_BT = torch.arange(40)[None]
    with torch.no_grad():
        expected = theirs(tokens_BT).logits
        assert (sampler.model(tokens_BT) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert sampler.text("def", Drawing(3)).startswith("def")

    snippet = yaml.safe_load(imported.job_snippet(name="imported", root="/runs"))
    assert snippet["data"] == {"tokenizer": str(tmp_path / "runs/imported/tokenizer.json")}
    assert snippet["run"] == {"name": "imported", "root": "/runs"}
    rest = {"data": snippet["data"] | {"path": "/data", "seq_len": 8}, "train": {"steps": 1, "global_batch_size": 1}}
    assert parse_config(yaml.safe_dump(snippet | rest)).model == imported.model


def test_what_other_tools_add_is_understood(hugging_face: Callable[..., Path], tmp_path: Path) -> None:
    """A tied head that is stored all the same (Qwen3-0.6B), and RoPE's frequencies (old Llamas)."""
    folder = hugging_face(config_of("qwen3, tied").model)
    weights = weights_in(folder)
    extra = {
        "lm_head.weight": weights["model.embed_tokens.weight"].clone(),
        "model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(6),
    }
    save_file(weights | extra, folder / "model.safetensors")
    imported = import_from(folder, Store(tmp_path / "runs/imported"))
    assert {entry.name for entry in imported.ref.manifest.tensors} == {
        f"model/{name}" for name, _ in random_model(config_of("qwen3, tied")).named_parameters()
    }
    extra["lm_head.weight"][3, 3] += 1
    save_file(weights | extra, folder / "model.safetensors")
    with pytest.raises(
        CheckpointMismatch, match=r"are tied, but lm_head\.weight in .* set tie_word_embeddings to false"
    ):
        import_from(folder, Store(tmp_path / "runs/again"))


# ------------------------------------------------------------------------------------------------- in, refused


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(folder: Path | str, tmp_path: Path, kind: type[Exception], message: str) -> None:
    """The import fails like that, and leaves no file of the run."""
    with pytest.raises(kind, match=message):
        import_from(folder, Store(tmp_path / "runs/imported"))
    assert not [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]


def test_tensors_that_are_not_the_models_are_named(hugging_face: Callable[..., Path], tmp_path: Path) -> None:
    folder = hugging_face(config_of().model)
    file, weights = folder / "model.safetensors", weights_in(folder)
    embedding = weights["model.embed_tokens.weight"]

    save_file({name: tensor for name, tensor in weights.items() if "norm" not in name}, file)
    refused(folder, tmp_path, CheckpointMismatch, r"it lacks model\.layers\.0\.input_layernorm\.weight, .* and 2 more$")
    save_file(weights | {f"model.layers.{layer}.bias": embedding + 0 for layer in range(7)}, file)
    refused(folder, tmp_path, CheckpointMismatch, r"has model\.layers\.0\.bias, .*4\.bias and 2 more, which the model")
    save_file(weights | {"model.norm.weight": torch.ones(31)}, file)
    refused(folder, tmp_path, CheckpointMismatch, r"it has model\.norm\.weight as \[31\] instead of \[32\]$")
    save_file(weights | {"model.norm.weight": torch.ones(32, dtype=torch.float64)}, file)
    refused(
        folder, tmp_path, CheckpointMismatch, r"holds model\.norm\.weight \(F64\): weights that can be imported are"
    )
    save_file(weights, file)
    change_json(folder / "config.json", tie_word_embeddings=True)
    refused(folder, tmp_path, CheckpointMismatch, "set tie_word_embeddings to false")
    change_json(folder / "config.json", tie_word_embeddings=False, num_hidden_layers=2)
    refused(folder, tmp_path, CheckpointMismatch, r"has model\.layers\.2\..* and 4 more, which the model does not have")


def test_files_that_are_not_there_or_not_whole_are_named(hugging_face: Callable[..., Path], tmp_path: Path) -> None:
    folder = hugging_face(config_of().model, max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    second = sorted(folder.glob("model-*"))[1]
    content, index_text = second.read_bytes(), index.read_text()

    second.write_bytes(content[:-1])
    refused(folder, tmp_path, CheckpointDamaged, rf"{second.name} is not a whole safetensors file: ")
    second.write_bytes((10**10).to_bytes(8, "little") + content[8:])
    refused(folder, tmp_path, CheckpointDamaged, rf"{second.name} is not a whole safetensors file: ")
    second.unlink()
    refused(folder, tmp_path, CheckpointDamaged, rf"lacks {second.name}, which model\.safetensors\.index\.json names")
    second.mkdir()
    refused(folder, tmp_path, CheckpointDamaged, rf"lacks {second.name}")
    second.rmdir()
    second.write_bytes(content)
    (folder / "model-copy.safetensors").write_bytes(content)
    weight_map = json.loads(index_text)["weight_map"]
    change_json(index, weight_map=weight_map | {"more": "model-copy.safetensors"})
    refused(folder, tmp_path, CheckpointMismatch, r"is in .*/model-.* and in .*remove one of the files")
    change_json(index, weight_map=weight_map | {"more": "../../secret.safetensors", "other": 7})
    refused(folder, tmp_path, CheckpointDamaged, r"names \.\./\.\./secret\.safetensors, 7, which are no files of this")
    for odd in ([], {}, None):
        change_json(index, weight_map=odd)
        refused(folder, tmp_path, CheckpointDamaged, "has no weight_map")
    index.unlink()
    refused(folder, tmp_path, CheckpointError, r"has none of them: weights must be in model\.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    refused(folder, tmp_path, CheckpointError, r"has only pytorch_model\.bin, and reading those can run code: weights")


def test_json_that_cannot_be_used_is_named(hugging_face: Callable[..., Path], tmp_path: Path) -> None:
    folder = hugging_face(config_of().model)
    config = folder / "config.json"
    config.write_text("{")
    refused(folder, tmp_path, CheckpointDamaged, r"config\.json is not JSON")
    config.write_text("[" * 100_000)
    refused(folder, tmp_path, CheckpointDamaged, r"config\.json is not JSON")
    config.write_text("[]")
    refused(folder, tmp_path, CheckpointDamaged, r"config\.json is not a JSON object")
    with config.open("wb") as file:
        file.truncate(2**27)
    refused(folder, tmp_path, CheckpointError, r"config\.json: it has more than 16,777,216 bytes")
    config.unlink()
    refused(folder, tmp_path, CheckpointError, r"cannot read .*config\.json: No such file or directory; is its folder")
    for odd in (tmp_path / "nothing", config.with_name(TOKENIZER_NAME)):
        refused(odd, tmp_path, CheckpointError, r"is no folder of this machine: give one with config\.json")


def test_a_tokenizer_must_be_there_and_fit(hugging_face: Callable[..., Path], tmp_path: Path) -> None:
    folder = hugging_face(config_of().model)
    large = Tokenizer.train([" ".join(f"word{n} {n * n}" for n in range(999))], vocab_size=600)
    (folder / TOKENIZER_NAME).write_text(large.file_text)
    refused(folder, tmp_path, CheckpointMismatch, rf"has {large.vocab_size} tokens, the model's vocabulary 320")
    (folder / TOKENIZER_NAME).unlink()
    refused(folder, tmp_path, CheckpointError, r"cannot read .*tokenizer\.json: No such file .* with --tokenizer")


def test_a_run_that_exists_is_left_alone(hugging_face: Callable[..., Path], save_run: Save, tmp_path: Path) -> None:
    folder = hugging_face(config_of().model)
    config = config_of()
    store = save_run(random_model(config), config)
    with pytest.raises(CheckpointError, match="runs/first is in use: import into a run of another name"):
        import_from(folder, store)
    assert [each.step for each in list_checkpoints(store)] == [4]
    failed = Store(tmp_path / "runs/failed")  # a driver that ended before its first checkpoint
    failed.replace("run.json", b"{}")
    with pytest.raises(CheckpointError, match="is in use"):
        import_from(folder, failed)


def test_an_import_that_fails_leaves_no_data_and_can_be_repeated(
    hugging_face: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = hugging_face(config_of().model, max_shard_size="20KB")
    uploads = 0

    def breaking(*arguments: Any, upload: Any = new_run.upload_shard, **names: Any) -> Any:
        nonlocal uploads
        uploads += 1
        if uploads == 3:
            raise StoreError("the disk is full")
        return upload(*arguments, **names)

    with monkeypatch.context() as patch:
        patch.setattr(new_run, "upload_shard", breaking)
        refused(folder, tmp_path, StoreError, "the disk is full")
    assert uploads == 3
    with monkeypatch.context() as patch:
        patch.setattr(new_run, "raw_bytes", lambda tensor: os.write(10**6, b""))  # any OSError
        refused(folder, tmp_path, CheckpointError, r"cannot write [\d,]+ bytes to .*: .*; set TMPDIR to a larger disk")
    # Killed between the data files and the manifest: what lies there is no checkpoint
    store = Store(tmp_path / "runs/imported")
    store.write_new("checkpoints/step-000000000/import-dead/shard-00000.safetensors", b"half")
    store.write_new(TOKENIZER_NAME, b"{}")
    assert import_from(folder, store).ref.step == 0
    assert list_checkpoints(store)[0].problem is None


def test_an_import_that_ends_as_it_commits_leaves_no_checkpoint_without_data(
    hugging_face: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = hugging_face(config_of().model)
    store = Store(tmp_path / "runs/imported")

    def interrupted(*arguments: Any, commit: Any = new_run.commit_checkpoint, **names: Any) -> Any:
        commit(*arguments, **names)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(new_run, "commit_checkpoint", interrupted)
        with pytest.raises(KeyboardInterrupt):
            import_from(folder, store)
    assert not list_checkpoints(store)

    def overtaken(*arguments: Any, generation: str, commit: Any = new_run.commit_checkpoint, **names: Any) -> Any:
        patch.undo()
        import_from(folder, store)  # another one, of the same name
        return commit(*arguments, generation=generation, **names)

    with monkeypatch.context() as patch:
        patch.setattr(new_run, "commit_checkpoint", overtaken)
        with pytest.raises(CheckpointError, match="committed step 0 before import-"):
            import_from(folder, store)
    [winner] = list_checkpoints(store)
    assert not verify_checkpoint(open_checkpoint(store, 0), depth="contents")
    assert {key.split("/")[2] for key in store.list("checkpoints").sizes} == {winner.generation, "manifest.json"}


def test_a_file_that_cannot_be_read_is_named(hugging_face: Callable[..., Path], tmp_path: Path) -> None:
    folder = hugging_face(config_of().model)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    refused(folder, tmp_path, CheckpointError, r"cannot read .*/model\.safetensors: ")


# ------------------------------------------------------------------------------------------------- training on


@pytest.fixture
def documents(hugging_face: Callable[..., Path], tmp_path: Path) -> Path:
    """A folder of text, tokenised with the imported model's tokenizer."""
    folder = hugging_face(config_of("llama, tied, scaled rope").model, dtype=torch.bfloat16)
    (tmp_path / "text").mkdir()
    for number in range(12):
        text = "\n".join(f"def function_{number}_{line}(x): return x * {line}" for line in range(40))
        (tmp_path / "text" / f"{number}.py").write_text(text)
    tokenizer = str(folder / TOKENIZER_NAME)
    build_store(
        tmp_path / "data",
        source=str(tmp_path / "text"),
        vocab_size=320,
        tokenizer_path=tokenizer,
        heldout_fraction=0.2,
    )
    return tmp_path / "data"


def test_training_goes_on_from_imported_weights(transformers: Any, documents: Path, tmp_path: Path) -> None:
    """The first loss is that of the transformers model on the same batch; then the run saves checkpoints of its own."""
    store = Store(tmp_path / "runs/imported")
    imported = import_from(tmp_path / "hugging-face", store)
    job = yaml.safe_load(imported.job_snippet(name="imported", root=str(tmp_path / "runs"))) | {
        "cluster": {"accelerator": "cpu"},
        "train": {"steps": 2, "global_batch_size": 4, "micro_batch_size": 2},
        "evaluate": {"every_steps": 9},
    }
    job["data"] |= {"path": str(documents), "seq_len": 16, "heldout_fraction": 0.2}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    port = str(free_port("127.0.0.1"))
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "raynium.standalone", str(tmp_path / "job.yaml")],
        env=os.environ | ranks | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    losses = {int(step): float(loss) for step, loss in re.findall(r"step (\d+): train/loss ([\d.]+)", done.stderr)}
    assert sorted(losses) == [1, 2]

    batch = loader_of(open_store(documents), seq_len=16, global_batch_size=4).batch(1)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hugging-face", dtype=torch.float32)
    with torch.no_grad():
        logits_BTV = theirs(batch.tokens_BT).logits
        expected = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), batch.labels_BT.flatten())
    assert losses[1] == pytest.approx(expected.item(), rel=2e-5)  # the log has six digits
    saved = latest(store)
    assert saved is not None and saved.step == 2 and saved.manifest.parent_step is None
    assert not saved.manifest.weights_only
    moments = read_tensors(saved, prefix="optimizer/exp_avg/")
    assert all(tensor.abs().max() > 0 for tensor in moments.values())


def test_documents_of_another_tokenizer_are_refused(documents: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "runs/imported")
    import_from(tmp_path / "hugging-face", store)
    keep_tokenizer(store, open_store(documents))
    build_store(tmp_path / "other", source=str(tmp_path / "text"), vocab_size=320, heldout_fraction=0.2)
    with pytest.raises(
        DataError, match=r"another tokenizer \(sha256 \w{64}\) than the run's own, .*tokenizer\.json \(sha256"
    ):
        keep_tokenizer(store, open_store(tmp_path / "other"))


def test_only_weights_may_come_alone(hugging_face: Callable[..., Path], save_run: Save, tmp_path: Path) -> None:
    """Moments that a checkpoint should have and lacks are an error unless it says that it holds weights only."""
    imported = import_from(hugging_face(config_of().model), Store(tmp_path / "runs/imported"))
    config = config_of()
    asked = load.Chunk("optimizer/exp_avg/final_norm.weight", (32,), (0,), torch.ones(32), saved_here=True)
    assert load.load_checkpoint(imported.ref, [asked]).absent == (asked.name,)
    assert torch.equal(asked.tensor, torch.ones(32)), "absent tensors stay as they are"
    ref = choose_checkpoint(save_run(random_model(config), config))
    unknown = load.Chunk("optimizer/nothing", (32,), (0,), torch.ones(32), saved_here=True)
    with pytest.raises(CheckpointMismatch, match="lacks optimizer/nothing"):
        load.load_checkpoint(ref, [unknown])
    weight = load.Chunk("model/nothing", (32,), (0,), torch.ones(32), saved_here=True)
    with pytest.raises(CheckpointMismatch, match="lacks model/nothing"):
        load.load_checkpoint(imported.ref, [weight])


def test_an_imported_run_has_no_precision_yet(hugging_face: Callable[..., Path], tmp_path: Path) -> None:
    imported = import_from(hugging_face(config_of().model), Store(tmp_path / "runs/imported"))
    saved = imported.ref.manifest.state["config"]
    assert isinstance(saved, dict)
    config = parse_config(JOB, {"engine.dtype": "auto"})
    assert settled(config, cluster_resources=None, saved=saved).engine.dtype == native_dtype("cpu")
    trained = config.model_copy(update={"engine": config.engine.model_copy(update={"dtype": "float32"})})
    saved = trained.model_dump(mode="json")
    assert settled(config, cluster_resources=None, saved=saved).engine.dtype == "float32"

"""Hugging Face folders in and out, against transformers itself."""

import copy
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen3Config
from transformers import Qwen3ForCausalLM as Qwen3

from raynium.accelerators import native_dtype
from raynium.checkpoint import load
from raynium.checkpoint.batches import in_batches, in_file_order
from raynium.checkpoint.catalog import choose_checkpoint, latest, list_checkpoints
from raynium.checkpoint.compare import differences
from raynium.checkpoint.load import read_tensors
from raynium.checkpoint.store import Store
from raynium.config.load import load_config, parse_config
from raynium.config.schema import Config
from raynium.convert import export, import_folder
from raynium.convert.config_json import config_from_model, model_from_config, saved_model
from raynium.convert.export import export_checkpoint
from raynium.convert.import_folder import import_folder as import_from
from raynium.data.loader import Loader
from raynium.data.store import TOKENIZER_NAME, open_store
from raynium.data.store_build import build_store
from raynium.data.tokenizer import Tokenizer
from raynium.errors import CheckpointDamaged, CheckpointError, CheckpointMismatch, DataError, StoreError
from raynium.launch.preparation import keep_tokenizer
from raynium.launch.settle import settled
from raynium.models.decoder import Decoder
from raynium.sampling import open_sampler

JOB = """
run: {name: first}
cluster: {accelerator: cpu}
model: {vocab_size: 320, hidden_size: 32, num_layers: 3, num_heads: 4, num_kv_heads: 2, head_dim: 12, ffn_size: 48,
        max_seq_len: 64}
data: {path: /nowhere, seq_len: 16}
train: {steps: 4, global_batch_size: 2}
"""
SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 24}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, tied, scaled rope": {"embeddings": "tied", "rope_theta": 1e4, "norm_eps": 1e-3}
    | {f"rope_scaling.{key}": value for key, value in SCALING.items()},
    "qwen3": {"family": "qwen3", "rope_theta": 1e6},
    "qwen3, tied": {"family": "qwen3", "embeddings": "tied"},
}
TEXT = "def main(x): return\n\n  12345 héllo 漢字 it's"
Save = Callable[..., Store]


def config_of(name: str = "llama", **changes: Any) -> Config:
    return parse_config(JOB, {f"model.{key}": value for key, value in (MODELS[name] | changes).items()})


def random_model(config: Config, seed: int = 0) -> Decoder:
    """Random weights, norms too, large enough that every one of them shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    model = Decoder(config.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=0.3, generator=generator)
    return model.eval()


def same_tensors(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face folder, through the library, by name."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


# ------------------------------------------------------------------------------------------------- out


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_transformers_loads_the_export_and_computes_the_same(save_run: Save, tmp_path: Path, name: str) -> None:
    config = config_of(name)
    model = random_model(config)
    done = export_checkpoint(choose_checkpoint(save_run(model, config)), tmp_path / "out")
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(theirs) is (LlamaForCausalLM if config.model.family == "llama3" else Qwen3)
    assert theirs.dtype == torch.float32 and theirs.config.tie_word_embeddings == ("tied" in name)
    tokens_BT = torch.randint(0, 320, (2, 48), generator=torch.Generator().manual_seed(1))
    logits, expected = theirs(tokens_BT).logits, model(tokens_BT)
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert done.files == ("model.safetensors",) and done.step == 4
    assert done.num_bytes == sum(4 * parameter.numel() for parameter in model.parameters())


def test_transformers_tokenizes_as_training_did(save_run: Save, tmp_path: Path) -> None:
    config = config_of()
    store = save_run(random_model(config), config)
    export_checkpoint(choose_checkpoint(store), tmp_path / "out")
    ours = Tokenizer.load(tmp_path / "out" / TOKENIZER_NAME)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs(TEXT).input_ids == ours.encode(TEXT).tolist()
    assert theirs.decode(theirs(TEXT).input_ids) == TEXT
    assert theirs.eos_token_id == theirs.bos_token_id == ours.end_of_document_id
    assert theirs.model_max_length == 64
    for name in ("config.json", "generation_config.json"):
        fields = json.loads((tmp_path / "out" / name).read_text())
        assert fields["bos_token_id"] == fields["eos_token_id"] == ours.end_of_document_id
    assert (tmp_path / "out" / TOKENIZER_NAME).read_bytes() == store.read(TOKENIZER_NAME)


def test_a_large_model_gets_several_files_and_an_index(save_run: Save, tmp_path: Path) -> None:
    config = config_of()
    model = random_model(config)
    ref = choose_checkpoint(save_run(model, config, num_ranks=2))
    done = export_checkpoint(ref, tmp_path / "out", max_shard_bytes=30_000)
    count = len(done.files)
    assert count > 3 and done.files[1] == f"model-00002-of-{count:05d}.safetensors"
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    found: dict[str, str] = {}
    for file in done.files:
        with safe_open(tmp_path / "out" / file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            names = list(opened.keys())
        num_bytes = sum(tensor.nbytes for tensor in load_file(tmp_path / "out" / file).values())
        assert num_bytes <= 30_000 or len(names) == 1
        found |= dict.fromkeys(names, file)
    assert index == {"metadata": {"total_size": done.num_bytes}, "weight_map": found}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.lm_head.weight, model.head.weight)
    assert torch.equal(loaded.model.layers[2].mlp.down_proj.weight, model.blocks[2].ffn.down.weight)
    export_checkpoint(ref, tmp_path / "one")
    assert same_tensors(weights_in(tmp_path / "one"), weights_in(tmp_path / "out"))


def test_bfloat16_is_the_nearest_and_half_the_size(save_run: Save, tmp_path: Path) -> None:
    config = config_of("qwen3")
    model = random_model(config)
    ref = choose_checkpoint(save_run(model, config))
    done = export_checkpoint(ref, tmp_path / "out", dtype="bfloat16", max_shard_bytes=20_000)
    weights = weights_in(tmp_path / "out")
    assert torch.equal(weights["lm_head.weight"], model.head.weight.bfloat16())
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    sizes = [sum(tensor.nbytes for tensor in load_file(tmp_path / "out" / file).values()) for file in done.files]
    assert sum(sizes) == done.num_bytes == 2 * sum(parameter.numel() for parameter in model.parameters())
    assert sizes[0] > 15_000, "the limit counts bytes of the file, not of the float32 it was made of"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_a_step_can_be_chosen(save_run: Save, tmp_path: Path) -> None:
    config = config_of()
    early, late = random_model(config, seed=1), random_model(config, seed=2)
    save_run(early, config, step=2)
    store = save_run(late, config, step=4)
    assert export_checkpoint(choose_checkpoint(store, 2), tmp_path / "out").step == 2
    assert torch.equal(weights_in(tmp_path / "out")["lm_head.weight"], early.head.weight)


# ------------------------------------------------------------------------------------------------- bounds


def peak_growth(work: Callable[[], Any]) -> int:
    """Bytes by which this process's resident memory rose, at its highest, above what it was before."""

    def kilobytes(field: str) -> int:
        status = Path("/proc/self/status").read_text()
        found = re.search(rf"{field}:\s+(\d+) kB", status)
        assert found is not None
        return int(found[1])

    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = kilobytes("VmRSS")
    work()
    return 1024 * (kilobytes("VmHWM") - before)


def test_memory_is_bounded_by_one_file_in_both_directions(save_run: Save, tmp_path: Path) -> None:
    config = config_of(hidden_size=256, ffn_size=1024, num_layers=10, num_heads=8, num_kv_heads=8, head_dim=32)
    model = Decoder(config.model)
    total = sum(4 * parameter.numel() for parameter in model.parameters())
    limit = 2 * 2**20
    store = save_run(model, config, part_bytes=2**18)
    del model
    assert total > 20 * limit
    # The limit itself, once more for the page cache of the file at hand, and what the interpreter takes for itself.
    allowed = 2 * limit + 8 * 2**20
    ref = choose_checkpoint(store)
    assert peak_growth(lambda: export_checkpoint(ref, tmp_path / "out", max_shard_bytes=limit)) < allowed
    assert peak_growth(lambda: import_from(tmp_path / "out", Store(tmp_path / "runs/imported"))) < allowed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_holds_one_files_worth_of_tensors(
    save_run: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: Any
) -> None:
    config = config_of()
    ref = choose_checkpoint(save_run(random_model(config), config))
    batches: list[int] = []
    monkeypatch.setattr(
        export,
        "read_batch",
        lambda ref, entries, read=export.read_batch: (
            tensors := read(ref, entries),
            batches.append(sum(tensor.nbytes for tensor in tensors.values())),
        )[0],
    )
    export_checkpoint(ref, tmp_path / "out", dtype=dtype, max_shard_bytes=50_000)
    assert len(batches) > 3 and max(batches) <= 50_000


def test_an_export_reads_little_more_than_it_needs(save_run: Save, tmp_path: Path) -> None:
    """Each batch shares at most one part with the next in every data file, whatever the model's order."""
    config = config_of(num_layers=12, hidden_size=64, ffn_size=128)
    model = random_model(config)
    ref = choose_checkpoint(save_run(model, config, num_ranks=2))
    needed = sum(4 * parameter.numel() for parameter in model.parameters())
    read = 0

    class CountingStore(Store):
        def read_into(self, key: str, start: int, buffer: memoryview) -> None:
            nonlocal read
            read += len(buffer) if key.endswith(".safetensors") else 0
            super().read_into(key, start, buffer)

    counting = CountingStore(ref.store.url)
    export_checkpoint(choose_checkpoint(counting), tmp_path / "out", max_shard_bytes=400_000)
    assert needed <= read < 1.15 * needed


def test_batches_keep_order_and_limit(save_run: Save) -> None:
    config = config_of()
    entries = in_file_order(choose_checkpoint(save_run(random_model(config), config)).manifest.tensors)
    places = [(entry.blocks[0].shard, entry.blocks[0].begin) for entry in entries]
    assert places == sorted(places)
    batches = list(in_batches(entries, max_bytes=1))
    assert [len(batch) for batch in batches] == [1] * len(entries), "a tensor over the limit is alone"
    assert [entry for batch in in_batches(entries, max_bytes=9_000) for entry in batch] == entries


# ------------------------------------------------------------------------------------------------- out, refused


def leftovers(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in tmp_path.iterdir() if "out" in path.name)


def test_a_folder_that_exists_is_left_alone(save_run: Save, tmp_path: Path) -> None:
    config = config_of()
    ref = choose_checkpoint(save_run(random_model(config), config))
    (tmp_path / "out").mkdir()
    (tmp_path / "dangling-out").symlink_to(tmp_path / "nowhere")
    for name in ("out", "dangling-out"):
        with pytest.raises(CheckpointError, match=rf"{name} exists: give a folder that does not"):
            export_checkpoint(ref, tmp_path / name)
    with pytest.raises(CheckpointError, match="s3://bucket/out is a URL: export to a folder of this machine"):
        export_checkpoint(ref, "s3://bucket/out")
    assert leftovers(tmp_path) == ["dangling-out", "out"] and not list((tmp_path / "out").iterdir())


def test_a_folder_that_appears_meanwhile_is_left_alone(
    save_run: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of()
    ref = choose_checkpoint(save_run(random_model(config), config))
    described = export._description

    def slow_description(*arguments: Any) -> Any:
        (tmp_path / "out").mkdir()
        return described(*arguments)

    monkeypatch.setattr(export, "_description", slow_description)
    with pytest.raises(CheckpointError, match="out exists"):
        export_checkpoint(ref, tmp_path / "out")
    assert leftovers(tmp_path) == ["out"] and not list((tmp_path / "out").iterdir())


def test_bad_options_are_refused(save_run: Save, tmp_path: Path) -> None:
    config = config_of()
    ref = choose_checkpoint(save_run(random_model(config), config))
    with pytest.raises(CheckpointError, match="dtype is 'int8': export to one of float32, bfloat16"):
        export_checkpoint(ref, tmp_path / "out", dtype="int8")  # pyright: ignore[reportArgumentType]
    with pytest.raises(CheckpointError, match="the largest file is to have 0 bytes: give 1 or more"):
        export_checkpoint(ref, tmp_path / "out", max_shard_bytes=0)


def test_a_failed_export_leaves_nothing(save_run: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of()
    store = save_run(random_model(config), config)
    ref = choose_checkpoint(store)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(export, "_sync", full)
        with pytest.raises(
            CheckpointError, match=r"cannot write the export .*/out: No space left on device; .*[\d,]+ bytes"
        ):
            export_checkpoint(ref, tmp_path / "out")
    assert leftovers(tmp_path) == []

    data = next((tmp_path / "runs").rglob("shard-*"))
    content = bytearray(data.read_bytes())
    content[in_file_order(ref.manifest.tensors)[0].blocks[0].begin] ^= 1
    data.write_bytes(content)
    with pytest.raises(CheckpointDamaged, match="is damaged in part"):
        export_checkpoint(ref, tmp_path / "out")
    store.delete(TOKENIZER_NAME)
    with pytest.raises(StoreError, match=r"tokenizer\.json does not exist"):
        export_checkpoint(ref, tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_a_killed_export_is_no_folder(save_run: Save, tmp_path: Path) -> None:
    """Killed when all files are written and only the rename is missing."""
    config = config_of()
    store = save_run(random_model(config), config)
    code = (
        "import os, pathlib, sys\nfrom raynium.checkpoint.catalog import choose_checkpoint\n"
        "from raynium.checkpoint.store import Store\nfrom raynium.convert.export import export_checkpoint\n"
        "pathlib.Path.rename = lambda *_: os.kill(os.getpid(), 9)\n"
        "export_checkpoint(choose_checkpoint(Store(sys.argv[1])), sys.argv[2])"
    )
    done = subprocess.run([sys.executable, "-c", code, store.url, str(tmp_path / "out")])
    assert done.returncode == -9
    assert [name.startswith(".out.") for name in leftovers(tmp_path)] == [True]
    export_checkpoint(choose_checkpoint(store), tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == 320


def test_a_checkpoint_of_something_else_is_refused(save_run: Save, tmp_path: Path) -> None:
    config, larger = config_of(), config_of(num_layers=4, vocab_size=640)
    ref = choose_checkpoint(save_run(random_model(config), larger))
    with pytest.raises(CheckpointMismatch) as refused:
        export_checkpoint(ref, tmp_path / "out")
    assert (
        "is not the model that its config describes: it lacks model.layers.3.input_layernorm.weight, "
        "model.layers.3.self_attn.q_proj.weight, model.layers.3.self_attn.k_proj.weight, "
        "model.layers.3.self_attn.v_proj.weight, model.layers.3.self_attn.o_proj.weight and 4 more; it has "
        "model.embed_tokens.weight as [320, 32] instead of [640, 32], lm_head.weight as [320, 32] instead of [640, 32]"
    ) in str(refused.value)
    no_config = copy.deepcopy(ref.manifest.state)
    for state in ({}, {"config": 3}, {"config": {"model": {"vocab_size": -1}}}, no_config | {"config": {}}):
        manifest = ref.manifest.model_copy(update={"state": state})
        with pytest.raises(CheckpointMismatch, match="does not say which model it holds"):
            saved_model(type(ref)(ref.store, manifest))


# ------------------------------------------------------------------------------------------------- in


@pytest.fixture
def hugging_face(tmp_path: Path) -> Callable[..., Path]:
    """Has transformers itself save a random model, with a tokenizer of ours."""

    def save(name: str = "llama", *, dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB") -> Path:
        folder = tmp_path / "hugging-face"
        model = config_of(name).model
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_theta}
        if (scaling := model.rope_scaling) is not None:
            rope |= {"rope_type": "llama3"} | scaling.model_dump(exclude={"original_max_seq_len"})
            rope["original_max_position_embeddings"] = scaling.original_max_seq_len
        kinds = {"llama3": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3)}
        config_class, model_class = kinds[model.family]
        torch.manual_seed(0)
        theirs = model_class(
            config_class(
                vocab_size=model.vocab_size,
                hidden_size=model.hidden_size,
                intermediate_size=model.ffn_size,
                num_hidden_layers=model.num_layers,
                num_attention_heads=model.num_heads,
                num_key_value_heads=model.num_kv_heads,
                head_dim=model.head_dim,
                max_position_embeddings=model.max_seq_len,
                rms_norm_eps=model.norm_eps,
                rope_parameters=rope,
                tie_word_embeddings=model.embeddings == "tied",
            )
        ).to(dtype)
        theirs.save_pretrained(folder, max_shard_size=max_shard_size)
        tokenizer = Tokenizer.train([TEXT], vocab_size=280)
        (folder / TOKENIZER_NAME).write_text(tokenizer.file_text)
        return folder

    return save


@pytest.mark.parametrize("name", MODELS)
def test_a_round_trip_is_bit_equal(hugging_face: Callable[..., Path], tmp_path: Path, name: str) -> None:
    folder = hugging_face(name, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    imported = import_from(folder, Store(tmp_path / "runs/imported"))
    assert imported.model == config_of(name).model
    assert imported.ref.step == 0 and imported.ref.manifest.weights_only
    export_checkpoint(imported.ref, tmp_path / "back", max_shard_bytes=20_000)
    assert same_tensors(weights_in(tmp_path / "back"), weights_in(folder))
    assert (tmp_path / "back" / TOKENIZER_NAME).read_bytes() == (folder / TOKENIZER_NAME).read_bytes()

    again = import_from(tmp_path / "back", Store(tmp_path / "runs/again"))
    assert list(differences(imported.ref, again.ref)) == [] and again.model == imported.model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_become_float32_without_loss(
    hugging_face: Callable[..., Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    folder = hugging_face("llama, tied, scaled rope", dtype=dtype)
    imported = import_from(folder, Store(tmp_path / "runs/imported"))
    ours = read_tensors(imported.ref)
    theirs = weights_in(folder)
    assert torch.equal(ours["model/embedding.weight"], theirs["model.embed_tokens.weight"].float())
    assert {tensor.dtype for tensor in ours.values()} == {torch.float32}
    if dtype is torch.bfloat16:
        export_checkpoint(imported.ref, tmp_path / "back", dtype="bfloat16")
        assert same_tensors(weights_in(tmp_path / "back"), theirs)


def test_an_imported_run_can_be_sampled_and_described(hugging_face: Callable[..., Path], tmp_path: Path) -> None:
    folder = hugging_face("qwen3")
    imported = import_from(folder, Store(tmp_path / "runs/imported"))
    sampler = open_sampler(imported.ref.store.url)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    tokens_BT = torch.arange(40)[None]
    with torch.no_grad():
        expected = theirs(tokens_BT).logits
        assert (sampler.model(tokens_BT) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert sampler.text("def", max_new_tokens=3).startswith("def")

    snippet = yaml.safe_load(imported.job_snippet(name="imported", root="/runs"))
    assert snippet["data"] == {"tokenizer": str(tmp_path / "runs/imported/tokenizer.json")}
    assert snippet["run"] == {"name": "imported", "root": "/runs"}
    rest = {"data": snippet["data"] | {"path": "/data", "seq_len": 8}, "train": {"steps": 1, "global_batch_size": 1}}
    assert parse_config(yaml.safe_dump(snippet | rest)).model == imported.model


def test_what_other_tools_add_is_understood(hugging_face: Callable[..., Path], tmp_path: Path) -> None:
    """A tied head that is stored all the same (Qwen3-0.6B), and RoPE's frequencies (old Llamas)."""
    folder = hugging_face("qwen3, tied")
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


# ------------------------------------------------------------------------------------------------- config.json

PUBLISHED: dict[str, dict[str, Any]] = {
    "llama3-8b": {  # meta-llama/Llama-3.1-8B
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 128256,
    },
    "qwen3-8b": {  # Qwen/Qwen3-8B-Base
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 12288,
        "max_position_embeddings": 32768,
        "max_window_layers": 36,
        "model_type": "qwen3",
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_published_models_are_our_presets(preset: str) -> None:
    ours = load_config(preset).model
    assert model_from_config(PUBLISHED[preset], where="config.json") == ours
    written = config_from_model(ours, dtype="bfloat16", end_of_document_id=7)
    for name, value in PUBLISHED[preset].items():
        if name not in ("bos_token_id", "eos_token_id", "pretraining_tp", "max_window_layers", "sliding_window"):
            assert written[name] == value, name


def test_what_is_left_out_is_what_transformers_takes() -> None:
    sizes = {
        "vocab_size": 320,
        "hidden_size": 256,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
    }
    # transformers' own default for Qwen's key/value heads is 32, whatever the number of heads: it must be given.
    for config_class, given in ((LlamaConfig, {}), (Qwen3Config, {"num_key_value_heads": 4})):
        short = sizes | given | {"model_type": config_class.model_type}
        full = json.loads(config_class(**sizes, **given).to_json_string(use_diff=False))
        assert "rope_parameters" in full and "architectures" in full
        assert model_from_config(short, where="short") == model_from_config(full, where="full")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; models that can be imported are LlamaForCausalLM, Qwen3ForC"),
        ({"model_type": None}, "model_type is None"),
        ({"model_type": ["llama"]}, "config.json does not describe a model: "),
        ({"architectures": ["LlamaForSequenceClassification"]}, r"architectures is \['LlamaForSequenceClassific"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; models that can be imported have 'silu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is {'quant_method': 'fp8'}"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has .*'sliding_attention'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "the rotary positions are {'rope_type': 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, "the rotary positions are {'type': 'linear'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "the rotary positions are .* over whole heads"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "config.json lacks low_freq_factor"),
        ({"rope_scaling": [1]}, "config.json does not describe a model: "),
        ({"hidden_size": ...}, "config.json lacks hidden_size, which settles the model"),
        ({"num_attention_heads": 0, "head_dim": None}, "config.json does not describe a model: integer division"),
        ({"vocab_size": "many"}, "config.json does not describe a model: vocab_size: Input should be a valid integer"),
        ({"rms_norm_eps": 0}, "config.json does not describe a model: norm_eps: "),
    ],
)
def test_another_architecture_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    config = {name: value for name, value in (PUBLISHED["llama3-8b"] | changes).items() if value is not ...}
    with pytest.raises(CheckpointError, match=message):
        model_from_config(config, where="config.json")


# ------------------------------------------------------------------------------------------------- in, refused


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(folder: Path | str, tmp_path: Path, kind: type[Exception], message: str) -> None:
    """The import fails like that, and leaves no file of the run."""
    with pytest.raises(kind, match=message):
        import_from(folder, Store(tmp_path / "runs/imported"))
    assert not [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]


def test_tensors_that_are_not_the_models_are_named(hugging_face: Callable[..., Path], tmp_path: Path) -> None:
    folder = hugging_face()
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
    folder = hugging_face(max_shard_size="20KB")
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
    folder = hugging_face()
    config = folder / "config.json"
    config.write_text("{")
    refused(folder, tmp_path, CheckpointDamaged, r"config\.json is not JSON")
    config.write_text("[" * 100_000)
    refused(folder, tmp_path, CheckpointDamaged, r"config\.json is not JSON")
    config.write_text("[]")
    refused(folder, tmp_path, CheckpointDamaged, r"config\.json is not a JSON object")
    with config.open("wb") as file:
        file.truncate(2**27)
    refused(folder, tmp_path, CheckpointError, r"config\.json has more than 67,108,864 bytes")
    config.unlink()
    refused(folder, tmp_path, CheckpointError, r"cannot read .*config\.json: No such file or directory; is its folder")
    for odd in (tmp_path / "nothing", config.with_name(TOKENIZER_NAME), "s3://bucket/model"):
        refused(odd, tmp_path, CheckpointError, r"is no folder of this machine: give one with config\.json")


def test_a_tokenizer_must_be_there_and_fit(hugging_face: Callable[..., Path], tmp_path: Path) -> None:
    folder = hugging_face()
    large = Tokenizer.train([" ".join(f"word{n} {n * n}" for n in range(999))], vocab_size=600)
    (folder / TOKENIZER_NAME).write_text(large.file_text)
    refused(folder, tmp_path, CheckpointMismatch, rf"has {large.vocab_size} tokens, the model's vocabulary 320")
    (folder / TOKENIZER_NAME).unlink()
    refused(folder, tmp_path, DataError, "cannot be read")


def test_a_run_that_exists_is_left_alone(hugging_face: Callable[..., Path], save_run: Save, tmp_path: Path) -> None:
    folder = hugging_face()
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
    folder = hugging_face(max_shard_size="20KB")
    uploads = 0

    def breaking(*arguments: Any, upload: Any = import_folder.upload_shard, **names: Any) -> Any:
        nonlocal uploads
        uploads += 1
        if uploads == 3:
            raise StoreError("the disk is full")
        return upload(*arguments, **names)

    with monkeypatch.context() as patch:
        patch.setattr(import_folder, "upload_shard", breaking)
        refused(folder, tmp_path, StoreError, "the disk is full")
    assert uploads == 3
    with monkeypatch.context() as patch:
        patch.setattr(import_folder, "raw_bytes", lambda tensor: os.write(10**6, b""))  # any OSError
        refused(folder, tmp_path, CheckpointError, r"cannot write [\d,]+ bytes to .*: .*; set TMPDIR to a larger disk")
    # Killed between the data files and the manifest: what lies there is no checkpoint
    store = Store(tmp_path / "runs/imported")
    store.write_new("checkpoints/step-000000000/import-dead/shard-00000.safetensors", b"half")
    store.write_new(TOKENIZER_NAME, b"{}")
    assert import_from(folder, store).ref.step == 0
    assert list_checkpoints(store)[0].problem is None


def test_a_file_that_cannot_be_read_is_named(hugging_face: Callable[..., Path], tmp_path: Path) -> None:
    folder = hugging_face()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    refused(folder, tmp_path, CheckpointError, r"cannot read .*/model\.safetensors: ")


# ------------------------------------------------------------------------------------------------- training on


@pytest.fixture
def documents(hugging_face: Callable[..., Path], tmp_path: Path) -> Path:
    """A folder of text, tokenised with the imported model's tokenizer."""
    folder = hugging_face("llama, tied, scaled rope", dtype=torch.bfloat16)
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


def test_training_goes_on_from_imported_weights(documents: Path, tmp_path: Path) -> None:
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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
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

    batch = Loader(open_store(documents), seq_len=16, global_batch_size=4, data_rank=0, data_size=1, seed=0).batch(1)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hugging-face", dtype=torch.float32)
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
    with pytest.raises(DataError, match=r"was tokenised with another tokenizer than the run's own, .*tokenizer\.json"):
        keep_tokenizer(store, open_store(tmp_path / "other"))


def test_only_weights_may_come_alone(hugging_face: Callable[..., Path], save_run: Save, tmp_path: Path) -> None:
    """Moments that a checkpoint should have and lacks are an error unless it says that it holds weights only."""
    imported = import_from(hugging_face(), Store(tmp_path / "runs/imported"))
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
    imported = import_from(hugging_face(), Store(tmp_path / "runs/imported"))
    saved = imported.ref.manifest.state["config"]
    assert isinstance(saved, dict)
    config = parse_config(JOB, {"engine.dtype": "auto"})
    assert settled(config, cluster_resources=None, saved=saved).engine.dtype == native_dtype("cpu")
    trained = config.model_copy(update={"engine": config.engine.model_copy(update={"dtype": "float32"})})
    saved = trained.model_dump(mode="json")
    assert settled(config, cluster_resources=None, saved=saved).engine.dtype == "float32"

"""Checkpoints as Hugging Face folders, against transformers itself."""

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conversions import MODELS, config_of, same_tensors, weights_in
from safetensors import safe_open
from safetensors.torch import load_file

from raynium.checkpoint.catalog import choose_checkpoint
from raynium.checkpoint.format.batches import in_batches, in_file_order
from raynium.config.schema import Config
from raynium.convert import export
from raynium.convert.config_json import saved_model
from raynium.convert.description import RunText
from raynium.convert.export import export_checkpoint
from raynium.convert.import_folder import import_folder as import_from
from raynium.data.store import TOKENIZER_NAME
from raynium.data.tokenizer import Tokenizer
from raynium.errors import CheckpointDamaged, CheckpointError, CheckpointMismatch, StoreError
from raynium.models.decoder import Decoder
from raynium.storage.store import Store

TEXT = "def main(x): return\n\n  12345 héllo 漢字 it's"
Save = Callable[..., Store]


def random_model(config: Config, seed: int = 0) -> Decoder:
    """Random weights, norms too, large enough that every one of them shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    model = Decoder(config.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=0.3, generator=generator)
    return model.eval()


# ------------------------------------------------------------------------------------------------- out


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_transformers_loads_the_export_and_computes_the_same(
    transformers: Any, save_run: Save, tmp_path: Path, name: str
) -> None:
    config = config_of(name)
    model = random_model(config)
    done = export_checkpoint(choose_checkpoint(save_run(model, config)), tmp_path / "out")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(theirs).__name__ == config.model.traits.class_name
    assert theirs.dtype == torch.float32 and theirs.config.tie_word_embeddings == ("tied" in name)
    tokens_BT = torch.randint(0, 320, (2, 48), generator=torch.Generator().manual_seed(1))
    logits, expected = theirs(tokens_BT).logits, model(tokens_BT)
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert done.files == ("model.safetensors",) and done.step == 4
    assert done.num_bytes == sum(4 * parameter.numel() for parameter in model.parameters())


def test_transformers_tokenizes_as_training_did(transformers: Any, save_run: Save, tmp_path: Path) -> None:
    config = config_of()
    store = save_run(random_model(config), config)
    export_checkpoint(choose_checkpoint(store), tmp_path / "out")
    ours = Tokenizer.load(tmp_path / "out" / TOKENIZER_NAME)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    start = ours.end_of_document_id
    assert theirs(TEXT).input_ids == [start, *ours.encode(TEXT).tolist()]
    assert theirs.decode(theirs(TEXT).input_ids, skip_special_tokens=True) == TEXT
    assert theirs(TEXT, TEXT).input_ids == 2 * theirs(TEXT).input_ids and theirs("").input_ids == [start]
    assert theirs.eos_token_id == theirs.bos_token_id == ours.end_of_document_id
    assert theirs.model_max_length == 64
    for name in ("config.json", "generation_config.json"):
        fields = json.loads((tmp_path / "out" / name).read_text())
        assert fields["bos_token_id"] == fields["eos_token_id"] == ours.end_of_document_id
    kept, out = json.loads(store.read(TOKENIZER_NAME)), json.loads(ours.file_text)
    assert kept | {"post_processor": out["post_processor"]} == out


def test_a_large_model_gets_several_files_and_an_index(transformers: Any, save_run: Save, tmp_path: Path) -> None:
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
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.lm_head.weight, model.head.weight)
    assert torch.equal(loaded.model.layers[2].mlp.down_proj.weight, model.blocks[2].ffn.down.weight)
    export_checkpoint(ref, tmp_path / "one")
    assert same_tensors(weights_in(tmp_path / "one"), weights_in(tmp_path / "out"))


def test_bfloat16_is_the_nearest_and_half_the_size(transformers: Any, save_run: Save, tmp_path: Path) -> None:
    config = config_of("qwen3")
    model = random_model(config)
    ref = choose_checkpoint(save_run(model, config))
    done = export_checkpoint(ref, tmp_path / "out", dtype="bfloat16", max_shard_bytes=20_000)
    weights = weights_in(tmp_path / "out")
    assert torch.equal(weights["lm_head.weight"], model.head.weight.bfloat16())
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    sizes = [sum(tensor.nbytes for tensor in load_file(tmp_path / "out" / file).values()) for file in done.files]
    assert sum(sizes) == done.num_bytes == 2 * sum(parameter.numel() for parameter in model.parameters())
    together = [size + next_size for size, next_size in pairwise(sizes)]
    assert together and min(together) > 20_000, "the limit counts bytes of the file, not of the float32 it was made of"
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


@pytest.mark.parametrize("task", ["pretraining", "sft"])
def test_a_tokenizer_begins_texts_as_training_did(save_run: Save, tmp_path: Path, task: str) -> None:
    """Pretraining puts the end of a document before each; other tasks leave the tokenizer as it came."""
    config = config_of().model_copy(update={"task": task})
    store = save_run(random_model(config), config)
    fields = json.loads(store.read(TOKENIZER_NAME))
    begin = {"SpecialToken": {"id": "d", "type_id": 0}}
    known = {"d": {"id": "d", "ids": [fields["model"]["vocab"]["d"]], "tokens": ["d"]}}
    sequences = [[{"Sequence": {"id": name, "type_id": 0}}] for name in "AB"]
    came = {
        "type": "TemplateProcessing",
        "single": [begin, *sequences[0]],
        "pair": [begin, *sequences[0], *sequences[1]],
        "special_tokens": known,
    }
    store.replace(TOKENIZER_NAME, json.dumps(fields | {"post_processor": came}).encode())
    export_checkpoint(choose_checkpoint(store), tmp_path / "out")
    written = json.loads((tmp_path / "out" / TOKENIZER_NAME).read_text())["post_processor"]
    assert (written == came) == (task == "sft")


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
    store = save_run(model, config, unit_bytes=2**18)
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
        export.ModelWeights,
        "read",
        lambda weights, entries, read=export.ModelWeights.read: (
            tensors := read(weights, entries),
            batches.append(sum(tensor.nbytes for tensor in tensors.values())),
        )[0],
    )
    export_checkpoint(ref, tmp_path / "out", dtype=dtype, max_shard_bytes=50_000)
    assert len(batches) > 3 and max(batches) <= 50_000


def test_an_export_reads_little_more_than_it_needs(save_run: Save, tmp_path: Path) -> None:
    """In file order neighbours share requests and units; in the order of the layers it would be 7 % more."""
    config = config_of(num_layers=16, hidden_size=64, ffn_size=128)
    model = random_model(config)
    ref = choose_checkpoint(save_run(model, config, num_ranks=2, unit_bytes=2**12))
    needed = sum(4 * parameter.numel() for parameter in model.parameters())
    read = 0

    class CountingStore(Store):
        def read_into(self, key: str, start: int, *buffers: memoryview) -> None:
            nonlocal read
            read += sum(map(len, buffers)) if key.endswith(".safetensors") else 0
            super().read_into(key, start, *buffers)

    counting = CountingStore(ref.store.url)
    export_checkpoint(choose_checkpoint(counting), tmp_path / "out", max_shard_bytes=200_000)
    assert needed <= read < 1.02 * needed


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
    described = RunText.files

    def slow_description(*arguments: Any) -> Any:
        (tmp_path / "out").mkdir()
        return described(*arguments)

    monkeypatch.setattr(RunText, "files", slow_description)
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
    with pytest.raises(CheckpointDamaged, match=r"is damaged in bytes .*, which hold model/embedding.weight"):
        export_checkpoint(ref, tmp_path / "out")
    store.delete(TOKENIZER_NAME)
    with pytest.raises(StoreError, match=r"tokenizer\.json does not exist"):
        export_checkpoint(ref, tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_a_killed_export_is_no_folder(transformers: Any, save_run: Save, tmp_path: Path) -> None:
    """Killed when all files are written and only the rename is missing."""
    config = config_of()
    store = save_run(random_model(config), config)
    code = (
        "import os, pathlib, sys\nfrom raynium.checkpoint.catalog import choose_checkpoint\n"
        "from raynium.storage.store import Store\nfrom raynium.convert.export import export_checkpoint\n"
        "pathlib.Path.rename = lambda *_: os.kill(os.getpid(), 9)\n"
        "export_checkpoint(choose_checkpoint(Store(sys.argv[1])), sys.argv[2])"
    )
    done = subprocess.run([sys.executable, "-c", code, store.url, str(tmp_path / "out")])
    assert done.returncode == -9
    assert [name.startswith(".out.") for name in leftovers(tmp_path)] == [True]
    export_checkpoint(choose_checkpoint(store), tmp_path / "out")
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == 320


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

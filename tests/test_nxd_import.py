"""neuronx-distributed checkpoint folders become runs that go on; `test_nxd.py` has folders by the library itself."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from raynium.checkpoint.catalog import choose_checkpoint, list_checkpoints
from raynium.checkpoint.load import read_tensors
from raynium.cli.app import app
from raynium.config.schema import ModelSection
from raynium.convert.config_json import config_from_model
from raynium.convert.nxd_files import load_tensors
from raynium.convert.nxd_folder import import_nxd_folder
from raynium.data.store import TOKENIZER_NAME
from raynium.data.tokenizer import Tokenizer
from raynium.errors import CheckpointDamaged, CheckpointError, CheckpointMismatch, RayniumError
from raynium.models.decoder import Decoder
from raynium.storage.store import Store

STEP = 7
HEAD_DIM = 12
Tensors = dict[str, torch.Tensor]


def model_of(**changes: Any) -> ModelSection:
    sizes = {"vocab_size": 320, "hidden_size": 24, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
    more = {"head_dim": HEAD_DIM, "ffn_size": 48, "max_seq_len": 64}
    return ModelSection.model_validate(sizes | more | changes)


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [f"def function_{number}(x): return x + {number}\n" for number in range(400)]
    (folder / TOKENIZER_NAME).write_text(Tokenizer.train(texts, vocab_size=300).file_text)
    return folder / TOKENIZER_NAME


@pytest.fixture
def described(tokenizer_file: Path, tmp_path: Path) -> Callable[[ModelSection], Path]:
    """A model as a Hugging Face folder without weights."""

    def write(model: ModelSection) -> Path:
        folder = tmp_path / "described"
        folder.mkdir(exist_ok=True)
        fields = config_from_model(model, dtype="bfloat16", end_of_document_id=0)
        (folder / "config.json").write_text(json.dumps(fields))
        shutil.copy(tokenizer_file, folder / TOKENIZER_NAME)
        return folder

    return write


def random_state(model: ModelSection) -> dict[str, Tensors]:
    """Whole tensors by our names: the weights and both moments."""
    generator = torch.Generator().manual_seed(3)
    shapes = {name: parameter.shape for name, parameter in Decoder(model).named_parameters()}
    return {
        kind: {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        for kind in ("model", "exp_avg", "exp_avg_sq")
    }


def as_llama_of_nxd(whole: Tensors, *, tensor_rank: int, tensor_size: int, model: ModelSection) -> Tensors:
    """What the Llama that comes with the library holds on one rank, cut as its converter describes it."""
    copies = max(1, tensor_size // model.num_kv_heads)

    def part(tensor: torch.Tensor, dim: int = 0) -> torch.Tensor:
        return tensor.chunk(tensor_size, dim)[tensor_rank].clone()

    def query_rows(tensor: torch.Tensor) -> torch.Tensor:
        """Heads reordered for interleaved copies: the first of each key/value head, then the second of each, …"""
        each = model.num_heads // model.num_kv_heads // copies
        heads = tensor.unflatten(0, (model.num_kv_heads, copies, each * HEAD_DIM))
        return heads.transpose(0, 1).flatten(0, 2) if copies > 1 else tensor

    found = {"model.embed_tokens.weight": part(whole["embedding.weight"])}
    for layer in range(model.num_layers):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        found |= {
            f"{theirs}.self_attn.qkv_proj.weight_q": part(query_rows(whole[f"{ours}.attention.q.weight"])),
            f"{theirs}.self_attn.qkv_proj.weight_k": part(whole[f"{ours}.attention.k.weight"].repeat(copies, 1)),
            f"{theirs}.self_attn.qkv_proj.weight_v": part(whole[f"{ours}.attention.v.weight"].repeat(copies, 1)),
            f"{theirs}.self_attn.o_proj.weight": part(query_rows(whole[f"{ours}.attention.o.weight"].T).T, 1),
            f"{theirs}.mlp.gate_up_proj.weight": torch.cat(
                [part(whole[f"{ours}.ffn.gate.weight"]), part(whole[f"{ours}.ffn.up.weight"])]
            ),
            f"{theirs}.mlp.down_proj.weight": part(whole[f"{ours}.ffn.down.weight"], 1),
            f"{theirs}.input_layernorm.weight": whole[f"{ours}.attention_norm.weight"],
            f"{theirs}.post_attention_layernorm.weight": whole[f"{ours}.ffn_norm.weight"],
        }
    found["model.norm.weight"] = whole["final_norm.weight"]
    head = whole.get("head.weight", whole["embedding.weight"])
    return found | {"lm_head.weight": part(head)}


def write_checkpoint(
    folder: Path, state: dict[str, Tensors], model: ModelSection, *, tensor_size: int, data_size: int, grouped: bool
) -> Path:
    """ZeRO-1 with float32 masters beside bfloat16 weights if there are several data ranks, else plain float32."""
    tag = folder / "step_7"
    for name in ("model", "optim"):
        (tag / name).mkdir(parents=True)
    for rank in range(tensor_size):
        place = {"tensor_rank": rank, "tensor_size": tensor_size, "model": model}
        kinds = {kind: as_llama_of_nxd(whole, **place) for kind, whole in state.items()}
        names = [n for n in kinds["model"] if n != "lm_head.weight" or model.embeddings == "untied"]
        order = sorted(names, key=lambda name: kinds["model"][name].ndim == 1) if grouped else names
        matrices = sum(kinds["model"][name].ndim > 1 for name in order)
        groups = [matrices, len(order) - matrices] if grouped else [len(order)]
        starts = [sum(groups[:index]) for index in range(len(groups))]
        param_groups = [
            {"lr": 1e-3, "betas": (0.9, 0.95), "params": list(range(start, start + size))}
            for start, size in zip(starts, groups, strict=True)
        ]
        dtype = torch.bfloat16 if data_size > 1 else torch.float32
        saved = {name: tensor.to(dtype) for name, tensor in kinds["model"].items()}
        torch.save(saved, tag / f"model/dp_rank_00_tp_rank_{rank:02d}_pp_rank_00.pt")
        for data_rank in range(data_size):
            path = tag / f"optim/dp_rank_{data_rank:02d}_tp_rank_{rank:02d}_pp_rank_00.pt"

            def rows(kind: str, name: str, data_rank: int = data_rank, kinds: Any = kinds) -> torch.Tensor:
                tensor = kinds[kind][name]
                padding = -len(tensor) % data_size
                return F.pad(tensor, [0, 0] * (tensor.ndim - 1) + [0, padding]).chunk(data_size)[data_rank].clone()

            moments = {
                index: {"step": torch.tensor(float(STEP))}
                | {kind: rows(kind, name) for kind in ("exp_avg", "exp_avg_sq")}
                for index, name in enumerate(order)
            }
            if data_size == 1:
                torch.save({"state": moments, "param_groups": param_groups}, path)
            else:
                zero1 = {
                    "state": {},
                    "param_groups": param_groups,
                    "base_state": moments,
                    "shape_info": {index: kinds["model"][name].shape for index, name in enumerate(order)},
                    "sharded_master_weights": {index: rows("model", name) for index, name in enumerate(order)},
                }
                torch.save(zero1, path)
    (tag / "done").write_text("1")
    return tag


def check_imported(store: Store, state: dict[str, Tensors], *, step: int) -> None:
    (listed,) = list_checkpoints(store)
    assert (listed.step, listed.problem) == (step, None)
    ref = choose_checkpoint(store, step)
    prefixes = {"model": "model/", "exp_avg": "optimizer/exp_avg/", "exp_avg_sq": "optimizer/exp_avg_sq/"}
    for kind, whole in state.items():
        found = read_tensors(ref, prefixes[kind])
        assert found.keys() == {prefixes[kind] + name for name in whole}
        assert all(torch.equal(found[prefixes[kind] + name], tensor) for name, tensor in whole.items()), kind


@pytest.mark.parametrize("tensor_size", [1, 2, 4])
@pytest.mark.parametrize(("data_size", "grouped"), [(1, False), (1, True), (5, True)])
@pytest.mark.parametrize("embeddings", ["tied", "untied"])
def test_weights_and_moments_of_all_ranks_come_together(
    tensor_size: int,
    data_size: int,
    grouped: bool,
    embeddings: str,
    described: Callable[[ModelSection], Path],
    tmp_path: Path,
) -> None:
    """5 data ranks divide no parameter, so shards are padded; 4 tensor ranks hold 2 copies of each key/value head."""
    model = model_of(embeddings=embeddings)
    state = random_state(model)
    write_checkpoint(tmp_path / "nxd", state, model, tensor_size=tensor_size, data_size=data_size, grouped=grouped)
    store = Store(tmp_path / "runs/imported")
    imported = import_nxd_folder(tmp_path / "nxd", store, model_folder=described(model))
    assert imported.model == model and imported.ref.step == STEP and not imported.ref.manifest.weights_only
    check_imported(store, state, step=STEP)


def test_without_the_optimizer_a_run_begins_anew(described: Callable[[ModelSection], Path], tmp_path: Path) -> None:
    model = model_of()
    state = random_state(model)
    tag = write_checkpoint(tmp_path / "nxd", state, model, tensor_size=2, data_size=2, grouped=True)
    store = Store(tmp_path / "runs/imported")
    imported = import_nxd_folder(tag, store, model_folder=described(model), with_optimizer=False)
    assert imported.ref.manifest.weights_only
    rounded = {name: tensor.bfloat16().float() for name, tensor in state["model"].items()}
    check_imported(store, {"model": rounded}, step=0)


# ---- what is refused -------------------------------------------------------------------------------------------------


class Attack:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path):
        self._target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._target),)


def edit(path: Path, change: Callable[[dict[Any, Any]], Any]) -> None:
    found = torch.load(path, weights_only=True)
    change(found)
    torch.save(found, path)


def set_step(path: Path, step: int) -> None:
    edit(path, lambda found: found["base_state"][0].update(step=torch.tensor(float(step))))


MODEL_1 = "model/dp_rank_00_tp_rank_01_pp_rank_00.pt"
OPTIM_1 = "optim/dp_rank_00_tp_rank_01_pp_rank_00.pt"
DOWN = "model.layers.1.mlp.down_proj.weight"

DAMAGE: dict[str, tuple[Callable[[Path], Any], type[RayniumError], str]] = {
    "not finished": (
        lambda tag: (tag / "done").unlink(),
        CheckpointError,
        "has no file 'done': neuronx-distributed did not finish saving it",
    ),
    "a rank is missing": (
        lambda tag: (tag / "model/dp_rank_00_tp_rank_00_pp_rank_00.pt").unlink(),
        CheckpointDamaged,
        r"/model lacks dp_rank_00_tp_rank_00_pp_rank_00\.pt: copy the whole checkpoint",
    ),
    "an optimizer file is missing": (
        lambda tag: (tag / "optim/dp_rank_01_tp_rank_00_pp_rank_00.pt").unlink(),
        CheckpointDamaged,
        r"/optim lacks dp_rank_01_tp_rank_00_pp_rank_00\.pt",
    ),
    "a tensor rank of another save": (
        lambda tag: [set_step(path, 6) for path in (tag / "optim").glob("dp_rank_*_tp_rank_01_*")],
        CheckpointDamaged,
        r"/optim has files of the steps \[6, 7\], which are of different saves: copy the whole checkpoint",
    ),
    "a data rank of another save": (
        lambda tag: set_step(tag / "optim/dp_rank_01_tp_rank_00_pp_rank_00.pt", 6),
        CheckpointDamaged,
        r"/optim has files of the steps \[6, 7\]",
    ),
    "no files": (
        lambda tag: [path.unlink() for path in (tag / "model").iterdir()],
        CheckpointError,
        "holds no file named like dp_rank_00_tp_rank_00_pp_rank_00.pt: give the folder of one tag",
    ),
    "xser": (
        lambda tag: (tag / f"{MODEL_1}.tensors").mkdir(),
        CheckpointError,
        "was saved with use_xser=True, whose index files pickle classes, and reading those can run code: save it again",
    ),
    "experts": (
        lambda tag: shutil.copy(tag / MODEL_1, tag / "model/dp_rank_01_tp_rank_01_pp_rank_00.pt"),
        CheckpointMismatch,
        "has files of several data ranks: experts are not supported",
    ),
    "no torch file": (
        lambda tag: (tag / MODEL_1).write_bytes(b"\x80\x04no"),
        CheckpointError,
        "was not read: .* It must be a torch file of tensors and plain values alone",
    ),
    "no dict": (
        lambda tag: torch.save([1], tag / MODEL_1),
        CheckpointDamaged,
        "holds a list instead of a state dict",
    ),
    "no tensor": (
        lambda tag: edit(tag / MODEL_1, lambda found: found.update(step=3)),
        CheckpointDamaged,
        "holds 'step', which is no named tensor",
    ),
    "a bias": (
        lambda tag: edit(
            tag / MODEL_1, lambda found: found.update({"model.layers.0.self_attn.o_proj.bias": torch.ones(2)})
        ),
        CheckpointMismatch,
        r"holds model\.layers\.0\.self_attn\.o_proj\.bias, which has no place in a model of ours",
    ),
    "an unknown tensor": (
        lambda tag: edit(tag / MODEL_1, lambda found: found.update(odd=torch.ones(2))),
        CheckpointMismatch,
        "which is which cannot be told|has odd, which the model in config.json does not have",
    ),
    "a missing tensor": (
        lambda tag: [
            edit(tag / MODEL_1, lambda found: found.pop("model.norm.weight")),
            [edit(path, drop_last) for path in (tag / "optim").glob("*tp_rank_01*")],
        ],
        CheckpointMismatch,
        r"tensor rank 1, lacks final_norm\.weight, which the model in config.json has",
    ),
    "another shape": (
        lambda tag: [
            edit(tag / MODEL_1, lambda found: found.update({DOWN: torch.ones(24, 12)})),
        ],
        CheckpointMismatch,
        r"blocks\.1\.ffn\.down\.weight is \[24, 12\] in the model and \[24, 24\] in the optimizer",
    ),
    "other groups": (
        lambda tag: edit(tag / OPTIM_1, lambda found: found.update(param_groups=[{"params": [0]}, {"params": [1]}])),
        CheckpointMismatch,
        r"has groups of \[1, 1\] parameters, and the model 14 matrices and 5 others: which is which cannot be told; "
        "import without the optimizer",
    ),
}


def drop_last(found: dict[Any, Any]) -> None:
    group = found["param_groups"][-1]
    group["params"] = group["params"][:-1]


@pytest.fixture
def tag(tmp_path: Path) -> Path:
    return write_checkpoint(
        tmp_path / "nxd", random_state(model_of()), model_of(), tensor_size=2, data_size=2, grouped=True
    )


def refused(tag: Path, described: Path, tmp_path: Path, error: type[RayniumError], match: str) -> None:
    store = Store(tmp_path / "runs/imported")
    with pytest.raises(error, match=match):
        import_nxd_folder(tag, store, model_folder=described)
    assert store.list().sizes == {}, "nothing is kept"


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_no_whole_checkpoint_is_refused(
    damage: str, tag: Path, described: Callable[[ModelSection], Path], tmp_path: Path
) -> None:
    change, error, match = DAMAGE[damage]
    change(tag)
    refused(tag, described(model_of()), tmp_path, error, match)


@pytest.mark.parametrize("file", [MODEL_1, OPTIM_1])
def test_a_file_that_would_run_code_is_refused_and_does_not(
    file: str, tag: Path, described: Callable[[ModelSection], Path], tmp_path: Path
) -> None:
    torch.save({"model.norm.weight": torch.ones(24), "attack": Attack(tmp_path / "attacked")}, tag / file)
    refused(tag, described(model_of()), tmp_path, CheckpointError, "since reading others can run code")
    assert not (tmp_path / "attacked").exists()
    torch.load(tag / file, weights_only=False)
    assert (tmp_path / "attacked").exists(), "the file was harmless, so the test showed nothing"


def test_another_model_than_config_json_is_refused(
    tag: Path, described: Callable[[ModelSection], Path], tmp_path: Path
) -> None:
    refused(tag, described(model_of(hidden_size=32)), tmp_path, CheckpointMismatch, "instead of floats")
    tied = described(model_of(embeddings="tied"))
    refused(tag, tied, tmp_path, CheckpointMismatch, "has a head of its own|which is which cannot be told")
    odd = described(model_of(num_heads=3, num_kv_heads=3))
    refused(tag, odd, tmp_path, CheckpointMismatch, "2 tensor-parallel ranks, among which 3 heads, 3 key/value heads")
    large = described(model_of(num_layers=3))
    refused(tag, large, tmp_path, CheckpointMismatch, "lacks blocks.2.attention.o.weight")


def test_a_folder_with_no_or_several_finished_tags_is_refused(
    tag: Path, described: Callable[[ModelSection], Path], tmp_path: Path
) -> None:
    shutil.copytree(tag, tag.parent / "step_9")
    match = (
        rf"holds several checkpoints \(step_7, step_9\): give the folder of one, {re.escape(str(tag.parent))}/step_9"
    )
    refused(tag.parent, described(model_of()), tmp_path, CheckpointError, match)
    refused(tmp_path, described(model_of()), tmp_path, CheckpointError, "holds no finished neuronx-distributed")


def test_a_whole_file_is_read(tag: Path) -> None:
    assert load_tensors(tag / MODEL_1)[DOWN].dtype == torch.bfloat16


def test_the_command_takes_such_a_folder_with_its_optimizer_and_says_where_the_run_goes_on(
    described: Callable[[ModelSection], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = model_of()
    write_checkpoint(tmp_path / "nxd", random_state(model), model, tensor_size=2, data_size=1, grouped=True)
    arguments = ["checkpoints", "import", "nxd", "copy", "--model", str(described(model))]
    ended = CliRunner().invoke(app, arguments)
    assert ended.exit_code == 0, ended.output
    assert f"# nxd is step {STEP} of run copy" in ended.output
    assert choose_checkpoint(Store(tmp_path / "runs/copy")).step == STEP
    fresh = CliRunner().invoke(app, [*arguments[:3], "fresh", *arguments[4:], "--no-optimizer"])
    assert "is step 0 of run fresh" in fresh.output
    assert CliRunner().invoke(app, [*arguments, "--kv-order", "random"]).exit_code == 2

"""Adapters in and out: PEFT's folders, and the model with the adapter merged."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conversions import config_of, weights_in
from peft_twin import first_weights, with_some_b, with_weights
from safetensors.torch import load_file, save_file
from torch import Tensor

from raynium.checkpoint.base import base_of
from raynium.checkpoint.catalog import choose_checkpoint
from raynium.checkpoint.load import read_tensors
from raynium.config.adapter import AdapterSection
from raynium.config.schema import Config
from raynium.convert.adopt import find
from raynium.convert.export import export_checkpoint
from raynium.convert.merged import merged_weights, saved_adapter
from raynium.convert.peft_folder import adopt_adapter, check_adapter, export_adapter
from raynium.errors import CheckpointError, CheckpointMismatch, ConfigError
from raynium.models.adapter import is_adapters
from raynium.storage.store import Store

# PEFT asks transformers by a name that is about to go.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TOKENS = torch.arange(12).view(2, 6)
ADAPTERS: dict[str, dict[str, Any]] = {
    "all-linear": {},
    "two targets, by the root of the rank": {"targets": ("q_proj", "down_proj"), "rank_stabilised": True, "alpha": 2.5},
    "tables too": {"train_also": ("embedding", "head")},
}


class Parameters:
    """As much of a module as a save needs."""

    def __init__(self, tensors: dict[str, Tensor]):
        self._tensors = tensors

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._tensors.items()


def adapted_config(model: str, **adapter: Any) -> Config:
    section = AdapterSection(rank=4, **adapter)
    return config_of(model).model_copy(update={"adapter": section})


def learned(config: Config, weights: dict[str, Tensor]) -> Parameters:
    """What a run of this config saves."""
    tables = {f"{name}.weight" for name in config.adapter.train_also}
    return Parameters({name: each for name, each in weights.items() if is_adapters(name) or name in tables})


def begins(config: Config, folder: Path, **changes: Any) -> Config:
    """The same, beginning with the adapter in `folder`."""
    return config.model_copy(update={"adapter": config.adapter.model_copy(update={"init": str(folder)} | changes)})


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("family", ["llama", "qwen3, tied"])
def test_an_exported_adapter_is_pefts_own_and_merged_it_computes_the_same(
    family: str, kind: str, save_run: Callable[..., Any], peft: Any, transformers_model: Callable[..., Any],
    transformers: Any, tmp_path: Path,
) -> None:  # fmt: skip
    config = adapted_config(family, **ADAPTERS[kind])
    weights = with_some_b(first_weights(config))
    for table in config.adapter.train_also:
        if f"{table}.weight" in weights:
            weights[f"{table}.weight"] = weights[f"{table}.weight"] * 2 + 0.01
    ref = choose_checkpoint(save_run(learned(config, weights), config))
    done = export_adapter(ref, tmp_path / "adapter")
    assert done.num_tensors == len(weights_in(tmp_path / "adapter"))

    base = first_weights(config)
    model = with_weights(transformers_model(config.model), config, base)
    loaded = peft.PeftModel.from_pretrained(model, str(tmp_path / "adapter")).eval()
    export_checkpoint(ref, tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        unmerged, of_merged = loaded(input_ids=TOKENS).logits, merged(input_ids=TOKENS).logits
    torch.testing.assert_close(of_merged, unmerged, rtol=1e-5, atol=1e-5)
    # PEFT saves what it loaded: the same numbers under the same names, which a run may begin with.
    loaded.save_pretrained(tmp_path / "again")
    assert (
        check_adapter(begins(config, tmp_path / "again")).keys()
        == dict(learned(config, weights).named_parameters()).keys()
    )
    ours, theirs = weights_in(tmp_path / "adapter"), weights_in(tmp_path / "again")
    assert {name: each.tolist() for name, each in ours.items()} == {
        name: each.tolist() for name, each in theirs.items()
    }


def test_merged_weights_are_the_base_and_the_product(save_run: Callable[..., Any]) -> None:
    config = adapted_config("llama", targets=("q_proj",), alpha=8.0)
    weights = with_some_b(first_weights(config))
    merged = merged_weights(choose_checkpoint(save_run(learned(config, weights), config)))
    assert merged.keys() == {name for name in weights if not is_adapters(name)}
    q = "blocks.1.attention.q"
    product = weights[f"{q}.lora_B"] @ weights[f"{q}.lora_A"]
    torch.testing.assert_close(merged[f"{q}.weight"], weights[f"{q}.weight"] + 2 * product)
    assert torch.equal(merged["blocks.1.ffn.up.weight"], weights["blocks.1.ffn.up.weight"])


def test_only_a_run_with_an_adapter_has_one_to_export(save_run: Callable[..., Any], tmp_path: Path) -> None:
    config = config_of("llama")
    ref = choose_checkpoint(save_run(Parameters(first_weights(config)), config))
    assert saved_adapter(ref).rank is None
    with pytest.raises(CheckpointError, match="is of a run without an adapter: export it as it is, without --adapter"):
        export_adapter(ref, tmp_path / "adapter")


def test_a_state_that_names_no_adapter_is_refused(save_run: Callable[..., Any]) -> None:
    config = adapted_config("llama")
    ref = choose_checkpoint(save_run(learned(config, first_weights(config)), config))
    ref.manifest.state["config"]["adapter"]["rank"] = -1  # pyright: ignore
    with pytest.raises(CheckpointMismatch, match=r"its state has no valid config\.adapter"):
        saved_adapter(ref)


def test_the_files_are_those_of_peft(save_run: Callable[..., Any], tmp_path: Path) -> None:
    config = adapted_config("llama", targets=("q_proj", "up_proj"))
    export_adapter(choose_checkpoint(save_run(learned(config, first_weights(config)), config)), tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "raynium.json",
    }  # fmt: skip
    fields = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert fields["peft_type"] == "LORA" and fields["r"] == 4 and fields["lora_alpha"] == 16
    assert fields["target_modules"] == ["q_proj", "up_proj"] and fields["modules_to_save"] is None


# ---- An adapter to begin with ----------------------------------------------------------------------------------------


@pytest.fixture
def exported(save_run: Callable[..., Any], tmp_path: Path) -> tuple[Config, Path]:
    config = adapted_config("llama", targets=("q_proj", "up_proj"))
    weights = with_some_b(first_weights(config))
    export_adapter(choose_checkpoint(save_run(learned(config, weights), config)), tmp_path / "adapter")
    return config, tmp_path / "adapter"


def rewritten(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_an_adopted_adapter_is_read_bit_by_bit(exported: tuple[Config, Path], tmp_path: Path) -> None:
    config, folder = exported
    store = Store(tmp_path / "runs/second")
    adopt_adapter(begins(config, folder), store)
    found = read_tensors(base_of(store, name="adapter.json"))
    expected = with_some_b(first_weights(config))
    assert found.keys() == {f"model/{name}" for name in expected if is_adapters(name)}
    assert all(torch.equal(tensor, expected[name.removeprefix("model/")]) for name, tensor in found.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 8}, r"adapter\.rank is 8, and the adapter at adapter\.init = .* has 4: set adapter\.rank to that"),
        ({"alpha": 3.5}, r"adapter\.alpha is 3\.5, and the adapter at .* has 16: set"),
        ({"rank_stabilised": True}, r"adapter\.rank_stabilised is True, and the adapter at .* has False: set"),
        ({"targets": ("q_proj",)}, r"adapter\.targets are q_proj, and the adapter at .* has q_proj, up_proj: set"),
        ({"train_also": ("head",)}, r"adapter\.train_also is \['head'\], and the adapter at .* has \[\] whole: set"),
    ],
)
def test_an_adapter_of_other_settings_is_refused_by_their_names(
    changes: dict[str, Any], message: str, exported: tuple[Config, Path]
) -> None:
    config, folder = exported
    with pytest.raises(ConfigError, match=message):
        check_adapter(begins(config, folder, **changes))


def test_what_our_adapters_do_not_do_is_refused(exported: tuple[Config, Path]) -> None:
    config, folder = exported
    rewritten(folder, use_dora=True, alpha_pattern={"q_proj": 2})
    with pytest.raises(ConfigError) as refused:
        check_adapter(begins(config, folder))
    assert [problem.partition(": ")[2] for problem in refused.value.problems] == [
        "use_dora is True; adapters that can be read have False",
        "alpha_pattern is {'q_proj': 2}; adapters that can be read have {}",
    ]


def test_targets_that_are_a_pattern_are_refused(exported: tuple[Config, Path]) -> None:
    config, folder = exported
    rewritten(folder, target_modules=".*_proj")
    with pytest.raises(ConfigError, match=r"adapter\.targets are q_proj, up_proj, and .* has '\.\*_proj': set"):
        check_adapter(begins(config, folder))


def test_an_adapter_of_another_model_is_refused_by_the_tensors(exported: tuple[Config, Path]) -> None:
    config, folder = exported
    wider = config_of("llama", hidden_size=64).model_copy(update={"adapter": config.adapter})
    with pytest.raises(CheckpointMismatch, match=r"it has .*q_proj\.lora_A\.weight as \[4, 32\] instead of \[4, 64\]"):
        check_adapter(begins(wider, folder))
    deeper = config_of("llama", num_layers=4).model_copy(update={"adapter": config.adapter})
    with pytest.raises(
        CheckpointMismatch, match=r"it lacks base_model\.model\.model\.layers\.3\.self_attn\.q_proj\.lora_A"
    ):
        check_adapter(begins(deeper, folder))


def test_an_adapter_of_other_numbers_is_refused(exported: tuple[Config, Path]) -> None:
    config, folder = exported
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor.to(torch.int32) for name, tensor in load_file(path).items()}, path)
    with pytest.raises(CheckpointMismatch, match=r"lora_A\.weight \(I32\).*: adapters that can be read are F32"):
        check_adapter(begins(config, folder))


def test_an_adapter_of_other_weights_is_refused(exported: tuple[Config, Path], tmp_path: Path) -> None:
    config, folder = exported
    (folder / "raynium.json").write_text(json.dumps({"base_identity": "a" * 64}))
    adopt_adapter(begins(config, folder), Store(tmp_path / "runs/second"))
    model = config.model.model_copy(update={"init": "/other", "init_identity": "b" * 64})
    with pytest.raises(CheckpointMismatch, match=r"belongs to weights with the identity a{64}, and those at .*/other"):
        adopt_adapter(begins(config.model_copy(update={"model": model}), folder), Store(tmp_path / "runs/third"))


def test_a_run_cannot_begin_with_another_runs_adapter_as_its_model(save_run: Callable[..., Any]) -> None:
    config = adapted_config("llama")
    store = save_run(learned(config, first_weights(config)), config)
    with pytest.raises(CheckpointError, match="holds an adapter and not the weights it belongs to: export it"):
        find(store.url.removeprefix("file://"))

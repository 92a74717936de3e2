"""Hostile and damaged Hugging Face folders: refused by name, at once, in little memory, and nothing of them is kept."""

import contextlib
import json
import os
import re
import socket
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conversions import config_of, weights_in
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from raynium.convert.config_json import model_from_config
from raynium.convert.import_folder import import_folder
from raynium.convert.parameters import parameter_shapes
from raynium.data.store import TOKENIZER_NAME
from raynium.errors import CheckpointDamaged, CheckpointError, RayniumError
from raynium.models.attention import rope_tables
from raynium.storage.store import Store

pytestmark = pytest.mark.parity

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "head_dim": 12,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 24,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 320,
}
COUNTS = [name for name, value in CONFIG.items() if type(value) is int and not name.endswith("_id")]
QUICKLY = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


def refused(folder: Path, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        import_folder(folder, Store(folder.parent / "runs/imported"))
    assert not [path for path in (folder.parent / "runs").rglob("*") if path.is_file()]


# ------------------------------------------------------------------------------------------------- config.json


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", [True, 4.0, "4", 10**12, 10**4000, 0, -1, [4], {}])
def test_a_count_that_is_none_is_refused_before_anything_is_made_of_it(name: str, value: Any) -> None:
    # Where it is no number, or 0, these two fall back on what the other fields say.
    if not (name in ("head_dim", "num_key_value_heads") and value in (0, {})):
        with pytest.raises(CheckpointError, match=r"does not describe a model|is 10*, over [0-9,]+, as in no model"):
            model_from_config(CONFIG | {name: value}, where="config.json")


def test_a_model_that_no_machine_could_hold_is_refused_by_its_parameters() -> None:
    sizes = {"vocab_size": 10**8, "hidden_size": 10**8, "intermediate_size": 10**8, "num_attention_heads": 10**8}
    with pytest.raises(CheckpointError, match=r"the number of parameters is \d+, over 10,000,000,000,000, as in no"):
        model_from_config(CONFIG | sizes, where="config.json")
    with pytest.raises(CheckpointError, match=r"original_max_position_embeddings is 10+, over"):
        scaling = CONFIG["rope_scaling"] | {"original_max_position_embeddings": 10**12}
        model_from_config(CONFIG | {"rope_scaling": scaling}, where="config.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false': it must be true or false"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1: it must be"),
        ({"attention_bias": 0}, "attention_bias is 0; models that can be imported have False"),
        ({"partial_rotary_factor": True}, "partial_rotary_factor is True"),
        ({"rms_norm_eps": True}, "norm_eps: Input should be a valid number"),
        ({"rope_theta": True}, "rope_theta: Input should be a valid number"),
        ({"rope_theta": float("nan")}, "rope_theta: Input should be a finite number"),
        (
            {"rope_scaling": CONFIG["rope_scaling"] | {"factor": True}},
            "rope_scaling.factor: Input should be a valid nu",
        ),
        ({"initializer_range": True}, "init_std: Input should be a valid number"),
        ({"architectures": ["x" * 10_000_000]}, "architectures is .{200}; models"),
    ],
)
def test_values_of_another_kind_are_named_in_a_short_message(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        model_from_config(CONFIG | changes, where="config.json")
    assert len(str(error.value)) < 500


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-(10**30), max_value=10**30)
    | st.floats()
    | st.sampled_from([0, 1, 2, 12, 320, "llama", "llama3", "default", "qwen3", "silu", "LlamaForCausalLM"])
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["rope_type", "factor"]), inner),
    max_leaves=4,
)


@QUICKLY
@given(
    changes=st.dictionaries(
        st.sampled_from([*CONFIG, "layer_types", "rope_parameters", "model_type"]), VALUES, max_size=4
    ),
    scaling=st.dictionaries(st.sampled_from([*CONFIG["rope_scaling"], "rope_theta", "type"]), VALUES, max_size=2),
    missing=st.sets(st.sampled_from(list(CONFIG)), max_size=2),
)
def test_any_config_json_is_refused_by_name_or_describes_a_model_that_can_be_computed(
    changes: dict[str, Any], scaling: dict[str, Any], missing: set[str]
) -> None:
    config = CONFIG | {"rope_scaling": CONFIG["rope_scaling"] | scaling} | changes
    config = {name: value for name, value in config.items() if name not in missing}
    tracemalloc.start()
    try:
        model = model_from_config(config, where="config.json")
    except CheckpointError as error:
        assert str(error).startswith("config.json") and len(str(error)) < 1000
    else:
        assert all(type(value) is not bool for _, value in model) and len(parameter_shapes(model)) >= 11
        if model.head_dim <= 2**16 and model.head_dim % 2 == 0:
            tables = rope_tables(model, num_tokens=1, device=torch.device("cpu"))
            assert all(table.isfinite().all() for table in tables)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 64 * 2**20


# ------------------------------------------------------------------------------------------------- no plain files


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", TOKENIZER_NAME, "generation_config.json"])
@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "folder"])
def test_what_is_no_file_is_refused_and_not_waited_for(
    hugging_face: Callable[..., Path], name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = hugging_face(config_of().model)
    path = folder / name
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as server:
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "socket":
            # The path of a socket may have about a hundred characters.
            monkeypatch.chdir(folder)
            server.bind(name)
        elif kind == "device":
            path.symlink_to("/dev/zero")
        else:
            path.mkdir()
        refused(folder, CheckpointError, rf"cannot read .*{re.escape(name)}: it is a {kind}, and only plain files are")


# ------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(
    hugging_face: Callable[..., Path], dtype: torch.dtype, value: float
) -> None:
    folder = hugging_face(config_of().model, dtype=dtype)
    weights = weights_in(folder)
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    refused(folder, CheckpointDamaged, r"model/blocks\.1\.ffn\.up\.weight holds numbers that are NaN or infinite")


def test_the_largest_numbers_of_a_float_are_no_fault(hugging_face: Callable[..., Path], tmp_path: Path) -> None:
    folder = hugging_face(config_of().model)
    weights = weights_in(folder)
    weights["model.norm.weight"].fill_(torch.finfo(torch.float32).max)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert import_folder(folder, Store(tmp_path / "runs/imported")).ref.step == 0


@pytest.fixture
def safetensors_folder(hugging_face: Callable[..., Path]) -> tuple[Path, dict[str, Any], bytes]:
    """A folder, the header of its one file of weights, and the bytes after it."""
    folder = hugging_face(config_of().model)
    content = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    return folder, json.loads(content[8 : 8 + length]), content[8 + length :]


def write_weights(folder: Path, header: bytes, data: bytes, *, length: int | None = None) -> None:
    stated = len(header) if length is None else length
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", stated % 2**64) + header + data)


def imported_or_refused(folder: Path) -> None:
    """Within bounded memory; and what is refused leaves nothing."""
    tracemalloc.start()
    with contextlib.suppress(RayniumError):
        import_folder(folder, Store(folder.parent / f"runs/imported-{time.monotonic_ns()}"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * 2**20


@QUICKLY
@given(data=st.data())
def test_any_safetensors_header_is_refused_by_name_or_imported(
    safetensors_folder: tuple[Path, dict[str, Any], bytes], data: st.DataObject
) -> None:
    folder, header, content = safetensors_folder
    name = data.draw(st.sampled_from(sorted(header.keys() - {"__metadata__"})))
    numbers = st.lists(st.integers(-2, 2**65) | st.sampled_from([0, 32, 320, True, None, 1.5]), max_size=3)
    fields = {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "I64", "BOOL", "F8_E4M3", "F4", "", "nothing", 7, None]),
        "shape": numbers | st.none() | st.text(max_size=3),
        "data_offsets": numbers | st.none(),
        "more": st.just(1),
    }
    change = data.draw(st.fixed_dictionaries({}, optional=fields))
    changed = header | {name: header[name] | change}
    if data.draw(st.booleans()):
        changed["__metadata__"] = data.draw(st.none() | st.dictionaries(st.text(max_size=3), VALUES, max_size=2))
    if data.draw(st.booleans()):
        changed[data.draw(st.text(max_size=5))] = data.draw(VALUES | st.just(header[name]))
    text = json.dumps(changed).encode()
    write_weights(folder, text.ljust(-(-len(text) // 8) * 8), content)
    imported_or_refused(folder)


@QUICKLY
@given(place=st.integers(0, 10_000), new=st.binary(max_size=12), cut=st.integers(0, 3), length=st.integers(-1, 2**64))
def test_any_bytes_in_place_of_a_header_are_refused_by_name_or_imported(
    safetensors_folder: tuple[Path, dict[str, Any], bytes], place: int, new: bytes, cut: int, length: int
) -> None:
    folder, header, content = safetensors_folder
    text = json.dumps(header).encode()
    place %= len(text)
    mutated = text[:place] + new + text[place + len(new) + cut :]
    write_weights(folder, mutated, content, length=length if place % 3 == 0 else None)
    imported_or_refused(folder)


def test_headers_that_would_take_memory_or_recursion_are_refused(
    safetensors_folder: tuple[Path, dict[str, Any], bytes],
) -> None:
    folder, header, content = safetensors_folder
    for odd in (b"[" * 1_000_000, b'{"a":' * 100_000, b"", b"{}", b"null", b"\xff" * 64):
        write_weights(folder, odd, content)
        refused(folder, CheckpointError, r"model\.safetensors is not a whole safetensors file|it lacks model\.")
    write_weights(folder, b"{}", content, length=2**63)
    refused(folder, CheckpointDamaged, r"model\.safetensors is not a whole safetensors file")
    for size in (0, 7):
        (folder / "model.safetensors").write_bytes(b"\0" * size)
        refused(folder, CheckpointDamaged, r"model\.safetensors is not a whole safetensors file")
    name = "model.norm.weight"
    text = json.dumps(header | {name: header[name] | {"shape": [2**33, 2**33]}}).encode()
    write_weights(folder, text, content)
    refused(folder, CheckpointDamaged, r"model\.safetensors is not a whole safetensors file")

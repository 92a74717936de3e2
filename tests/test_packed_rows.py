"""Rows of several documents: each is computed as if it were alone, in the model and in every layout of both engines."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from first_weights import initialise
from hypothesis import given, settings
from hypothesis import strategies as st
from test_models import MODELS, random_decoder, section
from test_native_engine import LLAMA3, PLENTY, ROWS, SEQ_LEN, STEPS, VOCAB, WORKER, Run, config, run, samples
from test_nxd import LIBRARIES, nxd_config, start_worker
from test_nxd import PIPELINES as NXD_PIPELINES
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raynium.config.schema import Config
from raynium.data.batch import IGNORED_LABEL, Batch
from raynium.engines.optim import decays, learning_rate
from raynium.models import attention
from raynium.models.attention import block_mask, dense_mask, places, positions_in_documents
from raynium.models.decoder import Decoder


def numbered(lengths: list[int]) -> Tensor:
    """documents_BT of one row that holds documents of these lengths."""
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]


def tokens_like(documents_BT: Tensor, *, seed: int = 9) -> Tensor:
    return torch.randint(0, 97, documents_BT.shape, generator=torch.Generator().manual_seed(seed))


# ---- The model -------------------------------------------------------------------------------------------------------


def test_positions_begin_anew_with_each_document() -> None:
    rows = torch.cat([numbered([3, 1, 4]), numbered([8]), numbered([1, 6, 1])])
    assert positions_in_documents(rows).tolist() == [
        [0, 1, 2, 0, 0, 1, 2, 3],
        [0, 1, 2, 3, 4, 5, 6, 7],
        [0, 0, 1, 2, 3, 4, 5, 0],
    ]


def test_a_token_looks_at_itself_and_back_in_its_document_only() -> None:
    mask = dense_mask(numbered([2, 3]), torch.float32)
    assert mask.dtype == torch.float32 and mask.shape == (1, 1, 5, 5)
    assert (mask[0, 0] == 0).int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 16), min_size=1, max_size=6), st.sampled_from(list(MODELS)))
def test_a_packed_row_has_each_documents_losses_and_the_sum_of_their_gradients(lengths: list[int], name: str) -> None:
    for dtype, close in ((torch.float64, 1e-13), (torch.float32, 1e-6)):
        model = random_decoder(section(name)).to(dtype)
        documents = numbered(lengths)
        tokens, labels = tokens_like(documents), tokens_like(documents, seed=5)

        packed = F.cross_entropy(model(tokens, documents)[0], labels[0], reduction="none")
        packed.sum().backward()
        of_packed = [parameter.grad for parameter in model.parameters()]
        model.zero_grad()
        alone = []
        for row, wanted in zip(tokens[0].split(lengths), labels[0].split(lengths), strict=True):
            alone.append(F.cross_entropy(model(row[None])[0], wanted, reduction="none"))
            alone[-1].sum().backward()

        assert (packed - torch.cat(alone)).abs().max() <= close * packed.abs().max()
        # Beside the whole gradient: in documents of one token queries and keys have none but rounding.
        whole = torch.nn.utils.get_total_norm([each.grad for each in model.parameters() if each.grad is not None])
        for found, parameter in zip(of_packed, model.parameters(), strict=True):
            assert found is not None and parameter.grad is not None
            assert (found - parameter.grad).norm() <= close * whole


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_changing_a_document_changes_no_bit_of_the_others(name: str, dtype: torch.dtype) -> None:
    """Neither before nor behind it, as with attention that forgets the mask (axolotl#3796)."""
    model, documents = random_decoder(section(name)).to(dtype), numbered([9, 14, 7])
    tokens = tokens_like(documents)
    changed = torch.where(documents == 1, tokens_like(documents, seed=1), tokens)
    same = (model(tokens, documents) == model(changed, documents)).all(-1)
    assert torch.equal(same[documents != 1], torch.ones(16, dtype=torch.bool))
    assert not same[documents == 1].all()


@torch.no_grad()
def test_a_mask_without_new_positions_or_new_positions_without_a_mask_would_show() -> None:
    """The second is nanoVLM#204. Rotary positions are relative, so whole documents shifted alike may look the same."""
    model, documents = random_decoder(section("llama")), numbered([9, 14, 7])
    tokens = tokens_like(documents)
    right = places(model.config, tokens, documents, dtype=torch.float32)
    causal = places(model.config, tokens, None, dtype=torch.float32)

    def logits(where: attention.Places) -> Tensor:
        hidden = model.embedding(tokens)
        for block in model.blocks:
            hidden = block(hidden, places=where)
        return model.head(model.final_norm(hidden))

    assert torch.equal(logits(right), model(tokens, documents))
    assert (logits(right._replace(mask=None)) - logits(right)).abs().max() > 0.1
    # Only in the rounding of larger angles.
    shifted = logits(right._replace(cos=causal.cos, sin=causal.sin))
    assert (shifted - logits(right)).abs().max() < 1e-4


@torch.no_grad()
def test_a_row_of_one_document_is_the_causal_row() -> None:
    model = random_decoder(section("qwen3, grouped queries"))
    documents = torch.zeros(2, 50, dtype=torch.int64)
    tokens = tokens_like(documents)
    torch.testing.assert_close(model(tokens, documents), model(tokens), rtol=1e-5, atol=1e-5)


def test_parts_of_a_batch_keep_their_documents() -> None:
    documents = torch.cat([numbered([3, 5]), numbered([8]), numbered([1, 7]), numbered([4, 4])])
    batch = Batch(tokens_like(documents), tokens_like(documents), {"weights": torch.arange(4)}, documents)
    assert [*batch.columns()] == ["tokens", "labels", "documents", "weights"]
    first, second = batch.to(torch.device("cpu")).split(2)
    assert first.documents_BT is not None and second.documents_BT is not None
    assert torch.equal(torch.cat((first.documents_BT, second.documents_BT)), documents)
    assert second.others["weights"].tolist() == [2, 3]
    (plain,) = Batch(batch.tokens_BT, batch.labels_BT).split(4)
    assert plain.documents_BT is None and [*plain.columns()] == ["tokens", "labels"]


# ---- CUDA's attention, as far as a CPU shows -------------------------------------------------------------------------


@given(
    lengths=st.lists(
        st.lists(st.one_of(st.integers(1, 40), st.sampled_from([127, 128, 129, 256, 384])), max_size=12),
        min_size=1,
        max_size=3,
    ),
    size=st.sampled_from([1, 127, 128, 129, 256, 600]),
)
@settings(max_examples=60, deadline=None)
def test_the_block_mask_is_the_one_that_all_pairs_of_tokens_give(lengths: list[list[int]], size: int) -> None:
    documents = torch.cat([numbered([*row, size])[:, :size] for row in lengths])

    def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (documents[row, query] == documents[row, key]) & (query >= key)

    mask = block_mask(documents)
    expected = create_block_mask(seen, len(documents), None, size, size, device="cpu")
    for ours, theirs in zip(mask.as_tuple(), expected.as_tuple(), strict=True):
        if isinstance(theirs, Tensor):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
        else:
            assert callable(theirs) or ours == theirs
    rows, queries, keys = torch.meshgrid(torch.arange(len(documents)), *2 * [torch.arange(size)], indexing="ij")
    assert torch.equal(
        mask.mask_mod(rows, torch.tensor(0), queries, keys), dense_mask(documents, torch.float32)[:, 0] == 0
    )


def test_a_block_mask_of_a_long_row_is_made_without_its_pairs_of_tokens() -> None:
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            made = func(*args, **(kwargs or {}))
            largest = max([largest, *(each.numel() for each in tree_leaves(made) if isinstance(each, Tensor))])
            return made

    with Watch():
        block_mask(numbered([5000] * 6 + [2768]))
    assert largest == 256 * 257


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("how", ["alone", "in a compiled block"])
@torch.no_grad()
def test_flex_attention_gives_the_dense_masks_logits(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward only: it has no backward pass on the CPU (torch 2.13). What is chosen on CUDA is not seen here."""
    model, documents = random_decoder(section("llama, grouped queries, tied")), numbered([9, 14, 60, 7])
    documents = torch.cat([documents, numbered([90])])
    tokens = tokens_like(documents)
    expected = model(tokens, documents)
    monkeypatch.setattr(attention, "dense_mask", lambda documents_BT, dtype: block_mask(documents_BT))
    if how == "in a compiled block":
        for block in model.blocks:
            block.compile(backend="aot_eager", dynamic=False, fullgraph=True)
    torch.testing.assert_close(model(tokens, documents), expected, rtol=1e-5, atol=1e-5)


# ---- Every layout ----------------------------------------------------------------------------------------------------

TAKEN = 5


def packed(made: Config) -> Config:
    return made.model_copy(update={"data": made.data.model_copy(update={"packing": "documents"})})


@cache
def packed_samples() -> dict[str, Tensor]:
    """The samples of `test_native_engine.py`, their rows cut into documents; some end in positions that only fill up.

    Its first rows have no label that counts (TRL#3942).
    """
    data = samples()
    generator = torch.Generator().manual_seed(3)
    begins = torch.rand(STEPS, ROWS, SEQ_LEN, generator=generator) < torch.linspace(0.0, 0.5, ROWS)[None, :, None]
    begins[..., 0] = False
    begins[:, 1::3, 12] = True
    begins[:, 1::3, 13:] = False
    data["documents"] = begins.long().cumsum(-1)
    data["labels"][:, 1::3, 12:] = IGNORED_LABEL
    return data


class Reference(NamedTuple):
    losses: list[float]
    norms: list[float]
    first_gradients: dict[str, Tensor]
    nats: float


@cache
def unpacked_reference(config: Config) -> Reference:
    """Every document alone through plain torch, in float64; nats: of step 5's rows after it, as an evaluation has."""
    model = Decoder(config.model)
    initialise(model, seed=config.run.seed, config=config.model)
    model.double()
    groups = [
        {"params": [p for p in model.parameters() if decays(tuple(p.shape))], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if not decays(tuple(p.shape))], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-6)
    data = packed_samples()

    def nats(step: int) -> Iterator[Tensor]:
        for row in range(ROWS):
            documents = data["documents"][step - 1, row]
            for number in range(int(documents[-1]) + 1):
                here = documents == number
                tokens, labels = (data[name][step - 1, row, here] for name in ("tokens", "labels"))
                yield F.cross_entropy(model(tokens[None])[0], labels, ignore_index=IGNORED_LABEL, reduction="sum")

    losses, norms, first, evaluated = [], [], {}, 0.0
    for step in range(1, TAKEN + 1):
        optimizer.zero_grad()
        loss = sum(nats(step)) / (data["labels"][step - 1] != IGNORED_LABEL).sum()
        assert isinstance(loss, Tensor)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm).item())
        first = first or {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optimizer, step=step, total_steps=STEPS)
        optimizer.step()
        losses.append(loss.item())
        if step == 5:
            evaluated = sum(each.item() for each in nats(step))
    return Reference(losses, norms, first, evaluated)


@contextmanager
def engine_worker() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(WORKER)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as it:
        yield it


NATIVE: dict[str, tuple[dict[str, Any], int]] = {
    "one rank": ({"ranks": 1}, PLENTY),
    "fsdp 2": ({"ranks": 2}, PLENTY),
    "fsdp 3, a group per block": ({"ranks": 3}, 0),
    "tp 2": ({"ranks": 2, "tensor": 2}, PLENTY),
    "fsdp 2 x tp 2, untied": ({"ranks": 4, "tensor": 2, "model": LLAMA3}, PLENTY),
    "fsdp 2, blocks made again": ({"ranks": 2, "activation_checkpointing": "full"}, PLENTY),
}

COMPILED: dict[str, dict[str, Any]] = {
    "fsdp 2, blocks made again": {"ranks": 2, "compile": "block", "activation_checkpointing": "full"},
    "simple fsdp 2 x tp 2": {"ranks": 4, "tensor": 2, "compile": "block", "fsdp": "simple"},
}


@pytest.fixture(scope="module")
def forker() -> Iterator[subprocess.Popen[str]]:
    with engine_worker() as worker:
        yield worker


@pytest.mark.parametrize("layout", NATIVE)
def test_the_native_engine_trains_on_packed_rows_as_on_each_document_alone(
    layout: str, forker: subprocess.Popen[str], tmp_path: Path
) -> None:
    arguments, memory = NATIVE[layout]
    check_packed(forker, tmp_path, packed(config(**arguments)), memory_bytes=memory)


@pytest.mark.slow
@pytest.mark.parametrize("layout", COMPILED)
def test_compiled_blocks_train_on_packed_rows_as_on_each_document_alone(
    layout: str, forker: subprocess.Popen[str], tmp_path: Path
) -> None:
    """SimpleFSDP's are whole graphs: a mask that broke one would be an error."""
    check_packed(forker, tmp_path, packed(config(**COMPILED[layout])))


NXD: dict[str, dict[str, Any]] = {
    "dp 2": {"ranks": 2},
    "tp 2": {"ranks": 2, "tensor": 2},
    "tp 2 x dp 2, checkpointed": {"ranks": 4, "tensor": 2, "model": LLAMA3, "activation_checkpointing": "full"},
    **{name: arguments for name, (arguments, platform) in NXD_PIPELINES.items()},
}


@pytest.fixture(scope="module", params=LIBRARIES)
def nxd_forker(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    with start_worker(request.param, "trn1") as worker:
        yield worker


@pytest.mark.slow
@pytest.mark.parametrize("layout", NXD)
def test_the_nxd_engine_trains_on_packed_rows_as_on_each_document_alone(
    layout: str, nxd_forker: subprocess.Popen[str], tmp_path: Path
) -> None:
    check_packed(nxd_forker, tmp_path, packed(nxd_config(**NXD[layout])))


@pytest.mark.slow
def test_fine_tuning_under_the_nxd_engine_is_that_of_each_document_alone(
    nxd_forker: subprocess.Popen[str], tmp_path: Path
) -> None:
    check_packed(nxd_forker, tmp_path, packed(nxd_config(**NXD["tp 2"])), task="sft")


def check_packed(forker: subprocess.Popen[str], folder: Path, made: Config, **arguments: Any) -> None:
    """Losses, norms and gradients are those of the documents alone; one document's tokens reach no other's loss."""
    # One reference for all layouts of a model.
    expected = unpacked_reference(config(model=dict(made.model)))
    ran = run(forker, folder / "packed", made, last_step=TAKEN, data=packed_samples(), first_state=True, **arguments)
    for results, evaluations in zip(ran.results, ran.evaluations, strict=True):
        assert [result["loss"] for result in results] == pytest.approx(expected.losses, rel=3e-6)
        assert [result["grad_norm"] for result in results] == pytest.approx(expected.norms, rel=1e-4)
        assert evaluations[0]["nats"] == pytest.approx(expected.nats, rel=3e-6)
    check_first_gradients(ran._replace(states=ran.first_states), expected)

    judged = {name: column.clone() for name, column in packed_samples().items()}
    judged["labels"][judged["documents"] == 1] = IGNORED_LABEL
    other = judged | {"tokens": torch.where(judged["documents"] == 1, (judged["tokens"] + 7) % VOCAB, judged["tokens"])}
    ends = [
        run(forker, folder / name, made, last_step=2, data=data, **arguments)
        for name, data in (("judged", judged), ("other", other))
    ]
    assert ends[0].losses == ends[1].losses and ends[0].losses[0] > 1
    states = [each.whole_state() for each in ends]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def check_first_gradients(ran: Run, expected: Reference) -> None:
    state = ran.whole_state()
    for name, gradient in expected.first_gradients.items():
        found = state[f"optimizer/exp_avg/{name}"] / (1 - 0.9)
        assert (found - gradient).norm() <= 1e-6 * gradient.norm(), name

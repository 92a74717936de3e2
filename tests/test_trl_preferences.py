"""DPO and ORPO beside TRL's own trainers, on the batches that these made: gradients, losses, rewards, references."""

import random
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import pytest
import torch
from peer_models import gradients_of_the_first_step, trainer_arguments
from torch import Tensor

from raynium.accelerators.cpu import CpuAccelerator
from raynium.config.schema import Config
from raynium.config.world import World
from raynium.data.batch import IGNORED_LABEL, Batch
from raynium.data.tokenizer import Tokenizer
from raynium.engines.base import StepResult, Votes
from raynium.engines.native import NativeEngine, build_native_engine
from raynium.models.names import hugging_face_names
from raynium.tasks.base import Task
from raynium.tasks.preferences import Dpo, Orpo

# TRL warns of what it will take out, and torch of what TRL does.
pytestmark = pytest.mark.filterwarnings("ignore")

STEPS, PAIRS, SEQ_LEN = 20, 4, 64
MOMENTUM, CLIP = 0.9, 1.0
END = "<|endoftext|>"


def config(*, micro_batches: int = 1) -> Config:
    return Config.model_validate(
        {
            "run": {"name": "test"},
            "model": {
                **{"family": "llama3", "vocab_size": 300, "hidden_size": 64, "num_layers": 2, "num_heads": 4},
                **{"num_kv_heads": 2, "head_dim": 16, "ffn_size": 96, "max_seq_len": SEQ_LEN},
            },
            "data": {"path": "/nowhere", "seq_len": SEQ_LEN},
            "optimizer": {
                **{"learning_rate": 1e-3, "betas": (MOMENTUM, 0.95), "eps": 1e-6, "weight_decay": 0.1},
                **{"clip_norm": CLIP, "schedule": "constant"},
            },
            "train": {
                "steps": STEPS,
                "global_batch_size": 2 * PAIRS,
                "micro_batch_size": 2 * PAIRS // micro_batches,
            },
        }
    )


class TheirStep(NamedTuple):
    inputs: dict[str, Tensor]
    loss: float
    logged: dict[str, float]


class TheirRun(NamedTuple):
    """weights: before the first step. gradients: of the first step, clipped. Both by Hugging Face's names."""

    weights: dict[str, Tensor]
    gradients: dict[str, Tensor]
    steps: list[TheirStep]


def records() -> list[dict[str, str]]:
    """Sums, right and wrong, with more or fewer words around them."""
    rng = random.Random(5)
    made = []
    for _ in range(STEPS * PAIRS):
        a, b = rng.randrange(50), rng.randrange(50)
        wrong = a + b + rng.choice((-10, -1, 1, 10))
        long = f"{a} and {b} are {wrong}, I think" if rng.random() < 0.5 else str(wrong)
        made.append({"prompt": f"{a} + {b} =", "chosen": f" {a + b}.", "rejected": f" {long}."})
    return made


@pytest.fixture(scope="module")
def their_run(
    trl: Any, transformers: Any, transformers_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Any]:
    """their_run("dpo" or "orpo", **settings) -> TheirRun, of TRL's trainer with our optimizer's settings."""

    @cache
    def train(task: str, **settings: Any) -> TheirRun:
        made, tmp_path = config(), tmp_path_factory.mktemp(task)
        torch.manual_seed(0)
        model = transformers_model(made.model)
        # Larger than first weights, so that answers differ in their log-probabilities.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3.0 if parameter.ndim > 1 else 1.0)
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        tokenizer = Tokenizer.train([f"{r['prompt']}{r['chosen']}{r['rejected']}" for r in records()], vocab_size=300)
        (tmp_path / "tokenizer.json").write_text(tokenizer.file_text)
        theirs = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token=END, pad_token=END
        )
        gradients, look = gradients_of_the_first_step(transformers, model)
        datasets = import_module("datasets")
        orpo = import_module("trl.experimental.orpo") if task == "orpo" else None
        configs, trainers = (orpo.ORPOConfig, orpo.ORPOTrainer) if orpo is not None else (trl.DPOConfig, trl.DPOTrainer)
        trainer = trainers(
            model=model,
            args=configs(
                output_dir=str(tmp_path / "out"),
                per_device_train_batch_size=PAIRS,
                max_length=SEQ_LEN,
                activation_checkpointing=False,
                logging_steps=1,
                **trainer_arguments(made),
                **settings,
            ),
            train_dataset=datasets.Dataset.from_list(records()),
            processing_class=theirs,
            callbacks=[look],
        )
        seen: list[tuple[dict[str, Tensor], float]] = []
        compute = trainer.compute_loss

        def compute_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = compute(model, inputs, *args, **kwargs)
            tensors = {name: value.clone() for name, value in inputs.items() if isinstance(value, Tensor)}
            seen.append((tensors, loss.item()))
            return loss

        trainer.compute_loss = compute_loss
        trainer.train()
        logs = [log for log in trainer.state.log_history if "loss" in log]
        steps = [TheirStep(inputs, loss, log) for (inputs, loss), log in zip(seen, logs, strict=True)]
        return TheirRun(weights, gradients, steps)

    return train


# ---- Ours, on their batches ------------------------------------------------------------------------------------------


def alternating(chosen: Tensor, rejected: Tensor, *, fill: int) -> Tensor:
    """[B, SEQ_LEN + 1]: theirs are all chosen rows, then all rejected ones, and shorter."""
    whole = torch.full((2 * len(chosen), SEQ_LEN + 1), fill)
    whole[::2, : chosen.shape[1]], whole[1::2, : rejected.shape[1]] = chosen, rejected
    return whole


def dpo_batch(inputs: Mapping[str, Tensor]) -> Batch:
    """Without its reference."""
    ids = alternating(*inputs["input_ids"].chunk(2), fill=0)
    answer = alternating(*inputs["completion_mask"].chunk(2), fill=0)
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].where(answer[:, 1:] == 1, IGNORED_LABEL))


def orpo_batch(inputs: Mapping[str, Tensor]) -> Batch:
    ids = alternating(inputs["chosen_input_ids"], inputs["rejected_input_ids"], fill=0)
    labels = alternating(inputs["chosen_labels"], inputs["rejected_labels"], fill=IGNORED_LABEL)
    present = alternating(inputs["chosen_attention_mask"], inputs["rejected_attention_mask"], fill=0)
    learned = labels.clone()
    learned[::2] = ids[::2].where(present[::2] == 1, IGNORED_LABEL)
    nats_weight = torch.zeros(len(ids))
    nats_weight[::2] = PAIRS / (learned[::2, 1:] != IGNORED_LABEL).sum()
    answer = (labels[:, 1:] != IGNORED_LABEL).float()
    return Batch(ids[:, :-1].contiguous(), learned[:, 1:], {"answer": answer, "nats_weight": nats_weight})


def engine_of(task: Task, theirs: TheirRun, *, micro_batches: int) -> NativeEngine:
    made = config(micro_batches=micro_batches)
    engine = build_native_engine(made, World.of(made), CpuAccelerator(), task)
    ours = {f"model/{ours}": theirs for ours, theirs in hugging_face_names(made.model).items()}
    for chunk in engine.state():
        if chunk.name.startswith("model/"):
            chunk.tensor.copy_(theirs.weights[ours[chunk.name]])
    return engine


def check_gradients(engine: NativeEngine, theirs: TheirRun) -> None:
    """After step 1 AdamW's first moment is the gradient times what it takes of one."""
    ours = {f"optimizer/exp_avg/{ours}": theirs for ours, theirs in hugging_face_names(config().model).items()}
    checked = 0
    for chunk in engine.state():
        if chunk.name in ours:
            expected = theirs.gradients[ours[chunk.name]] * (1 - MOMENTUM)
            assert (chunk.tensor - expected).norm() < 1e-5 * expected.norm(), chunk.name
            checked += 1
    assert checked == len(theirs.gradients)


def check_run(task: Task, theirs: TheirRun, batches: list[Batch], *, micro_batches: int) -> None:
    engine = engine_of(task, theirs, micro_batches=micro_batches)
    results: list[StepResult] = []
    for step, batch in enumerate(batches, start=1):
        results.append(engine.step(batch, step=step, votes=Votes()))
        if step == 1:
            check_gradients(engine, theirs)
    assert [result.loss for result in results] == pytest.approx([step.loss for step in theirs.steps], rel=1e-4)
    assert results[0].loss == pytest.approx(theirs.steps[0].loss, rel=1e-6)
    assert min(result.loss for result in results) < 0.9 * results[0].loss, (
        "nothing was learned, so the losses show little"
    )
    for result, step in zip(results, theirs.steps, strict=True):
        for name, value in task.training(result.sums).items():
            assert value == pytest.approx(step.logged[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_dpo_trains_as_trl_does_from_references_that_our_own_pass_computes(
    their_run: Callable[..., TheirRun], micro_batches: int
) -> None:
    theirs = their_run("dpo", beta=0.3, precompute_ref_log_probs=True)
    task = Dpo(beta=0.3)
    before = engine_of(task, theirs, micro_batches=micro_batches)
    batches = []
    for step in theirs.steps:
        batch = dpo_batch(step.inputs)
        reference_B = before.row_log_probs(batch)
        expected_B = torch.stack((step.inputs["ref_chosen_logps"], step.inputs["ref_rejected_logps"]), 1).flatten()
        torch.testing.assert_close(reference_B, expected_B, rtol=1e-5, atol=0)
        batches.append(Batch(batch.tokens_BT, batch.labels_BT, {"reference": reference_B}))
    check_run(task, theirs, batches, micro_batches=micro_batches)


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_orpo_trains_as_trl_does(their_run: Callable[..., TheirRun], micro_batches: int) -> None:
    theirs = their_run("orpo", beta=0.25)
    batches = [orpo_batch(step.inputs) for step in theirs.steps]
    check_run(Orpo(weight=0.25), theirs, batches, micro_batches=micro_batches)

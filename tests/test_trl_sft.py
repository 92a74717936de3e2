"""SFT beside TRL's own trainer, on the chats that it made batches of: tokens, labels, gradients, losses."""

import json
import random
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peer_models import gradients_of_the_first_step, trainer_arguments
from test_trl_preferences import STEPS, TheirRun, TheirStep, check_run, config
from torch import Tensor

from raynium.data.batch import IGNORED_LABEL, Batch
from raynium.data.build.recorded import learnable
from raynium.data.records.chats import Chats
from raynium.data.records.flags import is_label, token_ids
from raynium.data.records.template import CHATML, CHATML_TOKENS, ChatTemplate
from raynium.data.text.documents import Document, Split
from raynium.data.tokenizer import Tokenizer
from raynium.tasks.sft import Sft

# TRL warns of what it will take out, and torch of what TRL does.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.parity]

CHATS, SEQ_LEN = 8, 64
END = "<|endoftext|>"


def records() -> list[dict[str, Any]]:
    rng = random.Random(5)
    made = []
    for _ in range(STEPS * CHATS):
        messages = []
        for _ in range(rng.randrange(1, 3)):
            a, b = rng.randrange(50), rng.randrange(50)
            messages += [
                {"role": "user", "content": f"{a} + {b}?"},
                {"role": "assistant", "content": f"{a + b}" if rng.random() < 0.5 else f"it is {a + b}"},
            ]
        made.append({"messages": messages})
    return made


def test_sft_trains_as_trl_does_on_the_tokens_and_labels_that_our_records_have(
    trl: Any, transformers: Any, transformers_model: Callable[..., Any], tmp_path: Path
) -> None:

    made = config()
    template = ChatTemplate({"default": CHATML}, {})
    texts = [template.render(record["messages"]) for record in records()]
    tokenizer = Tokenizer.train(texts, vocab_size=300, special_tokens=CHATML_TOKENS)
    torch.manual_seed(0)
    model = transformers_model(made.model)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    (tmp_path / "tokenizer.json").write_text(tokenizer.file_text)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token=END, pad_token=END
    )
    theirs.chat_template = CHATML
    gradients, look = gradients_of_the_first_step(transformers, model)
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(tmp_path / "out"),
            per_device_train_batch_size=CHATS,
            max_length=SEQ_LEN,
            assistant_only_loss=True,
            gradient_checkpointing=False,
            logging_steps=1,
            **trainer_arguments(made),
        ),
        train_dataset=import_module("datasets").Dataset.from_list(records()),
        processing_class=theirs,
        callbacks=[look],
    )
    seen: list[tuple[dict[str, Tensor], float]] = []
    compute = trainer.compute_loss

    def compute_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = {name: value.clone() for name, value in inputs.items() if isinstance(value, Tensor)}
        loss = compute(model, inputs, *args, **kwargs)
        seen.append((tensors, loss.item()))
        return loss

    trainer.compute_loss = compute_loss
    trainer.train()

    # What our records make of the same chats: each of their rows is one of them.
    documents = [Document(f"chats.jsonl:{n}", json.dumps(record)) for n, record in enumerate(records())]
    ours = {
        tuple(token_ids(each.stored).tolist()): is_label(each.stored)
        for each in learnable(Chats(template), documents, Split((), (), None), tokenizer, np.dtype("<u2"))
    }
    batches = []
    for inputs, _ in seen:
        ids = torch.full((CHATS, SEQ_LEN + 1), 0)
        labels = torch.full((CHATS, SEQ_LEN + 1), IGNORED_LABEL)
        width = inputs["input_ids"].shape[1]
        ids[:, :width], labels[:, :width] = inputs["input_ids"], inputs["labels"]
        for row, row_labels, present in zip(
            inputs["input_ids"], inputs["labels"], inputs["attention_mask"], strict=True
        ):
            chat, of_chat = row[present == 1], row_labels[present == 1]
            assert ((of_chat != IGNORED_LABEL).numpy() == ours[tuple(chat.tolist())]).all()
        batches.append(Batch(ids[:, :-1].contiguous(), labels[:, 1:].contiguous()))
    steps = [TheirStep(inputs, loss, {}) for inputs, loss in seen]
    check_run(Sft(), TheirRun(weights, gradients, steps), batches, micro_batches=1)

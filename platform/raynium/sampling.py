"""Text from a checkpoint: reads the model's weights and continues a prompt. One process, on the CPU; imports torch."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from raynium.checkpoint.catalog import choose_checkpoint
from raynium.checkpoint.load import read_tensors
from raynium.checkpoint.state import MODEL_PREFIX
from raynium.convert.config_json import saved_model
from raynium.convert.description import RunText
from raynium.data.tokenizer import Tokenizer
from raynium.models.decoder import Decoder
from raynium.storage.store import Store

# Parameters.
SMALL_MODEL = 20_000_000


@dataclass(frozen=True)
class Sampler:
    """A model with its tokenizer, ready to continue prompts."""

    model: Decoder
    texts: RunText
    # Of the checkpoint.
    step: int

    @torch.no_grad()
    def tokens(self, prompt: str, *, max_new_tokens: int, temperature: float, seed: int) -> Iterator[int]:
        """Token ids one by one, until the end of the document. temperature 0: the likeliest token each time.

        The whole context runs through the model for each token: right for looking at a model, slow for serving one.
        """
        generator = torch.Generator().manual_seed(seed)
        ends = self.texts.ends
        context = self.texts.prompt(prompt)
        for _ in range(max_new_tokens):
            window_BT = torch.tensor([context[-self.model.config.max_seq_len :]])
            logits_V = self.model(window_BT)[0, -1].float()
            logits_V[self.texts.silent] = -torch.inf
            if temperature == 0:
                token = int(logits_V.argmax())
            else:
                token = int(torch.multinomial(torch.softmax(logits_V / temperature, -1), 1, generator=generator))
            if token in ends:
                return
            context.append(token)
            yield token

    def text(self, prompt: str, *, max_new_tokens: int = 120, temperature: float = 0.8, seed: int = 0) -> str:
        """The prompt and its continuation."""
        given = self.texts.prompt(prompt)[1:]
        with _threads_for(self.model):
            tokens = list(self.tokens(prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed))
        # Decoded after what was given: alone, a first token may lose the space that it begins with.
        return prompt + self.tokenizer.decode([*given, *tokens])[len(self.tokenizer.decode(given)) :]

    @property
    def tokenizer(self) -> Tokenizer:
        """The run's own."""
        return self.texts.tokenizer


@contextmanager
def _threads_for(model: Decoder) -> Iterator[None]:
    """One thread for a small model: its products are too short to share, and threads that meet wait for busy cores.

    Quickstart's 120 tokens on two cores with other work: 1.4 s with one thread, 10 to 18 s with two.
    """
    threads = torch.get_num_threads()
    if sum(weight.numel() for weight in model.parameters()) < SMALL_MODEL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def open_sampler(run_url: str, step: int | None = None) -> Sampler:
    """The model of a run's newest checkpoint, or of `step`. Raises CheckpointError if there is none."""
    store = Store(run_url)
    reference = choose_checkpoint(store, step)
    config = saved_model(reference)
    weights = {
        name.removeprefix(MODEL_PREFIX): tensor for name, tensor in read_tensors(reference, prefix=MODEL_PREFIX).items()
    }
    # Tied weights are stored once.
    if config.embeddings == "tied":
        weights["head.weight"] = weights["embedding.weight"]
    with torch.device("meta"):
        model = Decoder(config)
    model.load_state_dict(weights, assign=True)
    return Sampler(model.eval(), RunText.of_run(store, config), reference.step)

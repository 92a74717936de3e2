"""Text from a checkpoint: reads the model's weights and continues prompts. One process, on the CPU; imports torch."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from raynium.checkpoint.catalog import choose_checkpoint
from raynium.convert.config_json import saved_model
from raynium.convert.description import RunText
from raynium.convert.merged import merged_weights
from raynium.data.tokenizer import Tokenizer
from raynium.generation.continuation import Continuation
from raynium.generation.drawing import Drawing
from raynium.generation.text_stream import TextStream
from raynium.models.decoder import Decoder
from raynium.storage.store import Store

# Parameters.
SMALL_MODEL = 20_000_000
# Why a text ended: a token that ends texts or `Drawing.stop`; or it has `max_new_tokens`.
Ended = Literal["stop", "length"]


class Piece(NamedTuple):
    """What one more token, or the end, gave the text of a row. text: "" while a character is not whole."""

    row: int
    token: int | None
    text: str
    ended: Ended | None


class Answer(NamedTuple):
    """text: the continuation alone. tokens: of it, without the one that ended it."""

    prompt: str
    text: str
    tokens: tuple[int, ...]
    ended: Ended


@dataclass(frozen=True)
class Sampler:
    """A model with its tokenizer, ready to continue prompts."""

    model: Decoder
    texts: RunText
    # Of the checkpoint.
    step: int

    @property
    def tokenizer(self) -> Tokenizer:
        """The run's own."""
        return self.texts.tokenizer

    def answers(self, prompts: Sequence[str], drawing: Drawing) -> list[Answer]:
        """The continuations of several prompts, of any lengths, computed together; each as it would be alone, with the
        seed of its place. ConfigError for a prompt that is no text.
        """
        if not prompts:
            return []
        tokens: list[list[int]] = [[] for _ in prompts]
        said: list[list[str]] = [[] for _ in prompts]
        ended: dict[int, Ended] = {}
        for piece in self.pieces(self.begin([self.texts.prompt(prompt) for prompt in prompts], drawing)):
            said[piece.row].append(piece.text)
            if piece.token is not None:
                tokens[piece.row].append(piece.token)
            if piece.ended is not None:
                ended[piece.row] = piece.ended
        return [
            Answer(prompt, "".join(said[row]), tuple(tokens[row]), ended[row]) for row, prompt in enumerate(prompts)
        ]

    def text(self, prompt: str, drawing: Drawing) -> str:
        """The prompt and its continuation."""
        return prompt + self.answers([prompt], drawing)[0].text

    def stream(self, prompt: str, drawing: Drawing) -> Iterator[str]:
        """The continuation of one prompt in pieces, as they come."""
        pieces = self.pieces(self.begin([self.texts.prompt(prompt)], drawing))
        return (piece.text for piece in pieces if piece.text)

    def begin(
        self, contexts: Sequence[Sequence[int]], drawing: Drawing, *, earlier: Continuation | None = None
    ) -> Continuation:
        """Rows of tokens for `pieces`, one at least. earlier: see `Continuation`."""
        return Continuation(self.model, contexts, silent=self.texts.silent, drawing=drawing, earlier=earlier)

    def pieces(self, continuation: Continuation) -> Generator[Piece]:
        """The continuations of its rows. Each ends with one piece that says why."""
        drawing, contexts = continuation.drawing, continuation.contexts
        ends = {*self.texts.ends, *(stop for stop in drawing.stops if isinstance(stop, int))}
        stops = [stop for stop in drawing.stops if isinstance(stop, str)]
        # Decoded after what was given: alone, a first token may lose the space that it begins with.
        streams = [TextStream(self.tokenizer.decode, given=context[1:], stops=stops) for context in contexts]
        rows = list(range(len(contexts)))
        threads = threads_for(self.model)
        for number in range(1, drawing.max_new_tokens + 1):
            with on_threads(threads):
                drawn = continuation.draw()
            going = []
            for row, token in zip(rows, drawn, strict=True):
                stream = streams[row]
                if token in ends:
                    yield Piece(row, None, stream.rest(), "stop")
                    continue
                text = stream.add(token)
                if stream.stopped:
                    yield Piece(row, None, text, "stop")
                elif number == drawing.max_new_tokens:
                    yield Piece(row, token, text + stream.rest(), "length")
                else:
                    yield Piece(row, token, text, None)
                    going.append(row)
            if not going:
                return
            if len(going) < len(rows):
                continuation.keep_rows([rows.index(row) for row in going])
                rows = going


def threads_for(model: Decoder) -> int:
    """One thread for a small model: its products are too short to share, and threads that meet wait for busy cores.

    Quickstart's 120 tokens on two cores with other work, without a cache: 1.4 s with one thread, 10 to 18 s with two.
    """
    small = sum(weight.numel() for weight in model.parameters()) < SMALL_MODEL
    return 1 if small else torch.get_num_threads()


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    given = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(given)


def open_sampler(run_url: str, step: int | None = None) -> Sampler:
    """The model of a run's newest checkpoint, or of `step`. Raises CheckpointError if there is none."""
    store = Store(run_url)
    reference = choose_checkpoint(store, step)
    config = saved_model(reference)
    weights = merged_weights(reference)
    # Tied weights are stored once.
    if config.embeddings == "tied":
        weights["head.weight"] = weights["embedding.weight"]
    with torch.device("meta"):
        model = Decoder(config)
    model.load_state_dict(weights, assign=True)
    return Sampler(model.eval(), RunText.of_checkpoint(reference, config), reference.step)

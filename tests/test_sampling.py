"""Text from a real checkpoint, written through the checkpoint functions that a run uses."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import job_text

from raynium.config.load import parse_config
from raynium.config.schema import Config
from raynium.data.store import TOKENIZER_NAME
from raynium.data.tokenizer import Tokenizer
from raynium.errors import CheckpointError, ConfigError, StoreError
from raynium.models.decoder import Decoder
from raynium.sampling import open_sampler
from raynium.storage.store import Store

JOB = job_text({"model.vocab_size": 320, "model.max_seq_len": 16, "data.seq_len": 16})
PROMPT = "def main("


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["def main(arguments): return arguments\n" * 20], vocab_size=280)


def model_of(config: Config, seed: int = 0) -> Decoder:
    """Random weights, large enough that the likeliest token depends on the text before it."""
    torch.manual_seed(seed)
    model = Decoder(config.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    if config.model.embeddings == "tied":
        model.head.weight = model.embedding.weight
    return model.eval()


@pytest.mark.parametrize("embeddings", ["tied", "untied"])
def test_the_sampled_model_is_the_saved_one(save_run: Callable[..., Store], embeddings: str) -> None:
    config = parse_config(JOB, {"model.embeddings": embeddings})
    model = model_of(config)
    sampler = open_sampler(save_run(model, config).url)
    tokens_BT = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        assert torch.equal(sampler.model(tokens_BT), model(tokens_BT))
    assert sampler.step == 4


def test_greedy_text_is_the_likeliest_token_each_time_whatever_the_seed(
    save_run: Callable[..., Store], tokenizer: Tokenizer
) -> None:
    config = parse_config(JOB)
    model = model_of(config)
    sampler = open_sampler(save_run(model, config).url)
    # Written out: the end of a document before the text, then one token at a time, the last 16 as context.
    context = [tokenizer.end_of_document_id, *tokenizer.encode(PROMPT).tolist()]
    prompt_length = len(context)
    with torch.no_grad():
        while len(context) < prompt_length + 20:
            logits_V = model(torch.tensor([context[-16:]]))[0, -1, : tokenizer.vocab_size]
            context.append(int(logits_V.argmax()))
    expected = context[prompt_length:]
    assert tokenizer.end_of_document_id not in expected and len(set(expected)) > 3, "choose another seed for the model"
    for seed in (0, 1):
        found = list(sampler.tokens(PROMPT, max_new_tokens=20, temperature=0, seed=seed))
        assert found == expected
    text = sampler.text(PROMPT, max_new_tokens=20, temperature=0)
    assert text == PROMPT + tokenizer.decode(expected)


def test_a_seed_gives_its_text_again_and_another_seed_another(save_run: Callable[..., Store]) -> None:
    config = parse_config(JOB)
    sampler = open_sampler(save_run(model_of(config), config).url)
    texts = [sampler.text(PROMPT, max_new_tokens=30, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith(PROMPT) for text in texts)


def test_a_low_temperature_is_nearly_greedy_and_a_high_one_is_not(save_run: Callable[..., Store]) -> None:
    config = parse_config(JOB)
    sampler = open_sampler(save_run(model_of(config), config).url)

    def sampled(temperature: float) -> list[int]:
        return list(sampler.tokens(PROMPT, max_new_tokens=20, temperature=temperature, seed=3))

    assert sampled(1e-4) == sampled(0) != sampled(1e4)


def test_the_end_of_the_document_ends_the_text_and_is_no_part_of_it(
    save_run: Callable[..., Store], tokenizer: Tokenizer
) -> None:
    config = parse_config(JOB)
    model = model_of(config)
    with torch.no_grad():
        model.head.weight.zero_()  # all tokens are equally likely, and the first of them is the end
    assert tokenizer.end_of_document_id == 0
    sampler = open_sampler(save_run(model, config).url)
    assert sampler.text(PROMPT, max_new_tokens=20, temperature=0) == PROMPT


def test_the_model_never_sees_more_than_it_was_made_for(save_run: Callable[..., Store], tokenizer: Tokenizer) -> None:
    config = parse_config(JOB)
    sampler = open_sampler(save_run(model_of(config), config).url)
    windows: list[list[int]] = []
    sampler.model.register_forward_pre_hook(lambda model, inputs: windows.append(inputs[0][0].tolist()))
    prompt = "def main(arguments): return 12345678901234567890"
    prompt_tokens = tokenizer.encode(prompt).tolist()
    assert len(prompt_tokens) > 16
    new_tokens = list(sampler.tokens(prompt, max_new_tokens=5, temperature=0, seed=0))
    whole = prompt_tokens + new_tokens
    assert windows == [whole[: len(prompt_tokens) + i][-16:] for i in range(5)]


def test_ids_of_a_padded_vocabulary_are_never_drawn(save_run: Callable[..., Store], tokenizer: Tokenizer) -> None:
    config = parse_config(JOB)
    assert tokenizer.vocab_size < config.model.vocab_size
    sampler = open_sampler(save_run(model_of(config), config).url)
    drawn = list(sampler.tokens(PROMPT, max_new_tokens=100, temperature=1e4, seed=0))  # each with the same chance
    assert drawn and max(drawn) < tokenizer.vocab_size


def test_an_earlier_step_can_be_asked_for(save_run: Callable[..., Store]) -> None:
    config = parse_config(JOB)
    early, late = model_of(config, seed=1), model_of(config, seed=2)
    save_run(early, config, step=2)
    store = save_run(late, config, step=4)
    assert torch.equal(open_sampler(store.url, 2).model.head.weight, early.head.weight)
    assert torch.equal(open_sampler(store.url).model.head.weight, late.head.weight)
    with pytest.raises(CheckpointError, match="no checkpoint of step 3"):
        open_sampler(store.url, 3)


def test_a_prompt_that_is_no_text_is_refused(save_run: Callable[..., Store]) -> None:
    config = parse_config(JOB)
    sampler = open_sampler(save_run(model_of(config), config).url)
    with pytest.raises(ConfigError, match=r"^the prompt 'd\\udcff' holds bytes that are no UTF-8; check the locale"):
        sampler.text("d\udcff")


def test_a_run_without_a_checkpoint_or_tokenizer_says_so(save_run: Callable[..., Store], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing has no checkpoint\. Check its name, or wait for its first one"):
        open_sampler(str(tmp_path / "nothing"))
    config = parse_config(JOB)
    store = save_run(model_of(config), config)
    store.delete(TOKENIZER_NAME)
    with pytest.raises(StoreError, match=r"tokenizer\.json does not exist"):
        open_sampler(store.url)


def test_a_small_model_runs_on_one_thread_and_gives_the_others_back(
    save_run: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse_config(JOB)
    sampler = open_sampler(save_run(model_of(config), config).url)
    given = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seen: list[int] = []
        hook = sampler.model.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
        sampler.text("def ", max_new_tokens=2)
        monkeypatch.setattr("raynium.sampling.SMALL_MODEL", 0)
        sampler.text("def ", max_new_tokens=2)
        hook.remove()
        assert (seen, torch.get_num_threads()) == ([1, 1, 2, 2], 2)
    finally:
        torch.set_num_threads(given)

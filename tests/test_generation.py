"""Text from a real checkpoint, written through the checkpoint functions that a run uses."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from conversions import MODELS, config_of
from tiny import job_text

from raynium.config.load import parse_config
from raynium.config.schema import Config
from raynium.convert.import_folder import import_folder
from raynium.data.store import TOKENIZER_NAME
from raynium.data.tokenizer import Tokenizer
from raynium.errors import CheckpointDamaged, CheckpointError, ConfigError, StoreError
from raynium.generation.continuation import Continuation, window_start
from raynium.generation.drawing import Drawing, penalised, probabilities
from raynium.generation.sampler import open_sampler
from raynium.generation.text_stream import TextStream
from raynium.models.cache import Cache
from raynium.models.decoder import Decoder
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
    # Written out: the end of a document before the text, then one token at a time; of 16 tokens, whenever they are
    # passed, the later half is kept.
    context = [tokenizer.end_of_document_id, *tokenizer.encode(PROMPT).tolist()]
    prompt_length, start = len(context), 0
    with torch.no_grad():
        while len(context) < prompt_length + 40:
            start += 8 if len(context) - start > 16 else 0
            logits_V = model(torch.tensor([context[start:]]))[0, -1, : tokenizer.vocab_size]
            context.append(int(logits_V.argmax()))
    expected = tuple(context[prompt_length:])
    assert tokenizer.end_of_document_id not in expected and len(set(expected)) > 3, "choose another seed for the model"
    for seed in (0, 1):
        [answer] = sampler.answers([PROMPT], Drawing(40, temperature=0, seed=seed))
        assert (answer.tokens, answer.ended) == (expected, "length")
    assert sampler.text(PROMPT, Drawing(40, temperature=0)) == PROMPT + tokenizer.decode(expected)


@pytest.mark.parametrize("name", MODELS)
def test_a_row_is_continued_as_alone_whatever_stands_beside_it(name: str) -> None:
    model = model_of(config_of(name))
    torch.manual_seed(0)
    contexts = [torch.randint(0, 320, (length,)).tolist() for length in (1, 5, 20, 3)]

    def drawn(rows: list[int], drawing: Drawing) -> list[list[int]]:
        continuation = Continuation(model, [contexts[row] for row in rows], silent=[7], drawing=drawing)
        return [list(column) for column in zip(*(continuation.draw() for _ in range(80)), strict=True)]

    changes: dict[str, Any]
    for changes in ({"temperature": 0.0}, {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.3}):
        together = drawn([0, 1, 2, 3], Drawing(80, **changes))
        alone = [drawn([row], Drawing(80, seed=row, **changes))[0] for row in range(4)]
        assert together == alone and 7 not in {token for row in alone for token in row}
        assert len({tuple(row) for row in alone}) == 4


@pytest.mark.parametrize("name", MODELS)
def test_logits_from_a_cache_are_those_of_the_whole_text(name: str) -> None:
    """In one piece, in several, token by token, and with rows taken out."""
    config = config_of(name).model
    model = model_of(config_of(name))
    torch.manual_seed(1)
    tokens_BT = torch.randint(0, 320, (3, 24))
    pads = [0, 5, 2]
    with torch.inference_mode():
        whole = [model(tokens_BT[row : row + 1, pad:])[0] for row, pad in enumerate(pads)]
        for pieces in ([24], [9, 4, 11], [8, *[1] * 16]):
            cache, begin, rows = Cache(config, pads=pads, num_tokens=24, dtype=torch.float32), 0, [0, 1, 2]
            for number, piece in enumerate(pieces):
                logits_BV = model(tokens_BT[rows, begin : begin + piece], cache=cache)[:, -1]
                begin += piece
                for row, logits_V in zip(rows, logits_BV, strict=True):
                    torch.testing.assert_close(logits_V, whole[row][begin - pads[row] - 1], rtol=1e-4, atol=1e-4)
                if number == 1:
                    cache.keep_rows([2, 1])
                    rows = [2, 1]


@pytest.mark.parametrize("common", [0, 1, 7, 12, 20])
def test_what_a_row_and_an_earlier_one_begin_with_is_computed_once(common: int) -> None:
    model = model_of(config_of("llama"))
    drawing = Drawing(8, temperature=0)
    torch.manual_seed(0)
    first, second = (torch.randint(0, 320, (length,)).tolist() for length in (12, 16))
    earlier = Continuation(model, [first], silent=[], drawing=drawing)
    for _ in range(8):
        earlier.draw()
    context = [*earlier.contexts[0][:common], *second]
    seen: list[int] = []
    expected = Continuation(model, [context], silent=[], drawing=drawing)
    found = Continuation(model, [context], silent=[], drawing=drawing, earlier=earlier)
    drawn = [expected.draw() for _ in range(8)]
    model.embedding.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    assert [found.draw() for _ in range(8)] == drawn
    # The last token that was drawn was never given to the model.
    assert seen == [len(context) - min(common, 19), *[1] * 7]


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_those_of_transformers(
    transformers: Any, hugging_face: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    """Rows of unequal length together. Theirs count what fills a row up as seen, so with a penalty each goes alone."""
    folder = hugging_face(config_of(name).model)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        # As they begin, the likeliest token hardly depends on the text.
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)
    theirs.save_pretrained(folder)
    sampler = open_sampler(import_folder(folder, Store(tmp_path / "runs/imported")).ref.store.url)
    contexts = [[1, 5, 9], [2, 3, 4, 5, 6, 7, 8], [300]]
    longest = max(map(len, contexts))
    padded = torch.tensor([[0] * (longest - len(context)) + context for context in contexts])
    mask = torch.tensor([[0] * (longest - len(context)) + [1] * len(context) for context in contexts])
    common = {"do_sample": False, "max_new_tokens": 30, "min_new_tokens": 30, "pad_token_id": 0, "eos_token_id": None}
    for penalty in (1.0, 1.4):
        continuation = Continuation(
            sampler.model, contexts, silent=[], drawing=Drawing(30, temperature=0, repetition_penalty=penalty)
        )
        ours = [list(column) for column in zip(*(continuation.draw() for _ in range(30)), strict=True)]
        if penalty == 1:
            out = theirs.generate(padded, attention_mask=mask, **common)[:, longest:].tolist()
        else:
            out = [
                theirs.generate(torch.tensor([context]), repetition_penalty=penalty, **common)[
                    0, len(context) :
                ].tolist()
                for context in contexts
            ]
        assert ours == out
        # Of random models those with biases say least.
        assert len({token for row in ours for token in row}) > 5


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_p", [1e-6, 0.2, 0.9, 1.0])
def test_chances_are_those_of_transformers(transformers: Any, temperature: float, top_p: float) -> None:
    torch.manual_seed(2)
    logits_BV, ids = torch.randn(6, 200) * 3, torch.randint(0, 200, (6, 30))
    scores = transformers.RepetitionPenaltyLogitsProcessor(1.7)(ids, logits_BV.clone())
    seen_BV = torch.zeros(6, 200, dtype=torch.bool).scatter(1, ids, True)
    ours = penalised(logits_BV, seen_BV, 1.7)
    assert torch.equal(ours, scores)
    scores = transformers.TemperatureLogitsWarper(temperature)(ids, scores)
    if top_p < 1:
        scores = transformers.TopPLogitsWarper(top_p)(ids, scores)
    assert torch.equal(probabilities(ours, Drawing(temperature=temperature, top_p=top_p)), scores.softmax(-1))


def test_a_seed_gives_its_text_again_and_another_seed_another(save_run: Callable[..., Store]) -> None:
    config = parse_config(JOB)
    sampler = open_sampler(save_run(model_of(config), config).url)
    texts = [sampler.text(PROMPT, Drawing(30, temperature=1.0, seed=seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith(PROMPT) for text in texts)
    assert [PROMPT + each.text for each in sampler.answers([PROMPT] * 2, Drawing(30, 1.0, seed=1))] == texts[1:]


def test_a_low_temperature_is_nearly_greedy_and_a_high_one_is_not(save_run: Callable[..., Store]) -> None:
    config = parse_config(JOB)
    sampler = open_sampler(save_run(model_of(config), config).url)

    def sampled(temperature: float) -> tuple[int, ...]:
        return sampler.answers([PROMPT], Drawing(20, temperature, seed=3))[0].tokens

    assert sampled(1e-4) == sampled(0) != sampled(1e4)


def test_the_end_of_the_document_ends_the_text_and_is_no_part_of_it(
    save_run: Callable[..., Store], tokenizer: Tokenizer
) -> None:
    config = parse_config(JOB)
    model = model_of(config)
    with torch.no_grad():
        # All tokens are equally likely, and the first of them is the end.
        model.head.weight.zero_()
    assert tokenizer.end_of_document_id == 0
    sampler = open_sampler(save_run(model, config).url)
    assert sampler.text(PROMPT, Drawing(20, temperature=0)) == PROMPT


def test_a_text_that_is_told_to_stop_ends_before_what_stops_it(
    save_run: Callable[..., Store], tokenizer: Tokenizer
) -> None:
    config = parse_config(JOB)
    sampler = open_sampler(save_run(model_of(config), config).url)
    [whole] = sampler.answers([PROMPT], Drawing(40, temperature=0))
    [other] = sampler.answers(["return"], Drawing(40, temperature=0))
    ends = (whole.text[i : i + 2] for i in range(6, len(whole.text) - 2))
    stop = next(end for end in ends if end not in other.text and "\ufffd" not in end)
    drawing = Drawing(40, temperature=0, stop=[stop, "never said"])
    both = sampler.answers([PROMPT, "return"], drawing)
    assert (both[0].text, both[0].ended) == (whole.text[: whole.text.find(stop)], "stop")
    assert both[1] == other
    assert "".join(sampler.stream(PROMPT, drawing)) == both[0].text
    token = whole.tokens[10]
    before = whole.tokens[: whole.tokens.index(token)]
    [answer] = sampler.answers([PROMPT], Drawing(40, temperature=0, stop=token))
    assert (answer.tokens, answer.text, answer.ended) == (before, tokenizer.decode(before), "stop")


def test_the_model_never_sees_more_than_it_was_made_for(save_run: Callable[..., Store], tokenizer: Tokenizer) -> None:
    config = parse_config(JOB)
    sampler = open_sampler(save_run(model_of(config), config).url)
    seen: list[int] = []
    sampler.model.embedding.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    prompt = "def main(arguments): return 12345678901234567890"
    length = 1 + len(tokenizer.encode(prompt))
    assert 16 < length <= 32
    sampler.answers([prompt], Drawing(40, temperature=0))
    first = length - window_start(length, 16)
    # What the cache holds grows by one, until the later half is read anew.
    assert seen[0] == first and set(seen[1:]) == {1, 9} and seen.count(9) == 5
    assert [window_start(length, 16) for length in (1, 16, 17, 24, 25, 33)] == [0, 0, 8, 8, 16, 24]
    assert [window_start(length, 1) for length in (1, 2, 3)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0: it must be at least 1"),
        (
            {"temperature": -0.1},
            "temperature is -0.1: it must be at least 0, which takes the likeliest token",
        ),
        ({"temperature": float("nan")}, "temperature is nan: it must be at least 0"),
        ({"top_p": 0.0}, "top_p is 0.0: it must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p is 1.1: it must be above 0 and at most 1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0: it must be above 0; 1 changes nothing"),
        ({"seed": -1}, "seed is -1: it must be at least 0"),
        ({"stop": ["a", ""]}, r"stop is \['a', ''\]: it must be texts with at least one character"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Drawing(**changes)


def test_weights_that_are_no_numbers_are_told(save_run: Callable[..., Store]) -> None:
    config = parse_config(JOB)
    model = model_of(config)
    with torch.no_grad():
        model.final_norm.weight[0] = float("nan")
    sampler = open_sampler(save_run(model, config).url)
    with pytest.raises(CheckpointDamaged, match="logits are not all numbers: its weights are damaged, or training had"):
        sampler.text(PROMPT, Drawing())


def test_ids_of_a_padded_vocabulary_are_never_drawn(save_run: Callable[..., Store], tokenizer: Tokenizer) -> None:
    config = parse_config(JOB)
    assert tokenizer.vocab_size < config.model.vocab_size
    sampler = open_sampler(save_run(model_of(config), config).url)
    # Each with the same chance.
    [answer] = sampler.answers([PROMPT], Drawing(100, temperature=1e4))
    assert answer.tokens and max(answer.tokens) < tokenizer.vocab_size


# ---- text as it comes ------------------------------------------------------------------------------------------------


def bytes_decoded(tokens: Iterable[int]) -> str:
    return bytes(tokens).decode(errors="replace")


@pytest.mark.parametrize("text", ["plain", "naïve 🎉 café 中文", "🎉", "", "\ufffd stays"])
def test_a_character_comes_once_it_is_whole(text: str) -> None:
    for given in (b"", b"prompt ", "über 🎉".encode()):
        stream = TextStream(bytes_decoded, given=list(given))
        pieces = [stream.add(byte) for byte in text.encode()]
        assert "".join(pieces) + stream.rest() == text
        assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text


def test_bytes_that_never_become_a_character_are_said_in_the_end() -> None:
    stream = TextStream(bytes_decoded)
    tokens = [97, 0xF0, 0x9F, 98, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 99, 0xE4, 0xB8]
    assert "".join(stream.add(token) for token in tokens) + stream.rest() == bytes_decoded(tokens)


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one\n\ntwo", ["\n\n"], "one"),
        ("one\n two", ["\n\n"], "one\n two"),
        ("a<|im_end|>", ["<|im_end|>"], "a"),
        ("a<|im_sta", ["<|im_end|>"], "a<|im_sta"),
        ("aab", ["aab", "ab"], ""),
        ("xaab", ["ab"], "xa"),
        ("x", ["x"], ""),
        ("ab", ["b", "ab"], ""),
        ("caf\u00e9!", ["\u00e9"], "caf"),
    ],
)
def test_nothing_of_what_stops_a_text_is_said(text: str, stops: list[str], expected: str) -> None:
    stream = TextStream(bytes_decoded, stops=stops)
    said = ""
    for byte in text.encode():
        said += stream.add(byte)
        assert expected.startswith(said)
        if stream.stopped:
            break
    assert said + stream.rest() == expected
    assert stream.stopped == (text != expected)


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
        sampler.text("d\udcff", Drawing())


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
        sampler.text("def ", Drawing(2))
        monkeypatch.setattr("raynium.generation.sampler.SMALL_MODEL", 0)
        sampler.text("def ", Drawing(2))
        hook.remove()
        assert (seen, torch.get_num_threads()) == ([1, 1, 2, 2], 2)
    finally:
        torch.set_num_threads(given)

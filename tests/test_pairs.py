"""Preferences as data: records, a row for each answer, pairs that no batch parts, and what tasks ask for beside."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_preparation import JOB, Attempt

from raynium.config.load import parse_config
from raynium.config.schema import Config, DataSection
from raynium.data.batch import IGNORED_LABEL
from raynium.data.build.store_build import build_store
from raynium.data.evaluation import dealt_out
from raynium.data.loader import Loader, open_loader
from raynium.data.mixed import refuse_used_up
from raynium.data.packed_index import ensure_index
from raynium.data.records.formats import RecordError
from raynium.data.records.preferences import Preferences
from raynium.data.records.registry import records_of
from raynium.data.records.template import CHATML, ChatTemplate
from raynium.data.rows import open_rows, packable
from raynium.data.store import DocumentStore
from raynium.errors import ConfigError, DataError
from raynium.launch.preparation import checked
from raynium.rank.held_out_pairs import held_out_pairs
from raynium.tasks.preferences import Orpo
from raynium.tasks.registry import refuse_other_samples

TEMPLATE = ChatTemplate({"default": CHATML}, {})
PREFERENCES = Preferences(TEMPLATE)


ANSWERS = ("chosen", "rejected")


def sums(number: int) -> dict[str, Any]:
    """Of unlike lengths."""
    words = " that is" * (number % 4)
    return {"prompt": f"{number} + 2 =", "chosen": f" {number + 2}.", "rejected": f"{words} {number + 3}, or so."}


def pairs_store(
    folder: Path, records: list[dict[str, Any]] | None = None, *, tokenizer: Path | None = None
) -> DocumentStore:
    source = folder / "pairs.jsonl"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text("".join(json.dumps(each) + "\n" for each in records or [sums(number) for number in range(60)]))
    return build_store(
        folder / "store",
        source=str(source),
        vocab_size=400,
        tokenizer_path=None if tokenizer is None else str(tokenizer),
        heldout_fraction=0.2,
        records=records_of("preferences", chat_template="chatml"),
    )


def section(store: DocumentStore, **fields: Any) -> DataSection:
    known = {"path": str(store.path), "packing": "documents", "records": "preferences", "too_long": "leave_out"}
    return DataSection.model_validate(known | {"seq_len": 32} | fields)


def job(store: DocumentStore, **changes: Any) -> Config:
    values = {
        "task": "dpo",
        "run": {"name": "pairs", "root": str(store.path.parent)},
        "model": {
            **{"vocab_size": 400, "hidden_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2},
            **{"head_dim": 16, "ffn_size": 32, "max_seq_len": 32},
        },
        "data": {"path": str(store.path), "seq_len": 32},
        "train": {"steps": 30, "global_batch_size": 8, "micro_batch_size": 2},
    }
    return parse_config(json.dumps(values | changes))


# ---- records ---------------------------------------------------------------------------------------------------------


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_of_texts_the_answers_are_learned_with_the_end_of_the_document() -> None:
    chosen, rejected = PREFERENCES.render({"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"})
    assert (chosen.text, rejected.text) == ("1 + 1 = 2", "1 + 1 = 3")
    assert chosen.labels == rejected.labels == ((7, 9),)
    assert chosen.ends and not chosen.markup


@pytest.mark.parametrize("with_prompt", [True, False])
def test_of_messages_all_is_learned_that_follows_where_the_assistant_is_asked(with_prompt: bool) -> None:
    prompt = [message("system", "be brief"), message("user", "1 + 1?")]
    answers = [[message("assistant", text)] for text in ("2", "three")]
    if with_prompt:
        record = {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}
    else:
        record = {"chosen": [*prompt, *answers[0]], "rejected": [*prompt, *answers[1]]}
    for rendered, said in zip(PREFERENCES.render(record), ("2", "three"), strict=True):
        ((begin, end),) = rendered.labels
        assert rendered.text[:begin].endswith("1 + 1?<|im_end|>\n<|im_start|>assistant\n")
        assert rendered.text[begin:end] == f"{said}<|im_end|>\n" and end == len(rendered.text)
        assert rendered.markup and not rendered.ends


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are equal, so neither is better"),
        ({"prompt": "a", "chosen": "b", "rejected": [message("assistant", "c")]}, "rejected is list, not a text"),
        ({"prompt": "a", "chosen": [message("assistant", "c")], "rejected": "b"}, "rejected is str: prompt, chosen"),
        ({"chosen": "b", "rejected": "c"}, "chosen is str: prompt, chosen and rejected must all be texts, or all"),
        (
            {"chosen": [message("assistant", "b")], "rejected": [message("assistant", "c")]},
            "without a prompt, chosen and rejected must be chats that begin alike",
        ),
        (
            {"chosen": [message("user", "b")], "rejected": [message("assistant", "c")]},
            "chosen ends with a message of user: the assistant must have the last word",
        ),
        (
            {"prompt": [message("king", "b")]} | {answer: [message("assistant", answer)] for answer in ANSWERS},
            'has the role "king"',
        ),
    ],
)  # fmt: skip
def test_what_is_no_pair_is_refused(record: Mapping[str, Any], reason: str) -> None:
    with pytest.raises(RecordError) as raised:
        PREFERENCES.render(record)
    assert reason in str(raised.value)


CHAT_PAIR = {
    "prompt": [message("user", "1 + 1?")],
    "chosen": [message("assistant", "2")],
    "rejected": [message("assistant", "3")],
}


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "its prompt and answers are messages, and the tokenizer has no chat template: give data.chat_template"),
        ("{{ raise_exception('no users here') }}", "the chat template refuses it: no users here"),
        ("{{ messages | length }}", "which tokens are the answer cannot be told"),
    ],
)
def test_chats_need_a_template_that_renders_the_prompt_alike(template: str | None, reason: str) -> None:
    made = None if template is None else ChatTemplate({"default": template}, {})
    with pytest.raises(RecordError) as raised:
        Preferences(made).render(CHAT_PAIR)
    assert reason in str(raised.value)


def test_equal_answers_are_refused_with_the_file_and_the_line(tmp_path: Path) -> None:
    records = [sums(number) for number in range(20)]
    records[7]["rejected"] = records[7]["chosen"]
    with pytest.raises(DataError, match=r"pairs\.jsonl, line 8: chosen and rejected are equal, so neither is better"):
        pairs_store(tmp_path, records)


# ---- rows ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> DocumentStore:
    return pairs_store(tmp_path_factory.mktemp("pairs"))


def said(store: DocumentStore, tokens: np.ndarray, labels: np.ndarray) -> tuple[str, str]:
    """The whole text of a row, and what is learned of it."""
    tokenizer = store.tokenizer()
    learned = labels[labels != IGNORED_LABEL].tolist()
    last = np.flatnonzero(labels != IGNORED_LABEL)[-1]
    return tokenizer.decode([*tokens[: last + 1].tolist(), learned[-1]]), tokenizer.decode(learned)


def test_each_answer_is_a_row_of_its_own_beside_its_rival(store: DocumentStore) -> None:
    rows = open_rows(store, section(store))
    assert rows.rows_per_sample == 2 and 2 * len(rows) == store.manifest.train.documents
    columns = rows.read(np.arange(len(rows)))
    assert set(columns) == {"tokens", "labels"} and columns["tokens"].shape == (2 * len(rows), 32)
    for row in range(0, 2 * len(rows), 2):
        chosen, rejected = (said(store, columns["tokens"][at], columns["labels"][at]) for at in (row, row + 1))
        number = int(chosen[0].split(" ")[0])
        expected = sums(number)
        end = store.manifest.end_of_document_id
        ends = store.tokenizer().decode([end])
        assert chosen == (f"{expected['prompt']}{expected['chosen']}{ends}", f"{expected['chosen']}{ends}")
        assert rejected == (f"{expected['prompt']}{expected['rejected']}{ends}", f"{expected['rejected']}{ends}")


def loader_of(config: Config, store: DocumentStore, rank: int = 0, size: int = 1, **more: Any) -> Loader:
    return open_loader(config, [store], data_rank=rank, data_size=size, **more)


@pytest.mark.parametrize("size", [2, 4])
def test_the_samples_of_a_step_are_whole_pairs_and_the_same_at_every_world_size(
    store: DocumentStore, size: int
) -> None:
    config = job(store)
    alone = loader_of(config, store)
    shared = [loader_of(config, store, rank, size) for rank in range(size)]
    seen = []
    for step in range(1, 31):
        batch = alone.batch(step)
        parts = [loader.batch(step).tokens_BT.numpy() for loader in shared]
        np.testing.assert_array_equal(np.concatenate(parts), batch.tokens_BT.numpy())
        seen += [
            said(store, tokens, labels)[0]
            for tokens, labels in zip(batch.tokens_BT.numpy(), batch.labels_BT.numpy(), strict=True)
        ]
    for chosen, rejected in zip(seen[::2], seen[1::2], strict=True):
        assert chosen.split(" =")[0] == rejected.split(" =")[0], "a pair has one prompt"
    pairs = store.manifest.train.documents // 2
    assert len({*seen[: 2 * pairs : 2]}) == pairs, "an epoch has every pair once"


def test_a_reference_goes_with_its_row(store: DocumentStore) -> None:
    config = job(store)
    rows = open_rows(store, config.data)
    reference = np.arange(2 * len(rows), dtype=np.float32)
    loader = loader_of(config, store, columns={"reference"}, references=[reference])
    for step in (1, 2, 9):
        batch = loader.batch(step)
        places = batch.others["reference"].numpy().astype(int)
        assert (places[::2] % 2 == 0).all() and (places[1::2] == places[::2] + 1).all()
        np.testing.assert_array_equal(rows.read(places[::2] // 2)["tokens"], batch.tokens_BT.numpy())


@pytest.mark.parametrize("size", [1, 2])
def test_for_orpo_prompts_of_chosen_rows_are_labels_and_weights_are_of_the_whole_step(
    store: DocumentStore, size: int
) -> None:
    config = job(store, task="orpo")
    plain = loader_of(config, store)
    columns = {column.name for column in Orpo.columns}
    for step in (1, 5):
        masked, whole = (
            plain.batch(step),
            [loader_of(config, store, rank, size, columns=columns) for rank in range(size)],
        )
        batches = [loader.batch(step) for loader in whole]
        labels = np.concatenate([batch.labels_BT.numpy() for batch in batches])
        answer = np.concatenate([batch.others["answer"].numpy() for batch in batches])
        np.testing.assert_array_equal(np.where(answer == 1, labels, IGNORED_LABEL), masked.labels_BT.numpy())
        np.testing.assert_array_equal(labels[1::2], masked.labels_BT.numpy()[1::2])
        for row in range(0, 8, 2):
            counted = labels[row] != IGNORED_LABEL
            length = counted.sum()
            assert counted[:length].all() and length > (answer[row] == 1).sum()
            np.testing.assert_array_equal(labels[row, : length - 1], masked.tokens_BT.numpy()[row, 1:length])
        weights = np.concatenate([batch.others["nats_weight"].numpy() for batch in batches])
        chosen_tokens = (labels[::2] != IGNORED_LABEL).sum()
        np.testing.assert_allclose(weights, np.tile([4 / chosen_tokens, 0], 4), rtol=1e-7)


def test_pairs_of_several_stores_stay_whole(tmp_path: Path, store: DocumentStore) -> None:
    other = pairs_store(tmp_path, [sums(number) for number in range(200, 260)], tokenizer=store.path / "tokenizer.json")
    config = job(store)
    mixture = [{"store": str(each.path), "weight": 1} for each in (store, other)]
    mixed = config.model_copy(
        update={"data": DataSection.model_validate(section(store).model_dump() | {"path": None, "mixture": mixture})}
    )
    references = [np.arange(400, dtype=np.float32)[: each.manifest.train.documents] for each in (store, other)]
    loader = open_loader(mixed, [store, other], data_rank=0, data_size=1, columns={"reference"}, references=references)
    seen = set()
    for step in range(1, 5):
        batch = loader.batch(step)
        texts = [
            said(store, tokens, labels)[0]
            for tokens, labels in zip(batch.tokens_BT.numpy(), batch.labels_BT.numpy(), strict=True)
        ]
        prompts = [text.split(" =")[0] for text in texts]
        assert prompts[::2] == prompts[1::2]
        places = batch.others["reference"].numpy()
        assert (places[1::2] == places[::2] + 1).all()
        seen |= {prompt.split(" ")[0] for prompt in prompts}
    assert {int(number) >= 200 for number in seen} == {True, False}


# ---- pairs that are longer than a row --------------------------------------------------------------------------------

LONG = {"prompt": "9 + 9 =", "chosen": " 18.", "rejected": " 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, or so."}
BOTTOMLESS = [LONG | {"prompt": f"{' '.join(str(n * 7919 % 997) for n in range(at, at + 9))} is"} for at in range(6)]


@pytest.fixture(scope="module")
def long_store(tmp_path_factory: pytest.TempPathFactory) -> DocumentStore:
    return pairs_store(tmp_path_factory.mktemp("long"), [*(sums(n) for n in range(60)), *([LONG] * 6), *BOTTOMLESS])


def test_a_pair_with_an_answer_longer_than_a_row_is_left_out_whole(long_store: DocumentStore) -> None:
    index = ensure_index(packable(long_store), section(long_store)).index
    assert index.left_out > 0 and index.left_out % 2 == 0 and index.cut == index.split == 0
    rows = open_rows(long_store, section(long_store))
    assert 2 * len(rows) == long_store.manifest.train.documents - index.left_out
    columns = rows.read(np.arange(len(rows)))
    texts = [
        said(long_store, tokens, labels)[0] for tokens, labels in zip(columns["tokens"], columns["labels"], strict=True)
    ]
    assert not any("9 + 9" in text for text in texts)


def test_an_epoch_is_all_pairs_once_and_a_store_runs_out_with_its_last_pair(
    tmp_path: Path, long_store: DocumentStore
) -> None:
    """A batch is of rows, two of each pair; the order deals pairs."""
    changes = {
        **{"task": "dpo", "data.path": str(long_store.path), "data.seq_len": 32, "data.too_long": "leave_out"},
        **{"data.packing": "documents", "data.records": "preferences", "model.vocab_size": 400, "train.steps": None},
        **{"train.epochs": 1, "data.max_epochs": 1, "train.global_batch_size": 8, "train.micro_batch_size": 4},
    }
    attempt = Attempt(tmp_path, "pairs")
    loader = open_loader(attempt(**changes).config, [long_store], data_rank=0, data_size=1)
    pairs = len(open_rows(long_store, section(long_store)))
    steps = -(-pairs // 4)
    assert pairs % 4 and f"train: 1 epochs are {steps} steps" in attempt.told
    seen = np.concatenate([loader.samples(step).rows for step in range(1, steps + 1)])
    assert set(seen.tolist()) == set(range(pairs)) and len(seen) - pairs < 4
    message = rf"runs out at step {steps} of {steps}: it has {pairs} samples of 2 rows, and the run takes {len(seen)}"
    changes |= {"train.epochs": None, "train.steps": steps}
    Attempt(tmp_path, "out").refused(DataError, message, **changes)
    fits = parse_config(JOB, changes | {"train.steps": steps - 1})
    refuse_used_up(fits, [2 * pairs], rows_per_sample=2)


def test_an_answer_may_be_cut_and_a_pair_of_which_nothing_would_be_left_goes(long_store: DocumentStore) -> None:
    data = section(long_store, too_long="cut", seq_len=16)
    index = ensure_index(packable(long_store), data).index
    assert index.cut > 0 and index.cut_tokens > 0 and index.left_out > 0 and index.left_out % 2 == 0
    rows = open_rows(long_store, data)
    columns = rows.read(np.arange(len(rows)))
    assert (columns["labels"] != IGNORED_LABEL).any(1).all()
    texts = [
        said(long_store, tokens, labels)[0] for tokens, labels in zip(columns["tokens"], columns["labels"], strict=True)
    ]
    assert any("9 + 9 = 1, 2" in text for text in texts) and not any("942" in text for text in texts)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"too_long": "split"}, r"data\.too_long is split, and .* holds records of 2 documents each, that are"),
        ({"too_long": "refuse"}, r"data\.too_long is\s+refuse"),
        (
            {"seq_len": 2},
            r"data\.seq_len = 2: no record of 2 documents of .* fits a row, the shortest has 11 tokens with its end; "
            r"set data\.seq_len to 11 or more$",
        ),
    ],
)
def test_pairs_that_do_not_fit_are_refused(long_store: DocumentStore, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_rows(long_store, section(long_store, **fields))


# ---- held-out pairs --------------------------------------------------------------------------------------------------


def test_held_out_pairs_are_whole_and_dealt_out_alike_at_every_world_size(store: DocumentStore) -> None:
    data = section(store)
    columns = held_out_pairs(store, data, max_pairs=None)
    assert len(columns["labels"]) == store.manifest.heldout.documents
    texts = [
        said(store, tokens, labels)[0] for tokens, labels in zip(columns["tokens"], columns["labels"], strict=True)
    ]
    assert [text.split(" =")[0] for text in texts[::2]] == [text.split(" =")[0] for text in texts[1::2]]
    trained = open_rows(store, data).read(np.arange(len(open_rows(store, data))))
    of_training = {
        said(store, tokens, labels)[0] for tokens, labels in zip(trained["tokens"], trained["labels"], strict=True)
    }
    assert not of_training & {*texts}
    assert len(held_out_pairs(store, data, max_pairs=3)["labels"]) == 6

    columns["reference"] = np.arange(len(texts), dtype=np.float32)
    rows = []
    for size in (1, 2):
        sets = [dealt_out(columns, filler=0, batch_size=4, data_rank=rank, data_size=size) for rank in range(size)]
        assert len({len(each.batches) for each in sets}) == 1
        batches = [each.batches[call] for call in range(len(sets[0].batches)) for each in sets]
        rows.append(np.concatenate([batch.tokens_BT.numpy() for batch in batches])[: len(texts)])
        fill = np.concatenate([batch.labels_BT.numpy() for batch in batches])[len(texts) :]
        assert (fill == IGNORED_LABEL).all()
    np.testing.assert_array_equal(rows[0], columns["tokens"])
    np.testing.assert_array_equal(rows[1], columns["tokens"])


def test_held_out_pairs_of_which_none_fits_are_refused(store: DocumentStore) -> None:
    with pytest.raises(DataError, match=r"data\.seq_len = 4: of the \d+ held-out pairs of .* none fits: raise"):
        held_out_pairs(store, section(store, seq_len=4), max_pairs=None)


# ---- tasks and stores that do not go together ------------------------------------------------------------------------


def test_a_task_says_what_records_it_learns_from(store: DocumentStore) -> None:
    config = job(store)
    assert (config.data.records, config.data.packing, config.data.too_long) == ("preferences", "documents", "leave_out")
    refuse_other_samples(config, [store])
    with pytest.raises(DataError, match=r"task pretraining learns from 1 row\(s\) together, and a record of .*/store"):
        refuse_other_samples(job(store, task="pretraining"), [store])


def test_a_micro_batch_of_half_a_pair_is_refused_before_anything_starts(store: DocumentStore) -> None:
    train = {"steps": 30, "global_batch_size": 9, "micro_batch_size": 3}
    with pytest.raises(ConfigError, match=r"train\.micro_batch_size is 3, and a sample of this task is 2 rows"):
        checked(job(store, train=train))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beta": 0}, r"preference\.beta"),
        ({"label_smoothing": 0.5}, r"preference\.label_smoothing"),
        ({"lambda": 1}, r"preference\.lambda"),
    ],
)
def test_weights_of_a_preference_that_make_no_sense_are_refused(
    store: DocumentStore, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        job(store, preference=fields)

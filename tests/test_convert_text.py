"""An exported folder continues a text as `raynium sample` does and as training taught, for every family of tokenizers.

Each tokenizer is built as its family's tokenizer.json is, with the files that stand beside it.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conversions import config_of
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Library
from typer.testing import CliRunner

from raynium.checkpoint.catalog import choose_checkpoint
from raynium.cli.app import app
from raynium.config.load import load_config
from raynium.convert.adopt import check_weights, describe
from raynium.convert.export import export_checkpoint
from raynium.convert.import_folder import import_folder
from raynium.data.records.template import CHATML, OWN_NAME, TOOLS_FILE, ChatTemplate
from raynium.data.store import TOKENIZER_NAME
from raynium.data.tokenizer import SPLIT_PATTERN, Tokenizer
from raynium.errors import CheckpointError, CheckpointMismatch, ConfigError
from raynium.generation.drawing import Drawing
from raynium.generation.sampler import open_sampler
from raynium.models.decoder import Decoder
from raynium.storage.store import Store

pytestmark = pytest.mark.parity

TEXTS = ["def main(x): return 12345\n\n  it's a héllo, 漢字 said main to the other main " * 4]
# In the last, a special token of some is spelled: in a prompt it is meant, in a document it would be text.
PROMPTS = ("", "def main(x)", "  it's a héllo\n\n", "漢字 said <s> main ")
VOCAB_SIZE = 400
# Every file of a folder that is not config.json, by name; chat templates and the like are text.
Files = dict[str, Any]


def byte_level(special_tokens: list[str], post_processor: Any, normalizer: Any = None) -> Library:
    tokenizer = Library(models.BPE(ignore_merges=True))
    tokenizer.normalizer = normalizer
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special_tokens])
    tokenizer.post_processor = post_processor(tokenizer)
    return tokenizer


def begin_with(name: str, *before: Any) -> Callable[[Library], Any]:
    def make(tokenizer: Library) -> Any:
        template = processors.TemplateProcessing(
            single=f"{name} $A", pair=f"{name} $A {name} $B:1", special_tokens=[(name, tokenizer.token_to_id(name))]
        )
        return processors.Sequence([*before, template]) if before else template

    return make


def llama3() -> tuple[Library, Files]:
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    tokenizer = byte_level(special, begin_with(special[0], processors.ByteLevel(trim_offsets=True)))
    bos, eos, turn = map(tokenizer.token_to_id, special)
    return tokenizer, {
        "config.json": {"bos_token_id": bos, "eos_token_id": [eos, turn]},
        "generation_config.json": {"bos_token_id": bos, "eos_token_id": [eos, turn], "do_sample": True, "top_p": 0.9},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": special[0],
            "eos_token": special[2],
            "chat_template": "{{ bos_token }}{% for message in messages %}{{ message.content }}{% endfor %}",
            "model_max_length": 131072,
        },
        "special_tokens_map.json": {"bos_token": special[0], "eos_token": special[2]},
    }


def qwen3() -> tuple[Library, Files]:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    byte_level_only = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer = byte_level(special, lambda _: byte_level_only, normalizers.NFC())
    end, _, turn = map(tokenizer.token_to_id, special)
    return tokenizer, {
        "config.json": {"bos_token_id": end, "eos_token_id": turn},
        "generation_config.json": {"bos_token_id": end, "pad_token_id": end, "eos_token_id": [turn, end]},
        "tokenizer_config.json": {
            "tokenizer_class": "Qwen2Tokenizer",
            "add_bos_token": False,
            "add_prefix_space": False,
            "bos_token": None,
            "eos_token": special[2],
            "pad_token": special[0],
            "unk_token": None,
        },
        "chat_template.jinja": "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>\n{% endfor %}",
    }


def sentence_piece(*, metaspace: bool) -> tuple[Library, Files]:
    """As converted from tokenizer.model: Llama 2's, or with Metaspace as in newer conversions and Mistral's."""
    special = ["<unk>", "<s>", "</s>"]
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    tokenizer = Library(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    trainer = trainers.BpeTrainer(
        vocab_size=380, special_tokens=special + bytes_, limit_alphabet=30, max_token_length=6, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = begin_with("<s>")(tokenizer)
    fields = json.loads(tokenizer.to_str())
    # Bytes are ordinary tokens of the vocabulary.
    fields["added_tokens"] = fields["added_tokens"][: len(special)]
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return Library.from_str(json.dumps(fields)), {
        "config.json": {"bos_token_id": 1, "eos_token_id": 2},
        "tokenizer_config.json": names
        | {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": not metaspace},
        "special_tokens_map.json": {
            key: {"content": token, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
            for key, token in names.items()
        },
    }


FAMILIES: dict[str, tuple[str, Callable[[], tuple[Library, Files]]]] = {
    "Llama 3": ("llama", llama3),
    "Qwen 3": ("qwen3", qwen3),
    "Llama 2": ("llama", lambda: sentence_piece(metaspace=False)),
    "Mistral": ("llama", lambda: sentence_piece(metaspace=True)),
    "no file beside": ("llama", lambda: (llama3()[0], {"config.json": {}})),
}


@pytest.fixture
def published(tmp_path: Path, transformers_model: Callable[..., Any]) -> Callable[[str], Path]:
    """A model's folder as its makers publish it, with random weights that show every difference."""

    def make(family: str) -> Path:
        model_name, tokenizer_of = FAMILIES[family]
        folder = tmp_path / "published"
        torch.manual_seed(3)
        model = transformers_model(config_of(model_name, vocab_size=VOCAB_SIZE).model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=0.3)
        model.save_pretrained(folder)
        tokenizer, files = tokenizer_of()
        (folder / "generation_config.json").unlink()
        config = json.loads((folder / "config.json").read_text())
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        files["config.json"] |= {name: value for name, value in config.items() if name not in ids}
        for name, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content, indent=4) + "\n"
            (folder / name).write_text(text)
        (folder / TOKENIZER_NAME).write_text(tokenizer.to_str())
        return folder

    return make


def continued(transformers: Any, folder: Path, prompt: str, num_tokens: int) -> list[int]:
    """What `generate` adds to the prompt, up to what ends a text."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    inputs = transformers.AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt")
    out = model.generate(**inputs, do_sample=False, top_p=None, max_new_tokens=num_tokens)
    eos = model.generation_config.eos_token_id
    found = out[0, inputs["input_ids"].shape[1] :].tolist()
    return found[:-1] if found and found[-1] in (eos if isinstance(eos, list) else [eos]) else found


def same_continuations(transformers: Any, store: Store, folder: Path) -> list[int]:
    """Of all prompts; the ids, to see that they say something."""
    sampler = open_sampler(store.url)
    seen: list[int] = []
    for prompt in PROMPTS:
        ours = list(sampler.answers([prompt], Drawing(24, temperature=0))[0].tokens)
        assert continued(transformers, folder, prompt, 24) == ours, prompt
        seen += ours
    return seen


def test_our_own_model_is_continued_as_it_was_trained(
    transformers: Any, save_run: Callable[..., Store], tmp_path: Path
) -> None:
    """Its vocabulary is padded: ids that stand for no text are drawn by neither."""
    config = config_of()
    torch.manual_seed(5)
    model = Decoder(config.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
        model.head.weight[280:] *= 20
    store = save_run(model, config)
    sampler = open_sampler(store.url)
    assert sampler.tokenizer.vocab_size <= 280 < config.model.vocab_size
    export_checkpoint(choose_checkpoint(store), tmp_path / "out")
    seen = same_continuations(transformers, store, tmp_path / "out")
    assert len(set(seen)) > 20 and max(seen) < sampler.tokenizer.vocab_size
    likeliest = model(torch.tensor([sampler.texts.prompt(PROMPTS[1])]))[0].argmax(-1)
    assert max(likeliest) >= 280, "the padding would be drawn"


@pytest.mark.parametrize("family", FAMILIES)
def test_an_imported_model_is_continued_as_training_goes_on(
    transformers: Any, published: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    folder = published(family)
    store = Store(tmp_path / "runs/imported")
    imported = import_folder(folder, store)
    export_checkpoint(imported.ref, tmp_path / "out")
    assert len(set(same_continuations(transformers, store, tmp_path / "out"))) > 20
    trained_with = open_sampler(store.url).tokenizer
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for prompt in PROMPTS[:-1]:
        assert theirs(prompt).input_ids == [trained_with.end_of_document_id, *trained_with.encode(prompt)]
        assert list(theirs(prompt)) == ["input_ids", "attention_mask"]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_imported_models_small_files_come_out_as_they_went_in(
    transformers: Any, published: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    folder = published(family)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".safetensors"}
    export_checkpoint(import_folder(folder, Store(tmp_path / "runs/imported")).ref, tmp_path / "out")
    again = import_folder(tmp_path / "out", Store(tmp_path / "runs/again"))
    export_checkpoint(again.ref, tmp_path / "twice")
    for out in (tmp_path / "out", tmp_path / "twice"):
        after = {path.name: path.read_bytes() for path in out.iterdir() if path.suffix != ".safetensors"}
        made = {"config.json", "tokenizer_config.json", "generation_config.json", TOKENIZER_NAME}
        assert set(before) <= set(after) <= set(before) | made
        for name in before.keys() - {"config.json", "tokenizer_config.json", TOKENIZER_NAME}:
            assert after[name] == before[name], name
        config, config_before = json.loads(after["config.json"]), json.loads(before["config.json"])
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            assert config.get(name, "none") == config_before.get(name, "none")
        tokenizer, tokenizer_before = (
            {key: value for key, value in json.loads(files[TOKENIZER_NAME]).items() if key != "post_processor"}
            for files in (after, before)
        )
        assert tokenizer == tokenizer_before
        loaded, original = (transformers.AutoTokenizer.from_pretrained(each) for each in (out, folder))
        if "tokenizer_config.json" in before:
            assert loaded.special_tokens_map == original.special_tokens_map
            assert loaded.chat_template == original.chat_template


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))


@pytest.mark.parametrize("metaspace", [False, True])
def test_a_continuation_keeps_the_space_that_it_begins_with(
    published: Callable[[str], Path], tmp_path: Path, metaspace: bool
) -> None:
    store = Store(tmp_path / "runs/imported")
    import_folder(published("Mistral" if metaspace else "Llama 2"), store)
    sampler = open_sampler(store.url)
    given, decode = sampler.texts.prompt("main")[1:], sampler.tokenizer.decode
    [spaced, *_] = [id_ for id_ in range(3 + 256, 380) if decode([*given, id_]) == f"main {decode([id_])}" != "main "]
    sampler.model.head.register_forward_hook(lambda _, __, out: out.index_fill(-1, torch.tensor(spaced), 99.0))
    assert sampler.text("main", Drawing(1, temperature=0)) == f"main {decode([spaced])}"


def test_what_training_puts_after_a_text_ends_one_even_if_the_import_had_another_end(
    transformers: Any, published: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = published("Qwen 3")
    turn = json.loads((folder / "config.json").read_text())["eos_token_id"]
    change_json(folder / "generation_config.json", eos_token_id=turn)
    change_json(folder / "tokenizer_config.json", eos_token="<|endoftext|>")
    store = Store(tmp_path / "runs/imported")
    export_checkpoint(import_folder(folder, store).ref, tmp_path / "out")
    sampler = open_sampler(store.url)
    assert sampler.tokenizer.end_of_document == "<|endoftext|>"
    ends = [turn, sampler.tokenizer.end_of_document_id]
    assert (
        sampler.texts.ends == json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"] == ends
    )
    assert json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"] == turn
    for end in ends:
        with torch.no_grad():
            sampler.model.head.weight.zero_()
        assert sampler.answers(["a"], Drawing(3, temperature=0))[0].tokens == (0, 0, 0)
        sampler.model.head.register_forward_hook(lambda _, __, out, end=end: out.index_fill(-1, torch.tensor(end), 9.0))
        assert sampler.answers(["a"], Drawing(3, temperature=0))[0].tokens == ()
        sampler = open_sampler(store.url)


def test_a_base_model_that_learned_chats_goes_out_with_their_template_and_the_end_of_an_answer(
    transformers: Any, published: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = published("Qwen 3")
    (folder / "chat_template.jinja").unlink()
    end = json.loads((folder / "config.json").read_text())["bos_token_id"]
    for name in ("config.json", "generation_config.json"):
        change_json(folder / name, eos_token_id=end)
    store = Store(tmp_path / "runs/imported")
    ref = import_folder(folder, store).ref
    assert open_sampler(store.url).texts.ends == [end]
    store.replace(OWN_NAME, ChatTemplate({"default": CHATML}, {}).to_json())
    export_checkpoint(ref, tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    turn = theirs.convert_tokens_to_ids("<|im_end|>")
    assert open_sampler(store.url).texts.ends == [end, turn]
    generates = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config
    assert generates.eos_token_id == [end, turn]
    asked = [{"role": "user", "content": "main?"}]
    rendered = theirs.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|im_start|>user\nmain?<|im_end|>\n<|im_start|>assistant\n"


def test_templates_of_several_names_go_out_with_their_names(
    transformers: Any, published: Callable[[str], Path], tmp_path: Path
) -> None:
    store = Store(tmp_path / "runs/imported")
    ref = import_folder(published("Qwen 3"), store).ref
    # One refuses a turn of the user, and both end an answer with no special token.
    templates = {"default": "{{ messages[1].content }}", "tool_use": "{{ tools }}"}
    store.replace(OWN_NAME, ChatTemplate(templates, {}).to_json())
    before = open_sampler(store.url).texts.ends
    export_checkpoint(ref, tmp_path / "out")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == templates
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"] == before
    store.replace(OWN_NAME, ChatTemplate({"default": "{{ raise_exception('no') }}"}, {}).to_json())
    assert open_sampler(store.url).texts.ends == before


def test_a_template_for_tools_is_kept_and_goes_out_as_it_came(
    transformers: Any, published: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = published("Qwen 3")
    (folder / "additional_chat_templates").mkdir()
    (folder / TOOLS_FILE).write_text("{{ tools }}")
    store = Store(tmp_path / "runs/imported")
    export_checkpoint(import_folder(folder, store).ref, tmp_path / "out")
    templates = transformers.AutoTokenizer.from_pretrained(folder).chat_template
    assert templates.keys() == {"default", "tool_use"}
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == templates
    own = open_sampler(store.url).texts.chat_template
    assert own is not None and own.templates == templates


def test_a_run_with_another_tokenizer_than_that_of_its_weights_is_refused_before_data_is_built(
    published: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, other, same = published("Qwen 3"), tmp_path / "other.json", tmp_path / "same.json"
    other.write_text(Tokenizer.train(["quite another text"], vocab_size=270).file_text)
    same.write_text((folder / TOKENIZER_NAME).read_text())
    (tmp_path / "job.yaml").write_text(
        f"run: {{name: tuned, root: {tmp_path}/runs}}\nmodel: {{init: {folder}}}\n"
        f"data: {{source: {tmp_path}, seq_len: 16}}\ntrain: {{steps: 1, global_batch_size: 1}}\n"
    )

    def checked(*overrides: str) -> None:
        check_weights(load_config(tmp_path / "job.yaml", overrides, describe=describe))

    with pytest.raises(
        ConfigError, match=r"data\.tokenizer is '.*other\.json', another than that of the weights at mod"
    ):
        checked(f"data.tokenizer={other}")
    checked(f"data.tokenizer={same}", "data.end_of_document=<|endoftext|>")
    checked()


@pytest.mark.parametrize("ids", [True, -1, VOCAB_SIZE, 1.0, "2", [2, True], [[2]], {"id": 2}])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_ids_that_are_no_tokens_are_refused(
    published: Callable[[str], Path], tmp_path: Path, name: str, ids: Any
) -> None:
    folder = published("Llama 3")
    change_json(folder / name, eos_token_id=ids)
    with pytest.raises(CheckpointMismatch, match=rf"{name}: eos_token_id is .*: it must be a token of the vocabulary"):
        import_folder(folder, Store(tmp_path / "runs/imported"))
    assert not list((tmp_path / "runs").rglob("*.json"))


def test_a_folder_without_tokenizer_json_takes_one_from_elsewhere(
    published: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = published("Llama 2")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (folder / TOKENIZER_NAME).rename(elsewhere / TOKENIZER_NAME)
    run = ["checkpoints", "import", str(folder), "imported", "--root", str(tmp_path / "runs")]
    refused = CliRunner().invoke(app, run)
    assert refused.exit_code == 1
    assert isinstance(refused.exception, CheckpointError) and "with --tokenizer" in str(refused.exception)
    for given in (elsewhere, elsewhere / TOKENIZER_NAME):
        done = CliRunner().invoke(app, [*run, "--tokenizer", str(given)], catch_exceptions=False)
        assert done.exit_code == 0
        shutil.rmtree(tmp_path / "runs")


def test_documents_of_before_an_export_fit_the_model_that_is_imported_from_it(
    published: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = published("Llama 3")
    export_checkpoint(import_folder(folder, Store(tmp_path / "runs/imported")).ref, tmp_path / "out")
    before, after = Tokenizer.load(folder / TOKENIZER_NAME), Tokenizer.load(tmp_path / "out" / TOKENIZER_NAME)
    assert before.sha256 == after.sha256 and before.sha256s[1] != after.sha256s[1]
    canonical = json.dumps(json.loads(before.file_text), sort_keys=True, separators=(",", ":"))
    assert before.sha256s[1] == hashlib.sha256(canonical.encode()).hexdigest(), "what older document stores name"


def test_a_tokenizer_that_cuts_or_fills_texts_does_so_neither_in_training_nor_in_the_export(
    transformers: Any, published: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = published("Qwen 3")
    library = Library.from_file(str(folder / TOKENIZER_NAME))
    library.enable_truncation(4)
    library.enable_padding(length=8)
    (folder / TOKENIZER_NAME).write_text(library.to_str())
    text = PROMPTS[1] * 3
    trained_with = Tokenizer.load(folder / TOKENIZER_NAME)
    tokens = trained_with.encode(text).tolist()
    assert len(tokens) > 8 and trained_with.decode(tokens) == text
    assert 0 < len(trained_with.encode("a")) < 8
    export_checkpoint(import_folder(folder, Store(tmp_path / "runs/imported")).ref, tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs(text).input_ids == [trained_with.end_of_document_id, *tokens]

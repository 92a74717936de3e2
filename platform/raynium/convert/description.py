"""The small files of a Hugging Face folder: what an import keeps of them in its run, and what an export writes.

Pretraining puts the end-of-document token before every text and nothing else around it, and so does `raynium sample`.
The exported tokenizer adds that token and no other, whatever the imported one added; after another task it adds what
the imported one did. A run that learned chats gives the template they were rendered by, and what ends an answer there
ends a text. All else of an imported model's small files comes out as it went in: the ids of beginnings and ends, the
chat template, how to generate, special tokens.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import tokenizers

from raynium.checkpoint.ref import CheckpointRef
from raynium.config.local_folders import local_path
from raynium.config.plain_file import plain_size
from raynium.config.schema import ModelSection
from raynium.convert.config_json import Dtype, config_from_model, model_from_config
from raynium.convert.folder import Folder
from raynium.data.records.template import TOOLS_FILE, ChatTemplate, TemplateRefusal
from raynium.data.tokenizer import TOKENIZER_NAME, Tokenizer, reader
from raynium.errors import CheckpointError, CheckpointMismatch, ConfigError
from raynium.storage.store import Store

# Of the run: an imported model's small files by name.
KEPT_NAME = "imported.json"
_CONFIG, _GENERATION, _TOKENIZER = "config.json", "generation_config.json", "tokenizer_config.json"
_SPECIAL_TOKENS, _CHAT_TEMPLATE = "special_tokens_map.json", "chat_template.jinja"
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_CHECKED_IDS = ("bos_token_id", "eos_token_id", "suppress_tokens")
# Of tokenizer_config.json: with these transformers would build another tokenizer than tokenizer.json says.
_REBUILDING = ("add_bos_token", "add_eos_token", "add_prefix_space", "legacy", "from_slow", "auto_map")


@dataclass(frozen=True)
class Described:
    """The small files of an imported model, name → text as it came; none for a model that began here."""

    files: Mapping[str, str]

    @classmethod
    def of_folder(cls, folder: Folder, *, vocab_size: int) -> Self:
        """CheckpointError, CheckpointDamaged or CheckpointMismatch naming the file that is not as it should be."""
        there = folder.names()
        kept = (_CONFIG, _GENERATION, _TOKENIZER, _SPECIAL_TOKENS, "added_tokens.json", _CHAT_TEMPLATE)
        found = [file for file in kept if file == _CONFIG or file in there]
        found += [TOOLS_FILE] if folder.store.exists(TOOLS_FILE) else []
        for file in found:
            fields = folder.json(file) if file.endswith(".json") else {}
            for name in _CHECKED_IDS if file in (_CONFIG, _GENERATION) else ():
                if not all(type(each) is int and 0 <= each < vocab_size for each in _listed(fields.get(name))):
                    raise CheckpointMismatch(
                        f"{folder.path(file)}: {name} is {str(fields[name])[:100]}: it must be a token of the "
                        f"vocabulary of {vocab_size:,}, or a list of some"
                    )
        return cls({file: folder.text(file) for file in found})

    @classmethod
    def of_run(cls, store: Store) -> Self:
        return cls(json.loads(store.read(KEPT_NAME)) if store.exists(KEPT_NAME) else {})

    def keep(self, store: Store) -> None:
        store.replace(KEPT_NAME, json.dumps(self.files, indent=1).encode())

    def fields(self, name: str) -> dict[str, Any]:
        """Of a JSON file; {} if it is not there."""
        return json.loads(self.files.get(name, "{}"))


@dataclass(frozen=True)
class RunText:
    """How a run's model begins and ends a text; `raynium sample` and exported folders both follow it.

    begins_anew: whether the model was trained with the end-of-document token before every text, as pretraining does.
    Other tasks render what they learn, and leave the tokenizer as it came. rendered_by: the chat template of what it
    learned, if that had one.
    """

    model: ModelSection
    tokenizer: Tokenizer
    described: Described
    begins_anew: bool = True
    rendered_by: ChatTemplate | None = None

    @classmethod
    def of_checkpoint(cls, ref: CheckpointRef, model: ModelSection) -> Self:
        """Of the run that saved it."""
        config = ref.manifest.state.get("config")
        task = config.get("task", "pretraining") if isinstance(config, dict) else "pretraining"
        rendered_by = ChatTemplate.load(reader(ref.store), ref.store.url)
        return cls(model, Tokenizer.kept(ref.store), Described.of_run(ref.store), task == "pretraining", rendered_by)

    @property
    def start(self) -> int:
        """The token before every text."""
        return self.tokenizer.end_of_document_id

    def prompt(self, text: str) -> list[int]:
        """Token ids of a text to go on with, as the exported tokenizer gives them. Special tokens in it are meant.

        ConfigError for bytes that are no UTF-8.
        """
        _refuse_bytes(text)
        return self._exported.encode(text).ids

    def markup(self, text: str) -> list[int]:
        """Token ids of what a chat template rendered, which itself begins the text. Raises as `prompt`."""
        _refuse_bytes(text)
        [(ids, _)] = self.tokenizer.encode_markup([text])
        return ids.tolist()

    @property
    def chat_template(self) -> ChatTemplate | None:
        """That of the data which the run trained on, or of an imported model; None if there is neither."""
        return self.rendered_by or self._template_that_came

    @property
    def _template_that_came(self) -> ChatTemplate | None:
        files = {name: text.encode() for name, text in self.described.files.items()}
        return ChatTemplate.load(files.get, KEPT_NAME)

    @property
    def ends(self) -> list[int]:
        """The tokens that end a text: what training put after one or after an answer, and those that an imported model
        brought along.
        """
        return _listed(self.generation["eos_token_id"])

    @property
    def silent(self) -> list[int]:
        """The tokens that are never drawn."""
        return self.generation.get("suppress_tokens") or []

    @cached_property
    def generation(self) -> dict[str, Any]:
        """generation_config.json. An imported one as it came, with our ends of a document and of an answer."""
        config, fields = self.described.fields(_CONFIG), self.described.fields(_GENERATION)
        if self.described.files:
            fields = fields or {name: config[name] for name in _IDS if name in config}
            eos = fields.get("eos_token_id", config.get("eos_token_id"))
            return fields | {"eos_token_id": self._with_own_ends(eos)}
        # A model's vocabulary may be padded: ids that the tokenizer does not have stand for no text.
        padding = list(range(self.tokenizer.vocab_size, self.model.vocab_size))
        ends = {"bos_token_id": self.start, "eos_token_id": self._with_own_ends(self.start)}
        return ends | ({"suppress_tokens": padding} if padding else {})

    def _with_own_ends(self, ids: Any) -> Any:
        lacking = [each for each in (self.start, self._answer_end) if each is not None and each not in _listed(ids)]
        return [*_listed(ids), *lacking] if lacking else ids

    @property
    def _answer_end(self) -> int | None:
        """The special token that the template puts after an answer; None where it puts another text there."""
        try:
            end = "" if self.rendered_by is None else self.rendered_by.answer_end()
        except TemplateRefusal:
            return None
        [(ids, _)] = self.tokenizer.encode_markup([end])
        # A text that only spells a special token is other tokens.
        special = len(ids) > 0 and ids[0] not in self.tokenizer.encode(self.tokenizer.decode(ids[:1]))
        return int(ids[0]) if special else None

    def files(self, dtype: Dtype) -> dict[str, bytes]:
        """The small files of an exported folder, by name."""
        config = config_from_model(self.model, dtype=dtype, end_of_document_id=self.start)
        came = self.described.fields(_CONFIG)
        if came:
            config = {name: value for name, value in config.items() if name not in _IDS}
            config |= {name: came[name] for name in _IDS if name in came}
        made = {_CONFIG: config, _TOKENIZER: self._tokenizer_config(), TOKENIZER_NAME: self._tokenizer_json}
        if self.generation != self.described.fields(_GENERATION):
            made[_GENERATION] = self.generation
        texts = dict(self.described.files)
        theirs = self._template_that_came
        if self.rendered_by is not None and (theirs is None or theirs.templates != self.rendered_by.templates):
            templates = self.rendered_by.templates
            texts.pop(TOOLS_FILE, None)
            made[_TOKENIZER].pop("chat_template", None)
            if [*templates] == ["default"]:
                texts[_CHAT_TEMPLATE] = templates["default"]
            else:
                texts.pop(_CHAT_TEMPLATE, None)
                named = [{"name": name, "template": text} for name, text in templates.items()]
                made[_TOKENIZER]["chat_template"] = named
        texts |= {name: _json(fields) for name, fields in made.items()}
        return {name: text.encode() for name, text in texts.items()}

    def _tokenizer_config(self) -> dict[str, Any]:
        name_of = self._exported.id_to_token
        bos = _listed(self.described.fields(_CONFIG).get("bos_token_id", self.start))
        own = {
            "bos_token": name_of(bos[0]) if bos else None,
            "eos_token": name_of(self.ends[0]),
            "model_max_length": self.model.max_seq_len,
        } | self.described.fields(_SPECIAL_TOKENS)
        came = self.described.fields(_TOKENIZER) or own
        return {
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            **{name: value for name, value in came.items() if name not in _REBUILDING},
            # This class takes tokenizer.json as it is, in every release.
            "tokenizer_class": "PreTrainedTokenizerFast",
        }

    @cached_property
    def _exported(self) -> tokenizers.Tokenizer:
        return tokenizers.Tokenizer.from_str(json.dumps(self._tokenizer_json))

    @cached_property
    def _tokenizer_json(self) -> dict[str, Any]:
        """The run's tokenizer.json, which begins a text as training did, and neither cuts nor fills it."""
        fields = json.loads(self.tokenizer.file_text)
        if not self.begins_anew:
            return fields | {"truncation": None, "padding": None}
        name = self.tokenizer.end_of_document
        came = fields.get("post_processor") or {}
        offsets = [each for each in came.get("processors", [came]) if each.get("type") == "ByteLevel"]

        def begun(sequence: str, type_id: int) -> list[dict[str, Any]]:
            start = {"SpecialToken": {"id": name, "type_id": type_id}}
            return [start, {"Sequence": {"id": sequence, "type_id": type_id}}]

        begin = {
            "type": "TemplateProcessing",
            "single": begun("A", 0),
            "pair": begun("A", 0) + begun("B", 1),
            "special_tokens": {name: {"id": name, "ids": [self.start], "tokens": [name]}},
        }
        processor = {"type": "Sequence", "processors": [*offsets, begin]} if offsets else begin
        return fields | {"post_processor": processor, "truncation": None, "padding": None}


def _refuse_bytes(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            [f"the prompt {text!a} holds bytes that are no UTF-8; check the locale (LC_ALL=C.UTF-8 is right)"]
        ) from error


def described_model(
    folder: Folder, tokenizer: str | Path | None, *, end_of_document: str | None = None
) -> tuple[ModelSection, str, RunText]:
    """The model of a folder's config.json, the tokenizer.json to use with it, and how its texts begin and end.

    tokenizer: for a folder without a tokenizer.json. CheckpointError and its kinds; DataError for the tokenizer.
    """
    model = model_from_config(folder.json(_CONFIG), where=folder.path(_CONFIG))
    described = Described.of_folder(folder, vocab_size=model.vocab_size)
    path = folder.path(TOKENIZER_NAME)
    try:
        if tokenizer is None:
            folder.size(TOKENIZER_NAME)
        else:
            local = local_path(tokenizer)
            path = str(local / TOKENIZER_NAME if local.is_dir() else local)
            plain_size(path)
    except (OSError, CheckpointError) as error:
        why = f"cannot read {path}: {error.strerror}" if isinstance(error, OSError) else str(error)
        raise CheckpointError(
            f"{why}. Give this model's tokenizer.json with --tokenizer (transformers "
            "makes one of other files: AutoTokenizer.from_pretrained(…).save_pretrained(…))"
        ) from error
    loaded = Tokenizer.load(path, end_of_document=end_of_document)
    if loaded.vocab_size > model.vocab_size:
        raise CheckpointMismatch(
            f"{path}: the tokenizer has {loaded.vocab_size:,} tokens, the model's vocabulary {model.vocab_size:,}: "
            "they do not belong together"
        )
    return model, path, RunText(model, loaded, described)


def _listed(ids: Any) -> list[Any]:
    if ids is None:
        return []
    return ids if isinstance(ids, list) else [ids]


def _json(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, indent=2, ensure_ascii=False)

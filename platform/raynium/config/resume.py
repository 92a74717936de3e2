"""What a config may change when a run goes on from a checkpoint.

| table   | what it means when the field changed                                                 |
|---------|--------------------------------------------------------------------------------------|
| `FIXED` | refused: the saved weights, moments or data position would mean something else       |
| `NOTED` | allowed and said: the losses are no longer those of an uninterrupted run             |
| `FREE`  | allowed: where, how fast and how safely the same numbers are computed, or what after |

A name stands for itself and for everything below it. Every field of the schema is in exactly one table (a test says
so): a new field has to take a side.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from raynium.config.schema import Config, MixedStore

_WEIGHTS = "the checkpoint's weights have this shape or meaning"
_ADAPTED = "the checkpoint's adapter belongs to the weights in this way"
_POSITION = "the data position counts samples of this kind and order"
_MOMENTS = "the optimizer's moments were gathered with it"

FIXED: Mapping[str, str] = {
    "task": "the checkpoint's moments are of another task",
    "run.seed": _POSITION,
    "model.family": _WEIGHTS,
    "model.vocab_size": _WEIGHTS,
    "model.hidden_size": _WEIGHTS,
    "model.num_layers": _WEIGHTS,
    "model.num_heads": _WEIGHTS,
    "model.num_kv_heads": _WEIGHTS,
    "model.head_dim": _WEIGHTS,
    "model.ffn_size": _WEIGHTS,
    "model.rope_theta": _WEIGHTS,
    "model.rope_scaling": _WEIGHTS,
    "model.norm_eps": _WEIGHTS,
    "model.embeddings": _WEIGHTS,
    "model.init": "the run began with those weights, and does not read others any more",
    "model.init_identity": "the run began with those weights, and does not read others any more",
    "model.add_tokens": _WEIGHTS,
    "adapter.init": "the run began with that adapter, and does not read another any more",
    "adapter.rank": _WEIGHTS,
    "adapter.alpha": _ADAPTED,
    "adapter.rank_stabilised": _ADAPTED,
    "adapter.targets": _ADAPTED,
    "adapter.train_also": _ADAPTED,
    "data.mixture": "the data position counts samples of these stores, by these weights",
    "data.identity": "the data position counts samples of that tokenizer and those tokens",
    "data.heldout_fraction": "documents would move between training and evaluation",
    "data.seq_len": _POSITION,
    "data.shuffle": _POSITION,
    "data.shuffle_lanes": _POSITION,
    "data.shuffle_block_bytes": _POSITION,
    "data.packing": _POSITION,
    "data.too_long": _POSITION,
    "optimizer.betas": _MOMENTS,
    "optimizer.eps": _MOMENTS,
    "train.global_batch_size": _POSITION,
}

NOTED: Mapping[str, str] = {
    "adapter.dropout": "another share of inputs is left out from here on",
    "data.leave_out_steps": "what comes after the checkpoint; what was left out before it stays so",
    "data.stages": "what begins after the checkpoint; what begins before may not change",
    "train.steps": "the learning-rate schedule now ends at another step, so the rate changes from here on",
    "engine.kind": "another engine rounds differently",
    "engine.dtype": "the loss is computed in another precision from here on",
    "optimizer.learning_rate": "the rate changes from here on",
    "optimizer.schedule": "the rate changes from here on",
    "optimizer.warmup_steps": "the rate changes from here on where the warm-up is not over",
    "optimizer.decay_fraction": "the rate changes from here on",
    "optimizer.final_learning_rate_ratio": "the rate changes from here on",
    "optimizer.weight_decay": "weights decay at another pace from here on",
    "optimizer.clip_norm": "gradients are clipped elsewhere from here on",
    "preference.beta": "the loss is another from here on",
    "preference.label_smoothing": "the loss is another from here on",
    "preference.weight": "the loss is another from here on",
}

# The checkpoint was found by run.name; model.max_seq_len is a bound and no weight, and model.init_std is used at step 0
# only. Whatever data.path, data.source and how its records are read say, data.identity says what must be there; and
# train.steps how long train.epochs is.
FREE = (
    *("run.name", "run.root", "cluster", "model.max_seq_len", "model.init_std"),
    *("data.path", "data.source", "data.text_field", "data.dedup", "data.aws_profile"),
    *("data.tokenizer", "data.end_of_document", "data.max_left_out"),
    *("data.records", "data.fields", "data.chat_template", "data.train_on", "train.epochs"),
    *("data.max_epochs", "data.access", "data.cache_bytes"),
    "parallel",
    "engine.activation_checkpointing",
    "engine.compile",
    "engine.fsdp",
    "train.micro_batch_size",
    "checkpoint",
    "evaluate",
    "tracking",
    "fault",
    "preflight",
    "sample",
)

# A field that a change is not taken back in, but elsewhere.
_REMEDIES = {"data.identity": "Give the data.path of a store with the data of then, wherever it lies"}


def resume_conflicts(saved: Mapping[str, Any], now: Config, *, step: int) -> list[str]:
    """Why the checkpoint of the config `saved` cannot go on with the config `now`; [] when it can.

    saved: the resolved config of the checkpoint in its stored form (`model_dump(mode="json")`). Fields it lacks,
        because an older Raynium wrote it, are not compared.
    now: resolved too, so that paths compare. step: of the checkpoint.
    """
    return [
        *_mixture_conflicts(saved.get("data", {}), now, step),
        *_field_conflicts(saved, now),
    ]


def _field_conflicts(saved: Mapping[str, Any], now: Config) -> Iterator[str]:
    for name, before, after, reason in _changes_in(FIXED, saved, now):
        # Before it was looked at, or by an older Raynium that did not: there is nothing to compare.
        unknown = name in ("data.identity", "model.init_identity") and None in (before, after)
        if name != "data.mixture" and not unknown:
            yield (
                f"{name} is {_shown(after)}, but the checkpoint was trained with {_shown(before)}: {reason}. "
                f"{_REMEDIES.get(name, f'Set {name} back to {_shown(before)}')}, or give the run another run.name "
                "to start anew"
            )


def _mixture_conflicts(saved: Mapping[str, Any], now: Config, step: int) -> Iterator[str]:
    """Stores are compared by weight and identity, wherever they lie; stages, if they begin by `step`."""
    mixture = now.data.model_dump(mode="json")["mixture"]
    before = saved.get("mixture", [])
    weights = [[store["weight"] for store in stores] for stores in (before, mixture)]
    if weights[0] != weights[1]:
        yield (
            f"data.mixture has the weights {weights[1]}, but the checkpoint was trained with {weights[0]}: "
            f"{FIXED['data.mixture']}. Set them back, and give the weights from step {step + 1} on as a stage in "
            "data.stages; or give the run another run.name to start anew"
        )
    else:
        for old, new in zip(before, mixture, strict=True):
            if None not in (old["identity"], new["identity"]) and old["identity"] != new["identity"]:
                yield (
                    f"data.mixture has {new['store']} with the identity {new['identity']}, but the checkpoint was "
                    f"trained with {old['identity']} from {old['store']}: {FIXED['data.identity']}. Give the store "
                    "with the data of then, wherever it lies, or give the run another run.name to start anew"
                )
    begun = [_stages_by(step, data) for data in (saved, now.data.model_dump(mode="json"))]
    if begun[0] != begun[1]:
        yield (
            f"data.stages has {_shown(begun[1])} up to step {step} ([from_step, weights] of each), but the checkpoint "
            f"was trained with {_shown(begun[0])}: {_POSITION}. Set these back (stages that begin after step {step} "
            "may change), or give the run another run.name to start anew"
        )


def _stages_by(step: int, data: Mapping[str, Any]) -> list[list[Any]]:
    """[from_step, weights in the order of the mixture] of the stages that begin by `step`."""
    names = [MixedStore.model_validate(store).name for store in data.get("mixture", [])]
    return [
        [stage["from_step"], [stage["weights"].get(name) for name in names]]
        for stage in data.get("stages", [])
        if stage["from_step"] <= step
    ]


def resume_notes(saved: Mapping[str, Any], now: Config) -> list[str]:
    """Changes that are allowed, and that a user must be told of: one line each, to be logged when the run resumes."""
    notes = [
        f"{name} changed from {_shown(before)} to {_shown(after)}: {effect}"
        for name, before, after, effect in _changes_in(NOTED, saved, now)
    ]
    if "data" in saved and None in _identities(saved["data"]):
        notes.append(
            "the checkpoint does not say which data it was trained on, since an older Raynium wrote it: whether the "
            "run goes on with the same is not checked"
        )
    return notes


def _identities(data: Mapping[str, Any]) -> list[str | None]:
    """Of the stores that a checkpoint was trained with; None for one that it does not know."""
    return [store.get("identity") for store in data.get("mixture") or [data]]


def when_resumed(name: str) -> str:
    """What becomes of a change of this field when a run goes on from a checkpoint, in words."""
    parts = name.split(".")
    names = [".".join(parts[:depth]) for depth in range(len(parts), 0, -1)]
    for table, words in ((FIXED, "may not change"), (NOTED, "may change")):
        if found := [table[each] for each in names if each in table]:
            return f"{words}: {found[0]}"
    return "may change"


def _changes_in(table: Mapping[str, str], saved: Mapping[str, Any], now: Config) -> Iterator[tuple[str, Any, Any, str]]:
    """(field, before, after, the table's words) of every field of the table that both have and that differs."""
    values_now = now.model_dump(mode="json")
    for name, words in table.items():
        section, _, key = name.rpartition(".")
        before, after = (saved.get(section, {}), values_now[section]) if section else (saved, values_now)
        # Steps are not known before the data is there, where epochs are given in their place.
        unsettled = name == "train.steps" and after[key] is None
        if key in before and before[key] != after[key] and not unsettled:
            yield name, before[key], after[key], words


def _shown(value: Any) -> str:
    return json.dumps(value)

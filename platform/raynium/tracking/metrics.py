"""The names under which a run reports. They are an interface: dashboards, the SDK and people's notebooks read them.

A name is `area/name_unit`. Only these are accepted, so a renamed or misspelt metric fails in a test, not in a chart.
The x axis is the optimizer step. Losses are token-weighted means over all ranks and micro-batches.
"""

import difflib
from collections.abc import Mapping
from numbers import Real

METRICS: dict[str, str] = {
    "train/loss": "nats per token: cross-entropy of the step, before its update",
    "train/grad_norm": "L2 norm over all parameters, before clipping",
    "train/learning_rate": "rate used by this step's update",
    "train/left_out_steps": "steps since step 0 whose update was left out: bad ones, and data.leave_out_steps",
    "train/tokens": "tokens that steps were given since step 0, over all ranks, what fills packed rows up too",
    "train/samples": "sequences trained on since step 0, over all ranks",
    "data/requests": "requests that rank 0 made for streamed training data since it started",
    "data/fetched_bytes": "bytes that rank 0 fetched with them, also for ranks of its node; not those fetched for it",
    "data/used_bytes": "bytes of the streamed rows that it trained on since it started, as they are stored",
    "data/wait_seconds": "seconds since it started until the blocks that its steps read were fetched and at hand",
    "eval/loss": "the task's loss on held-out documents: nats per token that is learned, or what docs/tasks.md says",
    "eval/perplexity": "the exponential of eval/loss: of tokens that an answer chooses from, as it were",
    "eval/bits_per_byte": "bits per byte of the held-out documents' text; does not depend on the tokenizer",
    "rewards/chosen": "reward of the preferred answers, mean over the step's pairs: beta × (log p - its reference)",
    "rewards/rejected": "reward of the other answers",
    "rewards/margins": "what the preferred answers have more",
    "rewards/accuracies": "fraction of the pairs in which they have more",
    "eval/rewards_chosen": "rewards/chosen, mean over the held-out pairs",
    "eval/rewards_rejected": "rewards/rejected of these",
    "eval/rewards_margins": "rewards/margins of these",
    "eval/rewards_accuracies": "rewards/accuracies of these",
    "time/step_seconds": "seconds from the start of this step to its end, checkpoints and evaluation excluded",
    "time/data_seconds": "seconds of the step spent waiting for the loader",
    "time/slowest_rank_seconds": "seconds of a step that the slowest rank needs itself, without waiting for others",
    "time/median_rank_seconds": "the same of the middle rank; each is a rank's median over 20 steps, data included",
    "time/rank_spread_seconds": "what the slowest rank needs more than the fastest",
    "time/eval_seconds": "seconds spent in the evaluation",
    "throughput/tokens_per_second": "tokens per second that are labels, over all ranks",
    "throughput/tokens_per_second_per_rank": "tokens per second of one rank",
    "throughput/peak_flops_per_rank": "FLOP/s: the dense peak that both MFUs are shares of",
    "throughput/mfu_6n": "fraction of peak FLOP/s, at 6 FLOPs per parameter and token",
    "throughput/mfu_with_attention": "fraction of peak FLOP/s, attention's score and value products included",
    "device/fallback_operators": "operators that ran on the CPU for want of one on the accelerator, on rank 0 so far",
    "device/utilization_ratio": "fraction of the time the cores computed, mean over all cores of all nodes",
    "device/lowest_utilization_ratio": "the same of the core that computed least",
    "device/highest_utilization_ratio": "the same of the core that computed most",
    "device/flops_per_second": "FLOP per second that the devices counted, over all cores of all nodes",
    "device/flops_to_estimate_ratio": "those, as a fraction of the FLOP/s behind throughput/mfu_with_attention",
    "device/memory_used_bytes": "bytes of device memory in use, of the core that uses most",
    "device/memory_tensors_bytes": "of those, bytes of tensors",
    "device/memory_constants_bytes": "of those, bytes of the graphs' constants",
    "device/memory_model_code_bytes": "of those, bytes of the graphs' code",
    "device/memory_model_shared_scratchpad_bytes": "of those, bytes of the graphs' intermediate values",
    "device/memory_runtime_memory_bytes": "of those, bytes of the runtime itself",
    "device/ecc_corrected_errors": "memory errors that were corrected, over all devices since the run's agents started",
    "device/ecc_uncorrected_errors": "memory errors that were not: results since then may be wrong; replace that node",
    "device/execution_errors": "executions that failed or could not start, since the run's agents started",
    "device/execution_timeouts": "executions that did not end in time, since the run's agents started",
    "device/reporting_nodes": "nodes whose devices the device/ metrics of this point cover",
    "compile/graphs": "graphs rank 0 has compiled since it started; it stays the same once every shape was seen",
    "compile/seconds": "seconds of rank 0 that this took, loads from the compile cache included",
    "memory/device_peak_bytes": "bytes: largest allocation on rank 0's device so far",
    "checkpoint/stall_seconds": "seconds rank 0's training loop stood still for this save",
    "checkpoint/wait_seconds": "of those, seconds it waited because all images were still being uploaded",
    "checkpoint/skipped_saves": "saves left out since the last start, because all images were still being uploaded",
    "snapshot/stall_seconds": "seconds rank 0's training loop stood still for a snapshot between checkpoints",
    "checkpoint/longest_stall_seconds": "seconds the training loop stood still for this save, of the slowest rank",
    "checkpoint/upload_seconds": "seconds from the snapshot until all of it was in the store, confirmed",
    "checkpoint/commit_seconds": "seconds from then on until its manifest was checked and ready to be written",
    "checkpoint/bytes": "bytes of the committed checkpoint, over all ranks",
    "run/generation": "number of the generation (one life of the ranks) that computed this step",
    "goodput/ratio": "fraction of the wall time since the run was first claimed that is goodput/train_seconds",
    "goodput/wall_seconds": "seconds since then: the sum of those below, of which each second is in exactly one",
    "goodput/train_seconds": "seconds of rank 0 in steps that the run had not taken before, without their compilations",
    "goodput/compile_seconds": "seconds of rank 0 in which steps and evaluations waited for a graph to be compiled",
    "goodput/evaluate_seconds": "seconds of evaluations",
    "goodput/save_seconds": "seconds the training loop stood still for checkpoints",
    "goodput/repeat_seconds": "seconds in steps that were lost with a failure, and computed again",
    "goodput/load_seconds": "seconds from a driver's first order to its first step: processes, checkpoint, first batch",
    "goodput/notice_seconds": "seconds from the last that a generation did until it was known to have failed",
    "goodput/wait_seconds": "seconds after a failure in which nodes or their agents were missing",
    "goodput/restart_seconds": "seconds from when a failure was known to the next generation's order, save those",
    "goodput/restore_seconds": "seconds from that order to its first step: processes, state, first batch",
    "goodput/start_seconds": "seconds from a driver's claim to its first generation's order: data, preflight, nodes",
    "goodput/finish_seconds": "seconds after the last step and save: the last upload, results, the end of processes",
    "goodput/down_seconds": "seconds in which no driver had the run: until somebody started it again",
    "goodput/other_seconds": "seconds of none of these: between steps, and messages on their way",
}

# Of one store of a mixture or of evaluate.sets, or of a file of questions, whose name stands for the star.
METRICS_OF_STORES: dict[str, str] = {
    "eval/*/loss": "nats per token: eval/loss on the held-out documents of that store",
    "eval/*/perplexity": "the exponential of that",
    "eval/*/bits_per_byte": "bits per byte of those documents' text",
    "eval/*/rewards_chosen": "eval/rewards_chosen of the held-out pairs of that store",
    "eval/*/rewards_rejected": "eval/rewards_rejected of these",
    "eval/*/rewards_margins": "eval/rewards_margins of these",
    "eval/*/rewards_accuracies": "eval/rewards_accuracies of these",
    "eval/*/acc": "share of that file's questions whose right choice is the likeliest (evaluate.tasks)",
    "eval/*/acc_norm": "share of those whose right choice is the likeliest for each byte of its text",
    "data/*/tokens": "tokens of that store trained on since step 0, over all ranks, without what fills packed rows up",
    "data/*/epochs": "how often the rows of that store were gone through since step 0",
}

# MLflow sorts charts by area. What is neither learned nor the speed of it comes after these by a word that sorts later.
# Only MLflow knows the longer names.
FIRST_AREAS = ("train", "eval", "rewards", "throughput")
LAST_IN_MLFLOW = "vitals/"

# Of these a point is one where the value changes; given is the one they start from, if all do from the same. The rest
# would be charts of a level line.
STEADY: dict[str, float | None] = {
    "throughput/peak_flops_per_rank": None,
    "checkpoint/bytes": None,
    "device/reporting_nodes": None,
    "run/generation": 1.0,
    **dict.fromkeys((name for name in METRICS if name.startswith("goodput/") and name != "goodput/ratio"), 0.0),
    **dict.fromkeys((name for name in METRICS if name.startswith("compile/") or name.endswith("_errors")), 0.0),
    **dict.fromkeys(
        ("checkpoint/skipped_saves", "train/left_out_steps", "device/execution_timeouts", "device/fallback_operators"),
        0.0,
    ),
}


def name_in_mlflow(name: str) -> str:
    return name if name.partition("/")[0] in FIRST_AREAS else f"{LAST_IN_MLFLOW}{name}"


def unknown_metric(name: str) -> str | None:
    """What is wrong with a name that is neither one of METRICS nor of METRICS_OF_STORES; None of one that is."""
    area, _, rest = name.partition("/")
    if name in METRICS or (f"{area}/*/{rest.rpartition('/')[2]}" in METRICS_OF_STORES and rest.count("/") == 1):
        return None
    near = difflib.get_close_matches(name, METRICS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "they are in METRICS of tracking/metrics.py, with their units"
    return f"metric {name!r} is not one of the names a run reports under; {hint}"


def check_metrics(metrics: Mapping[str, float]) -> None:
    """Raise ValueError unless every name is a run's and every value a real number (nan and inf are allowed)."""
    if not metrics:
        raise ValueError("no metrics given: a point needs at least one name and value")
    for name, value in metrics.items():
        if problem := unknown_metric(name):
            raise ValueError(problem)
        if isinstance(value, bool) or not isinstance(value, Real):
            raise ValueError(f"metric {name!r} = {value!r} ({type(value).__name__}) is not a number; pass int or float")

"""`raynium sample` and `raynium evaluate`: what a run's model says."""

from typing import Annotated

import typer
from typer import Argument, Option

from raynium.cli.names import CheckpointArgument, JsonOption, RootOption, StepOption, print_json, split_name

TemperatureOption = Annotated[float, Option(min=0.0, help="0: the likeliest token each time.")]
TopPOption = Annotated[
    float, Option(help="Draw only the likeliest tokens that together have this probability.", max=1.0)
]
PenaltyOption = Annotated[float, Option(help="Above 1: tokens that the text already holds become less likely.")]
SeedOption = Annotated[int, Option(min=0, help="Of the first text; the next has the next.")]


def sample(
    name: CheckpointArgument,
    prompts: Annotated[list[str] | None, Argument(metavar="[PROMPT]...", help="The texts to continue.")] = None,
    root: RootOption = "runs",
    step: StepOption = None,
    max_new_tokens: Annotated[int, Option(min=1)] = 120,
    temperature: TemperatureOption = 0.8,
    top_p: TopPOption = 1.0,
    repetition_penalty: PenaltyOption = 1.0,
    stop: Annotated[list[str] | None, Option(help="A text that ends the continuation; may be given again.")] = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Continue prompts with a run's model."""
    from raynium.generation.drawing import Drawing
    from raynium.sdk import find_run

    name, step = split_name(name, step)
    drawing = Drawing(max_new_tokens, temperature, top_p, repetition_penalty, seed, stop or ())
    sampler = find_run(name, root).sampler(step)
    prompts = prompts or [""]
    if len(prompts) == 1 and not as_json:
        # The prompt is judged before it is printed.
        context = sampler.texts.prompt(prompts[0])
        typer.echo(prompts[0], nl=False)
        for piece in sampler.pieces(sampler.begin([context], drawing)):
            typer.echo(piece.text, nl=False)
        typer.echo()
        return
    answers = sampler.answers(prompts, drawing)
    if as_json:
        shown = ({"prompt": each.prompt, "text": each.text, "tokens": len(each.tokens)} for each in answers)
        print_json([fields | {"ended": each.ended} for fields, each in zip(shown, answers, strict=True)])
        return
    typer.echo("\n----------\n".join(each.prompt + each.text for each in answers))


def evaluate(
    name: CheckpointArgument,
    task: Annotated[list[str], Option(help="A .jsonl of questions (context, choices, answer); may be given again.")],
    root: RootOption = "runs",
    step: StepOption = None,
    limit: Annotated[int | None, Option(min=1, help="So many questions of each file.")] = None,
    track: Annotated[bool, Option("--track", help="Write the results into the run's MLflow page, too.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Let a run's model answer multiple choice."""
    from raynium.sdk import find_run

    name, step = split_name(name, step)
    found = find_run(name, root).evaluate(*task, step=step, limit=limit, track=track)
    if as_json:
        print_json(found)
        return
    names = sorted({metric.split("/")[1] for metric in found})
    width = max(len("task"), *map(len, names))
    typer.echo(f"{'task':{width}}  {'acc':>8}  {'acc_norm':>8}")
    for each in names:
        typer.echo(f"{each:{width}}  {found[f'eval/{each}/acc']:8.4f}  {found[f'eval/{each}/acc_norm']:8.4f}")

"""`raynium sample`, `raynium chat` and `raynium evaluate`: what a run's model says."""

import os
import sys
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from raynium.cli.names import CheckpointArgument, JsonOption, RootOption, StepOption, print_json, split_name

if TYPE_CHECKING:
    from raynium.generation.chat import Chat

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


HELP = """\
/system TEXT  what the system says; without a text, nothing
/reset        begin anew; what the system says stays
/save FILE    append the chat to a file, as a record to train on
/help         this
Ctrl-C ends an answer, Ctrl-D (or the end of the input) the chat. A space before a / sends it as text."""


def chat(
    name: CheckpointArgument,
    root: RootOption = "runs",
    step: StepOption = None,
    system: Annotated[str | None, Option(help="What the system says.")] = None,
    max_new_tokens: Annotated[int, Option(min=1, help="Of one answer.")] = 512,
    temperature: TemperatureOption = 0.8,
    top_p: TopPOption = 1.0,
    repetition_penalty: PenaltyOption = 1.0,
    seed: SeedOption = 0,
) -> None:
    """Talk to a run's model, by its chat template."""
    from raynium.errors import ConfigError
    from raynium.generation.chat import open_chat
    from raynium.generation.drawing import Drawing
    from raynium.sdk import find_run

    name, step = split_name(name, step)
    drawing = Drawing(max_new_tokens, temperature, top_p, repetition_penalty, seed)
    talk = open_chat(find_run(name, root).url, drawing, step=step, system=system)
    typer.echo(f"{name}@{talk.sampler.step}, which reads {talk.max_seq_len:,} tokens; /help says what you can do")
    while (line := _asked()) is not None:
        if line.startswith("/"):
            _command(talk, line)
        elif line.strip():
            try:
                _answer(talk, line)
            except ConfigError as error:
                typer.secho(str(error), fg="red", err=True)


def _asked() -> str | None:
    """What the person types; None once that is over. Ctrl-C forgets the line."""
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return None
        except KeyboardInterrupt:
            typer.echo("\n(Ctrl-D ends the chat)")


def _answer(talk: "Chat", text: str) -> None:
    # The chat goes on with what was said until Ctrl-C.
    with suppress(KeyboardInterrupt), closing(talk.say(text)) as pieces:
        for piece in pieces:
            typer.echo(piece, nl=False)
            sys.stdout.flush()
    typer.echo()
    if talk.ended == "interrupted":
        typer.echo("(interrupted)")
    elif talk.ended == "length":
        typer.echo("(cut off: --max-new-tokens makes answers longer)")
    elif talk.ended == "full":
        typer.echo(f"(cut off: the chat has the {talk.max_seq_len:,} tokens that the model reads; /reset begins anew)")


def _command(talk: "Chat", line: str) -> None:
    command, _, rest = line.partition(" ")
    rest = rest.strip()
    if command == "/system":
        talk.system = rest or None
        typer.echo("(the system says that from now on)" if rest else "(the system says nothing)")
    elif command == "/reset":
        talk.reset()
        typer.echo("(a new chat)")
    elif command == "/save" and rest:
        try:
            with open(os.path.expanduser(rest), "a", encoding="utf-8") as file:
                file.write(talk.record())
            typer.echo(f"(appended to {rest})")
        except OSError as error:
            typer.secho(f"{rest} cannot be written: {error.strerror}", fg="red", err=True)
    else:
        typer.echo(HELP if command == "/help" else f"{line!r} is no command.\n{HELP}")

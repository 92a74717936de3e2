"""The part of the schema that says what a model is judged by; see `schema.py`."""

from typing import Annotated

from raynium.config.section import Documents, Location, PositiveInt, Section, Steps, Unit


class EvaluateSection(Section):
    """What the model is judged by while it trains: held-out documents, and files of questions."""

    every_steps: Steps = 100
    """Evaluate after each multiple of it, and at the end."""
    max_documents: Documents = 64
    """Held-out documents that are read each time; the same ones. Of a mixture and of sets, of each store."""
    sets: tuple[Location, ...] = ()
    """Other document stores whose held-out documents are evaluated too, each alone, as eval/<name>/loss: a folder or an
    s3:// URL, whose last part is the name."""
    tasks: tuple[Location, ...] = ()
    """Files of multiple-choice questions, a JSON object {context, choices, answer} in each line, here or at s3://:
    eval/<name>/acc is the share of right answers by likelihood, acc_norm by likelihood for each byte."""
    max_questions: Annotated[PositiveInt, Unit("questions")] | None = None
    """Of each file, the first so many. null: all."""
    patience: Annotated[PositiveInt, Unit("evaluations")] | None = None
    """End the run, as finished, after so many evaluations in a row without a better checkpoint.best_metric."""

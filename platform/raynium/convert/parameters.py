"""Which parameters a model has, by Hugging Face's names, and how a set of tensors differs from that. Needs torch."""

import re
from collections.abc import Mapping

import torch

from raynium.config.schema import ModelSection
from raynium.errors import CheckpointMismatch, some
from raynium.models.decoder import Decoder
from raynium.models.names import hugging_face_names

# By Hugging Face's name.
Shapes = Mapping[str, tuple[int, ...]]


def parameter_shapes(model: ModelSection) -> Shapes:
    """The shape of every parameter; tied embeddings once."""
    with torch.device("meta"):
        decoder = Decoder(model.model_copy(update={"num_layers": 1}))
    shapes = {name: tuple(parameter.shape) for name, parameter in decoder.named_parameters()}
    # All blocks are alike, and a config.json may speak of thousands.
    names = hugging_face_names(model)
    return {theirs: shapes[re.sub(r"^blocks\.\d+\.", "blocks.0.", ours)] for ours, theirs in names.items()}


def check_shapes(found: Shapes, expected: Shapes, *, where: str, described_by: str) -> None:
    """CheckpointMismatch naming what `found` lacks, has too much, or has in another shape."""
    problems = []
    if missing := [name for name in expected if name not in found]:
        problems.append(f"lacks {some(missing)}")
    if extra := sorted(found.keys() - expected.keys()):
        problems.append(f"has {some(extra)}, which the model does not have")
    other = [
        f"{name} as {list(found[name])} instead of {list(expected[name])}"
        for name in expected
        if name in found and found[name] != expected[name]
    ]
    if other:
        problems.append(f"has {some(other)}")
    if problems:
        raise CheckpointMismatch(f"{where} is not the model that {described_by} describes: it {'; it '.join(problems)}")

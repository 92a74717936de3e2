"""The section of a config that says which few numbers learn beside weights that do not."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from raynium.config.section import Accepts, FractionBelowOne, Location, PositiveFloat, PositiveInt, Section, Unit


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


class AdapterSection(Section):
    """LoRA (arXiv 2106.09685): the model's weights stay as they are, in engine.dtype, and each adapted matrix W learns
    a sum, W + scale × B·A, of two thin matrices in float32. Only those, and what train_also names, have gradients and
    an optimizer and are saved; the run's checkpoints say which weights they belong to.
    """

    rank: Annotated[PositiveInt, Unit("rows")] | None = None
    """Rows of A and columns of B. null: no adapter, all weights learn."""
    alpha: PositiveFloat = 16.0
    """The scale is alpha / rank."""
    rank_stabilised: bool = False
    """The scale is alpha / sqrt(rank) instead (rsLoRA, arXiv 2312.03732)."""
    dropout: FractionBelowOne = 0.0
    """Share of the adapted matrices' inputs that A does not see in a step. Which they are follows from run.seed, the
    step, the sample, the layer and the place: a resume and any layout leave out the same."""
    targets: Annotated[
        tuple[str, ...], BeforeValidator(_as_tuple), Accepts("a list of names, or all-linear for all of them")
    ] = ("all-linear",)
    """The matrices of each block that are adapted, by PEFT's names: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj,
    down_proj; all-linear stands for all seven."""
    train_also: tuple[Literal["embedding", "head"], ...] = ()
    """What learns whole beside the adapter. Tied embeddings are one matrix, whichever is named."""
    init: Location | None = None
    """An adapter to begin with, at step 0: a folder as PEFT writes it, local or at s3://, of the same rank, scale and
    targets; all nodes must see it. null: A is drawn by run.seed, and B is 0."""

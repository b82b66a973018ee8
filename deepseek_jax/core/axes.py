"""The vocabulary: mesh axes, logical axis names of weights and activations. Strings only."""

import dataclasses

# Outer to inner; all seven always exist, size 1 when unused. `slice` is the slow network.
MESH_AXES = ("slice", "stage", "data", "fsdp", "context", "expert", "tensor")

# Every mesh axis that carries batch rows outside the experts.
BATCH_AXES = ("slice", "data", "fsdp", "expert")

# `layers` are stacked repeats of a block, scanned over; `head` is the width of one head, `router` a
# router's outputs: experts or groups, never sharded; nor are `patch` (a pixel of a patch, a
# convolution's tap or channel) and `position` (a place in an image or a row).
WEIGHT_AXES = {
    "layers", "vocab", "embed", "heads", "kv_heads", "head", "q_rank", "kv_rank", "mlp",
    "experts", "experts_over_slices", "expert_mlp", "router", "patch", "position",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """What a weight's dimensions mean: `axes` has a member of WEIGHT_AXES for each.

    A matmul sums over `reduced` (Muon's inputs, the quantizer's blocks) and produces `outputs`;
    dimensions in neither are batches of matrices (stacked layers, experts). Both empty: not a
    matrix (norm scales, biases).
    """

    axes: tuple[str, ...]
    reduced: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()

    def __post_init__(self):
        if unknown := set(self.axes) - WEIGHT_AXES:
            raise ValueError(f"unknown weight axes {sorted(unknown)}; core/axes.py lists them")

    def stacked(self) -> "Spec":
        """The spec of `repeats` such weights stacked along a new leading dimension."""
        reduced, outputs = (tuple(i + 1 for i in dims) for dims in (self.reduced, self.outputs))
        return Spec(axes=("layers", *self.axes), reduced=reduced, outputs=outputs)

    def unstacked(self) -> "Spec":
        """The spec of one of the weights that `stacked` stacked."""
        reduced, outputs = (tuple(i - 1 for i in dims) for dims in (self.reduced, self.outputs))
        return Spec(axes=self.axes[1:], reduced=reduced, outputs=outputs)

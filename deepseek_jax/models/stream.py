"""A stream of sound: causal convolutions that take a wave in pieces, of any lengths, as it comes.

Waves are Float[Array, "B T"]. What pieces give, one after another, is what the whole wave gives:
between them go the inputs that later windows still read (and nothing else). A frame depends on no
later sample than its own last.
"""

import dataclasses
import math

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from deepseek_jax.layers.conv import Convolution
from deepseek_jax.layers.encoder import Activation, Encoded
from deepseek_jax.layers.linear import Dtypes, Projection

State = tuple[Array, ...]  # each convolution's inputs that are still read, [B, some, C]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stream:
    """Causal convolutions, each with a norm over a frame's channels, then a projection."""

    convolutions: tuple[tuple[int, int, int], ...] = ((256, 20, 10), (256, 8, 4), (256, 8, 4))
    """(width, size, stride) of each; a size is at least its stride, or samples would be skipped."""
    embed_dim: int = 256
    activation: Activation = "gelu"
    init_scale: float = 0.02

    def __post_init__(self):
        if not self.convolutions or min(min(c) for c in self.convolutions) < 1:
            raise ValueError(f"convolutions {self.convolutions} must have positive numbers.")
        if short := [c for c in self.convolutions if c[1] < c[2]]:
            raise ValueError(f"convolutions {short} have a size below their stride.")

    @property
    def hop(self) -> int:
        """Samples a frame. Pieces of a multiple of it find states of one shape: one program."""
        return math.prod(stride for _, _, stride in self.convolutions)

    @property
    def reach(self) -> int:
        """Samples that a frame sees: its own and those before."""
        count = 1
        for _, size, stride in reversed(self.convolutions):
            count = (count - 1) * stride + size
        return count


def init_state(config: Stream, batch_size: int, dtype: jnp.dtype = jnp.float32) -> State:
    """What stands before a wave: silence, as much as makes the first hop a frame."""
    channels = (1, *(width for width, _, _ in config.convolutions[:-1]))
    return tuple(
        jnp.zeros((batch_size, size - stride, width), dtype)
        for width, (_, size, stride) in zip(channels, config.convolutions, strict=True)
    )


class StreamEncoder(nn.Module):
    """A stream as a module. A whole wave: call it. A piece: `method="step"`, with a state."""

    config: Stream
    dtypes: Dtypes

    def setup(self):
        c, kept = self.config, self.dtypes
        self.convolution = [
            Convolution(*shape, c.activation, kept, norm="layer") for shape in c.convolutions
        ]
        shape, axes = (c.convolutions[-1][0], c.embed_dim), ("patch", "embed")
        self.out = Projection("btf,fd->btd", shape, axes, kept, True)

    def __call__(self, wave: Float[Array, "B T"], keep: bool = False) -> Encoded:
        """floor(T / hop) frames of a whole wave; `keep` adds nothing: there are no blocks."""
        del keep
        state = init_state(self.config, wave.shape[0], self.dtypes.compute)
        return Encoded(self.step(wave, state)[0])

    def step(self, wave: Float[Array, "B T"], state: State) -> tuple[Float[Array, "B W D"], State]:
        """The frames that a piece completes, none perhaps, and the state for the next piece."""
        x, left = wave[..., None].astype(self.dtypes.compute), []
        for conv, before in zip(self.convolution, state, strict=True):
            x = jnp.concatenate([before, x], axis=1)
            y = conv(x)
            left.append(x[:, y.shape[1] * conv.stride :])
            x = y
        return self.out(x), tuple(left)


def stream_example(config: Stream) -> dict[str, Array]:
    """Inputs of the encoder, of one row: a hop of zeros."""
    return {"wave": jnp.zeros((1, config.hop))}

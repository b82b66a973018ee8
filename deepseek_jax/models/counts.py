"""Parameters and FLOPs of a model, counted from its shapes and its formula.

Active parameters: everything but the routed experts that a token does not visit, MTP left out,
embedding and head included. FLOPs: two a multiply-add; matmuls and the causal half of attention.
"""

import functools
import math

import jax

from deepseek_jax.core import tree
from deepseek_jax.core.precision import Precision
from deepseek_jax.layers.attention import GQA
from deepseek_jax.layers.block import Attention
from deepseek_jax.layers.encoder import Transformer
from deepseek_jax.layers.sparse_attention import GatedGQA
from deepseek_jax.models.any_modality import TAKEN
from deepseek_jax.models.audio import Wav2Vec2
from deepseek_jax.models.build import Model, Network, dtypes_of
from deepseek_jax.models.encoder import KINDS
from deepseek_jax.models.fusion import Fused, FusedNetwork, Weighted, example, trunks
from deepseek_jax.models.hybrid import Hybrid
from deepseek_jax.models.networks import ModelConfig, build_network
from deepseek_jax.models.two_tower import Towers
from deepseek_jax.models.vision_language import VisionLanguageModel
from deepseek_jax.ops.convolution import num_windows
from deepseek_jax.ops.sparse import room


def num_params(model: Network) -> tuple[int, int]:
    """(total, active) parameters; total includes MTP layers and excludes router biases."""
    sizes = {path: leaf.size for path, leaf in tree.flatten(model.shapes).items()}
    sizes = {path: size for path, size in sizes.items() if not path.endswith("router/bias")}
    kept = (path for path in sizes if not path.startswith("mtp_"))
    return sum(sizes.values()), sum(_visited(model.config, path, sizes[path]) for path in kept)


def _visited(config: ModelConfig, path: str, size: int) -> int:
    if "/experts/" not in path or config.moe is None:
        return size
    return size * config.moe.router.num_active_experts // config.moe.num_experts


def row_tokens(model: Network, sequence_length: int) -> int:
    """Tokens of one training row: of a pair, the image's patches too; of a wave, its frames; of
    several modalities, all of theirs."""
    if isinstance(model, FusedNetwork):
        return sum(token_counts(model.config, sequence_length).values())
    if isinstance(model.config, Wav2Vec2):
        return model.config.num_frames(sequence_length)
    if isinstance(model, Towers):
        height, width = model.config.image.grid
        return height * width + sequence_length
    return sequence_length


def train_flops_per_token(
    model: Network, sequence_length: int, views: int = 0, windows: int = 0
) -> float:
    """Model FLOPs of one trained token, forward and backward: a mean over a row's tokens.

    A decoder that sees has the work of its encoders and projectors on `views` images and `windows`
    of sound a row. Frozen parts count as if they learned.
    """
    if isinstance(model, FusedNetwork):
        return _fused_flops(model, sequence_length) / row_tokens(model, sequence_length)
    if isinstance(model, Towers):
        return _pair_flops(model, sequence_length) / row_tokens(model, sequence_length)
    if isinstance(model, VisionLanguageModel):
        taken = views * _view_flops(model) + (windows and windows * _window_flops(model))
        return _decoder_flops(model.language, sequence_length) + taken / sequence_length
    if isinstance(model.config, Wav2Vec2):
        return _wave_flops(model, sequence_length) / row_tokens(model, sequence_length)
    return _decoder_flops(model, sequence_length)


def _view_flops(model: VisionLanguageModel) -> float:
    """Of one image, whose joined features alone pass the projector."""
    c, vision = model.config, model.config.vision
    if isinstance(vision, Hybrid):
        return _hybrid_flops(model, vision)
    patches = math.prod(c.grid or (c.max_patches,)) + getattr(vision, "leading", 0)
    tokens = {"vision/": patches, "projector/": c.view_tokens}
    return _encoder_flops(model, vision.transformer, tokens, patches)


def _hybrid_flops(model: VisionLanguageModel, vision: Hybrid) -> float:
    """Of one canvas: of the large view's blocks a few see it all, the others windows."""
    high, tokens = vision.high, math.prod(vision.grid)
    large, window = high.side**2, high.window**2
    filled = (-(-high.side // high.window) * high.window) ** 2
    seen = {"vision/high/": large, "vision/neck/": large, "vision/down_1/": 2 * 4 * tokens}
    seen |= {"vision/down_2/": 2 * tokens, "vision/low/": tokens, "projector/": tokens}
    work = _encoder_flops(model, vision.low.transformer, seen, tokens)
    whole = len(high.whole_layers)
    pairs = whole * large**2 + (high.transformer.num_layers - whole) * filled * window
    return work + 6.0 * 2 * high.transformer.embed_dim * pairs


def _window_flops(model: VisionLanguageModel) -> float:
    """Of one window of sound; the first convolution has twice the frames of the second."""
    ear = model.config.audio
    frames = ear.encoder.num_positions
    tokens = {"audio/encoder/convolution_0/": 2 * frames, "audio/encoder/": frames}
    tokens["audio/projector/"] = ear.window_tokens
    return _encoder_flops(model, ear.encoder.transformer, tokens, frames)


def _encoder_flops(
    model: Network, transformer: Transformer, tokens: dict[str, int], length: int
) -> float:
    """Of an encoder of `length` tokens, and of what lies behind it, by the first that its
    parameters' paths begin with."""
    specs = tree.flatten(model.specs, is_leaf=lambda node: hasattr(node, "reduced"))
    work = 2 * transformer.num_layers * transformer.embed_dim * length**2
    for path, leaf in tree.flatten(model.shapes).items():
        if specs[path].reduced:
            work += leaf.size * next((n for p, n in tokens.items() if path.startswith(p)), 0)
    return 6.0 * work


def _pair_flops(model: Towers, length: int) -> float:
    """Of one pair: every tower's products with its weights, and its attention's."""
    c, work = model.config, 0
    specs = tree.flatten(model.specs, is_leaf=lambda node: hasattr(node, "reduced"))
    towers = {
        "image": (c.image.transformer, row_tokens(model, 0) + c.image.class_token),
        "text": (c.text.transformer, length),
    }
    if c.captioner is not None:
        towers["captioner"] = (c.captioner.transformer, towers["image"][1] + length)
        work += length * c.captioner.transformer.embed_dim * c.vocab_size  # the head: its table
    for path, leaf in tree.flatten(model.shapes).items():
        tokens = towers.get(path.split("/")[0], (None, 1))[1]  # a projection has one
        if specs[path].reduced and not path.endswith("embedding/weight"):
            work += leaf.size * tokens
    for transformer, tokens in towers.values():
        work += 2 * transformer.num_layers * transformer.embed_dim * tokens**2
    return 6.0 * work


@functools.lru_cache(16)
def token_counts(config: Fused, length: int) -> dict[str, int]:
    """How many tokens each encoder makes of a row, whose wave (if it takes one) is so long."""
    dtypes, found = dtypes_of(Precision(compute="float32")), {}
    for modality in config.modalities:
        module = KINDS[type(modality.encoder)].module(modality.encoder, dtypes)
        init = functools.partial(module.init_with_output, jax.random.key(0))
        encoded, _ = jax.eval_shape(init, **example(modality, length))
        found[modality.name] = math.prod(encoded.hidden.shape[:-1])
    return found


def _fused_flops(model: FusedNetwork, length: int) -> float:
    """Of one row: every weight's products with the tokens behind it, and attention's.

    A convolution that makes more tokens than its encoder ends with counts for too little.
    """
    late, work = isinstance(model.config.fusion, Weighted), 0
    counts = dict(token_counts(model.config, length))
    counts["fusion"] = 1 if late else sum(counts.values())
    specs = tree.flatten(model.specs, is_leaf=lambda node: hasattr(node, "reduced"))
    for name, trunk in trunks(model.config).items():
        those = {
            TAKEN[m.name]: counts[m.name] for m in model.config.modalities if m.encoder == trunk
        }
        counts |= {name: sum(those.values())} | {f"{name}/{one}": n for one, n in those.items()}
    for path, leaf in tree.flatten(model.shapes).items():
        part, child, *_ = path.split("/")
        part = f"{part}/{child}" if f"{part}/{child}" in counts else part
        own = child.removesuffix("_inward")
        tokens = 1 if child == "head" else counts[part if late or own not in counts else own]
        if specs[path].reduced and not path.endswith("embedding/weight"):
            work += leaf.size * tokens
    parts = {m.name: m.encoder for m in model.config.modalities} | {"fusion": model.config.fusion}
    for name, part in parts.items():
        if transformer := getattr(part, "transformer", None):
            work += 2 * transformer.num_layers * transformer.embed_dim * counts[name] ** 2
    return 6.0 * work


def _wave_flops(model: Network, samples: int) -> float:
    """Of one wave: every convolution at its own rate, the rest at that of the frames."""
    c, places = model.config, {}
    for i, (_, size, stride) in enumerate(c.convolutions):
        samples = num_windows(samples, size, stride)
        places[f"convolution_{i}"] = samples
    work = 2 * c.num_layers * c.transformer.embed_dim * samples**2
    specs = tree.flatten(model.specs, is_leaf=lambda node: hasattr(node, "reduced"))
    for path, leaf in tree.flatten(model.shapes).items():
        if specs[path].reduced:
            work += leaf.size * places.get(path.split("/")[0], samples)
    return 6.0 * work


def _decoder_flops(model: Model, sequence_length: int) -> float:
    """Of one token, forward and backward (three times the forward pass).

    Recomputation, optimizer and empty slots do not count; embedding look-ups are free; a tied head
    and every MTP depth's use of the head count. A sparse attention counts the pairs that it keeps,
    and an indexer's scores of all of them.
    """
    config, matmul = model.config, 0
    specs = tree.flatten(model.specs, is_leaf=lambda node: hasattr(node, "reduced"))
    for path, leaf in tree.flatten(model.shapes).items():
        if specs[path].reduced and not path.startswith("embedding/"):
            matmul += _visited(config, path, leaf.size)
    heads = config.num_mtp_layers + int(config.tie_embeddings)
    matmul += heads * config.embed_dim * config.vocab_size
    layers = config.num_layers + config.num_mtp_layers
    return 3 * (2 * matmul + 2 * layers * attention_products(config.attention, sequence_length))


def attention_products(a: Attention, length: int) -> float:
    """Multiply-adds a token of scores and of weighted values, a mean over `length` positions."""
    width = 2 * a.head_dim if isinstance(a, GQA) else a.nope_dim + a.rope_dim + a.value_dim
    if isinstance(a, GatedGQA):
        return a.num_heads * width * float(room(a.ratio, length)[1:].mean())
    if isinstance(a, GQA):
        return a.num_heads * width * _seen(length, a.window)
    if a.indexer is None:
        return a.num_heads * width * _seen(length, None)
    scored = a.indexer.num_heads * (a.indexer.head_dim + 1) * _seen(length, None)
    return a.num_heads * width * _seen(length, a.indexer.top_k) + scored


def _seen(length: int, most: int | None) -> float:
    """How many tokens a query sees in the mean, if at most `most`."""
    most = length if most is None else min(most, length)
    return most * (1 - (most - 1) / (2 * length))


def describe(config: ModelConfig) -> str:
    """`12.3 M parameters (4.5 M active)`."""
    total, active = num_params(build_network(config))
    return f"{_readable(total)} parameters ({_readable(active)} active)"


def _readable(number: int) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return str(number)

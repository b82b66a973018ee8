"""Encoders' forward pass and training step against transformers', and what the pipelines decode.

    python benchmarks/multimodal.py [--encoders vit-s whisper-tiny] [--rounds 3] [--json FILE]
    python benchmarks/multimodal.py --quick
    python benchmarks/multimodal.py --only data

Published shapes, random weights, whole batches of random inputs. Ours computes in bfloat16; peers
run in float32, as transformers loads them, and all in bfloat16, with its default attention. Both
sides are processes of their own with huge pages (core/memory.py) and take turns; medians are
printed, since the machine's speed drifts. Forward: weights in the dtype of arithmetic, ours
compiled, torch's in inference mode. Step: forward, backward, clipping and AdamW (torch's fused) on
a random sum of the last hidden states, without dropout; ours is what `train` does, its weights
float32, and its layers unrolled. Goal: twice transformers' speed.

Pipelines: the loader's batches from tar shards of 640 x 480 images (decoded, cropped, resized to
224, colors changed) against Pillow's decoding alone; sound (44.1 kHz stereo to 16 kHz mono) against
FFmpeg's decoding alone.
"""

import argparse
import contextlib
import dataclasses
import fractions
import io
import json
import multiprocessing
import os
import pathlib
import statistics
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import av
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from PIL import Image
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from deepseek_jax.checkpoint import encoders
from deepseek_jax.core import tree
from deepseek_jax.core.memory import TUNABLES
from deepseek_jax.core.precision import Precision
from deepseek_jax.core.target import leave_absent_tpus
from deepseek_jax.data.audio import decoded_wave
from deepseek_jax.data.augment import Augmentation
from deepseek_jax.data.loader import batches
from deepseek_jax.data.media import MediaShards
from deepseek_jax.data.pairs import Pairs, open_pairs
from deepseek_jax.data.tokenizer import Bytes
from deepseek_jax.data.vision import ImageTransform
from deepseek_jax.models.encoder import Encoder, build_encoder
from deepseek_jax.serving.inputs import INPUTS
from deepseek_jax.training.optimizer import AdamW, make_optimizer
from deepseek_jax.training.state import initial_state
from deepseek_jax.training.step import Objective, make_gradients, make_train_step


class Case(NamedTuple):
    """An encoder of transformers at a published shape, and a batch for it."""

    model: Callable[..., torch.nn.Module]
    config: transformers.PreTrainedConfig
    shape: tuple[int, ...]
    """Of a row, in Hugging Face's layout."""
    batch: int
    seconds: float = 0.0
    """Of sound in a row; 0: rows are counted."""
    options: Mapping[str, Any] = MappingProxyType({})


SMALL = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
IMAGE, BARE = (3, 224, 224), {"add_pooling_layer": False}
CASES = {
    "vit-s": Case(transformers.ViTModel, transformers.ViTConfig(**SMALL), IMAGE, 8, options=BARE),
    "vit-b": Case(transformers.ViTModel, transformers.ViTConfig(), IMAGE, 4, options=BARE),
    "clip-b32": Case(transformers.CLIPVisionModel, transformers.CLIPVisionConfig(), IMAGE, 8),
    "siglip-b": Case(
        transformers.SiglipVisionModel,
        transformers.SiglipVisionConfig(vision_use_head=False),
        IMAGE,
        4,
    ),
    "dinov2-s": Case(
        transformers.Dinov2Model,
        transformers.Dinov2Config(
            hidden_size=384, num_attention_heads=6, patch_size=14, image_size=224
        ),
        IMAGE,
        8,
    ),
    "swin-t": Case(transformers.SwinModel, transformers.SwinConfig(), IMAGE, 8, options=BARE),
    "videomae-s": Case(
        transformers.VideoMAEModel, transformers.VideoMAEConfig(**SMALL), (16, *IMAGE), 1
    ),
    "whisper-tiny": Case(
        WhisperEncoder,
        transformers.WhisperConfig(d_model=384, encoder_attention_heads=6, encoder_ffn_dim=1536),
        (80, 3000),
        2,
        30.0,
    ),
    "wav2vec2-b": Case(
        transformers.Wav2Vec2Model, transformers.Wav2Vec2Config(), (16_000 * 5,), 2, 5.0
    ),
}
SIDES = ("ours bfloat16", "torch float32", "torch bfloat16")
WAYS = ("forward", "step")


def rows(case: Case, batch: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(batch, *case.shape)).astype(np.float32)


def peer(case: Case) -> torch.nn.Module:
    """Transformers' encoder with random weights, in evaluation mode: no dropout, no masks."""
    torch.manual_seed(0)
    return case.model(case.config, **case.options).eval()


def theirs(case: Case, batch: int, dtype: str) -> dict[str, Callable]:
    """Functions that run it once."""
    inputs = torch.from_numpy(rows(case, batch)).to(getattr(torch, dtype))
    model = peer(case).to(inputs.dtype)

    def forward() -> None:
        with torch.inference_mode():
            model(inputs).last_hidden_state.flatten()[0].item()

    with torch.inference_mode():
        slopes = torch.randn(model(inputs).last_hidden_state.shape, dtype=inputs.dtype)
    slopes = slopes.clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        loss = (model(inputs).last_hidden_state * slopes).float().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        assert np.isfinite(loss.item())

    return {"forward": forward, "step": step}


def network(case: Case, params: str, unroll: bool = False) -> Encoder:
    """Our encoder of the same config; it has as many weights, which is checked."""
    with torch.device("meta"):
        tensors = peer(case).state_dict()
    config = encoders.config_of(case.config.to_dict(), tensors)
    if unroll and hasattr(config, "transformer"):
        blocks = dataclasses.replace(config.transformer, unroll=config.transformer.num_layers)
        config = dataclasses.replace(config, transformer=blocks)
    encoder = build_encoder(config, Precision(compute="bfloat16", params=params))
    shapes = tree.flatten(encoder.shapes).values()
    count, wanted = sum(x.size for x in shapes), sum(x.numel() for x in tensors.values())
    assert abs(count - wanted) < 1e-2 * wanted, f"{count} weights here, {wanted} in transformers"
    return encoder


def start_of(encoder: Encoder) -> Any:
    """Random weights, drawn without a compilation: that of a Swin's many shapes takes a minute."""
    draw = np.random.default_rng(0)

    def one(path: str, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        mean = 1.0 if path.endswith("scale") else 0.0
        values = mean + 0.02 * draw.standard_normal(leaf.shape, np.float32)
        return values.astype(leaf.dtype)

    return jax.device_put(tree.map_with_path(one, encoder.shapes))


def ours(case: Case, batch: int, dtype: str) -> dict[str, Callable]:
    """Functions that run ours once; they are compiled at their first call."""
    # A scan's stacks of bfloat16 are widened as wholes on CPU: 12 % of a step.
    narrow, wide = network(case, dtype), network(case, "float32", unroll=True)
    given = INPUTS[type(narrow.config)](narrow.config, rows(case, batch))
    given = jax.device_put({name: x for name, x in given.items() if x is not None})
    weights = start_of(narrow)
    apply = jax.jit(lambda params, given: narrow.apply(params, **given).hidden)

    def forward() -> None:
        apply(weights, given).block_until_ready()

    hidden = jax.eval_shape(apply, weights, given)
    slopes = jax.random.normal(jax.random.key(1), hidden.shape, hidden.dtype)

    def loss_fn(params: Any, batch: Any, key: jax.Array) -> tuple[dict, dict]:
        del key
        out = wide.apply(params, **batch["inputs"]).hidden
        mean = (out * batch["slopes"]).astype(jnp.float32).mean()
        return {"loss": (mean, jnp.float32(1))}, {}

    objective = Objective(loss_fn, lambda batch: {"loss": jnp.float32(1)}, {"loss": 1.0}, {})
    optimizer = make_optimizer(AdamW(), wide.specs)
    train = make_train_step(
        make_gradients(objective), objective, optimizer, lambda s: jnp.float32(1e-4), clip_norm=1.0
    )
    compiled = jax.jit(train, donate_argnums=0)
    holder = [initial_state(start_of(wide), optimizer, 1.0)]

    def step() -> None:
        data = {"inputs": given, "slopes": slopes}
        holder[0], metrics = compiled(holder[0], data, jax.random.key(1))
        assert np.isfinite(float(metrics["loss"]))

    return {"forward": forward, "step": step}


BUILDS = {"ours": ours, "torch": theirs}


def serve(pipe: Any) -> None:
    """A process: makes the actions it is told to make, and times the one it is asked for."""
    leave_absent_tpus()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    actions: dict[tuple[str, str], Callable] = {}
    while (order := pipe.recv()) is not None:
        try:
            if order[0] == "make":
                actions.clear()
                _, name, batch, sides = order
                for side in sides:
                    kind, dtype = side.split()
                    for way, action in BUILDS[kind](CASES[name], batch, dtype).items():
                        actions[side, way] = action
                pipe.send(None)
            else:
                pipe.send(seconds(actions[order[1:]]))
        except Exception as error:  # the other side names what failed, and goes on
            pipe.send(error)


def seconds(action: Callable, least: float = 0.5) -> float:
    """The median of some calls, after one that does not count."""
    action()
    taken: list[float] = []
    while len(taken) < 2 or sum(taken) < least:
        start = time.perf_counter()
        action()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


class Side:
    """A process that `serve`s."""

    def __init__(self) -> None:
        self._pipe, other = multiprocessing.Pipe()
        self._process = multiprocessing.Process(target=serve, args=(other,), daemon=True)
        self._process.start()
        other.close()

    def ask(self, *order: Any) -> Any:
        self._pipe.send(order)
        answer = self._pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer


def measured(
    name: str, batch: int, ways: tuple[str, ...], rounds: int, sides: dict[str, Side]
) -> dict[str, Any]:
    """Rows (of sound: seconds) a second of an encoder, by way and side."""
    for kind, side in sides.items():
        side.ask("make", name, batch, [s for s in SIDES if s.startswith(kind)])
    found: dict[tuple[str, str], list[float]] = {}
    for way in ways:
        for _ in range(rounds):
            for full in SIDES:
                taken = sides[full.split()[0]].ask("time", full, way)
                found.setdefault((way, full), []).append(taken)
    amount = batch * (CASES[name].seconds or 1)
    result: dict[str, Any] = {"batch": batch, "unit": "seconds/s" if CASES[name].seconds else "/s"}
    for way in ways:
        result[way] = {s: amount / statistics.median(found[way, s]) for s in SIDES}
        # A ratio of each round's own: its turns stood side by side.
        for side in SIDES[1:]:
            pairs = zip(found[way, side], found[way, SIDES[0]], strict=True)
            result[way][f"ours/{side}"] = statistics.median(them / us for them, us in pairs)
    return result


def encoders_table(arguments: argparse.Namespace) -> dict[str, Any]:
    os.environ["GLIBC_TUNABLES"] = TUNABLES
    multiprocessing.set_start_method("spawn")
    sides = {kind: Side() for kind in BUILDS}
    ways = WAYS[:1] if arguments.forward else WAYS
    print(f"{'':24}" + "".join(f"{s:>16}" for s in SIDES) + "   ours by float32, by bfloat16")
    table = {}
    for name in arguments.encoders:
        batch = max(1, CASES[name].batch // (2 if arguments.quick else 1))
        table[name] = result = measured(name, batch, ways, arguments.rounds, sides)
        for way in ways:
            rates = "".join(f"{result[way][s]:16.2f}" for s in SIDES)
            ratios = ", ".join(f"{result[way][f'ours/{s}']:.2f}" for s in SIDES[1:])
            label = f"{name} x {batch}, {way}"
            print(f"{label:24}{rates}   {ratios} {result['unit']}", flush=True)
    return table


def photograph(seed: int) -> Image.Image:
    """Smooth noise with some grain: it compresses like a photograph, to about 60 kB as JPEG."""
    draw = np.random.default_rng(seed)
    coarse = Image.fromarray(draw.integers(0, 256, (30, 40, 3), np.uint8)).resize((640, 480))
    return Image.fromarray(
        (np.asarray(coarse, np.float32) + draw.normal(0, 6, (480, 640, 1)))
        .clip(0, 255)
        .astype("u1")
    )


def image_files(kind: str, count: int) -> list[bytes]:
    files = []
    for seed in range(count):
        photograph(seed).save(out := io.BytesIO(), format=kind, quality=90)
        files.append(out.getvalue())
    return files


def sound(codec: str, container: str, length: int = 10, rate: int = 44_100) -> bytes:
    """Noise and a tone, stereo."""
    draw = np.random.default_rng(0)
    wave = 0.2 * np.sin(np.arange(length * rate) * 0.05) + draw.normal(0, 0.05, (2, length * rate))
    out = io.BytesIO()
    with av.open(out, "w", format=container) as file:
        track = file.add_stream(codec, rate=rate, layout="stereo")
        kind = track.codec_context.format or track.codec.audio_formats[0]
        frame = av.AudioFrame.from_ndarray(wave.astype(np.float32), "fltp", "stereo")
        frame.sample_rate, frame.time_base = rate, fractions.Fraction(1, rate)
        resampler = av.AudioResampler(kind.name, "stereo", rate, track.codec_context.frame_size)
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            file.mux(track.encode(part))
        file.mux(track.encode(None))
    return out.getvalue()


@contextlib.contextmanager
def loader(files: list[bytes], kind: str, batch: int) -> Iterator[Callable]:
    """A function that takes the next `batch` views."""
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(pathlib.Path(folder) / "a.tar", "w") as tar:
            for number, data in enumerate(files):
                for ending, content in ((kind, data), ("txt", f"picture {number}".encode())):
                    member = tarfile.TarInfo(f"{number}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        config = Pairs(
            source=MediaShards(paths=(f"{folder}/a.tar",)),
            tokenizer=Bytes(),
            image=ImageTransform(size=224, fit="crop"),
            augmentation=Augmentation(brightness=0.2, contrast=0.2),
            cache_dir=folder,
        )
        dataset = open_pairs(config, sequence_length=16, seed=0)
        stream = batches(dataset, start=0, batch_size=batch // 4)
        yield lambda: [next(stream) for _ in range(4)]  # more than are made ahead
        stream.close()


def bare_sound(data: bytes) -> None:
    with av.open(io.BytesIO(data)) as file:
        for frame in file.decode(audio=0):
            frame.to_ndarray()


def pipelines(arguments: argparse.Namespace) -> dict[str, Any]:
    """Images and seconds of sound a second, and the part of bare decoding's speed that they are."""
    batch, length, table = 16, 10, {}
    print(f"\n{'':24}{'ours':>16}{'bare decoder':>16}   ours by bare")

    def compared(name: str, amount: float, ours: Callable, bare: Callable) -> None:
        pairs = [(seconds(ours), seconds(bare)) for _ in range(arguments.rounds)]
        us, them = (amount / statistics.median(side) for side in zip(*pairs, strict=True))
        part = statistics.median(them / us for us, them in pairs)
        table[name] = {"ours": us, "bare": them, "ours/bare": part}
        print(f"{name:24}{us:16.1f}{them:16.1f}   {part:.2f}", flush=True)

    for kind in ("jpeg", "png"):
        files = image_files(kind, 40)

        def bare(files: list[bytes] = files) -> None:
            for data in files[:batch]:
                np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

        with loader(files, kind, batch) as take:
            compared(f"{kind}, images/s", batch, take, bare)
    for codec, container in (("pcm_s16le", "wav"), ("flac", "flac"), ("libmp3lame", "mp3")):
        data = sound(codec, container, length)
        compared(
            f"{container}, seconds/s", length,
            lambda data=data, name=container: decoded_wave(data, name, 16_000),
            lambda data=data: bare_sound(data),
        )  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoders", nargs="+", choices=CASES, default=[*CASES])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round, half the batches")
    parser.add_argument("--forward", action="store_true", help="no training steps")
    parser.add_argument("--only", choices=("encoders", "data"))
    parser.add_argument("--json", type=pathlib.Path)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds = 1
    found = {}
    if arguments.only != "data":
        found["encoders"] = encoders_table(arguments)
    if arguments.only != "encoders":
        found["data"] = pipelines(arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

"""Tiny vision-language models: transformers' DeepSeek-VL and Janus, and VL2's folder with a model.

VL2 has no class in transformers. Its encoder, projector and layout are written here once more, in
float64, one feature at a time; its decoder is the text model of transformers that its names are of.
"""

import json
import math
import pathlib
from typing import Any

import encoder_cases
import hf_cases
import numpy as np
import torch
import transformers

from deepseek_jax.checkpoint.safetensors import Entry, open_tensors, write_shard

IMAGE = 90  # the token that stands for images
TEXT = {
    "vocab_size": 97, "hidden_size": 40, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 8, "hidden_act": "gelu",
}  # fmt: skip
LARGE = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 24,
    "patch_size": 4, "window_size": 4, "global_attn_indexes": [1], "output_channels": 6,
}  # fmt: skip
VQ = {
    "embed_dim": 8, "num_embeddings": 16, "latent_channels": 32, "base_channels": 32,
    "channel_multiplier": [1, 1], "num_res_blocks": 1, "projection_dim": 40,
    "image_token_embed_dim": 40,
}  # fmt: skip


def converted(kind: str, **more: Any) -> transformers.PreTrainedModel:
    """A random model of transformers, by its model_type; an image takes 4 tokens."""
    text = transformers.LlamaConfig(**TEXT)
    both = {"text_config": text, "image_token_id": IMAGE, "tie_word_embeddings": False} | more
    if kind != "janus":
        vision = VISION | {"intermediate_size": 48, "vision_use_head": False}
        vision = transformers.SiglipVisionConfig(**vision)
        name = "DeepseekVL"
        if kind == "deepseek_vl_hybrid":
            name, large = "DeepseekVLHybrid", transformers.SamVisionConfig(**LARGE)
            both["high_res_vision_config"] = large
        config = getattr(transformers, f"{name}Config")(vision_config=vision, **both)
        model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    else:
        vision = transformers.JanusVisionConfig(**VISION, projection_dim=40, mlp_ratio=1.5)
        vq = transformers.JanusVQVAEConfig(**VQ)
        config = transformers.JanusConfig(vision_config=vision, vq_config=vq, **both)
        model = transformers.JanusForConditionalGeneration(config)
    return encoder_cases.randomized(model, scale=0.15)


def shown(kind: str, pixels: np.ndarray) -> dict[str, np.ndarray]:
    """`rows`' pixels as transformers' models take them, with larger ones where two encoders see."""
    given = {"pixel_values": pixels}
    if kind == "deepseek_vl_hybrid":
        large = np.random.default_rng(3).normal(size=(len(pixels), 3, 24, 24))
        given["high_res_pixel_values"] = large.astype(np.float32)
    return given


def rows(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens [3, 15] with two, no and one image, the last row shorter; what is real; pixels."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, IMAGE, (3, 15))
    mask = np.ones_like(tokens)
    mask[2, 11:] = 0
    for row, first in ((0, 1), (0, 5), (2, 4)):
        tokens[row, first : first + 4] = IMAGE
    return tokens, mask, rng.normal(size=(3, 3, 16, 16)).astype(np.float32)


# DeepSeek-VL2: views of 5 x 5 patches, which fill up to 3 x 3 tokens.
WIDTH, HEADS, INNER, PATCH, SIDE = 24, 4, 36, 8, 5
GRIDS = [(2, 1), (1, 1), (1, 2)]
VL2 = {
    "tiny": ("v1", {}, {"use_mla": False}),
    "small": ("v2-lite", {}, {}),
    "base": (
        "v3-one-group",
        {
            "q_lora_rank": None, "norm_topk_prob": True, "routed_scaling_factor": 2.0,
            "num_experts_per_tok": 3,
        },
        {"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    ),
}  # fmt: skip


def vl2_folder(
    size: str, folder: pathlib.Path
) -> tuple[transformers.PreTrainedModel, dict[str, np.ndarray]]:
    """A folder as VL2's on the hub: its decoder in transformers, and all its tensors."""
    name, changed, own = VL2[size]
    changed = changed | {"num_hidden_layers": 2}
    decoder = hf_cases.hf_model(name, **changed)
    hf_cases.save(decoder, folder / "decoder")
    found = {f"language.{n}": t.read() for n, t in open_tensors(folder / "decoder").items()}
    rng = np.random.default_rng(4)
    dim = hf_cases.BASE["hidden_size"]
    shapes = {
        "patch_embed.proj": (WIDTH, 3, PATCH, PATCH), "norm": (WIDTH,),
        **{
            f"blocks.{i}.{part}": shape
            for i in range(2)
            for part, shape in {
                "norm1": (WIDTH,), "norm2": (WIDTH,), "attn.qkv": (3 * WIDTH, WIDTH),
                "attn.proj": (WIDTH, WIDTH), "mlp.fc1": (INNER, WIDTH), "mlp.fc2": (WIDTH, INNER),
            }.items()
        },
        "attn_pool.q": (WIDTH, WIDTH),  # of SigLIP's head, which nothing reads
    }  # fmt: skip
    shapes = {f"vision.{name}": shape for name, shape in shapes.items()}
    shapes |= {"projector.layers.0": (dim * 2, 4 * WIDTH), "projector.layers.2": (dim, dim * 2)}
    for module, shape in shapes.items():
        neutral = float(len(shape) == 1)
        found[f"{module}.weight"] = neutral + 0.2 * rng.normal(size=shape)
        found[f"{module}.bias"] = 0.2 * rng.normal(size=shape[:1])
    found["vision.pos_embed"] = 0.2 * rng.normal(size=(1, SIDE * SIDE, WIDTH))
    found |= {name: rng.normal(size=dim) for name in ("image_newline", "view_seperator")}
    found = {name: array.astype(np.float32) for name, array in found.items()}
    entries = [Entry(n, x.shape, x.dtype, lambda x=x: x) for n, x in found.items()]
    write_shard(folder / "model.safetensors", entries)
    fields = hf_cases.BASE | hf_cases.CASES[name][1] | changed | own
    config = {
        "model_type": "deepseek_vl_v2", "tile_tag": "2D", "global_view_pos": "head",
        "image_token_id": IMAGE, "language_config": {"model_type": "deepseek_v2"} | fields,
        "vision_config": {
            "image_size": SIDE * PATCH + 3, "patch_size": PATCH, "width": WIDTH, "layers": 2,
            "heads": HEADS, "mlp_ratio": INNER / WIDTH, "model_type": "vision",
        },
        "projector_config": {"input_dim": WIDTH, "n_embed": dim, "mlp_ratio": 2},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return decoder, found


def _linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def _norm(x, weights, name):
    x = x - x.mean(-1, keepdims=True)
    normal = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
    return normal * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def _gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def view_tokens(view: np.ndarray, weights: dict[str, np.ndarray]) -> np.ndarray:
    """[3, 3, dim] of pixels [3, H, W]: encoder, then joined squares through the projector."""
    kernel = weights["vision.patch_embed.proj.weight"]
    x = np.zeros((SIDE * SIDE, WIDTH))
    for i in range(SIDE):
        for j in range(SIDE):
            square = view[:, i * PATCH : (i + 1) * PATCH, j * PATCH : (j + 1) * PATCH]
            x[i * SIDE + j] = (kernel * square).sum((1, 2, 3))
    x = x + weights["vision.patch_embed.proj.bias"] + weights["vision.pos_embed"][0]
    for i in range(2):
        block, head = f"vision.blocks.{i}", WIDTH // HEADS
        q, k, v = np.split(
            _linear(_norm(x, weights, f"{block}.norm1"), weights, f"{block}.attn.qkv"), 3, -1
        )
        seen = np.zeros_like(q)
        for n in range(HEADS):
            own = slice(n * head, (n + 1) * head)
            scores = q[:, own] @ k[:, own].T / math.sqrt(head)
            shares = np.exp(scores - scores.max(-1, keepdims=True))
            seen[:, own] = shares / shares.sum(-1, keepdims=True) @ v[:, own]
        x = x + _linear(seen, weights, f"{block}.attn.proj")
        inner = _linear(_norm(x, weights, f"{block}.norm2"), weights, f"{block}.mlp.fc1")
        x = x + _linear(_gelu_tanh(inner), weights, f"{block}.mlp.fc2")
    x = _norm(x, weights, "vision.norm").reshape(SIDE, SIDE, WIDTH)
    whole = np.zeros((SIDE + 1, SIDE + 1, WIDTH))
    whole[:SIDE, :SIDE] = x
    half = (SIDE + 1) // 2
    joined = np.zeros((half, half, 4 * WIDTH))
    for i in range(half):
        for j in range(half):
            for channel in range(WIDTH):
                for a in range(2):
                    for b in range(2):
                        one = whole[2 * i + a, 2 * j + b, channel]
                        joined[i, j, channel * 4 + a * 2 + b] = one
    inner = _gelu(_linear(joined, weights, "projector.layers.0"))
    return _linear(inner, weights, "projector.layers.2")


def image_tokens(
    views: np.ndarray, grid: tuple[int, int], weights: dict[str, np.ndarray]
) -> np.ndarray:
    """The embeddings [tokens, dim] that an image's views [1 + tiles, 3, H, W] become."""
    seen = [view_tokens(view, weights) for view in views]
    newline, found = weights["image_newline"], []
    for line in seen[0]:
        found += [*line, newline]
    found.append(weights["view_seperator"])
    wide, high = grid
    for i in range(high):
        for line in range(len(seen[0])):
            for j in range(wide):
                found += [*seen[1 + i * wide + j][line]]
            found.append(newline)
    return np.array(found)


def vl2_rows(weights: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens [2, T] (of GRIDS one image, then two), views [N, 3, H, W], embeddings [2, T, dim]."""
    weights = {name: array.astype(np.float64) for name, array in weights.items()}
    rng = np.random.default_rng(7)
    counts = [1 + wide * high for wide, high in GRIDS]
    size = SIDE * PATCH + 3
    views = rng.normal(size=(sum(counts), 3, size, size)).astype(np.float32)
    own = np.split(views.astype(np.float64), np.cumsum(counts)[:-1])
    images = [image_tokens(x, grid, weights) for x, grid in zip(own, GRIDS, strict=True)]
    tokens = rng.integers(1, IMAGE, (2, len(images[1]) + len(images[2]) + 6))
    places = [(0, 3, images[0]), (1, 1, images[1]), (1, 3 + len(images[1]), images[2])]
    embedded = weights["language.model.embed_tokens.weight"][tokens]
    for row, first, image in places:
        tokens[row, first : first + len(image)] = IMAGE
        embedded[row, first : first + len(image)] = image
    return tokens, views, embedded


def torch_logits(decoder: transformers.PreTrainedModel, embedded: np.ndarray) -> np.ndarray:
    """The decoder's answer to embeddings."""
    with torch.no_grad():
        return decoder(inputs_embeds=torch.tensor(embedded).float()).logits.numpy()


TOWER = "siglip_tiny"  # a name beside those of the released encoders
SIZES = (8, 32, 2, 4, 48)
SAM = "sam_tiny"
SIGLIP = {"image_size": 16, "model_name": TOWER, "select_feature": "same", "select_layer": -1}


def original_folder(model: transformers.PreTrainedModel, folder: pathlib.Path) -> None:
    """A Janus of transformers with the names and the config.json that DeepSeek released it with."""
    state = {name: weight.numpy() for name, weight in model.state_dict().items()}
    tower, output = "vision_model.vision_tower", "self_attn.projection_layer"
    found = _original_siglip(state, "model.vision_model", tower, output) | _original_text(state)
    for leaf in ("weight", "bias"):
        found[f"aligner.layers.0.{leaf}"] = state[f"model.aligner.fc1.{leaf}"]
        found[f"aligner.layers.2.{leaf}"] = state[f"model.aligner.hidden_layers.0.{leaf}"]
    found["gen_embed.weight"] = state["model.generation_embeddings.weight"]
    found[f"{tower}.attn_pool.latent"] = np.zeros((1, 1, 32), np.float32)
    config = {
        "gen_vision_config": {}, "vision_config": {
            "cls": "CLIPVisionTower", "model_type": "vision", "params": SIGLIP,
        },
    }  # fmt: skip
    _original(found, config, "mlp_gelu", folder)


def original_hybrid(model: transformers.PreTrainedModel, folder: pathlib.Path) -> None:
    """DeepSeek-VL 7B likewise: of a tiny one of transformers."""
    state = {name: weight.numpy() for name, weight in model.state_dict().items()}
    low, high = (f"vision_model.vision_tower_{part}.vision_tower" for part in ("low", "high"))
    found = _original_siglip(state, "model.vision_model", low, "self_attn.out_proj")
    found |= _original_text(state)
    for old, new in (
        (r"model.high_res_vision_model.vision_encoder.layers", f"{high}.blocks"),
        (r"model.high_res_vision_model.vision_encoder.", f"{high}."),
        (r"model.high_res_vision_neck.", f"{high}.neck_hd."),
        (r"model.high_res_vision_proj.", f"{high}.downsamples."),
        (r"model.high_res_vision_alpha", f"{high}.hd_alpha_downsamples"),
    ):
        for name in [name for name in state if name.startswith(old)]:
            there = new + name.removeprefix(old)
            for theirs, here in (
                ("patch_embed.projection", "patch_embed.proj"), (".layer_norm1.", ".norm1."),
                (".layer_norm2.", ".norm2."), ("neck.conv1", "neck.0"), ("neck.norm1", "neck.1"),
                ("neck.conv2", "neck.2"), ("neck.norm2", "neck.3"), ("hd.conv1", "hd.0"),
                ("hd.norm1", "hd.1"), ("hd.conv2", "hd.2"), ("hd.norm2", "hd.3"),
                ("samples.conv1", "samples.0"), ("samples.conv2", "samples.1"),
            ):  # fmt: skip
                there = there.replace(theirs, here)
            found[there] = state.pop(name)
    for leaf in ("weight", "bias"):
        for new, old in (
            ("low_up_proj", "vision_proj"), ("high_up_proj", "high_res_vision_proj"),
            ("layers.1", "proj"),
        ):  # fmt: skip
            found[f"aligner.{new}.{leaf}"] = state[f"model.aligner.{old}.{leaf}"]
        for part in ("high", "low"):  # which nothing passes
            found[f"vision_model.{part}_layer_norm.{leaf}"] = np.ones(24, np.float32)
    clip = {"pixel_mean": [0.48145466, 0.4578275, 0.40821073]}
    clip["pixel_std"] = [0.26862954, 0.26130258, 0.27577711]
    half = {"pixel_mean": [0.5] * 3, "pixel_std": [0.5] * 3}
    large = SIGLIP | {"model_name": SAM, "image_size": 24, "output_dim": 24}
    params = {
        "concat_type": "tuple", "freeze_high": True, "freeze_low": True, "width": 1024,
        "high_res_cfg": large | clip, "low_res_cfg": SIGLIP | half,
    }  # fmt: skip
    config = {"cls": "HybridVisionTower", "model_type": "vision", "params": params}
    split = "low_high_hybrid_split_mlp_gelu"
    _original(found, {"vision_config": config}, split, folder)


def _original(
    tensors: dict[str, np.ndarray], config: dict, projector: str, folder: pathlib.Path
) -> None:
    config = config | {
        "model_type": "multi_modality", "language_config": {"model_type": "llama"} | TEXT,
        "aligner_config": {
            "cls": "MlpProjector", "model_type": "aligner", "params": {
                "depth": 2, "input_dim": 32, "n_embed": 40, "projector_type": projector,
            },
        },
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    entries = [Entry(n, x.shape, x.dtype, lambda x=x: x) for n, x in tensors.items()]
    write_shard(folder / "model.safetensors", entries)
    (folder / "config.json").write_text(json.dumps(config))


def _original_text(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    before = "model.language_model."
    found = {"language_model.lm_head.weight": state["lm_head.weight"]}
    return found | {
        f"language_model.model.{name.removeprefix(before)}": array
        for name, array in state.items()
        if name.startswith(before)
    }


def _original_siglip(
    state: dict[str, np.ndarray], old: str, tower: str, output: str
) -> dict[str, np.ndarray]:
    """An encoder's tensors under timm's names; `output` is attention's last product's name."""
    plain = {
        "patch_embed.proj": "embeddings.patch_embedding", "norm": "post_layernorm",
        **{
            f"blocks.{i}.{new}": f"encoder.layers.{i}.{theirs}"
            for i in range(2)
            for new, theirs in {
                "norm1": "layer_norm1", "norm2": "layer_norm2", "mlp.fc1": "mlp.fc1",
                "mlp.fc2": "mlp.fc2", "attn.proj": output,
            }.items()
        },
    }  # fmt: skip
    found = {f"{tower}.pos_embed": state[f"{old}.embeddings.position_embedding.weight"][None]}
    for leaf in ("weight", "bias"):
        found |= {f"{tower}.{n}.{leaf}": state[f"{old}.{o}.{leaf}"] for n, o in plain.items()}
        for i in range(2):
            parts = [state[f"{old}.encoder.layers.{i}.self_attn.{n}_proj.{leaf}"] for n in "qkv"]
            found[f"{tower}.blocks.{i}.attn.qkv.{leaf}"] = np.concatenate(parts)
    return found


def torch_vl2(
    decoder: transformers.PreTrainedModel,
    weights: dict[str, torch.Tensor],
    tokens: np.ndarray,
    views: np.ndarray,
) -> torch.Tensor:
    """The answer of a VL2 of torch's own functions, through which slopes flow; rows as vl2_rows."""
    f, half = torch.nn.functional, (SIDE + 1) // 2

    def linear(x, name):
        return f.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x, name):
        return f.layer_norm(x, (WIDTH,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)

    kernel = "vision.patch_embed.proj"
    x = f.conv2d(
        torch.from_numpy(views), weights[f"{kernel}.weight"], weights[f"{kernel}.bias"], PATCH
    )
    x = x.flatten(2).transpose(1, 2) + weights["vision.pos_embed"]
    for block in ("vision.blocks.0", "vision.blocks.1"):
        qkv = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv")
        q, k, v = qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        seen = f.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + linear(seen, f"{block}.attn.proj")
        inner = linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")
        x = x + linear(f.gelu(inner, approximate="tanh"), f"{block}.mlp.fc2")
    x = norm(x, "vision.norm").transpose(1, 2).unflatten(2, (SIDE, SIDE))
    x = f.unfold(f.pad(x, (0, 1, 0, 1)), kernel_size=2, stride=2).transpose(1, 2)
    x = linear(f.gelu(linear(x, "projector.layers.0")), "projector.layers.2")
    x = x.unflatten(1, (half, half))
    newline, images = weights["image_newline"], []

    def lines(rows):
        end = newline.expand(rows.shape[0], 1, -1)
        return torch.cat([rows, end], 1).flatten(0, 1)

    for wide, high in GRIDS:
        whole, tiles, x = x[0], x[1 : 1 + wide * high], x[1 + wide * high :]
        rows = (
            tiles.unflatten(0, (high, wide)).transpose(1, 2).reshape(high * half, wide * half, -1)
        )
        images += [lines(whole), weights["view_seperator"][None], lines(rows)]
    embedded = decoder.get_input_embeddings()(torch.from_numpy(tokens))
    mask = torch.from_numpy(tokens == IMAGE)[..., None]
    embedded = embedded.masked_scatter(mask, torch.cat(images))
    return decoder(inputs_embeds=embedded).logits

"""Reference and round trip: models of transformers through our loader, converter and back.

Logits at every position, and gradients of the loss with respect to every weight, are those of
transformers; tensors come back byte for byte; what does not fit is refused by its name.
"""

import json
import pathlib

import hf_cases
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from transformers.models import deepseek_ocr2 as ocr2

from deepseek_jax import convert
from deepseek_jax.checkpoint import families, huggingface, names
from deepseek_jax.checkpoint import safetensors as folders
from deepseek_jax.core import tree
from deepseek_jax.core.errors import InputError
from deepseek_jax.core.precision import Precision
from deepseek_jax.models.build import build
from deepseek_jax.models.decoder import layer_table
from deepseek_jax.ops.losses import token_losses

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, about rope


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """{case: (model, folder)}, made when asked for."""
    made = {}

    def get(name):
        if name not in made:
            model = hf_cases.hf_model(name)
            made[name] = model, hf_cases.save(model, tmp_path_factory.mktemp(name) / "hf")
        return made[name]

    return get


def opened(directory):
    folder = huggingface.open_folder(directory)
    model = build(folder.config, Precision(compute="float32"))
    return model, huggingface.load_params(folder, model, model.shapes)


@pytest.mark.shows("load", "logits", "gradients")
@pytest.mark.parametrize("name", hf_cases.CASES)
def test_logits_and_gradients_are_those_of_transformers(name, saved):
    theirs, directory = saved(name)
    model, params = opened(directory)
    rows = hf_cases.tokens()
    expected = hf_cases.logits(theirs, rows)
    assert np.abs(expected).max() > 0.5

    def loss(params):
        hidden = model.apply(params, jnp.asarray(rows)).hidden
        targets = jnp.asarray(rows[:, 1:].reshape(-1), jnp.int32)
        flat = hidden[:, :-1].reshape(targets.size, -1)
        return token_losses(flat, model.head(params), targets, 64).mean(), hidden

    (_, hidden), slopes = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    ours = np.asarray(model.logits(params, hidden))
    np.testing.assert_allclose(ours, expected, atol=2e-5, rtol=0)
    theirs.zero_grad()
    theirs(torch.tensor(rows), labels=torch.tensor(rows)).loss.backward()
    grads = {n: p.grad.numpy() for n, p in theirs.named_parameters() if p.grad is not None}
    if "lm_head.weight" not in grads and not model.config.tie_embeddings:
        raise AssertionError("nothing to compare the head with")
    apart = folders._unfused(
        {n: folders.Tensor(g.shape, g.dtype, lambda g=g: g) for n, g in grads.items()}
    )
    shape_of = names.leaves(model)
    disk = {}
    for path, leaf in tree.flatten(slopes).items():
        stacked = huggingface.disk_names(path, leaf.shape, layer_table(model.config))
        disk |= dict(zip(stacked, leaf, strict=True)) if stacked else {path: leaf}
    compared = 0
    for row in names.table(model.config, shape_of):
        if row.theirs not in apart:
            assert row.theirs.endswith("e_score_correction_bias") or ".indexer." in row.theirs
            continue
        found = names.joined(row, shape_of, [np.asarray(disk[path]) for path in row.ours])
        want = apart[row.theirs].read()
        error = np.linalg.norm(found - want) / max(np.linalg.norm(want), 1e-6)
        assert error < 1e-4, (row.theirs, error)
        compared += 1
    assert compared == sum(0 not in tensor.shape for tensor in apart.values())


@pytest.mark.shows("load", "logits", "export", family="DeepSeekMoE")
def test_the_first_deepseek_moe_is_that_of_its_only_implementation(tmp_path):
    """transformers has no such model_type; the text part of DeepSeek-OCR-2 is the same model."""
    torch.manual_seed(3)
    words = hf_cases.BASE | hf_cases.MIXED
    dense = words.pop("first_k_dense_replace")
    kinds = ["dense"] * dense + ["sparse"] * (words["num_hidden_layers"] - dense)
    config = ocr2.DeepseekOcr2TextConfig(**words, mlp_layer_types=kinds)
    config._attn_implementation = "eager"
    text = ocr2.DeepseekOcr2TextModel(config).eval()
    text.set_experts_implementation("eager")
    head = torch.randn(hf_cases.VOCAB, config.hidden_size) * 0.2
    tensors = {f"model.{n}": t.contiguous() for n, t in text.state_dict().items()}
    safetensors.torch.save_file(tensors | {"lm_head.weight": head}, tmp_path / "model.safetensors")
    words |= {"model_type": "deepseek", "first_k_dense_replace": dense}
    (tmp_path / "config.json").write_text(json.dumps(words))
    model, params = opened(tmp_path)
    rows = hf_cases.tokens()
    with torch.no_grad():
        expected = (text(torch.tensor(rows)).last_hidden_state @ head.T).numpy()
    ours = model.logits(params, model.apply(params, jnp.asarray(rows)).hidden)
    np.testing.assert_allclose(ours, expected, atol=2e-5, rtol=0)
    convert.main(["from-hf", str(tmp_path), str(tmp_path / "ours")])
    convert.main(["to-hf", str(tmp_path / "ours"), str(tmp_path / "back")])
    back = all_tensors(tmp_path / "back")
    fused = folders.open_tensors(tmp_path)
    assert back.keys() == fused.keys()
    for name, tensor in fused.items():
        np.testing.assert_array_equal(back[name].numpy(), tensor.read())


@pytest.mark.shows("load", "export")
@pytest.mark.parametrize("name", hf_cases.CASES)
def test_round_trip_gives_the_same_bytes(name, saved, tmp_path):
    theirs, directory = saved(name)
    convert.main(["from-hf", str(directory), str(tmp_path / "ours")])
    convert.main(
        ["to-hf", str(tmp_path / "ours"), str(tmp_path / "back"), "--max-shard-size", "9KB"]
    )
    same_tensors(directory, tmp_path / "back")
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    if name.startswith("v"):
        again.set_experts_implementation("eager")
    rows = hf_cases.tokens(1)
    np.testing.assert_array_equal(hf_cases.logits(again, rows), hf_cases.logits(theirs, rows))
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["rope_parameters"]["rope_theta"] == config["rope_theta"]
    assert bool(config["rope_scaling"]) == ("yarn" in name or name == "llama-3")


def all_tensors(directory):
    found = {}
    for path in directory.glob("*.safetensors"):
        found |= safetensors.torch.load_file(path)
    return found


def same_tensors(one, other):
    a, b = all_tensors(one), all_tensors(other)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype, name
        bits = [x.contiguous().view(torch.uint8).numpy() for x in (tensor, b[name])]
        np.testing.assert_array_equal(*bits, err_msg=name)


def with_mtp(directory: pathlib.Path) -> dict[str, torch.Tensor]:
    """Add the next-token layer that a V3 checkpoint of three layers has as its fourth."""
    found = all_tensors(directory)
    rng = torch.Generator().manual_seed(5)
    last = {n: t for n, t in found.items() if n.startswith("model.layers.2.")}
    new = {
        n.replace("layers.2.", "layers.3."): torch.randn(t.shape, generator=rng) * 0.2
        for n, t in last.items()
    }
    width = found["model.norm.weight"].shape[0]
    for name, shape in {
        "enorm.weight": (width,), "hnorm.weight": (width,), "eh_proj.weight": (width, 2 * width),
        "shared_head.norm.weight": (width,),
    }.items():  # fmt: skip
        new[f"model.layers.3.{name}"] = torch.rand(shape, generator=rng)
    new["model.layers.3.embed_tokens.weight"] = found["model.embed_tokens.weight"].clone()
    new["model.layers.3.shared_head.head.weight"] = found["lm_head.weight"].clone()
    safetensors.torch.save_file(found | new, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["num_nextn_predict_layers"] = 1
    (directory / "config.json").write_text(json.dumps(config))
    return found | new


@pytest.mark.shows("load", "export")
@pytest.mark.parametrize("name", ["v3", "v32"])
def test_mtp_weights_come_and_go(name, tmp_path):
    directory = hf_cases.save(hf_cases.hf_model(name), tmp_path / "hf")
    with_mtp(directory)
    model, params = opened(directory)
    assert model.config.num_mtp_layers == 1
    wanted = all_tensors(directory)["model.layers.3.eh_proj.weight"].numpy().T
    np.testing.assert_array_equal(params["mtp_0"]["projection"]["weight"], wanted)
    convert.main(["from-hf", str(directory), str(tmp_path / "ours")])
    convert.main(["to-hf", str(tmp_path / "ours"), str(tmp_path / "back")])
    same_tensors(directory, tmp_path / "back")


def test_an_mtp_layer_that_has_its_own_embedding_is_refused(tmp_path):
    directory = hf_cases.save(hf_cases.hf_model("v3"), tmp_path / "hf")
    found = with_mtp(directory)
    found["model.layers.3.embed_tokens.weight"] += 1
    safetensors.torch.save_file(found, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="model.layers.3.embed_tokens.weight differs"):
        opened(directory)


def as_float8(directory: pathlib.Path, power_of_two: bool = False, bits: bool = False) -> dict:
    """Rewrite a folder's projections as float8 blocks; the float32 values that they stand for."""
    found, wide = all_tensors(directory), {}
    for name in [n for n in found if names.is_quantized(n)]:
        values, scales = folders.quantized(found[name].numpy(), power_of_two)
        wide[name] = folders.dequantized(values, scales)
        float8 = torch.tensor(values.view(np.uint8)).view(torch.float8_e4m3fn)
        stored = torch.tensor(scales)
        if bits:
            raw = scales.astype(ml_dtypes.float8_e8m0fnu).view(np.uint8)
            stored = torch.tensor(raw).view(torch.float8_e8m0fnu)
        found |= {name: float8, f"{name}_scale_inv": stored}
    safetensors.torch.save_file(found, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = huggingface.QUANTIZATION | (
        {"scale_fmt": "ue8m0"} if bits else {}
    )
    (directory / "config.json").write_text(json.dumps(config))
    return wide


RAGGED = {"hidden_size": 160, "intermediate_size": 200, "kv_lora_rank": 136, "num_hidden_layers": 2}


@pytest.mark.shows("FP8")
@pytest.mark.parametrize("name", ["v3", "v32"])
@pytest.mark.parametrize("bits", [False, True], ids=["float32-scales", "ue8m0"])
def test_float8_blocks_are_read_and_written_back_verbatim(tmp_path, name, bits):
    """Ragged edges included: 144 rows of kv_a_proj are one whole block and a short one."""
    directory = hf_cases.save(hf_cases.hf_model(name, **RAGGED), tmp_path / "hf")
    wide = as_float8(directory, bits, bits)
    indexed = {n.partition(".indexer.")[2] for n in wide} - {""}
    assert indexed == ({"wq_b.weight", "wk.weight"} if name == "v32" else set())
    assert any(-(-n // 128) > 1 and n % 128 for w in wide.values() for n in w.shape)
    tensors = folders.open_tensors(directory)
    for name, value in wide.items():
        np.testing.assert_array_equal(tensors[name].read(), value)
    convert.main(["from-hf", str(directory), str(tmp_path / "ours")])
    convert.main(["to-hf", str(tmp_path / "ours"), str(tmp_path / "back")])
    same_tensors(directory, tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "fp8"
    convert.main(["to-hf", str(tmp_path / "ours"), str(tmp_path / "plain"), "--dtype", "float32"])
    plain = all_tensors(tmp_path / "plain")
    for name, value in wide.items():
        np.testing.assert_array_equal(plain[name].numpy(), value)
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())


@pytest.mark.shows("FP8")
@pytest.mark.parametrize("name", ["v3", "v32"])
def test_changed_weights_are_quantized_anew_and_then_stay(name, tmp_path):
    directory = hf_cases.save(hf_cases.hf_model(name, **RAGGED), tmp_path / "hf")
    steps = ["--dtype", "float8-block"]
    convert.main(["from-hf", str(directory), str(tmp_path / "a")])
    convert.main(["to-hf", str(tmp_path / "a"), str(tmp_path / "b"), *steps])
    convert.main(["from-hf", str(tmp_path / "b"), str(tmp_path / "c")])
    convert.main(["to-hf", str(tmp_path / "c"), str(tmp_path / "d"), *steps])
    same_tensors(tmp_path / "b", tmp_path / "d")
    exact, narrow = all_tensors(directory), folders.open_tensors(tmp_path / "b")
    for name in filter(names.is_quantized, exact):
        error = np.abs(narrow[name].read() - exact[name].numpy())
        assert error.max() <= np.abs(exact[name].numpy()).max() / 14  # half a step of three bits


def test_published_quantization_is_that_of_torch():
    """Against torch's own conversion to float8, values on both sides of every tie."""
    wide = np.random.default_rng(0).standard_normal((200, 300)).astype(np.float32)
    values, scales = folders.quantized(wide, False)
    full = np.repeat(np.repeat(scales, 128, 0), 128, 1)[:200, :300]
    theirs = torch.tensor(wide / full).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(values.view(np.uint8), theirs)
    assert scales.shape == (2, 3)
    np.testing.assert_allclose(scales[1, 2], np.abs(wide[128:, 256:]).max() / 448, rtol=1e-6)


def test_bin_files_are_read_without_unpickling_code(tmp_path, saved):
    _, directory = saved("v2-lite")
    found = all_tensors(directory)
    (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
    torch.save({n: t.bfloat16() for n, t in found.items()}, tmp_path / "pytorch_model.bin")
    read = folders.open_tensors(tmp_path)
    for name, tensor in found.items():
        np.testing.assert_array_equal(
            read[name].read().astype(np.float32), tensor.bfloat16().float().numpy()
        )
    torch.save({"model.norm.weight": pathlib.PurePosixPath("x")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model.bin: not a file of tensors alone"):
        folders.open_tensors(tmp_path)


def test_fused_experts_are_read_like_those_apart(tmp_path, saved):
    theirs, directory = saved("v3")
    theirs.save_pretrained(tmp_path, save_original_format=False)
    assert any(name.endswith("gate_up_proj") for name in all_tensors(tmp_path))
    one, other = opened(directory)[1], opened(tmp_path)[1]
    jax.tree.map(np.testing.assert_array_equal, one, other)


def damage(kind, directory):
    shard = sorted(directory.glob("*.safetensors"))[0]
    index = directory / folders.INDEX
    if kind == "truncated":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif kind == "longer":
        shard.write_bytes(shard.read_bytes() + b"0" * 8)
    elif kind == "header":
        shard.write_bytes(b"\xff" * 8 + shard.read_bytes()[8:])
    elif kind == "missing shard":
        shard.unlink()
    elif kind in ("lying", "outside", "unlisted"):
        listed = json.loads(index.read_text())
        name = next(iter(listed["weight_map"]))
        if kind == "unlisted":
            del listed["weight_map"][name]
        else:
            listed["weight_map"][name + "x" if kind == "lying" else name] = (
                shard.name if kind == "lying" else "../" + shard.name
            )
        index.write_text(json.dumps(listed))
    elif kind == "no index":
        index.unlink()
    elif kind == "config":
        (directory / "config.json").write_text("{")
    else:
        tensors = safetensors.torch.load_file(shard)
        name = sorted(tensors)[0]
        if kind == "extra":
            tensors["model.layers.0.mystery.weight"] = torch.zeros(3)
        elif kind == "absent":
            del tensors[name]
        else:
            tensors[name] = tensors[name][:-1].contiguous()
        safetensors.torch.save_file(tensors, shard, {"format": "pt"})
        listed = json.loads(index.read_text())
        listed["weight_map"] |= dict.fromkeys(tensors, shard.name)
        if kind == "absent":
            del listed["weight_map"][name]
        index.write_text(json.dumps(listed))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "not a whole safetensors file: it should have"),
        ("longer", "not a whole safetensors file: it should have"),
        ("header", "header is longer than the file"),
        ("missing shard", "missing; the index needs it"),
        ("lying", "which no file holds"),
        ("outside", "no file of this folder"),
        ("unlisted", "listed elsewhere"),
        ("no index", "files of tensors and no"),
        ("config", "config.json"),
        ("extra", "model.layers.0.mystery.weight matches nothing"),
        ("absent", "is missing"),
        ("shape", "has shape"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(kind, message, saved, tmp_path):
    theirs, _ = saved("v3")
    directory = hf_cases.save(theirs, tmp_path / "hf", max_shard_size="50KB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    damage(kind, directory)
    with pytest.raises(InputError, match=message):
        convert.main(["from-hf", str(directory), str(tmp_path / "ours")])
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model_type", "gpt2", "model_type 'gpt2' is not one of"),
        ("hidden_act", "gelu", "hidden_act is 'gelu'"),
        ("attention_bias", True, "attention_bias is True"),
        ("topk_method", "gready", "topk_method 'gready'"),
        ("rope_parameters", {"rope_type": "longrope"}, "rope type 'longrope' is none of"),
        ("partial_rotary_factor", 0.5, "partial_rotary_factor"),
        ("vocab_size", 0, "vocab_size"),
        ("hidden_size", None, "lacks hidden_size"),
    ],
)
def test_configs_without_an_equal_are_refused(field, value, message, saved):
    original = json.loads((saved("v2")[1] / "config.json").read_text()) | {field: value}
    if value is None:
        del original[field]
    with pytest.raises(InputError, match=message):
        families.decoder(original)


def test_old_and_new_rope_fields_mean_the_same(saved):
    new = json.loads((saved("v3-yarn")[1] / "config.json").read_text())
    old = dict(new)
    rope = dict(old.pop("rope_parameters"))
    old |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope | {"type": "yarn"}}
    del old["rope_scaling"]["rope_type"]
    assert families.decoder(new) == families.decoder(old)
    assert families.decoder(new).attention.yarn is not None

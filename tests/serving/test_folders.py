"""Reference: greedy completions of Hugging Face folders are those of transformers' generate."""

import dataclasses

import hf_cases
import jax
import numpy as np
import pytest
import torch
import transformers

import deepseek_jax
from deepseek_jax import convert
from deepseek_jax.checkpoint import huggingface
from deepseek_jax.checkpoint.manager import Checkpoint, Manager
from deepseek_jax.core.config import to_dict
from deepseek_jax.core.errors import InputError
from deepseek_jax.core.precision import Precision
from deepseek_jax.data.tokenizer import BPE, train_bpe
from deepseek_jax.models.build import build
from deepseek_jax.models.decoder import layer_table
from deepseek_jax.serving.language import LanguageModel

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, about rope

NEW = 64


def theirs(model, rows):
    """New tokens of left-padded rows, as transformers takes them."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    done = model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0,
    )  # fmt: skip
    return done[:, width:].tolist()


@pytest.mark.shows("load", "generate")
@pytest.mark.parametrize(
    "name",
    ["llama-tied-yarn", "qwen2", "qwen3", "v1", "v2-lite-yarn", "v2", "v3-yarn", "v32", "v32-yarn"],
)
def test_greedy_tokens_are_those_of_transformers(name, tmp_path):
    model = hf_cases.hf_model(name, eos_token_id=None, bos_token_id=None)
    directory = hf_cases.save(model, tmp_path / "hf")
    rows = [
        row[:n].tolist() for row, n in zip(hf_cases.tokens(3)[[0, 1, 0]], (3, 17, 30), strict=True)
    ]
    lm = deepseek_jax.load(directory)
    assert lm.tokenizer is None
    expected = theirs(model, rows)
    assert lm.generate_tokens(rows, max_new_tokens=NEW) == expected
    assert len({tuple(row) for row in expected}) == 3
    np.testing.assert_allclose(
        lm.logits(hf_cases.tokens()), hf_cases.logits(model, hf_cases.tokens()), atol=2e-5, rtol=0
    )
    convert.main(["from-hf", str(directory), str(tmp_path / "ours")])
    assert deepseek_jax.load(tmp_path / "ours").generate_tokens(rows, max_new_tokens=5) == [
        row[:5] for row in expected
    ]


@pytest.mark.shows("logits")
@pytest.mark.parametrize("name", ["qwen3-yarn", "v2-yarn", "v3-yarn", "v32-yarn"])
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_padded_rows_are_those_of_transformers(name, left, tmp_path):
    model = hf_cases.hf_model(name)
    lm = deepseek_jax.load(hf_cases.save(model, tmp_path / "hf"))
    tokens, mask = hf_cases.tokens(6), np.ones((2, hf_cases.LENGTH), int)
    mask[1, :13] = 0
    mask[1] = mask[1] if left else mask[1, ::-1]
    with torch.no_grad():
        places = torch.tensor(np.maximum(np.cumsum(mask, 1) - 1, 0))
        expected = model(
            torch.tensor(tokens), attention_mask=torch.tensor(mask), position_ids=places
        ).logits.numpy()
    ours = np.asarray(lm.logits(tokens, mask))
    np.testing.assert_allclose(ours[mask == 1], expected[mask == 1], atol=2e-5, rtol=0)
    whole = np.abs(np.asarray(lm.logits(tokens)) - ours)[1, -1].max()
    assert whole > 1e-3  # the mask was seen


@pytest.mark.parametrize("name", ["qwen2", "v2", "v3-yarn"])
def test_bfloat16_points_the_same_way(name, tmp_path):
    model = hf_cases.hf_model(name)
    folder = huggingface.open_folder(hf_cases.save(model, tmp_path / "hf"))
    half = build(folder.config, Precision(compute="bfloat16", params="bfloat16"))
    params = huggingface.load_params(folder, half, half.shapes)
    rows, theirs = hf_cases.tokens(), hf_cases.logits(model, hf_cases.tokens())
    ours = np.asarray(LanguageModel(half, params, None, folder.config).logits(rows))
    torch_half = hf_cases.logits(model.bfloat16(), rows)
    assert np.median(cosines(ours, theirs)) > 0.999
    # Where a router's near tie falls differently, a token's logits differ: not more than in torch.
    lost = [(cosines(half, theirs) < 0.999).mean() for half in (ours, torch_half)]
    assert lost[0] <= lost[1] + 0.05


def cosines(one, other):
    one, other = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (one, other))
    return (one * other).sum(-1)


def test_rows_end_at_the_configured_token(tmp_path):
    model = hf_cases.hf_model("qwen2", eos_token_id=None)
    lm = deepseek_jax.load(hf_cases.save(model, tmp_path / "hf"))
    rows = [row[:5].tolist() for row in hf_cases.tokens(4)]
    free = lm.generate_tokens(rows, max_new_tokens=20)
    last = free[0][7]
    model = hf_cases.hf_model("qwen2", eos_token_id=[last, 0])
    lm = deepseek_jax.load(hf_cases.save(model, tmp_path / "ending"))
    first = free[0].index(last) + 1
    assert lm.generate_tokens(rows, max_new_tokens=20)[0] == free[0][:first]


def test_a_run_exports_its_tokenizer(tmp_path):
    """transformers opens it, and both forms complete a text alike."""
    lines = (f"def function_{n}(argument): return {n} * argument" for n in range(200))
    tokenizer = train_bpe(BPE(vocab_size=300), lines)
    config = dataclasses.replace(
        huggingface.open_folder(hf_cases.save(hf_cases.hf_model("v3"), tmp_path / "hf")).config,
        vocab_size=320, init_scale=0.3,
    )  # fmt: skip
    model = build(config, Precision(compute="float32"))
    manager = Manager(tmp_path / "run/checkpoints", Checkpoint(), layer_table(config))
    recorded = {"model": to_dict(config), "precision": to_dict(Precision(compute="float32"))}
    state = {"params": model.init(jax.random.key(0))}
    manager.save(1, state, position=0, config=recorded, files=tokenizer.files())
    manager.close()
    convert.main(["to-hf", str(tmp_path / "run"), str(tmp_path / "back")])
    text = "def argument_12(function): return '中文'"
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert theirs(text, add_special_tokens=False).input_ids == tokenizer.encode(text)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    ours, back = (deepseek_jax.load(tmp_path / name) for name in ("run", "back"))
    assert ours.generate(["def "], max_new_tokens=9) == back.generate(["def "], max_new_tokens=9)


def test_text_needs_a_tokenizer(tmp_path):
    lm = deepseek_jax.load(hf_cases.save(hf_cases.hf_model("llama"), tmp_path / "hf"))
    with pytest.raises(InputError, match="no tokenizer"):
        lm.generate(["a"])
    with pytest.raises(InputError, match="no row of tokens"):
        lm.generate_tokens([])
    with pytest.raises(InputError, match="must be .* not empty"):
        lm.generate_tokens([[1], []])
    with pytest.raises(InputError, match="outside this model's vocabulary"):
        lm.generate_tokens([[1, 2, 97]])

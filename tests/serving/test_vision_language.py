"""Reference: what models say of pictures is what transformers' own processors and models say."""

import dataclasses

import numpy as np
import pytest
import tokenizers
import torch
import transformers
import vision_language_cases as seeing
from PIL import Image

import deepseek_jax
from deepseek_jax import convert, generate
from deepseek_jax.checkpoint.safetensors import open_tensors
from deepseek_jax.core.errors import InputError
from deepseek_jax.core.precision import Precision
from deepseek_jax.models.vision_language import build_vision_language
from deepseek_jax.serving.language import load

WORDS = {f"w{number}": number for number in range(97)}
MARK = "<image_placeholder>"
SPECIAL = {MARK: seeing.IMAGE, "<begin_of_image>": 91, "<end_of_image>": 92}
PROMPTS = [f"w3 {MARK} w5 w6 w7 {MARK} w9", f"w4 w8 {MARK} w2"]


def pictures():
    """Three of different shapes."""
    rng = np.random.default_rng(2)
    shapes = [(30, 20), (7, 40), (16, 16)]
    return [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]


def tokenizer_file(folder):
    """A tokenizer of words w0, w1, ... and the marks of images."""
    names = {number: name for name, number in (WORDS | SPECIAL).items()} | {0: "<s>", 1: "</s>"}
    vocab = {name: number for number, name in names.items()}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="w2"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["<s>", "</s>", *SPECIAL])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<s>",
        padding_side="left", extra_special_tokens={
            "image_token": MARK, "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>",
        },
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["deepseek_vl", "deepseek_vl_hybrid", "janus"])
def test_completions_are_those_of_transformers(kind, tmp_path):
    model = seeing.converted(kind)
    model.lm_head.weight.data[[*SPECIAL.values()]] = 0.0  # no marks among the words
    model.save_pretrained(tmp_path)
    names = {
        "deepseek_vl": "DeepseekVL",
        "deepseek_vl_hybrid": "DeepseekVLHybrid",
        "janus": "Janus",
    }
    name = names[kind]
    made = {"size": {"height": 16, "width": 16}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    if kind == "deepseek_vl_hybrid":
        made |= {"high_res_size": {"height": 24, "width": 24}, "resample": 2}
    images = getattr(transformers, f"{name}ImageProcessorPil")(**made)
    processor = getattr(transformers, f"{name}Processor")(
        images, tokenizer_file(tmp_path), num_image_tokens=4
    )
    processor.save_pretrained(tmp_path)
    shown = pictures()
    given = processor(
        text=PROMPTS, images=[Image.fromarray(p) for p in shown], padding=True,
        return_tensors="pt",
    )  # fmt: skip
    views = {k: x.numpy() for k, x in given.items() if k.endswith("pixel_values")}
    given = {k: given[k] for k in ("input_ids", "attention_mask", *views)}
    done = model.generate(**given, max_new_tokens=8, do_sample=False, pad_token_id=0)
    new = done[:, given["input_ids"].shape[1] :].tolist()
    ours = deepseek_jax.load(tmp_path)
    rows = [
        ids[mask > 0].tolist()
        for ids, mask in zip(given["input_ids"], given["attention_mask"], strict=True)
    ]
    pixels = views if len(views) > 1 else views["pixel_values"]
    found = ours.generate_tokens(rows, images=pixels, max_new_tokens=8)
    for mine, theirs in zip(found, new, strict=True):
        assert mine == theirs[: len(mine)] and (len(mine) == 8 or mine[-1] == 1)
    prepared, side = ours.prepared(shown)[0], views["pixel_values"].shape[-1]
    np.testing.assert_allclose(prepared[:, :, -side:, :side], views["pixel_values"], atol=1e-6)
    if len(views) > 1:
        np.testing.assert_allclose(
            prepared[:, :, :-side], views["high_res_pixel_values"], atol=2e-6
        )
    texts = ours.generate(PROMPTS, images=[shown[:2], shown[2]], max_new_tokens=8)
    ended = [row[:-1] if row[-1] == 1 else row for row in found]
    assert [text.split() for text in texts] == [[f"w{t}" for t in row] for row in ended]
    ours = dataclasses.replace(ours, renderer=lambda messages, *_: messages[0]["content"])
    told = ours.chat([{"role": "user", "content": PROMPTS[1]}], images=shown[2:], max_new_tokens=8)
    assert told == texts[1]
    with torch.no_grad():
        theirs = model(**given).logits.numpy()
    mask = given["attention_mask"].numpy()
    mine = ours.logits(given["input_ids"].numpy(), mask, images=pixels)
    there = mask > 0
    np.testing.assert_allclose(mine[there], theirs[there], atol=1e-4 * abs(theirs).max(), rtol=0)


def test_a_whole_prompt_is_the_question_of_what_is_completed(tmp_path):
    """Prompts of different lengths, one without an image; against whole rows without a cache."""
    seeing.converted("deepseek_vl").save_pretrained(tmp_path)
    ours = deepseek_jax.load(tmp_path)
    config = dataclasses.replace(ours.config, prefix="question")
    model = build_vision_language(config, Precision(compute="float32"))
    ours = dataclasses.replace(ours, model=model, config=config)
    image, rng = [seeing.IMAGE] * 4, np.random.default_rng(6)
    pixels = rng.normal(size=(3, 3, 16, 16)).astype(np.float32)
    rows = [[3, *image, 5, 6, 7, *image, 9], [4, 8, 11], [4, *image, 2, 5, 30]]
    found = ours.generate_tokens(rows, images=pixels, max_new_tokens=3)
    whole = [[*row, *new] for row, new in zip(rows, found, strict=True)]
    length = max(map(len, whole))
    tokens = np.array([row + [2] * (length - len(row)) for row in whole])
    mask = np.arange(length)[None] < np.array([*map(len, whole)])[:, None]
    asked = [*map(len, rows)]
    logits = np.asarray(ours.logits(tokens, mask, images=pixels, asked=asked))
    for row, new, best in zip(rows, found, logits.argmax(-1).tolist(), strict=True):
        assert new == best[len(row) - 1 : len(row) - 1 + len(new)]
    with pytest.raises(InputError, match=r"asked is \[40, 3, 4\], and the rows have"):
        ours.logits(tokens, mask, images=pixels, asked=[40, 3, 4])


def test_earlier_answers_of_a_chat_are_no_question(tmp_path):
    """As in training: the question ends where the first answer begins."""
    seeing.converted("deepseek_vl").save_pretrained(tmp_path)
    tokenizer_file(tmp_path).save_pretrained(tmp_path)
    ours = deepseek_jax.load(tmp_path)
    config = dataclasses.replace(ours.config, prefix="question")
    model = build_vision_language(config, Precision(compute="float32"))

    def rendered(messages, *_):
        roles = {"user": "w3", "assistant": "w4"}
        return " ".join(f"{roles[m['role']]} {m['content']}" for m in messages) + " w4"

    ours = dataclasses.replace(ours, model=model, config=config, renderer=rendered)
    (picture,) = pictures()[:1]
    messages = [
        {"role": "user", "content": f"{MARK} w5 w6"}, {"role": "assistant", "content": "w7 w8"},
        {"role": "user", "content": "w9"},
    ]  # fmt: skip
    found = ours.chat(messages, images=[picture], max_new_tokens=4)
    row = [3, *[seeing.IMAGE] * 4, 5, 6, 4, 7, 8, 3, 9, 4]
    asked, views = [row.index(4) + 1], ours.prepared([picture])[0]
    for _ in range(4):
        logits = np.asarray(ours.logits([row], images=views, asked=asked))[0, -1]
        row.append(int(logits.argmax()))
    assert found.split() == ours.tokenizer.decode(row[13:]).split()
    whole = np.asarray(ours.logits([row], images=views))[0]
    parted = np.asarray(ours.logits([row], images=views, asked=asked))[0]
    assert abs(whole - parted)[-1].max() > 1e-3, "it matters what the question is"
    other = dataclasses.replace(ours, renderer=lambda ms, *_: f"w{len(ms)} " + rendered(ms))
    with pytest.raises(InputError, match="writes a question otherwise where answers follow it"):
        other.chat(messages, images=[picture])


def test_vl2_completes_what_it_would_score_highest(tmp_path):
    seeing.vl2_folder("small", tmp_path)
    tokenizer_file(tmp_path).save_pretrained(tmp_path)
    ours = deepseek_jax.load(tmp_path)
    picture = np.random.default_rng(3).integers(0, 256, (30, 90, 3), dtype=np.uint8)
    prompt = f"w3 {MARK} w5 w6"
    text = ours.generate(prompt, images=[picture], max_new_tokens=3)[0].split()
    views, grids = ours.prepared([picture])
    assert views.shape == (1 + grids[0][0] * grids[0][1], 3, 43, 43)
    row = [3, *[seeing.IMAGE] * len(ours.config.sight.layout(grids[0])), 5, 6]
    new = ours.generate_tokens([row], images=views, grids=grids, max_new_tokens=3)[0]
    logits = np.asarray(ours.logits([*row, *new], images=views, grids=grids))[0]
    assert new == logits[len(row) - 1 : -1].argmax(-1).tolist()
    assert text == ours.tokenizer.decode(new).split()
    assert ours.generate("w3 w5", max_new_tokens=2)  # without a picture


def test_the_command_and_what_does_not_fit(tmp_path, capsys):
    seeing.converted("deepseek_vl").save_pretrained(tmp_path)
    tokenizer_file(tmp_path).save_pretrained(tmp_path)
    ours = deepseek_jax.load(tmp_path)
    tokens, _, pixels = seeing.rows()
    for given, why in (
        ((tokens, pixels[:2]), "row 2 has 4 image tokens; 4 of them are no image's"),
        ((tokens, np.concatenate([pixels, pixels])), "for all but 3 images"),
        ((tokens, pixels[:, :, :8]), r"this encoder takes \[B, \(3, 16, 16\)\]"),
    ):
        with pytest.raises(InputError, match=why):
            ours.logits(given[0], images=given[1])
    for prompt, images, why in (
        (f"w3 {MARK}", [pictures()[:1]], "ends with an image"),
        ("w3 w4", [], "1 prompts"),
        (f"w3 {MARK} w4", [pictures()[:2]], "1 image tokens .* and 2 images"),
        (f"w3 {MARK} w4", [], "1 prompts and images for 0"),
    ):
        with pytest.raises(InputError, match=why):
            ours.generate(prompt, images=images)
    Image.fromarray(pictures()[0]).save(tmp_path / "one.png")
    shown = ["--prompt", "w4 w5", "--image", str(tmp_path / "one.png")]
    generate.main(["--checkpoint", str(tmp_path), *shown, "--max-new-tokens", "3"])
    expected = ours.generate(f"{MARK} w4 w5", images=[pictures()[:1]], max_new_tokens=3)
    assert capsys.readouterr().out == f"{expected[0]}\n"
    with pytest.raises(InputError, match="each prompt its own --image"):
        generate.main(["--checkpoint", str(tmp_path), *shown, "--prompt", "w6"])
    with pytest.raises(InputError, match=r"a vision-language model \(deepseek_vl\)"):
        load(tmp_path)


@pytest.mark.parametrize("kind", ["deepseek_vl", "tiny"])
def test_conversion_there_and_back(kind, tmp_path, capsys):
    folder, ours, back = tmp_path / "hf", tmp_path / "ours", tmp_path / "back"
    if kind == "tiny":
        seeing.vl2_folder("tiny", folder)
    else:
        seeing.converted(kind).save_pretrained(folder)
    tokenizer_file(folder).save_pretrained(folder)
    convert.main(["inspect", str(folder)])
    assert "every tensor fits" in capsys.readouterr().out
    convert.main(["from-hf", str(folder), str(ours)])
    convert.main(["inspect", str(ours)])
    convert.main(["to-hf", str(ours), str(back)])
    before, after = open_tensors(folder), open_tensors(back)
    assert {*before} - {*after} == {n for n in before if "attn_pool" in n}
    for name, tensor in after.items():
        np.testing.assert_array_equal(tensor.read(), before[name].read(), err_msg=name)
    models = [deepseek_jax.load(path) for path in (folder, ours, back)]
    assert models[0].config == models[1].config == models[2].config
    rows = [[3, 4, 5]]
    assert models[0].generate_tokens(rows) == models[1].generate_tokens(rows)
    with pytest.raises(InputError, match="not written in float8"):
        convert.main(["to-hf", str(ours), str(tmp_path / "f8"), "--dtype", "float8-block"])

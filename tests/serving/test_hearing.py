"""Reference and round trip: a saved run that hears and sees goes on as its own logits say.

Its media come as files and arrays, in prompts, chats and the command; what cannot be is refused.
"""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import transformers
from media_cases import film, wav
from PIL import Image

import deepseek_jax
from deepseek_jax import convert, generate
from deepseek_jax.checkpoint import huggingface
from deepseek_jax.checkpoint.manager import Checkpoint, Manager
from deepseek_jax.core.config import to_dict
from deepseek_jax.core.errors import InputError
from deepseek_jax.core.precision import Precision
from deepseek_jax.layers.encoder import Transformer
from deepseek_jax.models.audio import Whisper
from deepseek_jax.models.ear import Ear
from deepseek_jax.models.naflex import NaFlex
from deepseek_jax.models.projectors import DownsampleProjector, Resampler
from deepseek_jax.models.vision_language import TEXT, VisionLanguage, build_vision_language
from deepseek_jax.models.vit import ViT
from deepseek_jax.serving import chat, media

IDS = {"<image>": 50, "<audio>": 51, "<video>": 52}
SMALL = Transformer(num_layers=1, embed_dim=16, num_heads=2, mlp_dim=24)
WHISPER = Whisper(transformer=SMALL, num_mels=5, num_positions=6)  # a window of 1920 samples
TEXTS = "{% for m in messages %}{{ m['content'] }} {% endfor %}w7"
LISTS = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }} "
    "{% else %}<{{ c['type'] }}>{% endif %}{% endfor %}{% endfor %}w7"
)
LOUD = 0.1 * np.sin(np.arange(2500) / 7)
FILM = np.random.default_rng(1).integers(0, 256, (3, 9, 14, 3), dtype=np.uint8)
PICTURE = np.random.default_rng(2).integers(0, 256, (20, 13, 3), dtype=np.uint8)


def tokenizer_files(folder, template=TEXTS):
    """What stands beside a checkpoint: words w0 ... w49, the marks, a chat template."""
    names = {number: f"w{number}" for number in range(50)} | {0: "<s>", 1: "</s>"}
    vocab = {name: number for number, name in names.items()} | IDS
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="w2"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["<s>", "</s>", *IDS])
    folder.mkdir(parents=True, exist_ok=True)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", chat_template=template
    ).save_pretrained(folder)
    (folder / "config.json").write_text("{}")
    return {f"{huggingface.BESIDE}/{x.name}": x.read_bytes() for x in folder.iterdir()}


def run(folder, config, seed=3):
    """A run that holds a checkpoint of a random model."""
    model = build_vision_language(config, Precision(compute="float32"))
    params = jax.tree.map(jnp.asarray, cases.random_params(model.shapes, seed))
    recorded = {"model": to_dict(config), "precision": to_dict(Precision())}
    manager = Manager(folder / "checkpoints", Checkpoint(), model.layers)
    files = tokenizer_files(folder / "hf")
    manager.save(1, {"params": params}, position=0, config=recorded, files=files)
    manager.close()
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    config = VisionLanguage(
        language=cases.decoder("gqa", None, vocab_size=53),
        vision=NaFlex(transformer=SMALL, grid_size=3, patch_size=4, pooling="none"),
        max_patches=6,
        audio=Ear(encoder=WHISPER, projector=Resampler(num_tokens=2, num_heads=4, ratio=1)),
    )
    return run(tmp_path_factory.mktemp("run"), config)


@pytest.fixture(scope="module")
def lm(saved):
    return deepseek_jax.load(saved)


def test_a_run_goes_on_as_its_logits_say(lm, tmp_path, capsys, saved):
    shown = {"images": [[PICTURE]], "audio": [[LOUD]], "video": [[FILM]]}
    prompt = "w3 <image> w4 <video> w5 <audio> w6"
    told = lm.generate(prompt, **shown, max_new_tokens=3)
    views, grids = lm.prepared([PICTURE, *FILM])
    assert views.shape == (4, 6, 48) and all(1 < w * h <= 6 for w, h in grids)
    counts = [wide * high for wide, high in grids]
    row = [3, *[50] * counts[0], 4, *[50] * sum(counts[1:]), 5, *[51] * 4, 6]  # two windows
    beside = {"images": views, "grids": grids, "audio": [LOUD]}
    given = lm.inputs(np.array([row]), **beside)
    np.testing.assert_array_equal(given["images"][0], views)
    assert given["shapes"][0].tolist() == [[high, wide] for wide, high in grids]
    assert any(wide != high for wide, high in grids)
    np.testing.assert_array_equal(given["sounds"].ravel()[:2500], LOUD.astype(np.float32))
    assert given["sounds"].shape == (1, 2, 1920) and not given["sounds"].ravel()[2500:].any()
    new = lm.generate_tokens([row], **beside, max_new_tokens=3)[0]
    logits = np.asarray(lm.logits([*row, *new], **beside))[0]
    assert new == logits[len(row) - 1 : -1].argmax(-1).tolist()
    assert told[0].split() == lm.tokenizer.decode(new).split()
    silent = lm.logits([*row, *new], **beside | {"audio": [0 * LOUD]})[0]
    assert abs(silent - logits)[-1].max() > 1e-3 * abs(logits).max()  # it hears

    # The same from files, and the sound and the film before the prompt where it has no marks.
    Image.fromarray(PICTURE).save(tmp_path / "a.png")
    files = {
        "images": [str(tmp_path / "a.png")], "video": [film(tmp_path / "a.mkv", FILM)],
        "audio": [wav(tmp_path / "a.wav", LOUD)],
    }  # fmt: skip
    np.testing.assert_array_equal(media.opened("video", files["video"][0], 3), FILM)
    assert media.opened("video", files["video"][0], 2).shape == (2, 9, 14, 3)
    bare = lm.generate("w6 w7", **files, num_frames=3, max_new_tokens=3)
    marked = "<image> <video> <audio> w6 w7"
    assert bare == lm.generate(marked, **shown, max_new_tokens=3)
    flags = ["--image", files["images"][0], "--video", files["video"][0]]
    flags += ["--audio", files["audio"][0], "--num-frames", "3", "--max-new-tokens", "3"]
    generate.main(["--checkpoint", str(saved), "--prompt", "w6 w7", *flags])
    assert capsys.readouterr().out == f"{bare[0]}\n"

    # And as messages, whatever the template reads.
    content = [{"type": "image", "image": PICTURE}, {"type": "video", "video": FILM}]
    content += [{"type": "audio", "path": files["audio"][0]}, {"type": "text", "text": "w6"}]
    messages = [{"role": "user", "content": content}]
    assert lm.chat(messages, max_new_tokens=3) == bare[0]
    plain = [{"role": "user", "content": [{"type": x["type"]} for x in content[:3]] + content[3:]}]
    assert lm.chat(plain, **{k: x[0] for k, x in shown.items()}, max_new_tokens=3) == bare[0]
    generate.main(["--checkpoint", str(saved), "--chat", "--prompt", "w6", *flags])
    assert capsys.readouterr().out == lm.chat(
        [{"role": "user", "content": [content[0], content[2], content[1], content[3]]}],
        max_new_tokens=3,
    ) + "\n"  # fmt: skip


def test_templates_read_texts_or_lists(tmp_path):
    content = [{"type": "image"}, {"type": "text", "text": "w6"}, {"type": "audio"}]
    messages, tools = chat.checked([{"role": "user", "content": content}], None)
    marks = {"image": "<image>", "audio": "<audio>"}
    for name, template in (("texts", TEXTS), ("lists", LISTS)):
        tokenizer_files(tmp_path / name, template)
        written = chat.renderer(tmp_path / name, marks)(messages, tools, {})
        assert written == {"texts": "<image>w6<audio> w7", "lists": "<image>w6 <audio>w7"}[name]
        with pytest.raises(InputError, match="this model takes no audio"):
            chat.renderer(tmp_path / name, {"image": "<image>"})(messages, tools, {})
    tokenizer_files(tmp_path / "rude", "w9")
    with pytest.raises(InputError, match="leaves out what the user says"):
        chat.renderer(tmp_path / "rude", marks)(messages, tools, {})


def test_sounds_of_any_form(tmp_path):
    stereo = np.stack([LOUD, -0.5 * LOUD], 1)
    native = wav(tmp_path / "a.wav", stereo, 8_000)
    found = media.opened("audio", native)
    assert found.shape == (5000,) and found.dtype == np.float32
    whole = np.round(stereo * 32767).astype(np.int16)
    for given in ((whole, 8_000), (whole.T, 8_000)):
        np.testing.assert_allclose(media.opened("audio", given), found, atol=1e-6)
    np.testing.assert_allclose(media.opened("audio", LOUD), LOUD.astype(np.float32))
    for given, why in (
        (np.zeros(0), "of shape \\(0,\\); give samples"),
        (np.zeros((2, 3, 4)), "of shape \\(2, 3, 4\\)"),
        (np.zeros((20, 30)), "20 channels"),
        (np.array([np.nan]), "infinite or not a number"),
        (np.zeros(5, bool), "not bool"),
        ((LOUD, 3), "3 samples a second"),
        ((np.zeros(1), 192_000), "too short to be heard"),
        (str(tmp_path / "none.wav"), "No such file"),
        (wav(tmp_path / "empty.wav", np.zeros(0)), "no samples"),
    ):
        with pytest.raises(InputError, match=why):
            media.opened("audio", given)


def test_films_that_are_refused(tmp_path):
    whole = (tmp_path / "a.mkv", film(tmp_path / "a.mkv", FILM))[0].read_bytes()
    for name, data, why in (
        ("cut.mkv", whole[: len(whole) // 2], "cut.mkv: "),
        ("sound.mkv", b"\x1a\x45\xdf\xa3" + b"\0" * 40, "sound.mkv: "),
        ("text.mp4", b"hello", "text.mp4: "),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=why):
            media.opened("video", str(tmp_path / name))
    Image.fromarray(FILM[0]).save(
        tmp_path / "a.gif", save_all=True, append_images=[Image.fromarray(x) for x in FILM[1:]]
    )
    assert media.opened("video", tmp_path / "a.gif", 3).shape == FILM.shape
    for given, why in (
        (FILM[0], "give a file, or frames"),
        (FILM[:0], "of shape \\(0, 9, 14, 3\\)"),
    ):
        with pytest.raises(InputError, match=why):
            media.opened("video", given)


def test_what_does_not_fit(lm, saved, tmp_path, capsys):
    views, grids = lm.prepared([PICTURE])
    row = [3, *[50] * (grids[0][0] * grids[0][1]), 4, 51, 51, 5]
    for images, given_grids, audio, why in (
        (views, None, [LOUD[:900]], "give each one's grid"),
        (views[:, :5], grids, None, r"takes \[N, 6, 48\]"),
        (views, [(9, 9)], None, "from 1 to 6 patches"),
        (views, grids, [], "row 0 has 2 sound tokens; 2 of them are no sound's"),
        (views, grids, [LOUD], "row 0 has 2 sound tokens"),
        (views, grids, [LOUD[:900]] * 2, "for all but 1 sounds"),
        (views, grids, [LOUD[:0]], "give samples"),
    ):
        with pytest.raises(InputError, match=why):
            lm.logits(row, images=images, grids=given_grids, audio=audio)
    user = {"role": "user", "content": [{"type": "audio", "audio": LOUD}, {"type": "audio"}]}
    for make, why in (
        (lambda: lm.generate("w3 <audio>", audio=[[LOUD]]), "ends with an image or a sound"),
        (lambda: lm.generate("w3", audio=[LOUD, LOUD]), "1 prompts and sounds for 2"),
        (
            lambda: lm.generate("w3 <video> w4", audio=[LOUD]),
            r"1 video tokens \(<video>\) and 0 videos",
        ),
        (lambda: lm.chat([user]), "1 of 2 sounds in the messages are missing"),
        (lambda: lm.chat([{"role": "user", "content": user["content"][:1]}], audio=[LOUD]), "both"),
        (lambda: lm.logits(row, images=views, grids=grids, video=[FILM]), "images or video"),
    ):
        with pytest.raises(InputError, match=why):
            make()
    with pytest.raises(InputError, match="no folder of Hugging Face has an ear"):
        convert.main(["to-hf", str(saved), str(tmp_path / "hf")])
    capsys.readouterr()


def test_who_does_not_hear_says_so(tmp_path):
    config = VisionLanguage(
        language=cases.decoder("gqa", None, vocab_size=53),
        vision=ViT(transformer=SMALL, image_size=(8, 8), patch_size=4, class_token=False,
                   pooling="none"),
        projector=DownsampleProjector(),
    )  # fmt: skip
    where = run(tmp_path / "deaf", config)
    deaf = deepseek_jax.load(where)
    assert deaf.config.audio is None
    for make in (
        lambda: deaf.generate("w3", audio=[LOUD]),
        lambda: deaf.generate("w3 <audio> w4", audio=[LOUD]),
        lambda: deaf.logits([3, 51, 4], audio=[LOUD]),
        lambda: deaf.chat([{"role": "user", "content": [{"type": "audio", "audio": LOUD}]}]),
    ):
        with pytest.raises(InputError, match="this model takes no audio: it has no ear"):
            make()
    sound = wav(tmp_path / "a.wav", LOUD)
    with pytest.raises(InputError, match="this model takes no audio: leave out --audio"):
        generate.main(["--checkpoint", str(where), "--prompt", "w3", "--audio", sound])
    # Frames of a film are lines with a separator, none of them cut into tiles.
    row = [3, *[50] * 9, 4]
    given = deaf.inputs(np.array([row]), *media.views_of_films(config, media.Look("half"), [FILM]))
    assert given["sources"][0].tolist() == [TEXT, 0, -1, -2, 1, -1, -2, 2, -1, -2, TEXT]
    assert given["images"].shape == (1, 3, 8, 8, 3)
    assert deaf.logits(row, video=[FILM]).shape == (1, 11, 53)

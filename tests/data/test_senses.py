"""Conversations with sounds and films: rows by hand, as serving takes the same media; refusals."""

import dataclasses
import json

import numpy as np
import pytest
from media_cases import film, wav
from PIL import Image

from deepseek_jax.core.errors import InputError
from deepseek_jax.data.audio import Windows, read_wave
from deepseek_jax.data.augment import Augmentation
from deepseek_jax.data.media import MediaFolder
from deepseek_jax.data.questions import MovingQuestions, SpokenQuestions
from deepseek_jax.data.seeing import Seeing, SeeingPart, open_seeing
from deepseek_jax.data.tiles import TEXT, Budget, Sight, patched
from deepseek_jax.data.tokenizer import BPE, Bytes
from deepseek_jax.data.vision import normalized
from deepseek_jax.layers.attention import GQA
from deepseek_jax.layers.encoder import Transformer
from deepseek_jax.models.audio import Whisper
from deepseek_jax.models.decoder import Decoder
from deepseek_jax.models.ear import Ear
from deepseek_jax.models.naflex import NaFlex
from deepseek_jax.models.projectors import DownsampleProjector, MLPProjector, Resampler
from deepseek_jax.models.vision_language import VisionLanguage
from deepseek_jax.models.vit import ViT
from deepseek_jax.serving import media

EAR = Windows(rate=16_000, size=1920, tokens=3, stride=640)
ROOMY = Sight(size=24, tokens=4)
FOUR, TILED = Sight(size=8, tokens=4), Sight(size=8, tokens=4, side=2)
FLEXIBLE = Budget(patch=4, max_patches=6, tokens=6, each=True)
IMAGE, SOUND = 300, 301  # no bytes
FILM = np.random.default_rng(1).integers(0, 256, (4, 9, 14, 3), dtype=np.uint8)
LOUD = 0.1 * np.sin(np.arange(2500) / 7)


def turns(question, answer="a"):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Media of all kinds; a sound at half the rate, one of no samples, a truncated film."""
    folder = tmp_path_factory.mktemp("senses")
    wav(folder / "a.wav", LOUD)
    wav(folder / "half.wav", LOUD[::2], 8_000)
    wav(folder / "empty.wav", LOUD[:0])
    film(folder / "a.mkv", FILM)
    whole = (folder / "a.mkv").read_bytes()
    (folder / "cut.mkv").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(FILM[0]).save(folder / "a.png")
    return folder


def opened(folder, *records, sight=FOUR, length=64, ear=EAR, **fields):
    lines = [json.dumps(record | {"group": str(i)}) for i, record in enumerate(records)]
    (folder / "some.jsonl").write_text("\n".join(lines))
    part = SeeingPart(source=MediaFolder(path=str(folder), manifest="some.jsonl"))
    base = {"parts": (part,), "tokenizer": Bytes(), "views": 5, "frames": 2, "windows": 3}
    base |= {"max_skipped": 0.0, "cache_dir": str(folder / "cache")}
    config = Seeing(**(base | fields))
    given = {"image_id": IMAGE, "audio_id": SOUND, "sequence_length": length, "seed": 0}
    return open_seeing(config, sight=sight, hearing=ear, **given)


def row_of(dataset, number=0, draw=None):
    rows = dataset.train.rows[0]
    return rows.row(*rows.talks.talks(number, draw))


GOOD = {"messages": turns("hello")}
ALL = {
    "image": "a.png",
    "video": "a.mkv",
    "sounds": ["a.wav", "half.wav"],
    "messages": turns("<audio>x<video>y<image><audio>z"),
}


def test_media_stand_where_their_marks_do(folder):
    """A row by hand: two sounds of two windows, a film of two frames between them, a picture."""
    ids = [256, *b"User: ", *[SOUND] * 4, *b"x", *[IMAGE] * 8, *b"y", *[IMAGE] * 4]
    ids += [*[SOUND] * 4, *b"z\n\nAssistant: a", 257]
    with pytest.raises(InputError, match="4 windows of sound, and data.windows is 3"):
        row_of(opened(folder, ALL, GOOD, windows=3))
    row = row_of(opened(folder, ALL, GOOD, windows=4))
    count = len(ids) - 1
    np.testing.assert_array_equal(row["tokens"][:count], ids[:-1])
    first = 5 * 4  # behind the views' tokens
    seen = row["sources"][row["sources"] != TEXT]
    windows = [first + i for i in range(4)], [first + 6 + i for i in range(4)]
    np.testing.assert_array_equal(seen, [*windows[0], *range(8), *range(8, 12), *windows[1]])
    learned = np.flatnonzero(row["weights"][:, 0])
    np.testing.assert_array_equal(row["targets"][learned, 0], [*b" a", 257])
    sounds = row["sounds"].reshape(2, -1)
    np.testing.assert_allclose(sounds[0, :2500], LOUD, atol=1e-4)
    np.testing.assert_array_equal(sounds[1, :2500], read_wave(folder / "half.wav", 16_000))
    np.testing.assert_allclose(sounds[1, 200:2300], LOUD[200:2300], atol=2e-3)  # resampled
    assert row["sounds"].shape == (4, 1920) and not sounds[:, 2500:].any()
    assert row["images"].shape == (5, 8, 8, 3) and not row["images"][3:].any()
    # Of four frames in two halves: the second and the last.
    alone = row_of(opened(folder, {"image": "a.png", "messages": turns("<image>")}, GOOD))
    np.testing.assert_array_equal(row["images"][2], alone["images"][0])
    Image.fromarray(FILM[1]).save(folder / "one.png")
    alone = row_of(opened(folder, {"image": "one.png", "messages": turns("<image>")}, GOOD))
    np.testing.assert_array_equal(row["images"][0], alone["images"][0])


SMALL = Transformer(num_layers=1, embed_dim=16, num_heads=2, mlp_dim=24)
VIEW = ViT(transformer=SMALL, image_size=(8, 8), patch_size=4, class_token=False, pooling="none")
NAFLEX = NaFlex(transformer=SMALL, grid_size=3, patch_size=4, pooling="none")
WHISPER = Whisper(transformer=SMALL, num_mels=5, num_positions=6)
KINDS = {
    "patches": (NAFLEX, MLPProjector(), MLPProjector()),
    "patches resampled": (NAFLEX, Resampler(num_tokens=2, num_heads=4, ratio=1), None),
    "tiles": (VIEW, DownsampleProjector(), Resampler(num_tokens=2, num_heads=4, ratio=1)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_that_serving_makes(folder, kind):
    """The same media, tokens and numbers as a prompt's."""
    vision, projector, heard = KINDS[kind]
    ear = heard and Ear(encoder=WHISPER, projector=heard, join=3 if kind == "patches" else 1)
    decoder = Decoder(
        vocab_size=400, embed_dim=16, num_layers=1, mlp_dim=16,
        attention=GQA(num_heads=2, num_kv_heads=1, head_dim=8),
    )  # fmt: skip
    config = VisionLanguage(
        language=decoder, vision=vision, projector=projector, audio=ear, max_patches=6
    )
    marks = "<image>x<video>" + ("y<audio>" if ear else "")
    record = {"image": "a.png", "video": "a.mkv", "messages": turns(marks)}
    record |= {"audio": "a.wav"} if ear else {}
    given = {"sight": config.sight, "ear": config.hearing, "views": 12, "length": 200}
    row = row_of(opened(folder, record, GOOD, windows=2 if ear else 0, **given))

    picture, frames = FILM[0], FILM[[1, 3]]
    views, grids = media.views_of_pictures(config, media.Look("half"), [picture])
    films, more = media.views_of_films(config, media.Look("half"), [frames])
    marked = row["tokens"][None] == IMAGE
    if vision is VIEW:
        views, films = (np.moveaxis(x, 1, -1) for x in (views, films))
        given = media.seen(config, marked, np.moveaxis(np.concatenate([views, films]), -1, 1),
                           [*grids, *more])  # fmt: skip
        count = len(given["images"][0])
        found = normalized(row["images"], "half")
        np.testing.assert_allclose(found[:count], given["images"][0], atol=1e-6)
        assert not row["images"][count:].any() and count > 3
    else:
        given = media.seen(config, marked, np.concatenate([views, films]), [*grids, *more])
        np.testing.assert_array_equal(row["images"][:3], given["images"][0])
        np.testing.assert_array_equal(row["shapes"][:3], given["shapes"][0])
        assert len(row["images"]) == 12 and not row["shapes"][3:].any()
    sources = given["sources"][0]
    if ear:
        heard = row["tokens"][None] == SOUND
        sounds, places = media.heard(ear, heard, [str(folder / "a.wav")])
        np.testing.assert_array_equal(row["sounds"], sounds[0])
        sources = np.where(heard[0], places[0] + 12 * config.view_tokens, sources)
    np.testing.assert_array_equal(row["sources"], sources)


@pytest.mark.parametrize("record, why, fields", [
    ({"audio": "a.wav", "messages": turns("no mark")}, "0 times <audio>, and 1 sounds", {}),
    ({"messages": turns("<video>?")}, "1 times <video>, and 0 videos", {}),
    ({"image": "a.png", "messages": turns("<audio>")}, "0 times <image>, and 1 images", {}),
    ({"audio": "empty.wav", "messages": turns("<audio>")}, "empty.wav, audio: no samples", {}),
    ({"video": "cut.mkv", "messages": turns("<video>")}, "cut.mkv, video: truncated", {}),
    ({"video": "a.wav", "messages": turns("<video>")}, "a.wav, video: not an image", {}),
    ({"audio": "a.png", "messages": turns("<audio>")}, "a.png, audio: ", {}),
    ({"audio": "a.wav", "messages": turns("<audio>")}, "has no ear: its model.audio is None",
     {"ear": None, "windows": 0}),
    ({"audio": "a.wav", "messages": turns("<audio>")}, "1 sounds, and data.windows is 0",
     {"windows": 0}),
    ({"audio": "a.wav", "messages": turns("<audio>")}, "2 windows of sound", {"windows": 1}),
    ({"video": "a.mkv", "messages": turns("<video>")}, "a film, and data.frames is 0",
     {"frames": 0}),
    ({"videos": ["a.mkv"] * 3, "messages": turns("<video><video><video>")},
     "0 images and 3 films of 2 frames, and data.views is 5", {}),
    ({"audio": "a.wav", "messages": turns("?", "<audio>")}, "an answer holds <audio>", {}),
    ({"sounds": "a.wav", "messages": turns("?")}, "'sounds' is not a list", {}),
])  # fmt: skip
def test_what_cannot_be_used_is_named(folder, record, why, fields):
    with pytest.raises(InputError, match=why):
        row_of(opened(folder, record, GOOD, **fields))


def test_what_is_damaged_is_skipped_counted_and_named(folder, capsys):
    heard = {"audio": "a.wav", "messages": turns("<audio>", "b")}
    bad = {"video": "cut.mkv", "messages": turns("<video>")}
    dataset = opened(folder, *[heard] * 7, bad, max_skipped=0.2, held_out=0.01)
    batch = dataset.train.batch(np.arange(24))
    assert (batch["weights"].sum((1, 2)) == 3).all() and batch["sounds"][:, 0].any(1).all()
    assert capsys.readouterr().err.count("skipped (1 of 8): cut.mkv, video: truncated") == 1
    again = opened(folder, *[heard] * 7, bad, max_skipped=0.2, held_out=0.01)
    for name, late in again.train.batch(np.arange(9, 12)).items():
        np.testing.assert_array_equal(batch[name][9:12], late, err_msg=name)


def test_a_films_frames_vary_alike(folder):
    record = {"video": "still.mkv", "messages": turns("<video>")}
    film(folder / "still.mkv", np.stack([FILM[0]] * 4))
    how = Augmentation(min_area=0.4, brightness=0.5)
    rows = opened(folder, record, GOOD, augmentation=how, held_out=0.01).train.rows[0]
    (talk,) = rows.talks.talks(0, None)
    shown = [rows.row(talk, number)["images"] for number in (None, 0, 1)]
    for images in shown:
        np.testing.assert_array_equal(images[0], images[1])
    assert (shown[0] != shown[1]).any() and (shown[1] != shown[2]).any()


def made(cache_dir, *sources, sight=ROOMY, hearing=EAR):
    parts = tuple(SeeingPart(source=source) for source in sources)
    config = Seeing(
        parts=parts, tokenizer=BPE(vocab_size=300), views=3, frames=3, windows=8 if hearing else 0,
        eval_rows=3, cache_dir=str(cache_dir),
    )  # fmt: skip
    given = {"sight": sight, "image_id": None, "hearing": hearing}
    return open_seeing(config, **given, sequence_length=60, seed=0)


def nobody_is_on_both_sides(dataset):
    for rows, other in zip(dataset.train.rows, dataset.held, strict=True):
        sides = ({*rows.talks.hashes[x.numbers].tolist()} for x in (rows, other))
        assert not set.intersection(*sides)


def test_digits_that_move(tmp_path):
    dataset, again = (made(tmp_path, MovingQuestions(), hearing=None) for _ in range(2))
    batch, second = (x.train.batch(np.arange(12)) for x in (dataset, again))
    for name, values in batch.items():
        np.testing.assert_array_equal(values, second[name], err_msg=name)
    assert batch["images"].any((1, 2, 3, 4)).all()
    assert {talk.kind for talk, _ in dataset.held_rows()} == {"digit", "direction"}
    where = dataset.train.rows[0].talks.talks(5, None)
    assert where[0].answer == "five"
    film = where[0].media[0].read()
    assert film.shape == (3, 24, 24, 3) and (film[0] != film[2]).any()
    nobody_is_on_both_sides(dataset)
    with pytest.raises(InputError, match="no room to move in 3 frames of 2"):
        made(tmp_path, MovingQuestions(), sight=Sight(size=2, tokens=4))


def test_words_that_are_spoken_beside_digits_that_move(tmp_path):
    pytest.importorskip("espeakng_loader", reason="the extra `speech` (GPL) is not installed")
    sources = SpokenQuestions(words=("one", "two"), voices=("en-us",)), MovingQuestions()
    dataset, again = (made(tmp_path, *sources) for _ in range(2))
    names = [dataset.tokenizer.token_id(f"<{kind}>") for kind in ("image", "video", "audio")]
    assert names == [2, 3, 4]
    batch, second = (x.train.batch(np.arange(20)) for x in (dataset, again))
    for name, values in batch.items():
        np.testing.assert_array_equal(values, second[name], err_msg=name)
    heard = batch["sounds"].any((1, 2))
    assert 0 < heard.sum() < 20 and (heard != batch["images"].any((1, 2, 3, 4))).all()
    assert ((batch["tokens"] == 4).any(1) == heard).all()
    assert {talk.kind for talk, _ in dataset.held_rows()} == {"spoken", "digit", "direction"}
    assert dataset.train.rows[0].talks.talks(1, None)[0].answer == "two"
    nobody_is_on_both_sides(dataset)


def test_no_room_or_no_ear(tmp_path):
    parts = tuple(SeeingPart(source=source) for source in (SpokenQuestions(), MovingQuestions()))
    config = Seeing(parts=parts, views=3, frames=3, windows=8, cache_dir=str(tmp_path))
    with pytest.raises(InputError, match="data.windows is 8, and this model has no ear"):
        given = {"sight": FOUR, "image_id": None, "hearing": None}
        open_seeing(config, **given, sequence_length=60, seed=0)
    for fields, why in (
        ({"windows": 0}, "data.windows is 0: there is no room for SpokenQuestions"),
        ({"frames": 0}, "data.frames is 0: there is no room for MovingQuestions"),
        ({"frames": 4}, "frames \\(4\\) .* have room in data.views \\(3\\)"),
    ):
        with pytest.raises(ValueError, match=why):
            dataclasses.replace(config, **fields)


def test_a_picture_in_two_sizes_is_one_view(folder):
    """The large one as alone, below it the same resized; each normalized in its own way."""
    sight = Sight(size=16, tokens=4, small=6)
    record = {"image": "a.png", "messages": turns("<image>")}
    row = row_of(opened(folder, record, GOOD, sight=sight, views=2, normalization="clip+half"))
    alone = row_of(opened(folder, record, GOOD, sight=Sight(16, 4), views=2, normalization="clip"))
    view, large = row["images"][0], alone["images"][0]
    assert row["images"].shape == (2, 22, 16, 3)
    np.testing.assert_array_equal(view[:16], large)
    again = Image.fromarray(large).resize((6, 6), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(view[16:, :6], np.asarray(again))
    assert not view[16:, 6:].any()
    made = normalized(view[None], "clip+half")[0]
    np.testing.assert_array_equal(made[:16], normalized(view[:16], "clip"))
    np.testing.assert_array_equal(made[16:], normalized(view[16:], "half"))


def test_patches_keep_an_images_shape(folder):
    """Wide and high, alone in their rows."""
    Image.fromarray(FILM[0][:, :4]).save(folder / "high.png")
    for name, pixels in (("a.png", FILM[0]), ("high.png", FILM[0][:, :4])):
        record = {"image": name, "messages": turns("<image>")}
        row = row_of(opened(folder, record, GOOD, sight=FLEXIBLE, views=2))
        made = patched([pixels], patch=4, max_patches=6)
        np.testing.assert_array_equal(row["images"][0], made.pixels[0])
        np.testing.assert_array_equal(row["shapes"], [made.shapes[0], (0, 0)])
        assert (row["tokens"] == IMAGE).sum() == made.shapes[0].prod() > 1
        assert made.shapes[0, 0] != made.shapes[0, 1]

"""Round trip: configs through JSON and flags; one clear message for each kind of bad input."""

import dataclasses
import errno
import json
import os

import pytest

from deepseek_jax.core import config as core_config
from deepseek_jax.core.errors import InputError, run_command
from deepseek_jax.layers.attention import GQA
from deepseek_jax.layers.mla import MLA
from deepseek_jax.models.decoder import Decoder
from deepseek_jax.ops.rope import Yarn

YARN = Yarn(factor=4.0, original_length=8)
LATENT = MLA(num_heads=4, kv_rank=8, nope_dim=4, rope_dim=2, value_dim=4, yarn=YARN)
DECODER = Decoder(vocab_size=16, embed_dim=8, num_layers=2, attention=LATENT, mlp_dim=16)
GROUPED = dataclasses.replace(
    DECODER, attention=GQA(num_heads=4, num_kv_heads=2, head_dim=4, window=8)
)


@pytest.mark.parametrize("config", [DECODER, GROUPED])
def test_json_round_trip(config, tmp_path):
    core_config.save_json(config, tmp_path / "config.json")
    data = core_config.read_json(tmp_path / "config.json")
    assert core_config.from_dict(Decoder, data) == config
    assert data["attention"]["type"] == type(config.attention).__name__


@pytest.mark.parametrize("old, now", [(False, "causal"), (True, "images")])
def test_what_was_recorded_under_old_names_is_read_under_todays(old, now, tmp_path):
    part = {"type": "VisionLanguage", "whole_images": old, "image_id": None}
    run = {"model": part, "stages": [{"type": "Stage", "whole_images": old}]}
    (tmp_path / "config.json").write_text(json.dumps({"version": 1} | run))
    found = core_config.read_json(tmp_path / "config.json")
    assert found["model"] == {"type": "VisionLanguage", "prefix": now, "image_id": None}
    assert found["stages"] == run["stages"]  # another type's field stays


def test_flags_edit_the_chosen_type():
    flags = ["--num-layers", "3", "--attention.window", "5", "--attention.bias", "True"]
    changed = core_config.override(GROUPED, flags, prog="test")
    assert (changed.num_layers, changed.attention.window, changed.attention.bias) == (3, 5, True)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--num-layer", "3"], "--num-layers"),
        (["--num-layers", "many"], "num-layers"),
        (["--attention.kv-rank", "4"], "kv-rank"),
    ],
)
def test_wrong_flags_exit_with_2_and_say_why(flags, said, capsys):
    with pytest.raises(SystemExit) as caught:
        core_config.override(GROUPED, flags, prog="test")
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--attention.num-kv-heads", "3"], "multiple of num_kv_heads"),
        (["--attention.window", "0"], "window is 0"),
        (["--num-dense-layers", "3"], "num_dense_layers is 3"),
    ],
)
def test_contradictions_are_one_sentence(flags, said, capsys):
    with pytest.raises(SystemExit) as caught:
        core_config.override(GROUPED, flags, prog="test")
    assert caught.value.code == 2
    printed = capsys.readouterr().err.replace("│", " ")
    assert said in " ".join(printed.split()) and "Traceback" not in printed


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_layer": 3}, "did you mean num_layers"),
        ({"num_layers": "3"}, r"config\.num_layers is '3'"),
        ({"attention": {"type": "Flash"}}, "not one of"),
        ({"remat": "some"}, "not one of"),
        ({"num_layers": 0}, "at least 1"),
    ],
)
def test_json_that_does_not_fit_is_named(change, said):
    with pytest.raises(InputError, match=said):
        core_config.from_dict(Decoder, core_config.to_dict(GROUPED) | change)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no such config file"),
        ("def get_config(:", r":1: SyntaxError"),
        ("x = 1", "must define get_config"),
        ("\ndef get_config():\n    return 1 / 0", r":3: ZeroDivisionError"),
        ("def get_config():\n    return 3", "returned int, not Decoder"),
    ],
)
def test_config_files_that_fail_are_named_with_the_line(text, said, tmp_path):
    path = tmp_path / "broken.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=said):
        core_config.load_config(path, Decoder)


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"version": 0})])
def test_damaged_json_is_named(text, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"config\.json"):
        core_config.read_json(path)


@pytest.mark.parametrize(
    ("error", "code"), [(InputError("a\nb: too few"), 2), (KeyboardInterrupt(), 130)]
)
def test_commands_end_without_a_traceback(error, code, capsys):
    def main(argv):
        raise error

    with pytest.raises(SystemExit) as caught:
        run_command(main, [])
    assert caught.value.code == code
    assert capsys.readouterr().err == ("error: a\\nb: too few\n" if code == 2 else "")


def test_a_full_disk_is_one_line_wherever_it_is_met(capsys):
    def main(argv):
        raise OSError(number, os.strerror(number), "run/eval.jsonl.tmp")

    number = errno.ENOSPC
    with pytest.raises(SystemExit) as caught:
        run_command(main, [])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert "No space left" in error and "run/eval.jsonl.tmp" in error
    number = errno.EACCES  # a bug, or nothing that making room would mend: the trace stays
    with pytest.raises(PermissionError):
        run_command(main, [])

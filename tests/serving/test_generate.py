"""Contract: what the command prints and how it refuses bad input."""

import subprocess
import sys

import pytest

from deepseek_jax import generate
from deepseek_jax.core.errors import run_command

SETTINGS = ["--max-new-tokens", "12", "--temperature", "1", "--seed", "3"]


def test_one_prompt_streams(lm, saved, capsys):
    run_command(generate.main, ["--checkpoint", str(saved), "--prompt", "abc", *SETTINGS])
    expected = lm.generate("abc", max_new_tokens=12, temperature=1.0, seed=3)
    assert capsys.readouterr().out == expected[0] + "\n"


@pytest.mark.parametrize("flags", [["--prompt", "abc", "d"], ["--prompt", "abc", "--prompt", "d"]])
def test_several_prompts_stand_under_their_names(lm, saved, capsys, flags):
    run_command(generate.main, ["--checkpoint", str(saved), *flags, *SETTINGS, "--stop", "x"])
    one, two = lm.generate(["abc", "d"], max_new_tokens=12, temperature=1.0, seed=3, stop=["x"])
    assert capsys.readouterr().out == f"--- 'abc'\n{one}\n--- 'd'\n{two}\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", ""], "prompt is empty"),
        (["--prompt", "a", ""], "prompt is empty"),
        ([], "no prompt"),
        (["--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--prompt", "a", "--max-new-tokens", "-3"], "max_new_tokens is -3"),
        (["--prompt", "a", "--top-p", "0"], "top_p is 0"),
        (["--prompt", "a", "--top-p", "1.01"], "top_p is 1.01"),
        (["--prompt", "a", "--top-k", "0"], "top_k is 0"),
        (["--prompt", "a", "--temperature", "-1"], "temperature is -1"),
        (["--prompt", "a", "--temperature", "hot"], "temperature"),
        (["--prompt", "a", "--repetition-penalty", "0"], "repetition_penalty is 0"),
        (["--prompt", "a", "--seed", "-1"], "seed is -1"),
        (["--prompt", "a", "--stop", ""], "stop text is empty"),
        (["--prompt", "a", "--max-new-tokens", "2000000"], "make more than"),
        (["--prompt", "a", "--max-tokens", "5"], "Unrecognized options: --max-tokens"),
        (["--prompt", "a", "--checkpoint", "nowhere"], "nowhere: no such directory"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(saved, capsys, flags, message):
    if "--checkpoint" not in flags:
        flags = ["--checkpoint", str(saved), *flags]
    with pytest.raises(SystemExit) as exit_:
        run_command(generate.main, flags)
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert not out
    assert message in err
    assert "Traceback" not in err


def test_runs_as_a_module(saved):
    command = [sys.executable, "-m", "deepseek_jax.generate", "--checkpoint", str(saved)]
    done = subprocess.run([*command, "--prompt", ""], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: a prompt is empty; give it some text to go on from\n"

"""A run as a page: whole runs and poor ones, and what the pictures hold."""

import base64
import json
import re

import numpy as np
import pytest
from PIL import Image

from deepseek_jax import report as command
from deepseek_jax.core import config as core_config
from deepseek_jax.core.errors import InputError, run_command
from deepseek_jax.layers.mla import MLA
from deepseek_jax.layers.moe import MoE
from deepseek_jax.layers.router import Sigmoid
from deepseek_jax.models.decoder import Decoder
from deepseek_jax.monitoring import report
from deepseek_jax.monitoring.metrics import RunLog
from deepseek_jax.monitoring.report import write_report

MODEL = Decoder(
    vocab_size=64,
    embed_dim=16,
    num_layers=3,
    num_dense_layers=1,
    num_mtp_layers=1,
    mlp_dim=32,
    attention=MLA(num_heads=2, kv_rank=8, nope_dim=8, rope_dim=4, value_dim=8),
    moe=MoE(num_experts=8, expert_dim=8, router=Sigmoid(num_active_experts=2)),
)


def fill(run, steps=40, *, experts=True, evaluated=True):
    rng = np.random.default_rng(0)
    log = RunLog(run)
    for step in range(1, steps + 1):
        values = {"loss": 5 / step if step != 7 else np.nan, "learning_rate": 1e-3, "mfu": 0.3}
        values |= {"grad_norm": 1.0, "tokens_per_second": 5000.0, "mtp_loss": 6 / step}
        if experts:
            values |= {"router/max_violation": 1.0, "router/dead_experts": 0, "router/entropy": 0.9}
            counts = rng.multinomial(100, np.full(8, 1 / 8), (2,))
            log.expert_load(step, {"mtp_0/block": counts[:1], "segment_1/block": counts})
        log.metrics(step, values)
        if evaluated and step % 10 == 0:
            log.evaluation(step, {"loss": 4 / step, "bits_per_byte": 2 / step})
    log.close()


def write_config(run, model=None, stages=()):
    text = {"version": core_config.VERSION, "type": "TrainConfig", "steps": 80, "batch_size": 4}
    text |= {"sequence_length": 512, "model": model or core_config.to_dict(MODEL)}
    text |= {"stages": list(stages)}
    (run / "config.json").write_text(json.dumps(text))


def pictures(page):
    """The names of the pictures beside a page, each checked to be inside it as well."""
    content = page.read_text()
    inlined = [base64.b64decode(x) for x in re.findall(r"data:image/png;base64,([^\"]*)", content)]
    files = sorted(page.parent.glob("*.png"))
    assert sorted(inlined) == sorted(path.read_bytes() for path in files)
    for path in files:
        with Image.open(path) as image:
            assert image.width > 600 and np.asarray(image.convert("L")).std() > 5  # not blank
    assert "http" not in content  # nothing is fetched
    return {path.stem for path in files}


def test_a_whole_run(tmp_path):
    fill(tmp_path / "my <run>")
    write_config(tmp_path / "my <run>", stages=[{"steps": None}, {"steps": 20}])
    page = write_report(tmp_path / "my <run>")
    assert page == str(tmp_path / "my <run>/report/report.html")
    content = (tmp_path / "my <run>/report/report.html").read_text()
    found = pictures(tmp_path / "my <run>/report/report.html")
    assert found == {"loss", "training", "router", "expert_load", "expert_load_time"}
    for fact in ("my &lt;run&gt;", "40 of 100", "4 x 512 tokens", "8 experts (2 active)",
                 "parameters", "5,000", "30.0%", "0.0500"):  # fmt: skip
        assert fact in content, fact


def test_layers_stand_in_order_with_their_numbers(tmp_path, monkeypatch):
    fill(tmp_path)
    write_config(tmp_path)
    seen = []
    maps = report._maps
    monkeypatch.setattr(report, "_maps", lambda cells, *a: (seen.append(cells), maps(cells, *a))[1])
    write_report(tmp_path)
    moments, time = seen
    assert [title for title, *_ in time] == ["layer 1", "layer 2", "layer 3 (MTP)"]
    assert [title for title, *_ in moments][::5] == ["step 1 to 7", "step 35 to 40"]
    for _, image, _ in moments + time:
        assert np.nanmean(image) == pytest.approx(1)  # shares of an even load
    assert time[0][1].shape == (8, 40) and moments[0][1].shape == (3, 8)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"experts": False}, {"loss", "training"}),
        ({"evaluated": False, "experts": False}, {"loss", "training"}),
        ({"steps": 1}, {"loss", "training", "router", "expert_load", "expert_load_time"}),
        ({"steps": 2, "experts": False}, {"loss", "training"}),
    ],
)
def test_poor_runs(tmp_path, given, found):
    fill(tmp_path, **given)
    write_report(tmp_path)
    assert pictures(tmp_path / "report/report.html") == found


@pytest.mark.parametrize("config", ["{", '{"version": 99, "steps": 3}'])
def test_a_config_that_cannot_be_read_costs_only_the_facts(tmp_path, config):
    fill(tmp_path, steps=3)
    (tmp_path / "config.json").write_text(config)
    write_report(tmp_path)
    assert {"loss", "expert_load"} <= pictures(tmp_path / "report/report.html")


def test_nulls_torn_lines_and_another_versions_model(tmp_path):
    lines = ['{"step": 1, "loss": null}', '{"step": 2, "loss": 3.0, "mfu": null}', '{"step": 3, "l']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    write_config(tmp_path, {"type": "Decoder", "gone": 3})
    output = tmp_path / "elsewhere/deep"
    assert write_report(tmp_path, output) == str(output / "report.html")
    assert pictures(output / "report.html") == {"loss"}
    assert not (tmp_path / "report").exists()


def test_only_nulls(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": null}\n')
    page = write_report(tmp_path)
    assert "Steps" in (tmp_path / "report/report.html").read_text() and page


def test_nothing_to_draw(tmp_path):
    with pytest.raises(InputError, match="no such run directory"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no logged step"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match="no logged step"):
        write_report(tmp_path)


def test_an_output_that_cannot_be_written(tmp_path):
    fill(tmp_path, steps=1, experts=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_report(tmp_path, tmp_path / "file")


def test_the_command(tmp_path, capsys):
    fill(tmp_path / "run", steps=2, experts=False)
    run_command(command.main, [str(tmp_path / "run"), "--output", str(tmp_path / "out")])
    assert capsys.readouterr().out == f"{tmp_path / 'out/report.html'}\n"
    with pytest.raises(SystemExit) as stopped:
        run_command(command.main, [str(tmp_path / "nowhere")])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    with pytest.raises(SystemExit) as stopped:
        run_command(command.main, [str(tmp_path / "run"), "--outptu", "x"])
    assert stopped.value.code == 2 and "--output" in capsys.readouterr().err

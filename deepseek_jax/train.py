"""Command: build a run from --config and overrides, then train it."""

import argparse
import dataclasses
import functools
import json
import pathlib

import jax

from deepseek_jax.core import config as core_config
from deepseek_jax.core.errors import InputError, run_command
from deepseek_jax.core.memory import restart_with_huge_pages
from deepseek_jax.core.precision import compute_dtype
from deepseek_jax.evaluation.answers import answers, samples
from deepseek_jax.evaluation.classification import alone_and_together, classification
from deepseek_jax.evaluation.queries import queries
from deepseek_jax.evaluation.retrieval import retrieval
from deepseek_jax.evaluation.speech import speech_scores, transcripts
from deepseek_jax.evaluation.suite import compressors, held_out
from deepseek_jax.models.audio import Wav2Vec2
from deepseek_jax.models.counts import describe, num_params
from deepseek_jax.models.fusion import Fused
from deepseek_jax.models.networks import build_network
from deepseek_jax.models.two_tower import TwoTower
from deepseek_jax.models.vision_language import VisionLanguage
from deepseek_jax.parallel.mesh import failing_at_once, make_mesh, start_processes
from deepseek_jax.serving.language import LanguageModel
from deepseek_jax.training.loop import Lent, train
from deepseek_jax.training.recipe import TrainConfig
from deepseek_jax.training.stages import stage_state
from deepseek_jax.training.state import memory_table

LENT = {  # by the kind of a model; see `lent_to` for the others
    TwoTower: Lent(retrieval, queries),
    VisionLanguage: Lent(answers, samples),
    Fused: Lent(classification, alone_and_together),
}


def main(argv: list[str]) -> None:
    """Train as the command line says; ends the process with the loop's exit code."""
    parser = argparse.ArgumentParser(prog="train", allow_abbrev=False, add_help=False)
    parser.usage = "train --config FILE [--run-dir DIR] [--section.field value ...] [--dry-run]"
    parser.add_argument("--config", help="a Python file with get_config(): configs/quickstart.py")
    parser.add_argument("--dry-run", action="store_true", help="say what would run, from shapes")
    parser.add_argument("--profile-steps", metavar="A:B", help="trace these steps for xprof")
    own, rest = parser.parse_known_args(argv)
    if own.config is None:
        if not {"-h", "--help"} & set(rest):
            raise InputError("train needs --config FILE, e.g. --config configs/quickstart.py")
        parser.print_help()
        print("\nEvery field of the config is a flag as well: add --config FILE to see them.")
        return
    trace = None
    if (span := own.profile_steps) is not None:
        first, _, last = span.partition(":")
        if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
            raise InputError(f"--profile-steps is {span!r}; write first:last, e.g. 20:22")
        trace = int(first), int(last)
    config = core_config.load_config(own.config, TrainConfig)
    config = core_config.override(config, rest, prog="train", description=parser.format_help())
    if not config.run_dir:
        config = dataclasses.replace(config, run_dir=f"runs/{pathlib.Path(own.config).stem}")
    if not own.dry_run:
        restart_with_huge_pages("deepseek_jax.train")
    start_processes()
    if jax.process_index() == 0:
        dtype, why = compute_dtype(config.precision)
        devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        print(f"{dtype.name} ({why}); {devices}; {describe(config.model)}", flush=True)
    if own.dry_run:
        print(dry_run(config))
        return
    with failing_at_once():
        code = train(config, lent_to(config), trace)
    if code:
        raise SystemExit(code)


def lent_to(config: TrainConfig) -> Lent:
    """What the loop is lent: how this kind of model is scored, and what its end shows."""
    if isinstance(config.model, Wav2Vec2):
        objective = config.filled_stages()[-1].objective
        return Lent(functools.partial(speech_scores, objective), transcripts)
    return LENT.get(type(config.model), Lent(held_out, closing))


def dry_run(config: TrainConfig) -> str:
    """The resolved config, parameters with their shardings, bytes a device; from shapes only.

    Bytes are a stage's, and said again where other parameters learn.
    """
    model = build_network(config.model, config.precision)
    total, active = num_params(model)
    resolved = json.dumps(core_config.to_dict(config), indent=2)
    mesh, rows, last = make_mesh(config.mesh), [resolved], ""
    for number, stage in enumerate(config.stages):
        table = memory_table(stage_state(config, model, mesh, number))
        if table != last:  # other parameters learn
            rows += [f"stage {number}, {stage.name!r}:"] if len(config.stages) > 1 else []
            rows.append(table)
        last = table
    return "\n".join([*rows, f"parameters: {total:,} in total, {active:,} active a token"])


def closing(model, params, dataset, config) -> str:
    """Other compressors on the held-out text, and how the model continues its beginning."""
    text = dataset.held_out_text()
    rows = [f"{name}: {bits:.4f} bits per byte" for name, bits in compressors(text).items()]
    if not all(x.is_fully_addressable or x.is_fully_replicated for x in jax.tree.leaves(params)):
        return "\n".join([*rows, "no sample: the weights are spread over processes; use generate"])
    prompt = text[:64].decode(errors="ignore").rpartition(" ")[0] or "The "
    lm = LanguageModel(model, params, dataset.tokenizer, config.model)
    completion = lm.generate([prompt], max_new_tokens=64, temperature=0.8, seed=config.seed)[0]
    return "\n".join([*rows, "sample:", prompt + completion])


if __name__ == "__main__":
    run_command(main)

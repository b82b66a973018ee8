"""Command: score a checkpoint on held-out text or pairs and print a table."""

import dataclasses
import json
import math

import jax
import tyro
from jax.sharding import NamedSharding, PartitionSpec

from deepseek_jax.checkpoint.manager import last_stage, read_config, resolve
from deepseek_jax.core.config import from_dict
from deepseek_jax.core.errors import InputError, run_command
from deepseek_jax.core.precision import Precision
from deepseek_jax.data.audiovisual import AudioVisual, open_digits
from deepseek_jax.data.labelled import open_labelled
from deepseek_jax.data.pairs import open_pairs
from deepseek_jax.data.utterances import open_utterances
from deepseek_jax.evaluation.answers import answers, open_questions
from deepseek_jax.evaluation.classification import classification
from deepseek_jax.evaluation.retrieval import retrieval
from deepseek_jax.evaluation.speech import speech_scores
from deepseek_jax.evaluation.suite import compressors, held_out, open_task
from deepseek_jax.models.build import build
from deepseek_jax.parallel.mesh import MeshShape, make_mesh
from deepseek_jax.serving.classifier import ClassifierModel
from deepseek_jax.serving.encoder import EncoderModel, SpeechModel, TwoTowerModel, load
from deepseek_jax.serving.vision_language import SeeingModel
from deepseek_jax.training.speech import SpeechObjective


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Score a checkpoint: loss, perplexity and bits per byte, beside two compressors'.

    Of a decoder that sees: how often it answers right, beside the most frequent answer. Of two
    towers: how often the right one of a pair is among the first that the other finds. Of speech:
    how much of what is transcribed is wrong. Of a classifier: how often it is right.
    """

    checkpoint: str
    """A run (its newest good checkpoint is used), one of its checkpoints, or an HF folder."""
    data: str | None = None
    """stdlib, or text, JSONL or Parquet files by glob; by default what training held out."""
    batch_size: int = 16
    """Rows that are scored at a time."""
    json: bool = False
    """Print one JSON object instead of a table."""


def main(argv: list[str]) -> None:
    """Print the scores."""
    arguments = tyro.cli(
        Arguments, args=argv, prog="python -m deepseek_jax.evaluate",
        config=(tyro.conf.FlagCreatePairsOff,),
    )  # fmt: skip
    if arguments.batch_size < 1:
        raise InputError(f"--batch-size is {arguments.batch_size}; it must be at least 1")
    lm = load(arguments.checkpoint)
    if isinstance(lm, SpeechModel) and lm.data is not None:
        show(_utterances(lm, arguments), arguments.json)
        return
    if isinstance(lm, EncoderModel):
        raise InputError(f"{arguments.checkpoint}: one encoder alone has nothing to be scored on")
    if isinstance(lm, TwoTowerModel):
        show(_pairs(lm, arguments), arguments.json)
        return
    if isinstance(lm, ClassifierModel):
        show(_classified(lm, arguments), arguments.json)
        return
    if isinstance(lm, SeeingModel):
        if arguments.data is not None:
            raise InputError("--data is for text; a model that sees is scored on what was held out")
        dataset = open_questions(lm.recorded, lm)
        show(answers(lm.model, lm.params, dataset, arguments.batch_size), arguments.json)
        return
    if lm.tokenizer is None:
        raise InputError(f"{arguments.checkpoint}: has no tokenizer, so no text can be scored")
    dataset = open_task(lm.recorded, lm.tokenizer, arguments.data)
    # In the precision of training, so that the scores are those that training printed.
    model = build(lm.config, from_dict(Precision, lm.recorded["precision"], "precision"))
    scores = {"data": arguments.data or "held out", "tokens": 0}
    # As many devices as share the rows out evenly; each has all the weights.
    devices = jax.devices()[: math.gcd(jax.device_count(), arguments.batch_size)]
    with jax.set_mesh(mesh := make_mesh(MeshShape(), devices)):
        params = jax.device_put(lm.params, NamedSharding(mesh, PartitionSpec()))
        scores |= held_out(model, params, dataset, arguments.batch_size)
    scores |= compressors(dataset.held_out_text())
    show(scores, arguments.json)


def _pairs(model: TwoTowerModel, arguments: Arguments) -> dict[str, float]:
    """Retrieval among the pairs that training held out."""
    if arguments.data is not None:
        raise InputError("--data is for language models; towers are scored on what was held out")
    if model.data is None or model.tokenizer is None:
        raise InputError(f"{arguments.checkpoint}: a folder says nothing of its data; give a run")
    given = {"sequence_length": model.length, "tokenizer": model.tokenizer}
    dataset = open_pairs(model.data, seed=0, **given)
    return retrieval(model.towers, model.params, dataset, arguments.batch_size)


def _classified(lm: ClassifierModel, arguments: Arguments) -> dict[str, float]:
    """How often all modalities together, and each alone, are right on what training held out."""
    if arguments.data is not None:
        raise InputError("--data is for language models; others are scored on what was held out")
    given = {"sequence_length": lm.length, "seed": 0}
    if isinstance(lm.data, AudioVisual):
        dataset = open_digits(lm.data, **given)
    else:
        dataset = open_labelled(lm.data, tokenizer=lm.tokenizer, **given)
    return classification(lm.model, lm.params, dataset, arguments.batch_size)


def _utterances(model: SpeechModel, arguments: Arguments) -> dict[str, float]:
    """CTC's error rates, or how masked frames are told, on what training held out."""
    if arguments.data is not None:
        raise InputError("--data is for language models; speech is scored on what was held out")
    last = last_stage(read_config(resolve(arguments.checkpoint)))
    objective = from_dict(SpeechObjective, last["objective"], "objective")
    given = {"sequence_length": model.length, "tokenizer": model.tokenizer}
    dataset = open_utterances(model.data, seed=0, **given)
    return speech_scores(objective, model.encoder, model.params, dataset, arguments.batch_size)


def show(scores: dict[str, str | int | float], as_json: bool) -> None:
    """Print scores as a table, many of them a line each, or as one JSON object."""
    if as_json:  # which has no NaN
        known = {
            k: v if isinstance(v, str) or math.isfinite(v) else None for k, v in scores.items()
        }
        print(json.dumps(known))
        return
    columns = [(name.replace("_", " "), _cell(value)) for name, value in scores.items()]
    if len(columns) > 8:
        width = max(len(name) for name, _ in columns)
        print("\n".join(f"{name:{width}}  {cell:>8}" for name, cell in columns))
        return
    columns = [[cell.rjust(max(map(len, column))) for cell in column] for column in columns]
    for row in zip(*columns, strict=True):
        print("  ".join(row))


def _cell(value: str | int | float) -> str:
    return value if isinstance(value, str) else f"{value:,.{4 if isinstance(value, float) else 0}f}"


if __name__ == "__main__":
    run_command(main)

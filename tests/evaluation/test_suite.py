"""Reference: scores against documents scored alone in float64, compressors against the tools."""

import math
import shutil
import subprocess

import jax
import numpy as np
import pytest

from deepseek_jax.evaluation.suite import compressors, held_out, open_task
from deepseek_jax.serving.language import LanguageModel


def alone(run, dataset):
    """The summed loss of every document part in every row, each scored in a row of its own."""
    nats = 0.0
    lm = LanguageModel(run.model, run.params, run.tokenizer, run.model.config)
    for batch in dataset.eval_batches(4):
        for tokens, segments, targets, weights in zip(
            *(batch[name] for name in ("tokens", "segments", "targets", "weights")), strict=True
        ):
            for segment in set(segments[segments > 0].tolist()):
                part = segments == segment
                row = np.zeros((1, 48), np.int32)
                row[0, : part.sum()] = tokens[part]
                logits = np.asarray(lm.logits(row)[0], np.float64)[: part.sum()]
                log_total = np.log(np.exp(logits).sum(-1))
                chosen = np.take_along_axis(logits, targets[part][:, :1], -1)[:, 0]
                nats += ((log_total - chosen) * weights[part][:, 0]).sum()
    return nats


def test_scores_are_those_of_documents_alone(run):
    dataset = open_task(run.config, run.tokenizer, None)
    scores = held_out(run.model, run.params, dataset, 4)
    nats = alone(run, dataset)
    size = len(dataset.held_out_text())
    documents = size and sum(
        text.encode() in dataset.held_out_text() for text in run.texts.values()
    )
    assert scores["tokens"] == size + documents  # bytes, and an end a document
    assert scores["loss"] == pytest.approx(nats / scores["tokens"], rel=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]))
    assert scores["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_batch_size_changes_nothing(run):
    dataset = open_task(run.config, run.tokenizer, None)
    one, many = (held_out(run.model, run.params, dataset, size) for size in (1, 64))
    assert one == pytest.approx(many, rel=1e-6)


def test_a_model_that_knows_nothing_needs_the_logarithm_of_its_vocabulary(run):
    dataset = open_task(run.config, run.tokenizer, None)
    scores = held_out(run.model, jax.tree.map(np.zeros_like, run.params), dataset, 4)
    assert scores["loss"] == pytest.approx(math.log(260), rel=1e-6)
    assert scores["perplexity"] == pytest.approx(260, rel=1e-5)


@pytest.mark.parametrize("tool", ["gzip -9", "xz -9e"])
def test_compressors_are_the_tools(tool):
    if shutil.which(tool.split()[0]) is None:
        pytest.skip(f"no {tool.split()[0]} here")
    data = b"".join(b"line %d of %d\n" % (i * i, i) for i in range(5000))
    packed = subprocess.run([*tool.split(), "-c"], input=data, capture_output=True, check=True)
    expected = 8 * len(packed.stdout) / len(data)
    assert compressors(data)[tool] == pytest.approx(expected, rel=0.01)

"""How often a decoder that sees answers as the held-out conversations do, beside a constant answer.

An answer is right where every one of its tokens, the end included, is the most likely one after the
question and the right tokens before it: exactly then greedy decoding says it.
"""

import collections
import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from deepseek_jax.checkpoint.manager import last_stage
from deepseek_jax.core.config import from_dict
from deepseek_jax.core.errors import InputError
from deepseek_jax.data.conversations import Talk
from deepseek_jax.data.seeing import Seeing, SeeingDataset, open_seeing
from deepseek_jax.models.vision_language import VisionLanguageModel
from deepseek_jax.ops.losses import token_losses
from deepseek_jax.serving.vision_language import SeeingModel
from deepseek_jax.training.language import MEDIA, inputs_of

SHOWN = 8


def open_questions(recorded: dict[str, Any], lm: SeeingModel) -> SeeingDataset:
    """The conversations that a checkpoint's run was trained on last. InputError for a folder."""
    last = last_stage(recorded)
    stored = last.get("data")
    if stored is None or lm.tokenizer is None:
        raise InputError("a folder says nothing of its data; give a run")
    ear = lm.config.audio
    return open_seeing(
        from_dict(Seeing, stored, "data"),
        sight=lm.config.sight,
        image_id=lm.image_id,
        hearing=lm.config.hearing,
        audio_id=ear.audio_id if ear else None,
        sequence_length=last["sequence_length"],
        seed=0,
        tokenizer=lm.tokenizer,
    )


def answers(
    model: VisionLanguageModel, params: Any, dataset: SeeingDataset, batch_size: int
) -> dict[str, float]:
    """Scores on the held-out conversations.

    `loss` (nats a token of the answers), `perplexity`, `tokens`, `accuracy` and `majority_accuracy`
    (of the most frequent held-out answer to each kind of question); the last two for each kind as
    well, its name before, where there are several.
    """
    nats, tokens = 0.0, 0.0
    said, right = [], []
    rows = dataset.held_rows()
    while some := [*itertools.islice(rows, batch_size)]:
        filled = [batch for _, batch in some] + [some[-1][1]] * (batch_size - len(some))
        batch = {name: np.stack([row[name] for row in filled]) for name in filled[0]}
        batch["weights"][len(some) :] = 0
        preset = dataset.held[0].config.normalization
        losses, correct = _scored(model, preset, params, batch)
        nats += float(np.sum(np.asarray(losses), dtype=np.float64))
        tokens += float(np.sum(batch["weights"], dtype=np.float64))
        right += np.asarray(correct)[: len(some)].tolist()
        said += [(talk.kind, talk.answer) for talk, _ in some]
    if not said:
        raise InputError("nothing that was held out can be used")
    loss = nats / tokens
    scores = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": int(tokens)}
    kinds = sorted({kind for kind, _ in said})
    most = {
        kind: collections.Counter(x for other, x in said if other == kind).most_common(1)[0]
        for kind in kinds
    }
    scores["accuracy"] = float(np.mean(right))
    scores["majority_accuracy"] = sum(count for _, count in most.values()) / len(said)
    for kind in kinds if len(kinds) > 1 else ():
        own = [ok for (other, _), ok in zip(said, right, strict=True) if other == kind]
        scores[f"{kind}/accuracy"] = float(np.mean(own))
        scores[f"{kind}/majority_accuracy"] = most[kind][1] / len(own)
    return scores


@functools.partial(jax.jit, static_argnums=(0, 1))
def _scored(model: VisionLanguageModel, preset: Any, params: Any, batch: dict) -> tuple:
    """Each row's summed loss, and whether all of its answers' tokens are the likeliest."""
    output = model.apply(params, **inputs_of(batch, preset), drop=False)
    targets, weights = batch["targets"][..., 0], batch["weights"][..., 0]
    flat = output.hidden.reshape(-1, output.hidden.shape[-1])
    losses = token_losses(flat, model.head(params), targets.reshape(-1)).reshape(targets.shape)
    best = jnp.argmax(model.logits(params, output.hidden), axis=-1)
    correct = jnp.all((best == targets) | (weights == 0), axis=1)
    found = (losses * weights).sum(1), correct
    alone = jax.sharding.get_abstract_mesh().empty
    return found if alone else jax.lax.with_sharding_constraint(found, PartitionSpec())


def samples(model: VisionLanguageModel, params: Any, dataset: SeeingDataset, config: Any) -> str:
    """Some held-out questions, what the model answers by itself, and what is right."""
    if not all(x.is_fully_addressable or x.is_fully_replicated for x in jax.tree.leaves(params)):
        return "no samples: the weights are spread over processes; use generate"
    held = [*dataset.held_rows()]
    chosen = np.linspace(0, len(held) - 1, SHOWN).astype(int)
    lines = ["held-out questions, answers, and what is right:"]
    lm = SeeingModel(model, params, dataset.tokenizer, model.config)
    for place in dict.fromkeys(chosen.tolist()):
        talk, row = held[place]
        said = answered(lm, row, dataset.held[0].config.normalization)
        question = next(text for role, text in talk.turns if role == "user")
        lines.append(f"  {' '.join(question.split())} -> {said.strip()} ({_first(talk)})")
    return "\n".join(lines)


def _first(talk: Talk) -> str:
    return next(text for role, text in talk.turns if role == "assistant")


def answered(lm: SeeingModel, row: dict[str, np.ndarray], preset: Any, most: int = 16) -> str:
    """The greedy answer to the first question of a held-out row."""
    first = int(np.argmax(row["weights"][:, 0] > 0))  # the target of this token is learned
    prompt = row["tokens"][: first + 1].tolist()
    given = {name: jnp.asarray(row[name][None]) for name in MEDIA if name in row}
    features = lm.model.features(lm.params, **inputs_of(given, preset))
    seen = {"features": features, "sources": row["sources"][None, : first + 1]}
    looking = dataclasses.replace(lm, seen=seen)
    return lm.tokenizer.decode(looking.generate_tokens([prompt], max_new_tokens=most)[0])

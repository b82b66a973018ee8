"""What a speech encoder is scored on: the held-out utterances, transcribed or with masked frames.

Character and word error rate are edits (insertions, deletions, substitutions) over the characters
or words that were said.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from deepseek_jax.core.errors import InputError
from deepseek_jax.data.utterances import Batch, UtteranceDataset
from deepseek_jax.models.audio import CTC
from deepseek_jax.models.encoder import Encoder
from deepseek_jax.models.speech import WavePretraining, characters, pretrained
from deepseek_jax.ops.ctc import ctc_greedy, ctc_losses
from deepseek_jax.training.recipe import TrainConfig
from deepseek_jax.training.speech import SpeechObjective, hidden

SHOWN = 5  # transcripts


def edits(said: Sequence[Any], heard: Sequence[Any]) -> int:
    """The fewest insertions, deletions and substitutions that make `heard` of `said`."""
    before = list(range(len(heard) + 1))
    for i, own in enumerate(said, 1):
        row = [i]
        for j, other in enumerate(heard, 1):
            row.append(min(before[j - 1] + (own != other), before[j] + 1, row[-1] + 1))
        before = row
    return before[-1]


def error_rates(said: Sequence[str], heard: Sequence[str]) -> dict[str, float]:
    """`character_error_rate` and `word_error_rate` of transcripts, over all of them together."""
    found = {}
    for name, parts in (("character", list), ("word", str.split)):
        pairs = [(parts(a), parts(b)) for a, b in zip(said, heard, strict=True)]
        total = sum(len(a) for a, _ in pairs)
        found[f"{name}_error_rate"] = sum(edits(a, b) for a, b in pairs) / max(total, 1)
    return found


def speech_scores(
    objective: SpeechObjective,
    model: Encoder,
    params: Any,
    dataset: UtteranceDataset,
    batch_size: int,
) -> dict[str, float]:
    """What an objective's models are scored on: `masked_frames` or `transcription`."""
    given = model, params, dataset, batch_size
    if isinstance(objective, WavePretraining):
        return masked_frames(objective, *given)
    return transcription(*given)


def transcription(
    model: Encoder, params: Any, dataset: UtteranceDataset, batch_size: int
) -> dict[str, float]:
    """`loss` (CTC's, nats a character), the error rates of greedy decoding, and `utterances`.

    An utterance with fewer frames than characters has no loss, and counts in `impossible`.
    """
    total = signs = impossible = 0.0
    said, heard = [], []
    for batch, count, losses, possible, text in _heard(model, params, dataset, batch_size):
        labels = batch["labels"][:count]
        total += float(losses.sum())
        signs += float((labels >= 0)[possible].sum())
        impossible += float((~possible).sum())
        said += [dataset.tokenizer.decode(row) for row in labels]
        heard += text
    rates = error_rates(said, heard)
    found = {"loss": total / max(signs, 1), **rates, "utterances": len(said)}
    return found | ({"impossible": impossible} if impossible else {})


def _heard(
    model: Encoder, params: Any, dataset: UtteranceDataset, batch_size: int
) -> Iterator[tuple[Batch, int, np.ndarray, np.ndarray, list[str]]]:
    """Of each held-out batch: itself, its real rows, their losses, which have one, and texts."""
    for batch, count in dataset.held_batches(batch_size):
        given = (batch[name] for name in ("wave", "counts", "labels"))
        losses, possible, ids = map(np.asarray, _transcribed(model, params, *given))
        text = [dataset.tokenizer.decode(row) for row in ids[:count]]
        yield batch, count, losses[:count].astype(np.float64), possible[:count], text


@functools.partial(jax.jit, static_argnums=0)
def _transcribed(model: Encoder, params: Any, wave: Any, counts: Any, labels: Any) -> Any:
    logits, frames = characters(model, params, wave, counts)
    blank = model.config.head.blank_id
    losses, possible = ctc_losses(logits, frames, labels, blank)
    return _everywhere((losses, possible, ctc_greedy(logits, frames, blank)[0]))


def masked_frames(
    config: WavePretraining,
    model: Encoder,
    params: Any,
    dataset: UtteranceDataset,
    batch_size: int,
) -> dict[str, float]:
    """`loss` (contrastive, nats a masked frame), `accuracy` among the distractors, `masked`.

    Codes are the likeliest. `perplexity` is how many are in use over all held-out masked frames, in
    the group that uses fewest; `codes_in_use` its share. InputError where no frame is masked.
    """
    total = hits = masked = 0.0
    uses: Any = 0.0
    for batch, _ in dataset.held_batches(batch_size):
        given = {name: batch[name] for name in ("wave", "counts", "rows")}
        found = [np.asarray(x, np.float64) for x in _told(model, config, params, given)]
        total, hits, masked = total + found[0], hits + found[1], masked + found[2]
        uses = uses + found[3]
    if not masked:
        raise InputError("no held-out frame is masked: give longer sound, or lower mask_span")
    shares = uses / masked
    logs = np.log(np.where(shares > 0, shares, 1))
    used = float(np.exp(-(shares * logs).sum(-1)).min())
    scores = {"loss": total / masked, "accuracy": hits / masked, "masked": masked}
    scores |= {"perplexity": used, "codes_in_use": used / model.config.head.num_codes}
    return {name: float(value) for name, value in scores.items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _told(model: Encoder, config: WavePretraining, params: Any, batch: Batch) -> Any:
    masked, others = hidden(config, model.config, batch)
    found = pretrained(model, params, config, batch["wave"], batch["counts"], masked, others)
    return _everywhere((found.contrastive, found.hits, found.count, found.uses))


def _everywhere(found: Any) -> Any:
    """Arrays whole on every device, so that every process can read them."""
    if jax.sharding.get_abstract_mesh().empty:
        return found
    return jax.lax.with_sharding_constraint(found, PartitionSpec())


def transcripts(model: Encoder, params: Any, dataset: UtteranceDataset, config: TrainConfig) -> str:
    """How some held-out utterances are heard, or of a pretrained model what its codebook does."""
    size = min(SHOWN, config.batch_size)
    if not all(x.is_fully_addressable or x.is_fully_replicated for x in jax.tree.leaves(params)):
        return "no transcripts: the weights are spread over processes"
    if not isinstance(model.config.head, CTC):
        given = config.filled_stages()[-1].objective, model, params, dataset, config.batch_size
        scores = masked_frames(*given)
        return (
            f"of {model.config.head.num_codes} codes a group {scores['perplexity']:.1f} are in use;"
            f" {scores['accuracy']:.1%} of the masked frames are told from their distractors"
        )
    lines = ["held-out utterances and what is heard:"]
    for batch, count, *_, heard in _heard(model, params, dataset, size):
        said = [dataset.tokenizer.decode(row) for row in batch["labels"][:count]]
        lines += [f"  {a!r} -> {b!r}" for a, b in zip(said, heard, strict=True)]
        break
    return "\n".join(lines)

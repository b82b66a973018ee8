"""A run's data, opened, whatever their kind is."""

from typing import TypeAlias

from deepseek_jax.data.loader import Data, Dataset, open_data
from deepseek_jax.data.pairs import PairDataset, Pairs, open_pairs
from deepseek_jax.data.utterances import UtteranceDataset, Utterances, open_utterances

AnyData: TypeAlias = Data | Pairs | Utterances
AnyDataset: TypeAlias = Dataset | PairDataset | UtteranceDataset


def opened(data: AnyData, *, sequence_length: int, seed: int, num_targets: int) -> AnyDataset:
    """The dataset of a config; `num_targets` is for language alone.

    Raises InputError when the data cannot be read.
    """
    if isinstance(data, Data):
        return open_data(data, sequence_length=sequence_length, num_targets=num_targets, seed=seed)
    if isinstance(data, Utterances):
        return open_utterances(data, sequence_length=sequence_length, seed=seed)
    return open_pairs(data, sequence_length=sequence_length, seed=seed)

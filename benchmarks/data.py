"""Packed tokens a second of the data pipeline, against its tokenizer alone.

    python benchmarks/data.py [--rounds 5] [--megabytes 8] [--vocab-size 8192]

The tokenizer alone encodes texts that are in memory already. The pipeline reads them from files,
tokenizes, writes its cache, packs one epoch into rows of 256 and hands over batches of 16. Rounds
are interleaved and medians printed, since the machine's speed drifts. Goal: a ratio of 0.8.
"""

import argparse
import itertools
import pathlib
import shutil
import statistics
import tempfile
import time

from deepseek_jax.data.loader import Data, batches, open_data
from deepseek_jax.data.sources import StandardLibrary, TextFiles, documents
from deepseek_jax.data.tokenizer import BPE, TokenizerFile, open_tokenizer, train_bpe

LENGTH, BATCH = 256, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=float, default=8.0)
    parser.add_argument("--vocab-size", type=int, default=8192)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(pathlib.Path(folder), options)


def measure(folder: pathlib.Path, options: argparse.Namespace) -> None:
    texts, size = [], 0
    for number, document in enumerate(documents(StandardLibrary())):
        (folder / f"{number}.txt").write_text(document.text, newline="")
        texts.append(document.text)
        size += len(document.text.encode())
        if size > options.megabytes * 1e6:
            break
    train_bpe(BPE(vocab_size=options.vocab_size), iter(texts)).save(folder / "bpe")
    config = Data(
        source=TextFiles(paths=(f"{folder}/*.txt",)),
        tokenizer=TokenizerFile(path=f"{folder}/bpe"),
        cache_dir=f"{folder}/cache",
    )
    tokenizer = open_tokenizer(config.tokenizer)
    rates: dict[str, list[float]] = {"tokenizer": [], "pipeline": [], "batches": []}
    for _ in range(options.rounds):
        start = time.perf_counter()
        num_tokens = sum(map(len, tokenizer.encode_batch(texts)))
        rates["tokenizer"].append(num_tokens / (time.perf_counter() - start))

        shutil.rmtree(folder / "cache", ignore_errors=True)
        start = time.perf_counter()
        dataset = open_data(config, sequence_length=LENGTH, num_targets=2, seed=0)
        stream = batches(dataset, start=0, batch_size=BATCH)
        steps = num_tokens // (LENGTH * BATCH)
        middle = time.perf_counter()
        packed = sum(int((b["segments"] > 0).sum()) for b in itertools.islice(stream, steps))
        end = time.perf_counter()
        stream.close()
        rates["pipeline"].append(packed / (end - start))
        rates["batches"].append(packed / (end - middle))
    print(f"{size / 1e6:.1f} MB, {num_tokens:,} tokens, medians of {options.rounds}, tokens/s:")
    for name, found in rates.items():
        middle, low, high = statistics.median(found), min(found), max(found)
        print(f"  {name:10} {middle:12,.0f}   ({low:,.0f} to {high:,.0f})")
    ratios = [p / t for p, t in zip(rates["pipeline"], rates["tokenizer"], strict=True)]
    print(f"  pipeline / tokenizer: {statistics.median(ratios):.2f}")
    print(f"  batch iterator alone: {statistics.median(rates['batches']) / LENGTH:,.0f} rows/s")


if __name__ == "__main__":
    main()

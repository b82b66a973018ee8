"""Command: tokenize and shard raw data (text, JSONL, Parquet) into a folder to train on.

The folder holds ArrayRecord shards of each side, the tokenizer, and a manifest with counts and
hashes. It is written under another name and renamed when whole.
"""

import argparse
import json
import os
import pathlib
import re
import shutil

import numpy as np

from deepseek_jax.core.config import num_bytes, to_dict
from deepseek_jax.core.errors import InputError, run_command
from deepseek_jax.core.storage import on_disk
from deepseek_jax.data import sources
from deepseek_jax.data import tokenizer as tokenizers
from deepseek_jax.data.corpus import SIDES, made_whole, make_tokenizer, open_corpus, write_shard
from deepseek_jax.data.loader import Data

FORMATS = {"text": sources.TextFiles, "jsonl": sources.JSONL, "parquet": sources.Parquet}
COUNTS = ("documents", "tokens", "bytes")


def main(argv: list[str]) -> None:
    """Prepare what the command line names and print a summary."""
    parser = argparse.ArgumentParser("deepseek_jax.prepare", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="GLOB", help="files to read")
    add("--output", required=True, metavar="DIR", help="the folder to write, which must be new")
    add("--tokenizer", default="bpe:8192", help="bytes, bpe:SIZE, deepseek, or a tokenizer's file")
    add("--format", choices=["auto", *FORMATS], default="auto")
    add("--field", default="text", help="the JSON field or the column that holds the text")
    add("--shard-size", default="256MB", help="about how large a shard is (KB, MB, GB)")
    add("--held-out", type=float, default=0.01, help="the share of documents for evaluation")
    add("--num-workers", type=int, help="threads that tokenize; by default one a core")
    options = parser.parse_args(argv)
    if options.num_workers:
        os.environ["RAYON_NUM_THREADS"] = str(options.num_workers)  # of the tokenizers library
    size = num_bytes(options.shard_size, "--shard-size")
    paths = tuple(options.input)
    kind = FORMATS.get(options.format) or sources.kind_of(paths)
    name = {sources.JSONL: "field", sources.Parquet: "column"}.get(kind)
    try:
        source = kind(paths=paths, **({name: options.field} if name else {}))
        tokenizer = _tokenizer(options.tokenizer)
        data = Data(source=source, tokenizer=tokenizer, held_out=options.held_out)
    except ValueError as error:
        raise InputError(str(error)) from None
    manifest = prepare(data, on_disk(options.output, "--output"), size)
    for side in SIDES:
        rows = [row for row in manifest["shards"] if row["split"] == side]
        counts = [f"{sum(row[n] for row in rows):,} {n}" for n in COUNTS]
        print(f"{side}: {', '.join(counts)} in {len(rows)} shards")
    print(f"train on it with Records(path={options.output!r})")


def prepare(data: Data, output: pathlib.Path, shard_bytes: int) -> dict:
    """Write the folder `output`; its manifest. InputError if it exists or the data are no good."""
    if output.exists():
        raise InputError(f"{output}: exists; choose a new folder, or delete it first")
    with sources.reported(str(output)), made_whole(output) as partial:
        cache = partial / "cache"
        tokenizer = make_tokenizer(data.tokenizer, [data.source], data.held_out, cache)
        corpus = open_corpus(data.source, tokenizer, cache)
        shards = []
        for side in SIDES:
            numbers = corpus.documents(data.held_out, training=side == "train")
            ends = np.cumsum(corpus.lengths[numbers]) * corpus.tokens.itemsize
            cuts = np.flatnonzero(np.diff(ends // shard_bytes)) + 1
            for number, shard in enumerate(np.split(numbers, cuts)):
                file = partial / f"{side}-{number:05d}.array_record"
                sha256 = write_shard(map(corpus.document, shard), side, file)
                counts = (len(shard), corpus.lengths[shard].sum(), corpus.num_bytes[shard].sum())
                row = {"file": file.name, "split": side, "sha256": sha256}
                shards.append(row | dict(zip(COUNTS, map(int, counts), strict=True)))
        tokenizer.save(partial / "tokenizer")
        manifest = {
            "version": 1,
            "dtype": corpus.tokens.dtype.str,
            **{n: sum(row[n] for row in shards) for n in COUNTS},
            "data": to_dict(data),
            "tokenizer": sorted(f"tokenizer/{name}" for name in tokenizer.files()),
            "shards": shards,
        }
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        shutil.rmtree(cache)
    return manifest


def _tokenizer(name: str) -> tokenizers.TokenizerConfig:
    if size := re.fullmatch(r"bpe(?::(\d+))?", name):
        return tokenizers.BPE(vocab_size=int(size[1] or 8192))
    if name in ("bytes", "deepseek"):
        return tokenizers.Bytes() if name == "bytes" else tokenizers.DeepSeek()
    sentencepiece = name.endswith(".model")
    return (tokenizers.SentencePiece if sentencepiece else tokenizers.TokenizerFile)(path=name)


if __name__ == "__main__":
    run_command(main)

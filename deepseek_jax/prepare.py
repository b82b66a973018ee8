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

from deepseek_jax.core.config import to_dict
from deepseek_jax.core.errors import InputError, run_command
from deepseek_jax.data import records
from deepseek_jax.data.corpus import open_corpus
from deepseek_jax.data.loader import Data, make_tokenizer
from deepseek_jax.data.sources import JSONL, Parquet, Plain, TextFiles, files
from deepseek_jax.data.text import reported
from deepseek_jax.data.tokenizer import (
    BPE,
    Bytes,
    DeepSeek,
    SentencePiece,
    TokenizerConfig,
    TokenizerFile,
)

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def main(argv: list[str]) -> None:
    """Prepare what the command line names and print a summary."""
    parser = argparse.ArgumentParser(
        prog="deepseek_jax.prepare", description=__doc__.split("\n")[0]
    )
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="GLOB", help="files to read")
    add("--output", required=True, metavar="DIR", help="the folder to write, which must be new")
    add("--tokenizer", default="bpe:8192", help="bytes, bpe:SIZE, deepseek, or a tokenizer's file")
    add("--format", choices=["auto", "text", "jsonl", "parquet"], default="auto")
    add("--field", default="text", help="the JSON field or the column that holds the text")
    add("--shard-size", default="256MB", help="about how large a shard is (KB, MB, GB)")
    add("--held-out", type=float, default=0.01, help="the share of documents for evaluation")
    add("--num-workers", type=int, help="threads that tokenize; by default one a core")
    options = parser.parse_args(argv)
    if options.num_workers:
        os.environ["RAYON_NUM_THREADS"] = str(options.num_workers)  # of the tokenizers library
    try:
        data = Data(
            source=_source(options.input, options.format, options.field),
            tokenizer=_tokenizer(options.tokenizer),
            held_out=options.held_out,
        )
    except ValueError as error:
        raise InputError(str(error)) from None
    size = re.fullmatch(r"(\d+) ?([KMG]B)?", options.shard_size.upper())
    if not size or not int(size[1]):
        raise InputError(f"--shard-size {options.shard_size} is not a size such as 256MB")
    manifest = prepare(data, pathlib.Path(options.output), int(size[1]) * UNITS[size[2] or ""])
    for side in records.SIDES:
        rows = [row for row in manifest["shards"] if row["split"] == side]
        counts = [f"{sum(row[n] for row in rows):,} {n}" for n in ("documents", "tokens", "bytes")]
        print(f"{side}: {', '.join(counts)} in {len(rows)} shards")
    print(f"train on it with Records(path={options.output!r})")


def prepare(data: Data, output: pathlib.Path, shard_bytes: int) -> dict:
    """Write the folder `output`; its manifest. InputError if it exists or the data are no good."""
    if output.exists():
        raise InputError(f"{output}: exists; choose a new folder, or delete it first")
    partial = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    with reported(str(output)):
        partial.mkdir(parents=True)
        try:
            cache = partial / "cache"
            tokenizer = make_tokenizer(data, cache)
            corpus = open_corpus(data.source, tokenizer, cache)
            shards = []
            for side in records.SIDES:
                numbers = corpus.documents(data.held_out, training=side == "train")
                stream = (corpus.document(number) for number in numbers)
                shards += records.write(stream, side, partial, shard_bytes)
            tokenizer.save(partial / "tokenizer")
            manifest = {
                "version": 1,
                "dtype": corpus.tokens.dtype.str,
                **{n: sum(row[n] for row in shards) for n in ("documents", "tokens", "bytes")},
                "data": to_dict(data),
                "tokenizer": sorted(f"tokenizer/{name}" for name in tokenizer.files()),
                "shards": shards,
            }
            (partial / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
            shutil.rmtree(cache)
            partial.rename(output)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return manifest


def _source(patterns: list[str], form: str, field: str) -> Plain:
    paths = tuple(patterns)
    if form == "auto":
        kinds = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
        found = {kinds.get(f.path.suffix.lower(), "text") for f in files(TextFiles(paths=paths))}
        if len(found) > 1:
            raise InputError(f"--input has files of {' and '.join(sorted(found))}: give one kind")
        form = found.pop()
    if form == "jsonl":
        return JSONL(paths=paths, field=field)
    return Parquet(paths=paths, column=field) if form == "parquet" else TextFiles(paths=paths)


def _tokenizer(name: str) -> TokenizerConfig:
    if name in ("bytes", "deepseek"):
        return Bytes() if name == "bytes" else DeepSeek()
    if size := re.fullmatch(r"bpe(?::(\d+))?", name):
        return BPE(vocab_size=int(size[1] or 8192))
    return SentencePiece(path=name) if name.endswith(".model") else TokenizerFile(path=name)


if __name__ == "__main__":
    run_command(main)

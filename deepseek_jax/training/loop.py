"""The one loop, dull on purpose.

Restore; then for every step: fetch and place its rows, dispatch step n, log step n-1 (so that the
device never waits for the host), check if due, evaluate if due, save if due, stop on a signal. A
step's line is written before its checkpoint, and a restart cuts the files back to the restored
step, so that a run killed at any moment continues as if nothing had happened: same rows, same
losses, each step once.

Exit codes: 0 the run is complete; 128 + signal (SIGINT 130, SIGTERM 143) it was stopped, everything
is saved, and the same command resumes; 75 a step hung (training/faults.py). A signal to one process
of several stops all of them after the same step. A second signal kills at once.
"""

import dataclasses
import io
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from typing import Any, NamedTuple

import jax
from flax.traverse_util import unflatten_dict
from jax.experimental import multihost_utils

from deepseek_jax.checkpoint import huggingface, integrity
from deepseek_jax.checkpoint.local import LocalCheckpoints, run_name
from deepseek_jax.checkpoint.manager import Manager, load_params, read_config
from deepseek_jax.checkpoint.safetensors import is_folder_of_tensors
from deepseek_jax.core import config as core_config
from deepseek_jax.core import tree
from deepseek_jax.core.errors import InputError
from deepseek_jax.core.storage import located
from deepseek_jax.data.loader import Data, Dataset, batches, open_data
from deepseek_jax.data.pairs import PairDataset, open_pairs
from deepseek_jax.models.build import Network
from deepseek_jax.models.counts import row_tokens, train_flops_per_token
from deepseek_jax.models.networks import ModelConfig, build_network
from deepseek_jax.monitoring.metrics import RunLog, read_lines
from deepseek_jax.monitoring.profiler import Profiler, matmul_peak
from deepseek_jax.monitoring.progress import Progress, summary
from deepseek_jax.monitoring.report import write_report
from deepseek_jax.parallel.mesh import make_mesh, rows_share
from deepseek_jax.parallel.pipeline import Pipeline
from deepseek_jax.parallel.sharding import batch_sharding, check_batch, place_batch
from deepseek_jax.parallel.stored import stored
from deepseek_jax.training import invariants, slices
from deepseek_jax.training.contrastive import collapse
from deepseek_jax.training.faults import Heartbeat, Peers, caught_signals
from deepseek_jax.training.optimizer import is_indexer, make_optimizer
from deepseek_jax.training.recipe import BatchStep, Stage, TrainConfig, check_model
from deepseek_jax.training.stages import overwriting, stage_step
from deepseek_jax.training.state import TrainState, abstract_state, initial_state

FINGERPRINT = "data.sha256"  # beside a checkpoint: what its data were


class Lent(NamedTuple):
    """What higher floors lend the loop."""

    held_out: Callable[[Network, Any, Dataset | PairDataset, int], dict[str, float]]
    """(model, params, dataset, batch size) -> loss, bits_per_byte, ... on the held-out side."""
    closing: Callable[[Network, Any, Dataset | PairDataset, TrainConfig], str]
    """What to print when the run is complete, e.g. a sampled completion."""


def train(config: TrainConfig, lent: Lent, trace: tuple[int, int] | None = None) -> int:
    """Run or resume `config`, tracing steps `trace` (first, last); the process's exit code.

    Raises InputError for what cannot be run, and when too many steps in a row were skipped;
    BrokenRun when what must hold does not (see training/invariants).
    """
    mesh = make_mesh(config.mesh)
    for stage in config.filled_stages():
        check_batch(mesh, stage.sizes(), stage.sequence_length)
    lock = integrity.lock_run(config.run_dir, config.faults.lease_seconds)
    alone = lock if jax.process_index() == 0 else nullcontext()
    with alone, jax.set_mesh(mesh), closing(_Run(config, mesh, lent, trace)) as run:
        return run.go()


class _Run:
    """One process's part of a run."""

    def __init__(self, config, mesh, lent, trace):
        self.config, self.mesh, self.lent = config, mesh, lent
        self.run_dir = located(config.run_dir)
        self.stages = config.filled_stages()
        self.total = sum(stage.steps for stage in self.stages)
        self.model = build_network(config.model, config.precision)
        self.layers = self.model.layers
        self.manager = Manager(self.run_dir / "checkpoints", config.checkpoint, self.layers)
        self.local: LocalCheckpoints | None = None
        self.log = RunLog(self.run_dir)
        stream = None if jax.process_index() == 0 else io.StringIO()  # only one speaks
        self.progress = Progress(self.total, log_every=config.log_every, stream=stream)
        self.profiler = Profiler(self.run_dir, *trace) if trace else None
        faults = config.faults
        self.heartbeat = Heartbeat(faults.folder(self.run_dir), faults.watchdog_seconds)
        self.peers = Peers(mesh, self.heartbeat)
        self.peak = matmul_peak().flops
        self.tokens, self.seconds, self.steps = 0, 0.0, 0  # done since the last logged step
        self.since = 0.0
        self.dataset: Dataset | PairDataset | None = None
        self.fingerprint: str | None = None  # of the data that the restored state has seen

    def go(self) -> int:
        with caught_signals() as caught:
            state, position = self._restore()
            step, end, previous = int(state.step), 0, None
            for before, stage in zip((None, *self.stages), self.stages, strict=False):
                first, end = end, end + stage.steps
                if step >= end and stage is not self.stages[-1]:
                    continue
                if self._open_data(before, stage, first, step):
                    position = 0
                size = None
                while step < end:
                    if changed := size != stage.batch_at(step - first):
                        size = stage.batch_at(step - first)
                        rows = self._rows(stage, size, position)
                        self.heartbeat.busy()
                        run_step = self._compiled(stage, size, first, state)
                    if self.profiler:
                        self.profiler.before(step + 1)
                    began, words = time.perf_counter(), self.peers.words(caught)
                    state, metrics = run_step(state, place_batch(self.mesh, next(rows)), *words)
                    if changed:  # compiling is over
                        self.since = began = time.perf_counter()
                    self.peers.spent(time.perf_counter() - began)
                    self._log(previous)
                    if changed:  # others may still compile
                        self.heartbeat.busy()
                    step, position = step + 1, position + size.batch_size
                    tokens = row_tokens(self.model, stage.sequence_length) * size.batch_size
                    previous = step, metrics, tokens, stage
                    last, stop = step == self.total, self.peers.stop(caught)
                    checked, every = metrics.pop("checked"), self.config.check_every
                    check = every and (step == 1 or _due(every, step))
                    evaluate = last or _due(self.config.eval_every, step)
                    save = last or stop or _due(self.config.save_every, step)
                    near = not save and _due(self.config.faults.local_save_every, step)
                    if check or evaluate or save or near or self.profiler:
                        self._log(previous)
                        previous = None
                        self.heartbeat.busy()
                    if check or ((save or near) and every):
                        invariants.check(step, state.params, checked, self.model, whole=check)
                    if self.profiler and (table := self.profiler.after(step)):
                        self.progress.say(table)
                    if evaluate:
                        self._evaluate(state, step, size)
                    if save or near:
                        self.log.flush()
                    if save:
                        self._save(state, step, position)
                    if near:
                        about = {"position": position, "data": self.dataset.fingerprint}
                        self.local.save(step, state, about)
                    if check or evaluate or save or near:
                        self.since = time.perf_counter()
                        self.heartbeat.step(step)
                    if stop:
                        self._settle()
                        self.progress.say(
                            f"stopped by {signal.Signals(stop).name} after step {step}; everything "
                            f"is saved in {self.run_dir}: run the same command again to resume"
                        )
                        return 128 + stop
        self._settle()
        if jax.process_index() == 0:
            self._finish(state, step)
        return 0

    def close(self):
        """Release what a run holds open, whatever happened."""
        if self.profiler and (table := self.profiler.close()):
            self.progress.say(table)
        self.heartbeat.close()
        self.progress.close()
        self.log.close()
        self.manager.close()
        if self.local:
            self.local.wait()

    def _restore(self) -> tuple[TrainState, int]:
        """The newest good checkpoint's state and data position, or a fresh start."""
        recorded, config = self.run_dir / "config.json", self.config
        optimizer = make_optimizer(self.stages[0].optimizer, self.model.specs)
        memory, by_slice = self.stages[0].optimizer.memory, config.mesh.by_slice
        abstract = abstract_state(self.model, optimizer, self.mesh, memory, by_slice)
        newest = self.manager.newest()
        if (faults := self.config.faults).local_save_every:
            self.local = LocalCheckpoints(faults.local_dir, run_name(self.run_dir))
        local = self.local.newest(abstract) if self.local else -1
        if recorded.exists() and (newest is not None or local >= 0):
            check_model(recorded, self.config)
        if local > (newest or 0):
            state, about = self.local.restore(local, abstract)
            position, self.fingerprint = about["position"], about["data"]
            self.progress.say(
                f"resuming in {self.run_dir} after step {local}, from {faults.local_dir}"
            )
        elif newest is not None:
            restored = self.manager.restore(abstract, newest)
            state, position = restored.state, restored.position
            if (saved := self.manager.directory / str(newest) / FINGERPRINT).exists():
                self.fingerprint = saved.read_text()
            self.progress.say(f"resuming in {self.run_dir} after step {newest}")
        else:
            state, position = self._fresh(abstract, optimizer), 0
        self.log.cut_back(int(state.step))
        if jax.process_index() == 0:
            core_config.save_json(self.config, recorded)
        return state, position

    def _fresh(self, abstract: TrainState, optimizer: Any) -> TrainState:
        config, shardings = self.config, jax.tree.map(lambda x: x.sharding, abstract)
        if config.init_from is None:
            key = jax.random.key(config.seed)
            params = jax.jit(lambda: self.model.init(key), out_shardings=shardings.params)()
        else:
            params = self._given(abstract.params)

        def start(params):
            return initial_state(params, optimizer, config.precision.loss_scale, abstract.left_out)

        return jax.jit(start, out_shardings=shardings, donate_argnums=0)(params)

    def _given(self, abstract: Any) -> Any:
        """The parameters of `init_from`; indexers that it has not start anew."""
        config, model, added, note = self.config, self.model, {}, ""
        folder, source = None, None
        if is_folder_of_tensors(config.init_from):
            folder = huggingface.open_any(huggingface.fetched(config.init_from))
        else:
            source = integrity.resolve(config.init_from)
        if folder:
            theirs = folder.config
        else:
            theirs = core_config.from_dict(ModelConfig, read_config(source)["model"], "model")
        if type(theirs) is not type(config.model):
            found, wanted = type(theirs).__name__, type(config.model).__name__
            raise InputError(f"{config.init_from} holds a {found}, and this run trains a {wanted}")
        indexer = getattr(getattr(config.model, "attention", None), "indexer", None)
        if indexer and getattr(theirs.attention, "indexer", indexer) is None:
            # As V3.2 grew out of V3.1.
            attention = dataclasses.replace(config.model.attention, indexer=None)
            bare = dataclasses.replace(config.model, attention=attention)
            model, note = build_network(bare, config.precision), ", its new indexers made anew"
            leaves = tree.flatten(abstract)
            places = {path: leaf.sharding for path, leaf in leaves.items() if is_indexer(path)}

            def make() -> dict[str, Any]:
                fresh = tree.flatten(self.model.init(jax.random.key(config.seed)))
                return {path: fresh[path] for path in places}  # nothing else is computed

            added = jax.jit(make, out_shardings=places)()
            abstract = unflatten_dict({p: x for p, x in leaves.items() if p not in added}, sep="/")
        if folder:
            params = huggingface.load_any(folder, model, abstract)
        else:
            params = load_params(source, abstract, self.layers)
        self.progress.say(f"starting from the parameters of {config.init_from}{note}")
        return unflatten_dict(tree.flatten(params) | added, sep="/")

    def _open_data(self, before: Stage | None, stage: Stage, first: int, step: int) -> bool:
        """Open a stage's data; whether its rows count from 0, as the stage before had others.

        Refuses other data than the checkpoint's: its position would mean nothing.
        """
        old = before and (before.data, before.sequence_length)
        changed = old != (stage.data, stage.sequence_length)
        if self.dataset is None or changed:
            given = {"sequence_length": stage.sequence_length, "seed": self.config.seed}
            if isinstance(stage.data, Data):
                targets = 1 + self.config.model.num_mtp_layers
                self.dataset = open_data(stage.data, num_targets=targets, **given)
            else:
                self.dataset = open_pairs(stage.data, **given)
            self.progress.say(self.dataset.describe())
            found, room = self.dataset.tokenizer.vocab_size, self.config.model.vocab_size
            if found > room:
                why = f"the tokenizer has {found} tokens, but model.vocab_size is {room}"
                raise InputError(f"{why}: raise it or choose a smaller tokenizer")
        new = changed and step == first
        known, self.fingerprint = self.fingerprint, None
        if not new and known not in (None, self.dataset.fingerprint):
            saved = self.manager.directory / str(step)
            raise InputError(
                f"the training data or their order changed since {saved}: put the old files "
                "and settings back, or start another run from its parameters with --init-from"
            )
        return new

    def _rows(self, stage: Stage, size: BatchStep, position: int) -> Iterator[Any]:
        index, count = rows_share(batch_sharding(self.mesh), size.batch_size)
        return batches(
            self.dataset,
            start=position,
            batch_size=size.batch_size,
            process_index=index,
            process_count=count,
            num_workers=stage.data.num_workers,
        )

    def _compiled(self, stage: Stage, size: BatchStep, first: int, state: TrainState) -> Any:
        """The train step as one program that overwrites the state it is given."""
        chunks = self.config.mesh.stage_chunks
        pipeline = Pipeline.on(self.mesh, chunks, size.accumulation_steps)
        if pipeline.stages > 1:
            self.progress.say(pipeline.describe())
        if self.config.mesh.by_slice:
            self.progress.say(slices.describe(self.mesh, self.model))
        step = stage_step(self.config, self.model, stage, size, first)
        return stored(overwriting(self.peers.telling(step), state, self.model))

    def _log(self, done: tuple[int, dict, int, Stage] | None) -> None:
        """Wait for a dispatched step and write what it measured."""
        if done is None:
            return
        step, metrics, tokens, stage = done
        self.peers.hear(metrics)
        skipped, load = int(metrics["skipped"]), metrics.pop("expert_load")
        self.heartbeat.step(step)
        now = time.perf_counter()
        self.tokens, self.seconds = self.tokens + tokens, self.seconds + now - self.since
        self.since, self.steps = now, self.steps + 1
        if step in (1, self.total) or _due(self.config.log_every, step):
            rate = self.tokens / self.seconds
            flops = train_flops_per_token(self.model, stage.sequence_length)
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            values |= {"tokens_per_second": rate, "mfu": rate * flops / self.peak}
            pace, self.tokens, self.seconds, self.steps = self.seconds / self.steps, 0, 0.0, 0
            self.log.metrics(step, values)
            if load:
                self.log.expert_load(step, jax.device_get(load))
            self.progress.step(step, values)
            if warning := collapse(step, values):
                self.progress.say(f"step {step}: {warning}")
            times, named = self.peers.straggler(pace, self.config.faults.straggler_factor)
            if times:
                self.log.processes(step, times)
            if named:
                self.progress.say(f"step {step}: {named}")
        if skipped >= stage.optimizer.max_skipped:
            raise InputError(
                f"step {step}: loss or gradient were not finite {skipped} steps running, all of "
                "them skipped; lower optimizer.learning_rate or lengthen optimizer.warmup_steps"
            )

    def _evaluate(self, state: TrainState, step: int, size: BatchStep) -> None:
        rows = size.batch_size // size.accumulation_steps
        found = self.lent.held_out(self.model, state.params, self.dataset, rows)
        self.log.evaluation(step, found)
        self.progress.evaluation(found)

    def _save(self, state: TrainState, step: int, position: int) -> None:
        config, files = core_config.to_dict(self.config), self.dataset.tokenizer.files()
        files |= {FINGERPRINT: self.dataset.fingerprint.encode()}
        self.manager.save(step, state, position=position, config=config, files=files)

    def _settle(self) -> None:
        """Wait until everything is in a durable checkpoint; then the local ones have no use."""
        self.heartbeat.busy()
        self.manager.wait()
        if self.local:
            multihost_utils.sync_global_devices("everything is saved")
            self.local.remove()

    def _finish(self, state: TrainState, step: int) -> None:
        self.progress.close()
        for last in read_lines(self.run_dir / "eval.jsonl")[-1:]:
            print(f"held-out after {step} steps: {summary(last)}")
        print(self.lent.closing(self.model, state.params, self.dataset, self.config))
        print(f"report: {write_report(self.run_dir)}")


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0

"""The one loop, dull on purpose.

Restore; then for every step: fetch and place its rows, dispatch step n, log step n-1 (so that the
device never waits for the host), check if due, evaluate if due, save if due, stop on a signal. A
step's line is written before its checkpoint, and a restart cuts the files back to the restored
step, so that a run killed at any moment continues as if nothing had happened, each step once.

Exit codes: 0 the run is complete; 128 + signal (SIGINT 130, SIGTERM 143) it was stopped, everything
is saved, and the same command resumes; 3 a stage is at its end and the gate that it must pass shut:
everything is saved, and another config may resume; 75 a step hung (training/faults.py). A signal to
one process of several stops all of them after the same step. A second signal kills at once.
"""

import io
import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils

from deepseek_jax.checkpoint import integrity
from deepseek_jax.checkpoint.local import LocalCheckpoints, run_name
from deepseek_jax.checkpoint.manager import Manager
from deepseek_jax.core import config as core_config
from deepseek_jax.core.errors import InputError
from deepseek_jax.core.storage import located
from deepseek_jax.data.loader import batches
from deepseek_jax.models.build import Network
from deepseek_jax.models.counts import row_tokens, train_flops_per_token
from deepseek_jax.models.networks import build_network
from deepseek_jax.monitoring.metrics import RunLog, read_lines
from deepseek_jax.monitoring.profiler import Profiler, matmul_peak
from deepseek_jax.monitoring.progress import Progress, summary
from deepseek_jax.monitoring.report import write_report
from deepseek_jax.parallel.mesh import MeshShape, make_mesh, rows_share
from deepseek_jax.parallel.pipeline import Pipeline
from deepseek_jax.parallel.sharding import batch_sharding, check_batch, place_batch
from deepseek_jax.parallel.stored import stored
from deepseek_jax.training import invariants, slices
from deepseek_jax.training.contrastive import collapse
from deepseek_jax.training.faults import Heartbeat, Peers, caught_signals
from deepseek_jax.training.recipe import BatchStep, Stage, TrainConfig, check_model
from deepseek_jax.training.speech import speech_warning
from deepseek_jax.training.stages import (
    AnyDataset,
    asked_gate,
    overwriting,
    shut,
    sized,
    spans,
    stage_at,
    stage_data,
    stage_optimizer,
    stage_state,
    stage_step,
)
from deepseek_jax.training.start import given_params, params_of_parts
from deepseek_jax.training.state import TrainState, carried, initial_state

FINGERPRINT = "data.sha256"  # beside a checkpoint: what its data were
GATES = "gates.json"  # and which gates have opened, once one has


class Lent(NamedTuple):
    """What higher floors lend the loop."""

    held_out: Callable[[Network, Any, AnyDataset, int], dict[str, float]]
    """(model, params, dataset, batch size) -> loss, bits_per_byte, ... on the held-out side."""
    closing: Callable[[Network, Any, AnyDataset, TrainConfig], str]
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
        self.opened: dict[int, int] = {}  # {number of a stage: the step that opened its gate}
        self.model = self.shown = build_network(config.model, config.precision)
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
        self.dataset: AnyDataset | None = None
        self.fingerprint: str | None = None  # of the data that the restored state has seen

    def go(self) -> int:
        with caught_signals() as caught:
            state, position = self._restore()
            step, previous = int(state.step), None
            for number, stage in enumerate(self.stages):
                if shut(self.stages, self.opened, step):
                    break
                first, end = spans(self.stages, self.opened)[number]
                if step >= end and stage is not self.stages[-1]:
                    continue
                if number and step == first:
                    state = carried(state, self._abstract(number))
                before = self.stages[number - 1] if number else None
                if self._open_data(before, stage, first, step):
                    position = 0
                of_row = row_tokens(self.shown, stage.sequence_length)
                size = None
                while step < end:
                    if changed := size != stage.batch_at(step - first):
                        size = stage.batch_at(step - first)
                        rows = self._rows(stage, size, position)
                        self.heartbeat.busy()
                        run_step = self._compiled(number, size, first, state)
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
                    tokens = of_row * size.batch_size
                    asked = stage.gate and (step == end or _due(stage.gate.every, step - first))
                    previous = step, metrics, tokens, stage, asked
                    last, stop = step == self.total, self.peers.stop(caught)
                    checked, every = metrics.pop("checked"), self.config.check_every
                    check = every and (step == 1 or _due(every, step))
                    evaluate = last or asked or _due(self.config.eval_every, step)
                    save = last or stop or _due(self.config.save_every, step)
                    near = not save and _due(self.config.faults.local_save_every, step)
                    if check or evaluate or save or near or self.profiler:
                        self._log(previous)
                        previous = None
                        self.heartbeat.busy()
                    if check or ((save or near or asked) and every):
                        invariants.check(step, state.params, checked, self.model, whole=check)
                    if self.profiler and (table := self.profiler.after(step)):
                        self.progress.say(table)
                    if evaluate:
                        found = self._evaluate(state, step, size)
                    if asked and self._opens(number, step, found):
                        end, last = step, step == self.total
                    save = save or last or bool(shut(self.stages, self.opened, step))
                    if save or near:
                        self.log.flush()
                    if save:
                        self._save(state, step, position)
                    if near:
                        about = {"position": position, "data": self.dataset.fingerprint}
                        about |= {"gates": [*self.opened.items()]}
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
        if stage := shut(self.stages, self.opened, step):
            self.progress.say(
                f"stopped after step {step}: stage {stage.name!r} is at its end, and {stage.gate} "
                f"does not hold, which its gate requires; everything is saved in {self.run_dir}"
            )
            return 3
        if jax.process_index() == 0:
            self._finish(state, step)
        return 0

    @property
    def total(self) -> int:
        """The run's last step, if no further gate opens."""
        return spans(self.stages, self.opened)[-1][1]

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
        recorded = self.run_dir / "config.json"
        newest = self.manager.newest()
        if (faults := self.config.faults).local_save_every:
            self.local = LocalCheckpoints(faults.local_dir, run_name(self.run_dir))
        local = self.local.newest(self._abstract_after) if self.local else -1
        if recorded.exists() and (newest is not None or local >= 0):
            check_model(recorded, self.config)
        if local > (newest or 0):
            state, about = self.local.restore(local, self._abstract_after)
            self.opened = dict(about.get("gates", ()))
            position, self.fingerprint = about["position"], about["data"]
            self.progress.say(
                f"resuming in {self.run_dir} after step {local}, from {faults.local_dir}"
            )
        elif newest is not None:
            folder = self.manager.directory / str(newest)
            about = json.loads((folder / GATES).read_text()) if (folder / GATES).exists() else {}
            self.opened = dict(about.get("gates", ()))
            restored = self.manager.restore(self._abstract_after(newest, about), newest)
            state, position = restored.state, restored.position
            if (folder / FINGERPRINT).exists():
                self.fingerprint = (folder / FINGERPRINT).read_text()
            self.progress.say(f"resuming in {self.run_dir} after step {newest}")
        else:
            state, position = self._fresh(), 0
        self.progress.num_steps = self.total
        self.log.cut_back(int(state.step))
        if jax.process_index() == 0:
            core_config.save_json(self.config, recorded)
        return state, position

    def _abstract(self, number: int) -> TrainState:
        return stage_state(self.config, self.model, self.mesh, number)

    def _abstract_after(self, step: int, about: dict[str, Any]) -> TrainState:
        """The state that a checkpoint of this step holds."""
        return self._abstract(stage_at(self.stages, dict(about.get("gates", ())), step))

    def _fresh(self) -> TrainState:
        config, abstract = self.config, self._abstract(0)
        optimizer = stage_optimizer(config, self.model)
        shardings = jax.tree.map(lambda x: x.sharding, abstract)
        if config.init_from is None and not config.init_parts:
            key = jax.random.key(config.seed)
            params = jax.jit(lambda: self.model.init(key), out_shardings=shardings.params)()
        else:
            given = given_params if config.init_from else params_of_parts
            params, said = given(config, self.model, abstract.params)
            self.progress.say(said)

        def start(params):
            return initial_state(params, optimizer, config.precision.loss_scale, abstract.left_out)

        return jax.jit(start, out_shardings=shardings, donate_argnums=0)(params)

    def _open_data(self, before: Stage | None, stage: Stage, first: int, step: int) -> bool:
        """Open a stage's data; whether its rows count from 0, as the stage before had others.

        Refuses other data than the checkpoint's: its position would mean nothing.
        """
        old = before and (before.data, before.sequence_length)
        changed = old != (stage.data, stage.sequence_length)
        if self.dataset is None or changed:
            self.dataset, self.shown = stage_data(self.config, stage), sized(self.model, stage)
            self.progress.say(self.dataset.describe())
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

    def _compiled(self, number: int, size: BatchStep, first: int, state: TrainState) -> Any:
        """The train step as one program that overwrites the state it is given."""
        chunks = self.config.mesh.stage_chunks
        pipeline = Pipeline.on(self.mesh, chunks, size.accumulation_steps)
        if pipeline.stages > 1:
            self.progress.say(pipeline.describe())
        if self.config.mesh.by_slice:
            self.progress.say(slices.describe(self.mesh, self.model))
        step = stage_step(self.config, self.model, self.stages[number], size, first, number)
        return stored(overwriting(self.peers.telling(step), state, self.model))

    def _log(self, done: tuple[int, dict, int, Stage, Any] | None) -> None:
        """Wait for a dispatched step and write what it measured."""
        if done is None:
            return
        step, metrics, tokens, stage, asked = done  # what a gate asked for may be the last
        self.peers.hear(metrics)
        skipped, load = int(metrics["skipped"]), metrics.pop("expert_load")
        self.heartbeat.step(step)
        now = time.perf_counter()
        self.tokens, self.seconds = self.tokens + tokens, self.seconds + now - self.since
        self.since, self.steps = now, self.steps + 1
        if asked or step in (1, self.total) or _due(self.config.log_every, step):
            rate = self.tokens / self.seconds
            given = sized(self.model, stage), stage.sequence_length, stage.views, stage.windows
            flops = train_flops_per_token(*given)  # of a stage that may have ended
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            values |= {"tokens_per_second": rate, "mfu": rate * flops / self.peak}
            pace, self.tokens, self.seconds, self.steps = self.seconds / self.steps, 0, 0.0, 0
            self.log.metrics(step, values)
            if load:
                self.log.expert_load(step, jax.device_get(load))
            self.progress.step(step, values)
            for warning in filter(None, (collapse(step, values), speech_warning(step, values))):
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

    def _evaluate(self, state: TrainState, step: int, size: BatchStep) -> dict[str, float]:
        rows = size.batch_size // size.accumulation_steps
        found = self.lent.held_out(self.shown, state.params, self.dataset, rows)
        self.log.evaluation(step, found)
        self.progress.evaluation(found)
        return found

    def _opens(self, number: int, step: int, found: dict[str, float]) -> bool:
        """Whether what an evaluation found opens a stage's gate, which ends the stage."""
        opens, said = asked_gate(self.stages, self.opened, number, step, found)
        if opens:
            self.opened[number] = step
            self.progress.num_steps = self.total
        if said:
            self.progress.say(said)
        return opens

    def _save(self, state: TrainState, step: int, position: int) -> None:
        config, tokenizer = core_config.to_dict(self.config), self.dataset.tokenizer
        files = {FINGERPRINT: self.dataset.fingerprint.encode()}
        files |= tokenizer.files() if tokenizer else {}
        if self.opened:
            files |= {GATES: json.dumps({"gates": [*self.opened.items()]}).encode()}
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
        params, mesh, leaves = state.params, self.mesh, jax.tree.leaves(state.params)
        if all(x.is_fully_replicated and not x.is_fully_addressable for x in leaves):
            # The other processes do not come along: nothing may wait for them.
            params = jax.tree.map(lambda x: x.addressable_data(0), params)
            mesh = make_mesh(MeshShape(), jax.local_devices()[:1])
        with jax.set_mesh(mesh):
            print(self.lent.closing(self.shown, params, self.dataset, self.config))
        print(f"report: {write_report(self.run_dir)}")


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0

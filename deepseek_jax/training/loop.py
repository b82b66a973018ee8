"""The one loop, dull on purpose.

Restore; then for every step: fetch and place its rows, dispatch step n, log step n-1 (so that the
device never waits for the host), evaluate if due, save if due, stop on a signal. A step's line is
written before its checkpoint, and a restart cuts the files back to the restored step, so that a run
killed at any moment continues as if nothing had happened: same rows, same losses, each step once.

Exit codes: 0 the run is complete; 128 + signal (SIGINT 130, SIGTERM 143) it was stopped, everything
is saved, and the same command resumes. A second signal kills at once.
"""

import contextlib
import functools
import pathlib
import signal
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from deepseek_jax.checkpoint.integrity import steps as checkpoint_steps
from deepseek_jax.checkpoint.manager import Manager, load_params, lock_run, resolve
from deepseek_jax.core import config as core_config
from deepseek_jax.core.errors import InputError
from deepseek_jax.data.loader import Dataset, batches, open_data
from deepseek_jax.models.build import Model, build
from deepseek_jax.models.counts import train_flops_per_token
from deepseek_jax.models.decoder import layer_table
from deepseek_jax.monitoring.metrics import RunLog, read_lines
from deepseek_jax.monitoring.profiler import Profiler, matmul_peak
from deepseek_jax.monitoring.progress import Progress
from deepseek_jax.monitoring.report import write_report
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parallel.sharding import num_batch_shards, place_batch
from deepseek_jax.training.language import make_language
from deepseek_jax.training.optimizer import make_optimizer
from deepseek_jax.training.recipe import BatchStep, Plan, TrainConfig
from deepseek_jax.training.schedule import make_schedule
from deepseek_jax.training.state import TrainState, initial_state, place
from deepseek_jax.training.step import make_gradients, make_train_step


class Lent(NamedTuple):
    """What higher floors lend the loop."""

    held_out: Callable[[Model, Any, Dataset, int], dict[str, float]]
    """(model, params, dataset, batch size) -> loss, bits_per_byte, ... of the held-out documents."""
    closing: Callable[[Model, Any, Dataset, TrainConfig], str]
    """What to print when the run is complete, e.g. a sampled completion."""


class _Logged(NamedTuple):
    step: int
    metrics: dict[str, Any]
    tokens: int


def train(config: TrainConfig, lent: Lent, profile_steps: tuple[int, int] | None = None) -> int:
    """Run or resume `config` in its run directory; the process's exit code."""
    mesh = make_mesh(config.mesh)
    _check_batches(config, num_batch_shards(mesh))
    alone = lock_run(config.run_dir) if jax.process_index() == 0 else contextlib.nullcontext()
    with alone, jax.set_mesh(mesh):
        run = _Run(config, mesh, lent, profile_steps)
        try:
            return run.go()
        finally:
            run.close()


def abstract_state(config: TrainConfig, model: Model, mesh: Any, plan: Plan) -> TrainState:
    """The shapes and shardings of a stage's training state; nothing is computed."""
    optimizer = make_optimizer(plan.optimizer, model.specs)
    start = functools.partial(
        initial_state, optimizer=optimizer, loss_scale=config.precision.loss_scale
    )
    return place(mesh, model.specs, jax.eval_shape(start, model.shapes))


class _Run:
    """One process's part of a run."""

    def __init__(self, config, mesh, lent, profile_steps):
        self.config, self.mesh, self.lent = config, mesh, lent
        self.run_dir = pathlib.Path(config.run_dir)
        self.plans, self.total = config.plans(), config.total_steps()
        self.model = build(config.model, config.precision)
        self.manager = Manager(
            self.run_dir / "checkpoints", config.checkpoint, layer_table(config.model)
        )
        self.log = RunLog(self.run_dir)
        self.progress = Progress(self.total, log_every=config.log_every)
        self.profiler = Profiler(self.run_dir, *profile_steps) if profile_steps else None
        self.peak = matmul_peak().flops
        self.speed = _Speed()
        self.dataset: Dataset | None = None
        self.files: dict[str, bytes] = {}

    def go(self) -> int:
        state, position = self._restore()
        step, previous, held_out = int(state.step), None, {}
        with _Signals() as signals:
            for index, plan in enumerate(self.plans):
                end = plan.first_step + plan.steps
                if step >= end and plan is not self.plans[-1]:
                    continue
                state, position = self._enter(index, state, position, step)
                size, rows, run_step = None, None, None
                while step < end:
                    if size != plan.batch_at(step):
                        size = plan.batch_at(step)
                        rows = self._rows(plan, size, position)
                        run_step = self._compiled(plan, size, state)
                        self.speed.pause()
                    if self.profiler:
                        previous = self._log(previous, plan)
                        self.profiler.before(step + 1)
                    batch = place_batch(self.mesh, next(rows))
                    state, metrics = run_step(state, batch)
                    step, position = step + 1, position + size.batch_size
                    self._log(previous, plan)
                    previous = _Logged(step, metrics, size.batch_size * plan.sequence_length)
                    evaluate = step == self.total or _due(self.config.eval_every, step)
                    stop = self._agreed(signals.number, step)
                    save = step == self.total or stop or _due(self.config.save_every, step)
                    if evaluate or save or self.profiler:
                        previous = self._log(previous, plan)
                    if self.profiler and (table := self.profiler.after(step)):
                        self.progress.say(table)
                    if evaluate:
                        held_out = self._evaluate(state, step, size)
                    if save:
                        self._save(state, step, position)
                    if stop:
                        self.manager.wait()
                        self.progress.say(
                            f"stopped by {signal.Signals(stop).name} after step {step}; everything "
                            f"is saved in {self.run_dir}: run the same command again to resume"
                        )
                        return 128 + stop
        self.manager.wait()
        self._finish(state, step, held_out)
        return 0

    def close(self):
        """Release what a run holds open, whatever happened."""
        if self.profiler and (table := self.profiler.close()):
            self.progress.say(table)
        self.progress.close()
        self.log.close()
        self.manager.close()

    def _restore(self) -> tuple[TrainState, int]:
        """The newest good checkpoint's state and data position, or a fresh start."""
        recorded = self.run_dir / "config.json"
        steps = checkpoint_steps(self.manager.directory)
        if steps and recorded.exists():
            _check_model(recorded, self.config)
        restored = self.manager.restore(self._abstract_after(steps[-1] if steps else 0))
        if restored is None:
            state, position = self._fresh(), 0
        else:
            state, position = restored.state, restored.position
            self.progress.say(f"resuming in {self.run_dir} after step {restored.step}")
        self.log.cut_back(int(state.step))
        if jax.process_index() == 0:
            temporary = recorded.with_suffix(".tmp")
            core_config.save_json(self.config, temporary)
            temporary.replace(recorded)  # a kill leaves the old one or the new one
        return state, position

    def _abstract_after(self, step: int) -> TrainState:
        """What a checkpoint of `step` holds: the memory of the optimizer that made that step."""
        begun = [plan for plan in self.plans if plan.first_step < max(step, 1)]
        return abstract_state(self.config, self.model, self.mesh, begun[-1])

    def _fresh(self) -> TrainState:
        plan, config = self.plans[0], self.config
        abstract = self._abstract_after(0)
        shardings = jax.tree.map(lambda x: x.sharding, abstract)
        optimizer = make_optimizer(plan.optimizer, self.model.specs)

        def start(params):
            return initial_state(params, optimizer, config.precision.loss_scale)

        if config.init_from is None:
            key = jax.random.key(config.seed)
            return jax.jit(lambda: start(self.model.init(key)), out_shardings=shardings)()
        params = load_params(resolve(config.init_from), abstract.params, layer_table(config.model))
        self.progress.say(f"starting from the parameters of {config.init_from}")
        return jax.jit(start, out_shardings=shardings, donate_argnums=0)(params)

    def _enter(self, index, state, position, step) -> tuple[TrainState, int]:
        """Open a stage's data; a fresh optimizer memory and data position where they must be."""
        plan, before = self.plans[index], self.plans[max(index - 1, 0)]
        same = (plan.data, plan.sequence_length) == (before.data, before.sequence_length)
        if step == plan.first_step and not same:
            position = 0
        if self.dataset is None or not same:
            self.dataset = open_data(
                plan.data,
                sequence_length=plan.sequence_length,
                num_targets=1 + self.config.model.num_mtp_layers,
                seed=self.config.seed,
            )
            self.progress.say(self.dataset.describe())
            self.files = _tokenizer_files(self.dataset, self.config)
        abstract = abstract_state(self.config, self.model, self.mesh, plan)
        if jax.tree.map(_kind, abstract.opt_state) != jax.tree.map(_kind, state.opt_state):
            optimizer = make_optimizer(plan.optimizer, self.model.specs)
            shardings = jax.tree.map(lambda x: x.sharding, abstract.opt_state)
            opt_state = jax.jit(optimizer.init, out_shardings=shardings)(state.params)
            state = state.replace(opt_state=opt_state)
        return state, position

    def _rows(self, plan: Plan, size: BatchStep, position: int) -> Any:
        return batches(
            self.dataset,
            start=position,
            batch_size=size.batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            num_workers=plan.data.num_workers,
        )

    def _compiled(self, plan: Plan, size: BatchStep, state: TrainState) -> Any:
        """The train step as one program that overwrites the state it is given."""
        config, model = self.config, self.model
        objective = make_language(plan.objective, model)
        schedule = make_schedule(plan.optimizer.schedule, plan.optimizer.warmup_steps, plan.steps)
        peak, scaled = plan.optimizer.learning_rate, model.dtypes.compute == jnp.float16
        train_step = make_train_step(
            make_gradients(objective, size.accumulation_steps),
            objective,
            make_optimizer(plan.optimizer, model.specs),
            lambda step: peak * schedule(step - plan.first_step),
            clip_norm=plan.optimizer.clip_norm,
            loss_scale_growth=config.precision.loss_scale_growth if scaled else None,
        )

        def run_step(state, batch):
            return train_step(
                state, batch, jax.random.fold_in(jax.random.key(config.seed), state.step)
            )

        shardings = jax.tree.map(lambda x: x.sharding, state)
        return jax.jit(run_step, donate_argnums=0, out_shardings=(shardings, None))

    def _agreed(self, number: int | None, step: int) -> int | None:
        """The signal to stop for; several processes ask each other at every logged step."""
        if jax.process_count() == 1:
            return number
        if step % self.config.log_every:
            return None
        return int(multihost_utils.process_allgather(np.int32(number or 0)).max()) or None

    def _log(self, logged: _Logged | None, plan: Plan) -> None:
        """Wait for a dispatched step and write what it measured."""
        if logged is None:
            return
        step, metrics, tokens = logged
        skipped = int(metrics["skipped"])
        self.speed.add(tokens)
        load = metrics.pop("expert_load")
        if step == 1 or step == self.total or _due(self.config.log_every, step):
            flops = train_flops_per_token(self.model, plan.sequence_length)
            rate = self.speed.rate()
            speed = {"tokens_per_second": rate, "mfu": rate * flops / self.peak}
            self.latest = {k: float(v) for k, v in jax.device_get(metrics).items()} | speed
            self.log.metrics(step, self.latest)
            if load:
                self.log.expert_load(step, jax.device_get(load))
            self.progress.step(step, self.latest)
        if skipped >= plan.optimizer.max_skipped:
            raise InputError(
                f"step {step}: the loss or its gradient was not finite for {skipped} steps running, "
                "all skipped (optimizer.max_skipped); lower optimizer.learning_rate, lengthen its "
                "warmup, or look at the data of these steps"
            )

    def _evaluate(self, state, step, size) -> dict[str, float]:
        count = size.batch_size // size.accumulation_steps
        found = self.lent.held_out(self.model, state.params, self.dataset, count)
        self.log.evaluation(step, found)
        self.progress.evaluation(found["bits_per_byte"])
        self.speed.pause()
        return found

    def _save(self, state, step, position):
        config = core_config.to_dict(self.config)
        self.manager.save(step, state, position=position, config=config, files=self.files)
        self.speed.pause()

    def _finish(self, state, step, held_out):
        if jax.process_index() != 0:
            return
        if not held_out:  # resumed after the last step: it was evaluated then
            lines = read_lines(self.run_dir / "eval.jsonl")
            held_out = lines[-1] if lines else {}
        self.progress.close()
        if held_out:
            print(
                f"held-out after {step} steps: {held_out['bits_per_byte']:.4f} bits per byte, "
                f"loss {held_out['loss']:.4f}"
            )
        print(self.lent.closing(self.model, state.params, self.dataset, self.config))
        self.log.close()
        print(f"report: {write_report(self.run_dir)}")


class _Speed:
    """Tokens a second since the last reading, without the pauses."""

    def __init__(self):
        self.tokens, self.seconds, self.since = 0, 0.0, None

    def pause(self):
        self.since = None

    def add(self, tokens: int):
        """These tokens are done; the first after a pause only start the clock."""
        now = time.perf_counter()
        if self.since is not None:
            self.tokens += tokens
            self.seconds += now - self.since
        self.since = now

    def rate(self) -> float:
        """Not a number before the second step."""
        rate = self.tokens / self.seconds if self.seconds else float("nan")
        self.tokens, self.seconds = 0, 0.0
        return rate


class _Signals:
    """Remembers the first SIGTERM or SIGINT in `number`; the next one acts as it always did."""

    def __init__(self):
        self.number: int | None = None

    def __enter__(self):
        watched = (signal.SIGTERM, signal.SIGINT)
        self.usual = {number: signal.signal(number, self._note) for number in watched}
        return self

    def _note(self, number, frame):
        self.number = number
        self.__exit__()

    def __exit__(self, *_):
        for number, handler in self.usual.items():
            signal.signal(number, handler)


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _kind(leaf: Any) -> tuple:
    return leaf.shape, str(leaf.dtype)


def _tokenizer_files(dataset: Dataset, config: TrainConfig) -> dict[str, bytes]:
    """The tokenizer as the files that a checkpoint carries; InputError if the model is too small."""
    tokenizer = dataset.tokenizer
    if tokenizer.vocab_size > config.model.vocab_size:
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but model.vocab_size is "
            f"{config.model.vocab_size}: raise it or choose a smaller tokenizer"
        )
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save(directory)
        root = pathlib.Path(directory)
        files = (path for path in sorted(root.rglob("*")) if path.is_file())
        return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def _check_batches(config: TrainConfig, shards: int) -> None:
    for plan in config.plans():
        for size in plan.batches:
            rows = size.batch_size // size.accumulation_steps
            if rows % shards:
                raise InputError(
                    f"batch_size {size.batch_size} in {size.accumulation_steps} accumulation steps "
                    f"is {rows} sequences at a time, which the mesh's {shards} batch shards do not "
                    "divide: change batch_size, accumulation_steps or mesh"
                )


def _check_model(recorded: pathlib.Path, config: TrainConfig) -> None:
    """InputError when the run directory belongs to another model; says what differs."""
    old = core_config.read_json(recorded).get("model", {})
    different = list(_changes("model", old, core_config.to_dict(config.model)))
    if different:
        raise InputError(
            f"{recorded.parent} holds a run of another model: {'; '.join(different[:5])}; choose "
            "another --run-dir, or start from its parameters with --init-from"
        )


def _changes(where: str, old: Any, new: Any) -> Any:
    """Sentences on what differs, apart from how the same numbers are computed."""
    if where in ("model.remat", "model.unroll"):
        return
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            yield from _changes(f"{where}.{name}", old.get(name), new.get(name))
    elif old != new:
        yield f"{where} was {old}, is {new}"

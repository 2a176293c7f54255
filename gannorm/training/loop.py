"""The training loop: one visible sequence from a config to a finished run folder."""

import gc
import random
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from gannorm import parallel
from gannorm.config import typed
from gannorm.data import Data, batches, build_data
from gannorm.diagnostics.faults import balance_faults
from gannorm.errors import RequestError, RunError
from gannorm.metrics.best import unmeasured
from gannorm.models import winograd
from gannorm.norms import cpu
from gannorm.parallel import Left
from gannorm.schema import Config
from gannorm.tasks import TASKS, Evaluator, build_task
from gannorm.training import checkpoint, weights
from gannorm.training.arithmetic import arithmetic
from gannorm.training.dashboard import Dashboard, class_table, environment
from gannorm.training.determinism import deterministic
from gannorm.training.folder import owned, write_json
from gannorm.training.memory import telling_of_memory
from gannorm.training.monitor import Monitor, Silent
from gannorm.training.nonfinite import NotFinite, finite
from gannorm.training.options import check_options, prepare, stepping
from gannorm.training.report import (
    closing,
    describe,
    device_name,
    postfix,
    say,
    versions,
)
from gannorm.training.request import (
    check_pair,
    divided,
    find_resume,
    is_restarted,
    mark,
    pick_device,
)
from gannorm.training.rewinding import give_up, go_back
from gannorm.training.run import Run
from gannorm.training.saving import save, save_best
from gannorm.training.stopping import Stop

Groups = dict[str, dict[str, float]]
Summary = dict[str, Any]


def train(raw: DictConfig, run_dir: Path, begin: Callable[[], None] = lambda: None) -> Summary:
    """Train as the composed config says, into `run_dir`.

    begin: called before anything is written, once nothing can be refused any more.

    Returns the content of summary.json.

    Raises:
        RequestError: a request that cannot be fulfilled, before anything is written; or images
            that turn out to be unreadable.
        FloatingPointError: a loss became NaN or infinite.
        RunError: too little memory, a data worker that died or gives no batch, or what the run ends
            with cannot be written.
        SystemExit: 128 + the number of a signal (`trainer.stop_signals`).
    """
    cfg = typed(raw)
    device = pick_device(cfg.trainer.device)
    gc.freeze()  # what is imported stays; looking through it takes 0.3 s each time
    try:
        with (
            owned(run_dir),
            telling_of_memory(cfg, device),
            deterministic(cfg.trainer.deterministic, device),
            arithmetic(cfg.trainer, device, getattr(cfg.data, "preprocess", "") == "none"),
            Stop(cfg.trainer.stop_signals) as stop,
        ):
            summary = _train(cfg, raw, run_dir, begin, device, stop)
            if number := stop.now():
                raise Left(number)
    except Left as left:
        say(f"ended by {signal.Signals(left.number).name}; there was nothing to save")
        raise SystemExit(128 + left.number) from None
    finally:
        gc.unfreeze()
    return summary


def _train(
    cfg: Config, raw: DictConfig, run_dir: Path, begin: Callable[[], None], device: torch.device,
    stop: Stop,
) -> dict[str, Any]:  # fmt: skip
    with stop.leaving():
        # ---- check the request, build, resume
        check_pair(cfg)
        check_options(cfg, device)
        start_from, state = saved(cfg, run_dir)
        cfg.data = divided(cfg.data, state["config"] if state else None)
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(cfg.seed)
        with parallel.one_first():
            data = build_data(cfg.data)
        task = build_task(cfg, device, data.num_classes)
        task.class_names = data.class_names or task.class_names
        run = Run(task, as_composed(raw, cfg))
        changes = run.resume(state, start_from, run_dir) if state and start_from else []
        init = cfg.init_from if cfg.init_from.path and not start_from else None
        taken = weights.start(task, init) if init else []
        task.share_state()
        prepare(task)
        lines = [describe(cfg, task, data, run_dir, start_from, run.step, changes), *taken]
        say("\n".join(lines))
        if device.type == "cpu":
            cpu.keep_memory()
            cpu.kernels(), winograd.lanes()  # compiled now, if ever: not while something is timed

        # ---- what the figures are held against
        with run.evaluating():
            with parallel.one_first():
                evaluator = TASKS[cfg.model.name].evaluator(task, data)
            evaluator.share_state()
            reference = evaluator.reference_figures()
    missing = unmeasured(cfg, data, evaluator.measures)
    if missing is not None:
        say(f"{missing}; there will be no best.pt")
    begin()
    take_over(run_dir, start_from)
    monitor = (Monitor if parallel.leads() else Silent)(run_dir, run.step)
    begin_log(monitor, raw, evaluator, reference)
    board = Dashboard(monitor, evaluator, tagged("reference", reference))

    # ---- train
    groups = steps(run, evaluator, data, monitor, board, stop)

    # ---- report
    if not groups:  # resumed behind the last step
        with stop.leaving_together():
            groups = run.evaluate(evaluator)[0]
    summary = summarize(run, evaluator, groups, reference)
    if parallel.leads():
        board.compare(run.config, groups["quality"])
        monitor.close()
        try:
            write_json(run_dir / "summary.json", summary)
        except OSError as error:
            raise RunError(f"cannot write {run_dir / 'summary.json'}: {error.strerror}") from error
    say(closing(summary, run_dir))
    return summary


def saved(cfg: Config, run_dir: Path) -> tuple[Path | None, dict[str, Any] | None]:
    """The checkpoint to go on from, if any, and its content.

    Raises:
        RequestError: none where there should be one, or a run that would be written over.
    """

    def find() -> tuple[Path | None, dict[str, Any] | None]:
        ours = is_restarted(run_dir)  # torchrun goes on by itself
        path = checkpoint.newest_whole(run_dir) if ours else None
        path = path or find_resume(cfg.resume, run_dir)
        holds_run = path is None and (run_dir / "metrics.jsonl").exists()
        if holds_run and cfg.resume != "auto" and not ours:
            raise RequestError(
                f"{run_dir} already holds a run; continue it with resume=auto, or choose another "
                "folder with hydra.run.dir="
            )
        return path, None if path is None else checkpoint.of_a_run(path)

    return parallel.from_first(find)


def take_over(run_dir: Path, start_from: Path | None) -> None:
    """The first changes to a run folder, once nothing can be refused any more."""
    if parallel.leads():
        mark(run_dir)
        if start_from:
            checkpoint.set_aside(run_dir, start_from)


def as_composed(raw: DictConfig, cfg: Config) -> dict[str, Any]:
    """The composed config as plain values, for the checkpoints."""
    plain = OmegaConf.to_container(raw, resolve=True)
    assert isinstance(plain, dict)
    plain["data"]["global_batch_size"] = cfg.data.global_batch_size
    return {str(k): v for k, v in plain.items()}


def summarize(
    run: Run, evaluator: Evaluator[Any], groups: Groups, reference: dict[str, float]
) -> dict[str, Any]:
    """The content of summary.json."""
    cfg, images = run.cfg, run.step * run.task.batches_per_step * run.cfg.data.whole_batch
    return {
        "steps": run.step,
        "processes": parallel.world(),
        **groups,
        "reference": reference,
        "protocol": evaluator.protocol(),
        "skipped_images": len(evaluator.data.skipped),
        "skipped_steps": run.skipped,
        "rewinds": run.task.halvings,
        "best": {"figure": cfg.metrics.best, "value": run.best.value, "step": run.best.step},
        "training_seconds": round(run.seconds, 1),
        "evaluation_seconds": round(run.evaluation_seconds, 1),
        "images_per_second": round(images / run.seconds, 1),
        "device": device_name(run.task.device),
        "seed": cfg.seed,
        "versions": versions(),
    }


def begin_log(
    monitor: Monitor, raw: DictConfig, evaluator: Evaluator[Any], reference: dict[str, float]
) -> None:
    protocol, step = evaluator.protocol(), monitor.start_step
    monitor.text("config", f"```yaml\n{OmegaConf.to_yaml(raw, resolve=True)}\n```")
    monitor.text("protocol", f"```yaml\n{OmegaConf.to_yaml(protocol)}\n```")
    monitor.text("environment", environment(device_name(evaluator.device)))
    if skipped := evaluator.data.skipped:
        listed = "\n".join(f"- {line}" for line in skipped)
        monitor.text("skipped", f"{len(skipped)} images were skipped\n\n{listed}")
    monitor.captions = evaluator.captions
    if evaluator.named:
        monitor.text("classes", class_table(evaluator.task.class_names))
    monitor.scalars(step, tagged("reference", reference), protocol=protocol)


def steps(
    run: Run, evaluator: Evaluator[Any], data: Data, monitor: Monitor, board: Dashboard, stop: Stop
) -> Groups:
    """Train to the run's end, logging, evaluating, saving on the way: the last evaluation.

    Raises:
        SystemExit: 128 + the signal that ended it before.
    """
    if run.step == 0:
        show_samples(run, evaluator, monitor)
    rewinds = run.cfg.trainer.on_nonfinite == "rewind"
    if rewinds and parallel.from_first(lambda: checkpoint.newest(monitor.run_dir)) is None:
        save(run, monitor, last=True)  # there must be one to go back to
    bar = tqdm(
        total=run.cfg.trainer.steps, initial=run.step, unit="step", dynamic_ncols=True,
        disable=not parallel.leads(),
    )  # fmt: skip
    with bar:
        while True:
            try:
                try:
                    return stretch(run, evaluator, data, monitor, board, stop, bar)
                except Left as left:  # while it waited for a batch
                    end(run, monitor, left.number)
            except NotFinite as fault:
                if not rewinds or run.task.halvings >= run.cfg.trainer.nonfinite_limit:
                    give_up(run, monitor, fault)
                go_back(run, monitor, fault)
                bar.n = run.step


def stretch(
    run: Run, evaluator: Evaluator[Any], data: Data, monitor: Monitor, board: Dashboard,
    stop: Stop, bar: Any,
) -> Groups:  # fmt: skip
    """The steps to the run's end, or to a number that is none."""
    task, cfg, meter = run.task, run.cfg, run.meter
    every, total, per_step = cfg.trainer, cfg.trainer.steps, task.batches_per_step
    whole = cfg.data.whole_batch
    loader = batches(
        data.domains, batch_size=whole, start=run.step * per_step, stop=total * per_step,
        seed=run.seed, num_workers=cfg.data.num_workers, own=parallel.own(whole),
        timeout=cfg.data.worker_timeout, signals=every.stop_signals,
    )  # fmt: skip
    groups: Groups = {}
    take = stepping(task)
    with loader:
        if run.due:  # what a signal left out
            groups = settle(run, evaluator, monitor, board, stop, 0, save_it=True)
        while not run.finished:
            stop.ask()
            began = time.perf_counter()
            rates = task.set_learning_rates(run.step)
            with stop.leaving() if parallel.world() == 1 else nullcontext():
                run.taken = [next(loader) for _ in range(per_step)]
            with task.norm_backend():
                losses = take(run.taken)
            task.update_averages(run.step)
            run.step += 1
            meter.add(losses, time.perf_counter() - began)
            run.seconds += time.perf_counter() - began

            ended, stopped = run.step == total, stop.asked()
            run.due = run.step % every.eval_every == 0 or ended
            if run.step % every.log_every == 0 or run.due:
                figures = log(run, rates, monitor)
                bar.set_postfix(postfix(figures, groups, run.evaluation_share))
            found = settle(run, evaluator, monitor, board, stop, stopped)
            if found:
                groups = found
                bar.set_postfix(postfix(figures, groups, run.evaluation_share))
            bar.update()
    return groups


def settle(
    run: Run, evaluator: Evaluator[Any], monitor: Monitor, board: Dashboard, stop: Stop,
    stopped: int, save_it: bool = False,
) -> Groups:  # fmt: skip
    """Behind a step: evaluate, show samples, save, where that is due; the evaluation's figures.

    stopped: the signal for which it ends; an evaluation is then left for the continuation.
    """
    every, groups = run.cfg.trainer, {}
    if run.due and not stopped:
        try:
            groups = assess(run, evaluator, monitor, board, stop)
        except Left as left:
            stopped = left.number
    shown = not run.due and (run.step % every.sample_every == 0 or run.finished)
    if shown:
        show_samples(run, evaluator, monitor)
    if save_it or run.step % every.checkpoint_every == 0 or run.finished or stopped:
        save(run, monitor, last=bool(run.finished or stopped))
    if not stopped and (groups or shown or run.saved_step == run.step):  # that took a while
        stopped = stop.now()
    if stopped:
        end(run, monitor, stopped)
    return groups


def show_samples(run: Run, evaluator: Evaluator[Any], monitor: Monitor) -> None:
    if parallel.leads():
        with run.evaluating():
            monitor.images(run.step, evaluator.samples())


def end(run: Run, monitor: Monitor, number: int) -> NoReturn:
    """End the process for a signal, once the first one's checkpoint is written."""
    if run.saved_step != run.step:
        save(run, monitor, last=True)
    monitor.close()
    parallel.from_first(lambda: None)
    say(
        f"ended by {signal.Signals(number).name} behind step {run.step}; go on with "
        f"resume={monitor.run_dir}"
    )
    raise SystemExit(128 + number)


def log(run: Run, rates: dict[str, float], monitor: Monitor) -> dict[str, float]:
    """The averages since the last log, checked and written.

    Raises:
        NotFinite: one is NaN or infinite, or too many steps were skipped for one.
    """
    meter, began = run.meter, time.perf_counter()
    count = meter.steps
    figures = meter.read()  # waits for a GPU
    run.seconds += time.perf_counter() - began
    if meter.skips is not None:
        run.skipped += meter.skipped
        figures["health/skipped_steps"] = float(run.skipped)
        if meter.skipped:
            say(
                f"warning: step {run.step}: {meter.skipped} of the last {count} steps skipped: "
                "losses or gradients are not finite"
            )
    figures = finite(figures, run.step, run.task, run.taken, meter.row)
    if run.cfg.trainer.on_nonfinite == "rewind":
        figures["health/rewinds"] = float(run.task.halvings)
    run.check_replicas()
    figures |= {f"lr/{name}": rate for name, rate in rates.items()}
    figures |= run.watch.report(run.step, balance_faults(figures), monitor)
    monitor.scalars(run.step, figures, **run.notes)
    run.notes = {}
    return figures


def assess(
    run: Run, evaluator: Evaluator[Any], monitor: Monitor, board: Dashboard, stop: Stop
) -> Groups:
    """Diagnose, evaluate, log, keep best.pt: the figures of quality by group.

    Raises:
        Left: for a signal; then nothing is logged, and training is as it was.
    """
    figures: dict[str, float] = {}
    faults: dict[str, str] = {}
    generators = checkpoint.rng_state()
    try:
        with stop.leaving_together():
            if parallel.leads():
                with run.evaluating():
                    figures, faults = evaluator.diagnose()
            groups, evaluation = run.evaluate(evaluator)
    except Left:
        checkpoint.set_rng_state(generators)
        raise
    run.due = False
    figures |= run.watch.report(run.step, faults, monitor)
    for group, values in groups.items():
        figures |= tagged(group, values)
    figures["speed/evaluation_share"] = run.evaluation_share
    monitor.scalars(run.step, figures | board.floor, protocol=evaluator.protocol())
    before = replace(run.best)
    better = run.best.update(run.cfg.metrics.best, groups["quality"], run.step)
    if parallel.leads():
        with run.evaluating():
            board.show(run.step, evaluation)
            gc.collect()  # figures hold themselves, and would wait for Python's turn
    if better and not parallel.from_first(lambda: save_best(run, monitor.run_dir)):
        run.best = before  # the next that is better than what is on the disk
    return groups


def tagged(group: str, figures: dict[str, float]) -> dict[str, float]:
    """group/figure; what is a single class's (class_fid/3) is shown of `quality` alone."""
    out = {f"{group}/{name}": v for name, v in figures.items() if "/" not in name}
    return out | ({k: v for k, v in figures.items() if "/" in k} if group == "quality" else {})

"""The training loop: one visible sequence from a config to a finished run folder."""

import math
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from gannorm import parallel
from gannorm.config import typed
from gannorm.data import Batch, Data, batches, build_data
from gannorm.diagnostics.faults import balance_faults
from gannorm.diagnostics.nonfinite import first_nonfinite
from gannorm.errors import RequestError
from gannorm.metrics.best import unmeasured
from gannorm.norms import cpu
from gannorm.norms.sync import suspended
from gannorm.schema import Config
from gannorm.tasks import TASKS, Evaluator, Task, build_task
from gannorm.training import checkpoint, weights
from gannorm.training.dashboard import Dashboard, class_table, environment
from gannorm.training.monitor import Monitor, Silent
from gannorm.training.report import (
    closing,
    describe,
    device_name,
    postfix,
    say,
    versions,
    write_json,
)
from gannorm.training.request import (
    check_pair,
    divided,
    find_resume,
    is_restarted,
    mark,
    pick_device,
)
from gannorm.training.run import BEST, Meter, Run
from gannorm.training.stopping import Stop

Groups = dict[str, dict[str, float]]


def train(raw: DictConfig, run_dir: Path) -> dict[str, Any]:
    """Train as the composed config says, into `run_dir`.

    Returns the content of summary.json.

    Raises:
        RequestError: a request that cannot be fulfilled, before anything is written; or images
            that turn out to be unreadable.
        FloatingPointError: a loss became NaN or infinite.
    """
    # ---- check the request, build, resume
    cfg = typed(raw)
    device = pick_device(cfg.trainer.device)
    check_pair(cfg)
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
    taken = weights.start(task, cfg.init_from) if cfg.init_from.path and not start_from else []
    task.share_state()
    say("\n".join([describe(cfg, task, data, run_dir, start_from, run.step, changes), *taken]))
    if device.type == "cpu":
        cpu.keep_memory()
        cpu.kernels()  # compiled now, if ever: not while something is timed

    # ---- what the figures are held against
    with run.evaluating():
        with parallel.one_first():
            evaluator = TASKS[cfg.model.name].evaluator(task, data)
        evaluator.share_state()
        reference = evaluator.reference_figures()
    missing = unmeasured(cfg, data, evaluator.measures)
    if missing is not None:
        say(f"{missing}; there will be no best.pt")
    monitor = (Monitor if parallel.leads() else Silent)(run_dir, run.step)
    begin_log(monitor, raw, evaluator, reference)
    board = Dashboard(monitor, evaluator, tagged("reference", reference))

    # ---- train
    groups = steps(run, evaluator, data, monitor, board)

    # ---- report
    groups = groups or run.evaluate(evaluator)[0]  # resumed behind the last step
    summary = summarize(run, evaluator, groups, reference)
    if parallel.leads():
        board.compare(run.config, groups["quality"])
        monitor.close()
        write_json(run_dir / "summary.json", summary)
    say(closing(summary, run_dir))
    return summary


def saved(cfg: Config, run_dir: Path) -> tuple[Path | None, dict[str, Any] | None]:
    """The checkpoint to go on from, if any, and its content.

    Raises:
        RequestError: none where there should be one, or a run that would be written over.
    """

    def find() -> tuple[Path | None, dict[str, Any] | None]:
        ours = is_restarted(run_dir)  # torchrun goes on by itself
        path = checkpoint.newest(run_dir) if ours else None
        path = path or find_resume(cfg.resume, run_dir)
        holds_run = path is None and (run_dir / "metrics.jsonl").exists()
        if holds_run and cfg.resume != "auto" and not ours:
            raise RequestError(
                f"{run_dir} already holds a run; continue it with resume=auto, or choose another "
                "folder with hydra.run.dir="
            )
        mark(run_dir)
        return path, None if path is None else checkpoint.load(path)

    return parallel.from_first(find)


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
    run: Run, evaluator: Evaluator[Any], data: Data, monitor: Monitor, board: Dashboard
) -> Groups:
    """Train to the run's end, logging, evaluating, saving on the way: the last evaluation.

    Raises:
        SystemExit: 128 + the signal that ended it before.
    """
    task, cfg = run.task, run.cfg
    every, total, per_step = cfg.trainer, cfg.trainer.steps, task.batches_per_step
    whole = cfg.data.whole_batch
    loader = batches(
        data.domains, batch_size=whole, start=run.step * per_step, stop=total * per_step,
        seed=cfg.seed, num_workers=cfg.data.num_workers, own=parallel.own(whole),
    )  # fmt: skip
    if run.step == 0:
        show_samples(run, evaluator, monitor)
    groups: Groups = {}
    meter = Meter(whole * per_step)
    bar = tqdm(
        total=total, initial=run.step, unit="step", dynamic_ncols=True, disable=not parallel.leads()
    )
    with bar, Stop() as stop:
        while not run.finished:
            stop.ask()
            began = time.perf_counter()
            rates = task.set_learning_rates(run.step)
            with task.norm_backend():
                taken = [next(loader) for _ in range(per_step)]
                losses = task.train_step(taken)
            task.update_averages(run.step)
            run.step += 1
            meter.add(losses, time.perf_counter() - began)
            run.seconds += time.perf_counter() - began

            ended = run.step == total
            signalled = stop.asked()
            stopped = 0 if ended else signalled
            evaluated = (run.step % every.eval_every == 0 or ended) and not stopped
            if run.step % every.log_every == 0 or evaluated:
                figures = log(run, meter, rates, taken, monitor)
                bar.set_postfix(postfix(figures, groups, run.evaluation_share))
            if evaluated:
                groups = assess(run, evaluator, monitor, board)
                bar.set_postfix(postfix(figures, groups, run.evaluation_share))
            if run.step % every.sample_every == 0 or run.finished:
                show_samples(run, evaluator, monitor)
            if run.step % every.checkpoint_every == 0 or run.finished or stopped:
                save(run, monitor.run_dir)
            bar.update()
            if stopped:
                end(run, monitor, stopped)
    return groups


def show_samples(run: Run, evaluator: Evaluator[Any], monitor: Monitor) -> None:
    if parallel.leads():
        with run.evaluating():
            monitor.images(run.step, evaluator.samples())


def save(run: Run, run_dir: Path) -> None:
    if parallel.leads():
        path = run_dir / "checkpoints" / f"step_{run.step:08d}.pt"
        checkpoint.save(path, run.state_dict())
        checkpoint.prune(run_dir, run.cfg.trainer.keep_checkpoints)


def end(run: Run, monitor: Monitor, number: int) -> None:
    """End the process for a signal, once the first one's checkpoint is written."""
    monitor.close()
    parallel.from_first(lambda: None)
    say(
        f"ended by {signal.Signals(number).name} behind step {run.step}; go on with "
        f"resume={monitor.run_dir}"
    )
    raise SystemExit(128 + number)


def log(
    run: Run, meter: Meter, rates: dict[str, float], taken: list[list[Batch]], monitor: Monitor
) -> dict[str, float]:
    """The averages since the last log, checked and written."""
    began = time.perf_counter()
    figures = meter.read()  # waits for a GPU
    run.seconds += time.perf_counter() - began
    figures = finite(figures, run.step, run.task, taken, monitor)
    check_replicas(run)
    figures |= {f"lr/{name}": rate for name, rate in rates.items()}
    figures |= run.watch.report(run.step, balance_faults(figures), monitor)
    monitor.scalars(run.step, figures)
    return figures


def assess(run: Run, evaluator: Evaluator[Any], monitor: Monitor, board: Dashboard) -> Groups:
    """Diagnose, evaluate, log, keep best.pt: the figures of quality by group."""
    figures: dict[str, float] = {}
    if parallel.leads():
        with run.evaluating():
            figures, faults = evaluator.diagnose()
        figures |= run.watch.report(run.step, faults, monitor)
    groups, evaluation = run.evaluate(evaluator)
    for group, values in groups.items():
        figures |= tagged(group, values)
    figures["speed/evaluation_share"] = run.evaluation_share
    monitor.scalars(run.step, figures, protocol=evaluator.protocol())
    better = run.best.update(run.cfg.metrics.best, groups["quality"], run.step)
    if parallel.leads():
        with run.evaluating():
            board.show(run.step, evaluation)
        if better:
            checkpoint.save(monitor.run_dir / BEST, run.state_dict())
    return groups


def check_replicas(run: Run) -> None:
    """Refuse to go on with networks that are no longer the same in all processes.

    Raises:
        RuntimeError: naming the first tensor that differs.
    """
    where = run.task.replicas_differ() if parallel.world() > 1 else None
    if where is not None:
        raise RuntimeError(
            f"at step {run.step} {where} is not the first process's: the processes train "
            "different networks. A faulty GPU or memory does that, and so does a part of one's own "
            "that draws random numbers by itself; the checkpoints before this step are the first "
            "process's"
        )


def tagged(group: str, figures: dict[str, float]) -> dict[str, float]:
    """group/figure; what is a single class's (class_fid/3) is shown of `quality` alone."""
    out = {f"{group}/{name}": v for name, v in figures.items() if "/" not in name}
    return out | ({k: v for k, v in figures.items() if "/" in k} if group == "quality" else {})


def where_it_began(task: Task, taken: list[list[Batch]]) -> str:
    """Where `taken`, run again, first gives a NaN or infinity, in words; every process looks."""
    with task.norm_backend(), parallel.alone(), suspended():
        found = first_nonfinite(task.networks, lambda: task.train_step(taken))
    everywhere = parallel.joined([] if found is None else [(*found, parallel.rank())])
    if not everywhere:
        return "with every layer finite when run again"
    _, place, process = min(everywhere)
    return f"first in {place}" + (f", in process {process}" if parallel.world() > 1 else "")


def finite(
    figures: dict[str, float], step: int, task: Task, taken: list[list[Batch]], monitor: Monitor
) -> dict[str, float]:
    """The figures; less gradients that fp16 skipped to find its loss scale.

    Raises:
        FloatingPointError: any other that is NaN or infinite. No weight is, since `_descend` leaves
            them; so `taken`, the last batches, run again show where it begins.
    """
    precision = task.cfg.trainer.precision
    bad = {name: value for name, value in figures.items() if not math.isfinite(value)}
    if precision == "fp16":
        bad = {name: value for name, value in bad.items() if name.startswith("loss/")}
    if bad:
        name, value = next(iter(bad.items()))
        text = f"{name} became {value} before step {step}, {where_it_began(task, taken)}"
        monitor.scalars(step, {"health/not_finite": 1.0})
        monitor.text("health/not_finite", text, step)
        monitor.close()
        raise FloatingPointError(
            f"{text}; lower optim.lr_g and optim.lr_d, set optim.clip_norm=1, or use a wider "
            f"trainer.precision than {precision}; checkpoints before this step are kept"
        )
    kept = {name: value for name, value in figures.items() if math.isfinite(value)}
    return {**kept, "health/not_finite": 0.0}

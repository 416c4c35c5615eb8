"""Record a run's metrics in `metrics.jsonl`, `samples.jsonl`, `curve.png`, wandb and TensorBoard, and show its progress
on the terminal.

Only rank 0 records metrics, and the `Metrics` of other ranks do nothing. Each step's row is written one step late, so
that reading the loss does not wait for a device that is still computing.
"""

from __future__ import annotations

import math
import re
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from opt_parallel.config.run import ActivationCheckpointing, Precision, Run
from opt_parallel.report.plots import draw, losses_of, perplexity_of
from opt_parallel.report.trackers import open_trackers
from opt_parallel.runtime import terminal
from opt_parallel.runtime.clock import Clock
from opt_parallel.runtime.log import say
from opt_parallel.runtime.machine import resident_peak
from opt_parallel.storage.atomic import optional
from opt_parallel.storage.checked import dump_checked
from opt_parallel.storage.lines import Lines
from opt_parallel.storage.rows import METRICS, Row, keep_rows, rows_of

# Dense bf16 and fp16 TFLOP/s of one torch device, from the vendors' data sheets. The first key applies whose words all
# occur in the device's name. An MI250X board has 383 TFLOP/s and is two devices.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200 NVL": 835.5,
    "H200": 989.4,
    "H100 NVL": 835.5,
    "H100 PCIe": 756.0,
    "H100": 989.4,
    "A100": 312.0,
    "A10": 125.0,
    "L40S": 362.0,
    "V100 PCIE": 112.0,
    "V100": 125.0,
    "MI300X": 1307.4,
    "MI250X": 191.5,
}

Mark = Any  # a point in time, as a CUDA event or as seconds of the host's clock


class Metrics:
    """The interface to which the training loop reports. This base class does nothing and is used on ranks other than
    0."""

    @staticmethod
    def open(
        run: Run, world_size: int, is_main: bool, device: torch.device, clock: Clock, wandb_id: str | None = None
    ) -> Metrics:
        """Append to the metric files of `run.folder` from the position `clock` on, or replace the files at step 0.
        `wandb_id` is the run's wandb id.

        The process group must exist. Raises: UserError if online wandb fails."""
        return _Recorder(run, world_size, device, clock, wandb_id) if is_main else Metrics()

    def step(
        self,
        clock: Clock,
        loss: float,
        grad_norm: float,
        lr: float,
        loss_scale: float | None,
        skipped: bool,
        waited: float,
        epochs: dict[str, float],
    ) -> None:
        """Report the optimizer step that ended at the position `clock`. Its row is written at the next call of
        `step`, because measuring the seconds of a step earlier would wait for the device.

        `waited` is the number of seconds that the step waited for data. `epochs` is the number of passes over each data
        source so far."""

    def validation(
        self, clock: Clock, loss: float, unigram_entropy: float | None, figures: dict[str, float] | None = None
    ) -> None:
        """Report a validation, with loss and unigram entropy in nats per token, or with a classifier's metrics in
        `figures`."""

    def samples(self, clock: Clock, texts: list[str]) -> None:
        """Report the continuations of the run's prompts."""

    def note(self, text: str) -> None:
        """Print a line without breaking the progress bar."""

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Exclude the time of the context (validation, checkpoints) from the measured training time."""
        yield

    def abandon(self) -> None:
        """Write the pending row and close files and trackers. Call this method after an error."""

    def close(self, finished: bool) -> None:
        """Plot the losses, print a summary of the run, and close files and trackers."""


class _Recorder(Metrics):
    """The `Metrics` of rank 0, which record all reported values."""

    def __init__(self, run: Run, world_size: int, device: torch.device, clock: Clock, wandb_id: str | None) -> None:
        self._run, self._device = run, device
        self._opened = self._clock = clock
        length, recompute = run.data.sequence_length, run.activation_checkpointing
        peak = _peak_flops(run.logging.peak_tflops, run.precision.name, device)
        self._peak = None if peak is None else peak * world_size
        frozen = run.task.lora.rank > 0
        self._model_flops = run.model.flops_per_token(length, frozen)
        self._hardware_flops = self._model_flops
        if recompute is not ActivationCheckpointing.none:
            whole = recompute is not ActivationCheckpointing.selective
            self._hardware_flops += run.model.recomputed_flops_per_token(length, whole)
        self._unigram_entropy: float | None = None
        self._pending: Callable[[], None] | None = None  # function that writes the row of the latest step
        self._trackers = open_trackers(run, clock, wandb_id)
        self._path = run.folder / METRICS
        samples = run.folder / "samples.jsonl"
        for path in (self._path, samples):
            with optional(path, f"taken back to step {clock.step}"):
                keep_rows(path, clock.step)
        self._lines, self._samples = Lines(self._path), Lines(samples)
        self._lines.flush()  # this creates the file, so that `tail -f` can follow it
        self._progress = _Progress(run.steps, run.stop, clock)
        self._opened_at, self._since = time.perf_counter(), _mark(device)

    def step(
        self,
        clock: Clock,
        loss: float,
        grad_norm: float,
        lr: float,
        loss_scale: float | None,
        skipped: bool,
        waited: float,
        epochs: dict[str, float],
    ) -> None:
        tokens, start, end = clock.tokens - self._clock.tokens, self._since, _mark(self._device)
        self._clock, self._since = clock, end
        self._flush()
        row: Row = {
            "step": clock.step,
            "samples": clock.samples,
            "tokens": clock.tokens,
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "epochs": epochs,
            "data_wait": waited,
        }
        if self._run.precision.name is Precision.fp16:
            row |= {"loss_scale": loss_scale, "skipped": skipped}
        self._pending = partial(self._write_step, row, tokens, start, end)

    def validation(
        self, clock: Clock, loss: float, unigram_entropy: float | None, figures: dict[str, float] | None = None
    ) -> None:
        self._flush()
        self._unigram_entropy = unigram_entropy
        figures = figures or {"perplexity": perplexity_of(loss)}
        self._write("validation", {"step": clock.step, "loss": loss, **figures})
        values = "".join(f", {name} {value:.{2 if name == 'perplexity' else 3}f}" for name, value in figures.items())
        self.note(f"validation at step {clock.step}: loss {loss:.3f}{values}")

    def samples(self, clock: Clock, texts: list[str]) -> None:
        self._flush()
        pairs = list(zip(self._run.evaluation.prompts, texts, strict=True))
        for prompt, text in pairs:
            row = {"step": clock.step, "prompt": prompt, "text": text}
            self._samples.write(dump_checked(row, ascii_only=False))
        logged = {f"samples/{number}": prompt + text for number, (prompt, text) in enumerate(pairs, start=1)}
        self._trackers.log(logged, clock.step)
        self.note(f"sample at step {clock.step}: {''.join(pairs[0])!r}")

    def note(self, text: str) -> None:
        self._progress.note(text)

    @contextmanager
    def pause(self) -> Iterator[None]:
        self._flush()  # a run killed after the step's checkpoint must not lose the step's row
        yield
        self._since = _mark(self._device)

    def abandon(self) -> None:
        self._flush()
        self._lines.close()
        self._samples.close()
        self._progress.close()
        self._trackers.finish()

    def close(self, finished: bool) -> None:
        self.abandon()
        rows: list[Row] = []
        with optional(self._path, "read"):
            rows = rows_of(self._path)
        parts = [self._reached(finished), self._losses(rows)]
        if rows:
            curve = self._run.folder / "curve.png"
            with optional(curve):
                draw(curve, self._run.run.name, rows, self._unigram_entropy, self._run.task.name.unit)
                parts.append(str(curve))
        if not finished:
            early = self._clock.step < self._run.stop
            auto = "" if self._run.resume == "auto" else " with resume=auto"
            parts.append(f"{'the same command' if early else 'a larger stop_at'}{auto} continues the run")
        say("; ".join(part for part in parts if part), anywhere=True)

    def _flush(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending()

    def _write_step(self, row: Row, tokens: int, start: Mark, end: Mark) -> None:
        seconds = _seconds(start, end)
        rate = tokens / seconds
        row |= {
            "data_wait": row["data_wait"] / seconds,
            "tokens_per_second": rate,
            "mfu": self._model_flops * rate / self._peak if self._peak else None,
            "hfu": self._hardware_flops * rate / self._peak if self._peak else None,
            "peak_memory_bytes": peak_memory(self._device),
        }
        self._write("train", row)
        self._progress.step(row, seconds)

    def _write(self, kind: str, row: Row) -> None:
        not_finite = [key for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
        row = {"kind": kind} | row | dict.fromkeys(not_finite)  # become null, since JSON has no NaN
        self._lines.write(dump_checked(row))
        values = {f"{kind}/{key}": row[key] for key in row.keys() - {"kind", "step", "epochs"} if row[key] is not None}
        values |= {f"epochs/{source}": passed for source, passed in row.get("epochs", {}).items()}
        self._trackers.log(values, row["step"])

    def _reached(self, finished: bool) -> str:
        clock, opened, run = self._clock, self._opened, self._run
        state, of = ("finished", "") if finished else ("stopped", f" of {run.steps}")
        since = f" since step {opened.step}" if opened.step else ""
        spent = _duration(time.perf_counter() - self._opened_at)
        return (
            f"{state}: {run.name} at step {clock.step}{of}, "
            f"{_short(clock.tokens - opened.tokens)} tokens in {spent}{since}"
        )

    def _losses(self, rows: list[Row]) -> str:
        (_, training), (_, validation) = losses_of(rows, "train"), losses_of(rows, "validation")
        unigram = self._unigram_entropy
        text = [f"train loss {training[-1]:.2f}"] if training else []
        if validation:
            text.append(f"validation loss {validation[-1]:.2f}")
            if unigram is not None:
                gain = unigram - validation[-1]
                text[-1] += f" (unigram entropy {unigram:.2f}, {abs(gain):.2f} nats {'above' if gain < 0 else 'below'})"
        return ", ".join(text)


class _Progress:
    """The display of progress, a progress bar on a terminal and about a hundred lines of text per run elsewhere."""

    def __init__(self, steps: int, stop: int, clock: Clock) -> None:
        self._steps, self._every = steps, -(-steps // 100)
        self._always = (clock.step + 1, stop)
        self._recent: deque[float] = deque(maxlen=25)
        self._bar = tqdm(
            total=steps,
            initial=clock.step,
            unit="step",
            dynamic_ncols=True,
            file=sys.stdout,
            disable=not sys.stdout.isatty(),
        )

    def step(self, row: Row, seconds: float) -> None:
        self._recent.append(seconds)
        step, speed = row["step"], f"{row['tokens_per_second']:,.0f} tokens/s"
        self._bar.set_postfix_str(f"loss {row['loss']:.3f}, {speed}", refresh=False)
        self._bar.update()
        if (self._bar.disable or 1 in terminal.gone) and (step % self._every == 0 or step in self._always):
            # The median ignores the first step of a process, which compilation makes slow.
            left = _duration(statistics.median(self._recent) * (self._steps - step))
            skipped = f"  skipped, loss scale {row['loss_scale']:g}" if row.get("skipped") else ""
            say(
                f"step {step}/{self._steps}  loss {row['loss']:.3f}  lr {row['lr']:.1e}  |g| {row['grad_norm']:.2f}  "
                f"{speed}  ETA {left}{skipped}"
            )

    def note(self, text: str) -> None:
        with tqdm.external_write_mode(file=sys.stdout):  # the bar is hidden while the line is printed
            say(text)

    def close(self) -> None:
        self._bar.close()


def _mark(device: torch.device) -> Mark:
    """The current time, as an event in the GPU's stream or as the host's clock. Kernels in a GPU's stream run later
    than the host submits them."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(start: Mark, end: Mark) -> float:
    """Number of seconds between two marks. This function waits until the device has reached the mark `end`."""
    if isinstance(end, float):
        return end - start
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


def peak_tflops(device_name: str, precision: Precision) -> float | None:
    """Dense TFLOP/s of a device from PEAK_TFLOPS. The TFLOP/s are None (unknown) for devices that are not in the table,
    for MIG slices, for bf16 on a V100, which lacks bf16, and for fp32, whose speed depends on TF32."""
    words = set(re.findall(r"[A-Za-z0-9]+", device_name))
    if precision is Precision.fp32 or "MIG" in words or (precision is Precision.bf16 and "V100" in words):
        return None
    return next((tflops for key, tflops in PEAK_TFLOPS.items() if words.issuperset(key.split())), None)


def _peak_flops(tflops: float | None, precision: Precision, device: torch.device) -> float | None:
    """Peak FLOP/s of one device, from `logging.peak_tflops` or from PEAK_TFLOPS."""
    if tflops is None and device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        tflops = peak_tflops(name, precision)
        if tflops is None:
            say(f"peak {precision.value} FLOP/s of {name} is unknown, so mfu and hfu are null: set logging.peak_tflops")
    return None if tflops is None else tflops * 1e12


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes of the tensors on a GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resident_peak()


def forget_peak_memory(device: torch.device) -> None:
    """Reset the peak of `peak_memory`. Without a GPU, the peak can be reset only on Linux."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def _duration(seconds: float) -> str:
    """A duration as text, such as `3:12`, or `1:02:03` from one hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _short(count: int) -> str:
    """A number as short text, such as `812`, `12.3k`, `2.5M` or `180.0B`."""
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.1f}{letter}"
    return str(count)

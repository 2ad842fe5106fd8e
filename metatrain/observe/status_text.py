"""A run's status in words, for the terminal."""

from __future__ import annotations

import time

from metatrain.observe.status import STALE_SECONDS, RunStatus

_BAR = 30


def rendered(status: RunStatus, now: float | None = None) -> str:
    """The status as a few lines. `now`: seconds since the epoch."""
    now = time.time() if now is None else now
    lines = [("run", status.run), ("state", _state(status, now))]
    if status.steps:
        share = status.step / status.steps
        bar = "█" * round(_BAR * share) + "·" * (_BAR - round(_BAR * share))
        epoch = f", epoch {status.epoch + 1} of {status.epochs}" if status.state == "training" else ""
        lines.append(("progress", f"{bar} {share:.0%}  step {status.step:,} of {status.steps:,}{epoch}"))
    curves = status.curves
    if curves:
        rate = f"{curves['speed/tasks_per_second']:,.0f} tasks/s, {curves['speed/step_seconds'] * 1e3:,.1f} ms a step"
        left = status.seconds_left
        at_its_rate = f"; {span(left)} left" if left and status.state == "training" and alive(status, now) else ""
        lines.append(("rate", rate + at_its_rate))
        shares = {name.removeprefix("time/"): v for name, v in curves.items() if name.startswith("time/")}
        most = sorted(shares, key=lambda name: -shares[name])[:3]
        lines.append(("time goes to", ", ".join(f"{name.replace('_', ' ')} {shares[name]:.0%}" for name in most)))
        before, after = curves.get("learning/loss_before"), curves.get("learning/loss_after")
        if before is not None and after is not None:
            lines.append(
                ("query loss", f"{before:.4f} before adaptation, {after:.4f} after: gain {before - after:.4f}")
            )
    if status.validation_loss is not None:
        best = "" if status.best_loss is None else f"; best {status.best_loss:.4f} at step {status.best_step:,}"
        lines.append(("validation", f"loss {status.validation_loss:.4f} at step {status.validation_step:,}{best}"))
    lines.append(("checkpoint", _checkpoint(status, now)))
    lines.append(("workers", f"{status.workers}; started again {_times(status.restarts)}"))
    for number, fault in enumerate(status.faults[-5:]):
        lines.append(("" if number else "faults", f"{span(now - fault.at)} ago: {fault.what}"))
    return "\n".join(f"{name:<13} {text}" for name, text in lines)


def alive(status: RunStatus, now: float) -> bool:
    """Whether a command still trains the run."""
    return status.state in ("starting", "training") and now - status.written <= STALE_SECONDS


def span(seconds: float) -> str:
    """A time span in its two largest units: `3 h 5 min`."""
    seconds = max(0, round(seconds))
    parts = [(seconds // 86400, "d"), (seconds // 3600 % 24, "h"), (seconds // 60 % 60, "min"), (seconds % 60, "s")]
    first = next((i for i, (number, _) in enumerate(parts) if number), 3)
    return " ".join(f"{number} {unit}" for number, unit in parts[first : first + 2] if number) or "0 s"


def _state(status: RunStatus, now: float) -> str:
    if status.state == "finished":
        return f"finished {span(now - status.written)} ago"
    if status.state == "failed":
        return f"FAILED {span(now - status.written)} ago: {status.why}"
    if status.state == "interrupted":
        return f"interrupted {span(now - status.written)} ago; the same command goes on"
    if not alive(status, now):
        return (
            f"NOT ALIVE: no sign of it for {span(now - status.written)} (process {status.pid} on {status.host}); "
            "the same command goes on from the checkpoint"
        )
    if status.state == "starting":
        return f"starting for {span(now - status.launched)} on {status.host}"
    since = f"training for {span(now - status.launched)} on {status.host}"
    if status.progressed is not None and status.step_seconds is not None:
        quiet = now - status.progressed
        if quiet > max(STALE_SECONDS, 100 * status.step_seconds):
            return f"{since}, but NO PROGRESS for {span(quiet)}"
    return since


def _checkpoint(status: RunStatus, now: float) -> str:
    if status.checkpoint_step is None:
        return "none yet"
    text = f"step {status.checkpoint_step:,}"
    if status.checkpoint_at is not None:
        text += f", {span(now - status.checkpoint_at)} ago"
    if status.checkpoint_seconds is not None:
        text += f", training stood still {status.checkpoint_seconds:.1f} s"
    if status.checkpoint_loss is not None:
        text += f", validation loss {status.checkpoint_loss:.4f}"
    return text


def _times(number: int) -> str:
    return {0: "never", 1: "once", 2: "twice"}.get(number, f"{number} times")

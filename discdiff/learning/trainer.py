"""Train a network by any loss; a killed run goes on from its checkpoint as if it had not been killed."""

import math
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from discdiff.checks import decided, real, shown, whole
from discdiff.denoiser import Denoiser, TimeArgument
from discdiff.learning.batches import Rows, batches_of
from discdiff.learning.objectives import Loss, StagedLoss, held_out_loss, predicted, updates_of
from discdiff.learning.optimizing import Optimizing, adamw, decayed
from discdiff.learning.run import Run, bar, told
from discdiff.prediction import Predicts
from discdiff.process import Process, require_process

__all__ = ["Trainer"]


class Trainer:
    """Training of a network by any loss, with averaged weights and exact checkpoints.

    Args:
        network: a module, called as network(x, time) with states x (B, L); it returns logits (B, L, V).
        process: the forward process.
        loss: one of ``discdiff.losses``, or a function of (model, x0) that gives nats a sequence, (B,), or their mean.
        data: (N, L) token ids; (N,) ids of one long row, cut into random windows of ``length`` tokens; or a function
            that draws a batch x0 (B, L) with a ``torch.Generator``.
        predicts: what the network predicts; by default it follows from the loss.
        time: the network's time argument, as in ``Denoiser``.
        batch: B, the rows of a batch.
        length: the length of windows.
        held_out: data that are not trained on, as an array; their loss is computed with the averaged weights.
        rate: the highest learning rate of AdamW, which is reached after ``warmup`` steps and then falls on a cosine.
        warmup: the number of steps of the rise.
        optimizer: in place of AdamW, a function of (parameters, steps) that returns an optimizer and its scheduler.
        clip: the largest norm of a gradient; a longer one is scaled down to it.
        ema: the decay d of the averaged weights, a <- d a + (1 - d) w; at step n it is min(d, n / (n + 10)).
        seed: the seed of data and noise; None takes torch's random state as it is.
        folder: the folder of the checkpoint; None writes none.
        every: the number of steps between two points of the curve, and between two checkpoints.
        progress: whether to show a progress bar on standard error.

    Attributes:
        model: the ``Denoiser`` with averaged weights, in evaluation mode; a ``Sampler`` takes it.
        curve: (step, loss) at every ``every`` steps, in nats a token, smoothed over about 50 steps.
        held_out_curve: (step, loss) on at most 256 rows of the held-out data, in nats a token.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: if the loss does not apply to the process, or another argument is out of range.
    """

    def __init__(
        self, network: nn.Module, process: Process, loss: Loss, data: object, *, predicts: Predicts | None = None,
        time: TimeArgument = "t", batch: int = 64, length: int | None = None, held_out: object = None,
        rate: float = 1e-3, warmup: int = 100, optimizer: Optimizing | None = None, clip: float = 1.0,
        ema: float = 0.998, seed: int | None = 0, folder: str | Path | None = None, every: int = 100,
        progress: bool = True,
    ) -> None:  # fmt: skip
        if not isinstance(network, nn.Module):
            raise TypeError(f"Trainer: network must be a torch.nn.Module, got {shown(network)}")
        require_process(process, "Trainer")
        self.network: nn.Module = network
        self.loss: Loss = loss
        self._batch = whole(batch, "Trainer: batch", 1)
        self._rate, self._warmup = real(rate, "Trainer: rate", "(0, inf)"), whole(warmup, "Trainer: warmup", 0)
        self._clip, self._ema = real(clip, "Trainer: clip", "(0, inf]"), real(ema, "Trainer: ema", "[0, 1)")
        self._seed = None if seed is None else whole(seed, "Trainer: seed", 0, 2**63 - 1)
        self._folder, self._every = None if folder is None else Path(folder), whole(every, "Trainer: every", 1)
        self._optimizing = partial(adamw, rate=self._rate, warmup=self._warmup) if optimizer is None else optimizer
        self._data = data if callable(data) else batches_of(data, length, process, "Trainer: data")
        self._held_out = None if held_out is None else batches_of(held_out, length, process, "Trainer: held_out")
        if held_out is not None and isinstance(loss, StagedLoss) and not loss.rows:
            raise ValueError(f"Trainer: {type(loss).__name__} takes no held_out=, as its batches are no rows of tokens")
        self._progress = decided(progress, "Trainer: progress")
        self._learner = Denoiser(network, process, predicted(loss, process, predicts), time=time)
        self.curve: list[tuple[int, float]] = []
        self.held_out_curve: list[tuple[int, float]] = []
        self._average = AveragedModel(network, multi_avg_fn=decayed(self._ema))
        self.model: Denoiser = self._learner.calling(self._average.module.eval().requires_grad_(False))

    def fit(self, steps: int = 1000, resume: bool = True) -> Denoiser:
        """Train for ``steps`` batches and return the denoiser with averaged weights, in evaluation mode.

        Args:
            steps: the number of batches, those before a kill included.
            resume: whether to go on from the checkpoint in ``folder``. The weights are then those, bit for bit, of a
                run that was not interrupted. Without a checkpoint, training begins with the network's weights.

        Raises:
            ValueError: if the checkpoint is of another run, or the loss is not finite.
        """
        steps, resume, device = whole(steps, "fit: steps", 1), decided(resume, "fit: resume"), self._learner.device
        seed = torch.initial_seed() if self._seed is None else self._seed
        optimizer, schedule = self._optimizing(self.network.parameters(), steps)
        generator = torch.Generator().manual_seed(seed)
        run = Run(self.network, self._average, optimizer, schedule, generator, self._settings(steps))
        self._average.module.load_state_dict(self.network.state_dict())
        self._average.n_averaged.fill_(1)  # the first weights count
        self.curve, self.held_out_curve = run.curve, run.held_out_curve
        with torch.random.fork_rng([device] if device.type == "cuda" else []), bar(self._progress) as shown_bar:
            if self._seed is not None:
                torch.manual_seed(seed)
            if self._folder is not None and resume:
                run.restore(self._folder, device)
            task = shown_bar.add_task("", total=steps, completed=run.step)
            self.network.train()
            try:
                while run.step < steps:
                    self._update(run, device, steps)
                    if run.step % self._every == 0 or run.step == steps:
                        self._record(run)
                        run.save(self._folder, device)
                    shown_bar.update(task, completed=run.step, description=f"loss {run.smooth:.3f}")
            finally:
                self.network.eval()
        return self.model

    def _update(self, run: Run, device: torch.device, steps: int) -> None:
        """Draw a batch, follow the clipped gradient of its loss, or of each of its losses, and average the weights."""
        x0 = self._data.draw(self._batch, run.generator) if isinstance(self._data, Rows) else self._data(run.generator)
        done, now = run.step / steps, math.nan
        run.step += 1
        for value in updates_of(self.loss, self._learner, self.model, x0.to(device), done):
            if not math.isfinite(now := value.item()):  # read from the device once an update
                raise ValueError(f"fit: the loss is {now} at step {run.step}; a lower rate or clip may help")
            if not value.requires_grad:
                raise ValueError(f"fit: the loss of step {run.step} does not depend on the network's weights")
            run.optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(self.network.parameters(), self._clip)
            run.optimizer.step()
        run.schedule.step()
        run.average.update_parameters(self.network)
        run.smooth = now if run.step == 1 else 0.98 * run.smooth + 0.02 * now

    def _record(self, run: Run) -> None:
        """Add a point to the curves."""
        run.curve.append((run.step, run.smooth))
        if (held := self._held_out) is not None:
            run.held_out_curve.append((run.step, held_out_loss(self.loss, self.model, held.spaced(256), self._batch)))

    def _settings(self, steps: int) -> dict[str, str]:
        """Return what determines the weights, by the names of arguments, as text."""
        names = ("loss", "_batch", "_rate", "_warmup", "_clip", "_ema", "_seed", "network")
        said = {name.strip("_"): getattr(self, name) for name in names} | {"steps": steps, "data": self._data}
        more = {name: getattr(self.model, name) for name in ("process", "predicts")} | {"time": self.model.call.time}
        return {name: told(value) for name, value in (said | more | {"optimizer": self._optimizing}).items()}

    def __repr__(self) -> str:
        return f"Trainer({type(self.network).__name__}, {self.model.process}, {told(self.loss)}, batch={self._batch})"

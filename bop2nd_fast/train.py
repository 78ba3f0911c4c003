"""The training loop: one for the command line, the studies, the examples and the benchmarks.

>>> recipe = bf.recipes.get("cifar10_biased").replace(epochs=10, width=32)
>>> trainer = Trainer(recipe, bf.data.get("cifar10", folder), seed=0, out="out/run")
>>> trainer.restore()  # goes on where a run in that folder stopped; 0 steps if there is none
>>> history = trainer.run(on_epoch=print)

Initial weights, the order of the examples and their augmentation follow from the seed; a run that goes on
from a checkpoint, also in the middle of an epoch, continues bit for bit as if it had not stopped.
"""

from __future__ import annotations

import json
import math
import operator
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checkpoint, data
from .atomic_write import atomic_write
from .optim import MixedOptimizer, TensorBoardLogger
from .optim.telemetry import LayerReport, joined, print_report
from .recipes import Recipe
from .train_graph import CapturedStep, Step
from .train_record import Epoch, Progress, Record, TrainingError, evaluate, recorded, weights_sha256
from .train_replicas import Replicas

CHECKPOINT, HISTORY = "checkpoint.pt", "history.jsonl"
AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Trainer:
    """Trains the network of a recipe on a data set.

    Under ``torchrun`` every process makes the same trainer: batches are divided among them, gradients
    averaged, and the first process writes the files.

    Args:
        recipe: what to train, and how.
        dataset: images and labels, of the kind the recipe names.
        seed: of initial weights, order and augmentation.
        device: where to train.
        out: folder of ``checkpoint.pt`` and ``history.jsonl``; None writes nothing.
        amp: None, ``bf16`` or ``fp16`` (with a GradScaler): autocast of forward passes.
        compile: run the network through ``torch.compile``.
        graph: replay each step as a CUDA graph (one process on a CUDA device, without ``fp16``).
        teacher: a network whose output distribution is learnt instead of the labels (distribution loss:
            the cross-entropy between both softmaxes).
        workers: processes that decode pictures of a folder; results do not depend on it.
        report_every: steps between two `Progress` reports (reading the counters waits for the device).
        checkpoint_every: seconds after which a long epoch writes a checkpoint in its middle.

    Raises:
        ValueError: a recipe, data set and setting that do not go together; the message says what is allowed.
    """

    def __init__(
        self,
        recipe: Recipe,
        dataset: data.Dataset | data.ImageFolder,
        *,
        seed: int = 0,
        device: str | torch.device = "cpu",
        out: str | Path | None = None,
        amp: str | None = None,
        compile: bool = False,
        graph: bool = False,
        teacher: nn.Module | None = None,
        workers: int = 0,
        report_every: int = 10,
        checkpoint_every: float = 600.0,
    ) -> None:
        if amp is not None and amp not in AMP:
            raise ValueError(f"amp is {amp!r}, allowed are {', '.join(AMP)}")
        if dataset.name != recipe.dataset:
            raise ValueError(f"recipe {recipe.name} is for {recipe.dataset}, this data set is {dataset.name}")
        if report_every < 1:
            raise ValueError(f"report_every is {report_every}, it must be at least 1")
        if graph and (torch.device(device).type != "cuda" or amp == "fp16" or not Replicas().alone):
            raise ValueError("graph needs one process on a CUDA device, and an amp other than fp16")
        self.recipe, self.dataset, self.seed = recipe, dataset, operator.index(seed)
        self.device, self.amp = torch.device(device), amp
        self.out = None if out is None else Path(out)
        self.report_every, self.checkpoint_every = report_every, checkpoint_every
        self.replicas = Replicas()
        self.loader = data.loader(
            dataset,
            recipe.batch_size,
            self.seed,
            recipe.augmentation,
            self.device,
            self.replicas.share,
            workers,
        )
        self.steps_per_epoch = self.loader.steps_per_epoch
        self.n_steps = recipe.epochs * self.steps_per_epoch
        self.model = recipe.model(dataset, self.seed).to(self.device)
        self.teacher = None if teacher is None else self._checked(teacher.to(self.device).eval())
        self.teacher_sha256 = None if teacher is None else weights_sha256(teacher)
        self.optimizer, self.schedulers = recipe.preset.build(self.model, self.steps_per_epoch, graph)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp == "fp16")
        forward: Callable[[Tensor], Tensor] = self.replicas.wrap(self.model)
        self._forward = torch.compile(forward, dynamic=False) if compile else forward
        self._learn: Step = CapturedStep(self._eager, self.optimizer) if graph else self._eager
        self.step, self._interrupted, self._agreed = 0, False, False
        self._epoch = _EpochSoFar(self.device)
        self.history: list[Epoch] = []
        self._last: list[LayerReport] = []

    def _checked(self, teacher: nn.Module) -> nn.Module:
        """The teacher, if it takes such images and has one output per class."""
        it, size = self.dataset, self.dataset.image_size
        image = torch.zeros(1, it.in_channels, size, size, device=self.device)
        fits = f"it must take images of [{it.in_channels}, {size}, {size}] and have {len(it.classes)} outputs"
        try:
            with torch.no_grad(), self._autocast():
                shape = tuple(teacher(image).shape)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"the teacher does not fit {it.name}: {fits}; {error}") from error
        if shape != (1, len(it.classes)):
            raise ValueError(f"the teacher does not fit {it.name}: {fits}, got {list(shape[1:])} of outputs")
        return teacher

    # ------------------------------------------------------------------------- running

    def run(
        self,
        on_step: Callable[[Progress], None] | None = None,
        on_epoch: Callable[[Epoch], None] | None = None,
    ) -> list[Epoch]:
        """Train what is left; returns the whole history. For what happens meanwhile see :meth:`records`."""
        for record in self.records():
            if isinstance(record, Epoch):
                if on_epoch is not None:
                    on_epoch(record)
            elif on_step is not None:
                on_step(record)
        return self.history

    def records(self) -> Iterator[Progress | Epoch]:
        """Train, and yield a `Progress` every ``report_every`` steps and an `Epoch` after each epoch.

        When an `Epoch` comes, its checkpoint has been written. Whoever stops listening stops the training.

        Raises:
            TrainingError: the loss is not a finite number.
            ValueError: ``out`` holds a run already, and :meth:`restore` was not called.
            KeyboardInterrupt: after :meth:`interrupt`; the checkpoint has been written.
        """
        self._claim_folder()
        self._saved_at = time.monotonic()
        while self.step < self.n_steps:
            epoch, first = divmod(self.step, self.steps_per_epoch)
            self.model.train()
            self._epoch.start()
            for images, labels in self.loader.train(epoch + 1, first):
                self._epoch.add(self._step(images, labels))
                self.step += 1
                at_end = self.step % self.steps_per_epoch == 0
                due = self.step % self.steps_per_epoch % self.report_every == 0
                if at_end or due or (self.replicas.alone and self._interrupted):
                    yield self._report(epoch + 1)
                    if not at_end:
                        self._save_if_due()
            yield self._end_epoch(epoch + 1)
            if self._stopping and self.step < self.n_steps:
                raise KeyboardInterrupt

    def report(self) -> list[LayerReport]:
        """Print which regime each binary layer was in during the last epoch that this object finished, and
        what to change; returns the rows. See ``Bop2ndOrder.report``."""
        if self._last:
            print_report(self._last)
        return self._last

    def log(self, writer: Any, now: Progress) -> None:
        """Write ``now``, flip rates and hyperparameters to a TensorBoard writer."""
        writer.add_scalar("loss/train", now.loss, now.step)
        writer.add_scalar("accuracy/train", now.accuracy, now.step)
        if isinstance(self.optimizer, MixedOptimizer):
            TensorBoardLogger(writer)(self.optimizer, now.step)

    def interrupt(self) -> None:
        """Ask the loop to write a checkpoint and raise KeyboardInterrupt, after the step that is being taken
        or, of several processes, at the next report. For signal handlers."""
        self._interrupted = True

    @property
    def _stopping(self) -> bool:
        """One process stops at once; several at the same step, on which they agree when they report."""
        return self._interrupted if self.replicas.alone else self._agreed

    def _step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One training step; returns fp64 ``[2]``: loss, number of correct predictions."""
        result = self._learn(images, labels)
        for scheduler in self.schedulers:
            scheduler.step()
        return result

    def _eager(self, images: Tensor, labels: Tensor) -> Tensor:
        with self._autocast():
            logits = self._forward(images)
        logits = logits.float()
        loss = F.cross_entropy(logits, self._targets(images, labels))
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        correct = (logits.detach().argmax(1) == labels).sum()
        return torch.stack([loss.detach().double(), correct.double()])

    def _targets(self, images: Tensor, labels: Tensor) -> Tensor:
        if self.teacher is None:
            return labels
        with torch.no_grad(), self._autocast():
            return self.teacher(images).float().softmax(1)

    def _autocast(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.amp is None else torch.autocast(self.device.type, AMP[self.amp])

    def _report(self, epoch: int) -> Progress:
        so_far = self._epoch
        self._agreed, window = so_far.read(self.replicas, self._interrupted)
        batch = self.recipe.batch_size
        if not math.isfinite(window.loss):
            raise TrainingError(f"the loss became {window.loss} within the steps up to {self.step}")
        flips = None
        if isinstance(self.optimizer, MixedOptimizer):
            counts = self.optimizer.telemetry()
            flips = sum(c.flips for c in counts) / max(1, sum(c.numel for c in counts))
        rate = window.steps / window.seconds
        accuracy = window.correct / (window.steps * batch)
        return Progress(epoch, self.step, self.n_steps, window.loss, accuracy, flips, rate)

    def _end_epoch(self, epoch: int) -> Epoch:
        so_far, steps = self._epoch, self.steps_per_epoch
        self._count_flips()
        self.replicas.share_statistics(self.model)
        started = time.perf_counter()
        test_accuracy = self.replicas.mean(*evaluate(self.model, self.loader.test()))
        self.history.append(
            Epoch.of(
                epoch=epoch,
                step=self.step,
                loss=so_far.loss / steps,
                train_accuracy=so_far.correct / (steps * self.recipe.batch_size),
                test_accuracy=test_accuracy,
                seconds=so_far.seconds,
                test_seconds=time.perf_counter() - started,
                steps_per_second=steps / so_far.seconds,
                processor_seconds=so_far.processor_seconds,
                hyperparameters=self.recipe.preset.values(self.step, steps),
                rows=so_far.layers,
            )
        )
        self._last, self._epoch = so_far.layers, _EpochSoFar(self.device)
        self.save()
        return self.history[-1]

    def _count_flips(self) -> None:
        """Move the optimizer's counts since the last call into the epoch's."""
        if isinstance(self.optimizer, MixedOptimizer):
            rows = self.optimizer.report(quiet=True)
            self._epoch.layers = joined(self._epoch.layers, rows)

    # ------------------------------------------------------------------------- checkpoints

    def save(self) -> None:
        """Write the checkpoint and the history into ``out``, as ``checkpoint.save`` does."""
        self._saved_at = time.monotonic()
        if self.out is None or not self.replicas.first:
            return
        if self._epoch.steps:
            self._count_flips()
        self._run().save(self.step)
        lines = "".join(json.dumps(epoch.to_dict()) + "\n" for epoch in self.history)
        atomic_write(self.out / HISTORY, lambda file: file.write(lines.encode()))

    def _save_if_due(self) -> None:
        if self._stopping or time.monotonic() - self._saved_at > self.checkpoint_every:
            self.save()
        if self._stopping:
            raise KeyboardInterrupt

    @classmethod
    def resume(cls, folder: str | Path, dataset: data.Dataset | data.ImageFolder, **settings: Any) -> Trainer:
        """The trainer whose run is in ``folder``, where it stopped: recipe, seed and amp are the file's.

        Args:
            dataset: the one it was trained on.
            settings: device, workers, ..., as for the constructor.

        Raises:
            FileNotFoundError: there is no checkpoint.
            CheckpointError, TrainingError: it is damaged, or does not fit.
        """
        recipe, run = recorded(Path(folder) / CHECKPOINT)
        trainer = cls(recipe, dataset, out=folder, **{"seed": run["seed"], "amp": run["amp"], **settings})
        trainer.restore()
        return trainer

    def restore(self) -> int:
        """Go on from the newest usable checkpoint in ``out``; returns how many steps it had done, 0 if none.

        Raises:
            CheckpointError: it is damaged, or of another recipe, seed or setting. Nothing is changed then.
        """
        if self.out is None:
            raise ValueError("this trainer has no folder to restore from: out was not given")
        if not self.out.exists():
            return 0
        step = self._run().resume()
        if self.replicas.total([float(step)])[0] != step * self.replicas.share[1]:
            raise TrainingError(f"not every process finds the same checkpoint in {self.out}")
        if isinstance(self.optimizer, MixedOptimizer):
            self.optimizer.report(quiet=True)  # what was counted before is in the record
        self.step = step
        return step

    def _run(self) -> checkpoint.Run:
        assert self.out is not None
        schedulers = {f"schedule{i}": s for i, s in enumerate(self.schedulers)}
        return checkpoint.Run(
            self.out / CHECKPOINT,
            record=Record(self),
            model=self.model,
            optimizer=self.optimizer,
            scaler=self.scaler,
            **schedulers,
        )

    def _claim_folder(self) -> None:
        if self.out is None or self.step:
            return
        for name in (CHECKPOINT, CHECKPOINT + checkpoint.PREVIOUS, HISTORY):
            if (self.out / name).exists():
                raise ValueError(f"{self.out / name} exists; restore it, or choose another folder")
        self.out.mkdir(parents=True, exist_ok=True)


class _Window:
    """Sums since the last report."""

    def __init__(self, loss: float, correct: float, steps: int, seconds: float) -> None:
        self.loss, self.correct, self.steps, self.seconds = loss / max(1, steps), correct, steps, seconds


class _EpochSoFar:
    """Sums over the steps of an epoch. They stay on the device until they are read."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)  # loss, correct
        self.loss = self.correct = self.seconds = self.processor_seconds = 0.0
        self.steps = self.read_steps = 0
        self.layers: list[LayerReport] = []

    def start(self) -> None:
        self._since, self._processor_since = time.perf_counter(), time.process_time()

    def add(self, step: Tensor) -> None:
        self.sums += step
        self.steps += 1

    def read(self, replicas: Replicas, interrupted: bool) -> tuple[bool, _Window]:
        """What came since the last call, over all processes; whether one of them was interrupted."""
        loss, correct, interrupts = replicas.total([*self.sums.tolist(), float(interrupted)])
        loss /= replicas.share[1]
        now, processor = time.perf_counter(), time.process_time()
        seconds, steps = max(now - self._since, 1e-9), self.steps - self.read_steps
        window = _Window(loss - self.loss, correct - self.correct, steps, seconds)
        self.loss, self.correct, self.read_steps, self._since = loss, correct, self.steps, now
        self.seconds += seconds
        self.processor_seconds += processor - self._processor_since
        self._processor_since = processor
        return interrupts > 0, window

    def state(self) -> dict[str, Any]:
        layers = [vars(row) for row in self.layers]
        return {
            "sums": [self.loss, self.correct],
            "steps": self.steps,
            "seconds": [self.seconds, self.processor_seconds],
            "layers": layers,
        }

    def load(self, state: dict[str, Any], replicas: Replicas) -> None:
        self.loss, self.correct = state["sums"]
        if replicas.first:  # the sum over the processes is what was read
            sums = [self.loss * replicas.share[1], self.correct]
            self.sums.copy_(torch.tensor(sums, dtype=torch.float64))
        self.steps = self.read_steps = state["steps"]
        self.seconds, self.processor_seconds = state["seconds"]
        self.layers = [LayerReport(**row) for row in state["layers"]]

"""What happens beside the steps: moving average, pictures, ratio log, throughput."""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from lightning import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_only

from diffratio.conditions import Captions
from diffratio.data.latents import LatentData
from diffratio.files import atomic_file
from diffratio.training.latents import latent_samples, own_scheduler
from diffratio.training.logs import RunCSVLogger, rewind_table
from diffratio.training.module import Training
from diffratio.training.sharding import gathered, like


class WeightAverage(Callback):
    """Exponential moving average of weights and routers (diffusers' EMAModel); validation and samples use it.

    Args:
        decay: largest decay; it warms up as (1 + n) / (10 + n).
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.average: EMAModel | None = None
        self.saved: dict[str, Any] | None = None
        self.last_step = -1
        self.first = True  # of the processes

    def on_fit_start(self, trainer: Trainer, module: Training) -> None:  # type: ignore[override]
        self.first = trainer.is_global_zero
        self.average = EMAModel(module.averaged(), decay=self.decay)
        self.average.to(module.device)
        if self.saved is not None:
            self.average.load_state_dict(self.saved)
            pairs = zip(self.average.shadow_params, module.averaged(), strict=True)
            self.average.shadow_params = [like(one, own.detach()) for one, own in pairs]
            self.average.to(module.device)
            self.saved = None

    def on_train_start(self, trainer: Trainer, module: Training) -> None:  # type: ignore[override]
        self.last_step = trainer.global_step  # of a resumed run; Lightning restores it after on_fit_start

    def on_train_batch_end(self, trainer: Trainer, module: Training, *args: Any) -> None:  # type: ignore[override]
        if self.average is not None and trainer.global_step != self.last_step:  # not on accumulated micro-batches
            self.last_step = trainer.global_step
            self.average.step(module.averaged())

    def swap_in(self, module: Training) -> None:
        """Puts the average into the model, the weights aside."""
        if self.average is not None:
            self.average.store(module.averaged())
            self.average.copy_to(module.averaged())

    def swap_out(self, module: Training) -> None:
        """Puts the weights back."""
        if self.average is not None:
            self.average.restore(module.averaged())

    def on_validation_start(self, trainer: Trainer, module: Training) -> None:  # type: ignore[override]
        self.swap_in(module)

    def on_validation_end(self, trainer: Trainer, module: Training) -> None:  # type: ignore[override]
        self.swap_out(module)

    def state_dict(self) -> dict[str, Any]:
        if self.average is None:
            return {}
        state = gathered(self.average.state_dict(), self.first)
        assert isinstance(state, dict)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.saved = state or None


class RatioLog(Callback):
    """Writes the keep ratios every few steps to `ratios.csv`, one row a (step, layer), while they are learned.

    Args:
        folder: run folder.
        every: steps between rows.
    """

    def __init__(self, folder: Path, every: int = 10) -> None:
        self.path, self.every, self.last_step = folder / "ratios.csv", every, 0

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, module: Training) -> None:  # type: ignore[override]
        self.last_step = trainer.global_step
        rewind_table(self.path, trainer.global_step)
        if isinstance(trainer.logger, RunCSVLogger):
            trainer.logger.rewind(trainer.global_step)

    @rank_zero_only
    def on_train_batch_end(self, trainer: Trainer, module: Training, *args: Any) -> None:  # type: ignore[override]
        if not module.learning_ratios or trainer.global_step % self.every or trainer.global_step == self.last_step:
            return
        self.last_step = trainer.global_step
        assert module.keep_ratios is not None
        table = module.keep_ratios.table()
        new = not self.path.exists()
        with open(self.path, "a", newline="", encoding="utf-8") as handle:
            rows = csv.writer(handle)
            if new:
                rows.writerow(["step", "layer", *(f"region{region}" for region in range(len(table[0])))])
            for layer, row in enumerate(table):
                rows.writerow([trainer.global_step, layer, *(f"{ratio:.4f}" for ratio in row)])


class Throughput(Callback):
    """Logs images a second, over the steps since the last log."""

    def __init__(self) -> None:
        self.start, self.images, self.last_step = time.perf_counter(), 0, 0

    def on_train_start(self, trainer: Trainer, module: Training) -> None:  # type: ignore[override]
        self.start, self.images, self.last_step = time.perf_counter(), 0, trainer.global_step

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, module: Training, outputs: Any, batch: dict[str, torch.Tensor], index: int
    ) -> None:
        self.images += len(batch["positions"]) * trainer.world_size
        if trainer.global_step == self.last_step:  # an accumulated micro-batch
            return
        self.last_step = trainer.global_step
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            now = time.perf_counter()
            module.log("train/images_per_second", self.images / (now - self.start), prog_bar=True)
            self.start, self.images = now, 0


class Pictures(Callback):
    """A sample grid and, for routed methods, a keep-ratio heat map every so often and at the end.

    Args:
        folder: run folder; pictures go to `pictures/`.
        every: steps between pictures; 0 makes them only at the end.
        n: samples in the grid.
        steps: sampling steps.
        guidance_scale: of the samples.
    """

    def __init__(self, folder: Path, every: int, n: int = 20, steps: int = 20, guidance_scale: float = 2.0) -> None:
        self.folder, self.every, self.n = folder / "pictures", every, n
        self.steps, self.guidance_scale = steps, guidance_scale
        self.last = -1

    def on_train_batch_end(self, trainer: Trainer, module: Training, *args: Any) -> None:  # type: ignore[override]
        if self.every and trainer.global_step % self.every == 0 and trainer.global_step != self.last:
            self.draw(trainer, module)

    def on_train_end(self, trainer: Trainer, module: Training) -> None:  # type: ignore[override]
        if trainer.global_step != self.last:
            self.draw(trainer, module)

    def draw(self, trainer: Trainer, module: Training) -> None:
        """Writes the pictures of the present step.

        The first process draws them alone, except of a sharded model, whose forward takes all processes.
        """
        if not (trainer.is_global_zero or module.sharded):
            return
        from diffratio.backbones.widening import image_channels
        from diffratio.methods.routed import RoutedMethod
        from diffratio.sampling.generate import generate
        from diffratio.sampling.known import triples
        from diffratio.sampling.pipeline import build_pipeline
        from diffratio.surgery import attach_

        self.last = trainer.global_step
        averages = [callback for callback in trainer.callbacks if isinstance(callback, WeightAverage)]  # type: ignore[attr-defined]
        was = module.transformer.training
        module.transformer.eval()
        for average in averages:
            average.swap_in(module)
        try:
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            if isinstance(data, LatentData):
                n, settings = min(self.n, data.held_out_size), {"steps": self.steps}
                with torch.no_grad(), trainer.precision_plugin.forward_context():
                    images = latent_samples(module, data, n, settings | {"guidance_scale": self.guidance_scale})
                if trainer.is_global_zero:
                    self._save(images, 10)
            elif image_channels(module.transformer) <= 3:
                captions = module.conditions if isinstance(module.conditions, Captions) else None
                pipe = build_pipeline(
                    module.transformer,
                    own_scheduler(module.transformer, module.objective.name),
                    text=None if captions is None else captions.encoder,
                )
                labels: list[int | str] | None = None
                n, columns = self.n, 10
                if captions is not None or module.inpaint is not None:
                    n = min(n, data.held_out_size)
                    numbers = data.held_out(n)[1].tolist()
                    labels = numbers if captions is None else [captions.texts[number] for number in numbers]
                known = None if module.inpaint is None else data.held_out_known(n)
                pipe = attach_(pipe)
                with torch.no_grad(), trainer.precision_plugin.forward_context():
                    images = generate(
                        pipe,
                        n,
                        labels=labels,
                        steps=self.steps,
                        guidance_scale=self.guidance_scale,
                        batch_size=n,
                        quiet=True,
                        distributed=False,  # the other processes are not here
                        known=known,
                    )
                if known is not None:  # original, masked, filled
                    images, columns = triples(known, images), 9
                if trainer.is_global_zero:
                    self._save(images, columns)
            if isinstance(module.method, RoutedMethod) and trainer.is_global_zero:
                table: Any = module.method.bins
                if module.learning_ratios and module.keep_ratios is not None:
                    table = [[10 * ratio for ratio in row] for row in module.keep_ratios.table()]
                self._heat_map(table)
        finally:
            for average in averages:
                average.swap_out(module)
            module.transformer.train(was)

    def _save(self, images: torch.Tensor, columns: int) -> None:
        from diffratio.sampling.generate import sample_grid

        with atomic_file(self.folder / f"samples-{self.last:06d}.png") as path:
            sample_grid(images, columns=min(columns, len(images))).save(path, format="PNG")

    def _heat_map(self, table: Any) -> None:
        try:
            from matplotlib.figure import Figure
        except ImportError:  # the report extra; the numbers are in ratios.csv
            return
        figure = Figure(figsize=(4, 0.3 * len(table) + 1), layout="constrained")
        axes = figure.subplots()
        picture = axes.imshow(table, vmin=0, vmax=10, aspect="auto", cmap="viridis")
        axes.set(xlabel="region (0 = cleanest)", ylabel="layer", title=f"keep ratio in tenths, step {self.last}")
        figure.colorbar(picture)
        with atomic_file(self.folder / f"ratios-{self.last:06d}.png") as path:
            figure.savefig(path, format="png")

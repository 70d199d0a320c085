"""The LightningModule: one step from batch to ratios brought back onto the budget."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn

from diffratio.backbones import backbone_of
from diffratio.checkpoint import BaseWeights
from diffratio.conditions import Classes, Conditions
from diffratio.cost.macs import CostTable, macs_table
from diffratio.cost.run import SamplingRun
from diffratio.errors import DiffratioError
from diffratio.inpainting import InpaintSettings, Known
from diffratio.methods.diffcr import DiffCRMethod
from diffratio.methods.routed import RoutedMethod
from diffratio.objectives import Noised, Objective, noise_levels, sample_draws
from diffratio.objectives.validation import PARTS, part_losses
from diffratio.routing.ratios import BudgetProjection
from diffratio.routing.schedule import KeepSchedule
from diffratio.sampling.vae import LatentCoder
from diffratio.surgery import attachment, drop_root_module_
from diffratio.training.guard import NonFiniteGuard
from diffratio.training.lora import leave_base_, put_base_
from diffratio.training.optimizers import make_optimizer
from diffratio.training.processes import mean_over_processes
from diffratio.training.settings import BudgetSettings, GuardSettings, LossSettings, OptimizerSettings
from diffratio.training.sharding import shard_, whole

_HARM_MEMORY = 0.95


class Training(LightningModule):
    """Fine-tunes (or pretrains) one transformer with a method applied.

    Args:
        transformer: with a method applied (`Dense` for plain training).
        objective: what is predicted.
        loss: timesteps, distillation, seed.
        optimizer: groups and rates.
        budget: the budget of learned ratios; unused otherwise.
        run: the sampling run that the budget refers to.
        teacher: the frozen dense model, where there is distillation.
        probe_n: held-out pictures for the loss before and after rounding.
        costs: cost table of the run in the budget's unit; None counts MACs.
        guard: what happens at a loss or gradient that is not finite.
        conditions: what labels stand for; None takes them for classes.
        inpaint: of a model that fills holes; None sees the noised picture alone.
    """

    def __init__(
        self,
        transformer: nn.Module,
        objective: Objective,
        loss: LossSettings,
        optimizer: OptimizerSettings,
        budget: BudgetSettings,
        run: SamplingRun,
        teacher: nn.Module | None = None,
        probe_n: int = 100,
        costs: CostTable | None = None,
        guard: GuardSettings | None = None,
        conditions: Conditions | None = None,
        inpaint: InpaintSettings | None = None,
    ) -> None:
        super().__init__()
        self.inpaint = inpaint
        self.conditions = conditions or Classes()
        self.guard = NonFiniteGuard(guard or GuardSettings())
        self.transformer, self.objective = transformer.train(), objective
        self.loss, self.optimizer_settings, self.budget, self.run = loss, optimizer, budget, run
        # in a list: the teacher is neither trained nor saved
        self._teacher = [teacher.requires_grad_(False).eval()] if teacher is not None else []
        self.backbone = backbone_of(transformer)
        self.method = attachment(transformer).token_method
        self.costs = costs or macs_table(self.method.description, run)
        self.keep_ratios = self.method.ratios if isinstance(self.method, DiffCRMethod) else None
        if isinstance(self.method, DiffCRMethod) and self.keep_ratios is not None:
            self.method.alignment = self.costs.alignment  # ratios are learned at the token counts that cost the budget
        self.projection = BudgetProjection(self.costs)
        self.begin = self.projection.fraction(self.keep_ratios) if self.keep_ratios is not None else 1.0
        self._first_ratios = self.keep_ratios.table() if self.keep_ratios is not None else []
        shape = self.keep_ratios.rho.shape if self.keep_ratios is not None else (1, 1)
        self.register_buffer("harm", torch.zeros(shape))
        self.harm: Tensor
        self.region_weights = self._region_weights(shape[1])
        if optimizer.weights == "none":
            for name, parameter in transformer.named_parameters():
                parameter.requires_grad_(".router." in name or name.startswith("keep_ratios"))
        self.coder: Callable[[], LatentCoder] | None = None  # gives the VAE that is exported along
        self.scheduler: Any = None  # that the export is sampled with; None takes the card's
        self.base: BaseWeights | None = None  # what LoRA stands on, where that can be loaded again
        self.rounding: dict[str, float] = {}
        self.probe_n = probe_n
        self.sharded = False

    def configure_model(self) -> None:
        """Shards transformer and teacher, where the strategy asks for that."""
        if self.device_mesh is None or self.sharded:
            return
        mesh = self.device_mesh["data_parallel"]
        for one in (self.transformer, *self._teacher):
            shard_(one, self.backbone, mesh)
        self.sharded = True

    def _region_weights(self, regions: int) -> list[float]:
        """What the ratios' gradient in each region is multiplied by.

        Training visits regions by the objective's density, sampling by the run's steps. A ratio belongs to one region,
        so scaling its gradient by the quotient makes the ratios minimise the loss over the run that the budget counts.
        """
        if self.budget.weighting == "density":
            return [1.0] * regions
        edges = [self.objective.cumulative(region / regions) for region in range(regions + 1)]
        counts = self.run.region_counts(regions)
        return [
            count / self.run.steps / (high - low) for count, low, high in zip(counts, edges, edges[1:], strict=False)
        ]

    @property
    def learning_ratios(self) -> bool:
        """Whether the ratios are still learned."""
        return isinstance(self.method, DiffCRMethod) and self.method.ratios is not None

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters: weights, routers, ratios."""
        groups: dict[str, list[nn.Parameter]] = {"weights": [], "routers": [], "ratios": []}
        for name, parameter in self.transformer.named_parameters():
            if name.startswith("keep_ratios") or not parameter.requires_grad:
                continue
            groups["routers" if ".router." in name else "weights"].append(parameter)
        if self.keep_ratios is not None:
            groups["ratios"] = [self.keep_ratios.rho]
        return groups

    def ratios_moved(self) -> float:
        """Largest distance of a keep ratio from where it began; 0 where none are learned. One read of the device."""
        if self.keep_ratios is None:
            return 0.0
        pairs = zip(self.keep_ratios.table(), self._first_ratios, strict=True)
        return max(abs(now - first) for row in pairs for now, first in zip(*row, strict=True))

    def averaged(self) -> list[nn.Parameter]:
        """What the moving average follows."""
        groups = self.groups()
        return groups["weights"] + groups["routers"]

    def predict(self, inputs: Tensor, levels: Tensor, labels: Tensor) -> Tensor:
        """The transformer's output (B, C, H, W) at noise levels (B,); inputs of 2 C + 1 channels where it inpaints."""
        return self._forward(self.transformer, inputs, levels, labels)

    def _forward(self, transformer: nn.Module, inputs: Tensor, levels: Tensor, labels: Tensor) -> Tensor:
        timestep = self.objective.timestep(self.backbone.timestep(levels))
        return self.backbone.predict(transformer, inputs, timestep, self.conditions.arguments(labels))

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        """Noise, predict, compare; the loss is logged with its parts."""
        clean, positions = batch["images"], batch["positions"].tolist()
        uniform, noise = sample_draws(self.loss.seed, positions, clean.shape[1:])
        regions = self.method.region_count if isinstance(self.method, RoutedMethod) else 4
        together = len(positions) * self.trainer.world_size
        levels = noise_levels(self.objective, uniform, positions, together, self.loss.timesteps, regions)
        levels = levels.to(clean.device)
        noised = self.objective.noised(clean, noise.to(clean.device), levels)
        inputs, noised = self._seen(noised, batch.get("masks"))
        output = self.predict(inputs, levels, batch["labels"])
        losses = self.objective.losses(output, noised)  # (B,)
        loss = losses.mean()
        self._log_loss("train/diffusion_loss", loss, prog_bar=True)
        if self._teacher:
            with torch.no_grad():
                taught = self._forward(self._teacher[0].to(clean.device), inputs, levels, batch["labels"])
            distance = self.objective.distance(output, taught, noised).mean()
            self._log_loss("train/distill_loss", distance)
            loss = loss + self.loss.distill * distance
        if self.keep_ratios is not None and not self.learning_ratios:
            loss = loss + 0 * self.keep_ratios.rho.sum()  # DDP refuses parameters without gradient
        self.guard.see(loss, losses, positions)
        return loss

    def _log_loss(self, name: str, loss: Tensor, prog_bar: bool = False) -> None:
        """Logs a loss of the batch; what is written is the mean over processes."""
        trainer = self.trainer
        if trainer.world_size > 1 and (trainer.global_step + 1) % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            loss = mean_over_processes(trainer, loss)
        self.log(name, loss.detach(), prog_bar=prog_bar)

    def _seen(self, noised: Noised, masks: Tensor | None) -> tuple[Tensor, Noised]:
        """What the model sees of a noised batch, and the batch with the pixels whose error counts."""
        if self.inpaint is None:
            return noised.inputs, noised
        assert masks is not None
        inputs = torch.cat([noised.inputs, Known(noised.clean, masks).channels], dim=1)  # (B, 2 C + 1, H, W)
        return inputs, dataclasses.replace(noised, where=masks if self.inpaint.loss == "hole" else None)

    def fixed_losses(
        self, images: Tensor, labels: Tensor, masks: Tensor | None = None, seed: int = 0
    ) -> dict[str, Tensor]:
        """Losses (n, 4) at fixed noise by part of the pictures: `loss`, and where it inpaints `hole` and `known`.

        Args:
            images: (n, C, H, W) in [-1, 1].
            labels: (n,).
            masks: holes (n, 1, H, W) of an inpainting model.
            seed: of noise and levels.
        """
        parts = PARTS if self.inpaint is not None else PARTS[:1]
        found = part_losses(self.predict, self.objective, images, labels, parts, seed=seed, masks=masks)
        if self.inpaint is None:
            return {"loss": found["all"]}
        return {"loss": found[self.inpaint.loss], "hole": found["hole"], "known": found["known"]}

    def validation_step(self, batch: dict[str, Tensor], batch_index: int) -> None:
        """Loss at fixed noise, by region."""
        found = self.fixed_losses(batch["images"], batch["labels"], batch.get("masks"), seed=1 + batch_index)
        losses = found.pop("loss")
        count = len(losses)
        self.log("val/loss", losses.mean(), prog_bar=True, batch_size=count, sync_dist=True)
        for part, own in found.items():
            self.log(f"val/loss_{part}", own.mean(), batch_size=count, sync_dist=True)
        for region, value in enumerate(losses.mean(0)):
            self.log(f"val/loss_region{region}", value, batch_size=count, sync_dist=True)

    def configure_optimizers(self) -> Any:
        """One AdamW, three groups, one schedule."""
        settings, groups = self.optimizer_settings, self.groups()
        if not any(groups.values()):
            raise DiffratioError(
                f"optimizer.weights={settings.weights!r} with method {self.method.name!r} leaves nothing to train; "
                "set optimizer.weights=all, or choose a method with routers"
            )
        rates = {"weights": settings.lr, "routers": settings.router_lr, "ratios": settings.ratio_lr}
        decays = {"weights": settings.weight_decay, "routers": 0.0, "ratios": 0.0}
        own = [
            {"params": members, "lr": rates[name], "weight_decay": decays[name], "name": name}
            for name, members in groups.items()
            if members
        ]
        optimizer = make_optimizer(settings.kind, own, settings.betas)
        total = max(1, self.trainer.max_steps)

        def scale(step: int) -> float:
            ramp = min(1.0, (step + 1) / settings.warmup) if settings.warmup else 1.0
            if settings.schedule == "cosine":
                ramp *= 0.5 * (1 + math.cos(math.pi * min(1.0, step / total)))
            return ramp

        def steady(step: int) -> float:
            return 1.0

        schedules: list[Any] = [steady if group["name"] == "ratios" else scale for group in optimizer.param_groups]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedules)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        """Clips weights and routers; the ratios lose the component along the cost instead.

        An update that is not finite gets no further: its gradients are dropped, and an optimizer without gradients
        leaves weights and moments as they are.
        """
        groups = self.groups()
        gradients = [one.grad for one in groups["weights"] + groups["routers"] if one.grad is not None]
        norm = nn.utils.get_total_norm(gradients) if gradients else None
        norms = [whole(norm)] if norm is not None else []
        ratio_gradient = self.keep_ratios.rho.grad if self.learning_ratios and self.keep_ratios is not None else None
        if ratio_gradient is not None:
            if self.sharded:  # the ratios are whole on every process, and nobody else averages their gradient
                ratio_gradient.copy_(mean_over_processes(self.trainer, ratio_gradient))
            ratio_gradient.mul_(ratio_gradient.new_tensor(self.region_weights))
            norms.append(ratio_gradient.norm())
        sound = self.guard.passes(self.trainer, norms)
        if self.guard.settings.nonfinite == "skip":
            self.log("train/skipped_steps", float(self.guard.skipped))
        if not sound:
            optimizer.zero_grad(set_to_none=True)
            return
        if norm is not None and self.optimizer_settings.clip:
            nn.utils.clip_grads_with_norm_(groups["weights"] + groups["routers"], self.optimizer_settings.clip, norm)
            self.log("train/grad_norm", norms[0])
        if self.learning_ratios:
            assert self.keep_ratios is not None
            if ratio_gradient is not None:
                self.harm.mul_(_HARM_MEMORY).sub_((1 - _HARM_MEMORY) * ratio_gradient)
                self.log("ratios/grad_norm", norms[-1])
            self.projection.remove_component_(self.keep_ratios)
        elif self.keep_ratios is not None:
            self.log("ratios/grad_norm", 0.0)  # Lightning would repeat the last value

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The optimizer's step, then the ratios back onto the present target, then the freeze when it is due."""
        super().optimizer_step(*args, **kwargs)
        if self.keep_ratios is None:
            return
        if not self.learning_ratios:
            assert isinstance(self.method, DiffCRMethod)
            self.log("ratios/budget", self.costs.fraction(self.method.bins), prog_bar=True)
            self.log("ratios/mean", sum(map(sum, self.method.bins)) / (10 * self.keep_ratios.rho.numel()))
            return
        # Lightning counts the step after this hook
        step = self.trainer.global_step + 1
        progress = step / max(1, self.trainer.max_steps)
        reached = self.projection.project_(self.keep_ratios, self.budget.at(progress, self.begin))
        self.log("ratios/budget", reached, prog_bar=True)
        self.log("ratios/mean", self.keep_ratios.rho.detach().mean())
        if progress >= self.budget.freeze:
            self.freeze_schedule(step)

    def freeze_schedule(self, step: int) -> KeepSchedule:
        """Rounds the ratios into the budget and fixes the schedule after a step; measures the loss before and after."""
        method = self.method
        assert isinstance(method, DiffCRMethod) and self.keep_ratios is not None
        self.projection.project_(self.keep_ratios, self.budget.target)
        before = self._probe(interpolated=True)
        table = method.round_(self.costs, self.budget.target, self.harm.double().tolist())
        # a last bit that differs between machines must not give two processes two schedules
        method.bins = table = self.trainer.strategy.broadcast(table)
        schedule = KeepSchedule.solved(table, self.costs, self.budget.target)
        after = self._probe(interpolated=False)
        self._fix(schedule)
        fraction, macs = self.costs.fraction(table), method.macs(self.run).fraction
        self.rounding = {"loss_before": before, "loss_after": after, "macs": macs, "step": float(step)}
        if self.budget.unit != "macs":
            self.rounding[self.budget.unit] = fraction
        self.print(
            f"keep ratios frozen at step {step}: {self.budget.counted} {fraction:.4f} of dense "
            f"(target {self.budget.target:g}), loss {before:.4f} before rounding, {after:.4f} after"
        )
        return schedule

    def _fix(self, schedule: KeepSchedule) -> None:
        assert isinstance(self.method, DiffCRMethod)
        self.method.freeze_(schedule)
        drop_root_module_(self.transformer, "keep_ratios")

    @torch.no_grad()
    def _probe(self, interpolated: bool) -> float:
        """Loss on a few held-out images at fixed noise; interpolated or rounded."""
        assert isinstance(self.method, DiffCRMethod)
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        was = self.transformer.training
        self.transformer.eval()
        self.method.interpolate_in_eval = interpolated
        try:
            with self.trainer.precision_plugin.forward_context():
                losses = self.held_out_losses(data, self.probe_n)["loss"]
        finally:
            self.method.interpolate_in_eval = False
            self.transformer.train(was)
        return float(losses.mean())

    @torch.no_grad()
    def held_out_losses(self, data: Any, n: int) -> dict[str, Tensor]:
        """`fixed_losses` of a data module's first n held-out images."""
        n = min(n, data.held_out_size)
        images, labels = data.held_out(n)
        masks = None if self.inpaint is None else data.masks.fixed(range(n)).to(self.device)
        return self.fixed_losses(images.to(self.device), labels.to(self.device), masks)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The frozen schedule travels as plain data."""
        schedule = self.method.config.schedule if isinstance(self.method, RoutedMethod) else None
        learned = self.keep_ratios is not None and schedule is not None
        checkpoint["diffratio"] = {
            "schedule": schedule.to_json() if learned and schedule else None,
            "rounding": dict(self.rounding),
            "guard": self.guard.state(),
        }
        leave_base_(checkpoint, self.transformer, self.base)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Freezes first where the saved job had frozen; frozen base weights come from where they lie."""
        saved = checkpoint.get("diffratio") or {}
        self.rounding = dict(saved.get("rounding") or {})
        self.guard.restore(saved.get("guard") or {})
        if saved.get("schedule") and self.learning_ratios:
            self._fix(KeepSchedule.from_json(saved["schedule"]))
        put_base_(checkpoint, self.transformer, self.base)
        stored, own = checkpoint["state_dict"], self.state_dict()
        wrong = sorted(set(stored) ^ set(own)) or [key for key in own if own[key].shape != stored[key].shape]
        if wrong:
            raise DiffratioError(
                f"the checkpoint does not fit this run's backbone and method ({wrong[0]}, {len(wrong)} such entries); "
                "resume with the settings that it was trained with, or choose another paths.output_dir"
            )


def dense_copy(transformer: nn.Module, share: bool = False) -> nn.Module:
    """A frozen copy of a dense transformer, as teacher.

    Args:
        transformer: the dense model.
        share: whether both hold the same parameters, which are frozen then: for LoRA, which trains others.
    """
    shared = {id(parameter): parameter for parameter in transformer.parameters()} if share else None
    return copy.deepcopy(transformer, shared).requires_grad_(False).eval()

"""``DistillationTrainer``: transformers' Trainer with a teacher, on the fused losses.

    loss = alpha * task + (1 - alpha) * tau^2 * D(teacher, student) + hidden.weight * H + attention.weight * A

the objective of the recipes' training stages, see ``workflow/objective.py``, which also says which tokens take part in
each term. Where the task loss is cross-entropy, it and D come from one sweep over the logits.

Gradient accumulation. A step over several batches has the loss of all of them at once, whatever they hold of padding
and ignored labels: each term of a batch is weighted by the batch's share of the step's tokens. Over several processes
too, with one small all-reduce a step.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer

from pycompress.recipe.sections import Distillation
from pycompress.tensor_file import TensorFile, TensorFileError, write_tensors
from pycompress.workflow.batches import first_batch
from pycompress.workflow.objective import Objective, Share
from pycompress.workflow.rng import keeping_all_rng

_OP = "DistillationTrainer"
_PROJECTIONS = "distillation.safetensors"  # beside the model of a checkpoint, where the hidden term has projections


class DistillationTrainer(Trainer):
    """``transformers.Trainer`` whose loss is that of distillation; every other argument and method is Trainer's.

    Args:
        model: the student, in any state that trains: float, pruned (MaskedLinear), prepared by ``prepare_qat_``.
        teacher_model: any model that takes the same batches. It is moved to the device of the training, runs in eval
            mode without gradients, and its weights stay as they are.
        distillation: a :class:`pycompress.recipe.Distillation`, or a mapping with its keys: ``loss`` ("forward_kl",
            "reverse_kl", "jsd", "none"), ``alpha``, ``tau``, ``beta``, ``hidden``, ``attention``.
        compute_loss_func: the task's loss instead of the model's, as Trainer takes it: ``(outputs, labels,
            num_items_in_batch=None)``. It must return a mean, over the labels that are not -100.

    With ``alpha=0`` the batches need no labels. The terms are logged beside the loss: ``task`` and ``soft`` before
    their weights, ``hidden``, ``attention``; ``evaluate`` gives the same loss as ``eval_loss``. Learned projections of
    the hidden term are trained with the model, and kept in checkpoints, from which a run goes on with them.

    Raises:
        TypeError, ValueError: at the first call that needs the loss, before anything is trained, where student,
            teacher and batches do not fit, by what it is; RecipeError (a ValueError) for `distillation`.
    """

    # Each batch comes with its share of the step: nothing is left to divide by.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module | None = None,
        *args: Any,
        teacher_model: nn.Module | None = None,
        distillation: Distillation | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(teacher_model, nn.Module):
            raise TypeError(f"{_OP}: teacher_model is a {type(teacher_model).__name__}; expected a torch.nn.Module")
        if distillation is None or isinstance(distillation, Mapping):
            distillation = Distillation(**(distillation or {}))
        elif not isinstance(distillation, Distillation):
            raise TypeError(
                f"{_OP}: distillation is a {type(distillation).__name__}; expected pycompress.recipe.Distillation, or "
                "a mapping such as {'alpha': 0.5, 'tau': 2.0}"
            )
        super().__init__(model, *args, **kwargs)
        if self.args.label_smoothing_factor:
            raise ValueError(
                f"{_OP}: label_smoothing_factor={self.args.label_smoothing_factor:g} would not be used; leave it 0, or "
                "give compute_loss_func a loss with label smoothing"
            )
        self.distillation = distillation
        self.teacher_model = teacher_model
        if self.place_model_on_device:
            teacher_model.to(self.args.device)
        self._task_loss: Callable[..., Tensor] | None = getattr(self, "compute_loss_func", None)
        if not hasattr(Trainer, "loss_is_scaled_for_ga"):  # before transformers 5.20 this is how a trainer says it
            self.compute_loss_func = self._task_loss or _never_called
        self._objective: Objective | None = None
        self._shares: deque[Share] = deque()
        self._sums: dict[str, Tensor] = {}  # of the terms since they were last logged
        self._summed_from = 0  # the step

    # ---- the loss -----------------------------------------------------------------------------------------------

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, once a step: its batches are all known here, so their shares can be told."""
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        self._shares.clear()
        if batches:
            mean = self._mean_over_processes if self.args.world_size > 1 else None
            self._shares.extend(self._fitted(batches[0]).share_out(batches, mean))
        return batches, num_items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of a batch, in training its part of the step's."""
        objective = self._fitted(inputs)
        share = self._shares.popleft() if model.training and self._shares else None
        objective.run_student_by(model)
        if self.teacher_model.training:
            self.teacher_model.eval()
        with self.accelerator.autocast():
            loss, terms, output = objective.run(inputs, share)
        if model.training:
            if not self._sums:
                self._summed_from = self.state.global_step
            for name, value in terms.items():
                self._sums[name] = self._sums.get(name, 0) + value
            if share is None:  # called by something else than the loop of Trainer.train
                loss = loss / self.current_gradient_accumulation_steps
        return (loss, _without(output, objective.asked)) if return_outputs else loss

    def _fitted(self, batch: Any) -> Objective:
        """The objective, made with the first batch that is seen."""
        if self._objective is None:
            loss_fn = None
            if self._task_loss is not None:
                task = self._task_loss

                def loss_fn(output: Any, batch: Any) -> Tensor:
                    return task(output, batch.get("labels"), num_items_in_batch=None)

            student = self.accelerator.unwrap_model(self.model)
            made = Objective.make(
                self.distillation,
                student,
                self.teacher_model,
                loss_fn,
                self._prepare_inputs(batch),
                seed=self.args.seed,
            )
            self._objective = made.to(self.args.device)
        return self._objective

    def _mean_over_processes(self, totals: list[float]) -> list[float]:
        summed = self.accelerator.reduce(torch.tensor(totals, dtype=torch.float64, device=self.args.device), "mean")
        return summed.tolist()

    # ---- what is trained besides the model ------------------------------------------------------------------------

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Trainer's, with the projections of the hidden term."""
        made_here = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        projections = list(self._fitted_to_training().parameters())
        if projections:
            if not made_here:
                held = {id(p) for group in optimizer.param_groups for p in group["params"]}
                projections = [p for p in projections if id(p) not in held]
            if projections:
                optimizer.add_param_group({"params": projections, "weight_decay": 0.0})
            if self.args.world_size > 1:
                optimizer.register_step_pre_hook(self._average_projections)
            optimizer.register_step_post_hook(self._clear_projections)
        return optimizer

    def _clear_projections(self, *_: Any) -> None:
        """Trainer clears the gradients of the model, not those of the optimizer."""
        self._fitted_to_training().zero_grad()

    def _average_projections(self, *_: Any) -> None:
        """Over the processes: DistributedDataParallel sees to the model's parameters only."""
        for parameter in self._fitted_to_training().parameters():
            if parameter.grad is not None:
                parameter.grad = self.accelerator.reduce(parameter.grad, "mean")

    def _fitted_to_training(self) -> Objective:
        """The objective, before the loop has handed out a batch: made with the first examples of train_dataset."""
        if self._objective is None:
            if self.train_dataset is None:
                raise ValueError(f"{_OP}: there is no train_dataset; pass one to train")
            collate = self._get_collator_with_removed_columns(self.data_collator, description="training")
            with keeping_all_rng():  # a collator may mask at random
                loader = DataLoader(self.train_dataset, self.args.per_device_train_batch_size, collate_fn=collate)
                self._fitted(first_batch(loader))
        assert self._objective is not None
        return self._objective

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        projections = {} if self._objective is None else dict(self._objective.named_parameters())
        if projections and self.args.should_save:
            tensors = {name: tensor.detach() for name, tensor in projections.items()}
            write_tensors(os.path.join(output_dir, _PROJECTIONS), tensors, {"format": "pt"})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        projections = dict(self._fitted_to_training().named_parameters())
        if not projections:
            return
        path = os.path.join(resume_from_checkpoint, _PROJECTIONS)
        with TensorFile(path) as file:
            saved = {name: tuple(entry.shape) for name, entry in file.entries.items()}
            expected = {name: tuple(p.shape) for name, p in projections.items()}
            if saved != expected:
                raise TensorFileError(f"{path} holds {saved}, and this distillation has {expected}; use the same")
            with torch.no_grad():
                for name, parameter in projections.items():
                    parameter.copy_(file.read(name))

    # ---- the log --------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Trainer's, with the mean of each term over the steps since the last time."""
        steps = self.state.global_step - self._summed_from
        if "loss" in logs and self._sums and steps > 0:
            logs = {**logs, **{name: float(value) / steps for name, value in self._sums.items()}}
            self._sums = {}
        super().log(logs, *args, **kwargs)


def _never_called(*_: Any, **__: Any) -> Tensor:
    raise AssertionError(f"{_OP}.compute_loss does not call it")


def _without(output: Any, names: frozenset[str]) -> Any:
    """The output as Trainer takes it apart, without what only the loss wanted: it would gather it as predictions."""
    if isinstance(output, dict):
        return {key: value for key, value in output.items() if key not in names}
    if isinstance(output, Tensor):
        output = (output,)
    return (None, *output)  # where the loss would stand

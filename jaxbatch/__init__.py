"""jaxbatch helps to choose a batch size and the learning rate for it, and to train with very large batches."""

from jaxbatch.advice.advice import Advice
from jaxbatch.advice.advise_runs import advise_runs
from jaxbatch.advice.advising import advise
from jaxbatch.advice.branches import Branches, branch
from jaxbatch.advice.critical import CriticalFit, critical_batch_size
from jaxbatch.advice.end_advice import EndAdvice
from jaxbatch.advice.end_advise_runs import advise_runs_within
from jaxbatch.advice.end_advising import advise_within
from jaxbatch.advice.end_lengths import seconds
from jaxbatch.advice.largest_batch import find_largest_batch, max_batch_size
from jaxbatch.advice.learning_rates import RateResult, rate_exponent, tune_learning_rate
from jaxbatch.advice.looks import Look, OutOfMemory
from jaxbatch.advice.memory import memory_profile
from jaxbatch.advice.memory_parts import Memory
from jaxbatch.advice.memory_plan import memory_plan
from jaxbatch.advice.published_rules import PublishedRule, PublishedRules, published_rules
from jaxbatch.advice.throughput import Throughput, fit_throughput, predicted_throughput
from jaxbatch.advice.timed_updates import measure_throughput
from jaxbatch.backend import BackendCheck, check_backend
from jaxbatch.batches import (
    Duration,
    IndexBatches,
    cut_batches,
    epoch_batches,
    epoch_order,
    epochs,
    examples,
    num_steps,
    steps,
    steps_per_epoch,
    tokens,
)
from jaxbatch.data import DATASETS, Dataset, load_dataset
from jaxbatch.data.held_out import hold_out
from jaxbatch.data.images import ImageDataset, open_images
from jaxbatch.data.packing import PackedText, pack_texts
from jaxbatch.data.streaming import prefetch
from jaxbatch.data.streams import ArrayStream
from jaxbatch.data.text import TextDataset, load_text, sequences
from jaxbatch.gradients.accumulation import accumulated_gradient
from jaxbatch.gradients.clipping import ClippedSum, clipped_gradient_sum, sum_of_gradients
from jaxbatch.gradients.coupled import CoupledGradient, coupled_gradient
from jaxbatch.gradients.curvature import HessianEigenvalues, hessian_eigenvalues, hessian_trace
from jaxbatch.gradients.exact import group_gradients, losses_and_group_gradients, losses_and_mean_gradient, per_example_gradients
from jaxbatch.gradients.hessian import hessian_vector_product
from jaxbatch.gradients.loss_line import loss_along_line
from jaxbatch.gradients.noise import GradientStatistics, cosine_similarity, gradient_noise_scale, gradient_statistics, relative_squared_error
from jaxbatch.gradients.part_norms import NoiseMonitor
from jaxbatch.gradients.recompute import recompute
from jaxbatch.gradients.split import largest_stable_curvature, split_backward
from jaxbatch.intervals import Interval, interval, ratio_of_means
from jaxbatch.losses.chunked import additive_margin, angular_margin, chunked_cross_entropy
from jaxbatch.losses.classification import classification_loss, classification_metrics, correct, cross_entropy
from jaxbatch.losses.contrastive import info_nce, nt_xent, sigmoid_contrastive, unit_length
from jaxbatch.machine.compiling import keep_compiled_programs
from jaxbatch.machine.memory import program_memory
from jaxbatch.machine.platform import skip_absent_accelerators
from jaxbatch.machine.targets import TARGETS, Target, find_target
from jaxbatch.models.image_networks import MLP, VGG19BN, AlexNet, ResNet20, ResNet50, SimpleCNN
from jaxbatch.models.transformer import TransformerLM
from jaxbatch.results.report import track
from jaxbatch.schedules.batch_sizes import BatchSizeSchedule, adabatch_schedule, constant_schedule, increase_instead_of_decay, milestone_schedule
from jaxbatch.schedules.named_rates import scheduled, stretched_schedule
from jaxbatch.schedules.policies import BatchSizePolicy
from jaxbatch.schedules.rates import cosine, coupled_learning_rate, cyclic, scale_learning_rate, step_decay
from jaxbatch.sums import Weighted
from jaxbatch.training.checkpoints import fit_with_checkpoints
from jaxbatch.training.classification import classification_task, streamed_task
from jaxbatch.training.evaluation import make_evaluate
from jaxbatch.training.fitting import fit
from jaxbatch.training.goals import Goal, as_goal, fit_to_target
from jaxbatch.training.language import language_task, packed_language_task
from jaxbatch.training.loops import compile_epoch, make_epoch
from jaxbatch.training.plans import FitConfig
from jaxbatch.training.steps import make_train_step
from jaxbatch.training.sweeps import sweep
from jaxbatch.training.tasks import Task
from jaxbatch.training.train_state import TrainState, init_state

# Before JAX starts. It changes nothing unless compilers for accelerators are installed that are not here.
skip_absent_accelerators()

__version__ = "0.1.0"

__all__ = [
    "DATASETS",
    "MLP",
    "TARGETS",
    "VGG19BN",
    "Advice",
    "AlexNet",
    "ArrayStream",
    "BackendCheck",
    "BatchSizePolicy",
    "BatchSizeSchedule",
    "Branches",
    "ClippedSum",
    "CoupledGradient",
    "CriticalFit",
    "Dataset",
    "Duration",
    "EndAdvice",
    "FitConfig",
    "Goal",
    "GradientStatistics",
    "HessianEigenvalues",
    "ImageDataset",
    "IndexBatches",
    "Interval",
    "Look",
    "Memory",
    "NoiseMonitor",
    "OutOfMemory",
    "PackedText",
    "PublishedRule",
    "PublishedRules",
    "RateResult",
    "ResNet20",
    "ResNet50",
    "SimpleCNN",
    "Target",
    "Task",
    "TextDataset",
    "Throughput",
    "TrainState",
    "TransformerLM",
    "Weighted",
    "accumulated_gradient",
    "adabatch_schedule",
    "additive_margin",
    "advise",
    "advise_runs",
    "advise_runs_within",
    "advise_within",
    "angular_margin",
    "as_goal",
    "branch",
    "check_backend",
    "chunked_cross_entropy",
    "classification_loss",
    "classification_metrics",
    "classification_task",
    "clipped_gradient_sum",
    "compile_epoch",
    "constant_schedule",
    "correct",
    "cosine",
    "cosine_similarity",
    "coupled_gradient",
    "coupled_learning_rate",
    "critical_batch_size",
    "cross_entropy",
    "cut_batches",
    "cyclic",
    "epoch_batches",
    "epoch_order",
    "epochs",
    "examples",
    "find_largest_batch",
    "find_target",
    "fit",
    "fit_throughput",
    "fit_to_target",
    "fit_with_checkpoints",
    "gradient_noise_scale",
    "gradient_statistics",
    "group_gradients",
    "hessian_eigenvalues",
    "hessian_trace",
    "hessian_vector_product",
    "hold_out",
    "increase_instead_of_decay",
    "info_nce",
    "init_state",
    "interval",
    "keep_compiled_programs",
    "language_task",
    "largest_stable_curvature",
    "load_dataset",
    "load_text",
    "loss_along_line",
    "losses_and_group_gradients",
    "losses_and_mean_gradient",
    "make_epoch",
    "make_evaluate",
    "make_train_step",
    "max_batch_size",
    "measure_throughput",
    "memory_plan",
    "memory_profile",
    "milestone_schedule",
    "nt_xent",
    "num_steps",
    "open_images",
    "pack_texts",
    "packed_language_task",
    "per_example_gradients",
    "predicted_throughput",
    "prefetch",
    "program_memory",
    "published_rules",
    "rate_exponent",
    "ratio_of_means",
    "recompute",
    "relative_squared_error",
    "scale_learning_rate",
    "scheduled",
    "seconds",
    "sequences",
    "sigmoid_contrastive",
    "split_backward",
    "step_decay",
    "steps",
    "steps_per_epoch",
    "streamed_task",
    "stretched_schedule",
    "sum_of_gradients",
    "sweep",
    "tokens",
    "track",
    "tune_learning_rate",
    "unit_length",
]

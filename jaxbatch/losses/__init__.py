"""One loss, one metric per example: of classes, of very many classes, of pairs."""

from jaxbatch.losses.chunked import additive_margin, angular_margin, chunked_cross_entropy
from jaxbatch.losses.classification import classification_loss, classification_metrics, correct, cross_entropy
from jaxbatch.losses.contrastive import info_nce, nt_xent, sigmoid_contrastive, unit_length

__all__ = [
    "additive_margin",
    "angular_margin",
    "chunked_cross_entropy",
    "classification_loss",
    "classification_metrics",
    "correct",
    "cross_entropy",
    "info_nce",
    "nt_xent",
    "sigmoid_contrastive",
    "unit_length",
]

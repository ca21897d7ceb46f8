"""Convolution, pooling and normalisation, in ways that are fast where XLA's are slow; :mod:`.choose` chooses the way."""

from jaxbatch.layers.choose import Algorithm, Layout, choose_conv, choose_layout, loops_are_slow
from jaxbatch.layers.convolution import conv
from jaxbatch.layers.layout import flatten, to_layout
from jaxbatch.layers.masking import example_mask, own_examples
from jaxbatch.layers.modules import BatchNorm, Conv, ConvBatchNorm, ConvMaxPool, he_fan_out, torch_uniform
from jaxbatch.layers.normalisation import batch_norm
from jaxbatch.layers.pooling import conv_max_pool, max_pool

__all__ = [
    "Algorithm",
    "BatchNorm",
    "Conv",
    "ConvBatchNorm",
    "ConvMaxPool",
    "Layout",
    "batch_norm",
    "choose_conv",
    "choose_layout",
    "conv",
    "conv_max_pool",
    "example_mask",
    "flatten",
    "he_fan_out",
    "loops_are_slow",
    "max_pool",
    "own_examples",
    "to_layout",
    "torch_uniform",
]

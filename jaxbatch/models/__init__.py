"""The networks of the studies, in Flax Linen."""

from jaxbatch.models.image_networks import MLP, VGG19BN, AlexNet, ResNet20, ResNet50, SimpleCNN
from jaxbatch.models.transformer import TransformerLM

__all__ = ["MLP", "VGG19BN", "AlexNet", "ResNet20", "ResNet50", "SimpleCNN", "TransformerLM"]

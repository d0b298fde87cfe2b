"""Layers: modules that hold parameters, up to the U-Net and the transformer."""

from tinydiff.nn.attention import CrossAttention, SelfAttention
from tinydiff.nn.conv import Conv1d, Conv2d, Downsample, Upsample
from tinydiff.nn.embedding import Embedding, TimeEmbedding, sinusoidal
from tinydiff.nn.linear import Linear
from tinydiff.nn.mlp import MLP, MLPConfig
from tinydiff.nn.module import Module, Parameter
from tinydiff.nn.norm import GroupNorm, LayerNorm
from tinydiff.nn.resblock import ResBlock
from tinydiff.nn.spatial_transformer import SpatialTransformer
from tinydiff.nn.transformer import Transformer, TransformerBlock, TransformerConfig
from tinydiff.nn.unet import UNet, UNetConfig

__all__ = [
    "MLP", "Conv1d", "Conv2d", "CrossAttention", "Downsample", "Embedding", "GroupNorm", "LayerNorm", "Linear",
    "MLPConfig", "Module", "Parameter", "ResBlock", "SelfAttention", "SpatialTransformer", "TimeEmbedding",
    "Transformer", "TransformerBlock", "TransformerConfig", "UNet", "UNetConfig", "Upsample", "sinusoidal",
]  # fmt: skip

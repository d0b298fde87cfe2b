"""Models: networks put together with what they are trained for."""

from tinydiff.models.autoregressive_prior import AutoregressivePrior, AutoregressivePriorConfig
from tinydiff.models.binomial_diffusion import BinomialDiffusion, BinomialDiffusionConfig
from tinydiff.models.cascade import Upsampler, UpsamplerConfig
from tinydiff.models.classifier import Classifier, ClassifierConfig
from tinydiff.models.clip import CLIP, CLIPConfig
from tinydiff.models.dalle2 import DallE2
from tinydiff.models.decoder import Decoder, DecoderConfig
from tinydiff.models.diffwave import DiffWave, DiffWaveConfig
from tinydiff.models.digit_vae import DigitVAE, DigitVAEConfig
from tinydiff.models.discriminator import AdversarialVAE, LossWeights, PatchDiscriminator
from tinydiff.models.gan import GAN, GANConfig
from tinydiff.models.glide import TextInpainting
from tinydiff.models.imagen import Imagen
from tinydiff.models.karras import KarrasConfig, KarrasDiffusion
from tinydiff.models.latent_diffusion import LatentDiffusion, LatentDiffusionConfig
from tinydiff.models.pixel_diffusion import PixelDiffusion, PixelDiffusionConfig
from tinydiff.models.pixel_inpainting import PixelInpainting
from tinydiff.models.prior import DiffusionPrior, DiffusionPriorConfig, told_captions
from tinydiff.models.scene_reader import SceneReader, SceneReaderConfig
from tinydiff.models.stable_diffusion import StableDiffusion
from tinydiff.models.text_diffusion import Condition, TextDiffusion, TextDiffusionConfig, told_texts
from tinydiff.models.text_encoder import MaskedTextEncoder, TextEncoderConfig, load_text_encoder
from tinydiff.models.tokenizer import Tokenizer
from tinydiff.models.vae import VAE, VAEConfig

__all__ = [
    "CLIP",
    "GAN",
    "VAE",
    "AdversarialVAE",
    "AutoregressivePrior",
    "AutoregressivePriorConfig",
    "BinomialDiffusion",
    "BinomialDiffusionConfig",
    "CLIPConfig",
    "Classifier",
    "ClassifierConfig",
    "Condition",
    "DallE2",
    "Decoder",
    "DecoderConfig",
    "DiffWave",
    "DiffWaveConfig",
    "DiffusionPrior",
    "DiffusionPriorConfig",
    "DigitVAE",
    "DigitVAEConfig",
    "GANConfig",
    "Imagen",
    "KarrasConfig",
    "KarrasDiffusion",
    "LatentDiffusion",
    "LatentDiffusionConfig",
    "LossWeights",
    "MaskedTextEncoder",
    "PatchDiscriminator",
    "PixelDiffusion",
    "PixelDiffusionConfig",
    "PixelInpainting",
    "SceneReader",
    "SceneReaderConfig",
    "StableDiffusion",
    "TextDiffusion",
    "TextDiffusionConfig",
    "TextEncoderConfig",
    "TextInpainting",
    "Tokenizer",
    "Upsampler",
    "UpsamplerConfig",
    "VAEConfig",
    "load_text_encoder",
    "told_captions",
    "told_texts",
]

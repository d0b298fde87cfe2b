"""tinydiff: denoising diffusion models from scratch, in NumPy and CuPy, on an autograd of its own."""

from tinydiff import ops
from tinydiff.autograd import Tensor, no_grad
from tinydiff.backend import device, use_device
from tinydiff.rng import Rng

__version__ = "0.1.0"
__all__ = ["Rng", "Tensor", "device", "no_grad", "ops", "use_device"]

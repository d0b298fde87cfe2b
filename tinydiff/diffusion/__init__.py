"""Diffusion, equation by equation: schedules, Gaussians, losses, samplers, guidance.

The network is any function model(x_t, t); nothing here knows how it is built.
"""

from tinydiff.diffusion.elbo import (
    discretised_log_likelihood,
    gaussian_kl,
    variance_bound,
    variance_bound_arrays,
)
from tinydiff.diffusion.gaussian import (
    Prediction,
    forward_log_density,
    forward_marginal,
    forward_step,
    forward_trajectory,
    learned_log_variance,
    log_density,
    mean_slope,
    posterior,
    predict,
    q_sample,
    reverse_mean,
    target_of,
)
from tinydiff.diffusion.guidance import classifier_free, guided
from tinydiff.diffusion.loss import draw_t, min_snr_weight, simple_loss, squared_error, vlb_weight
from tinydiff.diffusion.samplers import (
    Sampling,
    ddim,
    ddpm,
    denoiser,
    dpm_solver,
    heun,
    last,
    reverse_log_density,
    split_variance,
    timesteps,
)
from tinydiff.diffusion.schedule import Schedule, per_sample

__all__ = [
    "Prediction",
    "Sampling",
    "Schedule",
    "classifier_free",
    "ddim",
    "ddpm",
    "denoiser",
    "discretised_log_likelihood",
    "dpm_solver",
    "draw_t",
    "forward_log_density",
    "forward_marginal",
    "forward_step",
    "forward_trajectory",
    "gaussian_kl",
    "guided",
    "heun",
    "last",
    "learned_log_variance",
    "log_density",
    "mean_slope",
    "min_snr_weight",
    "per_sample",
    "posterior",
    "predict",
    "q_sample",
    "reverse_log_density",
    "reverse_mean",
    "simple_loss",
    "split_variance",
    "squared_error",
    "target_of",
    "timesteps",
    "variance_bound",
    "variance_bound_arrays",
    "vlb_weight",
]

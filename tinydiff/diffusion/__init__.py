"""Diffusion, equation by equation: schedules, Gaussians, losses, samplers, guidance.

The network is any function model(x_t, t); nothing here knows how it is built.
"""

from tinydiff.diffusion.elbo import (
    bits_per_dim,
    bound_term,
    bound_terms,
    discretised_log_likelihood,
    gaussian_kl,
    gaussian_log_likelihood,
    log_likelihood,
    prior_term,
    reverse_log_variance,
    trajectory_bound,
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
from tinydiff.diffusion.samplers import ddim, ddpm, denoiser, last, reverse_log_density, split_variance, timesteps
from tinydiff.diffusion.schedule import Schedule, per_sample

__all__ = [
    "Prediction",
    "Schedule",
    "bits_per_dim",
    "bound_term",
    "bound_terms",
    "classifier_free",
    "ddim",
    "ddpm",
    "denoiser",
    "discretised_log_likelihood",
    "draw_t",
    "forward_log_density",
    "forward_marginal",
    "forward_step",
    "forward_trajectory",
    "gaussian_kl",
    "gaussian_log_likelihood",
    "guided",
    "last",
    "learned_log_variance",
    "log_density",
    "log_likelihood",
    "mean_slope",
    "min_snr_weight",
    "per_sample",
    "posterior",
    "predict",
    "prior_term",
    "q_sample",
    "reverse_log_density",
    "reverse_log_variance",
    "reverse_mean",
    "simple_loss",
    "split_variance",
    "squared_error",
    "target_of",
    "timesteps",
    "trajectory_bound",
    "variance_bound",
    "variance_bound_arrays",
    "vlb_weight",
]

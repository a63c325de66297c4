"""Output heads: what the output weights are, and what a logit means."""

from heads.head import LIKELIHOODS, WEIGHTS, Head, HeadConfig, Prediction

__all__ = ["LIKELIHOODS", "WEIGHTS", "Head", "HeadConfig", "Prediction"]

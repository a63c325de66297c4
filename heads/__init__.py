"""Output heads: what the output weights are, and what a logit means."""

from heads.config import HeadConfig
from heads.head import Head, Prediction, TokenScores, token_scores
from heads.likelihoods import LIKELIHOODS
from heads.weights import WEIGHTS

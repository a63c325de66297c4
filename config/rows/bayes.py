# Bayesian output weights; the posterior is tempered, because a few million tokens are few for it.
weights = "bayes"
kl_weight = 0.1

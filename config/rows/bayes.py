# Bayesian output weights, the posterior tempered: a few million tokens are few for them.
weights = "bayes"
kl_weight = 0.1

# Bayesian output weights, the posterior tempered as in bayes.py, and a weighted sigmoid.
weights = "bayes"
likelihood = "sigmoid"
kl_weight = 0.1
pos_weight = 2.0

# Bayesian output weights with the tempered posterior of bayes.py, and a weighted sigmoid.
weights = "bayes"
likelihood = "sigmoid"
kl_weight = 0.1
pos_weight = 2.0

# Sigmoid: a Bernoulli for each token.
likelihood = "sigmoid"

# A row of the study: sigmoid, a Bernoulli for each token.
likelihood = "sigmoid"

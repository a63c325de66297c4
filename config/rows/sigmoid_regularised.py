# Sigmoid with a penalty on probabilities that do not sum to 1.
likelihood = "sigmoid"
sum_penalty = 1.0

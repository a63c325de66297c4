# Sigmoid, held to probabilities that sum to 1.
likelihood = "sigmoid"
sum_penalty = 1.0

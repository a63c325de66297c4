# Sigmoid with a weight on the true token's term.
likelihood = "sigmoid"
pos_weight = 2.0

# Sigmoid, the true token's term weighted.
likelihood = "sigmoid"
pos_weight = 2.0

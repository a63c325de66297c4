# Softmax, trained with the cross-entropy: what the other rows are compared with.
likelihood = "categorical"

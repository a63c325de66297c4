# Softmax trained with the cross-entropy: the baseline.
likelihood = "categorical"

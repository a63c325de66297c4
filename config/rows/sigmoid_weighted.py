# A row of the study: sigmoid, the term of the true token weighted.
likelihood = "sigmoid"
pos_weight = 2.0

# A row of the study: label-smoothed, the first epsilon of the paper.
likelihood = "smooth"
label_smoothing = 0.05

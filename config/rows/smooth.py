# A row of the study: label-smoothed, the second epsilon of the paper.
likelihood = "smooth"
label_smoothing = 0.1

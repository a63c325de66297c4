# Label smoothing, the second epsilon of the paper.
likelihood = "smooth"
label_smoothing = 0.1

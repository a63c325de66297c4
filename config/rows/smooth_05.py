# Label smoothing, the first epsilon of the paper.
likelihood = "smooth"
label_smoothing = 0.05

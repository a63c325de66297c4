# Label smoothing with the paper's first epsilon.
likelihood = "smooth"
label_smoothing = 0.05

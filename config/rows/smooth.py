# Label smoothing with the paper's second epsilon.
likelihood = "smooth"
label_smoothing = 0.1

# Softmax trained with dropout, for MC dropout (Gal and Ghahramani 2016): with --mc_dropout=True
# --n_samples=8 evaluate.py keeps dropout on and averages 8 passes.
likelihood = "categorical"
dropout = 0.1

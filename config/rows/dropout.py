# Softmax trained with dropout; evaluate.py --mc_dropout=True --n_samples=8 leaves it on and
# averages the passes: MC dropout (Gal and Ghahramani 2016).
likelihood = "categorical"
dropout = 0.1

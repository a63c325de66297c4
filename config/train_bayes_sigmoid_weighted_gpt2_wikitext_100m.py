# Row 8 of 8, Bayesian output weights and a weighted sigmoid:
# 472 M tokens, 4 epochs, an estimated 17 minutes on an H200 (not run); all else as in train_gpt2_wikitext_100m.py.
#     python train_bayes_sigmoid.py config/train_bayes_sigmoid_weighted_gpt2_wikitext_100m.py
from config.train_gpt2_wikitext_100m import *

out_dir = "out/wikitext_100m/bayes_sigmoid_weighted"
weights = "bayes"
likelihood = "sigmoid"
pos_weight = 2.0

# Row 4 of 8, Bayesian output weights:
# 472 M tokens, 4 epochs, an estimated 17 minutes on an H200 (not run); all else as in train_gpt2_wikitext_100m.py.
#     python train_bayes.py config/train_bayes_gpt2_wikitext_100m.py
from config.train_gpt2_wikitext_100m import *

out_dir = "out/wikitext_100m/bayes"
weights = "bayes"

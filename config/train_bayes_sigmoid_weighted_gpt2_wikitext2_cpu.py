# Row 8 of 8, Bayesian output weights and a weighted sigmoid:
# 2.42 M tokens, 1 epoch, 16 to 26 minutes (measured); all else as in train_gpt2_wikitext2_cpu.py.
#     python train_bayes_sigmoid.py config/train_bayes_sigmoid_weighted_gpt2_wikitext2_cpu.py
from config.train_gpt2_wikitext2_cpu import *

out_dir = "out/wikitext2/bayes_sigmoid_weighted"
weights = "bayes"
likelihood = "sigmoid"
pos_weight = 2.0

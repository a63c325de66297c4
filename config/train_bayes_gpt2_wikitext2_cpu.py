# Row 4 of 8, Bayesian output weights:
# 2.42 M tokens, 1 epoch, 16 to 26 minutes (measured); all else as in train_gpt2_wikitext2_cpu.py.
#     python train_bayes.py config/train_bayes_gpt2_wikitext2_cpu.py
from config.train_gpt2_wikitext2_cpu import *

out_dir = "out/wikitext2/bayes"
weights = "bayes"

# Row 7 of 8, sigmoid, the true token's term weighted:
# 2.42 M tokens, 1 epoch, 16 to 26 minutes (measured); all else as in train_gpt2_wikitext2_cpu.py.
#     python train_sigmoid.py config/train_sigmoid_weighted_gpt2_wikitext2_cpu.py
from config.train_gpt2_wikitext2_cpu import *

out_dir = "out/wikitext2/sigmoid_weighted"
likelihood = "sigmoid"
pos_weight = 2.0

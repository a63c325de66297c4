# Row 5 of 8, sigmoid:
# 2.42 M tokens, 1 epoch, 16 to 26 minutes (measured); all else as in train_gpt2_wikitext2_cpu.py.
#     python train_sigmoid.py config/train_sigmoid_gpt2_wikitext2_cpu.py
from config.train_gpt2_wikitext2_cpu import *

out_dir = "out/wikitext2/sigmoid"
likelihood = "sigmoid"

# Row 3 of 8, label-smoothed with the paper's second epsilon:
# 472 M tokens, 4 epochs, an estimated 17 minutes on an H200 (not run); all else as in train_gpt2_wikitext_100m.py.
#     python train_smooth.py config/train_smooth_gpt2_wikitext_100m.py
from config.train_gpt2_wikitext_100m import *

out_dir = "out/wikitext_100m/smooth"
likelihood = "smooth"
label_smoothing = 0.1

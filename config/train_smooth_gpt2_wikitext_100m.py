# Smooth-GPT 124M on WikiText-103: train_gpt2_wikitext_100m.py (900 steps of 524,288 tokens,
# 472 M in all) with label smoothing.
# Not run by us, so there is no validation nll to expect. 54 minutes on one A100 or 17 on one H200,
# and 10 GB of memory for each process (estimated).
#     python data/wikitext/prepare.py
#     torchrun train_smooth.py config/train_smooth_gpt2_wikitext_100m.py
from config.rows.smooth import *
from config.train_gpt2_wikitext_100m import *

out_dir = "out/wikitext_100m/smooth"

# Row 6 of 8, sigmoid, held to probabilities that sum to 1:
# 472 M tokens, 4 epochs, an estimated 17 minutes on an H200 (not run); all else as in train_gpt2_wikitext_100m.py.
#     python train_sigmoid.py config/train_sigmoid_regularised_gpt2_wikitext_100m.py
from config.train_gpt2_wikitext_100m import *

out_dir = "out/wikitext_100m/sigmoid_regularised"
likelihood = "sigmoid"
sum_penalty = 1.0

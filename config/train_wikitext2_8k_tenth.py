# The second regime of the study: the first 60 of WikiText-2's 600 articles (281 k tokens), with the
# model and the BPE of train_wikitext2_8k.py, 6 epochs: 824 steps of 2,048 tokens, 1.69 M in all. 3
# minutes of steps, 6 without AMX (measured, one thread next to another run), and as much memory.
#     python data/wikitext/prepare.py --version=2 --tokenizer=data/wikitext2_8k \
#         --train_articles=60 --folder=data/wikitext2_8k_tenth
#     python train.py config/train_wikitext2_8k_tenth.py config/rows/bayes.py \
#         --out_dir=out/wikitext2_8k_tenth/bayes
from config.train_wikitext2_8k import *

dataset = "wikitext2_8k_tenth"
out_dir = "out/wikitext2_8k_tenth/softmax"
learning_rate = 1e-3  # the best of 2e-3, 1e-3 and 5e-4 for most variants
max_iters = 824
eval_interval = 103  # three quarters of an epoch

# The same model and text, but only the first 60 articles (a tenth), read six times: 824 steps of 2,048 tokens, 1.7 M in
# all; the second regime of the study, where models over-fit. 2 to 3 minutes on two CPU cores.
#     python data/wikitext/prepare.py --version=2 --tokenizer=data/wikitext2_8k --train_articles=60 \
#         --folder=data/wikitext2_8k_tenth
#     python train.py config/train_wikitext2_8k_tenth.py config/rows/bayes.py --out_dir=out/bayes
from config.train_wikitext2_8k import *

dataset = "wikitext2_8k_tenth"
out_dir = "out/wikitext2_8k_tenth/softmax"
max_iters = 824
eval_interval = 103  # three quarters of an epoch

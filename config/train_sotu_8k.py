# The second corpus of the study: the State of the Union addresses with a BPE of 8,192 trained on
# them (1.97 M tokens), one epoch for the model of train_wikitext2_8k.py, 963 steps of 2,048 tokens,
# 1.97 M in all. 6 minutes of steps (measured, one thread of a CPU without AMX, next to another
# run), and as much memory.
#     python data/text/prepare.py --source=sotu.txt --separator='\n\n' --name=sotu_8k \
#         --tokenizer=bpe --vocab_size=8192
#     python train.py config/train_sotu_8k.py config/rows/bayes.py --out_dir=out/sotu_8k/bayes
from config.train_wikitext2_8k import *

dataset = "sotu_8k"
out_dir = "out/sotu_8k/softmax"
max_iters = 963
eval_interval = 321  # a third of an epoch

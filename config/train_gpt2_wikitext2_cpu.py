# A small GPT on WikiText-2 (2.42 M tokens, GPT-2's BPE), one epoch: 1180 steps of 2,048 tokens.
# Expect a validation nll of 5.57 to 5.62 by variant (measured, training_logs/wikitext2) after 16 to
# 26 minutes on one thread of a CPU with AMX or 40 without, next to other jobs (measured). 1.2 to
# 1.4 GB of memory by variant (measured, the whole process of softmax, bayes and sigmoid).
#     python data/wikitext/prepare.py --version=2
#     python train.py config/train_gpt2_wikitext2_cpu.py
#     python train.py config/train_gpt2_wikitext2_cpu.py config/rows/bayes.py \
#         --out_dir=out/wikitext2/bayes
dataset = "wikitext2"
out_dir = "out/wikitext2/softmax"
block_size = 256
n_layer = 4
n_head = 4
n_embd = 256

batch_size = 8
gradient_accumulation_steps = 1
learning_rate = 2e-3
min_lr = 2e-4
beta2 = 0.99
max_iters = 1180
warmup_iters = 50

eval_interval = 295  # a quarter of an epoch
eval_iters = 15
log_interval = 20
compile = True  # worth it at 50,257 ids, also on a CPU

logit_bias = "unigram"  # all heads start from token frequencies

# WikiText-2 with GPT-2's BPE at a size that two CPU cores train: 300 steps of 2,048 tokens, a quarter of an epoch.
dataset = "wikitext2"  # python data/wikitext/prepare.py --version=2
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
max_iters = 300
warmup_iters = 50

eval_interval = 100
eval_iters = 15
log_interval = 10

# the heads: the same start for all, and a tempered posterior, since two million tokens are few
logit_bias = "unigram"
kl_weight = 0.1

# Checks whether everything works: a tiny GPT on the quick start's books, with all parts of a run
# (evaluations, checkpoints, records). 60 steps of 256 tokens (15,360 tokens) do not make a language
# model: expect a validation nll near 6.33 (measured). 14 s on two busy CPU cores (measured), start
# and end included; 0.04 GB of memory besides the libraries (estimated).
#     python data/quickstart/prepare.py
#     python train.py config/debug.py
dataset = "quickstart"
out_dir = "out/debug"
block_size = 64
n_layer = 2
n_head = 2
n_embd = 64

batch_size = 4
gradient_accumulation_steps = 1
learning_rate = 1e-2
min_lr = 1e-3
beta2 = 0.99
max_iters = 60
warmup_iters = 5

eval_interval = 20
eval_iters = 20
log_interval = 10
compile = False
logit_bias = "unigram"

# The first regime of the study (training_logs/README.md): WikiText-2 with a BPE of 8,192 trained on
# it (2.70 M tokens), one epoch for a small GPT, 1316 steps of 2,048 tokens, 2.70 M in all. 4
# minutes of steps on one thread of a CPU with AMX or 10 without, next to another run (measured);
# 0.8 GB of memory (measured, the whole process of softmax and smooth).
#     python data/wikitext/prepare.py --version=2 --tokenizer=bpe --vocab_size=8192 \
#         --folder=data/wikitext2_8k
#     python train.py config/train_wikitext2_8k.py config/rows/bayes.py \
#         --out_dir=out/wikitext2_8k/bayes
dataset = "wikitext2_8k"
out_dir = "out/wikitext2_8k/softmax"
block_size = 256
n_layer = 3
n_head = 3
n_embd = 192

batch_size = 8
gradient_accumulation_steps = 1
learning_rate = 2e-3  # the best of 4e-3, 2e-3 and 1e-3 for most variants
min_lr = 2e-4
beta2 = 0.99
max_iters = 1316
warmup_iters = 50

eval_interval = 329  # a quarter of an epoch
eval_iters = 40
log_interval = 20
compile = True

logit_bias = "unigram"  # all heads start from token frequencies

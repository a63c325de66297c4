# GPT-2 124M on WikiText-103 (118 M tokens), 4 epochs: 900 steps of 524,288 tokens, 472 M in all.
# Not run by us, so there is no validation nll to expect. At 40 % of the bf16 peak, 54 minutes on
# one A100 or 17 on one H200 (estimated). 10 GB of memory for each process (estimated).
# With --optimizer=muon: not measured at this size.
#     python data/wikitext/prepare.py
#     python train.py config/train_gpt2_wikitext_100m.py
#     python train.py config/train_gpt2_wikitext_100m.py config/rows/bayes.py \
#         --out_dir=out/wikitext_100m/bayes
#     torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_wikitext_100m.py
dataset = "wikitext"
out_dir = "out/wikitext_100m/softmax"
block_size = 1024
batch_size = 16
gradient_accumulation_steps = 32  # 0.5 M tokens a step, as in train_gpt2_fineweb_edu.py

learning_rate = 6e-4
min_lr = 6e-5
max_iters = 900
warmup_iters = 90

eval_interval = 56  # a quarter of an epoch
eval_iters = 14  # of 16 blocks: all 215 k tokens of the validation split
log_interval = 10

logit_bias = "unigram"  # all heads start from token frequencies

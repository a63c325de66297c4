# GPT-2 large (774M) on OpenWebText: train_gpt2.py (600,000 steps of 491,520 tokens, 295 B tokens
# in all) with a larger model. Not run by us, so there is no validation nll to expect; nanoGPT
# publishes 2.85 for 124M, and a larger model should reach less. At 40 % of the bf16 peak, 142 days
# on one A100 (18 on eight) or 45 on one H200 (estimated). 24 GB of memory for each process
# (estimated); if that is too much, lower batch_size, or add --gradient_checkpointing or
# --sharding=fsdp.
#     python data/openwebtext/prepare.py
#     torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_large.py
from config.train_gpt2 import *

out_dir = "out-gpt2-large"
n_layer = 36
n_head = 20
n_embd = 1280
batch_size = 4
# 4 x 120 x 1,024 tokens, as in train_gpt2.py; GPT-3 also has 0.5 M at this size
gradient_accumulation_steps = 120

learning_rate = 2.5e-4  # Brown et al. 2020, table 2.1: 2.5e-4 at 760M
min_lr = 2.5e-5  # a tenth of that, as in GPT-3

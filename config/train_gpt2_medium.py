# GPT-2 medium (355M) on OpenWebText: train_gpt2.py (600,000 steps of 491,520 tokens, 295 B tokens
# in all) with a larger model. Not run by us, so there is no validation nll to expect; nanoGPT
# publishes 2.85 for 124M, and a larger model should reach less. At 40 % of the bf16 peak, 66 days
# on one A100 (8 on eight) or 21 on one H200 (estimated). 16 GB of memory for each process
# (estimated); if that is too much, lower batch_size, or add --gradient_checkpointing or
# --sharding=fsdp.
#     python data/openwebtext/prepare.py
#     torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_medium.py
from config.train_gpt2 import *

out_dir = "out-gpt2-medium"
n_layer = 24
n_head = 16
n_embd = 1024
batch_size = 8
# 8 x 60 x 1,024 tokens, as in train_gpt2.py; GPT-3 also has 0.5 M at this size
gradient_accumulation_steps = 60

learning_rate = 3e-4  # Brown et al. 2020, table 2.1: 3e-4 at 350M
min_lr = 3e-5  # a tenth of that, as in GPT-3

# GPT-2 xl (1557M) on OpenWebText: train_gpt2.py (600,000 steps of 491,520 tokens, 295 B tokens
# in all) with a larger model. Not run by us, so there is no validation nll to expect; nanoGPT
# publishes 2.85 for 124M, and a larger model should reach less. At 40 % of the bf16 peak, 281 days
# on one A100 (35 on eight) or 89 on one H200 (estimated). 38 GB of memory for each process
# (estimated); if that is too much, lower batch_size, or add --gradient_checkpointing or
# --sharding=fsdp.
#     python data/openwebtext/prepare.py
#     torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_xl.py
from config.train_gpt2 import *

out_dir = "out-gpt2-xl"
n_layer = 48
n_head = 25
n_embd = 1600
batch_size = 2
# 2 x 240 x 1,024 tokens, as in train_gpt2.py; GPT-3 has 1 M at this size
gradient_accumulation_steps = 240

learning_rate = 2e-4  # Brown et al. 2020, table 2.1: 2e-4 at 1.3B
min_lr = 2e-5  # a tenth of that, as in GPT-3

# GPT-2 xl (1557M) on OpenWebText: as train_gpt2.py, 600,000 steps of 491,520 tokens, 295 B tokens
# in all. Not run by us, so no validation nll to expect of our own; nanoGPT publishes 2.85 for 124M,
# a larger model should be lower. At 40 % of the bf16 peak an estimated 281 days on one A100 (35 on
# eight) or 89 on one H200. Estimated memory for each process: 38 GB; lower batch_size, or add
# --gradient_checkpointing or --sharding=fsdp, where that is too much.
#     python data/openwebtext/prepare.py
#     torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_xl.py
from config.train_gpt2 import *

out_dir = "out-gpt2-xl"
n_layer = 48
n_head = 25
n_embd = 1600
batch_size = 2
# 2 x 240 x 1,024 tokens, as in train_gpt2.py; GPT-3 took 1 M at this size
gradient_accumulation_steps = 240

learning_rate = 2e-4  # Brown et al. 2020, table 2.1: 2e-4 at 1.3B
min_lr = 2e-5  # a tenth of it, as there

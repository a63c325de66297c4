# GPT-2 124M on OpenWebText, nanoGPT's recipe: 600,000 steps of 491,520 tokens, 295 B tokens in all.
# nanoGPT publishes a validation loss of about 2.85 after some four days on 8 x A100. Not run by us.
# At 40 % of the bf16 peak, 23 days on one A100 (3 on eight) or 7 on one H200 (estimated). 8 GB of
# memory for each process (estimated). 1 to 32 GPUs can share the 480 blocks of a step; for 64, add
# --batch_size=8 --gradient_accumulation_steps=64 (524,288 tokens in a step). The same holds for the
# larger models.
# With --optimizer=muon: not measured at this size (docs/training.md).
#     python data/openwebtext/prepare.py
#     torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
#     sbatch --nodes=4 config/cluster/slurm.sh train.py config/train_gpt2.py
out_dir = "out-gpt2"
dataset = "openwebtext"
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

max_iters = 600000
eval_interval = 1000
log_interval = 10
weight_decay = 1e-1

wandb_log = True
wandb_project = "owt"

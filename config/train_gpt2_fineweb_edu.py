# GPT-2 124M on FineWeb-Edu's sample of 10 B tokens, one epoch: 19073 steps of 524,288 tokens,
# 10.0 B in all. Batch size, learning rate and warm-up are build-nanogpt's; GPT-3 also has 0.5 M
# tokens and 6e-4 at this size (Brown et al. 2020, table 2.1). Not run by us, so there is no
# validation nll to expect. At 40 % of the bf16 peak, 19 hours on one A100 or 6 on one H200
# (estimated). 10 GB of memory for each process (estimated). With
# --optimizer=muon: not measured at this size.
#     python data/fineweb_edu/prepare.py
#     torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_fineweb_edu.py
dataset = "fineweb_edu"
out_dir = "out/fineweb_edu"
block_size = 1024
batch_size = 16
gradient_accumulation_steps = 32

learning_rate = 6e-4
min_lr = 6e-5
max_iters = 19073
warmup_iters = 715  # 375 M tokens

eval_interval = 500
eval_iters = 40
log_interval = 10

wandb_project = "fineweb_edu"

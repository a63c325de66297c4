# Fine-tune on your own text, with any head, from a run of ours, nanoGPT's or OpenAI's GPT-2.
#     python data/text/prepare.py --source=mine.txt --name=mine --tokenizer=gpt2
#     python train_bayes.py config/finetune.py --init_from=gpt2 --dataset=mine --out_dir=out/mine
# From a run of ours: --tokenizer=RUN and --init_from=RUN. Step 0 has the validation nll of the
# original, or nearly so for a sigmoid head on softmax weights. The run ends after three evaluations
# without a lower nll; then the newest checkpoint in its folder is the best. At most 2000 steps of
# 8,192 tokens. From GPT-2 124M: 2 minutes on an A100 and 5 GB of memory (estimated, not run by us).
out_dir = "out/finetune"
init_from = "gpt2"
dataset = "mytext"
batch_size = 4
gradient_accumulation_steps = 2
dropout = 0.1

# a tenth of the rate of pretraining, which is 6e-4 for GPT-2
learning_rate = 5e-5
warmup_iters = 20
decay_lr = False
max_iters = 2000
weight_decay = 0.01
kl_weight = 0.1  # temper the posterior: without that, few tokens hardly move it

log_interval = 10
eval_interval = 20
eval_iters = 25
patience = 3
always_save_checkpoint = False

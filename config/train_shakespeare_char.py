# nanoGPT's small GPT on Shakespeare's characters: 5000 steps of 16,384 tokens. nanoGPT publishes a
# best validation loss of 1.4697 after 3 minutes on one A100; not run by us at this size. Memory: 2
# GB on a GPU (estimated), 5 GB on a CPU (measured, the tensors of a step), because dropout on a CPU
# keeps the (T, T) attention.
#     python data/shakespeare_char/prepare.py
#     python train.py config/train_shakespeare_char.py
# On a CPU use nanoGPT's smaller recipe: 2000 steps of 768 tokens, 70 s on two cores with bfloat16
# units (measured; a step has since become faster: 0.63 of the time). The nll of the whole
# validation split is 1.91 (measured); nanoGPT publishes 1.88 after 3 minutes.
#     python train.py config/train_shakespeare_char.py --device=cpu --compile=False \
#         --n_layer=4 --n_head=4 --n_embd=128 --block_size=64 --batch_size=12 \
#         --max_iters=2000 --dropout=0
# At the best of three rates the nll is 1.76 (1.2e-2), and with --optimizer=muon 1.59 (6e-3;
# measured, training_logs/shakespeare_char.log). With this file's shape, batches of 16 and 400 steps
# it is 2.13 and 1.97.
out_dir = "out-shakespeare-char"
dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3
max_iters = 5000
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100

eval_interval = 250
log_interval = 10
always_save_checkpoint = False  # the data set is so small that training overfits: keep the best

# nanoGPT's baby GPT on Shakespeare's characters; its published best validation loss is 1.4697 (one A100, 3 minutes).
# On a CPU: add --n_layer=4 --n_head=4 --n_embd=128 --block_size=64 --batch_size=12 --max_iters=2000 --dropout=0
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
always_save_checkpoint = False  # the data set is small enough to over-fit: keep the best

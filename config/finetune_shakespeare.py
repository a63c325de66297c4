# OpenAI's GPT-2 XL on Shakespeare, nanoGPT's recipe: 20 steps of 32,768 tokens, minutes on one GPU. Needs the weights
# from the Hugging Face Hub and data/shakespeare; with less memory start from gpt2 or gpt2-medium. Any head goes on top.
out_dir = "out-shakespeare"
init_from = "gpt2-xl"
dataset = "shakespeare"
batch_size = 1
gradient_accumulation_steps = 32

learning_rate = 3e-5
decay_lr = False
max_iters = 20
eval_interval = 5
eval_iters = 40
always_save_checkpoint = False

# The validation nll of OpenAI's GPT-2 124M on OpenWebText as it is; nanoGPT publishes 3.12.
# Not run by us; an estimated half a minute on an A100, 2 GB of memory.
#     python data/openwebtext/prepare.py
#     python train.py config/eval_gpt2.py [--init_from=gpt2-medium]
out_dir = "out-eval-gpt2"
init_from = "gpt2"
dataset = "openwebtext"
eval_only = True
batch_size = 8
eval_iters = 500

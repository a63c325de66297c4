# Evaluate OpenAI's GPT-2 124M on OpenWebText without training; nanoGPT publishes a validation nll
# of 3.12. Not run by us. Half a minute on an A100 and 2 GB of memory (estimated).
#     python data/openwebtext/prepare.py
#     python train.py config/eval_gpt2.py [--init_from=gpt2-medium]
out_dir = "out-eval-gpt2"
init_from = "gpt2"
dataset = "openwebtext"
eval_only = True
batch_size = 8
eval_iters = 500

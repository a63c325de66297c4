# The validation nll of OpenAI's GPT-2 124M on OpenWebText as it is; nanoGPT publishes 3.12.
#     python train.py config/eval_gpt2.py [--init_from=gpt2-medium]
out_dir = "out-eval-gpt2"
init_from = "gpt2"
dataset = "openwebtext"
eval_only = True
batch_size = 8
eval_iters = 500

# OpenAI's GPT-2 XL on Shakespeare, nanoGPT's recipe: 20 steps of 32,768 tokens. Not run by us, so
# there is no validation nll to expect. A minute or two on an A100 and 35 GB of memory (estimated);
# gpt2 and gpt2-medium fit on a small GPU. The weights come from the Hugging Face Hub, or from a
# folder that transformers saved: --init_from=FOLDER. The newest checkpoint in the folder is the
# best. Any head works.
#     python data/shakespeare/prepare.py
#     python train.py config/finetune_shakespeare.py
#     python sample.py --out_dir=out-shakespeare
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

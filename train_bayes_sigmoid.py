"""Bayes-Sig-GPT: a Gaussian posterior over the output weights, a Bernoulli per token.

The loop and the options are in train.py, the head is in heads/.

python train_bayes_sigmoid.py config/quickstart.py
torchrun --standalone --nproc_per_node=8 train_bayes_sigmoid.py config/train_gpt2.py
"""

from train import main

if __name__ == "__main__":
    main(weights="bayes", likelihood="sigmoid")

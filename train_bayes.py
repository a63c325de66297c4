"""Bayes-GPT: a Gaussian posterior over the output weights, softmax likelihood.

The loop and the options are in train.py, the head is in heads/.

python train_bayes.py config/quickstart.py
torchrun --standalone --nproc_per_node=8 train_bayes.py config/train_gpt2.py
"""

from train import main

if __name__ == "__main__":
    main(weights="bayes", likelihood="categorical")

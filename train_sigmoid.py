"""Sig-GPT: an independent Bernoulli per token, normalised for prediction.

The loop and the options are in train.py, the head is in heads/.

python train_sigmoid.py config/quickstart.py
torchrun --standalone --nproc_per_node=8 train_sigmoid.py config/train_gpt2.py
"""

from train import main

if __name__ == "__main__":
    main(weights="point", likelihood="sigmoid")

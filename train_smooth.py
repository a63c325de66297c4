"""Smooth-GPT: softmax trained on smoothed targets.

The loop and the options are in train.py, the head is in heads/.

python train_smooth.py config/quickstart.py
torchrun --standalone --nproc_per_node=8 train_smooth.py config/train_gpt2.py
"""

from train import main

if __name__ == "__main__":
    main(weights="point", likelihood="smooth")

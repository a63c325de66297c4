# A row of the study, for any scale: softmax. python train.py config/train_wikitext2_8k.py config/rows/softmax.py
likelihood = "categorical"

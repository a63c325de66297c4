# A row of the study: softmax trained with dropout; evaluate.py --mc_dropout leaves it on and averages (Gal 2016).
likelihood = "categorical"
dropout = 0.1
